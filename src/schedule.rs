//! When a sweep runs: pure functions of times, the spec's period and the object's UID. No clock in here.
//!
//! Slots lie on a grid of `period` whose offset comes from the UID: many sweepers do not fire together, nothing drifts,
//! and a restart changes nothing.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

/// The first retry comes after this; each further one after twice as long.
const FIRST_RETRY: TimeDelta = TimeDelta::seconds(10);

/// No retry comes later than this.
const LAST_RETRY: TimeDelta = TimeDelta::minutes(15);

/// After a failure that was waited for in vain a retry may come later than the next slot, up to this.
pub const SILENCE_RETRY: TimeDelta = TimeDelta::minutes(5);

/// No retry comes later than this while something is missing that others may bring within seconds.
const MISSING_RETRY: TimeDelta = TimeDelta::seconds(60);

/// The slots of one object.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    period: i64,
    offset: i64,
    seed: u64,
}

impl Grid {
    /// The grid of an object: `period` from its spec, the offset from its UID.
    pub fn new(uid: &str, period: Duration) -> Self {
        let period = i64::try_from(period.as_millis()).unwrap_or(i64::MAX).max(1);
        let seed = hash(uid);
        // Below period, so it fits.
        let offset = i64::try_from(seed % period.unsigned_abs()).unwrap_or_default();
        Self { period, offset, seed }
    }

    /// The first slot later than `time`.
    pub fn next(&self, time: DateTime<Utc>) -> DateTime<Utc> {
        self.slot(self.index(time).saturating_add(1))
    }

    /// The last slot not later than `time`.
    pub fn latest(&self, time: DateTime<Utc>) -> DateTime<Utc> {
        self.slot(self.index(time))
    }

    /// Slots are whole seconds: status times have no finer ones.
    fn slot(&self, index: i64) -> DateTime<Utc> {
        let millis = index.saturating_mul(self.period).saturating_add(self.offset);
        // A time that no calendar has is further away than anything will live.
        DateTime::from_timestamp(millis.div_euclid(1000), 0).unwrap_or(DateTime::<Utc>::MAX_UTC)
    }

    fn index(&self, time: DateTime<Utc>) -> i64 {
        let index = (time.timestamp_millis() - self.offset).div_euclid(self.period);
        // Rounding down to the second may have brought the following slot forward to this time.
        if self.slot(index + 1) <= time { index + 1 } else { index }
    }

    /// The slot after a sweep that ran from `start` to `end`: later than its end, and not before half a period after
    /// its start.
    pub fn after(&self, start: DateTime<Utc>, end: DateTime<Utc>) -> DateTime<Utc> {
        self.next((start + self.half()).max(end))
    }

    /// The slot after an edit at `now`: later than now, and not before half a period after the last attempt. Repeated
    /// edits cannot put it off: the slots stay where they are.
    pub fn after_edit(&self, last_attempt: Option<DateTime<Utc>>, now: DateTime<Utc>) -> DateTime<Utc> {
        // An attempt in the future is none: a clock has jumped back since.
        let last = last_attempt.filter(|last| *last <= now);
        self.next(last.map_or(now, |last| (last + self.half()).max(now)))
    }

    /// When to retry after failure number `failures` (from 1) of an attempt that ended at `end`: never later than `next`,
    /// mostly the next slot.
    pub fn retry(&self, failures: i32, missing: bool, end: DateTime<Utc>, next: DateTime<Utc>) -> DateTime<Utc> {
        let doublings = u32::try_from(failures.saturating_sub(1)).unwrap_or_default().min(16);
        let longest = if missing { MISSING_RETRY } else { LAST_RETRY };
        let delay = (FIRST_RETRY * 2_i32.pow(doublings)).min(longest);
        // A tenth either way, so that objects that failed together do not come back together.
        let jitter = i32::try_from((self.seed >> 8).wrapping_add(u64::from(doublings) * 7919) % 201).unwrap_or(100);
        (end + delay * (900 + jitter) / 1000).min(next)
    }

    fn half(&self) -> TimeDelta {
        TimeDelta::milliseconds(self.period / 2)
    }
}

/// FNV-1a: small, and the same for ever, which the standard library's hashers are not.
pub fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(second, 0).unwrap()
    }

    fn grid(period: u64) -> Grid {
        Grid::new("0f8fad5b-d9cb-469f-a165-70867728950e", Duration::from_secs(period))
    }

    #[test]
    fn slots_follow_each_other_by_one_period_for_ever() {
        let grid = grid(600);
        let mut slot = grid.next(at(1_800_000_000));
        for _ in 0..10_000 {
            let next = grid.next(slot);
            assert_eq!(next - slot, TimeDelta::seconds(600));
            slot = next;
        }
        assert_eq!((slot.timestamp() - grid.offset / 1000).rem_euclid(600), 0);
    }

    #[test]
    fn the_next_slot_is_later_than_now_even_between_seconds() {
        let grid = Grid::new("x", Duration::from_millis(5500));
        for millis in 0..20_000 {
            let now = DateTime::from_timestamp_millis(1_800_000_000_000 + millis).unwrap();
            let slot = grid.next(now);
            assert!(slot > now && slot - now <= TimeDelta::milliseconds(6500), "{now} {slot}");
            let latest = grid.latest(now);
            assert!(latest <= now && now - latest <= TimeDelta::milliseconds(6500), "{now} {latest}");
        }
    }

    #[test]
    fn a_sweep_is_followed_no_sooner_than_half_a_period_after_its_start_and_within_one_and_a_half() {
        let grid = grid(600);
        for second in 1_800_000_000..1_800_001_200 {
            let next = grid.after(at(second), at(second + 3));
            let gap = next - at(second);
            assert!(gap > TimeDelta::seconds(300) && gap <= TimeDelta::seconds(900), "{gap}");
        }
    }

    #[test]
    fn a_sweep_longer_than_the_period_is_followed_after_its_end() {
        let next = grid(5).after(at(1_800_000_000), at(1_800_000_100));
        assert!(next > at(1_800_000_100) && next <= at(1_800_000_105));
    }

    #[test]
    fn offsets_spread_evenly() {
        let mut buckets = [0; 10];
        for object in 0..10_000 {
            let grid = Grid::new(&format!("0f8fad5b-d9cb-469f-a165-{object:012x}"), Duration::from_secs(600));
            buckets[usize::try_from(grid.offset / 60_000).unwrap()] += 1;
        }
        assert!(buckets.iter().all(|n| (850..1150).contains(n)), "{buckets:?}");
    }

    #[test]
    fn repeated_edits_cannot_put_a_sweep_off() {
        let grid = grid(600);
        let last = at(1_800_000_000);
        let first = grid.after_edit(Some(last), at(1_800_000_001));
        for second in 1..first.timestamp() - last.timestamp() {
            assert_eq!(grid.after_edit(Some(last), last + TimeDelta::seconds(second)), first);
        }
    }

    #[test]
    fn retries_double_up_to_a_bound_and_never_pass_the_slot() {
        let grid = grid(86_400);
        let far = at(1_900_000_000);
        let delay = |failures, missing| {
            (grid.retry(failures, missing, at(1_800_000_000), far) - at(1_800_000_000)).num_seconds()
        };
        for (failures, missing, seconds) in [
            (1, false, 10),
            (2, false, 20),
            (3, false, 40),
            (7, false, 640),
            (8, false, 900),
            (i32::MAX, false, 900),
            (9, true, 60),
        ] {
            let got = delay(failures, missing);
            assert!((seconds * 9 / 10..=seconds * 11 / 10).contains(&got), "failure {failures}: {got} s");
        }
        assert_eq!(grid.retry(5, false, at(100), at(120)), at(120));
    }

    #[test]
    fn retries_of_objects_that_failed_together_spread_by_a_tenth_and_each_object_keeps_its_own() {
        let delay = |uid: &str, failures| {
            let grid = Grid::new(uid, Duration::from_secs(86_400));
            (grid.retry(failures, false, at(0), at(1_900_000_000)) - at(0)).num_milliseconds()
        };
        let mut buckets = [0; 20];
        for object in 0..20_000 {
            let delay = delay(&format!("0f8fad5b-d9cb-469f-a165-{object:012x}"), 1);
            buckets[usize::try_from(((delay - 9000) / 100).min(19)).unwrap()] += 1;
        }
        assert!(buckets.iter().all(|n| (850..1150).contains(n)), "{buckets:?}");
        // The same after every restart, and in every version.
        let uid = "0f8fad5b-d9cb-469f-a165-70867728950e";
        assert_eq!([1, 2, 3, 4].map(|failures| delay(uid, failures)), [10_760, 19_100, 41_400, 73_120]);
    }

    #[test]
    fn times_beyond_any_calendar_do_not_panic() {
        assert!(grid(8760 * 3600).next(DateTime::<Utc>::MAX_UTC - TimeDelta::days(1)) <= DateTime::<Utc>::MAX_UTC);
        grid(5).next(DateTime::<Utc>::MIN_UTC);
    }
}
