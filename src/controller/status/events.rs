//! Which events follow from a change of the status: only when something changed, so that a healthy object makes none.
//! Pure; `publish` sends them.

use crate::api::condition::{self, ConditionType};
use crate::api::status::{AuditLogSweeperStatus, Outcome, Unsweepable};
use crate::api::{counted, cut, stale_rows_left, status::MAX_MESSAGE};
use crate::controller::model::{AttemptResult, Done};

/// An event, as `kubectl describe` shows it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Event {
    /// Warning, or else Normal.
    pub warning: bool,
    /// What happened, one of a closed set.
    pub reason: &'static str,
    /// What the operator was doing.
    pub action: &'static str,
    /// For people; at most 1 kB.
    pub note: String,
}

impl Event {
    /// Every reason.
    pub const REASONS: [&str; 9] = [
        "RowsTimedOut",
        "LimitReached",
        "SweepFailed",
        "Recovered",
        "Suspended",
        "Resumed",
        "SweepRequested",
        "UnsweepableRow",
        "ScheduleRepaired",
    ];

    fn new(warning: bool, reason: &'static str, action: &'static str, note: impl AsRef<str>) -> Self {
        Self { warning, reason, action, note: cut(note.as_ref(), MAX_MESSAGE).to_owned() }
    }
}

/// The events of a result that led from one status to another.
pub fn events(result: &AttemptResult, old: &AuditLogSweeperStatus, new: &AuditLogSweeperStatus) -> Vec<Event> {
    let mut events = vec![];
    if new.last_handled_request != old.last_handled_request {
        events.push(match result.done {
            Done::Suspended => {
                let note = "a sweep was requested; it does not run, since spec.suspend is true";
                Event::new(false, "SweepRequested", "Skip", note)
            }
            _ => Event::new(false, "SweepRequested", "Sweep", "a sweep was requested, and begun"),
        });
    }
    let suspended = |status: &AuditLogSweeperStatus| condition::is_true(&status.conditions, ConditionType::Suspended);
    match (suspended(old), suspended(new)) {
        (false, true) => {
            events.push(Event::new(false, "Suspended", "Suspend", "spec.suspend is true: no sweep begins"));
        }
        (true, false) => events.push(Event::new(false, "Resumed", "Resume", "spec.suspend is false: sweeps go on")),
        _ => {}
    }
    if let Done::Repaired = result.done {
        let note = "status.nextScheduleTime or lastAttemptTime was one that no sweep can have: a hand wrote it, or a \
                    clock has jumped. The schedule was computed anew";
        events.push(Event::new(true, "ScheduleRepaired", "Schedule", note));
    }
    if let Some(attempt) = result.sweep() {
        events.extend(of_sweep(attempt.report.timed_out, old, new));
    }
    if let Some(error) = new.last_error.as_ref().filter(|_| new.consecutive_failures > 0) {
        let before = old.last_error.as_ref().filter(|_| old.consecutive_failures > 0);
        if before.is_none_or(|before| before.reason != error.reason) {
            events.push(Event::new(true, "SweepFailed", "Sweep", format!("{}: {}", error.reason, error.message)));
        }
    }
    if old.consecutive_failures > 0 && new.consecutive_failures == 0 {
        let note = format!("went well after {}", counted(old.consecutive_failures, "failure"));
        events.push(Event::new(false, "Recovered", "Sweep", note));
    }
    events
}

/// What a sweep that completed so many rows tells of them.
fn of_sweep(timed_out: i64, old: &AuditLogSweeperStatus, new: &AuditLogSweeperStatus) -> Vec<Event> {
    let mut events = vec![];
    if timed_out > 0 {
        let note = format!(
            "completed {} as timed out: no request completed them, which may mean crashes upstream",
            counted(timed_out, "row")
        );
        events.push(Event::new(true, "RowsTimedOut", "Sweep", note));
    }
    let outcome = |status: &AuditLogSweeperStatus| status.last_sweep.as_ref().map(|sweep| sweep.outcome);
    if outcome(new) == Some(Outcome::LimitReached) && outcome(old) != Some(Outcome::LimitReached) {
        let left = new
            .backlog
            .as_ref()
            .map_or("it is not known how many stale rows are left".into(), |backlog| stale_rows_left(&backlog.display));
        let note = format!("the sweep stopped at spec.limit; {left}");
        events.push(Event::new(false, "LimitReached", "Sweep", note));
    }
    // Where the next sweep begins changes with every one, and is no news.
    let refused = |status: &AuditLogSweeperStatus| {
        let refused = status.unsweepable.clone().filter(|refused| refused.count > 0);
        refused.map(|refused| Unsweepable { resume_after: None, ..refused })
    };
    if let Some(Unsweepable { count, ids, .. }) = refused(new).filter(|now| refused(old).as_ref() != Some(now)) {
        let which = if ids.is_empty() { String::new() } else { format!(": {}", ids.join(", ")) };
        let note = format!("the database refuses to complete {}{which}; see status.unsweepable", counted(count, "row"));
        events.push(Event::new(true, "UnsweepableRow", "Sweep", note));
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_cut_between_characters() {
        let event = Event::new(true, "SweepFailed", "Sweep", "ä".repeat(2000) + "€");
        assert_eq!((event.note.len(), event.note.chars().count()), (1024, 512));
        let event = Event::new(true, "SweepFailed", "Sweep", format!("x{}", "€".repeat(2000)));
        assert_eq!(event.note.len(), 1 + 341 * 3);
    }
}
