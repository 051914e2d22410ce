//! Decides whether a sweep yields to other clients that write to the same server. Pure; each batch feeds it.
//!
//! A large batch delays concurrent commits, because both compete for CPU and WAL. While others write, batches are small and a
//! pause precedes each. After the yield budget the size doubles repeatedly, and is full again within twice the budget. A sweep
//! never yields while another sweep waits for a slot. Sweeps of this process are peers, and no other clients to each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// With fewer in a window, the server counts as idle. The margin also covers peer transactions that are counted one batch early or
/// late.
const MIN_OTHER_TRANSACTIONS: i64 = 20;

/// So long transactions of others are counted.
const ACTIVITY_WINDOW: Duration = Duration::from_secs(1);

/// Rows of a batch that gives way. Measured (docs/design.md): the size matters to the slowest 1 % of requests, the pause
/// little.
const THROTTLED_ROWS: i64 = 10;

/// The pause before such a batch.
pub const THROTTLE_PAUSE: Duration = Duration::from_millis(5);

/// How often the size doubles after the yield budget. The last size exceeds every batch.
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
    /// How long the sweep yields, measured from its start.
    yield_budget: Duration,
    /// The server's count of transactions, and that of this process's sweeps, at the last batch.
    last_observation: Option<(u64, u64)>,
    /// Transactions of other clients in this window, and its start.
    window: (i64, Duration),
    /// Whether there are enough in this window, or were in the last one.
    busy: bool,
}

impl Throttle {
    /// Gives way for so long at most.
    pub const fn new(yield_budget: Duration) -> Self {
        Self { yield_budget, last_observation: None, window: (0, Duration::ZERO), busy: false }
    }

    /// Records what a batch observed: writing transactions that `ended` on the server, transactions that the sweeps of this
    /// process `started`, and the time since the start of the sweep.
    pub fn record(&mut self, ended: u64, started: u64, at: Duration) {
        let Some(before) = self.last_observation.replace((ended, started)) else {
            self.window = (0, at);
            return;
        };
        // The batch itself is still open; the last one has ended meanwhile.
        let own = signed(started.saturating_sub(before.1));
        let new = signed(ended.saturating_sub(before.0)).saturating_sub(own);
        let (others, since) = self.window;
        let others = others.saturating_add(new);
        let enough = others >= MIN_OTHER_TRANSACTIONS;
        if at.saturating_sub(since) < ACTIVITY_WINDOW {
            (self.window, self.busy) = ((others, since), self.busy || enough);
        } else {
            (self.window, self.busy) = ((0, at), enough);
        }
    }

    /// The size limit of the next batch, which comes after a [`THROTTLE_PAUSE`]. None: no throttling.
    pub fn max_rows(&self, at: Duration) -> Option<i64> {
        if !self.busy || self.yield_budget.is_zero() {
            return None;
        }
        let step = (self.yield_budget / DOUBLINGS).max(Duration::from_millis(1));
        let steps = at.saturating_sub(self.yield_budget).as_millis().div_ceil(step.as_millis());
        let doublings = u32::try_from(steps).ok().filter(|doublings| *doublings < DOUBLINGS)?;
        Some(THROTTLED_ROWS << doublings)
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
        let (mut ended, mut started) = throttle.last_observation.unwrap_or((1_000_000, 7));
        let mut sizes = vec![];
        for (batch, others) in (0..).zip(others) {
            started += 1;
            // The batch before is over by now, and so are the others.
            ended += others + u64::from(throttle.last_observation.is_some());
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
    fn few_transactions_a_second_are_noticed_too() {
        for (every, noticed) in [(4, Some(79)), (6, None)] {
            let mut throttle = Throttle::new(MINUTE);
            let others: Vec<_> = (1..=300).map(|batch| u64::from(batch % every == 0)).collect();
            play(&mut throttle, 0, &[500]);
            let sizes = play(&mut throttle, 10, &others);
            assert_eq!(sizes.iter().position(Option::is_some), noticed, "one in {every} batches of 10 ms");
        }
    }

    #[test]
    fn it_gives_way_from_when_others_are_seen_until_they_are_gone_for_a_second() {
        let mut throttle = Throttle::new(MINUTE);
        // What came before the first batch tells nothing.
        assert_eq!(play(&mut throttle, 0, &[500, 20]), [None, Some(THROTTLED_ROWS)]);
        // The last of them is counted in the first second, and none in the next.
        let mut others = vec![0; 300];
        others[50] = 4;
        let sizes = play(&mut throttle, 20, &others);
        let back = sizes.iter().position(Option::is_none).unwrap();
        assert_eq!(back, 198, "20 ms + 198 * 10 ms is the end of the second window");
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
            assert_eq!((rows(0.0), rows(1.0)), (Some(THROTTLED_ROWS), Some(THROTTLED_ROWS)));
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
        assert_eq!(throttle.max_rows(Duration::MAX), Some(THROTTLED_ROWS));
    }
}
