//! The chart with the real Helm on a real API server: install, upgrade, uninstall, and exactly the rights it needs.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use support::control_plane::ControlPlane;
use support::process::output;
use support::tools::Tools;
use support::wait::eventually;

use crate::fixtures::operator::{RELEASE, allow, chart, has, install, lease_rules};
use crate::fixtures::{Log, Operator};

#[tokio::test]
async fn installs_upgrades_and_uninstalls_without_losing_objects() {
    let tools = tokio::task::spawn_blocking(Tools::ensure).await.unwrap().unwrap();
    let plane = ControlPlane::start(&tools).await.unwrap();
    let helm = |args: &[&str]| output(plane.helm().args(args)).unwrap();
    let kubectl = |args: &[&str]| output(plane.kubectl().args(args)).unwrap();
    let chart = chart().display().to_string();
    helm(&["lint", "--strict", &chart]);
    install(&plane).await;
    kubectl(&["apply", "-f", concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/sample.yaml")]);

    helm(&["upgrade", RELEASE.1, &chart, "-n", RELEASE.0, "--set", "logLevel=debug"]);
    let args = kubectl(&[
        "get",
        "deployment",
        RELEASE.1,
        "-n",
        RELEASE.0,
        "-o",
        "jsonpath={.spec.template.spec.containers[0].args}",
    ]);
    assert!(args.contains("--log-level=debug"), "{args}");
    // Every argument of the chart is one that the binary knows.
    let args: Vec<String> = serde_json::from_str(&args).unwrap();
    let mut check = std::process::Command::new(env!("CARGO_BIN_EXE_audit-log-sweeper"));
    output(check.args(args).arg("--help")).unwrap();

    helm(&["uninstall", RELEASE.1, "-n", RELEASE.0]);
    assert_eq!(kubectl(&["get", "als", "app", "-o", "name"]).trim(), "auditlogsweeper.auditlog.dev/app");
    let left = kubectl(&["get", "clusterroles,clusterrolebindings,deployments,serviceaccounts", "-A", "-o", "name"]);
    assert!(!left.contains("audit-log-sweeper"), "{left}");

    helm(&["install", RELEASE.1, &chart, "-n", RELEASE.0]);
    assert_eq!(kubectl(&["get", "als", "app", "-o", "name"]).trim(), "auditlogsweeper.auditlog.dev/app");
    kubectl(&["delete", "als", "app"]);
}

/// The rules of the chart's role, and each of them with one verb less.
fn roles(rules: &[Value]) -> Vec<(String, Vec<Value>)> {
    let mut roles = vec![("all".to_owned(), rules.to_vec())];
    for (index, rule) in rules.iter().enumerate() {
        for verb in rule["verbs"].as_array().unwrap() {
            let mut fewer = rules.to_vec();
            fewer[index]["verbs"].as_array_mut().unwrap().retain(|other| other != verb);
            fewer.retain(|rule| rule["verbs"] != json!([]));
            roles.push((format!("{} {}", verb.as_str().unwrap(), rule["resources"][0].as_str().unwrap()), fewer));
        }
    }
    roles
}

#[tokio::test]
async fn works_with_the_charts_rights_and_with_none_less() {
    let operator = Operator::absent().await;
    let (client, plane) = (operator.client.clone(), operator.plane);
    let chart_role = Api::<ClusterRole>::all(client.clone()).get(RELEASE.1).await.unwrap();
    let mut rules: Vec<Value> = chart_role.rules.unwrap().iter().map(|rule| json!(rule)).collect();
    rules.extend(lease_rules(&client).await);
    let roles = roles(&rules);
    assert_eq!(roles.len(), 9, "all, and without each of: {rules:?}");
    let works = futures::future::join_all(roles.into_iter().map(|(what, rules)| {
        let client = client.clone();
        async move {
            // Who may create a lease has it; the right to update shows where there is one already.
            let released = what == "update leases";
            let works = works_with(&client, plane, rules, released).await;
            (what, works)
        }
    }))
    .await;
    for (what, works) in works {
        assert_eq!(works.is_ok(), what == "all", "with every right but {what}: {works:?}");
    }
}

/// Whether an operator with these rights sweeps an object that appears while it runs, and says so.
async fn works_with(
    client: &kube::Client,
    plane: &'static ControlPlane,
    rules: Vec<Value>,
    released: bool,
) -> Result<(), String> {
    let mut operator = Operator::absent().await;
    let name = operator.namespace.clone();
    let create = PostParams::default();
    if released {
        let lease = json!({ "metadata": { "name": RELEASE.1 }, "spec": { "holderIdentity": "" } });
        let leases: Api<Lease> = Api::namespaced(client.clone(), &name);
        leases.create(&create, &serde_json::from_value(lease).unwrap()).await.unwrap();
    }
    let account = serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap();
    Api::<ServiceAccount>::namespaced(client.clone(), &name).create(&create, &account).await.unwrap();
    let (leases, rules): (Vec<_>, Vec<_>) = rules.into_iter().partition(|rule| rule["resources"] == json!(["leases"]));
    allow(client, &name, (&name, &name), &leases).await;
    let role = serde_json::from_value(json!({ "metadata": { "name": name }, "rules": rules })).unwrap();
    let role = Api::<ClusterRole>::all(client.clone()).create(&create, &role).await.unwrap();
    let binding = serde_json::from_value(json!({
        "metadata": { "name": name },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role.name_any() },
        "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": name }],
    }))
    .unwrap();
    Api::<ClusterRoleBinding>::all(client.clone()).create(&create, &binding).await.unwrap();
    let token = plane.service_account_token(&name, &name).await.unwrap();
    operator.start_as(&token, &[]);
    // Either it watches, or it says that it may not.
    eventually("the operator to watch or to complain", Duration::from_secs(20), async || {
        let log = operator.log();
        if log.contains("\"watching\"") || log.contains("cannot watch") { Ok(()) } else { Err(log) }
    })
    .await;
    let log = Log::new().await;
    log.start(1, "2 h").await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({})).await;
    let swept = async {
        loop {
            let status = json!(operator.api().get("app").await.unwrap().status);
            if has(&status, "Ready=True/Swept") && log.timed_out().await == [1] {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let verdict = tokio::time::timeout(Duration::from_secs(8), swept).await.map_err(|_| operator.log());
    Api::<ClusterRole>::all(client.clone()).delete(&name, &Default::default()).await.unwrap();
    Api::<ClusterRoleBinding>::all(client.clone()).delete(&name, &Default::default()).await.unwrap();
    operator.terminate().await;
    verdict
}
