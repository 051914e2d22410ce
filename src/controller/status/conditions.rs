//! What the conditions say in each situation. Pure; `status` lays it over the status.

use chrono::TimeDelta;

use crate::api::condition::{self, Condition, ConditionType, ConditionUpdate};
use crate::api::spec::Mode;
use crate::api::status::{Backlog, whole_seconds};
use crate::api::{AuditLogSweeperSpec, Failure, Reason, Stage, counted, stale_rows_left};
use crate::preflight::{PreflightReport, Severity};
use crate::sweep::Report;

use ConditionType::{BacklogBounded, DatabaseReachable, Ready, Reconciling, SchemaReady, Stalled, Suspended};

/// An attempt failed; `stalled`: someone must fix something.
pub(super) fn failed(failure: &Failure, stalled: bool, times: i32, old: &[Condition]) -> Vec<ConditionUpdate> {
    let progress = if stalled {
        ConditionUpdate::new(Stalled, true, failure.reason, &failure.message)
    } else {
        let message = format!("failed {} in a row; trying again", counted(times, "time"));
        ConditionUpdate::new(Reconciling, true, Reason::Retrying, message)
    };
    let reachable = match failure.reason.stage() {
        Stage::Object => ConditionUpdate::new(DatabaseReachable, None, failure.reason, "the database was not asked"),
        Stage::Connection => ConditionUpdate::new(DatabaseReachable, false, failure.reason, &failure.message),
        Stage::Schema | Stage::Server => {
            ConditionUpdate::new(DatabaseReachable, true, Reason::Connected, "the database answered")
        }
    };
    vec![
        ConditionUpdate::new(Ready, false, failure.reason, &failure.message),
        progress,
        reachable,
        schema_after(failure, old),
        ConditionUpdate::new(BacklogBounded, None, Reason::NotObserved, "the last attempt failed"),
        not_suspended(),
    ]
}

/// What a failure tells of the schema.
fn schema_after(failure: &Failure, old: &[Condition]) -> ConditionUpdate {
    match failure.reason.stage() {
        Stage::Schema => ConditionUpdate::new(SchemaReady, false, failure.reason, &failure.message),
        // It was not looked at, and may be another by now.
        Stage::Object | Stage::Connection => {
            ConditionUpdate::new(SchemaReady, None, Reason::NotObserved, "the last attempt did not get to it")
        }
        Stage::Server => as_before(SchemaReady, old),
    }
}

/// What a preflight tells of the schema; without one, what was known still stands.
pub(super) fn schema(checked: Option<&PreflightReport>, old: &[Condition]) -> ConditionUpdate {
    let Some(checked) = checked else { return as_before(SchemaReady, old) };
    match checked.findings.iter().find(|finding| finding.severity != Severity::Warning) {
        Some(finding) => ConditionUpdate::new(SchemaReady, false, finding.reason, finding.in_one_line()),
        None => {
            let warnings: Vec<_> = checked.findings.iter().map(|finding| finding.message.as_str()).collect();
            let message =
                if warnings.is_empty() { "all that a sweep needs is there".into() } else { warnings.join("; ") };
            ConditionUpdate::new(SchemaReady, true, Reason::SchemaReady, message)
        }
    }
}

/// What was known still stands.
fn as_before(type_: ConditionType, old: &[Condition]) -> ConditionUpdate {
    let found = condition::find(old, type_).filter(|c| c.status != "Unknown");
    let reason = found.and_then(|c| Reason::ALL.iter().find(|reason| reason.as_str() == c.reason));
    match (found, reason) {
        (Some(c), Some(reason)) => ConditionUpdate::new(type_, c.status == "True", *reason, &c.message),
        _ => ConditionUpdate::new(type_, None, Reason::NotObserved, "it was not looked at yet"),
    }
}

/// The spec was seen and is being tried.
pub(super) fn pending() -> Vec<ConditionUpdate> {
    let text = "the spec was seen and is being tried";
    vec![
        ConditionUpdate::new(Ready, None, Reason::Pending, text),
        ConditionUpdate::new(Reconciling, true, Reason::Pending, text),
        ConditionUpdate::new(DatabaseReachable, None, Reason::Pending, text),
        ConditionUpdate::new(SchemaReady, None, Reason::Pending, text),
        ConditionUpdate::new(BacklogBounded, None, Reason::Pending, text),
        not_suspended(),
    ]
}

/// The spec says suspend.
pub(super) fn suspended() -> Vec<ConditionUpdate> {
    let text = "spec.suspend is true: no sweep begins";
    vec![
        ConditionUpdate::new(Ready, true, Reason::Suspended, text),
        ConditionUpdate::new(DatabaseReachable, None, Reason::Suspended, text),
        ConditionUpdate::new(SchemaReady, None, Reason::Suspended, text),
        ConditionUpdate::new(BacklogBounded, None, Reason::Suspended, text),
        ConditionUpdate::new(Suspended, true, Reason::Suspended, text),
    ]
}

/// The last attempt went well.
pub(super) fn healthy(
    reason: Reason,
    message: &str,
    schema: ConditionUpdate,
    bounded: ConditionUpdate,
) -> Vec<ConditionUpdate> {
    vec![
        ConditionUpdate::new(Ready, true, reason, message),
        ConditionUpdate::new(DatabaseReachable, true, Reason::Connected, "the database answered"),
        schema,
        bounded,
        not_suspended(),
    ]
}

fn not_suspended() -> ConditionUpdate {
    ConditionUpdate::new(Suspended, false, Reason::NotSuspended, "spec.suspend is false")
}

/// Whether the sweeps keep up, after one that counted what is left. The database's clock judges.
pub(super) fn bounded(spec: &AuditLogSweeperSpec, report: &Report, refused: i64) -> ConditionUpdate {
    let type_ = BacklogBounded;
    let (Some(backlog), Some(cutoff)) = (&report.backlog, report.cutoff) else {
        return ConditionUpdate::new(
            type_,
            None,
            Reason::NotObserved,
            "the last sweep ended before it counted what is left",
        );
    };
    let Backlog { display, oldest_time_started, .. } = backlog;
    let advice = match (spec.mode, refused) {
        (Mode::Observe, _) => "spec.mode Observe sweeps nothing: set it to Apply",
        (Mode::Apply, 0) => "raise spec.limit or shorten spec.period",
        (Mode::Apply, _) => "the database refuses rows: see status.unsweepable",
    };
    let bound = cutoff - TimeDelta::milliseconds(spec.period.as_millis()) * 2;
    match oldest_time_started {
        Some(oldest) if *oldest < bound => ConditionUpdate::new(
            type_,
            false,
            Reason::FallingBehind,
            format!(
                "{}, the oldest started {}, longer ago than timeout + 2 * period; {advice}",
                stale_rows_left(display),
                whole_seconds(*oldest).format("%Y-%m-%dT%H:%M:%SZ")
            ),
        ),
        None if backlog.remaining > 0 => ConditionUpdate::new(
            type_,
            false,
            Reason::FallingBehind,
            format!("{}, the oldest with an out-of-range start time (such as -infinity)", stale_rows_left(display)),
        ),
        _ => ConditionUpdate::new(type_, true, Reason::WithinBound, "no stale row is older than timeout + 2 * period"),
    }
}

/// A preflight counts nothing, so what the last sweep found still stands.
pub(super) fn bounded_as_before(old: &[Condition]) -> ConditionUpdate {
    as_before(BacklogBounded, old)
}

/// The object cannot be read, or breaks the rules.
pub(super) fn invalid(message: &str) -> Vec<ConditionUpdate> {
    let reason = Reason::InvalidSpec;
    let mut updates =
        vec![ConditionUpdate::new(Ready, false, reason, message), ConditionUpdate::new(Stalled, true, reason, message)];
    let unknown = [DatabaseReachable, SchemaReady, BacklogBounded, Suspended];
    updates.extend(unknown.map(|type_| ConditionUpdate::new(type_, None, reason, "the object is not valid")));
    updates
}
