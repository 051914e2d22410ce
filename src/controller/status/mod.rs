//! Fourth step, pure: the status that follows from what happened.

mod attempt;
mod conditions;
pub mod events;

use chrono::{DateTime, Utc};
use kube::ResourceExt;

use crate::api::condition::{self, Reason};
use crate::api::status::{AuditLogSweeperStatus, LastError, whole_seconds};
use crate::api::{AuditLogSweeper, AuditLogSweeperSpec, cut};
use crate::controller::decide::Slot;
use crate::database::Class;
use crate::preflight::{Checked, Finding};
use crate::schedule::Grid;
use crate::sweep::Report;
use attempt::Attempt;
use conditions::healthy;

/// The object that something happened to: the spec and generation that were acted upon.
#[derive(Clone, Debug)]
pub struct Subject {
    pub uid: String,
    pub generation: i64,
    pub spec: AuditLogSweeperSpec,
    /// The value of the annotation that asks for a sweep now, as far as it is looked at.
    pub request: Option<String>,
    /// Whether it is being deleted, and only some finalizer keeps it.
    pub deleted: bool,
}

/// Each new value of this annotation asks for one sweep now.
pub const REQUESTED_AT: &str = "auditlog.dev/requestedAt";

/// So many bytes of that value are looked at.
const MAX_REQUEST: usize = 128;

impl Subject {
    /// The subject that an object is.
    pub fn new(object: &AuditLogSweeper) -> Self {
        Self {
            uid: object.metadata.uid.clone().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            spec: object.spec.clone(),
            request: object.annotations().get(REQUESTED_AT).map(|value| cut(value, MAX_REQUEST).to_owned()),
            deleted: object.metadata.deletion_timestamp.is_some(),
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

impl From<&crate::database::Error> for Failure {
    fn from(error: &crate::database::Error) -> Self {
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

impl From<&Finding> for Failure {
    /// A finding for which a sweep must not begin.
    fn from(finding: &Finding) -> Self {
        let class = Class::of(finding.reason);
        Self { reason: finding.reason, message: finding.in_one_line(), class, reachable: Some(true) }
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
    /// A time in the status was one that no sweep can have.
    Repaired { now: DateTime<Utc> },
    /// A preflight ended.
    Preflight { now: DateTime<Utc>, result: Result<Checked, Failure> },
    /// An attempt at a sweep ended. With what a preflight before it found, if there was one.
    Sweep {
        slot: Slot,
        start: DateTime<Utc>,
        end: DateTime<Utc>,
        result: Box<Result<Report, Failure>>,
        checked: Option<Checked>,
    },
}

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
