//! Properties of the schedule over thousands of random courses of events: what `decide` and `status` do together.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;

use crate::api::Failure;

use super::decide::{Decision, decide};
use super::model::Slot;
use super::model::{Subject, Update};
use super::status::events::events;
use crate::api::Class;
use crate::api::Reason;
use crate::api::status::{AuditLogSweeperStatus, Trigger};
use crate::preflight::Checked;
use crate::sweep::Report;
use crate::sweep::report::Ended;

fn subject(uid: u64, period: i64) -> Subject {
    let spec = json!({ "database": { "secretRef": { "name": "db" } }, "period": format!("{period}s"), "limit": 10 });
    let spec = serde_json::from_value(spec).unwrap();
    Subject { uid: format!("0f8fad5b-d9cb-469f-a165-{uid:012x}"), generation: 1, spec, request: None, deleted: false }
}

fn quiet() -> Result<Report, Failure> {
    Ok(Report { ended: Some(Ended::Drained), ..Report::default() })
}

fn failed(class: Class) -> Failure {
    let reason = if class == Class::Missing { Reason::SecretNotFound } else { Reason::DatabaseUnreachable };
    Failure { reason, message: "gone".into(), class }
}

/// An object, an operator and a clock.
struct World {
    random: fastrand::Rng,
    now: DateTime<Utc>,
    subject: Subject,
    status: AuditLogSweeperStatus,
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
        let subject = subject(random.u64(..1 << 40), period);
        Self { random, now, subject, status, remembered: None, failing: 0, class: None, written: 0, told: vec![] }
    }

    fn decide(&self) -> Decision {
        decide(self.now, &self.subject, &self.status, self.remembered)
    }

    /// Does what is due until nothing is; the sweeps that began. Each takes up to `longest` seconds.
    fn settle(&mut self, longest: i64) -> Vec<Begun> {
        let mut begun = vec![];
        for _ in 0..20 {
            let now = self.now;
            let update = match self.decide() {
                Decision::Wait(next) => {
                    assert!(next.is_none_or(|next| next > now), "a wait until the past is a busy loop");
                    return begun;
                }
                Decision::Acknowledge => Update::Acknowledged { now },
                Decision::Suspend => Update::Suspended { now },
                Decision::Repair => Update::Repaired { now },
                Decision::Preflight => {
                    let fails = self.random.u8(0..100) < self.failing;
                    let result = if fails { Err(failed(Class::Transient)) } else { Ok(Checked::default()) };
                    Update::Preflight { now, result }
                }
                Decision::Sweep(slot) => {
                    let end = now + TimeDelta::seconds(self.random.i64(0..=longest));
                    let fails = self.random.u8(0..100) < self.failing;
                    let class = if self.random.bool() { Class::Transient } else { Class::Missing };
                    let class = self.class.unwrap_or(class);
                    let result = Box::new(if fails { Err(failed(class)) } else { quiet() });
                    let (trigger, schedule_time) = (slot.trigger, slot.schedule_time);
                    begun.push(Begun {
                        at: now,
                        trigger,
                        schedule_time,
                        retry: slot.continues.is_some(),
                        failed: fails,
                    });
                    self.now = end;
                    Update::Sweep { slot, start: now, end, result, checked: None }
                }
            };
            let new = update.apply(&self.subject, &self.status);
            self.told.extend(events(&update, &self.status, &new).iter().map(|event| event.reason));
            self.written += 1;
            self.remembered = new.next_schedule_time;
            self.status = new;
        }
        panic!("never settles: {:?}", self.decide());
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
        assert_eq!((world.status.history.len(), world.status.history[0].count), (2, 10_000));
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
            let before = (world.status.clone(), world.remembered, world.status.consecutive_failures);
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
                    (world.status, world.remembered, excuse) = (before.0, None, true);
                    idle_since = world.now;
                }
                // A new process.
                1 => world.remembered = None,
                // An edit, of the period too.
                2 => {
                    world.subject.generation += 1;
                    world.subject.spec.limit = world.random.i32(1..100);
                }
                // Down for a while.
                3 => {
                    let down = TimeDelta::seconds(world.random.i64(0..period * 5));
                    (world.now, world.remembered) = (world.now + down, None);
                    idle_since = world.now;
                }
                // Suspended for a while.
                4 => {
                    world.subject.generation += 1;
                    world.subject.spec.suspend = true;
                    assert!(world.settle(0).is_empty());
                    world.now += TimeDelta::seconds(world.random.i64(0..period * 3));
                    world.subject.generation += 1;
                    world.subject.spec.suspend = false;
                    idle_since = world.now;
                }
                5 => world.subject.request = Some(world.random.u64(..).to_string()),
                // A hand, or a clock.
                6 => world.status.next_schedule_time = Some(world.now + TimeDelta::seconds(period * 10)),
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
                let old = decide(now, &world.subject, &world.status, world.remembered);
                assert_eq!(decide(now, &world.subject, &world.status, None), old, "seed {seed}");
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
        world.subject.request = Some("first".into());
        let begun = world.settle(5);
        assert_eq!((begun.len(), begun[0].trigger), (1, Trigger::Create));
        assert_eq!(world.status.last_handled_request.as_deref(), Some("first"));
        for request in 0..10 {
            world.now += TimeDelta::seconds(world.random.i64(1..50));
            world.settle(5);
            let (next, failures) = (world.status.next_schedule_time, world.status.consecutive_failures);
            world.failing = world.random.choice([0, 100]).unwrap();
            world.subject.request = Some(request.to_string());
            let asked = world.now;
            let begun = world.settle(0);
            assert_eq!(begun.len(), 1, "seed {seed}: {begun:?}");
            assert_eq!((begun[0].trigger, begun[0].at), (Trigger::Request, asked));
            assert_eq!(world.status.last_handled_request, Some(request.to_string()));
            if world.failing > 0 {
                assert_eq!(world.status.consecutive_failures, failures + 1);
                if failures > 0 {
                    assert_eq!(world.status.next_schedule_time, next, "seed {seed}: it moves no retry");
                } else {
                    // It is the first failure, and is retried as any is.
                    let retry = world.status.next_schedule_time.unwrap();
                    assert!(retry <= asked + TimeDelta::seconds(70) && Some(retry) <= next, "seed {seed}: {retry}");
                }
            } else {
                assert_eq!(world.status.consecutive_failures, 0);
            }
        }
        // While suspended it is answered, and forgotten.
        world.failing = 0;
        (world.subject.spec.suspend, world.subject.generation) = (true, 2);
        assert!(world.settle(0).is_empty());
        world.subject.request = Some("in vain".into());
        assert!(world.settle(0).is_empty());
        assert_eq!(world.status.last_handled_request.as_deref(), Some("in vain"));
        (world.subject.spec.suspend, world.subject.generation) = (false, 3);
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

    (world.subject.spec.suspend, world.subject.generation) = (true, 2);
    world.settle(0);
    world.subject.request = Some("1".into());
    world.settle(0);
    (world.subject.spec.suspend, world.subject.generation) = (false, 3);
    world.settle(0);
    world.subject.request = Some("2".into());
    world.settle(0);
    world.status.next_schedule_time = Some(world.now + TimeDelta::days(100));
    world.settle(0);
    assert_eq!(world.told, ["Suspended", "SweepRequested", "Resumed", "SweepRequested", "ScheduleRepaired"]);
}

#[test]
fn a_status_tells_which_outcomes_it_has_so_that_none_is_counted_twice() {
    let (subject, old) = (subject(1, 600), AuditLogSweeperStatus::default());
    let at = |second| DateTime::from_timestamp(second, 0).unwrap();
    let sweep = |start: i64, timed_out: i64, request: &str| {
        let slot = Slot {
            schedule_time: at(1_000_000),
            trigger: Trigger::Request,
            limit: 10,
            continues: None,
            answers: Some(request.into()),
        };
        let report = Report { timed_out, ended: Some(Ended::Drained), ..Report::default() };
        Update::Sweep { slot, start: at(start), end: at(start), result: Box::new(Ok(report)), checked: None }
    };
    let ours = sweep(1_000_000, 7, "a");
    assert!(!ours.is_in(&subject, &old));
    let written = ours.apply(&subject, &old);
    assert!(ours.is_in(&subject, &written));
    // Another at the same time, that came to another number, or for another request, is another.
    for other in [sweep(1_000_001, 7, "a"), sweep(1_000_000, 8, "a"), sweep(1_000_000, 7, "b")] {
        assert!(!other.is_in(&subject, &written), "{other:?}");
    }
    assert!(!Update::Repaired { now: at(1_000_000) }.is_in(&subject, &written));
}
