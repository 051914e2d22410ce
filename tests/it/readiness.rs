//! What `/readyz` says while the operator cannot work: no such namespace, a right that is missing, an old CRD.

use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::PostParams;
use serde_json::{Value, json};
use support::process::{Process, output};
use support::wait::eventually;

use crate::fixtures::audit_table::assert_one_swept_at_a_time;
use crate::fixtures::operator::{RELEASE, WAIT_TIMEOUT, allow, probe, replica, until_says};
use crate::fixtures::{AuditTable, DedicatedControlPlane, Operator};

/// Waits until it is not ready for this alone.
async fn until_waits_for(process: &Process, what: &str) {
    eventually("the complaint", WAIT_TIMEOUT, async || match probe(&process.log_tail(usize::MAX), "/readyz").await {
        Err(said) if said.contains(&format!("waiting for {what}")) && said.matches("waiting for").count() == 1 => {
            Ok(())
        }
        other => Err(format!("{other:?}\n{}", process.log_tail(10))),
    })
    .await;
    assert_eq!(probe(&process.log_tail(usize::MAX), "/healthz").await.unwrap(), "serving\n");
}

async fn until_ready(process: &Process) {
    eventually("readiness", WAIT_TIMEOUT, async || probe(&process.log_tail(usize::MAX), "/readyz").await).await;
}

#[tokio::test]
async fn a_lease_that_nobody_can_have_is_waited_for() {
    let operator = Operator::absent().await;
    let config = operator.kubeconfig(None).await;
    // Rights where there is no namespace: only a ClusterRole gives them.
    let account = ["--serviceaccount", &format!("{}:{}", RELEASE.0, RELEASE.1), "--clusterrole=cluster-admin"];
    let name = format!("leases-{}", operator.namespace);
    output(operator.plane.kubectl().args(["create", "clusterrolebinding", &name]).args(account)).unwrap();
    let process = replica("a", &config, &operator.scratch, &operator.namespace, &["--lease-namespace=nowhere"]);
    until_waits_for(&process, "Lease nowhere/audit-log-sweeper: namespaces \"nowhere\" not found").await;
    assert!(process.log_tail(usize::MAX).contains("--lease-namespace"), "{}", process.log_tail(20));
    output(operator.plane.kubectl().args(["delete", "clusterrolebinding", &name])).unwrap();
}

#[tokio::test]
async fn each_right_that_is_missing_is_waited_for_and_taken_up() {
    let log = AuditTable::new().await;
    log.start(1, "2 h").await;
    let operator = Operator::absent().await;
    operator.secret_for(&log).await;
    let resource = |resource: &str, verbs: &[&str]| json!({ "apiGroups": ["auditlog.dev"], "resources": [resource], "verbs": verbs });
    let secrets = json!({ "apiGroups": [""], "resources": ["secrets"], "verbs": ["get"] });
    let leases =
        json!({ "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"] });
    let me = (operator.namespace.as_str(), "bare");
    let account = serde_json::from_value(json!({ "metadata": { "name": me.1 } })).unwrap();
    Api::<ServiceAccount>::namespaced(operator.client.clone(), me.0)
        .create(&PostParams::default(), &account)
        .await
        .unwrap();
    let token = operator.plane.service_account_token(me.0, me.1).await.unwrap();
    let config = operator.plane.kubeconfig_for(&token, me.0).unwrap();
    allow(&operator.client, me.0, me, &[secrets, leases, resource("auditlogsweepers", &["list"])]).await;
    let process = replica("a", &config, &operator.scratch, me.0, &[]);
    until_waits_for(&process, "the right to list and watch auditlogsweepers").await;
    operator.apply("app", json!({ "period": "1h" })).await;
    allow(&operator.client, me.0, me, &[resource("auditlogsweepers", &["watch"])]).await;
    // Named once the object was asked for.
    until_waits_for(&process, "the right to get auditlogsweepers in namespace").await;
    allow(&operator.client, me.0, me, &[resource("auditlogsweepers", &["get"])]).await;
    until_waits_for(&process, "the right to patch auditlogsweepers/status in namespace").await;
    allow(&operator.client, me.0, me, &[resource("auditlogsweepers/status", &["patch"])]).await;
    operator.until("app", "the counts", |s| s["totals"]["timedOut"] == json!(1)).await;
    until_ready(&process).await;
    let said = process.log_tail(usize::MAX);
    // What the API server answered is there once, and not as a dump as well.
    assert!(said.contains("is forbidden") && !said.contains("Status {"), "{said}");
    assert_eq!(log.timed_out().await, [1]);
}

#[tokio::test]
async fn a_crd_without_a_field_of_the_status_is_waited_for_and_costs_no_count() {
    // For its own CRD.
    let DedicatedControlPlane { plane, client, namespace, scratch, config } = DedicatedControlPlane::new().await;
    let log = AuditTable::new().await;
    log.start_many(3).await;
    let kubectl = |args: &[&str]| output(plane.kubectl().args(args)).unwrap();
    let apply = |what: &Value| {
        let file = scratch.write("applied.json", what.to_string(), None).unwrap();
        kubectl(&["apply", "--server-side", "--force-conflicts", "-n", &namespace, "-f", &file.display().to_string()]);
    };
    let field = "/spec/versions/0/schema/openAPIV3Schema/properties/status/properties/lastSweep";
    let patch = json!([{ "op": "remove", "path": field }]).to_string();
    kubectl(&["patch", "crd", "auditlogsweepers.auditlog.dev", "--type=json", "-p", &patch]);
    let process = replica("a", &config, &scratch, &namespace, &[]);
    until_says(&process, "leading").await;
    apply(
        &json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "db" }, "stringData": { "uri": log.database.uri() } }),
    );
    apply(
        &json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": "app" }, "spec":
        { "timeout": "1h", "period": "5s", "limit": 2, "database": { "secretRef": { "name": "db" }, "tls": { "mode": "Disable" } } } }),
    );
    until_waits_for(&process, "the CustomResourceDefinition of this version").await;
    // The API server quotes the object before its complaint. Neither the probe nor the log may repeat it.
    let said = probe(&process.log_tail(usize::MAX), "/readyz").await.unwrap_err() + &process.log_tail(usize::MAX);
    assert!(said.contains("status.lastSweep") && !said.contains("secretRef"), "{said}");
    let crd = output(std::process::Command::new(env!("CARGO_BIN_EXE_audit-log-sweeper")).arg("crd")).unwrap();
    let crd = scratch.write("crd.yaml", crd, None).unwrap();
    kubectl(&["apply", "--server-side", "--force-conflicts", "-f", &crd.display().to_string()]);
    until_ready(&process).await;
    let objects: Api<audit_log_sweeper::api::AuditLogSweeper> = Api::namespaced(client, &namespace);
    let status = eventually("the counts", WAIT_TIMEOUT, async || {
        let status = json!(objects.get("app").await.unwrap().status);
        if status["totals"]["timedOut"] == json!(3) { Ok(status) } else { Err(format!("{status:#}")) }
    })
    .await;
    // While the first count could not be written, no other sweep began.
    assert_eq!(log.timed_out().await, [1, 2, 3]);
    assert_eq!(status["totals"]["failures"], json!(0), "{status:#}");
}

#[tokio::test]
async fn a_namespace_that_is_named_twice_is_worked_in_once() {
    let (log, operator) = (AuditTable::slow(40).await, Operator::absent().await);
    operator.secret_for(&log).await;
    let again = format!("--namespace={}", operator.namespace);
    let config = operator.kubeconfig(None).await;
    let process = replica("a", &config, &operator.scratch, &operator.namespace, &[&again]);
    operator.apply("app", json!({ "period": "1h", "batchSize": 1 })).await;
    operator.until("app", "the sweep", |s| s["totals"]["timedOut"] == json!(40)).await;
    let trail = log.trail().await;
    assert_one_swept_at_a_time(&trail);
    assert_eq!(trail.len(), 1, "{trail:?}");
    assert_eq!(process.log_tail(usize::MAX).matches("\"watching\"").count(), 1);
}
