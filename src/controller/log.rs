//! What the log says of an attempt at a sweep.

use kube::ResourceExt;
use tracing::{debug, error, warn};

use crate::api::Failure;

use super::model::Subject;
use crate::api::AuditLogSweeper;
use crate::sweep::Report;

/// A healthy system has no stale rows, so rows timed out are a warning.
pub fn log(object: &AuditLogSweeper, subject: &Subject, result: &Result<Report, Failure>) {
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
                    batches = report.batches,
                    small_batches = report.small_batches,
                    reason,
                    error = error.to_string(),
                    "sweep failed"
                );
            } else if timed_out > 0 {
                warn!(namespace, name, cutoff, limit, timed_out, duration_ms, batches = report.batches, small_batches = report.small_batches, outcome = ?report.outcome(), "rows timed out: their requests never completed them, which may mean crashes upstream");
            } else {
                debug!(namespace, name, cutoff, limit, timed_out, duration_ms, "nothing to time out");
            }
        }
    }
}
