//! At the end of the process, sees to it that no result with rows is lost without a word.
//!
//! After a stop, requests that carry no counts are given up at once. A result with rows that the API server does not take is
//! tried again for as long as the process may last.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;
use tracing::{debug, error};

use super::Context;
use super::client::text;
use super::model::AttemptResult;
use super::publish::publish;

/// From the stop on, running sweeps have this long to end and be published.
pub const SHUTDOWN: Duration = Duration::from_millis(4300);

/// The pause before an outcome is tried again.
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

/// After a stop: waits for running reconciles to end, and tries again what could not be published. What is left when
/// the time is over is named in the log.
pub(super) async fn drain(context: &Context) -> ShutdownReport {
    let published = async {
        context.running.close();
        context.running.wait().await;
        let sweeps = context.cache.pending().into_iter().filter(|pending| pending.sweep().is_some());
        stream::iter(sweeps).for_each_concurrent(AT_ONCE, |pending| publish_until_taken(context, pending)).await;
    };
    // What does not end in time shows in what is left.
    drop(timeout(SHUTDOWN, published).await);
    context.events.close();
    let left: Vec<_> = context.cache.pending().into_iter().filter(|pending| pending.has_rows()).collect();
    for pending in &left {
        let (namespace, name) = (pending.sweeper.namespace(), pending.sweeper.name());
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
    ShutdownReport { sweeping: context.sweep_limiter.in_use(), uncounted: left.len(), events: context.events.clone() }
}

/// Tries until it is published, but once only if there are no rows in it.
async fn publish_until_taken(context: &Context, pending: Arc<AttemptResult>) {
    while let Err(error) = publish(context, pending.clone()).await {
        debug!(name = pending.sweeper.name(), error = text(&error), "cannot publish an outcome; trying again");
        if !pending.has_rows() {
            return;
        }
        sleep(PAUSE).await;
    }
}
