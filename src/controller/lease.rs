//! Which replica leads: client-go's election on a Lease. The only place that asks the API server about leases.
//!
//! Each write carries the resourceVersion of what was read, so of two replicas that reach for the Lease one gets it.
//! Whether another's hold has run out is judged by how long its record did not change before our eyes, on our
//! monotonic clock: the times in the record are for people. The holder gives up by itself at two thirds of the
//! duration, so that its sweeps have the last third to end in before anybody else may begin.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::resolve::ApiError;
use crate::sweep::error::chain;
use crate::telemetry::http::Readiness;

/// The longest that giving the Lease back may take: the process is ending.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(500);

/// The part of the readiness that is about the election.
pub const PART: &str = "lease";

/// Which Lease, and who we are.
#[derive(Clone, Debug)]
pub struct LeaseSettings {
    /// Where the Lease is.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What nobody else calls itself.
    pub identity: String,
    /// How long others wait after the last renewal they saw. Whole seconds, at least one.
    pub duration: Duration,
}

impl LeaseSettings {
    /// After so long without a renewal the holder gives up: 10 s of 15.
    fn renew_deadline(&self) -> Duration {
        self.duration * 2 / 3
    }

    /// How often the holder renews: every 2 s of 15.
    fn renew_period(&self) -> Duration {
        self.duration * 2 / 15
    }

    /// How often the others look, which is how soon they see that it was given back: every second of 15.
    fn poll_period(&self) -> Duration {
        self.duration / 15
    }

    /// The longest that one request may take: an unanswered one leaves time for another.
    fn request_timeout(&self) -> Duration {
        self.duration / 3
    }
}

/// Whether this replica leads. A term is a token that is cancelled when the lead is lost or the operator stops.
#[derive(Clone, Debug)]
pub struct Leadership(watch::Receiver<Option<CancellationToken>>);

impl Leadership {
    /// A leadership that somebody else decides about.
    pub fn elected() -> (watch::Sender<Option<CancellationToken>>, Self) {
        let (sender, receiver) = watch::channel(None);
        (sender, Self(receiver))
    }

    /// The term, if this replica leads.
    pub fn term(&self) -> Option<CancellationToken> {
        self.0.borrow().clone().filter(|term| !term.is_cancelled())
    }

    /// Leads from the start until `stop`, without an election.
    pub fn always(stop: &CancellationToken) -> Self {
        Self(watch::channel(Some(stop.child_token())).1)
    }

    /// Waits for a term to begin after those that were seen; None: there will be none.
    pub async fn next_term(&mut self) -> Option<()> {
        loop {
            self.0.changed().await.ok()?;
            if self.0.borrow_and_update().is_some() {
                return Some(());
            }
        }
    }
}

/// What comes next for a candidate.
#[derive(Clone, Debug, PartialEq)]
enum Move {
    /// Nobody has the Lease, or we do, or its holder's time has run out: write this.
    Write(Box<Lease>),
    /// It is held.
    Wait,
}

/// What one replica knows. Times come in, decisions go out.
#[derive(Debug)]
struct Candidate {
    settings: LeaseSettings,
    /// The record that was seen last, and when it was first seen.
    observed: Option<(LeaseSpec, Instant)>,
}

impl Candidate {
    fn observe(&mut self, record: &LeaseSpec, now: Instant) {
        if self.observed.as_ref().is_none_or(|(seen, _)| seen != record) {
            self.observed = Some((record.clone(), now));
        }
    }

    /// Who holds the Lease, as far as we know.
    fn holder(&self) -> Option<&str> {
        let (record, _) = self.observed.as_ref()?;
        record.holder_identity.as_deref().filter(|holder| !holder.is_empty())
    }

    fn is_held_by_another(&self, now: Instant) -> bool {
        let Some((record, since)) = &self.observed else { return false };
        let seconds = record.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let duration = seconds.map_or(self.settings.duration, Duration::from_secs);
        self.holder().is_some_and(|holder| holder != self.settings.identity) && now < *since + duration
    }

    /// What to do about the Lease as it is; None: there is none. `wall` is what people read in the record.
    fn next_move(&mut self, lease: Option<&Lease>, now: Instant, wall: Timestamp) -> Move {
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
    fn released(&self, held: &Lease, wall: Timestamp) -> Lease {
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

/// Takes part in the election until `done`, and then gives the Lease back. After `stop` it no longer reaches for the
/// Lease, but goes on renewing it: sweeps are still ending.
pub async fn elect(
    client: Client,
    settings: LeaseSettings,
    leadership: watch::Sender<Option<CancellationToken>>,
    readiness: Readiness,
    stop: CancellationToken,
    done: CancellationToken,
) {
    let api = Api::namespaced(client, &settings.namespace);
    let lease = format!("Lease {}/{}", settings.namespace, settings.name);
    let candidate = Candidate { settings, observed: None };
    let mut election = Election { api, candidate, held: None, leads_until: None, leadership, stop: stop.clone() };
    let (mut told, mut complained) = (None, String::new());
    loop {
        if election.leads_until.is_none() && stop.is_cancelled() {
            return;
        }
        let settings = &election.candidate.settings;
        let (limit, end) = (settings.request_timeout(), election.leads_until);
        let outcome = tokio::select! {
            outcome = timeout(limit, election.attempt()) => outcome.unwrap_or(Err(ApiError::Timeout)),
            () = until(end) => Err(ApiError::Timeout),
        };
        match &outcome {
            Ok(()) => {
                complained.clear();
                readiness.set(PART, None);
            }
            Err(error) => {
                let hint = if error.code() == Some(403) { "; grant get, create and update on leases" } else { "" };
                let complaint = format!("{}{hint}", chain(error));
                readiness.set(PART, Some(format!("{lease}: {complaint}")));
                // Once for an outage, not once a second.
                if complaint != complained {
                    warn!(lease, error = complaint, "cannot take part in the election; trying again");
                    complained = complaint;
                }
            }
        }
        election.update(Instant::now());
        let holder = election.candidate.holder().map(str::to_owned);
        if outcome.is_ok() && holder != told {
            info!(
                lease,
                holder = holder.as_deref().unwrap_or("(nobody)"),
                leads = election.leads_until.is_some(),
                "election"
            );
            told = holder;
        }
        let settings = &election.candidate.settings;
        let pause = match election.leads_until {
            Some(end) => (Instant::now() + settings.renew_period()).min(end),
            None => Instant::now() + settings.poll_period(),
        };
        let idle = election.leads_until.is_none();
        tokio::select! {
            () = sleep_until(pause) => {}
            () = done.cancelled() => break,
            () = stop.cancelled(), if idle => {}
        }
    }
    match timeout(RELEASE_TIMEOUT, election.release()).await.unwrap_or(Err(ApiError::Timeout)) {
        Ok(()) => info!(lease, "given back"),
        Err(error) => warn!(lease, error = chain(&error), "could not be given back; it will run out"),
    }
}

async fn until(end: Option<Instant>) {
    match end {
        Some(end) => sleep_until(end).await,
        None => std::future::pending().await,
    }
}

/// A candidate with a way to the API server.
struct Election {
    api: Api<Lease>,
    candidate: Candidate,
    /// The Lease as we wrote it last.
    held: Option<Lease>,
    /// The end of our lead unless it is renewed; None: we do not lead.
    leads_until: Option<Instant>,
    leadership: watch::Sender<Option<CancellationToken>>,
    stop: CancellationToken,
}

impl Election {
    /// Gets or renews the Lease, or sees who has it.
    async fn attempt(&mut self) -> Result<(), ApiError> {
        // What we wrote last saves reading it, until that turns out to be old.
        if let Some(held) = self.held.take()
            && self.write(Some(&held)).await?
        {
            return Ok(());
        }
        let lease = self.api.get_opt(&self.candidate.settings.name).await?;
        self.write(lease.as_ref()).await?;
        Ok(())
    }

    /// Writes the Lease if it is ours to write. False: another wrote it meanwhile.
    async fn write(&mut self, lease: Option<&Lease>) -> Result<bool, ApiError> {
        // Counted from before the request: nobody can have seen it earlier.
        let start = Instant::now();
        let Move::Write(new) = self.candidate.next_move(lease, start, Timestamp::now()) else {
            self.leads_until = None;
            return Ok(true);
        };
        let params = PostParams::default();
        let written = match lease {
            Some(_) => self.api.replace(&self.candidate.settings.name, &params, &new).await,
            None => self.api.create(&params, &new).await,
        };
        match written {
            Ok(written) => {
                if let Some(record) = &written.spec {
                    self.candidate.observe(record, Instant::now());
                }
                self.leads_until = Some(start + self.candidate.settings.renew_deadline());
                self.held = Some(written);
                Ok(true)
            }
            // Changed, made or deleted since: look again.
            Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Begins or ends a term as `leads_until` says.
    fn update(&mut self, now: Instant) {
        if self.leads_until.is_some_and(|end| now >= end) {
            self.leads_until = None;
        }
        let leads = self.leadership.borrow().is_some();
        if leads && self.leads_until.is_none() {
            warn!(identity = self.candidate.settings.identity, "lost the lease: sweeps are stopped");
            if let Some(term) = self.leadership.send_replace(None) {
                term.cancel();
            }
        } else if !leads && self.leads_until.is_some() {
            info!(identity = self.candidate.settings.identity, "leading");
            self.leadership.send_replace(Some(self.stop.child_token()));
        }
    }

    /// Gives the Lease back, if it is ours.
    async fn release(&mut self) -> Result<(), ApiError> {
        let name = &self.candidate.settings.name;
        let held = match self.held.take() {
            Some(held) => Some(held),
            None => self.api.get_opt(name).await?,
        };
        let identity = Some(self.candidate.settings.identity.as_str());
        let is_ours = |lease: &Lease| lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()) == identity;
        let Some(held) = held.filter(is_ours) else { return Ok(()) };
        let released = self.candidate.released(&held, Timestamp::now());
        self.api.replace(name, &PostParams::default(), &released).await?;
        Ok(())
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
            duration: Duration::from_secs(15),
        };
        Candidate { settings, observed: None }
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
        // Nothing is said: ours.
        assert_eq!(b.next_move(Some(&lease(None)), start + SECOND * 100, wall(0)), Move::Wait);
        assert!(matches!(b.next_move(Some(&lease(None)), start + SECOND * 115, wall(0)), Move::Write(_)));
    }

    #[tokio::test]
    async fn a_term_ends_with_the_operator_and_each_one_is_announced() {
        let stop = CancellationToken::new();
        let (sender, mut leadership) = Leadership::elected();
        assert!(leadership.term().is_none());
        sender.send_replace(Some(stop.child_token()));
        assert_eq!(leadership.next_term().await, Some(()));
        sender.send_replace(None);
        sender.send_replace(Some(stop.child_token()));
        assert_eq!(leadership.next_term().await, Some(()));
        assert!(leadership.term().is_some());
        stop.cancel();
        assert!(leadership.term().is_none());
        drop(sender);
        assert_eq!(leadership.next_term().await, None);
    }
}
