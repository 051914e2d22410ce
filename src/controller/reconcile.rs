//! Drives one object through the five steps. `decide` and `status` are handed the time.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures::FutureExt;
use kube::Resource;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::controller::Action;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::client::{self, ApiError};
use super::decide::{Decision, decide};
use super::execute::{self, Slots};
use super::model::{AttemptResult, ParsedObject};
use super::publish::{publish, publish_invalid};
use super::{Context, fetch};

/// However far away the next slot is, look at the clock this often: a machine may sleep, a clock may jump. It costs
/// no request.
const LONGEST_WAIT: TimeDelta = TimeDelta::minutes(5);

/// When to look at an object again whose status was written, should the watch not tell of that before.
const AFTER_WRITE: Duration = Duration::from_secs(1);

/// The first and the longest pause after a reconcile failed.
const API_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Does what is due for one object. What goes wrong with it or its database is in its status.
///
/// # Errors
/// When the API server does not answer, or not as it should.
pub async fn reconcile(watched: Arc<ParsedObject>, context: Arc<Context>) -> Result<Action, ApiError> {
    let _running = context.running.token();
    let uid = watched.meta().uid.clone().unwrap_or_default();
    // After every reconcile has dropped its token, `shutdown::drain` publishes what is pending.
    if context.stop.is_cancelled() {
        return Ok(Action::await_change());
    }
    let worked = AssertUnwindSafe(reconcile_if_due(&watched, &uid, &context)).catch_unwind().await;
    let action = worked.unwrap_or(Err(ApiError::Panic))?;
    context.cache.change(&uid, |entry| entry.failed_reconciles = 0);
    Ok(action)
}

/// When an object is tried again whose reconcile failed.
pub fn error_policy(watched: Arc<ParsedObject>, error: &ApiError, context: Arc<Context>) -> Action {
    if context.stop.is_cancelled() {
        return Action::await_change();
    }
    let failures = context.cache.change(watched.meta().uid.as_deref().unwrap_or_default(), |entry| {
        entry.failed_reconciles = entry.failed_reconciles.saturating_add(1);
        entry.failed_reconciles
    });
    let (first, longest) = API_RETRY;
    let pause = first.saturating_mul(2_u32.saturating_pow(failures - 1)).min(longest);
    let (namespace, name) = (&watched.meta().namespace, &watched.meta().name);
    warn!(namespace, name, error = client::text(error), retry_in = ?pause, "trying this object again");
    Action::requeue(pause)
}

/// Publishes what is pending for an object, or else runs the pipeline if something is due, once it has its slots.
async fn reconcile_if_due(watched: &ParsedObject, uid: &str, context: &Context) -> Result<Action, ApiError> {
    // A replica publishes its own result also after it lost the lead. A later attempt is never overwritten.
    // An object that cannot be read takes no counts: they wait, and what is wrong with it is said.
    let pending = context.cache.get(uid).pending.filter(|_| watched.0.is_ok());
    if let Some(pending) = pending {
        return Box::pin(publish(context, pending)).await.map(|()| Action::requeue(AFTER_WRITE));
    }
    // A new term reconciles every object again.
    let Some(term) = context.leadership.term() else { return Ok(Action::await_change()) };
    match triage(watched, uid, context) {
        Triage::Wait(action) => return Ok(action),
        Triage::Invalid(invalid) => {
            let said = Box::pin(publish_invalid(&context.server, &invalid, Utc::now()));
            return term.run_until_cancelled(said).await.transpose().map(|_| Action::await_change());
        }
        Triage::Due => {}
    }
    let slots = Box::pin(execute::acquire_slots(watched.meta(), uid, context));
    let slots = term.run_until_cancelled(slots).await.flatten();
    let Some(slots) = slots else { return Ok(Action::await_change()) };
    // Boxed here, so an object that waits for slots holds only a small future.
    Box::pin(pipeline(watched, slots, context, &term)).await
}

/// What is next for an object, by what the watch has seen, which costs no request.
enum Triage {
    /// Nothing is due.
    Wait(Action),
    /// What an older or looser CRD let in is not acted upon.
    Invalid(Box<InvalidObject>),
    /// Something is.
    Due,
}

fn triage(watched: &ParsedObject, uid: &str, context: &Context) -> Triage {
    match context.cache.validate(watched) {
        Err(invalid) => Triage::Invalid(invalid),
        Ok(sweeper) => match decide(Utc::now(), &sweeper, context.cache.get(uid).not_before) {
            Decision::Wait(next) => Triage::Wait(wait_until(next)),
            _ => Triage::Due,
        },
    }
}

/// Fetch, decide, execute, status, publish. Then the object is looked at again.
async fn pipeline(
    watched: &ParsedObject,
    slots: Slots<'_>,
    context: &Context,
    term: &CancellationToken,
) -> Result<Action, ApiError> {
    // The watch may lag behind, and the slots may have come late.
    let fetched = term.run_until_cancelled(fetch::sweeper(context, watched.meta())).await;
    let Some(sweeper) = fetched.transpose()?.flatten() else { return Ok(Action::await_change()) };
    let decision = decide(Utc::now(), &sweeper, context.cache.get(sweeper.uid()).not_before);
    if let Decision::Wait(next) = decision {
        return Ok(wait_until(next));
    }
    let Some(done) = execute::execute(decision, &sweeper, slots, context, term).await? else {
        return Ok(Action::requeue(Duration::ZERO));
    };
    let result = AttemptResult { sweeper, done, time: Utc::now(), led: context.leadership.leads() };
    publish(context, Arc::new(result)).await?;
    Ok(Action::requeue(AFTER_WRITE))
}

fn wait_until(next: Option<DateTime<Utc>>) -> Action {
    next.map_or_else(Action::await_change, |next| {
        let wait = (next - Utc::now()).clamp(TimeDelta::zero(), LONGEST_WAIT);
        Action::requeue(wait.to_std().unwrap_or_default())
    })
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
