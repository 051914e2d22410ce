//! An AuditLogSweeper as the API server holds it: readable, or the reason why this operator must not act on it.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::error_boundary::InvalidObject;
use serde::de::{Deserialize, Deserializer, Error};
use serde_json::Value;

use crate::api::{AuditLogSweeper, validate};

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
