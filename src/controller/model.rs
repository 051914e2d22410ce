//! What the steps of the controller hand to each other: the object as it was read, and what was done for it.

use std::borrow::Cow;

use chrono::{DateTime, Utc};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::error_boundary::InvalidObject;
use kube::{Resource, ResourceExt};
use serde::de::{Deserialize, Deserializer, Error};
use serde_json::Value;

use crate::api::request::{MAX_REQUEST, REQUESTED_AT};
use crate::api::status::{LastSweep, Trigger};
use crate::api::{AuditLogSweeper, AuditLogSweeperSpec, Failure, cut, validate};
use crate::preflight::{Checked, Finding};
use crate::schedule::Grid;
use crate::sweep::Report;

/// The object, or why it cannot be acted on. A list or a watch goes on when one object is invalid.
#[derive(Clone, Debug)]
pub struct Fetched(pub Result<AuditLogSweeper, InvalidObject>);

impl<'de> Deserialize<'de> for Fetched {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Value::deserialize(deserializer)?;
        Ok(Self(match validate::parse(&raw) {
            Ok(object) => Ok(object),
            Err(error) => {
                let metadata = raw.get("metadata").unwrap_or(&Value::Null);
                let metadata = ObjectMeta::deserialize(metadata).map_err(D::Error::custom)?;
                Err(InvalidObject { error, metadata })
            }
        }))
    }
}

impl Resource for Fetched {
    type DynamicType = ();
    type Scope = <AuditLogSweeper as Resource>::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        AuditLogSweeper::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        AuditLogSweeper::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        AuditLogSweeper::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        AuditLogSweeper::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.as_ref().map_or_else(|invalid| &invalid.metadata, Resource::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.as_mut().map_or_else(|invalid| &mut invalid.metadata, Resource::meta_mut)
    }
}

/// The object that something happened to: the spec and generation that were acted upon.
#[derive(Clone, Debug)]
pub struct Subject {
    pub uid: String,
    pub generation: i64,
    pub spec: AuditLogSweeperSpec,
    /// The value of the annotation that asks for a sweep now, as far as it is looked at.
    pub request: Option<String>,
    /// Whether it is being deleted, and only some finalizer keeps it.
    pub deleted: bool,
}

impl Subject {
    /// The subject that an object is.
    pub fn new(object: &AuditLogSweeper) -> Self {
        Self {
            uid: object.metadata.uid.clone().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            spec: object.spec.clone(),
            request: object.annotations().get(REQUESTED_AT).map(|value| cut(value, MAX_REQUEST).to_owned()),
            deleted: object.metadata.deletion_timestamp.is_some(),
        }
    }

    /// The slots of its schedule.
    pub fn grid(&self) -> Grid {
        Grid::new(&self.uid, self.spec.period.as_std())
    }
}

impl From<&crate::database::Error> for Failure {
    fn from(error: &crate::database::Error) -> Self {
        Self { class: error.class(), ..Self::new(error.reason(), error.to_string()) }
    }
}

impl From<&Finding> for Failure {
    /// A finding for which a sweep must not begin.
    fn from(finding: &Finding) -> Self {
        Self::new(finding.reason, finding.in_one_line())
    }
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
    /// The request that it answers, whatever caused it.
    pub answers: Option<String>,
}

/// Something that happened, from which the next status is computed; again on top of another status if that was
/// written meanwhile.
#[derive(Debug)]
pub enum Update {
    /// The spec was seen and is being tried.
    Acknowledged { now: DateTime<Utc> },
    /// The spec says suspend.
    Suspended { now: DateTime<Utc> },
    /// A time in the status was one that no sweep can have.
    Repaired { now: DateTime<Utc> },
    /// A preflight ended.
    Preflight { now: DateTime<Utc>, result: Result<Checked, Failure> },
    /// An attempt at a sweep ended. With what a preflight before it found, if there was one.
    Sweep {
        slot: Slot,
        start: DateTime<Utc>,
        end: DateTime<Utc>,
        result: Box<Result<Report, Failure>>,
        checked: Option<Checked>,
    },
}

/// An update on its way to the status.
#[derive(Debug)]
pub struct Pending {
    /// The object that it came from.
    pub base: AuditLogSweeper,
    /// What was acted upon.
    pub subject: Subject,
    /// What came of it.
    pub update: Update,
    /// Whether this replica still led when it was over. After a freeze past the term, only the counts are published.
    pub led: bool,
}

impl Pending {
    /// Rows that were swept, and rows of which that is not known.
    pub fn rows(&self) -> (i64, i64) {
        match &self.update {
            Update::Sweep { result, .. } => {
                result.as_ref().as_ref().map_or((0, 0), |report| (report.timed_out, report.uncertain))
            }
            _ => (0, 0),
        }
    }

    pub fn has_rows(&self) -> bool {
        self.rows() != (0, 0)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fetched(spec: Value) -> Fetched {
        let object = json!({
            "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": "app", "uid": "1" },
            "spec": spec, "status": { "unknown": 1 },
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn an_unknown_spec_field_makes_the_object_invalid_and_keeps_its_metadata() {
        let database = json!({ "secretRef": { "name": "db" } });
        assert!(fetched(json!({ "database": database })).0.is_ok(), "an unknown status field does no harm");
        for (spec, field) in [
            (json!({ "database": database, "holdAbove": 5 }), "spec.holdAbove"),
            (json!({ "database": { "secretRef": { "name": "db" }, "host": "h" } }), "spec.database.host"),
            (json!({ "database": database, "columns": { "timeZone": "UTC" } }), "spec.columns.timeZone"),
            (
                json!({ "database": database, "complete": [{ "column": "a", "valueFrom": {} }] }),
                "spec.complete[0].valueFrom",
            ),
        ] {
            let object = fetched(spec);
            assert_eq!(object.meta().uid.as_deref(), Some("1"));
            let error = object.0.unwrap_err().error;
            assert!(error.starts_with(&format!("this operator (version {}) does not know", env!("CARGO_PKG_VERSION"))));
            assert!(error.ends_with(field), "{error}");
        }
    }
}
