//! Fifth step: writes the status. Needs a client; what it writes was computed in `outcome`.

use std::fmt::Debug;

use chrono::{DateTime, Utc};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::runtime::events::{Event as KubeEvent, EventType, Recorder};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::client::{ApiError, ApiServer, text};
use super::fetch::object;
use super::model::Fetched;
use super::status::events::{Event, events};
use super::status::{self, Subject, Update};
use crate::api::condition::ConditionType;
use crate::api::{AuditLogSweeper, AuditLogSweeperStatus};
use crate::telemetry::metrics::Operation;

/// The name under which the operator owns the fields of the status.
const MANAGER: &str = "audit-log-sweeper";

/// So often a write is tried on top of what others wrote meanwhile.
const ATTEMPTS: u32 = 5;

/// What was written.
#[derive(Debug)]
pub struct Published {
    /// The object as it is now.
    pub object: AuditLogSweeper,
    /// What there is to tell of it.
    pub events: Vec<Event>,
}

/// Writes the status that follows from `update` onto `base`, or onto what is there by now. None: the object is gone,
/// or another one has its name.
///
/// # Errors
/// When the API did not take it; nothing is lost by trying again later.
pub async fn publish(
    server: &ApiServer,
    base: &AuditLogSweeper,
    subject: &Subject,
    update: &Update,
    now: DateTime<Utc>,
) -> Result<Option<Published>, ApiError> {
    let namespace = base.namespace().unwrap_or_default();
    let mut base = base.clone();
    for _ in 0..ATTEMPTS {
        let old = base.status.clone().unwrap_or_default();
        // An earlier try may have arrived, and only its answer not.
        if update.is_in(subject, &old) {
            return Ok(Some(Published { object: base, events: vec![] }));
        }
        // Someone else's later attempt stands; only the sums take ours in. A time in the future is no attempt's.
        let later = |start| old.last_attempt_time.is_some_and(|last| start < last && last <= now);
        let overtaken = update.start().is_some_and(later);
        let new = if overtaken { update.apply_totals(subject, &old) } else { update.apply(subject, &old) };
        if same(&old, &new) {
            return Ok(Some(Published { object: base, events: vec![] }));
        }
        let events = if overtaken { vec![] } else { events(update, &old, &new) };
        match patch::<AuditLogSweeper>(server, &base.metadata, &json!(new)).await {
            Ok(object) => return Ok(Some(Published { object, events })),
            Err(error) if error.code() == Some(404) => return Ok(None),
            Err(error) if error.code() == Some(409) => {}
            // It would be refused for ever. Without what may be too long, it may pass; else only the counts are lost.
            Err(error) if error.code() == Some(422) => {
                tracing::error!(%namespace, name = base.name_any(), error = text(&error), "the status was refused");
                let reduced = AuditLogSweeperStatus { unsweepable: None, last_error: None, ..new };
                let written = patch(server, &base.metadata, &json!(reduced)).await.ok();
                return Ok(written.map(|object| Published { object, events }));
            }
            Err(error) => return Err(error),
        }
        match object(server, &namespace, &base.name_any()).await? {
            Some(Fetched(Ok(now))) if now.uid().as_deref() == Some(&subject.uid) => base = now,
            // Gone, replaced, or unreadable by now: there is nothing to write onto.
            _ => return Ok(None),
        }
    }
    Err(ApiError::Conflict)
}

/// Tells what happened, by events. Best effort: nothing waits for them, and the status has it all.
pub async fn publish_events(server: &ApiServer, recorder: &Recorder, object: &AuditLogSweeper, events: &[Event]) {
    for event in events {
        let kube_event = KubeEvent {
            type_: if event.warning { EventType::Warning } else { EventType::Normal },
            reason: event.reason.into(),
            note: Some(event.note.clone()),
            action: event.action.into(),
            secondary: None,
        };
        let about = object.object_ref(&());
        if let Err(error) = server.within(Operation::PublishEvent, recorder.publish(&kube_event, &about)).await {
            tracing::debug!(reason = event.reason, error = text(&error), "an event could not be published");
        }
    }
}

/// Server-side apply with the resourceVersion: without it, a write for an object that is gone would land on a new one
/// of the same name.
async fn patch<K>(server: &ApiServer, meta: &ObjectMeta, status: &Value) -> Result<K, ApiError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    let api: Api<K> = Api::namespaced(server.client.clone(), namespace);
    let name = meta.name.as_deref().unwrap_or_default();
    let body = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": { "name": name, "resourceVersion": meta.resource_version },
        "status": status,
    });
    let (params, body) = (PatchParams::apply(MANAGER).force(), Patch::Apply(&body));
    server.essential(Operation::PatchStatus, namespace, api.patch_status(name, &params, &body)).await
}

/// Whether a write would change nothing of ours. Conditions that others set are not ours.
fn same(old: &AuditLogSweeperStatus, new: &AuditLogSweeperStatus) -> bool {
    let mut old = old.clone();
    old.conditions.retain(|c| ConditionType::ALL.iter().any(|ours| ours.as_str() == c.type_));
    old == *new
}

/// Says of an object that cannot be read, or breaks the rules, what is wrong with it.
///
/// # Errors
/// When the API did not take it.
pub async fn publish_invalid(
    server: &ApiServer,
    meta: &ObjectMeta,
    error: &str,
    now: DateTime<Utc>,
) -> Result<(), ApiError> {
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    let kind = ApiResource::erase::<AuditLogSweeper>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(server.client.clone(), namespace, &kind);
    let get = api.get_opt(meta.name.as_deref().unwrap_or_default());
    let Some(object) = server.essential(Operation::GetObject, namespace, get).await? else { return Ok(()) };
    let old = object.data.get("status").cloned().unwrap_or_default();
    let old: AuditLogSweeperStatus = serde_json::from_value(old).unwrap_or_default();
    // It is about another spec, or another object: the watch will tell.
    if (&object.metadata.uid, object.metadata.generation) != (&meta.uid, meta.generation) {
        return Ok(());
    }
    let generation = object.metadata.generation.unwrap_or_default();
    let new = status::invalid(&old, generation, error, now);
    if same(&old, &new) {
        return Ok(());
    }
    patch::<Fetched>(server, &object.metadata, &json!(new)).await.map(drop)
}
