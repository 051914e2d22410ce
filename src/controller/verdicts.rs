//! What the conditions say in each situation. Pure; `outcome` lays it over the status.

use chrono::TimeDelta;

use super::outcome::{Failure, Subject};
use crate::api::conditions::{self, Condition, ConditionType, Reason, Verdict};
use crate::api::spec::Mode;
use crate::api::status::{Backlog, whole_seconds};
use crate::sweep::Report;
use crate::sweep::preflight::{Checked, Severity};

use ConditionType::{BacklogBounded, DatabaseReachable, Ready, Reconciling, SchemaReady, Stalled, Suspended};

/// An attempt failed; `stalled`: nothing will change before someone mends something.
pub(super) fn failed(failure: &Failure, stalled: bool, times: i32, old: &[Condition]) -> Vec<Verdict> {
    let progress = if stalled {
        Verdict::new(Stalled, true, failure.reason, &failure.message)
    } else {
        let message = format!("failed {} times in a row; trying again", times);
        Verdict::new(Reconciling, true, Reason::Retrying, message)
    };
    let reachable = match failure.reachable {
        Some(true) => Verdict::new(DatabaseReachable, true, Reason::Connected, "the database answered"),
        Some(false) => Verdict::new(DatabaseReachable, false, failure.reason, &failure.message),
        None => Verdict::new(DatabaseReachable, None, failure.reason, "the database was not asked"),
    };
    vec![
        Verdict::new(Ready, false, failure.reason, &failure.message),
        progress,
        reachable,
        schema_after(failure, old),
        Verdict::new(BacklogBounded, None, Reason::NotObserved, "the last attempt failed"),
        not_suspended(),
    ]
}

/// What a failure tells of the schema.
fn schema_after(failure: &Failure, old: &[Condition]) -> Verdict {
    match (failure.reason, failure.reachable) {
        (
            Reason::TableNotFound
            | Reason::ColumnNotFound
            | Reason::SchemaMismatch
            | Reason::PermissionDenied
            | Reason::RowSecurity
            | Reason::ServerNotSupported
            | Reason::IndexMissing,
            _,
        ) => Verdict::new(SchemaReady, false, failure.reason, &failure.message),
        // It was not looked at, and may be another by now.
        (_, None | Some(false)) => {
            Verdict::new(SchemaReady, None, Reason::NotObserved, "the last attempt did not get to it")
        }
        (_, Some(true)) => as_before(SchemaReady, old),
    }
}

/// What a preflight tells of the schema; without one, what was known still stands.
pub(super) fn schema(checked: Option<&Checked>, old: &[Condition]) -> Verdict {
    let Some(checked) = checked else { return as_before(SchemaReady, old) };
    match checked.findings.iter().find(|finding| finding.severity != Severity::Warning) {
        Some(finding) => Verdict::new(SchemaReady, false, finding.reason, finding.in_one_line()),
        None => {
            let warnings: Vec<_> = checked.findings.iter().map(|finding| finding.message.as_str()).collect();
            let message =
                if warnings.is_empty() { "all that a sweep needs is there".into() } else { warnings.join("; ") };
            Verdict::new(SchemaReady, true, Reason::SchemaReady, message)
        }
    }
}

/// What was known still stands.
fn as_before(type_: ConditionType, old: &[Condition]) -> Verdict {
    let found = conditions::find(old, type_).filter(|c| c.status != "Unknown");
    let reason = found.and_then(|c| Reason::ALL.iter().find(|reason| reason.as_str() == c.reason));
    match (found, reason) {
        (Some(c), Some(reason)) => Verdict::new(type_, c.status == "True", *reason, &c.message),
        _ => Verdict::new(type_, None, Reason::NotObserved, "it was not looked at yet"),
    }
}

/// The spec was seen and is being tried.
pub(super) fn pending() -> Vec<Verdict> {
    let text = "the spec was seen and is being tried";
    vec![
        Verdict::new(Ready, None, Reason::Pending, text),
        Verdict::new(Reconciling, true, Reason::Pending, text),
        Verdict::new(DatabaseReachable, None, Reason::Pending, text),
        Verdict::new(SchemaReady, None, Reason::Pending, text),
        Verdict::new(BacklogBounded, None, Reason::Pending, text),
        not_suspended(),
    ]
}

/// The spec says suspend.
pub(super) fn suspended() -> Vec<Verdict> {
    let text = "spec.suspend is true: no sweep begins";
    vec![
        Verdict::new(Ready, true, Reason::Suspended, text),
        Verdict::new(DatabaseReachable, None, Reason::Suspended, text),
        Verdict::new(SchemaReady, None, Reason::Suspended, text),
        Verdict::new(BacklogBounded, None, Reason::Suspended, text),
        Verdict::new(Suspended, true, Reason::Suspended, text),
    ]
}

/// The last attempt went well.
pub(super) fn healthy(reason: Reason, message: &str, schema: Verdict, bounded: Verdict) -> Vec<Verdict> {
    vec![
        Verdict::new(Ready, true, reason, message),
        Verdict::new(DatabaseReachable, true, Reason::Connected, "the database answered"),
        schema,
        bounded,
        not_suspended(),
    ]
}

fn not_suspended() -> Verdict {
    Verdict::new(Suspended, false, Reason::NotSuspended, "spec.suspend is false")
}

/// Whether the sweeps keep up, after one that counted what is left. The database's clock judges.
pub(super) fn bounded(subject: &Subject, report: &Report, refused: i64) -> Verdict {
    let type_ = BacklogBounded;
    let (Some(backlog), Some(cutoff)) = (&report.backlog, report.cutoff) else {
        return Verdict::new(type_, None, Reason::NotObserved, "the last sweep ended before it counted what is left");
    };
    let Backlog { display, oldest_time_started, .. } = backlog;
    let advice = match (subject.spec.mode, refused) {
        (Mode::Observe, _) => "spec.mode Observe sweeps nothing: set it to Apply",
        (Mode::Apply, 0) => "raise spec.limit or shorten spec.period",
        (Mode::Apply, _) => "the database refuses rows: see status.unsweepable",
    };
    let bound = cutoff - TimeDelta::milliseconds(subject.spec.period.as_millis()) * 2;
    match oldest_time_started {
        Some(oldest) if *oldest < bound => Verdict::new(
            type_,
            false,
            Reason::FallingBehind,
            format!(
                "{display} stale rows are left, the oldest started {}, longer ago than timeout + 2 * period; {advice}",
                whole_seconds(*oldest).format("%Y-%m-%dT%H:%M:%SZ")
            ),
        ),
        None if backlog.remaining > 0 => Verdict::new(
            type_,
            false,
            Reason::FallingBehind,
            format!("{display} stale rows are left, the oldest with a start time that no calendar has"),
        ),
        _ => Verdict::new(type_, true, Reason::WithinBound, "no stale row is older than timeout + 2 * period"),
    }
}

/// A preflight counts nothing, so what the last sweep found still stands.
pub(super) fn bounded_as_before(old: &[Condition]) -> Verdict {
    as_before(BacklogBounded, old)
}

/// The object cannot be read, or breaks the rules.
pub(super) fn invalid(message: &str) -> Vec<Verdict> {
    let reason = Reason::InvalidSpec;
    let mut verdicts = vec![Verdict::new(Ready, false, reason, message), Verdict::new(Stalled, true, reason, message)];
    let unknown = [DatabaseReachable, SchemaReady, BacklogBounded, Suspended];
    verdicts.extend(unknown.map(|type_| Verdict::new(type_, None, reason, "the object is not valid")));
    verdicts
}
