//! Exactly the rights that the operator needs: it works with what the chart gives it, in both modes, and with nothing less.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role};
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use support::control_plane::ControlPlane;
use support::process::{Program, output};
use support::wait::eventually;

use crate::fixtures::operator::{RELEASE, allow, chart, has, lease_rules};
use crate::fixtures::{AuditTable, Operator};

/// All that the operator may do where it works.
fn rules() -> Value {
    json!([
        { "apiGroups": ["auditlog.dev"], "resources": ["auditlogsweepers"], "verbs": ["get", "list", "watch"] },
        { "apiGroups": ["auditlog.dev"], "resources": ["auditlogsweepers/status"], "verbs": ["patch"] },
        { "apiGroups": [""], "resources": ["secrets"], "verbs": ["get"] },
        { "apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"] },
    ])
}

/// And about its lease.
fn rules_for_lease(name: &str) -> Value {
    json!([
        { "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"] },
        { "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "resourceNames": [name], "verbs": ["get", "update"] },
    ])
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
    let name = format!("{}:{}", RELEASE.1, RELEASE.0);
    let chart_role = Api::<ClusterRole>::all(client.clone()).get(&name).await.unwrap();
    assert_eq!(json!(chart_role.rules), rules());
    assert_eq!(json!(lease_rules(&client).await), rules_for_lease(RELEASE.1));
    let both = [rules(), rules_for_lease(RELEASE.1)].map(|rules| rules.as_array().unwrap().clone());
    let roles = roles(&both.concat());
    assert_eq!(roles.len(), 10, "all, and without each verb");
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
        // Events tell what happens; nothing waits for them.
        let enough = what == "all" || what.ends_with(" events");
        assert_eq!(works.is_ok(), enough, "with every right but {what}: {works:?}");
    }
}

#[tokio::test]
async fn works_with_roles_alone_and_sees_no_other_namespace() {
    // The release is in the first namespace, and works in both.
    let places = [Operator::absent().await, Operator::absent().await];
    let (plane, client) = (places[0].plane, places[0].client.clone());
    let [home, away] = [&places[0].namespace, &places[1].namespace];
    let helm = |args: &[&str]| output(plane.helm().args(args).args(["-n", home])).unwrap();
    let chart = chart().display().to_string();
    let watch = format!("watchNamespaces={{{home},{away}}}");
    // By whoever administers the two, and has no other rights. Nobody aggregates roles here, so all parts are bound.
    let ours = concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/roles.yaml");
    output(plane.kubectl().args(["apply", "--server-side", "--force-conflicts", "-f", ours])).unwrap();
    let parts = ["view", "edit", "admin"];
    let parts =
        parts.map(|part| [format!("system:aggregate-to-{part}"), format!("audit-log-sweeper:teams:{part}")]).concat();
    let admin = format!("admin-of-{home}");
    for (namespace, part) in [home, away].into_iter().flat_map(|place| parts.iter().map(move |part| (place, part))) {
        let name = format!("{admin}-{}", part.replace(':', "-"));
        let roles = [format!("--clusterrole={part}"), format!("--user={admin}")];
        output(plane.kubectl().args(["create", "rolebinding", &name, "-n", namespace]).args(roles)).unwrap();
    }
    helm(&["install", "team", &chart, "--set", "crds.enabled=false", "--set", &watch, "--kube-as-user", &admin]);
    let account = "team-audit-log-sweeper";

    for namespace in [home, away] {
        let name = format!("{account}:{home}");
        let role = Api::<Role>::namespaced(client.clone(), namespace).get(&name).await.unwrap();
        assert_eq!(json!(role.rules), rules(), "the same as the ClusterRole's");
    }
    let lease = Api::<Role>::namespaced(client.clone(), home).get(&format!("{account}-lease")).await.unwrap();
    assert_eq!(json!(lease.rules), rules_for_lease(account));
    let clusterwide = output(plane.kubectl().args(["get", "clusterroles,clusterrolebindings", "-o", "name"])).unwrap();
    assert!(!clusterwide.contains(account), "{clusterwide}");
    let may = |verb: &str, what: &str, place: &str| {
        let user = format!("--as=system:serviceaccount:{home}:{account}");
        let answer = plane.kubectl().args(["auth", "can-i", verb, what, "-n", place, &user]).output().unwrap();
        String::from_utf8(answer.stdout).unwrap().trim() == "yes"
    };
    assert!(may("get", "secrets", away) && may("watch", "als", away));
    assert!(!may("get", "secrets", "default") && !may("get", "als", "default") && !may("list", "secrets", home));

    // With the chart's own arguments.
    let deployment = Api::<Deployment>::namespaced(client.clone(), home).get(account).await.unwrap();
    let args = deployment.spec.unwrap().template.spec.unwrap().containers.remove(0).args.unwrap();
    let token = plane.service_account_token(home, account).await.unwrap();
    let program = Program::ours("team", env!("CARGO_BIN_EXE_audit-log-sweeper"))
        .env("KUBECONFIG", plane.kubeconfig_for(&token, home).unwrap())
        .env("POD_NAMESPACE", home);
    let args = args.iter().map(|arg| if arg.contains("health") { "--health-address=127.0.0.1:0" } else { arg });
    let process = args.fold(program, Program::arg).start(&places[0].scratch).unwrap();
    for place in &places {
        let log = AuditTable::new().await;
        log.start(1, "2 h").await;
        place.secret_for(&log).await;
        place.apply("app", json!({})).await;
        place.until("app", "a sweep", |status| has(status, "Ready=True/Swept")).await;
        assert_eq!(log.timed_out().await, [1]);
    }
    process.stop();
    helm(&["uninstall", "team"]);
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
    let log = AuditTable::new().await;
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
