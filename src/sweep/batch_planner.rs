//! Decides the size of the next batch, and what to do about a failed one. Pure, so tests replay any sequence.
//!
//! A busy server halves the size; three successes double it. A refused batch is bisected until the refused row is alone. The
//! rows around it go at the usual size.

use std::time::Duration;

use super::recovery::Recovery;
use super::statement::Locking;
use super::throttle::Throttle;
use crate::database::Error;

/// After this many successes in a row the size doubles.
const GROW_AFTER: u32 = 3;

/// How often a batch that lost against other transactions is tried again, and the pause before each retry.
const CONFLICTS: (u32, Duration) = (5, Duration::from_millis(20));

/// How often a batch that found the table locked is tried again, and the pause before each retry.
pub const LOCKED: (u32, Duration) = (3, Duration::from_millis(500));

/// After this many rows stepped over in a row with the same error, the cause is not the rows.
const MAX_SAME_ERROR: i64 = 8;

/// A sweep ends after it stepped over this many refused rows.
const MAX_REFUSED_ROWS: i64 = 100;

/// The next batch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NextBatch {
    /// Its rows, at most.
    pub rows: i64,
    /// Whether it is one row, chosen in a statement of its own, so that its key is known.
    pub single: bool,
    /// Whether a pause precedes it, because other clients write.
    pub throttled: bool,
    /// Whether throttling reduced its size.
    pub reduced: bool,
    /// How it meets rows that somebody else is changing.
    pub locking: Locking,
}

/// What to do about an error.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reaction {
    /// Try again after this pause.
    Retry(Duration),
    /// Ask the server whether the statement fits no row at all; if not so, go on with fewer rows.
    Diagnose,
    /// Step over the row. It counts as refused, or as skipped if the server was too busy for it.
    StepOver { refused: bool },
    /// There was less time than a statement may take, which says nothing of the row.
    OutOfTime,
    /// End with the error.
    Fail,
}

/// The course of one sweep so far.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BatchPlanner {
    max_size: i64,
    size: i64,
    successes: u32,
    /// The server was too busy, and no batch has grown since.
    busy: bool,
    /// The next rows, this many, contain a refused row.
    suspect_rows: Option<i64>,
    throttle: Throttle,
    locking: Locking,
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
    same_error: Option<(String, i64)>,
}

impl BatchPlanner {
    /// Starts at the full size. The sweep yields to other clients for no longer than its budget.
    pub fn new(max_size: i64, yield_budget: Duration) -> Self {
        let (max_size, throttle) = (max_size.max(1), Throttle::new(yield_budget));
        Self {
            max_size,
            size: max_size,
            successes: 0,
            busy: false,
            suspect_rows: None,
            throttle,
            locking: Locking::Optimistic,
            refused: 0,
            streak: FailureStreak::default(),
        }
    }

    /// After one optimistic batch was rolled back, the rest of the sweep locks rows first: each rollback leaves dead rows.
    pub const fn lock_rows_first(&mut self) {
        self.locking = Locking::Pessimistic;
    }

    /// Returns the next batch, `at` being the time since the start of the sweep and `left` what is left of the limit. With
    /// `waiting`, the sweep does not yield, because another sweep waits for it.
    pub fn next(&self, left: i64, at: Duration, waiting: bool) -> NextBatch {
        let single = match self.suspect_rows {
            Some(suspect_rows) => suspect_rows <= 3,
            None => self.size == 1 && self.busy,
        };
        let usual = if single {
            1
        } else {
            self.suspect_rows.map_or(self.size, |suspect_rows| (suspect_rows / 2).max(1)).min(left)
        };
        let way = self.throttle.max_rows(at).filter(|_| !waiting);
        let rows = way.map_or(usual, |max_size| usual.min(max_size));
        NextBatch { rows, single, throttled: way.is_some(), reduced: rows < usual, locking: self.locking }
    }

    /// Records a batch of this many rows that was committed.
    pub fn record_success(&mut self, rows: i64) {
        self.streak = FailureStreak::default();
        if let Some(suspect_rows) = self.suspect_rows {
            self.suspect_rows = Some(suspect_rows - rows).filter(|left| *left > 0);
            return;
        }
        // A batch below the planned size does not show that larger ones succeed.
        if rows < self.size {
            return;
        }
        self.successes += 1;
        if self.successes >= GROW_AFTER {
            (self.size, self.successes, self.busy) = ((self.size * 2).min(self.max_size), 0, false);
        }
    }

    /// Records what a batch observed of other clients, see [`Throttle::record`].
    pub fn record_activity(&mut self, ended: u64, started: u64, at: Duration) {
        self.throttle.record(ended, started, at);
    }

    /// Decides what to do about an error of a batch; `of_row` if it is about one known row.
    pub fn react(&mut self, tried: NextBatch, error: &Error, of_row: bool, short_of_time: bool) -> Reaction {
        let conflicts = &mut self.streak.conflicts;
        match Recovery::from(error) {
            Recovery::Smaller if of_row && short_of_time => Reaction::OutOfTime,
            // Of a row that was locked by itself, only what its triggers want can be locked by others.
            Recovery::Smaller | Recovery::Later if of_row => Reaction::StepOver { refused: false },
            Recovery::Bisect if of_row => Reaction::StepOver { refused: true },
            _ if of_row && *conflicts >= CONFLICTS.0 => Reaction::StepOver { refused: true },
            Recovery::Again if *conflicts < CONFLICTS.0 => {
                *conflicts += 1;
                Reaction::Retry(CONFLICTS.1)
            }
            Recovery::Smaller if !tried.single => {
                (self.size, self.successes, self.busy, self.suspect_rows) = ((tried.rows / 2).max(1), 0, true, None);
                Reaction::Retry(Duration::ZERO)
            }
            Recovery::Again | Recovery::Bisect | Recovery::Later if !tried.single => {
                *conflicts = 0;
                // What was diagnosed once is a matter of rows.
                match self.suspect_rows.replace(tried.rows.max(1)) {
                    None => Reaction::Diagnose,
                    Some(_) => Reaction::Retry(Duration::ZERO),
                }
            }
            Recovery::Later => self.wait_for_table(error).map_or(Reaction::Fail, Reaction::Retry),
            _ => Reaction::Fail,
        }
    }

    /// Decides what to do if the server refuses the statement whatever its rows. The pause before it is tried again, if it is
    /// the table that is locked. None: end with the error.
    pub fn wait_for_table(&mut self, error: &Error) -> Option<Duration> {
        if Recovery::from(error) != Recovery::Later || self.streak.locked >= LOCKED.0 {
            return None;
        }
        self.suspect_rows = None;
        self.streak.locked += 1;
        Some(LOCKED.1)
    }

    /// Steps over a row and clears the suspicion behind it. Returns the error if the sweep must end.
    pub fn step_over(&mut self, error: Error, refused: bool) -> Option<Error> {
        self.suspect_rows = None;
        if !refused {
            self.streak.skipped += 1;
            return (self.streak.skipped >= MAX_SAME_ERROR).then_some(error);
        }
        self.refused += 1;
        self.streak.conflicts = 0;
        let kind = error.kind();
        let rows = self.streak.same_error.take().filter(|(last, _)| *last == kind).map_or(1, |(_, rows)| rows + 1);
        self.streak.same_error = Some((kind, rows));
        let cause = Box::new(error);
        if rows >= MAX_SAME_ERROR {
            Some(Error::AllRefused { rows, cause })
        } else if self.refused >= MAX_REFUSED_ROWS {
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

    fn planner(max_size: i64) -> BatchPlanner {
        BatchPlanner::new(max_size, Duration::ZERO)
    }

    impl BatchPlanner {
        fn rows(&self) -> i64 {
            self.next(i64::MAX, Duration::ZERO, false).rows
        }

        /// Tries what is next, which fails.
        fn fail(&mut self, sqlstate: &str) -> Reaction {
            let next = self.next(i64::MAX, Duration::ZERO, false);
            self.react(next, &error(sqlstate), next.single, false)
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
                planner.record_success(size);
                continue;
            }
            match planner.fail(REFUSAL) {
                Reaction::StepOver { refused: true } => {
                    assert!(planner.step_over(error(REFUSAL), true).is_none());
                    named.push(at);
                    at += 1;
                }
                reaction => assert!([Reaction::Diagnose, Reaction::Retry(Duration::ZERO)].contains(&reaction)),
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
                planner.record_success(size);
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
            planner.record_success(10);
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
        assert_eq!((next.rows, next.single), (1, true));
        assert_eq!(planner.react(next, &error(BUSY), true, true), Reaction::OutOfTime);
        // To choose the row took too long: no row is known to step over.
        assert_eq!(planner.react(next, &error(BUSY), false, false), Reaction::Fail);
        for skipped in 1..=MAX_SAME_ERROR {
            assert_eq!(planner.fail(BUSY), Reaction::StepOver { refused: false });
            assert_eq!(planner.step_over(error(BUSY), false).is_some(), skipped == MAX_SAME_ERROR, "{skipped}");
        }
    }

    #[test]
    fn conflicts_and_locks_are_tried_again_a_few_times_until_a_batch_goes_well() {
        let (mut conflicts, mut locks) = (planner(1000), planner(1000));
        for _ in 0..2 {
            for _ in 0..CONFLICTS.0 {
                assert_eq!(conflicts.fail(CONFLICT), Reaction::Retry(CONFLICTS.1));
            }
            conflicts.record_success(1000);
            for _ in 0..LOCKED.0 {
                // The table is locked if EXPLAIN waits as well.
                assert_eq!(locks.fail(LOCK), Reaction::Diagnose);
                assert_eq!(locks.wait_for_table(&error(LOCK)), Some(LOCKED.1));
                assert_eq!(locks.rows(), 1000);
            }
            assert_eq!(locks.wait_for_table(&error(LOCK)), None);
            locks.record_success(1000);
        }
        for _ in 0..CONFLICTS.0 {
            conflicts.fail(CONFLICT);
        }
        assert_eq!(conflicts.fail(CONFLICT), Reaction::Diagnose);
        assert_eq!(conflicts.wait_for_table(&error(REFUSAL)), None);
    }

    #[test]
    fn a_row_whose_triggers_wait_for_a_lock_is_found_and_skipped() {
        let mut planner = planner(8);
        assert_eq!(planner.fail(LOCK), Reaction::Diagnose);
        while !planner.next(i64::MAX, Duration::ZERO, false).single {
            assert_eq!(planner.fail(LOCK), Reaction::Retry(Duration::ZERO));
        }
        assert_eq!(planner.fail(LOCK), Reaction::StepOver { refused: false });
        // Not one row is locked but the table, before one is chosen.
        let next = planner.next(i64::MAX, Duration::ZERO, false);
        assert_eq!(planner.react(next, &error(LOCK), false, false), Reaction::Retry(LOCKED.1));
    }

    #[test]
    fn a_row_that_always_conflicts_is_refused() {
        let mut planner = planner(1);
        for _ in 0..CONFLICTS.0 {
            planner.fail(CONFLICT);
        }
        assert_eq!(planner.fail(CONFLICT), Reaction::Diagnose);
        assert!(planner.next(i64::MAX, Duration::ZERO, false).single);
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
        let mut same_error = planner(10);
        for refused in 1..MAX_SAME_ERROR {
            assert!(same_error.step_over(error(REFUSAL), true).is_none(), "{refused}");
        }
        assert!(matches!(
            same_error.step_over(error(REFUSAL), true),
            Some(Error::AllRefused { rows: MAX_SAME_ERROR, .. })
        ));
        // One that went well between, or another kind, begins the row anew.
        let mut mixed = planner(10);
        for refused in 1..MAX_REFUSED_ROWS {
            let sqlstate = ["23514", "23505"][usize::try_from(refused % 2).unwrap()];
            assert!(mixed.step_over(error(sqlstate), true).is_none(), "{refused}");
        }
        assert!(matches!(
            mixed.step_over(error(REFUSAL), true),
            Some(Error::ManyRefused { rows: MAX_REFUSED_ROWS, .. })
        ));
    }
}
