//! Faults of the API server under the controller: rows are right always, and counts arrive when they can.

use std::time::Duration;

use audit_log_sweeper::api::AuditLogSweeper;
use chrono::Utc;
use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::json::merged;
use support::process::output;
use support::wait::eventually;

use crate::fixtures::audit_table::assert_one_swept_at_a_time;
use crate::fixtures::operator::{WAIT_TIMEOUT, has, namespace, port, replica};
use crate::fixtures::tcp_fault_proxy::Course;
use crate::fixtures::{AuditTable, DedicatedControlPlane, Operator, TcpFaultProxy};

/// An AuditLogSweeper that uses the Secret `db` of its namespace.
fn object(name: &str, rest: Value) -> AuditLogSweeper {
    let spec = merged(
        json!({ "timeout": "1h", "database": { "secretRef": { "name": "db" }, "tls": { "mode": "Disable" } } }),
        &rest,
    );
    serde_json::from_value(json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": name }, "spec": spec }))
        .unwrap()
}

async fn secret(client: &kube::Client, namespace: &str, log: &AuditTable) {
    let secrets: Api<k8s_openapi::api::core::v1::Secret> = Api::namespaced(client.clone(), namespace);
    let secret = json!({ "metadata": { "name": "db" }, "stringData": { "uri": log.database.uri() } });
    secrets.create(&PostParams::default(), &serde_json::from_value(secret).unwrap()).await.unwrap();
}

#[tokio::test]
async fn counts_arrive_after_an_outage_and_nothing_is_swept_twice() {
    // For its own API server and etcd, which it stops.
    let DedicatedControlPlane { mut plane, client, namespace, scratch, config } = DedicatedControlPlane::new().await;
    let mut process = replica("a", &config, &scratch, &namespace, &[]);
    let log = AuditTable::held(2, 10).await;
    secret(&client, &namespace, &log).await;
    let objects: Api<AuditLogSweeper> = Api::namespaced(client.clone(), &namespace);
    objects.create(&PostParams::default(), &object("app", json!({ "batchSize": 1, "period": "1h" }))).await.unwrap();
    log.until_swept(2).await;
    plane.stop_api_server();
    log.release().await;
    // It ends while nobody can be told.
    log.until_swept(10).await;
    eventually("the end of the session", WAIT_TIMEOUT, async || {
        let sessions = log.sweeping_sessions().await;
        if sessions.is_empty() { Ok(()) } else { Err(format!("{sessions:?}")) }
    })
    .await;
    plane.start_api_server().await.unwrap();
    let until = async |what: &str, sweeps: i64| {
        eventually(what, Duration::from_secs(40), async || {
            let object = objects.get("app").await.map_err(|error| error.to_string())?;
            let status = json!(object.status);
            if status["totals"]["sweeps"] == json!(sweeps) { Ok(status) } else { Err(format!("{status:#}")) }
        })
        .await
    };
    let status = until("the counts", 1).await;
    assert_eq!((&status["totals"]["timedOut"], log.trail().await.len()), (&json!(10), 1));
    assert!(has(&status, "Ready=True/Swept"), "{status:#}");

    plane.restart_etcd().await.unwrap();
    log.run("TRUNCATE trail").await;
    log.run(
        "INSERT INTO audit_log (id, time_started, request_id, request_uri, operation_id, source_ip, actor_kind) \
             SELECT ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid, now() - interval '5 h', \
               'r', '/v1', 'op', '::1', 'unauthenticated' FROM generate_series(11, 20) AS n",
    )
    .await;
    eventually("the object to be changed", WAIT_TIMEOUT, async || {
        let patch = json!({ "spec": { "period": "5s" } });
        let patched = objects.patch("app", &Default::default(), &kube::api::Patch::Merge(&patch)).await;
        patched.map_err(|error| error.to_string())
    })
    .await;
    log.until_swept(12).await;
    plane.restart_etcd().await.unwrap();
    log.until_swept(20).await;
    eventually("the counts", Duration::from_secs(40), async || {
        let object = objects.get("app").await.map_err(|error| error.to_string())?;
        let status = json!(object.status);
        if status["totals"]["timedOut"] == json!(20) { Ok(()) } else { Err(format!("{status:#}")) }
    })
    .await;
    assert_one_swept_at_a_time(&log.trail().await);
    assert!(process.is_running(), "{}", process.log_tail(30));
}

#[tokio::test]
async fn killed_between_the_commit_and_the_status_it_sweeps_at_most_once_more() {
    let (log, operator) = (AuditTable::held(2, 10).await, Operator::absent().await);
    operator.secret_for(&log).await;
    let relay = TcpFaultProxy::new(port(operator.plane)).await;
    let config = operator.kubeconfig(Some(&relay)).await;
    let a = replica("a", &config, &operator.scratch, &operator.namespace, &[]);
    operator.apply("app", json!({ "batchSize": 1, "period": "1h" })).await;
    log.until_swept(2).await;
    relay.set(Course::Deaf);
    log.release().await;
    log.until_swept(10).await;
    eventually("the end of the session", WAIT_TIMEOUT, async || {
        let sessions = log.sweeping_sessions().await;
        if sessions.is_empty() { Ok(()) } else { Err(format!("{sessions:?}")) }
    })
    .await;
    a.kill9().unwrap();
    let status = json!(operator.api().get("app").await.unwrap().status);
    assert_eq!(status["lastSweep"], Value::Null, "{status:#}");
    let before = log.rows().await;
    let config = operator.kubeconfig(None).await;
    let b = replica("b", &config, &operator.scratch, &operator.namespace, &[]);
    let status = eventually("the sweep", Duration::from_secs(40), async || {
        let status = json!(operator.api().get("app").await.unwrap().status);
        if status["totals"]["sweeps"] == json!(1) { Ok(status) } else { Err(format!("{status:#}\n{}", b.log_tail(20))) }
    })
    .await;
    // Its count is lost, as is said; its rows are as they were.
    assert_eq!((log.rows().await, &status["totals"]["timedOut"]), (before, &json!(0)));
    assert_eq!(log.trail().await.len(), 1);
}

#[tokio::test]
async fn an_object_that_is_replaced_during_its_sweep_gets_no_word_of_the_old_one() {
    let (log, operator) = (AuditTable::slow(100).await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 1, "period": "1h", "limit": 80 })).await;
    log.until_swept(2).await;
    operator.api().delete("app", &DeleteParams::default()).await.unwrap();
    let left = Utc::now();
    operator.apply("app", json!({ "batchSize": 1, "period": "2h", "limit": 7 })).await;
    let status = operator.until("app", "its own sweep", |s| s["lastSweep"] != Value::Null).await;
    let trail = log.trail().await;
    assert_one_swept_at_a_time(&trail);
    let old = log.swept_by_the_first(left).await;
    assert_eq!(trail.iter().map(|(_, _, rows)| *rows).collect::<Vec<_>>(), [old, 7]);
    assert_eq!(log.timed_out().await, (1..=old + 7).collect::<Vec<_>>());
    assert_eq!(status["totals"], json!({ "sweeps": 1, "failures": 0, "timedOut": 7 }), "{status:#}");
    assert_eq!((&status["lastSweep"]["trigger"], &status["lastSweep"]["limit"]), (&json!("Create"), &json!(7)));
}

#[tokio::test]
async fn a_namespace_that_is_replaced_during_a_sweep_is_worked_in_again() {
    let (log, home) = (AuditTable::slow(100).await, Operator::absent().await);
    let client = home.client.clone();
    let name = namespace(&client).await;
    let config = home.kubeconfig(None).await;
    // Its lease is elsewhere: the one of the namespace goes with it.
    let lease = format!("--lease-namespace={}", home.namespace);
    let process = replica("a", &config, &home.scratch, &name, &[&lease]);
    secret(&client, &name, &log).await;
    let objects: Api<AuditLogSweeper> = Api::namespaced(client.clone(), &name);
    objects
        .create(&PostParams::default(), &object("app", json!({ "batchSize": 1, "limit": 80, "period": "1h" })))
        .await
        .unwrap();
    log.until_swept(2).await;
    // What the namespace controller does, which does not run here.
    let kubectl = |args: &[&str]| output(home.plane.kubectl().args(args)).unwrap();
    kubectl(&["delete", "namespace", &name, "--wait=false"]);
    kubectl(&["delete", "als,secrets,roles,rolebindings", "--all", "-n", &name]);
    let left = Utc::now();
    let file =
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name }, "spec": { "finalizers": [] } });
    let file = home.scratch.write("finalize.json", file.to_string(), None).unwrap();
    kubectl(&["replace", "--raw", &format!("/api/v1/namespaces/{name}/finalize"), "-f", &file.display().to_string()]);
    let again = serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap();
    Api::<Namespace>::all(client.clone()).create(&PostParams::default(), &again).await.unwrap();
    secret(&client, &name, &log).await;
    objects
        .create(&PostParams::default(), &object("app", json!({ "batchSize": 1, "limit": 7, "period": "1h" })))
        .await
        .unwrap();
    let status = eventually("its own sweep", WAIT_TIMEOUT, async || {
        let status = json!(objects.get("app").await.unwrap().status);
        if status["lastSweep"] != Value::Null {
            Ok(status)
        } else {
            Err(format!("{status:#}\n{}", process.log_tail(20)))
        }
    })
    .await;
    assert_one_swept_at_a_time(&log.trail().await);
    assert_eq!(status["totals"], json!({ "sweeps": 1, "failures": 0, "timedOut": 7 }), "{status:#}");
    let old = log.swept_by_the_first(left).await;
    assert_eq!(log.timed_out().await, (1..=old + 7).collect::<Vec<_>>());
    process.signal(Signal::SIGTERM).unwrap();
}
