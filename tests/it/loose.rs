//! Objects that a looser CRD let in, as one of another version might: judged by the rules of ours before anything is
//! done with a database.

use kube::Api;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};
use support::json::merged;
use support::process::output;
use support::wait::eventually;

use crate::fixtures::operator::{WAIT_TIMEOUT, has, replica};
use crate::fixtures::{AuditTable, DedicatedControlPlane};

#[tokio::test]
async fn an_object_that_breaks_the_rules_is_told_so_and_stops_no_other() {
    // For its own CRD.
    let DedicatedControlPlane { plane, client, namespace, scratch, config } = DedicatedControlPlane::new().await;
    let loose = json!([{ "op": "replace", "path": "/spec/versions/0/schema/openAPIV3Schema/properties/spec",
        "value": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } }]);
    let crd = ["patch", "crd", "auditlogsweepers.auditlog.dev", "--type=json", "-p"];
    output(plane.kubectl().args(crd).arg(loose.to_string())).unwrap();

    let log = AuditTable::new().await;
    log.start(1, "2 h").await;
    log.start(2, "1 s").await;
    let slow = AuditTable::held(1, 50).await;
    for (name, log) in [("db", &log), ("slow", &slow)] {
        let metadata = json!({ "name": name, "namespace": namespace });
        let secret = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": { "uri": log.database.uri() } });
        let file = scratch.write("secret.json", secret.to_string(), None).unwrap();
        output(plane.kubectl().arg("apply").arg("-f").arg(file)).unwrap();
    }
    let kind = ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("auditlog.dev", "v1alpha1", "AuditLogSweeper"),
        "auditlogsweepers",
    );
    let objects: &Api<DynamicObject> = &Api::namespaced_with(client, &namespace, &kind);
    let apply = async |name: &str, rest: Value| {
        let spec = merged(
            json!({ "database": { "secretRef": { "name": "db" }, "tls": { "mode": "Disable" } }, "timeout": "1h", "period": "1h" }),
            &rest,
        );
        let object = json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": name }, "spec": spec });
        let applied = objects.patch(name, &PatchParams::apply("test").force(), &Patch::Apply(&object)).await;
        applied.map(drop).map_err(|error| error.to_string())
    };
    // Each with what it is told. The malformed one cannot even be read.
    let wrong = [
        ("malformed", json!({ "period": ["every", "day"] }), "Fix the spec"),
        // Of a later version: without it, more rows would be swept than the user means.
        ("unknown", json!({ "ofALaterVersion": 5 }), "does not know spec.ofALaterVersion"),
        ("nested", json!({ "columns": { "ofALaterVersion": "x" } }), "does not know spec.columns.ofALaterVersion"),
        ("timeout", json!({ "timeout": "0s" }), "spec.timeout: must be a duration such as 4h or 1h30m, from 1m"),
        ("period", json!({ "period": "0s" }), "spec.period: must be a duration such as 4h or 1h30m, from 5s"),
        ("limit", json!({ "limit": -5 }), "spec.limit: Invalid value: -5: should be greater than or equal to 1"),
        ("columns", json!({ "columns": { "id": "time_started" } }), "must be three different columns"),
    ];
    for (name, rest, _) in &wrong {
        // The API server takes the looser schema up a moment later.
        eventually("an object to be let in", WAIT_TIMEOUT, async || apply(name, rest.clone()).await).await;
    }
    let _operator = replica("operator", &config, &scratch, &namespace, &[]);
    let shown = |name: &'static str, wanted: &'static str| {
        eventually(name, WAIT_TIMEOUT, async move || {
            let object = objects.get(name).await.map_err(|error| error.to_string())?;
            let status = object.data["status"].clone();
            if has(&status, wanted) { Ok(status) } else { Err(format!("{status:#}")) }
        })
    };
    for (name, _, said) in &wrong {
        let status = shown(name, "Ready=False/InvalidSpec").await;
        assert!(has(&status, "Stalled=True/InvalidSpec"), "{status:#}");
        assert!(status["lastError"]["message"].as_str().unwrap().contains(said), "{name}: {status:#}");
        assert_eq!((&status["nextScheduleTime"], &status["totals"]), (&Value::Null, &Value::Null), "{status:#}");
    }
    // What is mended is swept like any other, and the request that runs is left alone by all.
    apply("timeout", json!({})).await.unwrap();
    shown("timeout", "Ready=True/Swept").await;
    // What was well, and is no more, is swept no more: not even when it is asked for.
    apply("timeout", json!({ "timeout": "0s" })).await.unwrap();
    let ask = json!({ "metadata": { "annotations": { "auditlog.dev/requestedAt": "now" } } });
    objects.patch("timeout", &PatchParams::default(), &Patch::Merge(&ask)).await.unwrap();
    shown("timeout", "Ready=False/InvalidSpec").await;
    apply("good", json!({})).await.unwrap();
    shown("good", "Ready=True/Swept").await;
    assert_eq!((log.timed_out().await, log.open().await), (vec![1], vec![2]));

    // An edit during the sweep makes the object unreadable: that is said, and the rows are counted once it can be read.
    let database = json!({ "secretRef": { "name": "slow" }, "tls": { "mode": "Disable" } });
    apply("slow", json!({ "database": database, "batchSize": 1, "limit": 40 })).await.unwrap();
    slow.until_swept(1).await;
    apply("slow", json!({ "database": database, "batchSize": 1, "limit": 40, "ofALaterVersion": 5 })).await.unwrap();
    slow.release().await;
    let status = shown("slow", "Ready=False/InvalidSpec").await;
    assert_eq!(status["totals"], Value::Null, "{status:#}");
    let rows = slow.timed_out().await;
    apply("slow", json!({ "database": database, "batchSize": 1, "limit": 40, "suspend": true })).await.unwrap();
    let status = shown("slow", "Suspended=True/Suspended").await;
    assert_eq!((&status["totals"]["timedOut"], rows), (&json!(40), (1..=40).collect()), "{status:#}");
}
