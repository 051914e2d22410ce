//! Drives one object through the five steps. The one place of the controller that reads the clock.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kube::{Resource, ResourceExt};
use tracing::{debug, error, info, warn};

use super::decide::{Decision, Slot, decide};
use super::outcome::{Failure, Subject, Update};
use super::resolve::ApiError;
use super::{Context, publish, resolve};
use crate::api::AuditLogSweeper;
use crate::sweep::statement::Cursor;
use crate::sweep::{self, Job, Plan, Report};

/// However far away the next slot is, look at the clock this often: a machine may sleep, a clock may jump. It costs
/// no request.
const LONGEST_WAIT: TimeDelta = TimeDelta::minutes(5);

/// The first and the longest pause after an API request failed.
const API_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What one pass did.
enum Pass {
    /// Something was written; look again.
    Again(Box<AuditLogSweeper>),
    /// Nothing to do until then, or until the object changes.
    Wait(Option<DateTime<Utc>>),
}

/// Does what is due for one object. Never fails as such: every failure is in the status, or is retried here.
///
/// # Errors
/// None.
pub async fn reconcile(
    object: Arc<DeserializeGuard<AuditLogSweeper>>,
    context: Arc<Context>,
) -> Result<Action, Infallible> {
    let _running = context.running.token();
    let uid = object.meta().uid.clone().unwrap_or_default();
    let action = match drive(&object, &uid, &context).await {
        Ok(next) => {
            context.memories.change(&uid, |memory| memory.api_failures = 0);
            next.map_or_else(Action::await_change, |next| {
                let wait = (next - Utc::now()).clamp(TimeDelta::zero(), LONGEST_WAIT);
                Action::requeue(wait.to_std().unwrap_or_default())
            })
        }
        Err(failed) => {
            let failures = context.memories.change(&uid, |memory| {
                memory.api_failures = memory.api_failures.saturating_add(1);
                memory.api_failures
            });
            let (first, longest) = API_RETRY;
            let pause = first.saturating_mul(2_u32.saturating_pow(failures - 1)).min(longest);
            warn!(
                namespace = object.meta().namespace, name = object.meta().name,
                error = sweep::error::chain(&failed), retry_in = ?pause, "the Kubernetes API did not answer as it should"
            );
            Action::requeue(pause)
        }
    };
    Ok(action)
}

async fn drive(
    object: &DeserializeGuard<AuditLogSweeper>,
    uid: &str,
    context: &Context,
) -> Result<Option<DateTime<Utc>>, ApiError> {
    let mut object = match &object.0 {
        Ok(object) => object.clone(),
        Err(invalid) => {
            warn!(
                namespace = invalid.metadata.namespace,
                name = invalid.metadata.name,
                error = invalid.error,
                "invalid object"
            );
            publish::publish_invalid(&context.client, invalid, Utc::now()).await?;
            return Ok(None);
        }
    };
    if let Some(pending) = context.memories.get(uid).pending {
        match publish_update(context, &object, pending).await? {
            Some(written) => object = written,
            None => return Ok(None),
        }
    }
    loop {
        if context.stop.is_cancelled() {
            return Ok(None);
        }
        match pass(&object, uid, context).await? {
            Pass::Again(written) => object = *written,
            Pass::Wait(next) => return Ok(next),
        }
    }
}

async fn pass(object: &AuditLogSweeper, uid: &str, context: &Context) -> Result<Pass, ApiError> {
    let not_before = context.memories.get(uid).next;
    let judge = |object: &AuditLogSweeper, subject: &Subject| {
        decide(Utc::now(), subject, &object.status.clone().unwrap_or_default(), not_before)
    };
    // Before the object is fetched: what is true now may not be when the sweep's turn comes.
    let permit = match judge(object, &Subject::new(object)) {
        Decision::Wait(next) => return Ok(Pass::Wait(next)),
        // Only a closed semaphore refuses, and nobody closes it.
        Decision::Sweep(_) => context.sweeps.acquire().await.ok(),
        _ => None,
    };
    // The watch may lag behind: act on the object as it is now.
    let namespace = object.namespace().unwrap_or_default();
    let object = match resolve::object(&context.client, &namespace, &object.name_any()).await? {
        Some(DeserializeGuard(Ok(object))) if object.uid().as_deref() == Some(uid) => object,
        // Gone, replaced or unreadable: the watch will tell.
        _ => return Ok(Pass::Wait(None)),
    };
    let subject = Subject::new(&object);
    let update = match judge(&object, &subject) {
        Decision::Wait(next) => return Ok(Pass::Wait(next)),
        Decision::Acknowledge => Update::Acknowledged { now: Utc::now() },
        Decision::Suspend => {
            info!(%namespace, name = object.name_any(), "suspended");
            Update::Suspended { now: Utc::now() }
        }
        Decision::Preflight => {
            Update::Preflight { result: preflight(&object, &subject, context).await, now: Utc::now() }
        }
        // Due only since it was fetched: its turn has yet to come.
        Decision::Sweep(_) if permit.is_none() => return Ok(Pass::Again(Box::new(object))),
        Decision::Sweep(slot) => sweep_slot(&object, &subject, slot, context).await,
    };
    let written = publish_update(context, &object, Arc::new((subject, update))).await?;
    Ok(written.map_or(Pass::Wait(None), |written| Pass::Again(Box::new(written))))
}

/// Publishes an update; if the API does not take it, it is remembered and published later.
async fn publish_update(
    context: &Context,
    object: &AuditLogSweeper,
    pending: Arc<(Subject, Update)>,
) -> Result<Option<AuditLogSweeper>, ApiError> {
    let (subject, update) = &*pending;
    context.memories.change(&subject.uid, |memory| memory.pending = Some(pending.clone()));
    let written = publish::publish(&context.client, object, subject, update, Utc::now()).await?;
    context.memories.change(&subject.uid, |memory| {
        memory.pending = None;
        // What was written is what holds: a retry may come sooner than the slot.
        if let Some(status) = written.as_ref().and_then(|written| written.status.as_ref()) {
            memory.next = status.next_schedule_time;
        }
    });
    Ok(written)
}

async fn preflight(object: &AuditLogSweeper, subject: &Subject, context: &Context) -> Result<(), Failure> {
    let namespace = object.namespace().unwrap_or_default();
    let target = resolve::target(&context.client, &namespace, object, &context.settings.default_roots).await?;
    let looked = async { sweep::preflight::preflight(&Plan::new(&subject.spec)?, &target).await };
    looked.await.map_err(|error| Failure::from(&error))
}

async fn sweep_slot(object: &AuditLogSweeper, subject: &Subject, slot: Slot, context: &Context) -> Update {
    let start = Utc::now();
    // Before it starts: whatever becomes of the status, the slot is taken.
    let next = subject.grid().after(start, start);
    context.memories.change(&subject.uid, |memory| memory.next = Some(next));
    let namespace = object.namespace().unwrap_or_default();
    let target = resolve::target(&context.client, &namespace, object, &context.settings.default_roots).await;
    let job = target.and_then(|target| {
        let plan = Plan::new(&subject.spec).map_err(|error| Failure::from(&error))?;
        Ok(Job { plan, target, limit: slot.limit, resume_after: resume_after(object) })
    });
    let result = match job {
        Ok(job) => Ok(sweep::sweep(&job, &context.stop).await),
        Err(failure) => Err(failure),
    };
    log(object, subject, &result);
    let update = Update::Sweep { slot, start, end: Utc::now(), result: Box::new(result) };
    // What the status will say, so that a status that cannot be written changes nothing.
    let next = update.apply(subject, &object.status.clone().unwrap_or_default()).next_schedule_time;
    context.memories.change(&subject.uid, |memory| memory.next = next);
    update
}

/// Where the last sweep left off, if rows that the database refuses made it stop.
fn resume_after(object: &AuditLogSweeper) -> Option<Cursor> {
    let status = object.status.as_ref()?;
    // After an edit it may be another table.
    let at = status.unsweepable.as_ref().filter(|_| status.observed_generation == object.metadata.generation)?;
    let at = at.resume_after.as_ref()?;
    at.is_plausible().then(|| Cursor { time_started: at.time_started.clone(), id: at.id.clone() })
}

/// A healthy system has no stale rows, so rows timed out are a warning.
fn log(object: &AuditLogSweeper, subject: &Subject, result: &Result<Report, Failure>) {
    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
    match result {
        Err(failure) => {
            error!(namespace, name, reason = failure.reason.as_str(), error = failure.message, "sweep failed")
        }
        Ok(report) => {
            let cutoff = report.cutoff.map(|cutoff| cutoff.to_rfc3339());
            let (limit, timed_out, duration_ms) =
                (subject.spec.limit, report.timed_out, report.duration_milliseconds());
            if let Some(why) = &report.refused_why {
                warn!(namespace, name, rows = report.refused, why, "the database refuses rows");
            }
            if let Some(error) = &report.error {
                let reason = error.reason().as_str();
                error!(
                    namespace,
                    name,
                    cutoff,
                    limit,
                    timed_out,
                    duration_ms,
                    reason,
                    error = error.to_string(),
                    "sweep failed"
                );
            } else if timed_out > 0 {
                warn!(namespace, name, cutoff, limit, timed_out, duration_ms, outcome = ?report.outcome(), "rows timed out: their requests never completed them, which may mean crashes upstream");
            } else {
                debug!(namespace, name, cutoff, limit, timed_out, duration_ms, "nothing to time out");
            }
        }
    }
}
