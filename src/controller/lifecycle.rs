//! Supervises the work on one object. Cancels it when the object is deleted, replaced, or labelled for another install. Turns
//! a panic into a failure of this object.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::time::Duration;

use futures::FutureExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::model::ParsedObject;
use crate::api::{Failure, Reason};

/// How often it looks at what the watch has seen, which costs no request.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// What the watches have seen.
pub type Stores = [Store<ParsedObject>];

/// Runs `work` to its end. Cancels `stop` if this install no longer owns the object.
pub async fn run_while_owned<T>(
    stores: &Stores,
    object: &ObjectMeta,
    stop: &CancellationToken,
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    tokio::select! {
        done = &mut work => return done,
        () = wait_until_gone(stores, object) => {}
    }
    let (namespace, name) = (&object.namespace, &object.name);
    info!(namespace, name, "deleted, replaced, or labelled for others: ending what is being done for it");
    stop.cancel();
    work.await
}

/// Polls until this install no longer owns the object. The first poll is delayed, because the watch may lag.
async fn wait_until_gone(stores: &Stores, object: &ObjectMeta) {
    loop {
        sleep(POLL_INTERVAL).await;
        if !is_owned(stores, object) {
            return;
        }
    }
}

fn is_owned(stores: &Stores, object: &ObjectMeta) -> bool {
    let key = ObjectRef::new(object.name.as_deref().unwrap_or_default())
        .within(object.namespace.as_deref().unwrap_or_default());
    stores.iter().filter_map(|store| store.get(&key)).any(|seen| {
        let seen = seen.meta();
        seen.uid == object.uid && seen.deletion_timestamp.is_none()
    })
}

/// Converts a panic into a failure of this object. The panic message is dropped, because it may contain row data.
pub async fn catch_panic<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    AssertUnwindSafe(work).catch_unwind().await.map_err(|_| {
        Failure::new(
            Reason::InternalError,
            "a bug in the operator ended this attempt; its log says where. Please report it",
        )
    })
}

#[cfg(test)]
mod tests {
    use kube::runtime::reflector;
    use kube::runtime::reflector::store::Writer;
    use kube::runtime::watcher::Event;
    use serde_json::json;
    use tokio::time::timeout;

    use super::*;
    use crate::api::{AuditLogSweeper, Class};

    fn object(metadata: serde_json::Value) -> AuditLogSweeper {
        let whole = support::json::merged(json!({ "name": "app", "namespace": "n", "uid": "1" }), &metadata);
        let spec = json!({ "database": { "secretRef": { "name": "db" } } });
        serde_json::from_value(json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": whole, "spec": spec }))
            .unwrap()
    }

    fn seen(metadata: serde_json::Value) -> ParsedObject {
        ParsedObject(Ok(object(metadata)))
    }

    #[test]
    fn only_an_object_that_is_deleted_replaced_or_labelled_for_others_has_left() {
        let stays_after = |event| {
            let mut writer = Writer::default();
            writer.apply_watcher_event(&Event::Apply(seen(json!({}))));
            writer.apply_watcher_event(&event);
            is_owned(&[reflector::store().0, writer.as_reader()], &object(json!({})).metadata)
        };
        assert!(!stays_after(Event::Delete(seen(json!({})))), "deleted, or labelled for others");
        assert!(!stays_after(Event::InitDone), "a list that is without it");
        assert!(!stays_after(Event::Apply(seen(json!({ "uid": "2" })))), "replaced");
        assert!(!stays_after(Event::Apply(seen(json!({ "deletionTimestamp": "2026-01-01T00:00:00Z" })))));
        assert!(stays_after(Event::Apply(seen(json!({ "generation": 2, "labels": { "a": "b" } })))));
        assert!(stays_after(Event::Delete(seen(json!({ "name": "other" })))));
        assert!(stays_after(Event::Delete(seen(json!({ "namespace": "other" })))));
        assert!(stays_after(Event::Init), "the watch is being opened again");
    }

    #[tokio::test]
    async fn work_for_an_object_that_has_left_is_told_to_end_and_waited_for() {
        let stop = CancellationToken::new();
        let work = async {
            timeout(Duration::from_secs(1), stop.cancelled()).await.unwrap();
            tokio::task::yield_now().await;
            7
        };
        assert_eq!(run_while_owned(&[], &object(json!({})).metadata, &stop, work).await, 7);
        let (store, mut writer) = reflector::store();
        writer.apply_watcher_event(&Event::Apply(seen(json!({}))));
        let stop = CancellationToken::new();
        let work = timeout(POLL_INTERVAL * 2, stop.cancelled());
        assert!(run_while_owned(&[store], &object(json!({})).metadata, &stop, work).await.is_err(), "it is there");
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_that_says_nothing_of_what_it_carried() {
        let failure = catch_panic::<()>(async { panic!("hunter2") }).await.unwrap_err();
        assert_eq!((failure.reason, failure.class), (Reason::InternalError, Class::Transient));
        assert!(!failure.message.contains("hunter2"));
        assert_eq!(catch_panic(async { 1 }).await.unwrap(), 1);
    }
}
