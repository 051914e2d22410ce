//! Properties of the schedule over thousands of random courses of events: what `decide` and `status` do together.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;

use super::decide::{Decision, decide};
use super::model::{AttemptResult, Done, DueSweep, SweepAttempt};
use super::status::events::events;
use crate::api::status::{AuditLogSweeperStatus, Trigger};
use crate::api::{Class, Failure, Reason, Sweeper};
use crate::preflight::PreflightReport;
use crate::sweep::Report;
use crate::sweep::report::Ended;

fn sweeper(uid: u64, period: i64) -> Sweeper {
    let mut sweeper = Sweeper::with(json!({ "period": format!("{period}s"), "limit": 10 }));
    sweeper.metadata.uid = Some(format!("0f8fad5b-d9cb-469f-a165-{uid:012x}"));
    sweeper
}

fn failed(class: Class) -> Failure {
    let reason = if class == Class::Missing { Reason::SecretNotFound } else { Reason::DatabaseUnreachable };
    Failure { reason, message: "gone".into(), class }
}

/// An object, an operator and a clock.
struct World {
    random: fastrand::Rng,
    now: DateTime<Utc>,
    /// With its status.
    sweeper: Sweeper,
    remembered: Option<DateTime<Utc>>,
    /// How many attempts in a hundred fail.
    failing: u8,
    /// How they fail; None: one way or another.
    class: Option<Class>,
    written: u32,
    told: Vec<&'static str>,
}

/// A sweep that began.
#[derive(Clone, Debug)]
struct Begun {
    at: DateTime<Utc>,
    trigger: Trigger,
    schedule_time: DateTime<Utc>,
    retry: bool,
    failed: bool,
}

impl World {
    fn new(seed: u64, period: i64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let now = DateTime::from_timestamp(1_800_000_000 + random.i64(0..1_000_000), 0).unwrap();
        let status = AuditLogSweeperStatus { observed_generation: Some(-1), ..Default::default() };
        let sweeper = sweeper(random.u64(..1 << 40), period).with_status(&status);
        Self { random, now, sweeper, remembered: None, failing: 0, class: None, written: 0, told: vec![] }
    }

    fn decide(&self) -> Decision {
        decide(self.now, &self.sweeper, self.remembered)
    }

    /// Does what is due until nothing is; the sweeps that began. Each takes up to `longest` seconds.
    fn settle(&mut self, longest: i64) -> Vec<Begun> {
        let mut begun = vec![];
        for _ in 0..20 {
            let now = self.now;
            let done = match self.decide() {
                Decision::Wait(next) => {
                    assert!(next.is_none_or(|next| next > now), "a wait until the past is a busy loop");
                    return begun;
                }
                Decision::Acknowledge => Done::Acknowledged,
                Decision::Suspend => Done::Suspended,
                Decision::Repair => Done::Repaired,
                Decision::Preflight => {
                    let fails = self.random.u8(0..100) < self.failing;
                    Done::Preflight(if fails { Err(failed(Class::Transient)) } else { Ok(PreflightReport::default()) })
                }
                Decision::Sweep(slot) => {
                    let end = now + TimeDelta::seconds(self.random.i64(0..=longest));
                    let fails = self.random.u8(0..100) < self.failing;
                    let class = if self.random.bool() { Class::Transient } else { Class::Missing };
                    let class = self.class.unwrap_or(class);
                    let report = Report::new(if fails { Err(failed(class)) } else { Ok(Ended::Drained) });
                    let (trigger, schedule_time) = (slot.trigger, slot.schedule_time);
                    begun.push(Begun {
                        at: now,
                        trigger,
                        schedule_time,
                        retry: slot.continues.is_some(),
                        failed: fails,
                    });
                    self.now = end;
                    Done::Sweep(Box::new(SweepAttempt { slot, start: now, checked: None, report }))
                }
            };
            let result = AttemptResult { sweeper: self.sweeper.clone(), done, time: self.now, led: true };
            let new = result.apply(&self.sweeper.status);
            self.told.extend(events(&result, &self.sweeper.status, &new).iter().map(|event| event.reason));
            self.written += 1;
            self.remembered = new.next_schedule_time;
            self.sweeper.status = new;
        }
        panic!("never settles: {:?}", self.decide());
    }

    /// An edit.
    fn suspend(&mut self, suspend: bool) {
        self.sweeper = self.sweeper.edited(|spec| spec.suspend = suspend);
    }

    fn request(&mut self, request: &str) {
        self.sweeper = self.sweeper.clone().requested(request);
    }

    /// Goes on to the time at which something is due.
    fn advance(&mut self) {
        if let Decision::Wait(Some(next)) = self.decide() {
            self.now = next;
        }
    }
}

const PERIODS: [i64; 5] = [5, 7, 60, 600, 86_400];

#[test]
fn ten_thousand_periods_do_not_drift_and_quiet_ones_write_once_and_tell_nothing() {
    for period in PERIODS {
        let mut world = World::new(1, period);
        world.settle(0);
        let written = world.written;
        let mut slots = vec![];
        for _ in 0..10_000 {
            world.advance();
            let begun = world.settle(period / 5);
            assert_eq!(begun.len(), 1);
            assert_eq!(begun[0].trigger, Trigger::Schedule);
            slots.push(begun[0].schedule_time.timestamp());
        }
        assert!(slots.windows(2).all(|pair| pair[1] - pair[0] == period), "period {period} s");
        assert_eq!(world.written - written, 10_000, "one write for each sweep");
        assert_eq!(world.told, [""; 0], "nothing happened");
        assert_eq!((world.sweeper.status.history.len(), world.sweeper.status.history[0].count), (2, 10_000));
    }
}

#[test]
fn sweeps_are_never_too_near_and_never_too_far_apart_in_any_course_of_events() {
    for seed in 0..3000 {
        let period = PERIODS[usize::try_from(seed % 5).unwrap()];
        let mut world = World::new(seed, period);
        world.failing = [0, 20, 60][usize::try_from(seed % 3).unwrap()];
        let (mut last, mut excuse) = (None::<Begun>, false);
        // Without it being able to run: suspended, or no operator.
        let mut idle_since = world.now;
        for step in 0..60 {
            let before = (world.sweeper.status.clone(), world.remembered, world.sweeper.status.consecutive_failures);
            for begun in world.settle(period / 3) {
                if let Some(last) = &last {
                    let gap = begun.at - last.at;
                    let near = gap * 2 < TimeDelta::seconds(period);
                    let may = excuse || begun.retry || begun.trigger == Trigger::Request || last.failed || before.2 > 0;
                    assert!(!near || may, "seed {seed}, step {step}: {begun:?} {gap} after {last:?}");
                }
                let idle = begun.at - idle_since;
                assert!(idle <= TimeDelta::seconds(period * 2), "seed {seed}, step {step}: none for {idle}");
                idle_since = begun.at;
                (last, excuse) = (Some(begun), false);
            }
            match world.random.u8(0..20) {
                // Killed before the status was written: what it did runs once more.
                0 => {
                    (world.sweeper.status, world.remembered, excuse) = (before.0, None, true);
                    idle_since = world.now;
                }
                // A new process.
                1 => world.remembered = None,
                // An edit, of the period too.
                2 => {
                    let limit = world.random.i32(1..100);
                    world.sweeper = world.sweeper.edited(|spec| spec.limit = limit);
                }
                // Down for a while.
                3 => {
                    let down = TimeDelta::seconds(world.random.i64(0..period * 5));
                    (world.now, world.remembered) = (world.now + down, None);
                    idle_since = world.now;
                }
                // Suspended for a while.
                4 => {
                    world.suspend(true);
                    assert!(world.settle(0).is_empty());
                    world.now += TimeDelta::seconds(world.random.i64(0..period * 3));
                    world.suspend(false);
                    idle_since = world.now;
                }
                5 => {
                    let request = world.random.u64(..).to_string();
                    world.request(&request);
                }
                // A hand, or a clock.
                6 => world.sweeper.status.next_schedule_time = Some(world.now + TimeDelta::seconds(period * 10)),
                7 => {
                    let jump = TimeDelta::seconds(world.random.i64(60..period * 3 + 120));
                    (world.now, excuse) = (world.now - jump, true);
                    idle_since = world.now;
                }
                // Woken for no reason.
                8 | 9 => world.now += TimeDelta::seconds(world.random.i64(0..=period / 10)),
                _ => world.advance(),
            }
        }
    }
}

#[test]
fn a_restart_at_any_moment_changes_nothing() {
    for seed in 0..500 {
        let period = PERIODS[usize::try_from(seed % 5).unwrap()];
        let mut world = World::new(seed, period);
        world.failing = 30;
        for _ in 0..40 {
            world.settle(period / 3);
            for second in [0, 1, period / 3, period / 2, period] {
                let now = world.now + TimeDelta::seconds(second);
                let old = decide(now, &world.sweeper, world.remembered);
                assert_eq!(decide(now, &world.sweeper, None), old, "seed {seed}");
            }
            world.advance();
        }
    }
}

#[test]
fn every_request_is_one_sweep_and_moves_nothing_when_it_fails() {
    for seed in 0..500 {
        let mut world = World::new(seed, 600);
        // On creation the first sweep answers it.
        world.request("first");
        let begun = world.settle(5);
        assert_eq!((begun.len(), begun[0].trigger), (1, Trigger::Create));
        assert_eq!(world.sweeper.status.last_handled_request.as_deref(), Some("first"));
        for request in 0..10 {
            world.now += TimeDelta::seconds(world.random.i64(1..50));
            world.settle(5);
            let (next, failures) = (world.sweeper.status.next_schedule_time, world.sweeper.status.consecutive_failures);
            world.failing = world.random.choice([0, 100]).unwrap();
            world.request(&request.to_string());
            let asked = world.now;
            let begun = world.settle(0);
            assert_eq!(begun.len(), 1, "seed {seed}: {begun:?}");
            assert_eq!((begun[0].trigger, begun[0].at), (Trigger::Request, asked));
            assert_eq!(world.sweeper.status.last_handled_request, Some(request.to_string()));
            if world.failing > 0 {
                assert_eq!(world.sweeper.status.consecutive_failures, failures + 1);
                if failures > 0 {
                    assert_eq!(world.sweeper.status.next_schedule_time, next, "seed {seed}: it moves no retry");
                } else {
                    // It is the first failure, and is retried as any is.
                    let retry = world.sweeper.status.next_schedule_time.unwrap();
                    assert!(retry <= asked + TimeDelta::seconds(70) && Some(retry) <= next, "seed {seed}: {retry}");
                }
            } else {
                assert_eq!(world.sweeper.status.consecutive_failures, 0);
            }
        }
        // While suspended it is answered, and forgotten.
        world.failing = 0;
        world.suspend(true);
        assert!(world.settle(0).is_empty());
        world.request("in vain");
        assert!(world.settle(0).is_empty());
        assert_eq!(world.sweeper.status.last_handled_request.as_deref(), Some("in vain"));
        world.suspend(false);
        // The last request may have failed; its rest is swept, as of any sweep.
        assert!(world.settle(0).iter().all(|begun| begun.trigger != Trigger::Request || begun.retry));
    }
}

#[test]
fn events_tell_of_changes_alone() {
    let mut world = World::new(1, 600);
    world.settle(0);
    assert_eq!(world.told, [""; 0]);
    // Ten failures of one kind are one event, another kind is another, and so is the recovery.
    world.failing = 100;
    for class in [Class::Transient, Class::Missing] {
        world.class = Some(class);
        for _ in 0..10 {
            world.advance();
            assert_eq!(world.settle(0).len(), 1);
        }
    }
    world.failing = 0;
    world.advance();
    world.settle(0);
    assert_eq!(world.told, ["SweepFailed", "SweepFailed", "Recovered"]);
    world.told.clear();

    world.suspend(true);
    world.settle(0);
    world.request("1");
    world.settle(0);
    world.suspend(false);
    world.settle(0);
    world.request("2");
    world.settle(0);
    world.sweeper.status.next_schedule_time = Some(world.now + TimeDelta::days(100));
    world.settle(0);
    assert_eq!(world.told, ["Suspended", "SweepRequested", "Resumed", "SweepRequested", "ScheduleRepaired"]);
}

#[test]
fn a_status_tells_which_outcomes_it_has_so_that_none_is_counted_twice() {
    let (sweeper, old) = (sweeper(1, 600), AuditLogSweeperStatus::default());
    let at = |second| DateTime::from_timestamp(second, 0).unwrap();
    let result = |done| AttemptResult { sweeper: sweeper.clone(), done, time: at(1_000_000), led: true };
    let sweep = |start: i64, timed_out: i64, request: &str| {
        let slot = DueSweep {
            schedule_time: at(1_000_000),
            trigger: Trigger::Request,
            limit: 10,
            continues: None,
            answers: Some(request.into()),
        };
        let report = Report { timed_out, ..Report::new(Ok(Ended::Drained)) };
        result(Done::Sweep(Box::new(SweepAttempt { slot, start: at(start), checked: None, report })))
    };
    let ours = sweep(1_000_000, 7, "a");
    assert!(!ours.is_in(&old));
    let written = ours.apply(&old);
    assert!(ours.is_in(&written));
    // Another at the same time, that came to another number, or for another request, is another.
    for other in [sweep(1_000_001, 7, "a"), sweep(1_000_000, 8, "a"), sweep(1_000_000, 7, "b")] {
        assert!(!other.is_in(&written), "{other:?}");
    }
    assert!(!result(Done::Repaired).is_in(&written));
}

#[test]
fn counts_beneath_a_later_attempt_are_added_once_and_stand_in_the_history() {
    let sweeper = sweeper(1, 600);
    let at = |second| DateTime::from_timestamp(1_000_000 + second, 0).unwrap();
    let sweep = |start: i64, timed_out: i64| {
        let (schedule_time, trigger) = (at(start), Trigger::Schedule);
        let slot = DueSweep { schedule_time, trigger, limit: 10, continues: None, answers: None };
        let report = Report { timed_out, ..Report::new(Ok(Ended::Drained)) };
        let done = Done::Sweep(Box::new(SweepAttempt { slot, start: at(start), checked: None, report }));
        AttemptResult { sweeper: sweeper.clone(), done, time: at(start), led: true }
    };
    let later = sweep(600, 3).apply(&AuditLogSweeperStatus::default());
    let ours = sweep(0, 7);
    let both = ours.apply_totals(&later);
    assert_eq!((both.totals.as_ref().unwrap().timed_out, both.last_sweep.as_ref().unwrap().timed_out), (10, 3));
    assert_eq!(both.history.iter().map(|entry| entry.timed_out).collect::<Vec<_>>(), [3, 7]);
    assert_eq!(ours.apply_totals(&both), both, "the answer to the first write was lost");
    assert_eq!(sweep(0, 0).apply_totals(&later), later, "it has nothing to tell");
}
