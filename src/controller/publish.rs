//! Fifth step: writes the status. Needs a client; what it writes was computed in `status`.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams, ValidationDirective};
use kube::core::error_boundary::InvalidObject;
use kube::runtime::events::{Event as KubeEvent, EventType, Recorder};
use kube::{Api, Resource};
use serde_json::json;
use tokio::time::sleep;

use super::client::{ApiError, ApiServer, text};
use super::fetch::object;
use super::model::{AttemptResult, Fetched};
use super::status::events::{Event, events};
use super::{Context, status};
use crate::api::{AuditLogSweeper, AuditLogSweeperStatus, Sweeper, validate};
use crate::telemetry::metrics::Operation;

/// The name under which the operator owns the fields of the status.
const MANAGER: &str = "audit-log-sweeper";

/// So often a write is tried on top of what others wrote meanwhile.
const ATTEMPTS: u32 = 5;

/// After the stop, one try to publish an outcome with rows may take this long, so that there is time for another.
const STOPPED_TIMEOUT: Duration = Duration::from_millis(2500);

/// The same for one without: what it says is made good by the next sweep.
const STOPPED_TIMEOUT_WITHOUT_ROWS: Duration = Duration::from_secs(1);

/// What was written.
struct Published {
    status: AuditLogSweeperStatus,
    /// What there is to tell of it.
    events: Vec<Event>,
}

/// Publishes a result. It is remembered until the API server has taken it.
///
/// # Errors
/// When the API server did not take it, or it is not known who leads; nothing is lost by trying again later.
pub async fn publish(context: &Context, result: Arc<AttemptResult>) -> Result<(), ApiError> {
    let uid = result.sweeper.uid();
    let leads = context.leadership.leads();
    // The leader says by itself what it sees; only attempts count something.
    let kept = (leads || result.sweep().is_some()).then(|| result.clone());
    context.cache.change(uid, |entry| {
        entry.pending.clone_from(&kept);
        // A status that cannot be written changes nothing of it.
        entry.not_before = result.apply(&result.sweeper.status).next_schedule_time;
    });
    if kept.is_none() {
        return Ok(());
    }
    let led = leads || result.led;
    // While no other replica leads, this one may lead again, and then goes on with what it began.
    if !led && !context.leadership.another_leads() && !context.stop.is_cancelled() {
        return Err(ApiError::NoLeader);
    }
    let published = tokio::select! {
        published = write_result(&context.server, &result, led, Utc::now()) => published?,
        given_up = give_up(context, &result) => return Err(ApiError::Timeout(given_up)),
    };
    context.cache.change(uid, |entry| {
        entry.pending = None;
        // What was written is what holds: a retry may come sooner than the slot.
        if let Some(Published { status, .. }) = &published {
            entry.not_before = status.next_schedule_time;
        }
    });
    if let Some(Published { events, .. }) = published.filter(|published| !published.events.is_empty()) {
        let (server, recorder) = (context.server.clone(), context.recorder.clone());
        let telling = async move { publish_events(&server, &recorder, &result.sweeper, &events).await };
        // At the end they keep nobody waiting: the lease is given back meanwhile.
        context.stop.run_until_cancelled(context.events.spawn(telling)).await;
    }
    Ok(())
}

/// Waits until after a stop there is no more time for a try; how long that was.
async fn give_up(context: &Context, result: &AttemptResult) -> Duration {
    context.stop.cancelled().await;
    let time = match result.sweep() {
        Some(_) if result.has_rows() => STOPPED_TIMEOUT,
        Some(_) => STOPPED_TIMEOUT_WITHOUT_ROWS,
        None => Duration::ZERO,
    };
    sleep(time).await;
    time
}

/// Writes the status that follows from a result onto the one that it came from, or onto what is there by now. None: the
/// object is gone, or another one has its name. Without `led` it only adds the counts: see [`AttemptResult`].
async fn write_result(
    server: &ApiServer,
    result: &AttemptResult,
    led: bool,
    now: DateTime<Utc>,
) -> Result<Option<Published>, ApiError> {
    let AttemptResult { sweeper, .. } = result;
    let (mut metadata, mut old) = (sweeper.metadata.clone(), sweeper.status.clone());
    for _ in 0..ATTEMPTS {
        // An earlier try may have arrived, and only its answer not.
        if result.is_in(&old) {
            return Ok(Some(Published { status: old, events: vec![] }));
        }
        // A later attempt of another replica, or what it says of a newer spec, stands; only the totals take ours in. Ignore a
        // lastAttemptTime in the future: no attempt wrote it.
        let later = |start| old.last_attempt_time.is_some_and(|last| start < last && last <= now);
        // A restored status may have seen generations that this object never had.
        let newer =
            [metadata.generation, old.observed_generation].iter().all(|seen| *seen > Some(sweeper.generation()));
        let overtaken = !led || newer || result.sweep().is_some_and(|attempt| later(attempt.start));
        let new = if overtaken { result.apply_totals(&old) } else { result.apply(&old) };
        if old == new {
            return Ok(Some(Published { status: old, events: vec![] }));
        }
        let events = if overtaken { vec![] } else { events(result, &old, &new) };
        match write_or_reduce(server, &metadata, &new).await {
            Ok(()) => return Ok(Some(Published { status: new, events })),
            // It is gone, or others wrote it meanwhile: look.
            Err(error) if matches!(error.code(), Some(404 | 409)) => {}
            Err(error) => return Err(error),
        }
        match object(server, sweeper.namespace(), sweeper.name()).await? {
            Some(now) if now.meta().uid != sweeper.metadata.uid => return Ok(None),
            Some(Fetched(Ok(now))) => (metadata, old) = (now.metadata, now.status.unwrap_or_default()),
            // The counts wait until it is valid again.
            Some(Fetched(Err(_))) => break,
            None => return Ok(None),
        }
    }
    Err(ApiError::Conflict)
}

/// Writes a status. If the API server finds it invalid, it may be too long for an older CRD: then without its texts.
async fn write_or_reduce(server: &ApiServer, meta: &ObjectMeta, new: &AuditLogSweeperStatus) -> Result<(), ApiError> {
    match write(server, meta, new).await {
        Err(error) if error.code() == Some(422) => {
            tracing::error!(
                namespace = meta.namespace,
                name = meta.name,
                error = text(&error),
                "the status was refused"
            );
            let reduced = AuditLogSweeperStatus { unsweepable: None, last_error: None, ..new.clone() };
            write(server, meta, &reduced).await.map_err(|_| error)
        }
        written => written,
    }
}

/// Tells what happened, by events. Best effort: nothing waits for them, and the status has it all.
async fn publish_events(server: &ApiServer, recorder: &Recorder, sweeper: &Sweeper, events: &[Event]) {
    for event in events {
        let kube_event = KubeEvent {
            type_: if event.warning { EventType::Warning } else { EventType::Normal },
            reason: event.reason.into(),
            note: Some(event.note.clone()),
            action: event.action.into(),
            secondary: None,
        };
        let about = sweeper.reference();
        if let Err(error) = server.within(Operation::PublishEvent, recorder.publish(&kube_event, &about)).await {
            tracing::debug!(reason = event.reason, error = text(&error), "an event could not be published");
        }
    }
}

/// Replaces the whole status: parts that a restored backup or a person wrote must not outlast the next write.
/// With the resourceVersion, so that it fails if others wrote meanwhile, or if another object has the name.
async fn write(server: &ApiServer, meta: &ObjectMeta, status: &AuditLogSweeperStatus) -> Result<(), ApiError> {
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    let api: Api<Fetched> = Api::namespaced(server.client.clone(), namespace);
    let operations = json!([
        { "op": "replace", "path": "/metadata/resourceVersion", "value": meta.resource_version },
        { "op": "add", "path": "/status", "value": status },
    ]);
    let patch = Patch::Json::<()>(serde_json::from_value(operations).map_err(kube::Error::SerdeError)?);
    // A field that an older CRD does not know is an error, and is not dropped without a word.
    let field_validation = Some(ValidationDirective::Strict);
    let params = PatchParams { field_manager: Some(MANAGER.into()), field_validation, ..PatchParams::default() };
    let write = api.patch_status(meta.name.as_deref().unwrap_or_default(), &params, &patch);
    server.essential(Operation::PatchStatus, namespace, write).await.map(drop)
}

/// Says of an object that cannot be read, or breaks the rules, what is wrong with it.
///
/// # Errors
/// When the API did not take it.
pub async fn publish_invalid(
    server: &ApiServer,
    InvalidObject { metadata: meta, error }: &InvalidObject,
    now: DateTime<Utc>,
) -> Result<(), ApiError> {
    tracing::warn!(namespace = meta.namespace, name = meta.name, error, "invalid object");
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
    write(server, &object.metadata, &new).await
}
