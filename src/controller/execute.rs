//! Does what was decided for one object: a preflight, or one attempt at a sweep, each in its turn. `reconcile` drives it.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use kube::{Resource, ResourceExt};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::cache::Seen;
use super::client::ApiError;
use super::lifecycle::catch_panic;
use super::log::log;
use super::model::{Slot, Subject, Update};
use super::{Context, fetch};
use crate::api::condition::{self, ConditionType};
use crate::api::status::{Outcome, Trigger};
use crate::api::{AuditLogSweeper, Failure};
use crate::database::Target;
use crate::preflight::{self, Checked};
use crate::sweep::statement::Cursor;
use crate::sweep::throttle::Peers;
use crate::sweep::{self, Job, Plan, Report};

/// What a sweep or a preflight of the object needs: with the resourceVersions of the Secrets that it was made of.
pub(super) async fn prepare(
    object: &AuditLogSweeper,
    subject: &Subject,
    context: &Context,
) -> Result<(Plan, Target, Vec<String>), Failure> {
    let namespace = object.namespace().unwrap_or_default();
    let target = fetch::target(&context.server, &namespace, object, &context.settings.default_roots);
    let (target, secrets) = target.await?;
    let plan = Plan::new(&subject.spec).map_err(|error| Failure::from(&error))?;
    Ok((plan, target, secrets))
}

/// Looks at all that a sweep rests on, and remembers that it was looked at. A finding for which no sweep may begin is a
/// failure.
pub(super) async fn check(
    plan: &Plan,
    target: &Target,
    subject: &Subject,
    secrets: Vec<String>,
    context: &Context,
) -> Result<Checked, Failure> {
    let turn = context.preflight_limiter.acquire_global();
    let checked = preflight::check_in_turn(plan, target, turn).await.map_err(|error| Failure::from(&error))?;
    if let Some(finding) = checked.blocking() {
        return Err(Failure::from(finding));
    }
    let seen = Seen { generation: subject.generation, secrets, time: Utc::now() };
    context.cache.change(&subject.uid, |entry| entry.checked = Some(seen));
    Ok(checked)
}

/// A sweep of the slot.
pub(super) fn job(object: &AuditLogSweeper, slot: &Slot, plan: Plan, target: Target, peers: Peers) -> Job {
    // What a failed attempt left of the slot's time is not to be given away again.
    let yield_budget = if slot.continues.is_some() { Duration::ZERO } else { plan.yield_budget };
    Job { limit: slot.limit, resume_after: resume_after(object), peers, target, plan: Plan { yield_budget, ..plan } }
}

/// One attempt at the sweep of a slot.
pub(super) struct Attempt<'a> {
    pub(super) object: &'a AuditLogSweeper,
    pub(super) subject: &'a Subject,
    pub(super) slot: &'a Slot,
    pub(super) job: Result<Job, Failure>,
    /// The resourceVersions of the Secrets that it was made of.
    pub(super) secrets: Vec<String>,
    pub(super) start: DateTime<Utc>,
    /// What a preflight found, if there was one.
    pub(super) checked: Option<Checked>,
}

impl Attempt<'_> {
    /// Makes it. None: it had to wait for its turn, and the object is another by now.
    pub(super) async fn make(
        mut self,
        context: &Context,
        term: &CancellationToken,
    ) -> Result<Option<Update>, ApiError> {
        let job = match &self.job {
            Ok(job) => job,
            Err(failure) => {
                let failure = failure.clone();
                return Ok(Some(self.end(context, Err(failure))));
            }
        };
        if self.needs_check(context) {
            let checking = check(&job.plan, &job.target, self.subject, self.secrets.clone(), context);
            let checked = tokio::select! {
                checked = catch_panic(checking) => checked.and_then(|checked| checked),
                () = term.cancelled() => return Ok(None),
            };
            match checked {
                Ok(checked) => self.checked = Some(checked),
                Err(failure) => return Ok(Some(self.end(context, Err(failure)))),
            }
        }
        let mut connected = match catch_panic(sweep::connect(job, term)).await {
            Ok(Ok(connected)) => connected,
            Ok(Err(report)) => return Ok(Some(self.end(context, Ok(*report)))),
            Err(failure) => return Ok(Some(self.end(context, Err(failure)))),
        };
        let queued = Instant::now();
        let granted = tokio::select! {
            granted = context.sweep_limiter.acquire_global() => granted,
            () = term.cancelled() => None,
        };
        let Some(granted) = granted else {
            connected.close().await;
            return Ok(None);
        };
        if granted.waited {
            if term.run_until_cancelled(self.still_stands(context)).await.transpose()? != Some(true) {
                connected.close().await;
                return Ok(None);
            }
            let waited = queued.elapsed();
            connected.waited(waited);
            self.start += TimeDelta::from_std(waited).unwrap_or_default();
        }
        // Before it starts: whatever becomes of the status, the slot is taken.
        let next = self.subject.grid().after(self.start, self.start);
        context.cache.change(&self.subject.uid, |entry| entry.not_before = Some(next));
        let result = catch_panic(sweep::run(connected, job, term)).await;
        drop(granted.permit);
        Ok(Some(self.end(context, result)))
    }

    /// Counts it for the metrics.
    fn count(&self, context: &Context, result: &Result<Report, Failure>) {
        let Slot { trigger, schedule_time, continues, .. } = self.slot;
        let instruments = &context.server.instruments;
        if *trigger == Trigger::Schedule && continues.is_none() {
            instruments.began_after((self.start - *schedule_time).to_std().unwrap_or_default());
        }
        let (outcome, rows) = match result {
            Ok(report) => {
                instruments.swept(report.duration);
                (report.outcome(), report.timed_out)
            }
            Err(_) => (Outcome::Failed, 0),
        };
        context.cache.change(&self.subject.uid, |entry| entry.counts.add(outcome, *trigger, rows));
    }

    /// Whether a whole preflight goes before it.
    fn needs_check(&self, context: &Context) -> bool {
        let status = self.object.status.as_ref();
        let ready = status.is_some_and(|status| condition::is_true(&status.conditions, ConditionType::SchemaReady));
        let entry = context.cache.get(&self.subject.uid);
        entry.needs_check(ready, self.subject.generation, &self.secrets, self.start)
    }

    /// Whether the object is still the one that the attempt is for.
    async fn still_stands(&self, context: &Context) -> Result<bool, ApiError> {
        let namespace = self.object.namespace().unwrap_or_default();
        let selector = context.settings.selector.as_deref();
        let now = fetch::selected(&context.server, &namespace, &self.object.name_any(), selector).await?;
        Ok(now.is_some_and(|now| {
            let (now, then) = (now.meta(), &self.object.metadata);
            now.uid == then.uid && now.resource_version == then.resource_version
        }))
    }

    fn end(&self, context: &Context, result: Result<Report, Failure>) -> Update {
        log(self.object, self.subject, &result);
        self.count(context, &result);
        let (slot, start) = (self.slot.clone(), self.start);
        let (end, checked) = (Utc::now(), self.checked.clone());
        let update = Update::Sweep { slot, start, end, result: Box::new(result), checked };
        // What the status will say, so that a status that cannot be written changes nothing.
        let status = self.object.status.clone().unwrap_or_default();
        let next = update.apply(self.subject, &status).next_schedule_time;
        context.cache.change(&self.subject.uid, |entry| entry.not_before = next);
        update
    }
}

/// Where the last sweep left off, if rows that the database refuses made it stop.
fn resume_after(object: &AuditLogSweeper) -> Option<Cursor> {
    let status = object.status.as_ref()?;
    // After an edit it may be another table.
    let at = status.unsweepable.as_ref().filter(|_| status.observed_generation == object.metadata.generation)?;
    let at = at.resume_after.as_ref()?;
    at.is_plausible(Utc::now()).then(|| Cursor { time_started: at.time_started.clone(), id: at.id.clone() })
}
