//! Second step, pure: what is to be done with an object now, given its spec, its status and what is remembered.

use chrono::{DateTime, TimeDelta, Utc};

use super::outcome::Subject;
use crate::api::conditions::{self, ConditionType};
use crate::api::status::{AuditLogSweeperStatus, LastSweep, Outcome, Trigger, whole_seconds};

/// What is to be done now.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Say in the status that the spec was seen and is being tried.
    Acknowledge,
    /// Say in the status that the object is suspended.
    Suspend,
    /// The spec is new and no sweep is due: look whether one could run.
    Preflight,
    /// Sweep.
    Sweep(Slot),
    /// Nothing, until then or until the object changes.
    Wait(Option<DateTime<Utc>>),
}

/// The slot of the schedule that a sweep is for.
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    /// Its time.
    pub schedule_time: DateTime<Utc>,
    /// What caused it.
    pub trigger: Trigger,
    /// What is left of its limit.
    pub limit: i64,
    /// The failed attempt that this one continues.
    pub continues: Option<LastSweep>,
}

/// What is to be done at `now`. `not_before` is what the process remembers: no sweep before that.
pub fn decide(
    now: DateTime<Utc>,
    subject: &Subject,
    status: &AuditLogSweeperStatus,
    not_before: Option<DateTime<Utc>>,
) -> Decision {
    let observed = status.observed_generation == Some(subject.generation);
    if subject.spec.suspend {
        let said = conditions::find(&status.conditions, ConditionType::Suspended).is_some_and(|c| c.status == "True");
        return if said && observed { Decision::Wait(None) } else { Decision::Suspend };
    }
    let ends_a_failure = !observed && status.consecutive_failures > 0;
    let next = match status.next_schedule_time {
        Some(next) if plausible(next, now, subject) => Some(next),
        // The period was shortened, or a hand set the time, or a clock has jumped since.
        Some(_) if observed => status.last_attempt_time.map(|last| subject.grid().after(last.min(now), last.min(now))),
        Some(_) if ends_a_failure => None,
        Some(_) => return Decision::Preflight,
        None => None,
    };
    let due = next.max(not_before.filter(|time| plausible(*time, now, subject))).unwrap_or(now);
    if now < due && !ends_a_failure {
        return if observed { Decision::Wait(Some(due)) } else { Decision::Preflight };
    }
    if !observed && status.last_attempt_time.is_none() {
        return Decision::Acknowledge;
    }
    sweep(now, subject, status, due)
}

/// Whether a time can be one of the object's next slots: none is further away than one period and a half.
fn plausible(time: DateTime<Utc>, now: DateTime<Utc>, subject: &Subject) -> bool {
    time - now <= TimeDelta::milliseconds(subject.spec.period.as_millis()) * 3 / 2
}

fn sweep(now: DateTime<Utc>, subject: &Subject, status: &AuditLogSweeperStatus, due: DateTime<Utc>) -> Decision {
    let grid = subject.grid();
    let limit = i64::from(subject.spec.limit);
    let continues = status
        .last_sweep
        .as_ref()
        .filter(|last| last.outcome == Outcome::Failed && last.schedule_time <= now)
        .filter(|last| now < grid.after(last.schedule_time, last.schedule_time));
    if let Some(last) = continues {
        let left = limit - last.timed_out;
        if left <= 0 {
            return Decision::Wait(Some(grid.after(last.schedule_time, now)));
        }
        return Decision::Sweep(Slot {
            schedule_time: last.schedule_time,
            trigger: last.trigger,
            limit: left,
            continues: Some(last.clone()),
        });
    }
    // However many slots went by: one sweep, for the latest of them.
    let schedule_time = grid.latest(now).max(due).min(now);
    let trigger = if status.last_attempt_time.is_none() { Trigger::Create } else { Trigger::Schedule };
    Decision::Sweep(Slot { schedule_time: whole_seconds(schedule_time), trigger, limit, continues: None })
}
