//! What the log says of an attempt at a sweep.

use tracing::{debug, error, warn};

use crate::api::Sweeper;
use crate::sweep::Report;

/// A healthy system has no stale rows, so rows timed out are a warning.
pub fn log(sweeper: &Sweeper, report: &Report) {
    let (namespace, name, limit) = (sweeper.namespace(), sweeper.name(), sweeper.spec.limit);
    let cutoff = report.cutoff.map(|cutoff| cutoff.to_rfc3339());
    let Report { timed_out, batches, small_batches, fallback_batches, .. } = *report;
    let duration_ms = report.duration_milliseconds();
    if let Some(why) = &report.refused_why {
        warn!(namespace, name, rows = report.refused, why, "the database refuses rows");
    }
    if let Err(failure) = &report.end {
        let reason = failure.reason.as_str();
        let error = &failure.message;
        error!(
            namespace,
            name,
            cutoff,
            limit,
            timed_out,
            duration_ms,
            batches,
            small_batches,
            fallback_batches,
            reason,
            error,
            "sweep failed"
        );
    } else if timed_out > 0 {
        warn!(namespace, name, cutoff, limit, timed_out, duration_ms, batches, small_batches, fallback_batches, outcome = ?report.outcome(), "rows timed out: no request completed them, which may mean crashes upstream");
    } else {
        debug!(namespace, name, cutoff, limit, timed_out, duration_ms, "nothing to time out");
    }
}
