//! Which objects an install works on, and what it says while it cannot.

use audit_log_sweeper::api::AuditLogSweeper;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use support::process::{Program, output};
use support::wait::eventually;

use crate::fixtures::operator::{RELEASE, WAIT_TIMEOUT, allow, namespace, probe, replica, until_says};
use crate::fixtures::{AuditTable, DedicatedControlPlane, Operator};

#[tokio::test]
async fn installs_with_selectors_share_a_namespace() {
    let (log, mut operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    log.start_many(3).await;
    operator.start_with(&["--selector=shard=a"]).await;
    for (name, shard) in [("mine", "a"), ("other", "b"), ("moves", "b")] {
        operator.apply(name, json!({ "period": "1h", "limit": 1 })).await;
        label(&operator, name, shard).await;
    }
    operator.until("mine", "the sweep", |s| s["lastSweep"] != Value::Null).await;
    label(&operator, "moves", "a").await;
    operator.until("moves", "the sweep", |s| s["lastSweep"] != Value::Null).await;
    let other = json!(operator.api().get("other").await.unwrap().status);
    assert_eq!((log.timed_out().await, &other["observedGeneration"]), (vec![1, 2], &json!(-1)), "{other:#}");
    // Another install for the rest, with a lease of its own, works beside it.
    let config = operator.kubeconfig(None).await;
    let lease = "--lease-name=shard-b";
    allow(&operator.client, &operator.namespace, RELEASE, &[json!({
        "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "update"], "resourceNames": ["shard-b"],
    })])
    .await;
    let second = Program::new("b", env!("CARGO_BIN_EXE_audit-log-sweeper"))
        .arg("run")
        .arg(format!("--namespace={}", operator.namespace))
        .arg("--health-address=127.0.0.1:0")
        .arg(lease)
        .arg("--selector=shard!=a")
        .env("KUBECONFIG", config)
        .start(&operator.scratch)
        .unwrap();
    operator.until("other", "the sweep", |s| s["lastSweep"] != Value::Null).await;
    assert_eq!(log.timed_out().await, [1, 2, 3]);
    until_says(&second, "leading").await;
}

async fn label(operator: &Operator, name: &str, shard: &str) {
    let labels = json!({ "metadata": { "labels": { "shard": shard } } });
    operator.api().patch(name, &PatchParams::default(), &Patch::Merge(&labels)).await.unwrap();
}

#[tokio::test]
async fn several_namespaces_need_only_roles_in_them() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    log.start_many(2).await;
    let (client, first) = (operator.client.clone(), operator.namespace.clone());
    let second = namespace(&client).await;
    let third = namespace(&client).await;
    let account = serde_json::from_value(json!({ "metadata": { "name": "roles-only" } })).unwrap();
    Api::<ServiceAccount>::namespaced(client.clone(), &first).create(&PostParams::default(), &account).await.unwrap();
    let objects =
        json!({ "apiGroups": ["auditlog.dev"], "resources": ["auditlogsweepers"], "verbs": ["get", "list", "watch"] });
    let status = json!({ "apiGroups": ["auditlog.dev"], "resources": ["auditlogsweepers/status"], "verbs": ["patch"] });
    let secrets = json!({ "apiGroups": [""], "resources": ["secrets"], "verbs": ["get"] });
    let leases =
        json!({ "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"] });
    let rules = [objects, status, secrets];
    allow(&client, &first, (&first, "roles-only"), &rules).await;
    allow(&client, &first, (&first, "roles-only"), &[leases]).await;
    let token = operator.plane.service_account_token(&first, "roles-only").await.unwrap();
    let config = operator.plane.kubeconfig_for(&token, "roles-only").unwrap();
    let also = format!("--namespace={second}");
    let process = replica("a", &config, &operator.scratch, &first, &[&also]);
    // It says where it may not, and works where it may.
    let ready = async || probe(&process.log_tail(usize::MAX), "/readyz").await;
    eventually("the complaint", WAIT_TIMEOUT, async || match ready().await {
        Err(said)
            if said.contains("waiting for the right to list and watch auditlogsweepers")
                && said.matches("waiting for").count() == 1 =>
        {
            Ok(())
        }
        other => Err(format!("{other:?}")),
    })
    .await;
    let sweep = |namespace: &str, secret: Value| {
        let objects: Api<AuditLogSweeper> = Api::namespaced(client.clone(), namespace);
        let secrets: Api<k8s_openapi::api::core::v1::Secret> = Api::namespaced(client.clone(), namespace);
        let object = json!({ "metadata": { "name": "app" }, "spec": { "timeout": "1h", "period": "1h", "limit": 1,
            "database": { "secretRef": { "name": "db" }, "tls": { "mode": "Disable" } } } });
        async move {
            secrets.create(&PostParams::default(), &serde_json::from_value(secret).unwrap()).await.unwrap();
            objects.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
            objects
        }
    };
    let secret = json!({ "metadata": { "name": "db" }, "stringData": { "uri": log.database.uri() } });
    let swept = async |objects: &Api<AuditLogSweeper>| {
        eventually("the sweep", WAIT_TIMEOUT, async || {
            let status = json!(objects.get("app").await.unwrap().status);
            if status["lastSweep"] != Value::Null { Ok(()) } else { Err(format!("{status:#}")) }
        })
        .await;
    };
    swept(&sweep(&first, secret.clone()).await).await;
    assert_eq!(log.timed_out().await, [1]);
    let outside = sweep(&third, secret.clone()).await;
    allow(&client, &second, (&first, "roles-only"), &rules).await;
    eventually("readiness", WAIT_TIMEOUT, ready).await;
    swept(&sweep(&second, secret).await).await;
    assert_eq!(log.timed_out().await, [1, 2]);
    let untouched = json!(outside.get("app").await.unwrap().status);
    assert_eq!(untouched["observedGeneration"], json!(-1), "{untouched:#}");
}

#[tokio::test]
async fn a_missing_crd_is_waited_for_aloud_and_a_new_one_is_taken_up() {
    // For its own CRD.
    let DedicatedControlPlane { plane, namespace: name, scratch, config, .. } = DedicatedControlPlane::new().await;
    let kubectl = |args: &[&str]| output(plane.kubectl().args(args)).unwrap();
    let crd = ["delete", "crd", "auditlogsweepers.auditlog.dev"];
    kubectl(&crd);
    let process = replica("a", &config, &scratch, &name, &[]);
    let ready = async || probe(&process.log_tail(usize::MAX), "/readyz").await;
    let waits = async || {
        eventually("the complaint", WAIT_TIMEOUT, async || match ready().await {
            Err(said) if said.contains("waiting for the CustomResourceDefinition auditlogsweepers.auditlog.dev") => {
                Ok(())
            }
            other => Err(format!("{other:?}")),
        })
        .await;
        assert_eq!(probe(&process.log_tail(usize::MAX), "/healthz").await.unwrap(), "serving\n");
    };
    waits().await;
    until_says(&process, "cannot watch AuditLogSweepers").await;

    let (log, file) = (AuditTable::new().await, scratch.path().join("secret.json"));
    log.start_many(2).await;
    let secret = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "db" }, "stringData": { "uri": log.database.uri() } });
    std::fs::write(&file, secret.to_string()).unwrap();
    kubectl(&["apply", "-n", &name, "-f", &file.display().to_string()]);
    for round in 1..=2 {
        let printed = output(std::process::Command::new(env!("CARGO_BIN_EXE_audit-log-sweeper")).arg("crd")).unwrap();
        let crd_file = scratch.write("crd.yaml", printed, None).unwrap();
        kubectl(&["apply", "--server-side", "-f", &crd_file.display().to_string()]);
        eventually("readiness", WAIT_TIMEOUT, ready).await;
        let object = json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": "app" },
            "spec": { "timeout": "1h", "period": "1h", "limit": 1, "database": { "secretRef": { "name": "db" }, "tls": { "mode": "Disable" } } } });
        let object = scratch.write("object.json", object.to_string(), None).unwrap();
        eventually("the object to be taken", WAIT_TIMEOUT, async || {
            let file = object.display().to_string();
            output(plane.kubectl().args(["apply", "-n", &name, "-f", &file])).map_err(|error| error.to_string())
        })
        .await;
        eventually("the sweep", WAIT_TIMEOUT, async || {
            let done = log.timed_out().await;
            if done == (1..=round).collect::<Vec<_>>() {
                Ok(())
            } else {
                Err(format!("{done:?} {}", process.log_tail(20)))
            }
        })
        .await;
        kubectl(&crd);
        waits().await;
    }
}
