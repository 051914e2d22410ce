//! The pure half of the election: what one replica has seen of the Lease, and what to do about it.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

use super::LeaseSettings;

/// The longest duration of a Lease, ours or another's. A hand can write a century, and nobody would lead again.
pub const LONGEST: Duration = Duration::from_secs(3600);

/// What comes next for a candidate.
#[derive(Clone, Debug, PartialEq)]
pub enum Move {
    /// Nobody has the Lease, or we do, or its holder's time has run out: write this.
    Write(Box<Lease>),
    /// It is held.
    Wait,
}

/// What one replica knows. Times come in, decisions go out.
#[derive(Debug)]
pub struct Candidate {
    pub settings: LeaseSettings,
    /// The record that was seen last, and when it was first seen.
    observed: Option<(LeaseSpec, Instant)>,
    /// It held the Lease before, so a holder now came later and is no predecessor.
    has_held: bool,
}

impl Candidate {
    /// One that has seen nothing yet.
    pub fn new(settings: LeaseSettings) -> Self {
        Self { settings, observed: None, has_held: false }
    }

    /// Takes in a record that was read or written.
    pub fn observe(&mut self, record: &LeaseSpec, now: Instant) {
        self.has_held |= record.holder_identity.as_deref() == Some(&self.settings.identity);
        if self.observed.as_ref().is_none_or(|(seen, _)| seen != record) {
            self.observed = Some((record.clone(), now));
        }
    }

    /// Who holds the Lease, as far as we know.
    pub fn holder(&self) -> Option<&str> {
        let (record, _) = self.observed.as_ref()?;
        record.holder_identity.as_deref().filter(|holder| !holder.is_empty())
    }

    pub fn is_held_by_another(&self, now: Instant) -> bool {
        let Some((record, since)) = &self.observed else { return false };
        let seconds = record.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let duration = seconds.map_or(self.settings.duration, Duration::from_secs).min(LONGEST);
        let another =
            |holder: &str| holder != self.settings.identity && (self.has_held || !self.settings.is_predecessor(holder));
        self.holder().is_some_and(another) && now < *since + duration
    }

    /// What to do about the Lease as it is; None: there is none. `wall` is what people read in the record.
    pub fn next_move(&mut self, lease: Option<&Lease>, now: Instant, wall: Timestamp) -> Move {
        let record = lease.and_then(|lease| lease.spec.as_ref());
        if let Some(record) = record {
            self.observe(record, now);
        }
        // Of a Lease that somebody deleted, the holder knows nothing yet.
        if self.is_held_by_another(now) {
            return Move::Wait;
        }
        let ours = record.filter(|record| record.holder_identity.as_deref() == Some(&self.settings.identity));
        let transitions = record.and_then(|record| record.lease_transitions).unwrap_or_default();
        let spec = LeaseSpec {
            holder_identity: Some(self.settings.identity.clone()),
            lease_duration_seconds: i32::try_from(self.settings.duration.as_secs()).ok(),
            acquire_time: ours.map_or(Some(MicroTime(wall)), |ours| ours.acquire_time.clone()),
            renew_time: Some(MicroTime(wall)),
            lease_transitions: Some(if lease.is_some() && ours.is_none() {
                transitions.saturating_add(1)
            } else {
                transitions
            }),
            ..record.cloned().unwrap_or_default()
        };
        let named = ObjectMeta { name: Some(self.settings.name.clone()), ..ObjectMeta::default() };
        let metadata = lease.map_or(named, |lease| lease.metadata.clone());
        Move::Write(Box::new(Lease { metadata, spec: Some(spec) }))
    }

    /// The record of a Lease that is given back, as client-go writes it.
    pub fn released(&self, held: &Lease, wall: Timestamp) -> Lease {
        let spec = LeaseSpec {
            holder_identity: Some(String::new()),
            lease_duration_seconds: Some(1),
            acquire_time: Some(MicroTime(wall)),
            renew_time: Some(MicroTime(wall)),
            ..held.spec.clone().unwrap_or_default()
        };
        Lease { metadata: held.metadata.clone(), spec: Some(spec) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn candidate(identity: &str) -> Candidate {
        let settings = LeaseSettings {
            namespace: "ns".into(),
            name: "app".into(),
            identity: identity.into(),
            pod: None,
            duration: Duration::from_secs(15),
        };
        Candidate::new(settings)
    }

    fn wall(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn written(next: Move) -> Lease {
        let Move::Write(lease) = next else { panic!("it waits") };
        *lease
    }

    fn spec(lease: &Lease) -> &LeaseSpec {
        lease.spec.as_ref().unwrap()
    }

    #[test]
    fn the_times_are_those_of_client_go() {
        let settings = candidate("a").settings;
        assert_eq!((settings.renew_deadline(), settings.renew_period()), (SECOND * 10, SECOND * 2));
        assert_eq!((settings.poll_period(), settings.request_timeout()), (SECOND, SECOND * 5));
    }

    #[test]
    fn another_has_it_for_as_long_as_its_record_changes_whatever_times_it_holds() {
        let (mut a, mut b, start) = (candidate("a"), candidate("b"), Instant::now());
        let mut lease = written(a.next_move(None, start, wall(9_000_000)));
        for second in 0..100 {
            // Far in the past, and going backwards.
            lease = written(a.next_move(Some(&lease), start + SECOND * second, wall(1_000 - i64::from(second))));
            assert_eq!(b.next_move(Some(&lease), start + SECOND * second, wall(2_000_000)), Move::Wait);
        }
        let last = start + SECOND * 99;
        assert_eq!(b.next_move(Some(&lease), last + SECOND * 15 - Duration::from_millis(1), wall(0)), Move::Wait);
        let taken = written(b.next_move(Some(&lease), last + SECOND * 15, wall(0)));
        assert_eq!((spec(&taken).holder_identity.as_deref(), spec(&taken).lease_transitions), (Some("b"), Some(1)));
        assert_eq!(spec(&taken).acquire_time, Some(MicroTime(wall(0))));
    }

    #[test]
    fn a_renewal_keeps_when_it_was_acquired_and_what_was_read() {
        let (mut a, start) = (candidate("a"), Instant::now());
        let mut lease = written(a.next_move(None, start, wall(1)));
        lease.metadata.resource_version = Some("17".into());
        let renewed = written(a.next_move(Some(&lease), start + SECOND, wall(2)));
        assert_eq!(renewed.metadata, lease.metadata);
        assert_eq!(
            (spec(&renewed).acquire_time.clone(), spec(&renewed).renew_time.clone(), spec(&renewed).lease_transitions),
            (Some(MicroTime(wall(1))), Some(MicroTime(wall(2))), Some(0))
        );
    }

    #[test]
    fn one_that_was_given_back_is_free_at_once_and_one_that_was_deleted_is_not() {
        let (mut a, mut b, start) = (candidate("a"), candidate("b"), Instant::now());
        let lease = written(a.next_move(None, start, wall(1)));
        assert_eq!(b.next_move(Some(&lease), start, wall(1)), Move::Wait);
        assert_eq!(b.next_move(None, start + SECOND * 14, wall(1)), Move::Wait);
        assert!(matches!(b.next_move(None, start + SECOND * 15, wall(1)), Move::Write(_)));
        let mut b = candidate("b");
        assert_eq!(b.next_move(Some(&lease), start, wall(1)), Move::Wait);
        let released = a.released(&lease, wall(2));
        assert!(matches!(b.next_move(Some(&released), start, wall(3)), Move::Write(_)));
    }

    #[test]
    fn a_restarted_container_does_not_wait_for_its_own_predecessor() {
        let mut us = candidate("pod_uid_2");
        let held = |holder: &str| LeaseSpec { holder_identity: Some(holder.into()), ..LeaseSpec::default() };
        for (pod, holder, waits) in [
            (Some("pod_uid_"), "pod_uid_1", false),
            (Some("pod_uid_"), "pod_other_1", true),
            (Some("pod_uid_"), "other_uid_1", true),
            (None, "pod_uid_1", true),
        ] {
            us.settings.pod = pod.map(str::to_owned);
            us.observe(&held(holder), Instant::now());
            assert_eq!(us.is_held_by_another(Instant::now()), waits, "{pod:?} {holder}");
        }
        // Two processes of one pod do not take it from each other for ever.
        us.settings.pod = Some("pod_uid_".into());
        for (holder, waits) in [("pod_uid_2", false), ("pod_uid_3", true)] {
            us.observe(&held(holder), Instant::now());
            assert_eq!(us.is_held_by_another(Instant::now()), waits, "{holder}");
        }
    }

    #[test]
    fn the_holders_word_on_its_duration_counts() {
        let (mut b, start) = (candidate("b"), Instant::now());
        let record = |seconds| LeaseSpec {
            holder_identity: Some("a".into()),
            lease_duration_seconds: seconds,
            ..LeaseSpec::default()
        };
        let lease = |seconds| Lease { spec: Some(record(seconds)), ..Lease::default() };
        assert_eq!(b.next_move(Some(&lease(Some(60))), start, wall(0)), Move::Wait);
        assert_eq!(b.next_move(Some(&lease(Some(60))), start + SECOND * 59, wall(0)), Move::Wait);
        assert!(matches!(b.next_move(Some(&lease(Some(60))), start + SECOND * 60, wall(0)), Move::Write(_)));
        // More than an operator can be told.
        assert_eq!(b.next_move(Some(&lease(Some(i32::MAX))), start, wall(0)), Move::Wait);
        assert_eq!(b.next_move(None, start + LONGEST - SECOND, wall(0)), Move::Wait);
        assert!(matches!(b.next_move(Some(&lease(Some(i32::MAX))), start + LONGEST, wall(0)), Move::Write(_)));
        // Nothing is said: ours.
        assert_eq!(b.next_move(Some(&lease(None)), start + SECOND * 100, wall(0)), Move::Wait);
        assert!(matches!(b.next_move(Some(&lease(None)), start + SECOND * 115, wall(0)), Move::Write(_)));
    }
}
