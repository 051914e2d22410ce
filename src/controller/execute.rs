//! Third step: does what was decided for one object. Needs its database for a preflight and for a sweep, each in its turn.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use tokio::sync::SemaphorePermit;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::cache::{Kind, PreflightInputs, Queue};
use super::client::ApiError;
use super::decide::Decision;
use super::fair_slots::Slot;
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
use crate::sweep::start::Cursor;
use crate::sweep::{self, Connected, Job, Plan, Report};

/// What work on an object needs.
pub struct Slots<'a> {
    /// To read it and its Secrets. Waiting objects hold only their key, so 10,000 due objects stay small.
    prepare: SemaphorePermit<'a>,
    /// Of the server that it queued for. Never of both kinds: holding one while waiting for the other could deadlock.
    server: Option<Slot>,
}

/// What a preflight or a sweep needs.
struct Prepared {
    plan: Plan,
    target: Target,
    /// The key of its database server.
    server: String,
    /// The resourceVersions of the Secrets that it was made of.
    secrets: Vec<String>,
}

/// Waits for the slots of an object. It queues for its database server only after no slot was free there.
pub async fn acquire_slots<'a>(object: &ObjectMeta, uid: &str, context: &'a Context) -> Option<Slots<'a>> {
    let queue = context.cache.change(uid, |entry| entry.queue.take());
    let namespace = object.namespace.as_deref().unwrap_or_default();
    let server = match queue {
        Some(Queue { server, kind }) => Some(limiter(kind, context).acquire_server(&server, namespace).await),
        None => None,
    };
    Some(Slots { prepare: context.prepare_slots.acquire().await.ok()?, server })
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
    slots: Slots<'_>,
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
        Decision::Preflight => attempt(None, sweeper, slots, context, term).await,
        Decision::Sweep(slot) => attempt(Some(slot), sweeper, slots, context, term).await,
    }
}

/// Makes an attempt at a sweep, or without a slot a preflight. Cancelled if this install no longer owns the object.
async fn attempt(
    slot: Option<DueSweep>,
    sweeper: &Sweeper,
    slots: Slots<'_>,
    context: &Context,
    term: &CancellationToken,
) -> Result<Option<Done>, ApiError> {
    let began = Instant::now();
    let kind = if slot.is_some() { Kind::Sweep } else { Kind::Preflight };
    let prepared = term.run_until_cancelled(prepare(kind, sweeper, slots, context)).await.flatten();
    let Some((prepared, _server_slot)) = prepared else { return Ok(None) };
    let stop = term.child_token();
    let work = async {
        let Some(slot) = slot else {
            return Ok(stop.run_until_cancelled(preflight(sweeper, prepared, context)).await.map(Done::Preflight));
        };
        Ok(sweep(slot, sweeper, prepared, began, context, &stop).await?.map(Done::Sweep))
    };
    run_while_owned(&context.stores, &sweeper.metadata, &stop, Box::pin(work)).await
}

/// Reads the Secrets and finds the database server. Returns None if no slot of it is free; the next reconcile queues.
async fn prepare(
    kind: Kind,
    sweeper: &Sweeper,
    Slots { prepare, server: mut slot }: Slots<'_>,
    context: &Context,
) -> Option<(Result<Prepared, Failure>, Option<Slot>)> {
    let found = fetch::target(&context.server, sweeper, &context.settings.default_roots).await;
    drop(prepare);
    let (target, secrets) = match found {
        Ok(found) => found,
        Err(failure) => return Some((Err(failure), None)),
    };
    let server = target.servers();
    if !limiter(kind, context).try_acquire_server(&server, sweeper.namespace(), &mut slot) {
        context.cache.change(sweeper.uid(), |entry| entry.queue = Some(Queue { server, kind }));
        return None;
    }
    let plan = Plan::new(&sweeper.spec).capped(context.settings.max_deadline);
    Some((Ok(Prepared { plan, target, server, secrets }), slot))
}

/// An open connection, its slot, and how long it waited for that.
struct Connection {
    connected: Connected,
    waited: Duration,
    _slot: Slot,
}

/// Connects, unless the server did not answer lately. `urgent`: a person waits for it.
async fn connect(
    Prepared { plan, target, server, .. }: &Prepared,
    namespace: &str,
    urgent: bool,
    context: &Context,
) -> Result<Connection, Failure> {
    // What the objects of one namespace meet keeps no other namespace from the server.
    let breaker = format!("{namespace} {server}");
    let admitted = Instant::now();
    context.breakers.admit(&breaker, urgent, admitted)?;
    let acquired = context.connections.acquire(namespace).await;
    let waited = if acquired.waited { admitted.elapsed() } else { Duration::ZERO };
    let connected = catch_panic(Connected::open(plan, target)).await.flatten();
    context.breakers.record(&breaker, connected.as_ref().err(), admitted, Instant::now());
    Ok(Connection { connected: connected?, waited, _slot: acquired.slot })
}

async fn preflight(
    sweeper: &Sweeper,
    prepared: Result<Prepared, Failure>,
    context: &Context,
) -> Result<PreflightReport, Failure> {
    let prepared = prepared?;
    // After an edit, somebody waits for it.
    let edited = sweeper.status.observed_generation != Some(sweeper.generation());
    let connection = connect(&prepared, sweeper.namespace(), edited, context).await?;
    let _turn = context.preflight_limiter.acquire_global(sweeper.namespace()).await;
    let checked = check(sweeper, &prepared, &connection.connected, context).await;
    connection.connected.close().await;
    checked
}

/// Runs a full preflight, and caches what it was about. A blocking finding is a failure.
async fn check(
    sweeper: &Sweeper,
    Prepared { plan, secrets, .. }: &Prepared,
    connected: &Connected,
    context: &Context,
) -> Result<PreflightReport, Failure> {
    let checking = catch_panic(preflight::look(&connected.session, plan)).await?;
    let checked = checking.map_err(|error| Failure::from(&error))?;
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
        Ok(prepared) => run(&mut attempt, sweeper, &prepared, context, stop).await?,
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
    prepared: &Prepared,
    context: &Context,
    stop: &CancellationToken,
) -> Result<Option<Result<(), Failure>>, ApiError> {
    let namespace = sweeper.namespace();
    let urgent = attempt.slot.trigger == Trigger::Request && attempt.slot.continues.is_none();
    let connection = match stop.run_until_cancelled(connect(prepared, namespace, urgent, context)).await {
        Some(Ok(connection)) => connection,
        Some(Err(failure)) => return Ok(Some(Err(failure))),
        None => return Ok(None),
    };
    let Connection { mut connected, waited, _slot } = connection;
    let queued = Instant::now();
    let Some(turn) = stop.run_until_cancelled(context.sweep_limiter.acquire_global(namespace)).await else {
        connected.close().await;
        return Ok(None);
    };
    let queued = if turn.waited { queued.elapsed() } else { Duration::ZERO };
    if !(waited + queued).is_zero() {
        if stop.run_until_cancelled(still_stands(sweeper, context)).await.transpose()? != Some(true) {
            connected.close().await;
            return Ok(None);
        }
        connected.exclude(queued);
        attempt.start += TimeDelta::from_std(waited + queued).unwrap_or_default();
    }
    Ok(check_and_sweep(attempt, sweeper, prepared, connected, context, stop).await)
}

/// Checks first if that is due, on the same connection. The deadline is that of the sweep alone.
async fn check_and_sweep(
    attempt: &mut SweepAttempt,
    sweeper: &Sweeper,
    prepared: &Prepared,
    mut connected: Connected,
    context: &Context,
    stop: &CancellationToken,
) -> Option<Result<(), Failure>> {
    if needs_preflight(sweeper, prepared, attempt.start, context) {
        let began = Instant::now();
        let checked = stop.run_until_cancelled(check(sweeper, prepared, &connected, context)).await;
        match checked {
            Some(Ok(checked)) => {
                attempt.checked = Some(checked);
                connected.exclude(began.elapsed());
            }
            unfit => {
                connected.close().await;
                return unfit.map(|unfit| unfit.map(drop));
            }
        }
    }
    // Before the sweep starts, so that a failed status write cannot repeat the slot.
    let next = sweeper.grid().after(attempt.start, attempt.start);
    context.cache.change(sweeper.uid(), |entry| entry.not_before = Some(next));
    let job = job(sweeper, &attempt.slot, prepared, context);
    // What was committed before a panic stays counted.
    Some(catch_panic(sweep::run(connected, &job, stop, &mut attempt.report)).await)
}

/// Whether a whole preflight goes before it.
fn needs_preflight(sweeper: &Sweeper, prepared: &Prepared, start: DateTime<Utc>, context: &Context) -> bool {
    let ready = condition::is_true(&sweeper.status.conditions, ConditionType::SchemaReady);
    let entry = context.cache.get(sweeper.uid());
    entry.needs_preflight(ready, sweeper.generation(), &prepared.secrets, start)
}

fn job(sweeper: &Sweeper, slot: &DueSweep, prepared: &Prepared, context: &Context) -> Job {
    let Prepared { plan, target, server, .. } = prepared;
    // A retry has no yield budget, because earlier attempts used time of this slot.
    let yield_budget = if slot.continues.is_some() { Duration::ZERO } else { plan.yield_budget };
    let peers = context.sweep_limiter.peers(server);
    let plan = Plan { yield_budget, ..plan.clone() };
    Job { limit: slot.limit, resume_after: resume_after(sweeper), peers, target: target.clone(), plan }
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
