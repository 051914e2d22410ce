//! Drives one object through the five steps. The one place of the controller that reads the clock.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures::FutureExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::controller::Action;
use kube::{Resource, ResourceExt};
use tokio::sync::SemaphorePermit;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::client::ApiError;
use super::decide::{Decision, decide};
use super::execute::{Attempt, check, job, prepare};
use super::lifecycle::{self, catch_panic};
use super::limits::{Limiter, ServerPermit};
use super::model::{Fetched, Pending, Subject, Update};
use super::shutdown::publish_update;
use super::{Context, client, fetch, publish};
use crate::api::AuditLogSweeper;

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
pub async fn reconcile(object: Arc<Fetched>, context: Arc<Context>) -> Result<Action, Infallible> {
    let _running = context.running.token();
    // What may still have to be published is seen to by whoever waits for the token.
    if context.stop.is_cancelled() {
        return Ok(Action::await_change());
    }
    let uid = object.meta().uid.clone().unwrap_or_default();
    let driven = AssertUnwindSafe(drive(&object, &uid, &context)).catch_unwind().await;
    let action = match driven.unwrap_or(Err(ApiError::Panic)) {
        Ok(next) => {
            context.cache.change(&uid, |entry| entry.api_failures = 0);
            next.map_or_else(Action::await_change, |next| {
                let wait = (next - Utc::now()).clamp(TimeDelta::zero(), LONGEST_WAIT);
                Action::requeue(wait.to_std().unwrap_or_default())
            })
        }
        Err(_) if context.stop.is_cancelled() => Action::await_change(),
        Err(failed) => {
            let failures = context.cache.change(&uid, |entry| {
                entry.api_failures = entry.api_failures.saturating_add(1);
                entry.api_failures
            });
            let (first, longest) = API_RETRY;
            let pause = first.saturating_mul(2_u32.saturating_pow(failures - 1)).min(longest);
            warn!(
                namespace = object.meta().namespace, name = object.meta().name,
                error = client::text(&failed), retry_in = ?pause, "trying this object again"
            );
            Action::requeue(pause)
        }
    };
    Ok(action)
}

async fn drive(object: &Fetched, uid: &str, context: &Context) -> Result<Option<DateTime<Utc>>, ApiError> {
    let pending = context.cache.get(uid).pending;
    let seen = match (&object.0, context.leadership.term()) {
        (Ok(object), _) => object,
        (Err(_), None) => return Ok(None),
        (Err(invalid), Some(term)) => {
            let said =
                term.run_until_cancelled(Box::pin(say_invalid(context, &invalid.metadata, &invalid.error))).await;
            return said.transpose().map(|_| None);
        }
    };
    // What was written since; till then what the watch has seen will do, which it has anyway.
    let mut written: Option<Box<AuditLogSweeper>> = None;
    // Also without the lead: it is about what this replica did while it had it, and lays itself beneath later attempts.
    if let Some(pending) = pending {
        written = Box::pin(publish_update(context, seen, pending)).await?.map(Box::new);
        if written.is_none() {
            return Ok(None);
        }
    }
    // Whoever begins to lead looks at every object again.
    while let Some(term) = context.leadership.term() {
        let object = written.as_deref().unwrap_or(seen);
        // What an older or looser CRD let in is not acted upon.
        let broken = context.cache.broken_rules(uid, &object.spec);
        if !broken.is_empty() {
            let said =
                term.run_until_cancelled(Box::pin(say_invalid(context, &object.metadata, &broken.join("; ")))).await;
            return said.transpose().map(|_| None);
        }
        let not_before = context.cache.get(uid).not_before;
        if let Decision::Wait(next) = judge(object, &Subject::new(object), not_before) {
            return Ok(next);
        }
        let name =
            Named { namespace: object.namespace().unwrap_or_default(), name: object.name_any(), uid, not_before };
        // It is read again when its turn comes: ten thousand new objects wait for that at the same time.
        drop(written.take());
        match pass(&name, context, &term).await? {
            Pass::Again(object) => written = Some(object),
            Pass::Wait(next) => return Ok(next),
        }
    }
    Ok(None)
}

async fn say_invalid(context: &Context, meta: &ObjectMeta, error: &str) -> Result<(), ApiError> {
    warn!(namespace = meta.namespace, name = meta.name, error, "invalid object");
    publish::publish_invalid(&context.server, meta, error, Utc::now()).await
}

async fn pass(name: &Named<'_>, context: &Context, term: &CancellationToken) -> Result<Pass, ApiError> {
    let mut permits = Permits::default();
    loop {
        let Some(Ok(look)) = term.run_until_cancelled(context.prepare_slots.acquire()).await else {
            return Ok(Pass::Wait(None));
        };
        let server = match Box::pin(act(name, &mut permits, look, context, term)).await? {
            Acted::Done(pass) => return Ok(pass),
            Acted::Again => continue,
            Acted::Queue(server) => server,
        };
        let (limiter, permit) = permits.wanted(context);
        if !limiter.acquire_server_unless_stopped(&server, permit, term).await {
            return Ok(Pass::Wait(None));
        }
    }
}

fn judge(object: &AuditLogSweeper, subject: &Subject, not_before: Option<DateTime<Utc>>) -> Decision {
    decide(Utc::now(), subject, &object.status.clone().unwrap_or_default(), not_before)
}

/// Which object is worked on, and since when.
struct Named<'a> {
    namespace: String,
    name: String,
    uid: &'a str,
    not_before: Option<DateTime<Utc>>,
}

/// The permit of a database server, of either kind. Never both: who holds one kind and waits for the other may wait for
/// ever.
#[derive(Default)]
struct Permits {
    for_preflight: bool,
    permit: Option<ServerPermit>,
}

impl Permits {
    /// Takes one at once, if that can be.
    fn try_acquire_server(&mut self, for_preflight: bool, server: &str, context: &Context) -> bool {
        if self.for_preflight != for_preflight {
            *self = Self { for_preflight, permit: None };
        }
        let (limiter, permit) = self.wanted(context);
        limiter.try_acquire_server(server, permit)
    }

    fn wanted<'a>(&mut self, context: &'a Context) -> (&'a Limiter, &mut Option<ServerPermit>) {
        (if self.for_preflight { &context.preflight_limiter } else { &context.sweep_limiter }, &mut self.permit)
    }
}

/// What came of a look at the object.
enum Acted {
    Done(Pass),
    /// The object is another by now.
    Again,
    /// It has to wait for its turn on this server, and then to be looked at again.
    Queue(String),
}

/// Does what is due, if it is its turn. The watch may lag behind, and what was true may no longer be when the turn comes:
/// the object is read as it is now.
///
/// What takes much room is on the heap while it lasts, and begins when it is the object's turn to be looked at: of very
/// many objects most may be waiting for one another.
async fn act(
    name: &Named<'_>,
    permits: &mut Permits,
    look: SemaphorePermit<'_>,
    context: &Context,
    term: &CancellationToken,
) -> Result<Acted, ApiError> {
    let wait = |next| Ok(Acted::Done(Pass::Wait(next)));
    let Named { namespace, name, uid, not_before } = name;
    let selected = context.settings.selector.as_deref();
    let selected = Box::pin(fetch::selected(&context.server, namespace, name, selected));
    let object = match term.run_until_cancelled(selected).await.transpose()? {
        Some(Some(Fetched(Ok(object))))
            if object.uid().as_deref() == Some(*uid) && context.cache.broken_rules(uid, &object.spec).is_empty() =>
        {
            object
        }
        // Stopped; or gone, replaced, invalid, or for others: the watch will tell.
        _ => return wait(None),
    };
    let subject = Subject::new(&object);
    let update = match judge(&object, &subject, *not_before) {
        Decision::Wait(next) => return wait(next),
        Decision::Acknowledge => Update::Acknowledged { now: Utc::now() },
        Decision::Suspend => {
            info!(%namespace, name, "suspended");
            Update::Suspended { now: Utc::now() }
        }
        Decision::Repair => {
            warn!(%namespace, name, "a time in the status is one that no sweep can have; computing the schedule anew");
            Update::Repaired { now: Utc::now() }
        }
        Decision::Preflight => {
            let Some(prepared) = term.run_until_cancelled(Box::pin(prepare(&object, &subject, context))).await else {
                return wait(None);
            };
            drop(look);
            if let Ok((_, target, _)) = &prepared
                && !permits.try_acquire_server(true, &target.servers(), context)
            {
                return Ok(Acted::Queue(target.servers()));
            }
            let checking = async {
                let (plan, target, secrets) = prepared?;
                check(&plan, &target, &subject, secrets, context).await
            };
            // Nobody waits for the answer any more.
            let Some(result) = term.run_until_cancelled(Box::pin(catch_panic(checking))).await else {
                return wait(None);
            };
            Update::Preflight { result: result.and_then(|result| result), now: Utc::now() }
        }
        Decision::Sweep(slot) => {
            let Some(prepared) = term.run_until_cancelled(Box::pin(prepare(&object, &subject, context))).await else {
                return wait(None);
            };
            drop(look);
            let (job, secrets) = match prepared {
                Ok((plan, target, secrets)) => {
                    let server = target.servers();
                    if !permits.try_acquire_server(false, &server, context) {
                        return Ok(Acted::Queue(server));
                    }
                    (Ok(job(&object, &slot, plan, target, context.sweep_limiter.peers(&server))), secrets)
                }
                Err(failure) => (Err(failure), vec![]),
            };
            let (start, checked) = (Utc::now(), None);
            let attempt = Attempt { object: &object, subject: &subject, slot: &slot, job, secrets, start, checked };
            let stop = term.child_token();
            let made = Box::pin(attempt.make(context, &stop));
            match lifecycle::run_while_owned(&context.stores, &object, &stop, made).await? {
                Some(update) => update,
                None => return Ok(Acted::Again),
            }
        }
    };
    permits.permit = None;
    let led = context.leadership.leads();
    let pending = Arc::new(Pending { base: object.clone(), subject, update, led });
    let written = Box::pin(publish_update(context, &object, pending)).await?;
    Ok(Acted::Done(written.map_or(Pass::Wait(None), |written| Pass::Again(Box::new(written)))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, B, F: Future>(_: fn(A, B) -> F) -> usize {
        size_of::<F>()
    }

    /// Ten thousand may wait for their limiter at the same time.
    #[test]
    fn a_reconcile_that_waits_is_small() {
        let size = size(reconcile);
        assert!(size <= 1024, "{size} bytes");
    }
}
