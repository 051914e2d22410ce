//! Third step: does what was decided for one object. Needs its database for a preflight and for a sweep, each in its turn.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use kube::Resource;
use tokio::sync::{OwnedSemaphorePermit, SemaphorePermit};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::cache::Seen;
use super::client::ApiError;
use super::decide::Decision;
use super::lifecycle::{catch_panic, run_while_owned};
use super::limits::Limiter;
use super::log::log;
use super::model::{Done, Slot, SweepAttempt};
use super::{Context, fetch};
use crate::api::condition::{self, ConditionType};
use crate::api::status::Trigger;
use crate::api::{Failure, Sweeper};
use crate::database::Target;
use crate::preflight::{self, Checked};
use crate::sweep::report::Ended;
use crate::sweep::statement::Cursor;
use crate::sweep::{self, Job, Plan, Report};

/// The turn of an object to be worked on.
pub struct Turn<'a> {
    /// To read it and its Secrets. Waiting objects hold only their key, so 10,000 due objects stay small.
    prepare: SemaphorePermit<'a>,
    /// Of the server that its database was on when it was last looked up. Never of both kinds: who holds one kind and waits
    /// for the other may wait for ever.
    server: Option<OwnedSemaphorePermit>,
}

/// What a preflight or a sweep needs.
#[derive(Clone)]
struct Prepared {
    plan: Plan,
    target: Target,
    /// The resourceVersions of the Secrets that it was made of.
    secrets: Vec<String>,
}

/// Waits until it is the object's turn, at its server too where the limiter has one to wait for.
pub async fn wait_for_turn<'a>(limiter: Option<&Limiter>, uid: &str, context: &'a Context) -> Option<Turn<'a>> {
    let server = match (limiter, context.cache.get(uid).server) {
        (Some(limiter), Some(server)) => limiter.acquire_server(&server).await,
        _ => None,
    };
    Some(Turn { prepare: context.prepare_slots.acquire().await.ok()?, server })
}

/// What bounds how many objects of which that was decided are worked on at once. Preflights answer to an edit, so long
/// sweeps do not keep them waiting.
pub fn limiter<'a>(decision: &Decision, context: &'a Context) -> Option<&'a Limiter> {
    match decision {
        Decision::Preflight => Some(&context.preflight_limiter),
        Decision::Sweep(_) => Some(&context.sweep_limiter),
        _ => None,
    }
}

/// Does what was decided. None: there is nothing to do now, the object is another by now, or the turn was that of another
/// server.
pub async fn execute(
    decision: Decision,
    sweeper: &Sweeper,
    turn: Turn<'_>,
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
        decision => {
            let prepared = term.run_until_cancelled(prepare(&decision, sweeper, turn, context)).await;
            let Some((prepared, permit)) = prepared.flatten() else { return Ok(None) };
            let stop = term.child_token();
            let done = async {
                match decision {
                    Decision::Sweep(slot) => Ok(sweep(slot, sweeper, prepared, context, &stop).await?.map(Done::Sweep)),
                    // Nobody waits for the answer any more once it is stopped.
                    _ => Ok(stop.run_until_cancelled(preflight(sweeper, prepared, context)).await.map(Done::Preflight)),
                }
            };
            let done = Box::pin(run_while_owned(&context.stores, &sweeper.metadata, &stop, done)).await;
            drop(permit);
            done
        }
    }
}

/// Reads where the database is. None: it is on another server than the turn was for, and has to be queued for there.
async fn prepare(
    decision: &Decision,
    sweeper: &Sweeper,
    Turn { prepare, server: mut permit }: Turn<'_>,
    context: &Context,
) -> Option<(Result<Prepared, Failure>, Option<OwnedSemaphorePermit>)> {
    let found = fetch::target(&context.server, sweeper, &context.settings.default_roots).await;
    drop(prepare);
    let (target, secrets) = match found {
        Ok(found) => found,
        Err(failure) => return Some((Err(failure), None)),
    };
    let server = target.servers();
    let has_permit = limiter(decision, context).is_none_or(|all| all.try_acquire_server(&server, &mut permit));
    context.cache.change(sweeper.uid(), |entry| entry.server = Some(server));
    has_permit.then(|| (Ok(Prepared { plan: Plan::new(&sweeper.spec), target, secrets }), permit))
}

async fn preflight(
    sweeper: &Sweeper,
    prepared: Result<Prepared, Failure>,
    context: &Context,
) -> Result<Checked, Failure> {
    let prepared = prepared?;
    catch_panic(check(sweeper, &prepared, context)).await.flatten()
}

/// Looks at all that a sweep rests on, and remembers that it was looked at. A finding for which no sweep may begin is a
/// failure.
async fn check(sweeper: &Sweeper, prepared: &Prepared, context: &Context) -> Result<Checked, Failure> {
    let Prepared { plan, target, secrets } = prepared;
    let turn = context.preflight_limiter.acquire_global();
    let checked = preflight::check_in_turn(plan, target, turn).await.map_err(|error| Failure::from(&error))?;
    if let Some(finding) = checked.blocking() {
        return Err(Failure::from(finding));
    }
    let seen = Seen { generation: sweeper.generation(), secrets: secrets.clone(), time: Utc::now() };
    context.cache.change(sweeper.uid(), |entry| entry.checked = Some(seen));
    Ok(checked)
}

/// One attempt at the sweep of a slot. None: it had to wait, and the object is another by now.
async fn sweep(
    slot: Slot,
    sweeper: &Sweeper,
    prepared: Result<Prepared, Failure>,
    context: &Context,
    stop: &CancellationToken,
) -> Result<Option<Box<SweepAttempt>>, ApiError> {
    // Nothing came of it yet.
    let report = Report::new(Ok(Ended::Stopped));
    let mut attempt = Box::new(SweepAttempt { slot, start: Utc::now(), checked: None, report });
    let report = match prepared {
        Ok(prepared) => run(&mut attempt, sweeper, &prepared, context, stop).await?,
        Err(failure) => Some(Report::new(Err(failure))),
    };
    let Some(report) = report else { return Ok(None) };
    attempt.report = report;
    log(sweeper, &attempt.report);
    count(sweeper, &attempt, context);
    Ok(Some(attempt))
}

/// What comes of an attempt.
async fn run(
    attempt: &mut SweepAttempt,
    sweeper: &Sweeper,
    prepared: &Prepared,
    context: &Context,
    stop: &CancellationToken,
) -> Result<Option<Report>, ApiError> {
    let began = Instant::now();
    let failed = |failure| Ok(Some(Report { duration: began.elapsed(), ..Report::new(Err(failure)) }));
    if needs_check(sweeper, prepared, attempt.start, context) {
        let checking = catch_panic(check(sweeper, prepared, context));
        let Some(checked) = stop.run_until_cancelled(checking).await else { return Ok(None) };
        match checked.flatten() {
            Ok(checked) => attempt.checked = Some(checked),
            Err(failure) => return failed(failure),
        }
    }
    let job = job(sweeper, &attempt.slot, prepared, context);
    let Some(connected) = stop.run_until_cancelled(catch_panic(sweep::connect(&job))).await else { return Ok(None) };
    let mut connected = match connected.flatten() {
        Ok(connected) => connected,
        Err(failure) => return failed(failure),
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
    // Before it starts: whatever becomes of the status, the slot is taken.
    let next = sweeper.grid().after(attempt.start, attempt.start);
    context.cache.change(sweeper.uid(), |entry| entry.not_before = Some(next));
    let report = catch_panic(sweep::run(connected, &job, stop)).await;
    Ok(Some(report.unwrap_or_else(|failure| Report::new(Err(failure)))))
}

/// Whether a whole preflight goes before it.
fn needs_check(sweeper: &Sweeper, prepared: &Prepared, start: DateTime<Utc>, context: &Context) -> bool {
    let ready = condition::is_true(&sweeper.status.conditions, ConditionType::SchemaReady);
    let entry = context.cache.get(sweeper.uid());
    entry.needs_check(ready, sweeper.generation(), &prepared.secrets, start)
}

fn job(sweeper: &Sweeper, slot: &Slot, prepared: &Prepared, context: &Context) -> Job {
    let Prepared { plan, target, .. } = prepared.clone();
    // What a failed attempt left of the slot's time is not to be given away again.
    let yield_budget = if slot.continues.is_some() { Duration::ZERO } else { plan.yield_budget };
    let peers = context.sweep_limiter.peers(&target.servers());
    let plan = Plan { yield_budget, ..plan };
    Job { limit: slot.limit, resume_after: resume_after(sweeper), peers, target, plan }
}

/// Where the last sweep left off, if rows that the database refuses made it stop.
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
        now.uid == then.uid && now.resource_version == then.resource_version
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
