//! Fourth step, pure: the status that follows from what happened.

mod attempt;
mod conditions;
pub mod events;

use chrono::{DateTime, Utc};

use crate::api::Reason;
use crate::api::condition;
use crate::api::status::{AuditLogSweeperStatus, LastError, whole_seconds};
use crate::controller::model::{Subject, Update};
use attempt::Attempt;
use conditions::healthy;

impl Update {
    /// When an attempt began, if this is about one.
    pub const fn start(&self) -> Option<DateTime<Utc>> {
        match self {
            Self::Sweep { start, .. } => Some(*start),
            _ => None,
        }
    }

    /// Whether a status already has it, if this is about an attempt.
    pub fn is_in(&self, subject: &Subject, status: &AuditLogSweeperStatus) -> bool {
        let Self::Sweep { slot, start, end, result, .. } = self else { return false };
        Attempt { subject, slot, start: *start, end: *end, result, checked: None }.is_in(status)
    }

    /// The status that follows.
    pub fn apply(&self, subject: &Subject, old: &AuditLogSweeperStatus) -> AuditLogSweeperStatus {
        let mut status = old.clone();
        if old.observed_generation != Some(subject.generation) {
            // It may have been another table.
            status.unsweepable = None;
        }
        status.observed_generation = Some(subject.generation);
        let (now, updates) = match self {
            Self::Acknowledged { now } => (*now, conditions::pending()),
            Self::Suspended { now } => {
                // No time is a promise while nothing begins.
                status.next_schedule_time = None;
                status.last_handled_request = subject.request.clone().or(status.last_handled_request);
                (*now, conditions::suspended())
            }
            Self::Repaired { now } => {
                let last = old.last_attempt_time.map(|last| last.min(whole_seconds(*now)));
                let slot = |last| subject.grid().after(last, last);
                status.last_attempt_time = last;
                status.next_schedule_time = Some(last.map_or(whole_seconds(*now), slot));
                (*now, vec![])
            }
            Self::Preflight { now, result: Ok(checked) } => {
                status.consecutive_failures = 0;
                status.next_schedule_time = Some(subject.grid().after_edit(old.last_attempt_time, *now));
                let text = "a sweep could run; none is due yet";
                let schema = conditions::schema(Some(checked), &old.conditions);
                (*now, healthy(Reason::SchemaReady, text, schema, conditions::bounded_as_before(&old.conditions)))
            }
            Self::Preflight { now, result: Err(failure) } => {
                let next = subject.grid().after_edit(old.last_attempt_time, *now);
                (*now, attempt::fail(&mut status, subject, failure, *now, next))
            }
            Self::Sweep { slot, start, end, result, checked } => {
                let checked = checked.as_ref();
                let attempt = Attempt { subject, slot, start: *start, end: *end, result, checked };
                (*end, attempt.apply_to(&mut status))
            }
        };
        // Without a verdict, as when the operator was stopped, what was said still stands.
        if !updates.is_empty() {
            status.conditions = condition::apply(&old.conditions, &updates, subject.generation, now);
        }
        status
    }

    /// The counts of this alone, added to a status that knows of a later attempt.
    pub fn apply_totals(&self, subject: &Subject, old: &AuditLogSweeperStatus) -> AuditLogSweeperStatus {
        let mut status = old.clone();
        // Without rows there is nothing that only this attempt knows.
        if let Self::Sweep { slot, start, end, result, .. } = self
            && result.as_ref().as_ref().is_ok_and(|report| report.timed_out > 0)
        {
            Attempt { subject, slot, start: *start, end: *end, result, checked: None }.add_totals(&mut status);
        }
        status
    }
}

/// The status of an object that is not, or does not say what, a sweep can be made of.
pub fn invalid(old: &AuditLogSweeperStatus, generation: i64, error: &str, now: DateTime<Utc>) -> AuditLogSweeperStatus {
    let message = format!(
        "the object is not a valid AuditLogSweeper: {error}. Fix the spec, or upgrade the operator if it is older than \
         the CustomResourceDefinition"
    );
    let reason = Reason::InvalidSpec;
    let updates = conditions::invalid(&message);
    let mut status = old.clone();
    status.observed_generation = Some(generation);
    status.conditions = condition::apply(&old.conditions, &updates, generation, now);
    if old.last_error.as_ref().is_none_or(|last| !message.starts_with(&last.message)) {
        status.last_error = Some(LastError::new(reason, &message, now));
    }
    status
}
