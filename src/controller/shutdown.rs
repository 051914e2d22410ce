//! Publishes outcomes, and at the end of the process sees to it that none with rows is lost without a word.
//!
//! After a stop, requests that carry no counts are given up by whoever makes them. Here are those that do: an outcome
//! that the API server does not take is tried again for as long as the process may last.

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use futures::{StreamExt, stream};
use kube::ResourceExt;
use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;
use tracing::{debug, error};

use super::client::{ApiError, text};
use super::model::{Pending, Update};
use super::{Context, publish};
use crate::api::AuditLogSweeper;

/// From the stop on, running sweeps have this long to end and be published.
pub const SHUTDOWN: Duration = Duration::from_millis(4300);

/// After the stop, one try to publish an outcome with rows may take this long, so that there is time for another.
const PUBLISH_TIMEOUT: Duration = Duration::from_millis(2500);

/// The same for one without: what it says is made good by the next sweep.
const PUBLISH_TIMEOUT_WITHOUT_ROWS: Duration = Duration::from_secs(1);

/// The pause before the next.
const PAUSE: Duration = Duration::from_millis(250);

/// So many are tried at once.
const AT_ONCE: usize = 32;

/// How the controller ended after a stop.
#[derive(Debug, Default)]
pub struct ShutdownReport {
    /// Sweeps that had not ended.
    pub sweeping: usize,
    /// Objects whose status does not know of rows that were swept.
    pub uncounted: usize,
    /// Events that are still being sent.
    pub events: TaskTracker,
}

/// Publishes an update; if the API does not take it, it is remembered and published later.
pub(super) async fn publish_update(
    context: &Context,
    object: &AuditLogSweeper,
    pending: Arc<Pending>,
) -> Result<Option<AuditLogSweeper>, ApiError> {
    let Pending { subject, update, .. } = &*pending;
    let leads = context.leadership.leads();
    let is_attempt = update.start().is_some();
    // The leader says by itself what it sees.
    let kept = (is_attempt || leads).then(|| pending.clone());
    context.cache.change(&subject.uid, |entry| entry.pending.clone_from(&kept));
    if kept.is_none() {
        return Ok(None);
    }
    let led = leads || pending.led;
    // While no other replica leads, this one may lead again, and then goes on with what it began.
    if !led && !context.leadership.another_leads() && !context.stop.is_cancelled() {
        return Err(ApiError::NoLeader);
    }
    let given_up = async {
        context.stop.cancelled().await;
        match update {
            Update::Sweep { .. } if pending.has_rows() => sleep(PUBLISH_TIMEOUT).await,
            Update::Sweep { .. } => sleep(PUBLISH_TIMEOUT_WITHOUT_ROWS).await,
            _ => {}
        }
    };
    let published = tokio::select! {
        published = publish::publish(&context.server, object, &pending, led, Utc::now()) => published?,
        () = given_up => return Err(ApiError::Timeout(PUBLISH_TIMEOUT)),
    };
    let (written, events) = published.map_or((None, vec![]), |published| (Some(published.object), published.events));
    context.cache.change(&subject.uid, |entry| {
        entry.pending = None;
        // What was written is what holds: a retry may come sooner than the slot.
        if let Some(status) = written.as_ref().and_then(|written| written.status.as_ref()) {
            entry.not_before = status.next_schedule_time;
        }
    });
    if let Some(written) = written.clone().filter(|_| !events.is_empty()) {
        let (server, recorder) = (context.server.clone(), context.recorder.clone());
        let telling = async move { publish::publish_events(&server, &recorder, &written, &events).await };
        // At the end they keep nobody waiting: the lease is given back meanwhile.
        context.stop.run_until_cancelled(context.events.spawn(telling)).await;
    }
    Ok(written)
}

/// After a stop: waits for running reconciles to end, and tries again what could not be published. What is left when
/// the time is over is named in the log.
pub(super) async fn drain(context: &Context) -> ShutdownReport {
    let published = async {
        context.running.close();
        context.running.wait().await;
        let sweeps = context.cache.pending().into_iter().filter(|p| matches!(p.update, Update::Sweep { .. }));
        stream::iter(sweeps).for_each_concurrent(AT_ONCE, |pending| publish_until_taken(context, pending)).await;
    };
    // What does not end in time shows in what is left.
    drop(timeout(SHUTDOWN, published).await);
    context.events.close();
    let left: Vec<_> = context.cache.pending().into_iter().filter(|pending| pending.has_rows()).collect();
    for pending in &left {
        let (namespace, name) = (pending.base.namespace().unwrap_or_default(), pending.base.name_any());
        let (rows, uncertain) = pending.rows();
        error!(
            namespace,
            name,
            rows,
            uncertain,
            "the API server did not take the count of these rows within {SHUTDOWN:?} of the signal: they are swept, and \
             the status does not know of it"
        );
    }
    ShutdownReport { sweeping: context.sweep_limiter.taken(), uncounted: left.len(), events: context.events.clone() }
}

/// Tries until it is published, but once only if there are no rows in it.
async fn publish_until_taken(context: &Context, pending: Arc<Pending>) {
    while let Err(error) = publish_update(context, &pending.base, pending.clone()).await {
        debug!(name = pending.base.name_any(), error = text(&error), "cannot publish an outcome; trying again");
        if !pending.has_rows() {
            return;
        }
        sleep(PAUSE).await;
    }
}
