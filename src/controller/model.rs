//! What the steps of the controller hand to each other: the object as it was read, and what was done for it.

use std::borrow::Cow;

use chrono::{DateTime, Utc};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::error_boundary::InvalidObject;
use serde::de::{Deserialize, Deserializer, Error};
use serde_json::Value;

use crate::api::status::{LastSweep, Trigger};
use crate::api::{AuditLogSweeper, Failure, Sweeper, validate};
use crate::preflight::{Finding, PreflightReport};
use crate::schedule::Grid;
use crate::sweep::Report;

/// The object, or why it cannot be acted on. A list or a watch goes on when one object is invalid.
#[derive(Clone, Debug)]
pub struct ParsedObject(pub Result<AuditLogSweeper, InvalidObject>);

impl<'de> Deserialize<'de> for ParsedObject {
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

impl Resource for ParsedObject {
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

impl Sweeper {
    /// The slots of its schedule.
    pub fn grid(&self) -> Grid {
        Grid::new(self.uid(), self.spec.period.as_std())
    }

    /// The most entries of its history.
    pub fn history_limit(&self) -> usize {
        usize::try_from(self.spec.history_limit).unwrap_or_default()
    }
}

impl From<&Finding> for Failure {
    /// A finding for which a sweep must not begin.
    fn from(finding: &Finding) -> Self {
        Self::new(finding.reason, finding.in_one_line())
    }
}

/// A sweep that is due: by schedule, by request, or as a continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct DueSweep {
    /// Its time.
    pub schedule_time: DateTime<Utc>,
    /// What caused it.
    pub trigger: Trigger,
    /// What is left of its limit.
    pub limit: i64,
    /// The unfinished sweep, failed or stopped, that this attempt continues.
    pub continues: Option<LastSweep>,
    /// The request that it answers, whatever caused it.
    pub answers: Option<String>,
}

/// What was done for an object. The next status follows from it, also on top of a status that others wrote meanwhile.
#[derive(Debug)]
pub struct AttemptResult {
    /// What was acted upon.
    pub sweeper: Sweeper,
    pub done: Done,
    /// When it was over.
    pub time: DateTime<Utc>,
    /// Whether this replica still led then. After a freeze past the term, only the counts are published.
    pub led: bool,
}

/// What that was.
#[derive(Debug)]
pub enum Done {
    /// The spec was seen and is being tried.
    Acknowledged,
    /// The spec says suspend.
    Suspended,
    /// A time in the status was one that no sweep can have.
    Repaired,
    /// A preflight.
    Preflight(Result<PreflightReport, Failure>),
    /// One attempt at a sweep.
    Sweep(Box<SweepAttempt>),
}

/// One attempt at the sweep of a slot.
#[derive(Clone, Debug)]
pub struct SweepAttempt {
    pub slot: DueSweep,
    pub start: DateTime<Utc>,
    /// What a preflight before it found, if there was one.
    pub checked: Option<PreflightReport>,
    pub report: Report,
}

impl AttemptResult {
    /// The attempt at a sweep, if it is about one.
    pub fn sweep(&self) -> Option<&SweepAttempt> {
        match &self.done {
            Done::Sweep(attempt) => Some(attempt),
            _ => None,
        }
    }

    /// Rows that were swept, and rows of which that is not known.
    pub fn rows(&self) -> (i64, i64) {
        self.sweep().map_or((0, 0), |attempt| (attempt.report.timed_out, attempt.report.uncertain))
    }

    pub fn has_rows(&self) -> bool {
        self.rows() != (0, 0)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fetched(spec: Value) -> ParsedObject {
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
            (json!({ "database": database, "ofALaterVersion": 5 }), "spec.ofALaterVersion"),
            (json!({ "database": { "secretRef": { "name": "db" }, "host": "h" } }), "spec.database.host"),
            (json!({ "database": database, "columns": { "ofALaterVersion": "x" } }), "spec.columns.ofALaterVersion"),
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
