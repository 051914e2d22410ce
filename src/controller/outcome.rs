//! Fourth step, pure: the status that follows from what happened.

use chrono::{DateTime, TimeDelta, Utc};

use super::decide::Slot;
use crate::api::conditions::{self, ConditionType, Reason, Verdict};
use crate::api::spec::Mode;
use crate::api::status::{
    AuditLogSweeperStatus, Backlog, LastError, LastSweep, Outcome, ResumeAfter, Totals, Unsweepable, whole_seconds,
};
use crate::api::{AuditLogSweeper, AuditLogSweeperSpec};
use crate::schedule::Grid;
use crate::sweep::{Class, Report};

/// So many failures, and so long, until a missing Secret, table or grant counts as nobody's passing trouble.
const PATIENCE: (i32, TimeDelta) = (5, TimeDelta::minutes(5));

/// The object that something happened to: the spec and generation that were acted upon.
#[derive(Clone, Debug)]
pub struct Subject {
    pub uid: String,
    pub generation: i64,
    pub spec: AuditLogSweeperSpec,
}

impl Subject {
    /// The subject that an object is.
    pub fn new(object: &AuditLogSweeper) -> Self {
        Self {
            uid: object.metadata.uid.clone().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            spec: object.spec.clone(),
        }
    }

    /// The slots of its schedule.
    pub fn grid(&self) -> Grid {
        Grid::new(&self.uid, self.spec.period.as_std())
    }
}

/// Why an attempt failed, and how that is treated.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub reason: Reason,
    pub message: String,
    pub class: Class,
    /// Whether the database answered; None: it was not asked.
    pub reachable: Option<bool>,
}

impl From<&crate::sweep::Error> for Failure {
    fn from(error: &crate::sweep::Error) -> Self {
        let reason = error.reason();
        let reachable = match reason {
            Reason::InvalidConnectionURI | Reason::InvalidSpec => None,
            Reason::NameResolutionFailed
            | Reason::ConnectTimeout
            | Reason::LoginTimeout
            | Reason::ResponseTimeout
            | Reason::ConnectionLost
            | Reason::DatabaseUnreachable
            | Reason::TLSFailed => Some(false),
            _ => Some(true),
        };
        Self { reason, message: error.to_string(), class: error.class(), reachable }
    }
}

/// Something that happened, from which the next status is computed; again on top of another status if that was
/// written meanwhile.
#[derive(Debug)]
pub enum Update {
    /// The spec was seen and is being tried.
    Acknowledged { now: DateTime<Utc> },
    /// The spec says suspend.
    Suspended { now: DateTime<Utc> },
    /// A preflight ended.
    Preflight { now: DateTime<Utc>, result: Result<(), Failure> },
    /// An attempt at a sweep ended.
    Sweep { slot: Slot, start: DateTime<Utc>, end: DateTime<Utc>, result: Box<Result<Report, Failure>> },
}

impl Update {
    /// When an attempt began, if this is about one.
    pub const fn start(&self) -> Option<DateTime<Utc>> {
        match self {
            Self::Sweep { start, .. } => Some(*start),
            _ => None,
        }
    }

    /// The status that follows.
    pub fn apply(&self, subject: &Subject, old: &AuditLogSweeperStatus) -> AuditLogSweeperStatus {
        let mut status = old.clone();
        if old.observed_generation != Some(subject.generation) {
            // It may have been another table.
            status.unsweepable = None;
        }
        status.observed_generation = Some(subject.generation);
        let (now, verdicts) = match self {
            Self::Acknowledged { now } => (*now, pending()),
            Self::Suspended { now } => {
                // No time is a promise while nothing begins.
                status.next_schedule_time = None;
                (*now, suspended())
            }
            Self::Preflight { now, result: Ok(()) } => {
                status.consecutive_failures = 0;
                status.next_schedule_time = Some(subject.grid().after_edit(old.last_attempt_time, *now));
                (
                    *now,
                    healthy(
                        Reason::SchemaReady,
                        "the table is as the spec says; no sweep is due yet",
                        bounded_as_before(old),
                    ),
                )
            }
            Self::Preflight { now, result: Err(failure) } => {
                let next = subject.grid().after_edit(old.last_attempt_time, *now);
                (*now, fail(&mut status, subject, failure, *now, next))
            }
            Self::Sweep { slot, start, end, result } => (*end, swept(&mut status, subject, slot, *start, *end, result)),
        };
        // Without a verdict, as when the operator was stopped, what was said still stands.
        if !verdicts.is_empty() {
            status.conditions = conditions::apply(&old.conditions, &verdicts, subject.generation, now);
        }
        status
    }

    /// The counts of this alone, added to a status that knows of a later attempt.
    pub fn apply_totals(&self, old: &AuditLogSweeperStatus) -> AuditLogSweeperStatus {
        let mut status = old.clone();
        if let Self::Sweep { result, .. } = self {
            add_totals(&mut status, result);
        }
        status
    }
}

/// The status of an object that cannot be read as an AuditLogSweeper.
pub fn invalid(old: &AuditLogSweeperStatus, generation: i64, error: &str, now: DateTime<Utc>) -> AuditLogSweeperStatus {
    use ConditionType::{BacklogBounded, DatabaseReachable, Ready, Stalled, Suspended};
    let message = format!(
        "the object cannot be read as an AuditLogSweeper: {error}. Mend the spec, or upgrade the operator if it is \
         older than the CustomResourceDefinition"
    );
    let reason = Reason::InvalidSpec;
    let mut verdicts =
        vec![Verdict::new(Ready, false, reason, &message), Verdict::new(Stalled, true, reason, &message)];
    let unknown = [DatabaseReachable, BacklogBounded, Suspended];
    verdicts.extend(unknown.map(|type_| Verdict::new(type_, None, reason, "the object cannot be read")));
    let mut status = old.clone();
    status.observed_generation = Some(generation);
    status.conditions = conditions::apply(&old.conditions, &verdicts, generation, now);
    if old.last_error.as_ref().is_none_or(|last| !message.starts_with(&last.message)) {
        status.last_error = Some(LastError::new(reason, &message, now));
    }
    status
}

fn add_totals(status: &mut AuditLogSweeperStatus, result: &Result<Report, Failure>) {
    let failed = result.as_ref().map_or(true, |report| report.error.is_some());
    let totals = status.totals.get_or_insert_with(Totals::default);
    totals.sweeps = totals.sweeps.saturating_add(1);
    totals.failures = totals.failures.saturating_add(i64::from(failed));
    totals.timed_out = totals.timed_out.saturating_add(result.as_ref().map_or(0, |report| report.timed_out));
}

/// Lays an attempt over the status.
fn swept(
    status: &mut AuditLogSweeperStatus,
    subject: &Subject,
    slot: &Slot,
    start: DateTime<Utc>,
    end: DateTime<Utc>,
    result: &Result<Report, Failure>,
) -> Vec<Verdict> {
    add_totals(status, result);
    let empty = Report::default();
    let report = result.as_ref().unwrap_or(&empty);
    let before = slot.continues.as_ref();
    let sum = |count: fn(&LastSweep) -> i64, now: i64| before.map_or(0, count).saturating_add(now);
    let sweep = LastSweep {
        schedule_time: whole_seconds(slot.schedule_time),
        start_time: whole_seconds(start),
        duration_milliseconds: report.duration_milliseconds(),
        trigger: slot.trigger,
        outcome: report.outcome(),
        attempts: before.map_or(0, |last| last.attempts).saturating_add(1),
        cutoff: report.cutoff,
        limit: subject.spec.limit,
        timed_out: sum(|last| last.timed_out, report.timed_out),
        skipped: sum(|last| last.skipped, report.skipped),
        suppressed: sum(|last| last.suppressed, report.suppressed),
        uncertain: sum(|last| last.uncertain, report.uncertain),
        batches: sum(|last| last.batches, report.batches),
    };
    // An attempt that did not get to the rows says nothing about them.
    if report.database_time.is_some() {
        status.unsweepable = unsweepable(report);
    }
    if let Some((database, after)) = report.database_time {
        let ours = start + TimeDelta::from_std(after).unwrap_or_default();
        status.clock_skew_milliseconds = Some((ours - database).num_milliseconds());
    }
    status.last_schedule_time = Some(sweep.schedule_time);
    status.last_attempt_time = Some(whole_seconds(start));
    let next = subject.grid().after(start, end);
    let failure = match result {
        Err(failure) => Some(failure.clone()),
        Ok(report) => report.error.as_ref().map(Failure::from),
    };
    let verdicts = if let Some(failure) = failure {
        // A failed attempt does not put the slot after it off. With nothing left of its limit, the slot is done.
        let next = subject.grid().after(slot.schedule_time, end);
        let verdicts = fail(status, subject, &failure, end, next);
        if sweep.timed_out >= i64::from(subject.spec.limit) {
            status.next_schedule_time = Some(next);
        }
        verdicts
    } else if sweep.outcome == Outcome::Stopped {
        // The next operator goes on with it at once, with what is left of its limit.
        let left = sweep.timed_out < i64::from(subject.spec.limit);
        status.next_schedule_time = Some(if left { whole_seconds(end) } else { next });
        vec![]
    } else {
        status.consecutive_failures = 0;
        status.next_schedule_time = Some(next);
        status.backlog.clone_from(&report.backlog);
        status.last_successful_time = Some(whole_seconds(end));
        let (reason, text) = match sweep.outcome {
            Outcome::LimitReached => (Reason::LimitReached, "stopped at the limit"),
            Outcome::DeadlineReached => (Reason::DeadlineReached, "stopped at the deadline"),
            Outcome::Observed => (Reason::Observed, ""),
            Outcome::Drained | Outcome::Failed | Outcome::Stopped => (Reason::Swept, "no stale row is left"),
        };
        let backlog = report.backlog.as_ref().filter(|backlog| backlog.remaining > 0);
        let left = backlog.map_or_else(String::new, |backlog| format!("; {} stale rows are left", backlog.display));
        let text =
            if sweep.outcome == Outcome::Drained && backlog.is_some() { "looked at every stale row" } else { text };
        let refused = match report.refused {
            0 => String::new(),
            rows => {
                let why = report.refused_why.as_deref().unwrap_or_default();
                format!("; {rows} rows were refused, see status.unsweepable; the first because {why}")
            }
        };
        let done = match sweep.outcome {
            Outcome::Observed => "changed nothing, as spec.mode says".into(),
            _ => format!("completed {} rows, {text}", sweep.timed_out),
        };
        let message = format!("{done}{left}{refused}");
        healthy(reason, &message, bounded(subject, report))
    };
    status.last_sweep = Some(sweep);
    verdicts
}

fn unsweepable(report: &Report) -> Option<Unsweepable> {
    let resume_after = report.resume_after.as_ref();
    let resume_after = resume_after.map(|at| ResumeAfter { time_started: at.time_started.clone(), id: at.id.clone() });
    (report.refused > 0 || resume_after.is_some()).then(|| Unsweepable {
        count: report.refused,
        ids: report.refused_ids.clone(),
        resume_after,
    })
}

/// Lays a failure over the status: retried, at the latest at the `next` slot.
fn fail(
    status: &mut AuditLogSweeperStatus,
    subject: &Subject,
    failure: &Failure,
    now: DateTime<Utc>,
    next: DateTime<Utc>,
) -> Vec<Verdict> {
    use ConditionType::{BacklogBounded, DatabaseReachable, Ready, Reconciling, Stalled, Suspended};
    status.consecutive_failures = status.consecutive_failures.saturating_add(1);
    status.last_failure_time = Some(whole_seconds(now));
    status.last_error = Some(LastError::new(failure.reason, &failure.message, now));
    let missing = failure.class == Class::Missing;
    let retry = subject.grid().retry(status.consecutive_failures, missing, now, next);
    status.next_schedule_time = Some(whole_seconds(retry).max(whole_seconds(now)));
    let failing_since = conditions::find(&status.conditions, Ready)
        .filter(|ready| ready.status == "False")
        .map(|ready| ready.last_transition_time.0.as_second());
    let for_long = failing_since.is_some_and(|since| now.timestamp() - since >= PATIENCE.1.num_seconds());
    let stalled = match failure.class {
        Class::Spec => true,
        Class::Missing => status.consecutive_failures >= PATIENCE.0 && for_long,
        Class::Transient => false,
    };
    let progress = if stalled {
        Verdict::new(Stalled, true, failure.reason, &failure.message)
    } else {
        let message = format!("failed {} times in a row; trying again", status.consecutive_failures);
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
        Verdict::new(BacklogBounded, None, Reason::NotObserved, "the last attempt failed"),
        not_suspended(Suspended),
    ]
}

fn pending() -> Vec<Verdict> {
    use ConditionType::{BacklogBounded, DatabaseReachable, Ready, Reconciling, Suspended};
    let text = "the spec was seen and is being tried";
    vec![
        Verdict::new(Ready, None, Reason::Pending, text),
        Verdict::new(Reconciling, true, Reason::Pending, text),
        Verdict::new(DatabaseReachable, None, Reason::Pending, text),
        Verdict::new(BacklogBounded, None, Reason::Pending, text),
        not_suspended(Suspended),
    ]
}

fn suspended() -> Vec<Verdict> {
    use ConditionType::{BacklogBounded, DatabaseReachable, Ready, Suspended};
    let text = "spec.suspend is true: no sweep begins";
    vec![
        Verdict::new(Ready, true, Reason::Suspended, text),
        Verdict::new(DatabaseReachable, None, Reason::Suspended, text),
        Verdict::new(BacklogBounded, None, Reason::Suspended, text),
        Verdict::new(Suspended, true, Reason::Suspended, text),
    ]
}

fn healthy(reason: Reason, message: &str, bounded: Verdict) -> Vec<Verdict> {
    vec![
        Verdict::new(ConditionType::Ready, true, reason, message),
        Verdict::new(ConditionType::DatabaseReachable, true, Reason::Connected, "the database answered"),
        bounded,
        not_suspended(ConditionType::Suspended),
    ]
}

fn not_suspended(type_: ConditionType) -> Verdict {
    Verdict::new(type_, false, Reason::NotSuspended, "spec.suspend is false")
}

/// Whether the sweeps keep up, after one that counted what is left. The database's clock judges.
fn bounded(subject: &Subject, report: &Report) -> Verdict {
    let type_ = ConditionType::BacklogBounded;
    let (Some(backlog), Some(cutoff)) = (&report.backlog, report.cutoff) else {
        return Verdict::new(type_, None, Reason::NotObserved, "the last sweep ended before it counted what is left");
    };
    let Backlog { display, oldest_time_started, .. } = backlog;
    let advice = match (subject.spec.mode, report.refused) {
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
fn bounded_as_before(old: &AuditLogSweeperStatus) -> Verdict {
    let type_ = ConditionType::BacklogBounded;
    match conditions::find(&old.conditions, type_) {
        Some(c) if c.status == "True" => Verdict::new(type_, true, Reason::WithinBound, &c.message),
        Some(c) if c.status == "False" => Verdict::new(type_, false, Reason::FallingBehind, &c.message),
        _ => Verdict::new(type_, None, Reason::NotObserved, "no sweep has counted what is left yet"),
    }
}
