//! Drives one object through the five steps. The one place of the controller that reads the clock.

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
use super::execute::{self, Turn};
use super::limits::Limiter;
use super::model::{AttemptResult, Fetched};
use super::publish::{publish, publish_invalid};
use super::{Context, fetch};

/// However far away the next slot is, look at the clock this often: a machine may sleep, a clock may jump. It costs
/// no request.
const LONGEST_WAIT: TimeDelta = TimeDelta::minutes(5);

/// When to look at an object again for which something was done.
const AT_ONCE: Duration = Duration::ZERO;

/// The first and the longest pause after an API request failed.
const API_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Does what is due for one object. What goes wrong with it or its database is in its status.
///
/// # Errors
/// When the API server does not answer, or not as it should.
pub async fn reconcile(watched: Arc<Fetched>, context: Arc<Context>) -> Result<Action, ApiError> {
    let _running = context.running.token();
    let uid = watched.meta().uid.clone().unwrap_or_default();
    // What may still have to be published is seen to by whoever waits for the token.
    if context.stop.is_cancelled() {
        return Ok(Action::await_change());
    }
    let worked = AssertUnwindSafe(in_turn(&watched, &uid, &context)).catch_unwind().await;
    let action = worked.unwrap_or(Err(ApiError::Panic))?;
    context.cache.change(&uid, |entry| entry.api_failures = 0);
    Ok(action)
}

/// When an object is tried again whose reconcile failed.
pub fn error_policy(watched: Arc<Fetched>, error: &ApiError, context: Arc<Context>) -> Action {
    if context.stop.is_cancelled() {
        return Action::await_change();
    }
    let failures = context.cache.change(watched.meta().uid.as_deref().unwrap_or_default(), |entry| {
        entry.api_failures = entry.api_failures.saturating_add(1);
        entry.api_failures
    });
    let (first, longest) = API_RETRY;
    let pause = first.saturating_mul(2_u32.saturating_pow(failures - 1)).min(longest);
    let (namespace, name) = (&watched.meta().namespace, &watched.meta().name);
    warn!(namespace, name, error = client::text(error), retry_in = ?pause, "trying this object again");
    Action::requeue(pause)
}

/// Sees to it that an object is worked on when something is due for it, and when its turn comes.
async fn in_turn(watched: &Fetched, uid: &str, context: &Context) -> Result<Action, ApiError> {
    // Also without the lead: it is about what this replica did while it had it, and lays itself beneath later attempts.
    let pending = context.cache.get(uid).pending;
    if let Some(pending) = pending {
        return Box::pin(publish(context, pending)).await.map(|()| Action::requeue(AT_ONCE));
    }
    // Whoever begins to lead looks at every object again.
    let Some(term) = context.leadership.term() else { return Ok(Action::await_change()) };
    let limiter = match next(watched, uid, context) {
        Next::Wait(action) => return Ok(action),
        Next::Invalid(invalid) => {
            let said = Box::pin(publish_invalid(&context.server, &invalid, Utc::now()));
            return term.run_until_cancelled(said).await.transpose().map(|_| Action::await_change());
        }
        Next::Turn(limiter) => limiter,
    };
    let turn = term.run_until_cancelled(Box::pin(execute::wait_for_turn(limiter, uid, context))).await.flatten();
    let Some(turn) = turn else { return Ok(Action::await_change()) };
    // What takes much room is on the heap, and begins here: of very many objects most wait for one another.
    Box::pin(pipeline(watched, turn, context, &term)).await
}

/// What is next for an object, by what the watch has seen, which costs no request.
enum Next<'a> {
    /// Nothing is due.
    Wait(Action),
    /// What an older or looser CRD let in is not acted upon.
    Invalid(Box<InvalidObject>),
    /// Its turn has to come.
    Turn(Option<&'a Limiter>),
}

fn next<'a>(watched: &Fetched, uid: &str, context: &'a Context) -> Next<'a> {
    match context.cache.validate(watched) {
        Err(invalid) => Next::Invalid(invalid),
        Ok(sweeper) => match decide(Utc::now(), &sweeper, context.cache.get(uid).not_before) {
            Decision::Wait(next) => Next::Wait(wait_until(next)),
            decision => Next::Turn(execute::limiter(&decision, context)),
        },
    }
}

/// Fetch, decide, execute, status, publish. Then the object is looked at again.
async fn pipeline(
    watched: &Fetched,
    turn: Turn<'_>,
    context: &Context,
    term: &CancellationToken,
) -> Result<Action, ApiError> {
    // The watch may lag behind, and what was true may no longer be now that the turn has come.
    let fetched = term.run_until_cancelled(fetch::sweeper(context, watched.meta())).await;
    let Some(sweeper) = fetched.transpose()?.flatten() else { return Ok(Action::await_change()) };
    let decision = decide(Utc::now(), &sweeper, context.cache.get(sweeper.uid()).not_before);
    if let Decision::Wait(next) = decision {
        return Ok(wait_until(next));
    }
    if let Some(done) = execute::execute(decision, &sweeper, turn, context, term).await? {
        let result = AttemptResult { sweeper, done, time: Utc::now(), led: context.leadership.leads() };
        publish(context, Arc::new(result)).await?;
    }
    Ok(Action::requeue(AT_ONCE))
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
