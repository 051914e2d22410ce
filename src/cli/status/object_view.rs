//! An AuditLogSweeper as the screens need it: read as far as it can be, since an object that cannot be read is one that
//! somebody wants to see. Pure.

use chrono::{DateTime, Utc};
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::{Value, json};

use super::words::plain;
use crate::api::condition::{self, Condition, ConditionType};
use crate::api::reason::NOTHING;
use crate::api::request::REQUESTED_AT;
use crate::api::{AuditLogSweeperSpec, AuditLogSweeperStatus, Reason, validate};

/// One object.
#[derive(Clone, Debug)]
pub struct ObjectView {
    pub namespace: String,
    pub name: String,
    pub created: Option<DateTime<Utc>>,
    pub generation: i64,
    /// The value of the annotation that asks for a sweep.
    pub requested: Option<String>,
    /// Err: why it cannot be read.
    pub spec: Result<AuditLogSweeperSpec, String>,
    pub status: AuditLogSweeperStatus,
    /// Why the status cannot be read, if so; what can be read of it is shown.
    pub unreadable: Option<String>,
    raw_status: Value,
}

impl From<&DynamicObject> for ObjectView {
    fn from(object: &DynamicObject) -> Self {
        let part = |name: &str| object.data.get(name).cloned().unwrap_or(Value::Null);
        let raw_status = part("status");
        let (status, unreadable) = match serde_json::from_value::<Option<AuditLogSweeperStatus>>(raw_status.clone()) {
            Ok(status) => (status.unwrap_or_default(), None),
            Err(error) => (validate::readable_status(&raw_status), Some(plain(&error.to_string()))),
        };
        let created = object.metadata.creation_timestamp.as_ref();
        Self {
            namespace: object.namespace().unwrap_or_else(|| "default".into()),
            name: object.name_any(),
            created: created.and_then(|time| DateTime::from_timestamp(time.0.as_second(), 0)),
            generation: object.metadata.generation.unwrap_or_default(),
            requested: object.annotations().get(REQUESTED_AT).cloned(),
            spec: serde_json::from_value(part("spec")).map_err(|error| plain(&error.to_string())),
            status,
            unreadable,
            raw_status,
        }
    }
}

impl ObjectView {
    /// A condition, if it is there.
    pub fn condition(&self, type_: ConditionType) -> Option<&Condition> {
        condition::find(&self.status.conditions, type_)
    }

    /// Whether the spec says suspend.
    pub fn suspend(&self) -> bool {
        self.spec.as_ref().is_ok_and(|spec| spec.suspend)
    }

    /// For machines: what the screen says in words, and the status as it is.
    pub fn report(&self) -> Value {
        let ready = self.condition(ConditionType::Ready);
        json!({
            "namespace": self.namespace,
            "name": self.name,
            "ready": ready.and_then(|ready| match ready.status.as_str() {
                "True" => Some(true),
                "False" => Some(false),
                _ => None,
            }),
            "reason": ready.map(|ready| &ready.reason),
            "message": ready.map(|ready| &ready.message),
            "advice": advice(ready.map_or(Reason::Pending.as_str(), |ready| &ready.reason), ""),
            "suspend": self.suspend(),
            "status": self.raw_status,
        })
    }
}

/// What to do about a reason. None: nothing, the message says it already, or it is a reason that only a newer operator knows.
pub fn advice(reason: &str, message: &str) -> Option<String> {
    let advice = Reason::parse(reason).map(Reason::advice)?;
    (advice != NOTHING && !message.contains(&advice)).then_some(advice)
}
