//! Conditions: their types, and the list that follows from the old one and from what is said now.

use chrono::{DateTime, Utc};
pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::cut;
use super::reason::Reason;
use super::status::{MAX_CONDITIONS, MAX_MESSAGE};

/// The types of condition, in the order in which they are listed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ConditionType {
    /// Whether the last attempt to do what the spec says went well.
    Ready,
    /// The operator is still working towards the spec: not seen yet, or retrying. Exists only while true.
    Reconciling,
    /// Someone must fix the spec, Secret, table or grant. Retries continue meanwhile. Exists only while true.
    Stalled,
    /// Whether the database answered.
    DatabaseReachable,
    /// Whether database, table, index and rights are as the sweep needs them, as far as the last look at them told.
    SchemaReady,
    /// Whether the sweeps keep up: the oldest stale row is not older than timeout + 2 * period.
    BacklogBounded,
    /// Whether `spec.suspend` is in force.
    Suspended,
}

impl ConditionType {
    /// Every type, in the order of the list.
    pub const ALL: [Self; 7] = [
        Self::Ready,
        Self::Reconciling,
        Self::Stalled,
        Self::DatabaseReachable,
        Self::SchemaReady,
        Self::BacklogBounded,
        Self::Suspended,
    ];

    /// The name in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Reconciling => "Reconciling",
            Self::Stalled => "Stalled",
            Self::DatabaseReachable => "DatabaseReachable",
            Self::SchemaReady => "SchemaReady",
            Self::BacklogBounded => "BacklogBounded",
            Self::Suspended => "Suspended",
        }
    }
}

/// What one condition should say from now on.
#[derive(Clone, Debug, PartialEq)]
pub struct ConditionUpdate {
    pub type_: ConditionType,
    /// None: Unknown.
    pub status: Option<bool>,
    pub reason: Reason,
    pub message: String,
}

impl ConditionUpdate {
    /// An update; `status` None means Unknown.
    pub fn new(
        type_: ConditionType,
        status: impl Into<Option<bool>>,
        reason: Reason,
        message: impl Into<String>,
    ) -> Self {
        Self { type_, status: status.into(), reason, message: message.into() }
    }
}

/// The new list of conditions. A `lastTransitionTime` moves only when the status flips. Conditions of others stay while there is
/// room: the API server refuses a list that is too long, and with it every write of the status.
pub fn apply(old: &[Condition], updates: &[ConditionUpdate], generation: i64, now: DateTime<Utc>) -> Vec<Condition> {
    let ours = |condition: &&Condition| ConditionType::ALL.iter().any(|ours| ours.as_str() == condition.type_);
    let foreign = old.iter().filter(|condition| !ours(condition)).cloned();
    updates
        .iter()
        .map(|update| {
            let status = match update.status {
                Some(true) => "True",
                Some(false) => "False",
                None => "Unknown",
            };
            let unchanged = old.iter().find(|c| c.type_ == update.type_.as_str() && c.status == status);
            Condition {
                type_: update.type_.as_str().into(),
                status: status.into(),
                reason: update.reason.as_str().into(),
                message: cut(&update.message, MAX_MESSAGE).into(),
                observed_generation: Some(generation),
                last_transition_time: unchanged.map_or_else(|| time(now), |c| c.last_transition_time.clone()),
            }
        })
        .chain(foreign)
        .take(MAX_CONDITIONS)
        .collect()
}

/// The condition of a type, if it is in the list.
pub fn find(conditions: &[Condition], type_: ConditionType) -> Option<&Condition> {
    conditions.iter().find(|c| c.type_ == type_.as_str())
}

/// Whether the condition of a type is there and True.
pub fn is_true(conditions: &[Condition], type_: ConditionType) -> bool {
    find(conditions, type_).is_some_and(|c| c.status == "True")
}

/// Whole seconds. A time that jiff cannot hold lies thousands of years away and becomes the epoch.
fn time(at: DateTime<Utc>) -> Time {
    Time(Timestamp::from_second(at.timestamp()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(second, 0).unwrap()
    }

    #[test]
    fn the_transition_time_moves_only_when_the_status_flips() {
        let ready = |status: bool| [ConditionUpdate::new(ConditionType::Ready, status, Reason::Swept, "")];
        let first = apply(&[], &ready(true), 1, at(100));
        let second = apply(&first, &ready(true), 2, at(200));
        assert_eq!(second[0].last_transition_time, time(at(100)));
        assert_eq!(second[0].observed_generation, Some(2));
        let third = apply(&second, &ready(false), 2, at(300));
        assert_eq!(third[0].last_transition_time, time(at(300)));
    }

    #[test]
    fn conditions_that_hold_no_more_go() {
        let old = apply(&[], &[ConditionUpdate::new(ConditionType::Reconciling, true, Reason::Pending, "")], 1, at(1));
        let new = apply(&old, &[ConditionUpdate::new(ConditionType::Ready, true, Reason::Swept, "")], 1, at(2));
        assert_eq!(new.iter().map(|c| c.type_.as_str()).collect::<Vec<_>>(), ["Ready"]);
    }

    #[test]
    fn conditions_of_others_stay_while_there_is_room() {
        let ready = apply(&[], &[ConditionUpdate::new(ConditionType::Ready, true, Reason::Swept, "")], 1, at(1));
        let foreign = |number| Condition { type_: format!("Foreign{number}"), ..ready[0].clone() };
        let old: Vec<Condition> = (0..MAX_CONDITIONS).map(foreign).chain(ready.clone()).collect();
        let new =
            apply(&old, &[ConditionUpdate::new(ConditionType::Ready, false, Reason::TableNotFound, "")], 1, at(2));
        let types: Vec<_> = new.iter().map(|c| c.type_.as_str()).collect();
        assert_eq!((types.len(), types[0], types[1]), (MAX_CONDITIONS, "Ready", "Foreign0"));
    }

    #[test]
    fn a_long_message_is_cut() {
        let new = apply(
            &[],
            &[ConditionUpdate::new(ConditionType::Ready, None, Reason::Pending, "ä".repeat(2000))],
            1,
            at(1),
        );
        assert_eq!(new[0].message.len(), MAX_MESSAGE);
        assert_eq!(new[0].status, "Unknown");
    }
}
