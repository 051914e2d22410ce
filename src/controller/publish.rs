//! Fifth step: writes the status. Needs a client; what it writes was computed in `status`.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams, ValidationDirective};
use kube::core::error_boundary::InvalidObject;
use kube::runtime::events::{Event as KubeEvent, EventType, Recorder, Reporter};
use kube::{Api, Resource};
use serde_json::json;
use tokio::time::sleep;

use super::client::{ApiError, ApiServer, text};
use super::fetch::object;
use super::model::{AttemptResult, ParsedObject};
use super::status::events::{Event, events};
use super::{Context, status};
use crate::api::{AuditLogSweeper, AuditLogSweeperStatus, Sweeper, validate};
use crate::telemetry::metrics::Operation;

/// The name under which the operator owns the fields of the status.
const FIELD_MANAGER: &str = "audit-log-sweeper";

/// So often a write is tried on top of what others wrote meanwhile.
const MAX_WRITES: u32 = 5;

/// After the stop, one try to publish an outcome with rows may take this long, so that there is time for another.
const SHUTDOWN_WRITE_TIMEOUT: Duration = Duration::from_millis(2500);

/// The same for one without: what it says is made good by the next sweep.
const SHUTDOWN_WRITE_TIMEOUT_NO_ROWS: Duration = Duration::from_secs(1);

/// What was written.
struct Published {
    status: AuditLogSweeperStatus,
    /// What there is to tell of it.
    events: Vec<Event>,
}

/// Publishes a result. The cache keeps it until the API server accepts it.
///
/// # Errors
/// When the API server did not take it, or it is not known who leads; nothing is lost by trying again later.
pub async fn publish(context: &Context, result: Arc<AttemptResult>) -> Result<(), ApiError> {
    let uid = result.sweeper.uid();
    let leads = context.leadership.leads();
    // Without leadership only sweep attempts are kept, because only this replica knows their counts.
    let kept = (leads || result.sweep().is_some()).then(|| result.clone());
    // It holds even if the status cannot be written.
    let not_before = result.apply(&result.sweeper.status).next_schedule_time;
    context.cache.change(uid, |entry| {
        entry.pending.clone_from(&kept);
        entry.not_before = not_before;
    });
    if kept.is_none() {
        return Ok(());
    }
    let led = leads || result.led;
    // No other replica leads, so this one may lead again, and then publishes the whole result.
    if !led && !context.leadership.another_leads() && !context.stop.is_cancelled() {
        return Err(ApiError::NoLeader);
    }
    let published = tokio::select! {
        published = write_result(&context.server, &result, led, Utc::now()) => published?,
        given_up = give_up(context, &result) => return Err(ApiError::Timeout(given_up)),
    };
    context.cache.change(uid, |entry| {
        entry.pending = None;
        // The written status wins: a retry may be due before the slot.
        if let Some(Published { status, .. }) = &published {
            entry.not_before = status.next_schedule_time;
        }
    });
    if let Some(Published { events, .. }) = published.filter(|published| !published.events.is_empty()) {
        let (server, reporter) = (context.server.clone(), context.reporter.clone());
        let sending = async move { publish_events(&server, &reporter, &result.sweeper, &events).await };
        // During shutdown, events go on in the background while the Lease is released.
        context.stop.run_until_cancelled(context.events.spawn(sending)).await;
    }
    Ok(())
}

/// Waits until after a stop there is no more time for a try; how long that was.
async fn give_up(context: &Context, result: &AttemptResult) -> Duration {
    context.stop.cancelled().await;
    let time = match result.sweep() {
        Some(_) if result.has_rows() => SHUTDOWN_WRITE_TIMEOUT,
        Some(_) => SHUTDOWN_WRITE_TIMEOUT_NO_ROWS,
        None => Duration::ZERO,
    };
    sleep(time).await;
    time
}

/// Writes the next status. After a conflict, computes it again from the current status. Returns None if the object is gone or
/// replaced. Without leadership, adds only the counts.
async fn write_result(
    server: &ApiServer,
    result: &AttemptResult,
    led: bool,
    now: DateTime<Utc>,
) -> Result<Option<Published>, ApiError> {
    let AttemptResult { sweeper, .. } = result;
    let (mut metadata, mut old) = (sweeper.metadata.clone(), sweeper.status.clone());
    for _ in 0..MAX_WRITES {
        // An earlier write may have succeeded although its answer was lost.
        if result.is_in(&old) {
            return Ok(Some(Published { status: old, events: vec![] }));
        }
        // A later attempt or a newer generation stays; then only the totals change. A lastAttemptTime in the future is ignored,
        // because no attempt wrote it.
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
            Some(ParsedObject(Ok(now))) => (metadata, old) = (now.metadata, now.status.unwrap_or_default()),
            // The counts wait until it is valid again.
            Some(ParsedObject(Err(_))) => break,
            None => return Ok(None),
        }
    }
    Err(ApiError::Conflict)
}

/// Writes a status. On HTTP 422 it retries without `unsweepable` and `lastError`, which an older CRD may refuse.
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

/// Publishes events. Best effort: nothing waits for them, and the status has it all.
async fn publish_events(server: &ApiServer, reporter: &Reporter, sweeper: &Sweeper, events: &[Event]) {
    for event in events {
        // A recorder counts events with one reason as one and shows the first text alone. So each event has its own.
        let recorder = Recorder::new(server.client.clone(), reporter.clone());
        let kube_event = KubeEvent {
            type_: if event.warning { EventType::Warning } else { EventType::Normal },
            reason: event.reason.into(),
            note: Some(event.note.clone()),
            action: event.action.into(),
            secondary: None,
        };
        let about = sweeper.reference();
        if let Err(error) = server.request(Operation::PublishEvent, recorder.publish(&kube_event, &about)).await {
            tracing::debug!(reason = event.reason, error = text(&error), "an event could not be published");
        }
    }
}

/// Replaces the whole status: parts that a restored backup or a person wrote must not outlast the next write.
/// With the resourceVersion, so that it fails if others wrote meanwhile, or if another object has the name.
async fn write(server: &ApiServer, meta: &ObjectMeta, status: &AuditLogSweeperStatus) -> Result<(), ApiError> {
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    let api: Api<ParsedObject> = Api::namespaced(server.client.clone(), namespace);
    let operations = json!([
        { "op": "replace", "path": "/metadata/resourceVersion", "value": meta.resource_version },
        { "op": "add", "path": "/status", "value": status },
    ]);
    let patch = Patch::Json::<()>(serde_json::from_value(operations).map_err(kube::Error::SerdeError)?);
    // A field that an older CRD does not know is an error, and is not dropped without a word.
    let field_validation = Some(ValidationDirective::Strict);
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), field_validation, ..PatchParams::default() };
    let write = api.patch_status(meta.name.as_deref().unwrap_or_default(), &params, &patch);
    server.request_required(Operation::PatchStatus, namespace, write).await.map(drop)
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
    let Some(object) = server.request_required(Operation::GetObject, namespace, get).await? else { return Ok(()) };
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
