//! How many rows the next batch takes: pure, so that every course of events can be tried without a database.
//!
//! A busy server gets smaller batches, and larger ones again after three good ones. A batch with a row that the server
//! refuses is bisected until that row stands alone; the rows around it go at the usual size.

/// After so many good batches in a row the size doubles.
const GOOD: u32 = 3;

/// The pace of one sweep.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BatchPlanner {
    most: i64,
    size: i64,
    good: u32,
    /// The server was too busy, and no batch has grown since.
    busy: bool,
    /// Among so many rows from here on one was refused.
    suspects: Option<i64>,
}

impl BatchPlanner {
    /// Starts at the full size.
    pub fn new(most: i64) -> Self {
        let most = most.max(1);
        Self { most, size: most, good: 0, busy: false, suspects: None }
    }

    /// How many rows the next batch takes, if `left` are left of the limit.
    pub fn next(&self, left: i64) -> i64 {
        self.suspects.map_or(self.size, |suspects| (suspects / 2).max(1)).min(left)
    }

    /// Whether the next row is taken by itself, in a way that tells its key.
    pub fn alone(&self) -> bool {
        match self.suspects {
            Some(suspects) => suspects <= 3,
            None => self.size == 1 && self.busy,
        }
    }

    /// A batch of `rows` went well.
    pub fn went_well(&mut self, rows: i64) {
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

    /// The server was too busy for a batch of `rows`.
    pub fn was_busy(&mut self, rows: i64) {
        (self.size, self.good, self.busy, self.suspects) = ((rows / 2).max(1), 0, true, None);
    }

    /// The server refused a row among `rows`.
    pub fn was_refused(&mut self, rows: i64) {
        self.suspects = Some(rows.max(1));
    }

    /// A row was stepped over: what comes behind it is under no suspicion.
    pub fn stepped_over(&mut self) {
        self.suspects = None;
    }
}

#[cfg(test)]
mod tests {
    use super::BatchPlanner;

    /// Plays a sweep of `rows` rows of which those in `poison` are refused: the rows named, in order, and how many
    /// statements that took.
    fn play(rows: i64, poison: &[i64], batch: i64) -> (Vec<i64>, i64) {
        let (mut planner, mut at, mut statements, mut named) = (BatchPlanner::new(batch), 0, 0, vec![]);
        while at < rows {
            let (alone, size) = (planner.alone(), planner.next(i64::MAX));
            let size = if alone { 1 } else { size };
            statements += 1;
            if !(at..at + size).any(|row| poison.contains(&row)) {
                at += size;
                planner.went_well(size);
            } else if alone {
                named.push(at);
                at += 1;
                planner.stepped_over();
            } else {
                planner.was_refused(size);
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
        let mut planner = BatchPlanner::new(1000);
        let mut sizes = vec![];
        for busy in [true, true, false, false, false, false, false, false, false] {
            let size = planner.next(i64::MAX);
            sizes.push(size);
            if busy { planner.was_busy(size) } else { planner.went_well(size) }
        }
        sizes.push(planner.next(i64::MAX));
        assert_eq!(sizes, [1000, 500, 250, 250, 250, 500, 500, 500, 1000, 1000]);
        assert_eq!(planner.next(7), 7);
    }

    #[test]
    fn batches_that_were_small_for_another_reason_double_nothing() {
        let mut planner = BatchPlanner::new(1000);
        planner.was_busy(1000);
        for _ in 0..10 {
            planner.went_well(10);
        }
        assert_eq!(planner.next(i64::MAX), 500);
    }

    #[test]
    fn at_size_one_a_busy_row_stands_alone() {
        let mut planner = BatchPlanner::new(4);
        for _ in 0..3 {
            assert!(!planner.alone());
            planner.was_busy(planner.next(i64::MAX));
            if planner.next(i64::MAX) == 1 {
                break;
            }
        }
        assert!(planner.alone());
    }
}
