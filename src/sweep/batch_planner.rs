//! How many rows the next batch takes, and what to do when one fails: pure, so that every course of events can be tried
//! without a database. `execute` asks it before and after every batch.
//!
//! A busy server gets smaller batches, and larger ones again after three good ones. A batch with a row that the server
//! refuses is bisected until that row stands alone; the rows around it go at the usual size.

use std::time::Duration;

use super::recovery::Recovery;
use super::throttle::Throttle;
use crate::database::Error;

/// After so many good batches in a row the size doubles.
const GOOD: u32 = 3;

/// A batch that lost against other transactions is tried again this often, after a pause so long.
const CONFLICTS: (u32, Duration) = (5, Duration::from_millis(20));

/// A batch that found the table locked is tried again this often, after a pause so long.
pub const LOCKED: (u32, Duration) = (3, Duration::from_millis(500));

/// So many rows refused in a row for one cause, and none that went well between: it is not the rows.
const ALIKE: i64 = 8;

/// So many rows are stepped over in one sweep.
const REFUSED: i64 = 100;

/// What to try next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Next {
    /// The most rows.
    pub rows: i64,
    /// Whether the next row is taken by itself, in a way that tells its key.
    pub alone: bool,
    /// Whether others write to the server, so that a pause comes before it.
    pub gives_way: bool,
    /// Whether there are fewer rows in it because of them.
    pub small: bool,
}

/// What to do about an error.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reaction {
    /// Try again after this pause.
    Retry(Duration),
    /// Ask the server whether the statement fits no row at all; if not so, go on with fewer rows.
    Diagnose,
    /// Step over the row: the server refuses it, or is too busy for it.
    StepOver { refused: bool },
    /// There was less time than a statement may take, which says nothing of the row.
    OutOfTime,
    /// End with the error.
    Fail,
}

/// The course of one sweep so far.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BatchPlanner {
    most: i64,
    size: i64,
    good: u32,
    /// The server was too busy, and no batch has grown since.
    busy: bool,
    /// Among so many rows from here on one was refused.
    suspects: Option<i64>,
    throttle: Throttle,
    /// Rows refused in all.
    refused: i64,
    streak: FailureStreak,
}

/// What went wrong since the last batch that went well.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct FailureStreak {
    conflicts: u32,
    locked: u32,
    skipped: i64,
    /// The kind of the last refusals, and how many of them came in a row.
    alike: Option<(String, i64)>,
}

impl BatchPlanner {
    /// Starts at the full size, and gives way to others for so long at most.
    pub fn new(most: i64, yield_budget: Duration) -> Self {
        let (most, throttle) = (most.max(1), Throttle::new(yield_budget));
        let streak = FailureStreak::default();
        Self { most, size: most, good: 0, busy: false, suspects: None, throttle, refused: 0, streak }
    }

    /// What to try so long after the start of the sweep, if `left` are left of the limit. `waiting`: another sweep waits
    /// until this one is over, so it gives way to nobody.
    pub fn next(&self, left: i64, at: Duration, waiting: bool) -> Next {
        let alone = match self.suspects {
            Some(suspects) => suspects <= 3,
            None => self.size == 1 && self.busy,
        };
        let usual = if alone { 1 } else { self.suspects.map_or(self.size, |suspects| (suspects / 2).max(1)).min(left) };
        let way = self.throttle.max_rows(at).filter(|_| !waiting);
        let rows = way.map_or(usual, |most| usual.min(most));
        Next { rows, alone, gives_way: way.is_some(), small: rows < usual }
    }

    /// A batch of so many rows went well.
    pub fn went_well(&mut self, rows: i64) {
        self.streak = FailureStreak::default();
        if let Some(suspects) = self.suspects {
            self.suspects = Some(suspects - rows).filter(|left| *left > 0);
            return;
        }
        // A batch that was small for another reason says nothing of larger ones.
        if rows < self.size {
            return;
        }
        self.good += 1;
        if self.good >= GOOD {
            (self.size, self.good, self.busy) = ((self.size * 2).min(self.most), 0, false);
        }
    }

    /// What a batch saw of others, see [`Throttle::record`].
    pub fn saw_others(&mut self, ended: u64, started: u64, at: Duration) {
        self.throttle.record(ended, started, at);
    }

    /// What to do about the error of a try, or of its one row.
    pub fn react(&mut self, tried: Next, error: &Error, of_row: bool, short_of_time: bool) -> Reaction {
        let FailureStreak { conflicts, locked, .. } = &mut self.streak;
        match Recovery::from(error) {
            Recovery::Smaller if of_row && short_of_time => Reaction::OutOfTime,
            Recovery::Smaller if of_row => Reaction::StepOver { refused: false },
            Recovery::Bisect if of_row => Reaction::StepOver { refused: true },
            _ if of_row && *conflicts >= CONFLICTS.0 => Reaction::StepOver { refused: true },
            Recovery::Again if *conflicts < CONFLICTS.0 => {
                *conflicts += 1;
                Reaction::Retry(CONFLICTS.1)
            }
            Recovery::Later if *locked < LOCKED.0 => {
                *locked += 1;
                Reaction::Retry(LOCKED.1)
            }
            Recovery::Smaller if !tried.alone => {
                (self.size, self.good, self.busy, self.suspects) = ((tried.rows / 2).max(1), 0, true, None);
                Reaction::Retry(Duration::ZERO)
            }
            Recovery::Again | Recovery::Bisect if !tried.alone => {
                *conflicts = 0;
                self.suspects = Some(tried.rows.max(1));
                Reaction::Diagnose
            }
            _ => Reaction::Fail,
        }
    }

    /// Steps over a row: what comes behind it is under no suspicion. The error with which to end, if it was one too many.
    pub fn step_over(&mut self, error: Error, refused: bool) -> Option<Error> {
        self.suspects = None;
        if !refused {
            self.streak.skipped += 1;
            return (self.streak.skipped >= ALIKE).then_some(error);
        }
        self.refused += 1;
        self.streak.conflicts = 0;
        let kind = error.kind();
        let rows = self.streak.alike.take().filter(|(last, _)| *last == kind).map_or(1, |(_, rows)| rows + 1);
        self.streak.alike = Some((kind, rows));
        let cause = Box::new(error);
        if rows >= ALIKE {
            Some(Error::AllRefused { rows, cause })
        } else if self.refused >= REFUSED {
            Some(Error::ManyRefused { rows: self.refused, cause })
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::error::{ServerError, Step};

    const CONFLICT: &str = "40001";
    const BUSY: &str = "57014";
    const LOCK: &str = "55P03";
    const REFUSAL: &str = "23514";

    fn error(sqlstate: &str) -> Error {
        Error::Server(ServerError {
            step: Step::Batch,
            sqlstate: sqlstate.into(),
            fatal: false,
            standby: false,
            constraint: None,
            message: String::new(),
        })
    }

    fn planner(most: i64) -> BatchPlanner {
        BatchPlanner::new(most, Duration::ZERO)
    }

    impl BatchPlanner {
        fn rows(&self) -> i64 {
            self.next(i64::MAX, Duration::ZERO, false).rows
        }

        /// Tries what is next, which fails.
        fn fail(&mut self, sqlstate: &str) -> Reaction {
            let next = self.next(i64::MAX, Duration::ZERO, false);
            self.react(next, &error(sqlstate), next.alone, false)
        }
    }

    /// Plays a sweep of `rows` rows of which those in `poison` are refused: the rows named, in order, and how many
    /// statements that took.
    fn play(rows: i64, poison: &[i64], batch: i64) -> (Vec<i64>, i64) {
        let (mut planner, mut at, mut statements, mut named) = (planner(batch), 0, 0, vec![]);
        while at < rows {
            let size = planner.rows();
            statements += 1;
            if !(at..at + size).any(|row| poison.contains(&row)) {
                at += size;
                planner.went_well(size);
                continue;
            }
            match planner.fail(REFUSAL) {
                Reaction::StepOver { refused: true } => {
                    assert!(planner.step_over(error(REFUSAL), true).is_none());
                    named.push(at);
                    at += 1;
                }
                reaction => assert_eq!(reaction, Reaction::Diagnose),
            }
        }
        (named, statements)
    }

    #[test]
    fn every_refused_row_is_named_at_the_cost_of_a_bisection() {
        for batch in [1_i64, 2, 3, 10, 1000, 10_000] {
            let cost = i64::from(batch.ilog2()) + 3;
            for poison in [0, 1, 2, 499, 500, 731, 999, 1500, 1999] {
                let (named, statements) = play(2000, &[poison], batch);
                assert_eq!(named, [poison], "batches of {batch}");
                let without = 2000 / batch + 1;
                assert!(statements <= without + cost, "row {poison}, batches of {batch}: {statements}");
            }
        }
        assert_eq!(play(3000, &[5, 6, 7, 1200, 2999], 1000).0, [5, 6, 7, 1200, 2999]);
    }

    #[test]
    fn a_busy_server_gets_halves_and_three_good_ones_double() {
        let (mut planner, mut sizes) = (planner(1000), vec![]);
        for busy in [true, true, false, false, false, false, false, false, false] {
            let size = planner.rows();
            sizes.push(size);
            if busy {
                assert_eq!(planner.fail(BUSY), Reaction::Retry(Duration::ZERO));
            } else {
                planner.went_well(size);
            }
        }
        sizes.push(planner.rows());
        assert_eq!(sizes, [1000, 500, 250, 250, 250, 500, 500, 500, 1000, 1000]);
        assert_eq!(planner.next(7, Duration::ZERO, false).rows, 7);
    }

    #[test]
    fn batches_that_were_small_for_another_reason_double_nothing() {
        let mut planner = planner(1000);
        planner.fail(BUSY);
        for _ in 0..10 {
            planner.went_well(10);
        }
        assert_eq!(planner.rows(), 500);
    }

    #[test]
    fn at_size_one_a_busy_row_stands_alone_and_is_stepped_over() {
        let mut planner = planner(4);
        for _ in 0..2 {
            assert_eq!(planner.fail(BUSY), Reaction::Retry(Duration::ZERO));
        }
        let next = planner.next(i64::MAX, Duration::ZERO, false);
        assert_eq!((next.rows, next.alone), (1, true));
        assert_eq!(planner.react(next, &error(BUSY), true, true), Reaction::OutOfTime);
        // To choose the row took too long: no row is known to step over.
        assert_eq!(planner.react(next, &error(BUSY), false, false), Reaction::Fail);
        for skipped in 1..=ALIKE {
            assert_eq!(planner.fail(BUSY), Reaction::StepOver { refused: false });
            assert_eq!(planner.step_over(error(BUSY), false).is_some(), skipped == ALIKE, "{skipped}");
        }
    }

    #[test]
    fn conflicts_and_locks_are_tried_again_a_few_times_until_a_batch_goes_well() {
        for (sqlstate, (times, pause), after) in
            [(CONFLICT, CONFLICTS, Reaction::Diagnose), (LOCK, LOCKED, Reaction::Fail)]
        {
            let mut planner = planner(1000);
            for _ in 0..2 {
                for _ in 0..times {
                    assert_eq!(planner.fail(sqlstate), Reaction::Retry(pause));
                }
                planner.went_well(1000);
            }
            for _ in 0..times {
                planner.fail(sqlstate);
            }
            assert_eq!(planner.fail(sqlstate), after);
        }
    }

    #[test]
    fn a_row_that_always_conflicts_is_refused() {
        let mut planner = planner(1);
        for _ in 0..CONFLICTS.0 {
            planner.fail(CONFLICT);
        }
        assert_eq!(planner.fail(CONFLICT), Reaction::Diagnose);
        assert!(planner.next(i64::MAX, Duration::ZERO, false).alone);
        for _ in 0..CONFLICTS.0 {
            assert_eq!(planner.fail(CONFLICT), Reaction::Retry(CONFLICTS.1));
        }
        assert_eq!(planner.fail(CONFLICT), Reaction::StepOver { refused: true });
    }

    #[test]
    fn what_is_no_matter_of_rows_ends_the_sweep() {
        let mut planner = planner(1000);
        for fatal in ["25006", "53300", "XX001"] {
            assert_eq!(planner.fail(fatal), Reaction::Fail);
        }
        let next = planner.next(i64::MAX, Duration::ZERO, false);
        assert_eq!(planner.react(next, &Error::Answer("a batch"), false, false), Reaction::Fail);
    }

    #[test]
    fn refusals_alike_in_a_row_or_a_hundred_in_all_are_too_many() {
        let mut alike = planner(10);
        for refused in 1..ALIKE {
            assert!(alike.step_over(error(REFUSAL), true).is_none(), "{refused}");
        }
        assert!(matches!(alike.step_over(error(REFUSAL), true), Some(Error::AllRefused { rows: ALIKE, .. })));
        // One that went well between, or another kind, begins the row anew.
        let mut mixed = planner(10);
        for refused in 1..REFUSED {
            let sqlstate = ["23514", "23505"][usize::try_from(refused % 2).unwrap()];
            assert!(mixed.step_over(error(sqlstate), true).is_none(), "{refused}");
        }
        assert!(matches!(mixed.step_over(error(REFUSAL), true), Some(Error::ManyRefused { rows: REFUSED, .. })));
    }
}
