//! What an attempt at a sweep, or a failure before one, does to the status. Pure; a part of `status`.

use chrono::{DateTime, TimeDelta, Utc};

use super::conditions::{self, healthy};
use crate::api::condition::{self, ConditionType, ConditionUpdate};
use crate::api::status::{
    AuditLogSweeperStatus, HistoryEntry, LastError, LastSweep, Outcome, ResumeAfter, Totals, Trigger, Unsweepable,
    remember, whole_seconds,
};
use crate::api::{Class, Failure, Reason, Sweeper, counted, stale_rows_left};
use crate::controller::model::SweepAttempt;
use crate::schedule::SILENCE_RETRY;
use crate::sweep::Report;
use crate::sweep::execute::MAX_LISTED_KEYS;
use crate::sweep::report::Ended;

/// So many failures, and so long, until a missing Secret, table or grant counts as nobody's passing trouble.
const STALL_THRESHOLD: (i32, TimeDelta) = (5, TimeDelta::minutes(5));

impl SweepAttempt {
    /// Adds what it counted to the sums.
    pub(super) fn add_totals(&self, status: &mut AuditLogSweeperStatus) {
        let totals = status.totals.get_or_insert_with(Totals::default);
        totals.sweeps = totals.sweeps.saturating_add(1);
        totals.failures = totals.failures.saturating_add(i64::from(self.report.end.is_err()));
        totals.timed_out = totals.timed_out.saturating_add(self.report.timed_out);
    }

    /// Whether it is the last that the status knows of.
    pub(super) fn is_in(&self, sweeper: &Sweeper, status: &AuditLogSweeperStatus) -> bool {
        let ours = self.last_sweep(sweeper);
        let is_ours = |last: &LastSweep| {
            (last.schedule_time, last.start_time, last.duration_milliseconds, last.attempts, last.timed_out)
                == (ours.schedule_time, ours.start_time, ours.duration_milliseconds, ours.attempts, ours.timed_out)
        };
        let answered = self.slot.answers.is_none() || status.last_handled_request == self.slot.answers;
        answered && status.last_sweep.as_ref().is_some_and(is_ours)
    }

    /// Lays it over the status. No verdicts: what was said still stands.
    pub(super) fn apply_to(
        &self,
        status: &mut AuditLogSweeperStatus,
        sweeper: &Sweeper,
        end: DateTime<Utc>,
    ) -> Vec<ConditionUpdate> {
        let Self { slot, start, report, .. } = self;
        self.add_totals(status);
        let sweep = self.last_sweep(sweeper);
        // An attempt that did not get to the rows says nothing about them.
        if let Some(skew) = report.clock_skew {
            // A retry goes on behind what the attempts before it were refused.
            let before =
                status.unsweepable.take().filter(|before| slot.continues.is_some() && before.resume_after.is_some());
            status.unsweepable = unsweepable(report, before);
            status.clock_skew_milliseconds = Some(skew.num_milliseconds());
        }
        if slot.trigger != Trigger::Request {
            status.last_schedule_time = Some(sweep.schedule_time);
        }
        status.last_attempt_time = Some(whole_seconds(*start));
        status.last_handled_request = slot.answers.clone().or(status.last_handled_request.take());
        let updates = match &report.end {
            Err(failure) => self.failed(status, sweeper, failure, end, sweep.taken()),
            Ok(Ended::Stopped) => {
                // The next operator goes on with it at once, with what is left of its limit.
                let left = sweep.taken() < i64::from(sweeper.spec.limit);
                let next = if left { whole_seconds(end) } else { sweeper.grid().after(*start, end) };
                status.next_schedule_time = Some(next);
                vec![]
            }
            Ok(_) => self.went_well(status, sweeper, end, &sweep),
        };
        status.history = remember(&status.history, self.history_entry(end), sweeper.history_limit());
        status.last_sweep = Some(sweep);
        updates
    }

    pub(super) fn history_entry(&self, end: DateTime<Utc>) -> HistoryEntry {
        let report = &self.report;
        HistoryEntry {
            outcome: report.outcome(),
            reason: report.end.as_ref().err().map(|failure| failure.reason.as_str().to_owned()),
            trigger: self.slot.trigger,
            timed_out: report.timed_out,
            count: 1,
            first_time: whole_seconds(end),
            last_time: whole_seconds(end),
        }
    }

    /// The sweep that it is part of, with its counts added.
    fn last_sweep(&self, sweeper: &Sweeper) -> LastSweep {
        let report = &self.report;
        let before = self.slot.continues.as_ref();
        let sum = |count: fn(&LastSweep) -> i64, now: i64| before.map_or(0, count).saturating_add(now);
        LastSweep {
            schedule_time: whole_seconds(self.slot.schedule_time),
            start_time: whole_seconds(self.start),
            duration_milliseconds: report.duration_milliseconds(),
            trigger: self.slot.trigger,
            outcome: report.outcome(),
            attempts: before.map_or(0, |last| last.attempts).saturating_add(1),
            cutoff: report.cutoff,
            limit: sweeper.spec.limit,
            timed_out: sum(|last| last.timed_out, report.timed_out),
            skipped: sum(|last| last.skipped, report.skipped),
            suppressed: sum(|last| last.suppressed, report.suppressed),
            uncertain: sum(|last| last.uncertain, report.uncertain),
            batches: sum(|last| last.batches, report.batches),
        }
    }

    fn failed(
        &self,
        status: &mut AuditLogSweeperStatus,
        sweeper: &Sweeper,
        failure: &Failure,
        end: DateTime<Utc>,
        taken: i64,
    ) -> Vec<ConditionUpdate> {
        let slot = &self.slot;
        let scheduled = status.next_schedule_time;
        let retry_waits = status.consecutive_failures > 0;
        // A failed attempt does not put the slot after it off. With nothing left of its limit, the slot is done.
        let next = sweeper.grid().after(slot.schedule_time, end);
        let asked = scheduled.filter(|_| slot.trigger == Trigger::Request && slot.continues.is_none());
        let updates = fail(status, sweeper, failure, end, asked.unwrap_or(next));
        if let Some(scheduled) = asked.filter(|_| retry_waits) {
            // The retry that was due anyway still is, no sooner and no later.
            status.next_schedule_time = Some(scheduled);
        } else if taken >= i64::from(sweeper.spec.limit) {
            status.next_schedule_time = Some(next);
        }
        updates
    }

    fn went_well(
        &self,
        status: &mut AuditLogSweeperStatus,
        sweeper: &Sweeper,
        end: DateTime<Utc>,
        sweep: &LastSweep,
    ) -> Vec<ConditionUpdate> {
        let report = &self.report;
        status.consecutive_failures = 0;
        status.next_schedule_time = Some(sweeper.grid().after(self.start, end));
        status.backlog.clone_from(&report.backlog);
        status.last_successful_time = Some(whole_seconds(end));
        let reason = match sweep.outcome {
            Outcome::LimitReached => Reason::LimitReached,
            Outcome::DeadlineReached => Reason::DeadlineReached,
            Outcome::Observed => Reason::Observed,
            Outcome::Drained | Outcome::Failed | Outcome::Stopped => Reason::Swept,
        };
        let schema = conditions::schema(self.checked.as_ref(), &status.conditions);
        let refused = status.unsweepable.as_ref().map_or(0, |refused| refused.count);
        healthy(reason, &summary(report, sweep, refused), schema, conditions::bounded(&sweeper.spec, report, refused))
    }
}

/// A sweep that went well in one line.
fn summary(report: &Report, sweep: &LastSweep, refused: i64) -> String {
    let backlog = report.backlog.as_ref().filter(|backlog| backlog.remaining > 0);
    let left = backlog.map_or_else(String::new, |backlog| format!("; {}", stale_rows_left(&backlog.display)));
    let refused = match (refused, &report.refused_why) {
        (0, _) => String::new(),
        (rows, None) => {
            format!("; the database refused {}, see status.unsweepable and status.lastError", counted(rows, "row"))
        }
        (rows, Some(why)) => {
            format!("; the database refused {}, see status.unsweepable. The first: {why}", counted(rows, "row"))
        }
    };
    let ended = match sweep.outcome {
        Outcome::Observed => return format!("changed nothing, as spec.mode says{left}{refused}"),
        Outcome::LimitReached => "stopped at the limit",
        Outcome::DeadlineReached => "stopped at the deadline",
        Outcome::Drained | Outcome::Failed | Outcome::Stopped if backlog.is_some() => "looked at every stale row",
        Outcome::Drained | Outcome::Failed | Outcome::Stopped => "no stale row is left",
    };
    format!("completed {}, {ended}{left}{refused}", counted(sweep.timed_out, "row"))
}

/// What the database refused in the sweep, `before` being what it refused its earlier attempts.
fn unsweepable(report: &Report, before: Option<Unsweepable>) -> Option<Unsweepable> {
    let resume_after = report.resume_after.as_ref();
    let resume_after = resume_after.map(|at| ResumeAfter { time_started: at.time_started.clone(), id: at.id.clone() });
    let Unsweepable { count, mut ids, .. } = before.unwrap_or_default();
    let count = count.saturating_add(report.refused);
    ids.extend(report.refused_ids.iter().cloned());
    ids.truncate(MAX_LISTED_KEYS);
    (count > 0 || resume_after.is_some()).then_some(Unsweepable { count, ids, resume_after })
}

/// Lays a failure over the status: retried, at the latest at the `next` slot if the server answered.
pub(super) fn fail(
    status: &mut AuditLogSweeperStatus,
    sweeper: &Sweeper,
    failure: &Failure,
    now: DateTime<Utc>,
    next: DateTime<Utc>,
) -> Vec<ConditionUpdate> {
    status.consecutive_failures = status.consecutive_failures.saturating_add(1);
    status.last_failure_time = Some(whole_seconds(now));
    status.last_error = Some(LastError::new(failure.reason, &failure.message, now));
    let missing = failure.class == Class::Missing;
    let next = if failure.reason.is_silence() { next.max(now + SILENCE_RETRY) } else { next };
    let retry = sweeper.grid().retry(status.consecutive_failures, missing, now, next);
    status.next_schedule_time = Some(whole_seconds(retry).max(whole_seconds(now)));
    let failing_since = condition::find(&status.conditions, ConditionType::Ready)
        .filter(|ready| ready.status == "False")
        .map(|ready| ready.last_transition_time.0.as_second());
    let for_long = failing_since.is_some_and(|since| now.timestamp() - since >= STALL_THRESHOLD.1.num_seconds());
    let stalled = match failure.class {
        Class::Spec => true,
        Class::Missing => status.consecutive_failures >= STALL_THRESHOLD.0 && for_long,
        Class::Transient => false,
    };
    conditions::failed(failure, stalled, status.consecutive_failures, &status.conditions)
}
