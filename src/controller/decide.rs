//! Second step, pure: decides what is due from the spec, the status and the cached `not_before`.

use chrono::{DateTime, TimeDelta, Utc};

use super::model::DueSweep;
use crate::api::condition::{self, ConditionType};
use crate::api::status::{LastSweep, Outcome, Trigger, whole_seconds};
use crate::api::{Reason, Sweeper};
use crate::schedule::SILENCE_RETRY;

/// What is to be done now.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Say in the status that the spec was seen and is being tried.
    Acknowledge,
    /// Say in the status that the object is suspended.
    Suspend,
    /// The spec is new and no sweep is due: look whether one could run.
    Preflight,
    /// A time in the status is one that no sweep can have: compute it anew.
    Repair,
    /// Sweep.
    Sweep(DueSweep),
    /// Nothing, until then or until the object changes.
    Wait(Option<DateTime<Utc>>),
}

/// An attempt this much later than now was not made: a hand wrote it, or the clock has jumped. Clocks of two replicas
/// differ by less.
const CLOCK_TOLERANCE: TimeDelta = TimeDelta::minutes(1);

/// What is to be done at `now`. `not_before` is what the process remembers: no sweep before that.
pub fn decide(now: DateTime<Utc>, sweeper: &Sweeper, not_before: Option<DateTime<Utc>>) -> Decision {
    if sweeper.is_deleted() {
        return Decision::Wait(None);
    }
    let status = &sweeper.status;
    let observed = status.observed_generation == Some(sweeper.generation());
    let request = sweeper.request().filter(|request| status.last_handled_request.as_deref() != Some(request));
    if sweeper.spec.suspend {
        let said = condition::is_true(&status.conditions, ConditionType::Suspended);
        return if said && observed && request.is_none() { Decision::Wait(None) } else { Decision::Suspend };
    }
    let next = status.next_schedule_time.filter(|next| is_possible_slot(*next, now, sweeper));
    if observed
        && (next != status.next_schedule_time
            || status.last_attempt_time.is_some_and(|last| last - now > CLOCK_TOLERANCE))
    {
        return Decision::Repair;
    }
    let last_attempt = status.last_attempt_time.filter(|last| *last <= now);
    let edited_after_failure = !observed && status.consecutive_failures > 0;
    if !observed && !edited_after_failure && next != status.next_schedule_time {
        // The period was shortened.
        return Decision::Preflight;
    }
    // Without a next one, as when resumed, the slot after the last attempt is the one that may be overdue.
    let next =
        next.or_else(|| last_attempt.filter(|_| !edited_after_failure).map(|last| sweeper.grid().after(last, last)));
    let due = next.max(not_before.filter(|time| is_possible_slot(*time, now, sweeper))).unwrap_or(now);
    let is_due = due <= now || edited_after_failure;
    if !observed && !is_due {
        return Decision::Preflight;
    }
    if !observed && status.last_attempt_time.is_none() {
        return Decision::Acknowledge;
    }
    let decision = if is_due { due_now(now, sweeper, due) } else { Decision::Wait(Some(due)) };
    match (decision, request) {
        (Decision::Sweep(slot), answers) => Decision::Sweep(DueSweep { answers: answers.map(str::to_owned), ..slot }),
        (_, Some(request)) => Decision::Sweep(DueSweep {
            schedule_time: whole_seconds(now),
            trigger: Trigger::Request,
            limit: sweeper.spec.limit.into(),
            continues: None,
            answers: Some(request.to_owned()),
        }),
        (decision, None) => decision,
    }
}

/// What is due when something is.
fn due_now(now: DateTime<Utc>, sweeper: &Sweeper, due: DateTime<Utc>) -> Decision {
    let status = &sweeper.status;
    // A failed preflight is followed by another one; only the slot itself brings a sweep.
    let observed = status.observed_generation == Some(sweeper.generation());
    let last_sweep_finished = status.last_sweep.as_ref().is_some_and(|last| !is_unfinished(last));
    let before_the_slot = |last: DateTime<Utc>| now < sweeper.grid().after(last, last);
    if observed
        && status.consecutive_failures > 0
        && last_sweep_finished
        && status.last_attempt_time.filter(|last| *last <= now).is_some_and(before_the_slot)
    {
        return Decision::Preflight;
    }
    sweep(now, sweeper, due)
}

/// Whether a time can be one of the object's next slots: none is further away than one period and a half, but for the
/// retry of a server that did not answer.
fn is_possible_slot(time: DateTime<Utc>, now: DateTime<Utc>, sweeper: &Sweeper) -> bool {
    let slot = TimeDelta::milliseconds(sweeper.spec.period.as_millis()) * 3 / 2;
    let status = &sweeper.status;
    let error = status.last_error.as_ref().filter(|_| status.consecutive_failures > 0);
    let silent = error.is_some_and(|error| Reason::parse(&error.reason).is_some_and(Reason::is_silence));
    time - now <= if silent { slot.max(SILENCE_RETRY) } else { slot }
}

/// Whether a later attempt continues this one: it failed, or was stopped with the operator.
fn is_unfinished(last: &LastSweep) -> bool {
    matches!(last.outcome, Outcome::Failed | Outcome::Stopped)
}

fn sweep(now: DateTime<Utc>, sweeper: &Sweeper, due: DateTime<Utc>) -> Decision {
    let status = &sweeper.status;
    let grid = sweeper.grid();
    let limit = i64::from(sweeper.spec.limit);
    let continues = status
        .last_sweep
        .as_ref()
        .filter(|last| is_unfinished(last) && last.schedule_time <= now)
        .filter(|last| now < grid.after(last.schedule_time, last.schedule_time));
    if let Some(last) = continues {
        // The status may have been edited.
        let left = limit - last.taken().min(limit);
        if left == 0 && status.observed_generation != Some(sweeper.generation()) {
            return Decision::Preflight;
        }
        if left == 0 {
            return Decision::Wait(Some(grid.after(last.schedule_time, now)));
        }
        return Decision::Sweep(DueSweep {
            schedule_time: last.schedule_time,
            trigger: last.trigger,
            limit: left,
            continues: Some(last.clone()),
            answers: None,
        });
    }
    // However many slots went by: one sweep, for the latest of them.
    let schedule_time = grid.latest(now).max(due).min(now);
    let trigger = if status.last_attempt_time.is_none() { Trigger::Create } else { Trigger::Schedule };
    Decision::Sweep(DueSweep {
        schedule_time: whole_seconds(schedule_time),
        trigger,
        limit,
        continues: None,
        answers: None,
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use serde_json::json;

    use super::*;
    use crate::api::status::{AuditLogSweeperStatus, LastError};
    use crate::api::{Class, Failure};
    use crate::controller::model::{AttemptResult, Done, SweepAttempt};
    use crate::preflight::PreflightReport;
    use crate::sweep::Report;
    use crate::sweep::report::Ended;

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + second, 0).unwrap()
    }

    fn sweeper(generation: i64, spec: serde_json::Value) -> Sweeper {
        let mut sweeper = Sweeper::with(spec);
        sweeper.metadata.generation = Some(generation);
        sweeper
    }

    fn decide(
        now: DateTime<Utc>,
        sweeper: &Sweeper,
        status: &AuditLogSweeperStatus,
        not_before: Option<DateTime<Utc>>,
    ) -> Decision {
        super::decide(now, &sweeper.with_status(status), not_before)
    }

    fn done(timed_out: i64) -> Report {
        Report { timed_out, ..Report::new(Ok(Ended::Drained)) }
    }

    fn failure() -> Failure {
        Failure { reason: Reason::DatabaseUnreachable, message: "gone".into(), class: Class::Transient }
    }

    fn failed() -> Report {
        Report::new(Err(failure()))
    }

    /// What the controller would do with this decision, taking `seconds`; the status that follows.
    fn act(
        decision: Decision,
        sweeper: &Sweeper,
        status: &AuditLogSweeperStatus,
        now: DateTime<Utc>,
        seconds: i64,
        report: Report,
    ) -> AuditLogSweeperStatus {
        let done = match decision {
            Decision::Acknowledge => Done::Acknowledged,
            Decision::Suspend => Done::Suspended,
            Decision::Repair => Done::Repaired,
            Decision::Preflight => Done::Preflight(Ok(PreflightReport::default())),
            Decision::Sweep(slot) => Done::Sweep(Box::new(SweepAttempt { slot, start: now, checked: None, report })),
            Decision::Wait(_) => return status.clone(),
        };
        let time = now + TimeDelta::seconds(seconds);
        AttemptResult { sweeper: sweeper.clone(), done, time, led: true }.apply(status)
    }

    fn swept_once(sweeper: &Sweeper) -> AuditLogSweeperStatus {
        let new = AuditLogSweeperStatus { observed_generation: Some(-1), ..Default::default() };
        assert_eq!(decide(at(0), sweeper, &new, None), Decision::Acknowledge);
        let seen = act(Decision::Acknowledge, sweeper, &new, at(0), 0, done(0));
        let decision = decide(at(0), sweeper, &seen, None);
        assert!(matches!(&decision, Decision::Sweep(slot) if slot.trigger == Trigger::Create), "{decision:?}");
        act(decision, sweeper, &seen, at(0), 1, done(0))
    }

    #[test]
    fn nothing_begins_for_an_object_that_is_being_deleted() {
        let deleted = |spec| {
            let mut sweeper = sweeper(1, spec).requested("now");
            sweeper.metadata.deletion_timestamp = Some(Time(Default::default()));
            sweeper
        };
        let due = AuditLogSweeperStatus {
            observed_generation: Some(1),
            next_schedule_time: Some(at(0)),
            ..AuditLogSweeperStatus::default()
        };
        for status in [AuditLogSweeperStatus::default(), due] {
            assert_eq!(decide(at(5), &deleted(json!({})), &status, None), Decision::Wait(None));
            assert_eq!(decide(at(5), &deleted(json!({ "suspend": true })), &status, None), Decision::Wait(None));
        }
    }

    #[test]
    fn a_new_object_is_acknowledged_then_swept_then_waits_for_its_slot() {
        let sweeper = sweeper(1, json!({}));
        let status = swept_once(&sweeper);
        let next = status.next_schedule_time.unwrap();
        assert_eq!(decide(at(2), &sweeper, &status, None), Decision::Wait(Some(next)));
        let Decision::Sweep(slot) = decide(next, &sweeper, &status, None) else { panic!("not due at its slot") };
        assert_eq!((slot.schedule_time, slot.trigger, slot.limit), (next, Trigger::Schedule, 1000));
    }

    #[test]
    fn a_slot_far_away_is_that_of_a_silent_server_only_while_it_fails() {
        let sweeper = sweeper(1, json!({ "period": "5s" }));
        let mut status = swept_once(&sweeper);
        status.last_error = Some(LastError { reason: "ConnectTimeout".into(), message: String::new(), time: at(1) });
        status.next_schedule_time = Some(at(200));
        assert_eq!(decide(at(10), &sweeper, &status, None), Decision::Repair);
        status.consecutive_failures = 1;
        assert_eq!(decide(at(10), &sweeper, &status, None), Decision::Wait(Some(at(200))));
    }

    #[test]
    fn an_attempt_in_the_future_is_repaired_only_beyond_the_tolerance_of_clocks() {
        let sweeper = sweeper(1, json!({}));
        let mut status = swept_once(&sweeper);
        for (ahead, repaired) in [(60, false), (61, true)] {
            status.last_attempt_time = Some(at(10 + ahead));
            assert_eq!(decide(at(10), &sweeper, &status, None) == Decision::Repair, repaired, "{ahead}");
        }
    }

    #[test]
    fn a_shortened_period_brings_a_preflight_and_after_a_failure_a_sweep() {
        let mut status = swept_once(&sweeper(1, json!({ "period": "24h" })));
        let edited = sweeper(2, json!({ "period": "1m" }));
        // The slot of the new grid after the last attempt is long over.
        let now = at(3600);
        assert!(status.next_schedule_time.unwrap() > now + TimeDelta::seconds(90));
        assert_eq!(decide(now, &edited, &status, None), Decision::Preflight);
        status.consecutive_failures = 1;
        assert!(matches!(decide(now, &edited, &status, None), Decision::Sweep(_)));
    }

    #[test]
    fn a_slot_that_was_put_forward_is_swept_though_the_last_attempt_was_just_before() {
        let sweeper = sweeper(1, json!({}));
        let mut status = swept_once(&sweeper);
        status.next_schedule_time = Some(at(2));
        let decision = decide(at(2), &sweeper, &status, None);
        assert!(matches!(&decision, Decision::Sweep(slot) if slot.trigger == Trigger::Schedule), "{decision:?}");
        // A failed preflight is followed by another one.
        status.consecutive_failures = 1;
        assert_eq!(decide(at(2), &sweeper, &status, None), Decision::Preflight);
    }

    #[test]
    fn however_long_it_was_down_it_sweeps_once_for_the_latest_slot() {
        let sweeper = sweeper(1, json!({}));
        let status = swept_once(&sweeper);
        let late = at(100 * 600);
        let decision = decide(late, &sweeper, &status, None);
        let Decision::Sweep(slot) = &decision else { panic!("{decision:?}") };
        assert!(late - slot.schedule_time < TimeDelta::seconds(600));
        let status = act(decision, &sweeper, &status, late, 1, done(0));
        assert!(matches!(decide(late + TimeDelta::seconds(2), &sweeper, &status, None), Decision::Wait(Some(_))));
    }

    #[test]
    fn what_is_remembered_holds_an_old_status_back() {
        let sweeper = sweeper(1, json!({}));
        let status = swept_once(&sweeper);
        let next = status.next_schedule_time.unwrap();
        let remembered = sweeper.grid().next(next);
        assert_eq!(decide(next, &sweeper, &status, Some(remembered)), Decision::Wait(Some(remembered)));
    }

    #[test]
    fn a_retry_continues_its_slot_with_what_is_left_of_the_limit() {
        let sweeper = sweeper(1, json!({ "limit": 10 }));
        let status = swept_once(&sweeper);
        let slot_time = status.next_schedule_time.unwrap();
        let report = || Report { timed_out: 3, uncertain: 1, batches: 1, ..failed() };
        let status = act(decide(slot_time, &sweeper, &status, None), &sweeper, &status, slot_time, 1, report());
        let retry = status.next_schedule_time.unwrap();
        assert!(retry - slot_time < TimeDelta::seconds(15), "{retry}");
        let Decision::Sweep(slot) = decide(retry, &sweeper, &status, None) else { panic!("no retry") };
        assert_eq!((slot.schedule_time, slot.limit), (slot_time, 6));
        let status = act(Decision::Sweep(slot), &sweeper, &status, retry, 1, done(6));
        let last = status.last_sweep.unwrap();
        assert_eq!((last.timed_out, last.uncertain, last.attempts, last.batches), (9, 1, 2, 1));
        assert_eq!(status.totals.unwrap().timed_out, 9);
    }

    #[test]
    fn a_server_that_does_not_answer_is_asked_more_and_more_rarely_whatever_the_period() {
        let sweeper = sweeper(1, json!({ "period": "5s" }));
        let waits = |reason| {
            let (mut status, mut now) = (swept_once(&sweeper), at(60));
            let waits = (0..8).map(|_| {
                let decision = decide(now, &sweeper, &status, None);
                assert!(matches!(decision, Decision::Sweep(_)), "{decision:?}");
                let report = Report::new(Err(Failure::new(reason, "gone")));
                status = act(decision, &sweeper, &status, now, 0, report);
                let Decision::Wait(Some(next)) = decide(now, &sweeper, &status, None) else { panic!("{status:?}") };
                let wait = (next - now).num_seconds();
                now = next;
                wait
            });
            waits.collect::<Vec<_>>()
        };
        for (wait, about) in waits(Reason::LoginTimeout).iter().zip([10, 20, 40, 80, 160, 300, 300, 300]) {
            assert!((about * 9 / 10 - 1..=about * 11 / 10).contains(wait), "{wait} for {about}");
        }
        assert!(waits(Reason::DatabaseUnreachable).iter().all(|wait| *wait <= 5), "who refuses has answered");
    }

    #[test]
    fn a_failed_sweep_that_used_its_limit_up_is_done_with_its_slot() {
        let sweeper = sweeper(1, json!({ "limit": 4 }));
        let status = swept_once(&sweeper);
        let slot_time = status.next_schedule_time.unwrap();
        let report = Report { timed_out: 4, ..failed() };
        let status = act(decide(slot_time, &sweeper, &status, None), &sweeper, &status, slot_time, 1, report);
        assert_eq!(status.next_schedule_time, Some(sweeper.grid().next(slot_time)));
    }

    #[test]
    fn edits_are_looked_at_and_only_an_overdue_resume_or_the_end_of_a_failure_sweeps() {
        let first = sweeper(1, json!({}));
        let status = swept_once(&first);
        let edited = sweeper(2, json!({ "limit": 5 }));
        assert_eq!(decide(at(5), &edited, &status, None), Decision::Preflight);
        let shorter = sweeper(2, json!({ "period": "5s" }));
        assert_eq!(decide(at(1), &shorter, &status, None), Decision::Preflight);
        let status_after = act(Decision::Preflight, &shorter, &status, at(1), 0, done(0));
        let next = status_after.next_schedule_time.unwrap();
        assert!(next > at(2) && next <= at(8), "{next}");

        let suspended = sweeper(2, json!({ "suspend": true }));
        assert_eq!(decide(at(5), &suspended, &status, None), Decision::Suspend);
        let paused = act(Decision::Suspend, &suspended, &status, at(5), 0, done(0));
        assert_eq!(decide(at(5000), &suspended, &paused, None), Decision::Wait(None));
        let resumed = sweeper(3, json!({}));
        assert_eq!(decide(at(10), &resumed, &paused, None), Decision::Preflight);
        assert!(matches!(decide(at(5000), &resumed, &paused, None), Decision::Sweep(_)));

        let slot = status.next_schedule_time.unwrap();
        let broken = act(decide(slot, &first, &status, None), &first, &status, slot, 1, failed());
        assert!(matches!(decide(slot + TimeDelta::seconds(2), &edited, &broken, None), Decision::Sweep(_)));
    }

    #[test]
    fn a_failed_preflight_is_followed_by_another_and_not_by_a_second_sweep() {
        let first = sweeper(1, json!({ "period": "24h" }));
        let status = swept_once(&first);
        let edited = sweeper(2, json!({ "period": "24h", "table": "nowhere" }));
        assert_eq!(decide(at(60), &edited, &status, None), Decision::Preflight);
        let broken = Done::Preflight(Err(failure()));
        let status = AttemptResult { sweeper: edited.clone(), done: broken, time: at(60), led: true }.apply(&status);
        let retry = status.next_schedule_time.unwrap();
        assert!(retry < at(75), "{retry}");
        // What the process remembers is what it last wrote.
        assert_eq!(decide(retry, &edited, &status, status.next_schedule_time), Decision::Preflight);
        let status = act(Decision::Preflight, &edited, &status, retry, 0, done(0));
        assert_eq!((status.consecutive_failures, status.totals.as_ref().unwrap().sweeps), (0, 1));
        assert!(status.next_schedule_time.unwrap() > at(12 * 3600));
    }

    #[test]
    fn a_stopped_sweep_goes_on_at_once_with_what_is_left() {
        let sweeper = sweeper(1, json!({ "limit": 10 }));
        let status = swept_once(&sweeper);
        let slot = status.next_schedule_time.unwrap();
        let stopped = Report { timed_out: 3, ..Report::new(Ok(Ended::Stopped)) };
        let before = status.conditions.clone();
        let status = act(decide(slot, &sweeper, &status, None), &sweeper, &status, slot, 1, stopped);
        assert_eq!(status.conditions, before);
        let later = slot + TimeDelta::seconds(5);
        let Decision::Sweep(next) = decide(later, &sweeper, &status, None) else { panic!("it should go on") };
        assert_eq!((next.schedule_time, next.limit), (slot, 7));
    }

    #[test]
    fn a_status_that_was_edited_cannot_raise_the_limit_or_panic() {
        let sweeper = sweeper(1, json!({ "limit": 50 }));
        let mut status = swept_once(&sweeper);
        for timed_out in [-1_000_000, i64::MIN, i64::MAX] {
            let last = status.last_sweep.as_mut().unwrap();
            (last.outcome, last.timed_out) = (Outcome::Failed, timed_out);
            status.next_schedule_time = Some(at(2));
            match decide(at(3), &sweeper, &status, None) {
                Decision::Sweep(slot) => assert_eq!(slot.limit, 50),
                other => assert!(matches!(other, Decision::Wait(_)), "{other:?}"),
            }
        }
    }

    #[test]
    fn a_time_that_no_slot_can_have_does_not_stop_the_schedule() {
        let sweeper = sweeper(1, json!({}));
        let good = swept_once(&sweeper);
        for (next, last) in
            [(at(10_000_000), Some(at(0))), (at(10_000_000), Some(at(20_000_000))), (at(10_000_000), None)]
        {
            let mut status = good.clone();
            (status.next_schedule_time, status.last_attempt_time) = (Some(next), last);
            assert_eq!(decide(at(0), &sweeper, &status, None), Decision::Repair, "{next} {last:?}");
            status = act(Decision::Repair, &sweeper, &status, at(0), 0, done(0));
            let swept = (0..1200).any(|s| match decide(at(s), &sweeper, &status, None) {
                Decision::Sweep(_) => true,
                Decision::Wait(_) => false,
                other => panic!("{other:?}"),
            });
            assert!(swept, "never within two periods of {next} {last:?}");
        }
    }

    #[test]
    fn no_course_of_events_sweeps_too_often_or_stops_sweeping() {
        for seed in 0..100 {
            let mut random = fastrand::Rng::with_seed(seed);
            let period = [5, 60, 600, 3600][random.usize(0..4)];
            let sweeper = sweeper(1, json!({ "period": format!("{period}s") }));
            let mut status = swept_once(&sweeper);
            let (mut now, mut last, mut excused) = (at(1), at(0), TimeDelta::zero());
            let (mut remembered, mut crashed) = (None, false);
            for _ in 0..200 {
                match decide(now, &sweeper, &status, remembered) {
                    Decision::Wait(Some(next)) => {
                        assert!(next > now, "seed {seed}: a wait until the past is a busy loop");
                        // Woken by something else now and then, or down for a while.
                        let down = TimeDelta::seconds(random.i64(0..3 * period));
                        (now, excused) = match random.u8(0..10) {
                            0 => (now + (next - now) / 2, excused),
                            1 => (next + down, excused + down),
                            _ => (next, excused),
                        };
                    }
                    Decision::Sweep(slot) => {
                        let gap = now - last;
                        if slot.continues.is_none() && status.consecutive_failures == 0 && !crashed {
                            assert!(
                                gap * 2 > TimeDelta::seconds(period),
                                "seed {seed}: {gap} after the last, period {period} s"
                            );
                        }
                        assert!(gap - excused <= TimeDelta::seconds(2 * period), "seed {seed}: none for {gap}");
                        let seconds = random.i64(0..period * 2);
                        (last, excused) = (now, TimeDelta::seconds(seconds));
                        let result = if random.u8(0..4) == 0 { failed() } else { done(1) };
                        let new = act(Decision::Sweep(slot), &sweeper, &status, now, seconds, result);
                        remembered = new.next_schedule_time;
                        now += TimeDelta::seconds(seconds);
                        match random.u8(0..8) {
                            // Killed before the status was written: that sweep runs once more.
                            0 => (remembered, crashed) = (None, true),
                            1 => (status, remembered, crashed) = (new, None, false),
                            _ => (status, crashed) = (new, false),
                        }
                    }
                    other => panic!("seed {seed}: {other:?}"),
                }
            }
        }
    }
}
