//! Whether a sweep gives way to others who write to the same server: pure, fed by what each batch saw.
//!
//! A request that ends while a batch of a thousand rows is written waits for the same processors and the same log. So
//! once others write, batches are small, with a pause behind each. A backlog can wait; but a sweep has an end, so it
//! gives way for a share of its time only, and is back at its full speed well before that is over.

use std::time::Duration;

/// Fewer transactions of others between two batches are nobody whom a sweep holds up.
const OTHERS: u64 = 2;

/// Others who wrote so little for so long are gone.
const GONE: Duration = Duration::from_secs(1);

/// Rows of a batch that gives way. Measured: 10 rows and 5 ms leave the slowest 1 % of requests 1.3 times as slow as
/// without a sweep, 100 rows 2 times, however long the pause is; 1000 rows without a pause 4 times.
const ROWS: i64 = 10;

/// How long a sweep leaves the server alone after such a batch.
const PAUSE: Duration = Duration::from_millis(5);

/// No sweep gives way for more than a quarter of this, however much time it has.
const LONGEST: Duration = Duration::from_mins(10);

/// The sizes double so often in as long as a sweep gave way; the last is above any batch.
const DOUBLINGS: u32 = 10;

/// What a sweep knows of others.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Courtesy {
    /// Times are counted from the start of the sweep. So long it gives way.
    patience: Duration,
    /// The server's count when the last batch began.
    count: Option<u64>,
    /// Transactions of this sweep since then.
    own: u64,
    /// Others write: how many transactions, and since when they are counted.
    others: Option<(u64, Duration)>,
}

impl Courtesy {
    /// A sweep that is over after `deadline`, and comes again after `period`.
    pub fn new(period: Duration, deadline: Duration) -> Self {
        Self { patience: period.min(deadline).min(LONGEST) / 4, count: None, own: 0, others: None }
    }

    /// A transaction of the sweep's own begins.
    pub fn begins(&mut self) {
        self.own += 1;
    }

    /// A batch saw, `at` this time, that the server had counted so many transactions that wrote.
    pub fn saw(&mut self, count: u64, at: Duration) {
        // The batch itself is still open, and is counted next time.
        let own = std::mem::replace(&mut self.own, 1).saturating_sub(1);
        let Some(before) = self.count.replace(count) else { return };
        let new = count.saturating_sub(before).saturating_sub(own);
        self.others = match self.others {
            None => (new >= OTHERS).then_some((0, at)),
            Some((others, since)) if at.saturating_sub(since) < GONE => Some((others + new, since)),
            Some((others, _)) => (others + new >= OTHERS).then_some((0, at)),
        };
    }

    /// The most rows of the next batch, and how long to leave the server alone before it. None: nobody is in the way.
    pub fn gives_way(&self, at: Duration) -> Option<(i64, Duration)> {
        self.others?;
        let step = (self.patience / DOUBLINGS).max(Duration::from_millis(1));
        let steps = at.saturating_sub(self.patience).as_millis().div_ceil(step.as_millis());
        let doublings = u32::try_from(steps).ok().filter(|doublings| *doublings < DOUBLINGS)?;
        Some((ROWS << doublings, PAUSE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// The sweep's rows a batch, each 10 ms after the one before, where others write as many transactions meanwhile.
    fn play(courtesy: &mut Courtesy, from: u64, others: &[u64]) -> Vec<Option<i64>> {
        let mut count = courtesy.count.unwrap_or(1_000_000);
        let mut sizes = vec![];
        for (batch, others) in (0..).zip(others) {
            courtesy.begins();
            // The batch before is over by now, and so are the others.
            count += others + u64::from(courtesy.count.is_some());
            let at = millis(from + 10 * batch);
            courtesy.saw(count, at);
            sizes.push(courtesy.gives_way(at).map(|(rows, _)| rows));
        }
        sizes
    }

    #[test]
    fn a_server_that_is_left_to_the_sweep_is_swept_at_full_speed() {
        let mut courtesy = Courtesy::new(MINUTE, MINUTE);
        assert_eq!(play(&mut courtesy, 0, &[500, 0, 0, 1, 0, 1, 1, 0]), [None; 8]);
    }

    #[test]
    fn it_gives_way_from_when_others_are_seen_until_they_are_gone_for_a_second() {
        let mut courtesy = Courtesy::new(MINUTE, MINUTE);
        // What came before the first batch tells nothing.
        assert_eq!(play(&mut courtesy, 0, &[500, 2]), [None, Some(ROWS)]);
        // Seen at 10 ms; the last of them is counted in the first second, and none in the next.
        let mut others = vec![0; 300];
        others[50] = 2;
        let sizes = play(&mut courtesy, 20, &others);
        let back = sizes.iter().position(Option::is_none).unwrap();
        assert_eq!(back, 199, "20 ms + 199 * 10 ms is 2 s after they were seen");
        assert!(sizes[back..].iter().all(Option::is_none));
    }

    #[test]
    fn its_own_transactions_are_nobody_elses() {
        let mut courtesy = Courtesy::new(MINUTE, MINUTE);
        courtesy.begins();
        courtesy.saw(100, millis(0));
        // The batch that saw this, and three tries of a single row that told nothing.
        for _ in 0..3 {
            courtesy.begins();
        }
        courtesy.begins();
        courtesy.saw(104, millis(50));
        assert_eq!(courtesy.gives_way(millis(50)), None);
    }

    #[test]
    fn it_gives_way_for_a_quarter_of_its_time_and_is_at_full_speed_at_half() {
        for (period, deadline, patience) in [
            (MINUTE, 5 * MINUTE, millis(15_000)),
            (10 * MINUTE, 5 * MINUTE, millis(75_000)),
            (1000 * MINUTE, 1000 * MINUTE, millis(150_000)),
            (millis(5000), millis(1000), millis(250)),
        ] {
            let mut courtesy = Courtesy::new(period, deadline);
            play(&mut courtesy, 0, &[0, 1000]);
            let rows = |share: f64| courtesy.gives_way(patience.mul_f64(share)).map(|(rows, _)| rows);
            assert_eq!((rows(0.0), rows(1.0)), (Some(ROWS), Some(ROWS)));
            assert_eq!((rows(1.09), rows(1.49), rows(1.89)), (Some(20), Some(320), Some(5120)));
            assert_eq!(rows(2.0), None);
        }
    }

    #[test]
    fn no_number_overflows() {
        let mut courtesy = Courtesy::new(Duration::ZERO, Duration::ZERO);
        courtesy.saw(u64::MAX, Duration::ZERO);
        courtesy.saw(0, Duration::MAX);
        courtesy.begins();
        courtesy.saw(u64::MAX, Duration::MAX);
        assert_eq!(courtesy.gives_way(Duration::MAX), None);
    }
}
