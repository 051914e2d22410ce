//! Fourth step, pure: the status that follows from what happened.

mod attempt;
mod conditions;
pub mod events;

use chrono::{DateTime, Utc};

use crate::api::Reason;
use crate::api::condition;
use crate::api::status::{AuditLogSweeperStatus, LastError, whole_seconds};
use crate::controller::model::{AttemptResult, Done};
use conditions::healthy;

impl AttemptResult {
    /// Whether a status already has it, if this is about a sweep.
    pub fn is_in(&self, status: &AuditLogSweeperStatus) -> bool {
        self.sweep().is_some_and(|attempt| attempt.is_in(&self.sweeper, status))
    }

    /// The status that follows.
    pub fn apply(&self, old: &AuditLogSweeperStatus) -> AuditLogSweeperStatus {
        let Self { sweeper, done, time: now, .. } = self;
        let mut status = old.clone();
        if old.observed_generation != Some(sweeper.generation()) {
            // It may have been another table.
            status.unsweepable = None;
        }
        status.observed_generation = Some(sweeper.generation());
        let updates = match done {
            Done::Acknowledged => conditions::pending(),
            Done::Suspended => {
                // No time is a promise while nothing begins.
                status.next_schedule_time = None;
                status.last_handled_request = sweeper.request().map(str::to_owned).or(status.last_handled_request);
                conditions::suspended()
            }
            Done::Repaired => {
                let last = old.last_attempt_time.map(|last| last.min(whole_seconds(*now)));
                let slot = |last| sweeper.grid().after(last, last);
                status.last_attempt_time = last;
                status.next_schedule_time = Some(last.map_or(whole_seconds(*now), slot));
                vec![]
            }
            Done::Preflight(result) => {
                let next = sweeper.grid().after_edit(old.last_attempt_time, *now);
                match result {
                    Ok(checked) => {
                        (status.consecutive_failures, status.next_schedule_time) = (0, Some(next));
                        let text = "a sweep could run; none is due yet";
                        let schema = conditions::schema(Some(checked), &old.conditions);
                        healthy(Reason::SchemaReady, text, schema, conditions::bounded_as_before(&old.conditions))
                    }
                    Err(failure) => attempt::fail(&mut status, sweeper, failure, *now, next),
                }
            }
            Done::Sweep(attempt) => attempt.apply_to(&mut status, sweeper, *now),
        };
        // Without a verdict, as when the operator was stopped, what was said still stands.
        if !updates.is_empty() {
            status.conditions = condition::apply(&old.conditions, &updates, sweeper.generation(), *now);
        }
        status
    }

    /// The counts of this alone, added to a status that knows of a later attempt. A repeated write adds nothing while the
    /// history still holds its entry: the answer to the first may have been lost.
    pub fn apply_totals(&self, old: &AuditLogSweeperStatus) -> AuditLogSweeperStatus {
        let mut status = old.clone();
        // Without rows there is nothing that only this attempt knows.
        if let Some(attempt) = self.sweep().filter(|attempt| attempt.report.timed_out > 0) {
            let entry = attempt.history_entry(self.time);
            if !status.history.contains(&entry) {
                attempt.add_totals(&mut status);
                let newer = status.history.iter().take_while(|newer| newer.last_time > entry.last_time).count();
                status.history.insert(newer, entry);
                status.history.truncate(self.sweeper.history_limit());
            }
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
