//! Objects that an install works on no longer: deleted, replaced, or labelled for another. Their sweeps end within about
//! a second, and none begins.

use audit_log_sweeper::api::AuditLogSweeper;
use chrono::Utc;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use support::wait::eventually;
use tokio::net::TcpListener;

use crate::fixtures::operator::{RELEASE, WAIT_TIMEOUT, allow, replica};
use crate::fixtures::{AuditTable, Operator};

/// Waits until nobody sweeps.
async fn until_nobody_sweeps(log: &AuditTable) {
    eventually("the end of the session", WAIT_TIMEOUT, async || {
        let sessions = log.sweeping_sessions().await;
        if sessions.is_empty() { Ok(()) } else { Err(format!("{sessions:?}")) }
    })
    .await;
}

#[tokio::test]
async fn a_deleted_object_is_swept_no_further() {
    let (log, operator) = (AuditTable::slow(200).await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 1, "period": "5s", "limit": 200 })).await;
    log.until_swept(2).await;
    operator.api().delete("app", &DeleteParams::default()).await.unwrap();
    let left = Utc::now();
    until_nobody_sweeps(&log).await;
    let rows = log.swept_by_the_first(left).await;
    assert_eq!(log.timed_out().await, (1..=rows).collect::<Vec<_>>());
    assert_eq!(log.trail().await.len(), 1);
}

#[tokio::test]
async fn an_object_that_is_being_deleted_is_swept_no_more_and_its_rows_are_counted() {
    let (log, operator) = (AuditTable::slow(200).await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 1, "period": "5s", "limit": 200, "suspend": true })).await;
    let metadata = |metadata: Value| json!({ "metadata": metadata });
    let patch = async |patch: Value| {
        operator.api().patch("app", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    };
    patch(metadata(json!({ "finalizers": ["example.com/hold"] }))).await;
    patch(json!({ "spec": { "suspend": false } })).await;
    log.until_swept(2).await;
    operator.api().delete("app", &DeleteParams::default()).await.unwrap();
    let left = Utc::now();
    let status = operator.until("app", "the end of the sweep", |s| s["lastSweep"] != Value::Null).await;
    let rows = log.swept_by_the_first(left).await;
    assert_eq!(log.timed_out().await, (1..=rows).collect::<Vec<_>>());
    assert_eq!(status["totals"], json!({ "sweeps": 1, "failures": 0, "timedOut": rows }), "{status:#}");
    assert_eq!(status["lastSweep"]["outcome"], json!("Stopped"));
    // Neither on schedule, which has it due at once, nor when asked.
    patch(metadata(json!({ "annotations": { "auditlog.dev/requestedAt": "now" } }))).await;
    let other = AuditTable::new().await;
    operator.secret("other", &[("uri", &other.database.uri())]).await;
    let database = json!({ "secretRef": { "name": "other" }, "tls": { "mode": "Disable" } });
    operator.apply("other", json!({ "database": database, "period": "1h" })).await;
    operator.until("other", "its sweep", |s| s["lastSweep"] != Value::Null).await;
    assert_eq!(log.trail().await.len(), 1);
    assert_eq!(json!(operator.api().get("app").await.unwrap().status), status);
    patch(metadata(json!({ "finalizers": null }))).await;
    eventually("the object to be gone", WAIT_TIMEOUT, async || {
        let object: Option<AuditLogSweeper> = operator.api().get_opt("app").await.map_err(|error| error.to_string())?;
        object.map_or(Ok(()), |object| Err(format!("{:?}", object.metadata)))
    })
    .await;
}

async fn label(operator: &Operator, name: &str, shard: &str) {
    let labels = json!({ "metadata": { "labels": { "shard": shard } } });
    operator.api().patch(name, &PatchParams::default(), &Patch::Merge(&labels)).await.unwrap();
}

#[tokio::test]
async fn an_object_that_goes_to_another_install_during_its_sweep_is_left_to_that() {
    let (log, mut operator) = (AuditTable::slow(200).await, Operator::absent().await);
    operator.secret_for(&log).await;
    allow(
        &operator.client,
        &operator.namespace,
        RELEASE,
        &[json!({
            "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"],
        })],
    )
    .await;
    operator.start_with(&["--selector=shard in (a),!never"]).await;
    let config = operator.kubeconfig(None).await;
    let args = ["--selector=shard=b", "--lease-name=shard-b"];
    let _second = replica("b", &config, &operator.scratch, &operator.namespace, &args);
    operator.apply("app", json!({ "batchSize": 1, "period": "1h", "limit": 80, "suspend": true })).await;
    label(&operator, "app", "a").await;
    let resume = json!({ "spec": { "suspend": false } });
    operator.api().patch("app", &PatchParams::default(), &Patch::Merge(&resume)).await.unwrap();
    log.until_swept(4).await;
    label(&operator, "app", "b").await;
    let left = Utc::now();
    let status = operator.until("app", "both sweeps", |s| s["totals"]["sweeps"] == json!(2)).await;
    until_nobody_sweeps(&log).await;
    let first = log.swept_by_the_first(left).await;
    let trail = log.trail().await;
    assert_eq!(trail.len(), 2, "{trail:?}");
    // What either did is counted, once. A row that the first gave back may have been stepped over by the second.
    let (second, done) = (trail[1].2, log.timed_out().await);
    assert_eq!(status["totals"]["timedOut"], json!(first + second), "{status:#}");
    assert_eq!(done.len(), usize::try_from(first + second).unwrap());
    assert!(first < 40 && second <= 80 && done.iter().all(|row| *row <= first + second + 1), "{trail:?} {done:?}");
}

#[tokio::test]
async fn an_object_that_goes_to_another_install_while_it_waits_for_its_turn_is_left_to_that() {
    let (held, log, mut operator) = (AuditTable::held(1, 3).await, AuditTable::new().await, Operator::absent().await);
    log.start_many(3).await;
    operator.secret("held", &[("uri", &held.database.uri())]).await;
    operator.secret_for(&log).await;
    operator.start_with(&["--selector=shard=a", "--max-concurrent-sweeps=1"]).await;
    let create = async |name: &str, spec: Value| {
        operator.apply(name, spec).await;
        label(&operator, name, "a").await;
    };
    let database = json!({ "secretRef": { "name": "held" }, "tls": { "mode": "Disable" } });
    create("holder", json!({ "database": database, "batchSize": 1, "period": "1h" })).await;
    held.until_swept(1).await;
    create("moves", json!({ "period": "1h", "limit": 1 })).await;
    eventually("it to wait for its turn", WAIT_TIMEOUT, async || {
        let sessions = log.sweeping_sessions().await;
        if sessions.is_empty() { Err("nobody is connected".to_owned()) } else { Ok(()) }
    })
    .await;
    label(&operator, "moves", "b").await;
    create("stays", json!({ "period": "1h", "limit": 1 })).await;
    eventually("its departure to be seen", WAIT_TIMEOUT, async || {
        if operator.log().contains("labelled for others") { Ok(()) } else { Err(operator.log()) }
    })
    .await;
    held.release().await;
    operator.until("stays", "its sweep", |s| s["lastSweep"] != Value::Null).await;
    // Turns come in the order of arrival: the one that moved would have had its own before this.
    create("last", json!({ "period": "1h", "limit": 1 })).await;
    operator.until("last", "its sweep", |s| s["lastSweep"] != Value::Null).await;
    let moved = json!(operator.api().get("moves").await.unwrap().status);
    assert_eq!((log.timed_out().await, &moved["lastSweep"]), (vec![1, 2], &Value::Null), "{moved:#}");
}

#[tokio::test]
async fn an_object_that_leaves_while_it_connects_is_left_as_it_is() {
    let (log, mut operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("postgresql://u:p@{}/d", silent.local_addr().unwrap());
    operator.secret("silent", &[("uri", &uri)]).await;
    operator.start_with(&["--selector=shard=a"]).await;
    let database = json!({ "secretRef": { "name": "silent" }, "tls": { "mode": "Disable" } });
    operator.apply("moves", json!({ "database": database, "period": "1h" })).await;
    label(&operator, "moves", "a").await;
    let connection = tokio::time::timeout(WAIT_TIMEOUT, silent.accept()).await.unwrap().unwrap();
    label(&operator, "moves", "b").await;
    eventually("it to be left", WAIT_TIMEOUT, async || {
        if operator.log().contains("labelled for others") { Ok(()) } else { Err(operator.log()) }
    })
    .await;
    operator.apply("stays", json!({ "period": "1h" })).await;
    label(&operator, "stays", "a").await;
    operator.until("stays", "its sweep", |s| s["lastSweep"] != Value::Null).await;
    let moved = json!(operator.api().get("moves").await.unwrap().status);
    assert_eq!((&moved["lastSweep"], &moved["totals"]), (&Value::Null, &Value::Null), "{moved:#}");
    drop(connection);
}
