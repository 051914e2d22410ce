//! What users read: the status subresource. Every string has a bound here, and the setters cut to it.

use chrono::{DateTime, NaiveDateTime, SubsecRound, TimeDelta, Utc};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Reason, cut};

/// The most conditions that a status may have, those of others included.
pub const MAX_CONDITIONS: usize = 64;

/// The most bytes that a message in the status may have.
pub const MAX_MESSAGE: usize = 1024;

/// What the operator last saw and did. Times are whole seconds.
#[derive(KubeSchema, Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditLogSweeperStatus {
    /// The generation of the spec that the status describes. -1: no operator has seen the object yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Ready, DatabaseReachable, SchemaReady, BacklogBounded and Suspended always; Reconciling and Stalled only while
    /// they are true.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[schemars(length(max = 64))]
    pub conditions: Vec<Condition>,

    /// The slot of the schedule that the last sweep was for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_schedule_time: Option<DateTime<Utc>>,

    /// When the last attempt at a sweep began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_attempt_time: Option<DateTime<Utc>>,

    /// When a sweep last ended without an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_successful_time: Option<DateTime<Utc>>,

    /// When an attempt last ended with an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure_time: Option<DateTime<Utc>>,

    /// When the next sweep, or the next retry, is due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_schedule_time: Option<DateTime<Utc>>,

    /// The last sweep. A retry continues the sweep of its slot and adds to its counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_sweep: Option<LastSweep>,

    /// Stale rows that were still open after the last sweep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backlog: Option<Backlog>,

    /// Rows that the database refused to complete in the last sweep: a constraint or a trigger forbids it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsweepable: Option<Unsweepable>,

    /// The operator's clock less the database's, as of the last sweep. Only the database's clock decides which rows
    /// are stale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_skew_milliseconds: Option<i64>,

    /// The results of the last attempts, newest first. Consecutive attempts that found nothing share an entry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20), extend("x-kubernetes-list-type" = "atomic"))]
    pub history: Vec<HistoryEntry>,

    /// The value of the annotation auditlog.dev/requestedAt that was last answered, its first 128 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub last_handled_request: Option<String>,

    /// Sums over the life of the object. Best effort: a crash between a sweep and its status write loses that sweep's
    /// counts here. The table itself is always right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub totals: Option<Totals>,

    /// Attempts that failed in a row, up to now.
    #[serde(default)]
    pub consecutive_failures: i32,

    /// The last error. It stays after recovery, with its time; the condition Ready tells whether it still holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<LastError>,
}

/// One sweep, its retries included.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LastSweep {
    /// The slot of the schedule. For a sweep on request, the time of the request.
    pub schedule_time: DateTime<Utc>,
    /// When the last attempt began.
    pub start_time: DateTime<Utc>,
    /// How long the last attempt took.
    pub duration_milliseconds: i64,
    /// What caused the sweep.
    pub trigger: Trigger,
    /// How it ended.
    pub outcome: Outcome,
    /// Attempts made for this slot.
    pub attempts: i32,
    /// Rows that started before this time were stale: the database's clock when the attempt began, less the timeout.
    /// Absent when the database was not reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cutoff: Option<DateTime<Utc>>,
    /// The limit that was in force.
    pub limit: i32,
    /// Rows completed.
    pub timed_out: i64,
    /// Rows that the database was too busy to complete, left for a later sweep.
    pub skipped: i64,
    /// Rows whose update a trigger of the table suppressed.
    pub suppressed: i64,
    /// Rows of a batch whose COMMIT got no answer, if the operator could not find out whether it took place. Not in timedOut.
    pub uncertain: i64,
    /// Transactions committed.
    pub batches: i64,
}

impl LastSweep {
    /// Rows that are completed, or may be. They count against the limit.
    pub fn taken(&self) -> i64 {
        self.timed_out.max(0).saturating_add(self.uncertain.max(0))
    }
}

/// What caused a sweep. Schedule: its slot came. Request: the annotation auditlog.dev/requestedAt has a new value.
/// Create: the object is new. Command: someone ran `sweep`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Trigger {
    Schedule,
    Request,
    Create,
    Command,
}

/// How a sweep ended. Drained: no stale row was left. LimitReached: it stopped at spec.limit. DeadlineReached: it stopped at
/// spec.deadline. Stopped: the operator stopped, or the object was deleted or moved. Failed: lastError says why, and the operator
/// retries. Observed: rows were only counted.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Outcome {
    Drained,
    LimitReached,
    DeadlineReached,
    Stopped,
    Failed,
    Observed,
}

impl Outcome {
    /// Every one.
    pub const ALL: [Self; 6] =
        [Self::Drained, Self::LimitReached, Self::DeadlineReached, Self::Stopped, Self::Failed, Self::Observed];
}

/// One attempt, or several equal ones in a row.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// How it ended.
    pub outcome: Outcome,
    /// Why it failed, as in the condition Ready. Absent: it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub reason: Option<String>,
    /// What caused it.
    pub trigger: Trigger,
    /// Rows completed.
    pub timed_out: i64,
    /// How many attempts this is about.
    pub count: i64,
    /// When the first of them ended.
    pub first_time: DateTime<Utc>,
    /// When the last of them ended.
    pub last_time: DateTime<Utc>,
}

/// The newest entries of a history, with one more attempt. Attempts that completed nothing and ended alike share an
/// entry, so that quiet days do not push what happened out.
pub fn remember(history: &[HistoryEntry], entry: HistoryEntry, limit: usize) -> Vec<HistoryEntry> {
    let mut entries = history.to_vec();
    match entries.first_mut() {
        Some(last) if is_alike(last, &entry) => {
            last.count = last.count.saturating_add(entry.count);
            last.last_time = entry.last_time;
        }
        _ => entries.insert(0, entry),
    }
    entries.truncate(limit);
    entries
}

fn is_alike(one: &HistoryEntry, other: &HistoryEntry) -> bool {
    let key = |entry: &HistoryEntry| (entry.outcome, entry.reason.clone(), entry.trigger);
    one.timed_out == 0 && other.timed_out == 0 && key(one) == key(other)
}

/// Stale rows still open, counted up to a bound.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Backlog {
    /// Rows counted.
    pub remaining: i64,
    /// Whether counting stopped at the bound, so that there may be more.
    pub at_least: bool,
    /// The same for people: `0`, `17` or `>1000`.
    #[schemars(length(max = 32))]
    pub display: String,
    /// When the oldest of them started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_time_started: Option<DateTime<Utc>>,
}

impl Backlog {
    /// The backlog where `counted` rows were found while looking for at most `bound + 1`.
    pub fn new(counted: i64, bound: i64, oldest_time_started: Option<DateTime<Utc>>) -> Self {
        let at_least = counted > bound;
        let remaining = counted.min(bound);
        let display = if at_least { format!(">{remaining}") } else { remaining.to_string() };
        Self { remaining, at_least, display, oldest_time_started }
    }
}

/// Rows that the database refuses to complete.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Unsweepable {
    /// Rows refused in the last sweep.
    pub count: i64,
    /// Keys of the first of them, if the key is a uuid or an integer: other keys are row data.
    #[serde(default)]
    #[schemars(length(max = 10), inner(length(max = 64)))]
    pub ids: Vec<String>,
    /// Where the next sweep begins, so that refused rows do not block the rows behind them. Absent: at the oldest row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_after: Option<ResumeAfter>,
}

/// A place in the order of start time and key.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ResumeAfter {
    /// The start time, as the database writes it.
    #[schemars(length(max = 64))]
    pub time_started: String,
    /// The key, if it is a uuid or an integer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub id: Option<String>,
}

impl ResumeAfter {
    /// Whether an operator can have written it before `now`: the status may have been edited, or restored from a backup. A
    /// place in the future would hide every row.
    pub fn is_plausible(&self, now: DateTime<Utc>) -> bool {
        let time = |text: &str| {
            let (text, is_ancient) = text.strip_suffix(" BC").map_or((text, false), |text| (text, true));
            // A `timestamp` is written without a zone; the clocks of some zones are ahead of UTC.
            let (text, latest) = text.strip_suffix("+00").map_or((text, now + MAX_OFFSET), |text| (text, now));
            text == "-infinity" || calendar_time(text).is_some_and(|time| is_ancient || time.and_utc() <= latest)
        };
        let key = |id: &String| id.len() <= 36 && id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
        time(&self.time_started) && self.id.as_ref().is_none_or(key)
    }
}

/// The clock of no zone is further ahead of UTC.
const MAX_OFFSET: TimeDelta = TimeDelta::hours(14);

/// A time as PostgreSQL writes it, without its zone.
fn calendar_time(text: &str) -> Option<NaiveDateTime> {
    NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f").ok()
}

/// Sums over the life of the object.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// Attempts at a sweep.
    pub sweeps: i64,
    /// Attempts that failed.
    pub failures: i64,
    /// Rows completed.
    pub timed_out: i64,
}

/// An error, with what to do about it.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LastError {
    /// The kind of error, as in the conditions.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// What is wrong and what to do: the whole chain of causes, with the SQLSTATE if there is one.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// When it happened.
    pub time: DateTime<Utc>,
}

impl LastError {
    /// An error at `now`, its message cut to the bound.
    pub fn new(reason: Reason, message: &str, now: DateTime<Utc>) -> Self {
        Self { reason: reason.as_str().into(), message: cut(message, MAX_MESSAGE).into(), time: whole_seconds(now) }
    }
}

/// Status times are whole seconds, as everywhere in Kubernetes.
pub fn whole_seconds(time: DateTime<Utc>) -> DateTime<Utc> {
    time.trunc_subsecs(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resume_place_must_be_one_that_an_operator_can_have_written() {
        let now = DateTime::parse_from_rfc3339("2026-11-27T10:00:00Z").unwrap().to_utc();
        let is_plausible = |time: &str, id: Option<&str>| {
            ResumeAfter { time_started: time.into(), id: id.map(Into::into) }.is_plausible(now)
        };
        assert!(is_plausible("2026-11-22 10:00:00.123456+00", Some("0f8fad5b-d9cb-469f-a165-70867728950e")));
        assert!(is_plausible("2026-11-22 10:00:00+00", Some("-17")));
        let local = ["2026-11-22 10:00:00", "2026-11-28 00:00:00", "0044-03-15 12:00:00.5 BC"];
        for time in ["-infinity", "0044-03-15 12:00:00+00 BC", "2026-11-27 10:00:00+00"].into_iter().chain(local) {
            assert!(is_plausible(time, None), "{time}");
        }
        for time in
            ["infinity", "2026-11-27 10:00:01+00", "9999-12-31 00:00:00+00", "yesterday", "", "2026-11-28 00:00:01"]
        {
            assert!(!is_plausible(time, None), "{time}");
        }
        assert!(!is_plausible("2026-11-22 10:00:00+00", Some("x' OR true")));
    }

    #[test]
    fn a_history_folds_quiet_sweeps_and_keeps_within_its_bound() {
        let at = |second| DateTime::from_timestamp(second, 0).unwrap();
        let entry = |second, timed_out, reason: Option<&str>| HistoryEntry {
            outcome: if reason.is_some() { Outcome::Failed } else { Outcome::Drained },
            reason: reason.map(Into::into),
            trigger: Trigger::Schedule,
            timed_out,
            count: 1,
            first_time: at(second),
            last_time: at(second),
        };
        let mut history = vec![];
        for second in 0..10_000 {
            // A crash of the application now and then, and a failure.
            let timed_out = if second % 1000 == 7 { second } else { 0 };
            let reason = (second % 1000 == 500).then_some("DatabaseUnreachable");
            history = remember(&history, entry(second, timed_out, reason), 10);
            assert!(history.len() <= 10);
        }
        let seen: Vec<_> =
            history.iter().map(|e| (e.timed_out, e.count, e.first_time.timestamp(), e.last_time.timestamp())).collect();
        assert_eq!(seen[..4], [(0, 499, 9501, 9999), (0, 1, 9500, 9500), (0, 492, 9008, 9499), (9007, 1, 9007, 9007)]);
        assert_eq!(history[1].reason.as_deref(), Some("DatabaseUnreachable"));
        // Two that completed rows are two events, however alike.
        let twice = remember(&[entry(1, 5, None)], entry(2, 5, None), 10);
        assert_eq!(twice.len(), 2);
        assert!(remember(&history, entry(0, 0, None), 0).is_empty());
    }

    #[test]
    fn backlog_displays_what_was_counted() {
        let display = |counted| Backlog::new(counted, 1000, None).display;
        assert_eq!(display(0), "0");
        assert_eq!(display(17), "17");
        assert_eq!(display(1000), "1000");
        assert_eq!(display(1001), ">1000");
        assert_eq!(Backlog::new(1001, 1000, None).remaining, 1000);
    }
}
