//! The series of one AuditLogSweeper: gauges read off its spec and its status, and what this process counted. Pure.

use std::collections::BTreeMap;

use crate::api::AuditLogSweeperSpec;
use crate::api::condition::{self, ConditionType};
use crate::api::spec::Mode;
use crate::api::status::{AuditLogSweeperStatus, Outcome, Trigger};

/// A gauge that each object has.
#[derive(Debug)]
pub struct Gauge {
    /// Its name without the prefix.
    pub name: &'static str,
    /// What it says.
    pub help: &'static str,
    value: fn(&AuditLogSweeperSpec, &AuditLogSweeperStatus) -> Option<i64>,
}

/// Every gauge of an object, each read off the status as it was written, but for the period. None: not known.
pub const GAUGES: [Gauge; 10] = [
    Gauge {
        name: "last_success_timestamp_seconds",
        help: "When a sweep last ended without an error",
        value: |_, status| status.last_successful_time.map(|time| time.timestamp()),
    },
    Gauge {
        name: "next_sweep_timestamp_seconds",
        help: "When the next sweep or retry is due",
        value: |_, status| status.next_schedule_time.map(|time| time.timestamp()),
    },
    Gauge {
        name: "backlog_rows",
        help: "Stale rows that were still open after the last sweep, counted up to a bound",
        value: |_, status| status.backlog.as_ref().map(|backlog| backlog.remaining),
    },
    Gauge {
        name: "oldest_stale_timestamp_seconds",
        help: "When the oldest stale row that was still open after the last sweep started",
        value: |_, status| Some(status.backlog.as_ref()?.oldest_time_started?.timestamp()),
    },
    Gauge {
        name: "backlog_bounded",
        help: "Whether the condition BacklogBounded is True or False: 1 or 0. Not of an object that only observes",
        value: |spec, status| {
            let condition = condition::find(&status.conditions, ConditionType::BacklogBounded)?;
            match condition.status.as_str() {
                _ if spec.mode == Mode::Observe => None,
                "True" => Some(1),
                "False" => Some(0),
                _ => None,
            }
        },
    },
    Gauge {
        name: "consecutive_failures",
        help: "Attempts that failed since the last one that did not",
        value: |_, status| Some(status.consecutive_failures.into()),
    },
    Gauge {
        name: "unsweepable_rows",
        help: "Rows that the database refused to complete in the last sweep",
        value: |_, status| Some(status.unsweepable.as_ref().map_or(0, |unsweepable| unsweepable.count)),
    },
    Gauge {
        name: "suspended",
        help: "Whether the condition Suspended is True: 1 or 0",
        value: |_, status| is_true(status, ConditionType::Suspended),
    },
    Gauge {
        name: "ready",
        help: "Whether the condition Ready is True: 1 or 0",
        value: |_, status| is_true(status, ConditionType::Ready),
    },
    Gauge {
        name: "period_seconds",
        help: "How often a sweep is due, by the spec",
        value: |spec, _| i64::try_from(spec.period.as_std().as_secs()).ok(),
    },
];

/// One value for each of [`GAUGES`].
pub type Values = [Option<i64>; GAUGES.len()];

fn is_true(status: &AuditLogSweeperStatus, type_: ConditionType) -> Option<i64> {
    Some(i64::from(condition::is_true(&status.conditions, type_)))
}

/// What the gauges of an object say.
pub fn values(spec: &AuditLogSweeperSpec, status: &AuditLogSweeperStatus) -> Values {
    GAUGES.each_ref().map(|gauge| (gauge.value)(spec, status))
}

/// What they say of an object that cannot be read: that it is not ready.
pub fn invalid() -> Values {
    GAUGES.each_ref().map(|gauge| (gauge.name == "ready").then_some(0))
}

/// What this process did for an object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    /// Rows completed.
    pub rows_timed_out: u64,
    sweeps: BTreeMap<(Outcome, Trigger), u64>,
}

impl Counts {
    /// An attempt ended.
    pub fn add(&mut self, outcome: Outcome, trigger: Trigger, rows_timed_out: i64) {
        let rows = u64::try_from(rows_timed_out).unwrap_or_default();
        self.rows_timed_out = self.rows_timed_out.saturating_add(rows);
        let sweeps = self.sweeps.entry((outcome, trigger)).or_default();
        *sweeps = sweeps.saturating_add(1);
    }

    /// The attempts that ended so, and what caused them. What a schedule makes is there from the start, so that the
    /// first of a kind is an increase.
    pub fn sweeps(&self) -> impl Iterator<Item = (Outcome, Trigger, u64)> {
        let mut all: BTreeMap<_, _> = Outcome::ALL.iter().map(|outcome| ((*outcome, Trigger::Schedule), 0)).collect();
        all.extend(self.sweeps.iter().map(|(key, sweeps)| (*key, *sweeps)));
        all.into_iter().map(|((outcome, trigger), sweeps)| (outcome, trigger, sweeps))
    }
}

/// What is shown of one object.
#[derive(Clone, Debug)]
pub struct ObjectSeries {
    pub namespace: String,
    pub name: String,
    pub gauges: Values,
    pub counts: Counts,
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};
    use serde_json::json;

    use super::*;
    use crate::api::Reason;
    use crate::api::condition::ConditionUpdate;
    use crate::api::status::{Backlog, Unsweepable};

    fn spec() -> AuditLogSweeperSpec {
        serde_json::from_value(json!({ "database": { "secretRef": { "name": "db" } }, "period": "90s" })).unwrap()
    }

    fn at(second: i64) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp(second, 999_000_000)
    }

    fn known(status: &AuditLogSweeperStatus) -> Vec<(&'static str, i64)> {
        let values = values(&spec(), status);
        GAUGES.iter().zip(values).filter_map(|(gauge, value)| Some((gauge.name, value?))).collect()
    }

    #[test]
    fn what_is_not_known_has_no_value() {
        let fresh = [("consecutive_failures", 0), ("unsweepable_rows", 0), ("suspended", 0), ("ready", 0)];
        assert_eq!(known(&AuditLogSweeperStatus::default()), [&fresh[..], &[("period_seconds", 90)]].concat());
        let invalid = invalid();
        let invalid: Vec<_> =
            GAUGES.iter().zip(invalid).filter_map(|(gauge, value)| Some((gauge.name, value?))).collect();
        assert_eq!(invalid, [("ready", 0)]);
    }

    #[test]
    fn each_value_is_the_one_that_the_status_has() {
        let conditions = |ready: bool, bounded: Option<bool>, suspended: bool| {
            let updates = [
                ConditionUpdate::new(ConditionType::Ready, ready, Reason::Swept, ""),
                ConditionUpdate::new(ConditionType::BacklogBounded, bounded, Reason::WithinBound, ""),
                ConditionUpdate::new(ConditionType::Suspended, suspended, Reason::NotSuspended, ""),
            ];
            condition::apply(&[], &updates, 1, DateTime::UNIX_EPOCH)
        };
        let mut status = AuditLogSweeperStatus {
            conditions: conditions(true, Some(false), true),
            last_successful_time: at(1),
            next_schedule_time: at(2),
            last_attempt_time: at(8),
            last_failure_time: at(9),
            backlog: Some(Backlog::new(1001, 1000, at(3))),
            consecutive_failures: 4,
            unsweepable: Some(Unsweepable { count: 5, ..Unsweepable::default() }),
            ..AuditLogSweeperStatus::default()
        };
        assert_eq!(
            known(&status),
            [
                ("last_success_timestamp_seconds", 1),
                ("next_sweep_timestamp_seconds", 2),
                ("backlog_rows", 1000),
                ("oldest_stale_timestamp_seconds", 3),
                ("backlog_bounded", 0),
                ("consecutive_failures", 4),
                ("unsweepable_rows", 5),
                ("suspended", 1),
                ("ready", 1),
                ("period_seconds", 90),
            ]
        );
        status.conditions = conditions(false, None, false);
        let known = known(&status);
        assert!(known.contains(&("ready", 0)) && known.contains(&("suspended", 0)), "{known:?}");
        assert!(!known.iter().any(|(name, _)| *name == "backlog_bounded"), "{known:?}");
    }

    #[test]
    fn counts_add_up_and_what_a_schedule_makes_begins_at_zero() {
        let mut counts = Counts::default();
        counts.add(Outcome::Drained, Trigger::Create, 3);
        counts.add(Outcome::LimitReached, Trigger::Schedule, 2);
        counts.add(Outcome::LimitReached, Trigger::Schedule, 2);
        assert_eq!(counts.rows_timed_out, 7);
        let some: Vec<_> = counts.sweeps().filter(|(_, _, sweeps)| *sweeps > 0).collect();
        assert_eq!(some, [(Outcome::Drained, Trigger::Create, 1), (Outcome::LimitReached, Trigger::Schedule, 2)]);
        let none = counts.sweeps().filter(|(_, trigger, sweeps)| *sweeps == 0 && *trigger == Trigger::Schedule).count();
        assert_eq!(none, Outcome::ALL.len() - 1);
    }
}
