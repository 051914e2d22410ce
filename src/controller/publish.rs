//! Fifth step: writes the status. Needs a client; what it writes was computed in `status`.

use std::fmt::Debug;

use chrono::{DateTime, Utc};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams, ValidationDirective};
use kube::core::NamespaceResourceScope;
use kube::runtime::events::{Event as KubeEvent, EventType, Recorder};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::client::{ApiError, ApiServer, text};
use super::fetch::object;
use super::model::{Fetched, Pending};
use super::status;
use super::status::events::{Event, events};
use crate::api::{AuditLogSweeper, AuditLogSweeperStatus, validate};
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
/// or another one has its name. Without `led` it only adds the counts: see [`Pending`].
///
/// # Errors
/// When the API server did not take it; nothing is lost by trying again later.
pub async fn publish(
    server: &ApiServer,
    base: &AuditLogSweeper,
    Pending { subject, update, .. }: &Pending,
    led: bool,
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
        // A later attempt of another replica, or what it says of a newer spec, stands; only the totals take ours in. Ignore a
        // lastAttemptTime in the future: no attempt wrote it.
        let later = |start| old.last_attempt_time.is_some_and(|last| start < last && last <= now);
        let newer = old.observed_generation > Some(subject.generation);
        let overtaken = !led || newer || update.start().is_some_and(later);
        let new = if overtaken { update.apply_totals(subject, &old) } else { update.apply(subject, &old) };
        if old == new {
            return Ok(Some(Published { object: base, events: vec![] }));
        }
        let events = if overtaken { vec![] } else { events(update, &old, &new) };
        match write_or_reduce(server, &base.metadata, new).await {
            Ok(object) => return Ok(Some(Published { object, events })),
            // It is gone, or others wrote it meanwhile: look.
            Err(error) if matches!(error.code(), Some(404 | 409)) => {}
            Err(error) => return Err(error),
        }
        match object(server, &namespace, &base.name_any()).await? {
            Some(Fetched(Ok(now))) if now.uid().as_deref() == Some(&subject.uid) => base = now,
            // The counts wait until it is valid again.
            Some(Fetched(Err(invalid))) if invalid.metadata.uid.as_deref() == Some(&subject.uid) => break,
            _ => return Ok(None),
        }
    }
    Err(ApiError::Conflict)
}

/// Writes a status. If the API server finds it invalid, it may be too long for an older CRD: then without its texts.
async fn write_or_reduce(
    server: &ApiServer,
    meta: &ObjectMeta,
    new: AuditLogSweeperStatus,
) -> Result<AuditLogSweeper, ApiError> {
    match write(server, meta, &new).await {
        Err(error) if error.code() == Some(422) => {
            tracing::error!(
                namespace = meta.namespace,
                name = meta.name,
                error = text(&error),
                "the status was refused"
            );
            let reduced = AuditLogSweeperStatus { unsweepable: None, last_error: None, ..new };
            write(server, meta, &reduced).await.map_err(|_| error)
        }
        written => written,
    }
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

/// Replaces the whole status: parts that a restored backup or a person wrote must not outlast the next write.
/// With the resourceVersion, so that it fails if others wrote meanwhile, or if another object has the name.
async fn write<K>(server: &ApiServer, meta: &ObjectMeta, status: &AuditLogSweeperStatus) -> Result<K, ApiError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    let api: Api<K> = Api::namespaced(server.client.clone(), namespace);
    let operations = json!([
        { "op": "replace", "path": "/metadata/resourceVersion", "value": meta.resource_version },
        { "op": "add", "path": "/status", "value": status },
    ]);
    let patch = Patch::Json::<()>(serde_json::from_value(operations).map_err(kube::Error::SerdeError)?);
    // A field that an older CRD does not know is an error, and is not dropped without a word.
    let field_validation = Some(ValidationDirective::Strict);
    let params = PatchParams { field_manager: Some(MANAGER.into()), field_validation, ..PatchParams::default() };
    let write = api.patch_status(meta.name.as_deref().unwrap_or_default(), &params, &patch);
    server.essential(Operation::PatchStatus, namespace, write).await
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
    let old = validate::readable_status(&old);
    // It is about another spec, or another object: the watch will tell.
    if (&object.metadata.uid, object.metadata.generation) != (&meta.uid, meta.generation) {
        return Ok(());
    }
    let generation = object.metadata.generation.unwrap_or_default();
    let new = status::invalid(&old, generation, error, now);
    if old == new {
        return Ok(());
    }
    write::<Fetched>(server, &object.metadata, &new).await.map(drop)
}
