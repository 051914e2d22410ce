//! Which replica leads: client-go's election on a Lease. The only place that asks the API server about leases.
//!
//! Each write carries the resourceVersion of what was read, so of two replicas that reach for the Lease one gets it.
//! Whether another's hold has run out is judged by how long its record did not change before our eyes, on our
//! monotonic clock: the times in the record are for people. The holder gives up by itself at two thirds of the
//! duration, so that its sweeps have the last third to end in before anybody else may begin.

mod candidate;

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::client::ApiError;
use crate::telemetry::http::Readiness;
use crate::telemetry::metrics::{Instruments, Operation};
pub use candidate::LONGEST;
use candidate::{Candidate, Move};

/// The longest that giving the Lease back may take: the process is ending.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(2500);

/// So long after the stop the process has ended.
const LAST: Duration = Duration::from_secs(5);

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
    /// What the identities of this pod's containers begin with, if it is in a pod.
    pub pod: Option<String>,
    /// How long others wait after the last renewal they saw. Whole seconds, at least one.
    pub duration: Duration,
}

impl LeaseSettings {
    /// Whether the holder was this container before it was restarted: the kubelet starts it only once that is dead.
    fn is_predecessor(&self, holder: &str) -> bool {
        self.pod.as_deref().is_some_and(|pod| holder.starts_with(pod))
    }

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

/// A time in which this replica leads.
#[derive(Clone, Debug)]
pub struct Term {
    /// Is cancelled when the lead is lost or the operator stops.
    token: CancellationToken,
    /// When it ends unless the Lease is renewed. A process that was frozen may be past it before anything cancels the token.
    until: Option<Instant>,
}

impl Term {
    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }
}

/// What this replica knows of the election.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// None: it does not lead.
    term: Option<Term>,
    /// Whether another replica holds the Lease.
    another_leads: bool,
}

impl State {
    fn leading(term: Term) -> Self {
        Self { term: Some(term), another_leads: false }
    }
}

/// Whether this replica leads.
#[derive(Clone, Debug)]
pub struct Leadership(watch::Receiver<State>);

impl Leadership {
    /// A leadership that somebody else decides about.
    pub fn elected() -> (watch::Sender<State>, Self) {
        let (sender, receiver) = watch::channel(State::default());
        (sender, Self(receiver))
    }

    /// The token of the term, if this replica leads and does not stop.
    pub fn term(&self) -> Option<CancellationToken> {
        let term = self.0.borrow().term.clone().filter(|term| !term.is_over());
        term.map(|term| term.token).filter(|token| !token.is_cancelled())
    }

    /// Whether this replica leads, also while it stops.
    pub fn leads(&self) -> bool {
        self.0.borrow().term.as_ref().is_some_and(|term| !term.is_over())
    }

    /// Whether another replica is known to lead. Neither may be, as while the API server does not answer.
    pub fn another_leads(&self) -> bool {
        self.0.borrow().another_leads && !self.leads()
    }

    /// Leads from the start until `stop`, without an election.
    pub fn always(stop: &CancellationToken) -> Self {
        Self(watch::channel(State::leading(Term { token: stop.child_token(), until: None })).1)
    }

    /// Waits for a term to begin after those that were seen; None: there will be none.
    pub async fn next_term(&mut self) -> Option<()> {
        loop {
            self.0.changed().await.ok()?;
            if self.0.borrow_and_update().term.is_some() {
                return Some(());
            }
        }
    }
}

/// Takes part in the election until `done`, and then gives the Lease back. After `stop` it no longer reaches for the
/// Lease, but goes on renewing it: sweeps are still ending.
pub async fn elect(
    client: Client,
    settings: LeaseSettings,
    leadership: watch::Sender<State>,
    readiness: Readiness,
    instruments: Instruments,
    stop: CancellationToken,
    done: CancellationToken,
) {
    let api = Api::namespaced(client, &settings.namespace);
    let lease = format!("Lease {}/{}", settings.namespace, settings.name);
    let candidate = Candidate::new(settings);
    let mut election = Election { api, candidate, held: None, leads_until: None, leadership, stop: stop.clone() };
    let mut reported = Reported { lease, holder: None, complaint: String::new() };
    loop {
        match election.leads_until {
            None if stop.is_cancelled() => return,
            // It outlasts us, and a renewal under way would be in the way of giving it back.
            Some(end) if stop.is_cancelled() && end > Instant::now() + LAST => tokio::select! {
                () = done.cancelled() => break,
                () = sleep_until(end - LAST) => {}
            },
            _ => {}
        }
        let settings = &election.candidate.settings;
        let (limit, end) = (settings.request_timeout(), election.leads_until);
        let outcome = tokio::select! {
            outcome = timeout(limit, election.attempt()) => outcome.unwrap_or(Err(ApiError::Timeout(limit))),
            () = until(end) => Err(ApiError::Timeout(limit)),
        };
        if outcome.as_ref().is_err_and(ApiError::is_failure) {
            instruments.api_request_failed(Operation::Lease);
        }
        election.update(Instant::now());
        reported.report(&outcome, &election, &readiness);
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
    match timeout(RELEASE_TIMEOUT, election.release()).await.unwrap_or(Err(ApiError::Timeout(RELEASE_TIMEOUT))) {
        Ok(()) => info!(lease = reported.lease, "given back"),
        Err(error) => warn!(lease = reported.lease, error = %error, "could not be given back; it will run out"),
    }
}

/// What was said of the election, so that it is said once.
struct Reported {
    lease: String,
    holder: Option<String>,
    /// Empty once an attempt went well.
    complaint: String,
}

impl Reported {
    /// Says what came of an attempt.
    fn report(&mut self, outcome: &Result<(), ApiError>, election: &Election, readiness: &Readiness) {
        let lease = &self.lease;
        let Err(error) = outcome else {
            self.complaint.clear();
            readiness.set(PART, None);
            let holder = election.candidate.holder().map(str::to_owned);
            if holder != self.holder {
                let leads = election.leads_until.is_some();
                info!(lease, holder = holder.as_deref().unwrap_or("(nobody)"), leads, "election");
                self.holder = holder;
            }
            return;
        };
        let hint = match error.code() {
            Some(403) => "; grant get, create and update on leases",
            Some(404) => "; name a namespace that is there with --lease-namespace",
            _ => "",
        };
        let complaint = format!("{error}{hint}");
        readiness.set(PART, Some(format!("{lease}: {complaint}")));
        // Once for an outage, not once a second.
        if complaint != self.complaint {
            warn!(lease, error = complaint, "cannot take part in the election; trying again");
            self.complaint = complaint;
        }
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
    leadership: watch::Sender<State>,
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
            // Changed, made or deleted since: look again. Where none can be made, there is no such namespace.
            Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 && lease.is_some() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Begins or ends a term as `leads_until` says.
    fn update(&mut self, now: Instant) {
        if self.leads_until.is_some_and(|end| now >= end) {
            self.leads_until = None;
        }
        let (leads, until) = (self.leadership.borrow().term.is_some(), self.leads_until);
        let another_leads = self.candidate.is_held_by_another(now);
        if leads && self.leads_until.is_none() {
            warn!(identity = self.candidate.settings.identity, "lost the lease: sweeps are stopped");
            if let Some(term) = self.leadership.send_replace(State { term: None, another_leads }).term {
                term.token.cancel();
            }
        } else if !leads && until.is_some() {
            info!(identity = self.candidate.settings.identity, "leading");
            self.leadership.send_replace(State::leading(Term { token: self.stop.child_token(), until }));
        } else {
            // A renewal is no new term.
            self.leadership.send_if_modified(|state| {
                state.another_leads = another_leads;
                state.term.iter_mut().for_each(|term| term.until = until);
                false
            });
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

    #[tokio::test]
    async fn a_term_ends_with_the_operator_and_each_one_is_announced() {
        let stop = CancellationToken::new();
        let term = || Term { token: stop.child_token(), until: None };
        let (sender, mut leadership) = Leadership::elected();
        assert!(leadership.term().is_none());
        sender.send_replace(State::leading(term()));
        assert_eq!(leadership.next_term().await, Some(()));
        sender.send_replace(State::default());
        sender.send_replace(State::leading(term()));
        assert_eq!(leadership.next_term().await, Some(()));
        assert!(leadership.term().is_some());
        stop.cancel();
        assert!(leadership.term().is_none() && leadership.leads());
        drop(sender);
        assert_eq!(leadership.next_term().await, None);
    }

    #[tokio::test]
    async fn a_process_that_was_frozen_past_its_term_does_not_lead() {
        let (sender, leadership) = Leadership::elected();
        let token = CancellationToken::new();
        let (soon, past) = (Instant::now() + Duration::from_secs(60), Instant::now());
        for (until, leads) in [(soon, true), (past, false)] {
            sender.send_replace(State::leading(Term { token: token.clone(), until: Some(until) }));
            assert_eq!((leadership.leads(), leadership.term().is_some()), (leads, leads));
        }
    }
}
