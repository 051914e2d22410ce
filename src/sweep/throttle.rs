//! Whether a sweep gives way to others who write to the same server: pure, fed by what each batch saw.
//!
//! A request that ends while a batch of a thousand rows is written waits for the same processors and the same log. So
//! once others write, batches are small, with a pause behind each. A backlog can wait; but a sweep has an end, so it
//! gives way for a share of its time only, and is back at its full speed well before that is over. It never gives way
//! while another sweep waits for its turn. Sweeps of one process on one server are no others to each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Fewer transactions of others between two batches are nobody whom a sweep holds up; and sweeps beside it, of which
/// there are some on a server, may each have one that is counted a batch too soon or too late.
const OTHERS: i64 = 4;

/// Others who wrote so little for so long are gone.
const GONE: Duration = Duration::from_secs(1);

/// Rows of a batch that gives way. Measured (docs/design.md): the size matters to the slowest 1 % of requests, the pause
/// little.
const ROWS: i64 = 10;

/// How long a sweep leaves the server alone before such a batch.
pub const PAUSE: Duration = Duration::from_millis(5);

/// The sizes double so often in as long as a sweep gave way; the last is above any batch.
const DOUBLINGS: u32 = 10;

/// What the sweeps of one process on one server know of each other.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    /// Transactions that they began.
    started: Arc<AtomicU64>,
    /// How many sweeps wait for a turn on the server.
    waiting: Arc<AtomicUsize>,
    /// How many wait for a turn anywhere.
    waiting_anywhere: Arc<AtomicUsize>,
}

impl Peers {
    /// Of those who wait for the server, and those who wait anywhere.
    pub fn new(started: Arc<AtomicU64>, waiting: Arc<AtomicUsize>, waiting_anywhere: Arc<AtomicUsize>) -> Self {
        Self { started, waiting, waiting_anywhere }
    }

    /// One of them begins a transaction; how many they began, with this one.
    pub fn start(&self) -> u64 {
        self.started.fetch_add(1, Ordering::Relaxed).saturating_add(1)
    }

    /// Whether another sweep waits until one of them is over.
    pub fn are_waiting(&self) -> bool {
        [&self.waiting, &self.waiting_anywhere].iter().any(|waiting| waiting.load(Ordering::Relaxed) > 0)
    }
}

/// What a sweep knows of others.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Throttle {
    /// Times are counted from the start of the sweep. So long it gives way.
    yield_budget: Duration,
    /// The server's count of transactions when the last batch began, and that of the company.
    counts: Option<(u64, u64)>,
    /// Others write: how many transactions, and since when they are counted.
    others: Option<(i64, Duration)>,
}

impl Throttle {
    /// Gives way for so long at most.
    pub const fn new(yield_budget: Duration) -> Self {
        Self { yield_budget, counts: None, others: None }
    }

    /// A batch, the last that the company `begun`, saw `at` this time that the server had `ended` so many transactions
    /// that wrote.
    pub fn record(&mut self, ended: u64, started: u64, at: Duration) {
        let Some(before) = self.counts.replace((ended, started)) else { return };
        // The batch itself is still open; the last one has ended meanwhile.
        let own = signed(started.saturating_sub(before.1));
        let new = signed(ended.saturating_sub(before.0)).saturating_sub(own);
        self.others = match self.others {
            None => (new >= OTHERS).then_some((0, at)),
            Some((others, since)) if at.saturating_sub(since) < GONE => Some((others.saturating_add(new), since)),
            Some((others, _)) => (others.saturating_add(new) >= OTHERS).then_some((0, at)),
        };
    }

    /// The most rows of the next batch, which then comes after a [`PAUSE`]. None: nobody is in the way.
    pub fn max_rows(&self, at: Duration) -> Option<i64> {
        self.others.filter(|_| !self.yield_budget.is_zero())?;
        let step = (self.yield_budget / DOUBLINGS).max(Duration::from_millis(1));
        let steps = at.saturating_sub(self.yield_budget).as_millis().div_ceil(step.as_millis());
        let doublings = u32::try_from(steps).ok().filter(|doublings| *doublings < DOUBLINGS)?;
        Some(ROWS << doublings)
    }
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// The most rows of each batch, every 10 ms, where others write as many transactions before it.
    fn play(throttle: &mut Throttle, from: u64, others: &[u64]) -> Vec<Option<i64>> {
        let (mut ended, mut started) = throttle.counts.unwrap_or((1_000_000, 7));
        let mut sizes = vec![];
        for (batch, others) in (0..).zip(others) {
            started += 1;
            // The batch before is over by now, and so are the others.
            ended += others + u64::from(throttle.counts.is_some());
            let at = millis(from + 10 * batch);
            throttle.record(ended, started, at);
            sizes.push(throttle.max_rows(at));
        }
        sizes
    }

    #[test]
    fn a_server_that_is_left_to_the_sweep_is_swept_at_full_speed() {
        let mut throttle = Throttle::new(MINUTE);
        assert_eq!(play(&mut throttle, 0, &[500, 0, 3, 1, 0, 3, 1, 0]), [None; 8]);
    }

    #[test]
    fn it_gives_way_from_when_others_are_seen_until_they_are_gone_for_a_second() {
        let mut throttle = Throttle::new(MINUTE);
        // What came before the first batch tells nothing.
        assert_eq!(play(&mut throttle, 0, &[500, 4]), [None, Some(ROWS)]);
        // Seen at 10 ms; the last of them is counted in the first second, and none in the next.
        let mut others = vec![0; 300];
        others[50] = 4;
        let sizes = play(&mut throttle, 20, &others);
        let back = sizes.iter().position(Option::is_none).unwrap();
        assert_eq!(back, 199, "20 ms + 199 * 10 ms is 2 s after they were seen");
        assert!(sizes[back..].iter().all(Option::is_none));
    }

    #[test]
    fn the_companys_transactions_are_nobody_elses() {
        let mut throttle = Throttle::new(MINUTE);
        throttle.record(100, 1, millis(0));
        // The batch that saw this, and three tries of a single row that told nothing.
        throttle.record(104, 5, millis(50));
        // Two sweeps beside it: each with a transaction that is counted here a batch later than there, and then sooner.
        for (batch, late) in (1..1000).zip([2, 0].iter().cycle()) {
            throttle.record(104 + 30 * batch + late, 5 + 30 * batch, millis(50 + 10 * batch));
            assert_eq!(throttle.max_rows(millis(50 + 10 * batch)), None, "{batch}");
        }
    }

    #[test]
    fn it_gives_way_for_its_patience_and_is_at_full_speed_at_twice_that() {
        for yield_budget in [millis(75_000), millis(150_000), millis(250)] {
            let mut throttle = Throttle::new(yield_budget);
            play(&mut throttle, 0, &[0, 1000]);
            let rows = |share: f64| throttle.max_rows(yield_budget.mul_f64(share));
            assert_eq!((rows(0.0), rows(1.0)), (Some(ROWS), Some(ROWS)));
            assert_eq!((rows(1.09), rows(1.49), rows(1.89)), (Some(20), Some(320), Some(5120)));
            assert_eq!(rows(2.0), None);
        }
        let mut none = Throttle::new(Duration::ZERO);
        assert_eq!(play(&mut none, 0, &[0, 1000, 1000]), [None; 3]);
    }

    #[test]
    fn no_number_overflows() {
        let mut throttle = Throttle::new(Duration::MAX);
        for (ended, started, at) in [
            (0, 0, Duration::ZERO),
            (u64::MAX, 0, Duration::ZERO),
            (0, u64::MAX, Duration::ZERO),
            (u64::MAX, u64::MAX, Duration::MAX),
            (0, 0, Duration::ZERO),
            (u64::MAX, 0, Duration::ZERO),
        ] {
            throttle.record(ended, started, at);
            throttle.max_rows(at);
            throttle.max_rows(Duration::MAX);
        }
        assert_eq!(throttle.max_rows(Duration::MAX), Some(ROWS));
    }
}
