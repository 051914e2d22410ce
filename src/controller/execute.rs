//! Third step: does what was decided for one object. Needs its database for a preflight and for a sweep, each in its turn.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use kube::Resource;
use tokio::sync::{OwnedSemaphorePermit, SemaphorePermit};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::cache::{Kind, PreflightInputs, Queue};
use super::client::ApiError;
use super::decide::Decision;
use super::lifecycle::{catch_panic, run_while_owned};
use super::limits::Limiter;
use super::log::log;
use super::model::{Done, DueSweep, SweepAttempt};
use super::{Context, fetch};
use crate::api::condition::{self, ConditionType};
use crate::api::status::Trigger;
use crate::api::sweeper::requested;
use crate::api::{Failure, Sweeper};
use crate::database::Target;
use crate::preflight::{self, PreflightReport};
use crate::sweep::report::Ended;
use crate::sweep::statement::Cursor;
use crate::sweep::{self, Job, Plan, Report};

/// What work on an object needs.
pub struct Permits<'a> {
    /// To read it and its Secrets. Waiting objects hold only their key, so 10,000 due objects stay small.
    prepare: SemaphorePermit<'a>,
    /// Of the server that it queued for. Never of both kinds: holding one while waiting for the other could deadlock.
    server: Option<OwnedSemaphorePermit>,
}

/// What a preflight or a sweep needs.
struct Prepared {
    plan: Plan,
    target: Target,
    /// The resourceVersions of the Secrets that it was made of.
    secrets: Vec<String>,
}

/// Waits for the permits of an object. It queues for its database server only after no permit was free there.
pub async fn acquire_permits<'a>(uid: &str, context: &'a Context) -> Option<Permits<'a>> {
    let queue = context.cache.change(uid, |entry| entry.queue.take());
    let server = match queue {
        Some(Queue { server, kind }) => limiter(kind, context).acquire_server(&server).await,
        None => None,
    };
    Some(Permits { prepare: context.prepare_slots.acquire().await.ok()?, server })
}

/// Preflights answer to an edit, so long sweeps do not keep them waiting.
fn limiter(kind: Kind, context: &Context) -> &Limiter {
    match kind {
        Kind::Preflight => &context.preflight_limiter,
        Kind::Sweep => &context.sweep_limiter,
    }
}

/// Executes a decision. Returns None if nothing is due, the object changed, or it has to queue for its database server.
pub async fn execute(
    decision: Decision,
    sweeper: &Sweeper,
    permits: Permits<'_>,
    context: &Context,
    term: &CancellationToken,
) -> Result<Option<Done>, ApiError> {
    let (namespace, name) = (sweeper.namespace(), sweeper.name());
    match decision {
        Decision::Wait(_) => Ok(None),
        Decision::Acknowledge => Ok(Some(Done::Acknowledged)),
        Decision::Suspend => {
            info!(namespace, name, "suspended");
            Ok(Some(Done::Suspended))
        }
        Decision::Repair => {
            warn!(namespace, name, "a time in the status is one that no sweep can have; computing the schedule anew");
            Ok(Some(Done::Repaired))
        }
        Decision::Preflight => {
            let prepared = prepare(Kind::Preflight, sweeper, permits, context);
            let Some((prepared, permit)) = term.run_until_cancelled(prepared).await.flatten() else { return Ok(None) };
            let stop = term.child_token();
            let work = Box::pin(stop.run_until_cancelled(preflight(sweeper, prepared, context)));
            let result = run_while_owned(&context.stores, &sweeper.metadata, &stop, work).await;
            drop(permit);
            Ok(result.map(Done::Preflight))
        }
        Decision::Sweep(slot) => {
            let began = Instant::now();
            let prepared = prepare(Kind::Sweep, sweeper, permits, context);
            let Some((prepared, permit)) = term.run_until_cancelled(prepared).await.flatten() else { return Ok(None) };
            let stop = term.child_token();
            let work = Box::pin(sweep(slot, sweeper, prepared, began, context, &stop));
            let attempt = run_while_owned(&context.stores, &sweeper.metadata, &stop, work).await;
            drop(permit);
            Ok(attempt?.map(Done::Sweep))
        }
    }
}

/// Reads the Secrets and finds the database server. Returns None if no permit of it is free; the next reconcile queues.
async fn prepare(
    kind: Kind,
    sweeper: &Sweeper,
    Permits { prepare, server: mut permit }: Permits<'_>,
    context: &Context,
) -> Option<(Result<Prepared, Failure>, Option<OwnedSemaphorePermit>)> {
    let found = fetch::target(&context.server, sweeper, &context.settings.default_roots).await;
    drop(prepare);
    let (target, secrets) = match found {
        Ok(found) => found,
        Err(failure) => return Some((Err(failure), None)),
    };
    let server = target.servers();
    if !limiter(kind, context).try_acquire_server(&server, &mut permit) {
        context.cache.change(sweeper.uid(), |entry| entry.queue = Some(Queue { server, kind }));
        return None;
    }
    Some((Ok(Prepared { plan: Plan::new(&sweeper.spec), target, secrets }), permit))
}

async fn preflight(
    sweeper: &Sweeper,
    prepared: Result<Prepared, Failure>,
    context: &Context,
) -> Result<PreflightReport, Failure> {
    let prepared = prepared?;
    catch_panic(check(sweeper, &prepared, context)).await.flatten()
}

/// Runs a full preflight, and caches what it was about. A blocking finding is a failure.
async fn check(sweeper: &Sweeper, prepared: &Prepared, context: &Context) -> Result<PreflightReport, Failure> {
    let Prepared { plan, target, secrets } = prepared;
    let turn = context.preflight_limiter.acquire_global();
    let checked = preflight::check_with_permit(plan, target, turn).await.map_err(|error| Failure::from(&error))?;
    if let Some(finding) = checked.blocking() {
        return Err(Failure::from(finding));
    }
    let seen = PreflightInputs { generation: sweeper.generation(), secrets: secrets.clone(), time: Utc::now() };
    context.cache.change(sweeper.uid(), |entry| entry.checked = Some(seen));
    Ok(checked)
}

/// Makes one attempt. Returns None if it was cancelled, or if the object changed while it waited.
async fn sweep(
    slot: DueSweep,
    sweeper: &Sweeper,
    prepared: Result<Prepared, Failure>,
    began: Instant,
    context: &Context,
    stop: &CancellationToken,
) -> Result<Option<Box<SweepAttempt>>, ApiError> {
    // Nothing came of it yet.
    let report = Report::new(Ok(Ended::Stopped));
    let mut attempt = Box::new(SweepAttempt { slot, start: Utc::now(), checked: None, report });
    let made = match prepared {
        Ok(prepared) => run(&mut attempt, sweeper, prepared, context, stop).await?,
        Err(failure) => Some(Err(failure)),
    };
    match made {
        None => return Ok(None),
        Some(Ok(())) => {}
        Some(Err(failure)) => (attempt.report.end, attempt.report.duration) = (Err(failure), began.elapsed()),
    }
    log(sweeper, &attempt.report);
    count(sweeper, &attempt, context);
    Ok(Some(attempt))
}

/// Makes an attempt, which fills its report unless it fails before.
async fn run(
    attempt: &mut SweepAttempt,
    sweeper: &Sweeper,
    prepared: Prepared,
    context: &Context,
    stop: &CancellationToken,
) -> Result<Option<Result<(), Failure>>, ApiError> {
    if needs_preflight(sweeper, &prepared, attempt.start, context) {
        let checking = catch_panic(check(sweeper, &prepared, context));
        let Some(checked) = stop.run_until_cancelled(checking).await else { return Ok(None) };
        match checked.flatten() {
            Ok(checked) => attempt.checked = Some(checked),
            Err(failure) => return Ok(Some(Err(failure))),
        }
    }
    let job = job(sweeper, &attempt.slot, prepared, context);
    let Some(connected) = stop.run_until_cancelled(catch_panic(sweep::connect(&job))).await else { return Ok(None) };
    let mut connected = match connected.flatten() {
        Ok(connected) => connected,
        Err(failure) => return Ok(Some(Err(failure))),
    };
    let queued = Instant::now();
    let turn = stop.run_until_cancelled(context.sweep_limiter.acquire_global()).await.flatten();
    let Some(turn) = turn else {
        connected.close().await;
        return Ok(None);
    };
    if turn.waited {
        if stop.run_until_cancelled(still_stands(sweeper, context)).await.transpose()? != Some(true) {
            connected.close().await;
            return Ok(None);
        }
        let waited = queued.elapsed();
        connected.waited(waited);
        attempt.start += TimeDelta::from_std(waited).unwrap_or_default();
    }
    // Before the sweep starts, so that a failed status write cannot repeat the slot.
    let next = sweeper.grid().after(attempt.start, attempt.start);
    context.cache.change(sweeper.uid(), |entry| entry.not_before = Some(next));
    // What was committed before a panic stays counted.
    Ok(Some(catch_panic(sweep::run(connected, &job, stop, &mut attempt.report)).await))
}

/// Whether a whole preflight goes before it.
fn needs_preflight(sweeper: &Sweeper, prepared: &Prepared, start: DateTime<Utc>, context: &Context) -> bool {
    let ready = condition::is_true(&sweeper.status.conditions, ConditionType::SchemaReady);
    let entry = context.cache.get(sweeper.uid());
    entry.needs_preflight(ready, sweeper.generation(), &prepared.secrets, start)
}

fn job(sweeper: &Sweeper, slot: &DueSweep, prepared: Prepared, context: &Context) -> Job {
    let Prepared { plan, target, .. } = prepared;
    // A retry has no yield budget, because earlier attempts used time of this slot.
    let yield_budget = if slot.continues.is_some() { Duration::ZERO } else { plan.yield_budget };
    let peers = context.sweep_limiter.peers(&target.servers());
    let plan = Plan { yield_budget, ..plan };
    Job { limit: slot.limit, resume_after: resume_after(sweeper), peers, target, plan }
}

/// Returns the cursor kept in `status.unsweepable`: the next sweep resumes behind rows that the database refused.
fn resume_after(sweeper: &Sweeper) -> Option<Cursor> {
    let status = &sweeper.status;
    // After an edit it may be another table.
    let at = status.unsweepable.as_ref().filter(|_| status.observed_generation == Some(sweeper.generation()))?;
    let at = at.resume_after.as_ref()?;
    at.is_plausible(Utc::now()).then(|| Cursor { time_started: at.time_started.clone(), id: at.id.clone() })
}

/// Whether the object is still the one that the attempt is for.
async fn still_stands(sweeper: &Sweeper, context: &Context) -> Result<bool, ApiError> {
    let now = fetch::selected(context, sweeper.namespace(), sweeper.name()).await?;
    Ok(now.is_some_and(|now| {
        let (now, then) = (now.meta(), &sweeper.metadata);
        (&now.uid, now.generation) == (&then.uid, then.generation)
            && (now.deletion_timestamp.is_none(), requested(now)) == (true, sweeper.request())
    }))
}

/// Counts an attempt for the metrics.
fn count(sweeper: &Sweeper, attempt: &SweepAttempt, context: &Context) {
    let SweepAttempt { slot, start, report, .. } = attempt;
    let instruments = &context.server.instruments;
    if slot.trigger == Trigger::Schedule && slot.continues.is_none() {
        instruments.began_after((*start - slot.schedule_time).to_std().unwrap_or_default());
    }
    instruments.swept(report.duration);
    let (outcome, rows) = (report.outcome(), report.timed_out);
    context.cache.change(sweeper.uid(), |entry| entry.counts.add(outcome, slot.trigger, rows));
}
