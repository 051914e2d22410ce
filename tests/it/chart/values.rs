//! The values of the chart: every kind it renders is one that the API server takes, in every mode, and nonsense is refused.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use support::control_plane::ControlPlane;
use support::process::output;
use support::wait::eventually;

use crate::fixtures::Operator;
use crate::fixtures::operator::chart;
use crate::metrics::samples;
use crate::prometheus::{alerts, dashboard, of_kind, queries, rendered, selectors};

/// What every mode has.
const ALWAYS: [&str; 5] = ["Deployment", "Pod", "Role", "RoleBinding", "ServiceAccount"];

/// Every mode: its values, where `NS` is the namespace, and the kinds it has beyond [`ALWAYS`].
const MODES: [(&[&str], &[&str]); 9] = [
    (&[], &["ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"]),
    (&["crds.enabled=false,rbac.aggregate=false"], &["ClusterRole", "ClusterRoleBinding"]),
    (&["crds.enabled=false", "watchNamespaces={NS,default}"], &[]),
    (
        &["crds.enabled=false", "watchNamespaces={NS}", "replicaCount=3", "networkPolicy.enabled=true"],
        &["NetworkPolicy", "PodDisruptionBudget"],
    ),
    (
        &[
            "crds.enabled=false",
            "watchNamespaces={NS}",
            "networkPolicy.enabled=true,networkPolicy.databasePorts={5432,6432}",
            "networkPolicy.databaseCIDRs={10.1.0.0/16,fd00::/8}",
        ],
        &["NetworkPolicy"],
    ),
    (
        &[
            "crds.enabled=false",
            "watchNamespaces={NS}",
            "caBundle.configMapName=ca,extraEnv[0].name=HTTPS_PROXY,extraEnv[0].value=http://proxy:3128",
            "priorityClassName=system-cluster-critical,nodeSelector.disk=ssd",
            "tolerations[0].operator=Exists,affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution=null",
            "podLabels.team=a,podLabels.app\\.kubernetes\\.io/name=mine,podAnnotations.note=x,imagePullSecrets[0].name=registry",
            "image.digest=sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            "serviceAccount.annotations.role=sweeper,fullnameOverride=als,selector=shard in (a\\, b)",
        ],
        &[],
    ),
    (
        &[
            "crds.enabled=false",
            "watchNamespaces={NS}",
            "caBundle.secretName=ca,caBundle.key=roots.pem,logLevel=trace,logFormat=text,maxConcurrentSweeps=3,maxSweepsPerServer=2,maxDeadline=30m",
            "topologySpreadConstraints[0].maxSkew=1,topologySpreadConstraints[0].topologyKey=zone",
            "topologySpreadConstraints[0].whenUnsatisfiable=DoNotSchedule",
            "podSecurityContext.runAsUser=null,podSecurityContext.runAsGroup=null,resources.limits.cpu=1",
            "extraContainers[0].name=beside,extraInitContainers[0].name=proxy,extraInitContainers[0].restartPolicy=Always",
            "extraContainers[0].image=x,extraInitContainers[0].image=x,extraVolumes[0].name=sockets,extraVolumes[0].emptyDir.medium=Memory",
            "extraVolumeMounts[0].name=sockets,extraVolumeMounts[0].mountPath=/cloudsql",
            "extraContainers[0].securityContext.allowPrivilegeEscalation=false,extraContainers[0].securityContext.capabilities.drop={ALL}",
            "extraInitContainers[0].securityContext.allowPrivilegeEscalation=false,extraInitContainers[0].securityContext.capabilities.drop={ALL}",
        ],
        &[],
    ),
    (&["crds.enabled=false", "watchNamespaces={NS}", "global.imageRegistry=of.another.chart,replicaCount=0"], &[]),
    (
        &[
            "crds.enabled=false",
            "watchNamespaces={NS}",
            "metrics.service.enabled=true,metrics.perObject=false",
            "networkPolicy.enabled=true,networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.team=monitoring",
        ],
        &["NetworkPolicy", "Service"],
    ),
];

/// A namespace with the service account that pods are given when they name none, as in a cluster with controllers.
async fn namespace() -> Operator {
    let operator = Operator::absent().await;
    output(operator.kubectl().args(["create", "serviceaccount", "default"])).unwrap();
    operator
}

/// What Helm renders with these values, as the API server took it, or why it did not.
fn dry_run(plane: &ControlPlane, namespace: &str, values: &[&str]) -> anyhow::Result<Vec<Value>> {
    let mut helm = plane.helm();
    helm.args(["template", "dry", "-n", namespace]).arg(chart());
    for value in values {
        helm.args(["--set", &value.replace("NS", namespace)]);
    }
    let rendered = output(&mut helm)?;
    let mut kubectl = plane.kubectl();
    // Server-side, where an unknown field is an error.
    kubectl.args(["apply", "--server-side", "--force-conflicts", "--dry-run=server", "-o", "json", "-f", "-"]);
    let list: Value = serde_json::from_str(&fed(&mut kubectl, &rendered)?)?;
    Ok(list["items"].as_array().unwrap().clone())
}

/// Runs a command with this input.
fn fed(command: &mut Command, input: &str) -> anyhow::Result<String> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().unwrap().write_all(input.as_bytes())?;
    let answer = child.wait_with_output()?;
    anyhow::ensure!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
    Ok(String::from_utf8(answer.stdout)?)
}

fn container(objects: &[Value]) -> &Value {
    &of_kind(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
}

#[tokio::test]
async fn the_api_server_takes_every_kind_in_every_mode() {
    let operator = namespace().await;
    let (plane, namespace) = (operator.plane, &operator.namespace);
    output(plane.helm().args(["lint", "--strict"]).arg(chart())).unwrap();
    let enforce = "pod-security.kubernetes.io/enforce=restricted";
    output(plane.kubectl().args(["label", "namespace", namespace, enforce])).unwrap();

    for (values, further) in MODES {
        let objects = dry_run(plane, namespace, values).unwrap_or_else(|error| panic!("{values:?}: {error:#}"));
        let kinds: BTreeSet<&str> = objects.iter().map(|object| object["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ALWAYS.iter().chain(further).copied().collect(), "{values:?}");

        let deployment = of_kind(&objects, "Deployment");
        let pod = &deployment["spec"]["template"];
        assert_eq!(deployment["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"], "audit-log-sweeper");
        // Every argument is one that the binary knows.
        let args = container(&objects)["args"].as_array().unwrap();
        let args = args.iter().map(|arg| arg.as_str().unwrap());
        output(Command::new(env!("CARGO_BIN_EXE_audit-log-sweeper")).args(args).arg("--help")).unwrap();
        // The Pods of both, in a namespace that enforces `restricted`.
        for mut spec in [pod["spec"].clone(), of_kind(&objects, "Pod")["spec"].clone()] {
            // An account that is there, and no class that only kube-system may use.
            spec["serviceAccountName"] = json!("default");
            let fields = spec.as_object_mut().unwrap();
            fields.retain(|field, _| !["serviceAccount", "priorityClassName", "priority"].contains(&field.as_str()));
            let admit = |spec: &Value| {
                let pod = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "pod" }, "spec": spec });
                let mut kubectl = operator.kubectl();
                fed(kubectl.args(["create", "--dry-run=server", "-f", "-"]), &pod.to_string())
            };
            admit(&spec).unwrap_or_else(|error| panic!("{values:?}: {error:#}"));
            spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = json!(true);
            let refused = admit(&spec).unwrap_err().to_string();
            assert!(refused.contains("violates PodSecurity \"restricted:latest\""), "{refused}");
        }
    }
}

/// A kind of the Prometheus operator, with those of its fields that the chart sets, of the types that they have there
/// (monitoring.coreos.com/v1): the API server knows the kind, and any other field is an error.
fn monitoring(kind: &str, spec: &Value) -> Value {
    let plural = format!("{}s", kind.to_lowercase());
    let schema = json!({ "type": "object", "properties": { "spec": { "type": "object", "properties": spec } } });
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{plural}.monitoring.coreos.com") },
        "spec": {
            "group": "monitoring.coreos.com", "scope": "Namespaced", "names": { "kind": kind, "plural": plural },
            "versions": [{ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": schema } }],
        },
    })
}

#[tokio::test]
async fn the_api_server_takes_what_watches_it_and_an_account_that_is_there() {
    let operator = namespace().await;
    let (plane, namespace) = (operator.plane, &operator.namespace);
    let text = json!({ "type": "string" });
    let texts = json!({ "type": "object", "additionalProperties": text });
    let list = |items: Value| json!({ "type": "array", "items": { "type": "object", "properties": items } });
    let rule = list(json!({ "alert": text, "expr": text, "for": text, "labels": texts, "annotations": texts }));
    let groups = json!({ "groups": list(json!({ "name": text, "rules": rule })) });
    let endpoint = json!({ "port": text, "path": text, "interval": text, "honorLabels": { "type": "boolean" } });
    let selector = json!({ "type": "object", "properties": { "matchLabels": texts } });
    let monitor = json!({ "selector": selector, "endpoints": list(endpoint) });
    for crd in [monitoring("PrometheusRule", &groups), monitoring("ServiceMonitor", &monitor)] {
        fed(plane.kubectl().args(["apply", "--server-side", "-f", "-"]), &crd.to_string()).unwrap();
        let name = format!("crd/{}", crd["metadata"]["name"].as_str().unwrap());
        output(plane.kubectl().args(["wait", "--for=condition=Established", "--timeout=20s", &name])).unwrap();
    }
    let values = [
        "crds.enabled=false,watchNamespaces={NS}",
        "metrics.serviceMonitor.enabled=true,metrics.prometheusRule.enabled=true,metrics.dashboard.enabled=true",
        "metrics.prometheusRule.runbookUrl=https://docs/#,metrics.dashboard.folder=Audit",
        "serviceAccount.create=false,serviceAccount.name=default",
    ];
    let objects = eventually("the new kinds to be served", Duration::from_secs(20), async || {
        dry_run(plane, namespace, &values).map_err(|error| format!("{error:#}"))
    })
    .await;
    let kinds: BTreeSet<&str> = objects.iter().map(|object| object["kind"].as_str().unwrap()).collect();
    let without_account = ALWAYS.iter().filter(|kind| **kind != "ServiceAccount");
    let monitored = ["ConfigMap", "PrometheusRule", "Service", "ServiceMonitor"];
    assert_eq!(kinds, without_account.chain(&monitored).copied().collect());
    assert_eq!(of_kind(&objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"], "default");
    assert_eq!(of_kind(&objects, "RoleBinding")["subjects"][0]["name"], "default");
}

#[tokio::test]
async fn values_reach_what_they_are_for() {
    let operator = namespace().await;
    let (plane, namespace) = (operator.plane, operator.namespace.as_str());
    let mode = |index: usize| dry_run(plane, namespace, MODES[index].0).unwrap();

    let objects = mode(0);
    let plain = container(&objects);
    assert_eq!(plain["image"], "audit-log-sweeper:0.1.0");
    assert_eq!(plain["securityContext"]["readOnlyRootFilesystem"], true);
    assert!(
        plain["livenessProbe"].is_object() && plain["readinessProbe"].is_object() && plain["resources"].is_object()
    );
    assert_eq!(of_kind(&objects, "Deployment")["spec"]["replicas"], 1);
    let crd = of_kind(&objects, "CustomResourceDefinition");
    assert_eq!(crd["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
    let aggregates = |suffix: &str| -> Vec<String> {
        let name = format!("dry-audit-log-sweeper:{namespace}:{suffix}");
        let role = objects.iter().find(|object| object["kind"] == "ClusterRole" && object["metadata"]["name"] == *name);
        let labels = role.unwrap()["metadata"]["labels"].as_object().unwrap();
        labels.keys().filter_map(|key| key.split_once("/aggregate-to-")).map(|(_, to)| to.to_owned()).collect()
    };
    assert_eq!(
        (aggregates("view"), aggregates("edit")),
        (vec!["admin".into(), "edit".into(), "view".into()], vec!["admin".into(), "edit".into()])
    );

    let objects = mode(2);
    let args = container(&objects)["args"].to_string();
    assert!(args.contains(&format!("\"--namespace={namespace}\",\"--namespace=default\"")), "{args}");
    assert!(args.contains("\"--lease-name=dry-audit-log-sweeper\""), "{args}");
    let env = &container(&objects)["env"];
    assert_eq!((&env[0]["name"], &env[1]["name"]), (&json!("POD_NAME"), &json!("POD_NAMESPACE")));
    assert_eq!(env[1]["valueFrom"]["fieldRef"]["fieldPath"], "metadata.namespace");

    let objects = mode(3);
    assert_eq!(
        of_kind(&objects, "Deployment")["spec"]["template"]["spec"]["topologySpreadConstraints"][1]["topologyKey"],
        "kubernetes.io/hostname"
    );
    assert_eq!(of_kind(&objects, "PodDisruptionBudget")["spec"]["maxUnavailable"], 1);
    let objects = mode(4);
    let egress = &of_kind(&objects, "NetworkPolicy")["spec"]["egress"];
    let ports = |rule: &Value| -> Vec<i64> {
        rule["ports"].as_array().unwrap().iter().map(|port| port["port"].as_i64().unwrap()).collect()
    };
    assert_eq!((ports(&egress[1]), &egress[1]["to"]), (vec![443, 6443], &Value::Null));
    let databases = json!([{ "ipBlock": { "cidr": "10.1.0.0/16" } }, { "ipBlock": { "cidr": "fd00::/8" } }]);
    assert_eq!((ports(&egress[2]), &egress[2]["to"]), (vec![5432, 6432], &databases));
    // Anywhere, if nothing is said.
    let anywhere = mode(3);
    assert!(of_kind(&anywhere, "NetworkPolicy")["spec"]["egress"][2].get("to").is_none());

    let objects = mode(5);
    let (deployment, full) = (of_kind(&objects, "Deployment"), container(&objects));
    assert_eq!(deployment["metadata"]["name"], "als");
    assert_eq!(
        full["image"],
        "audit-log-sweeper@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
    );
    assert_eq!(full["env"][3], json!({ "name": "SSL_CERT_FILE", "value": "/etc/audit-log-sweeper/ca/ca.crt" }));
    assert_eq!(full["env"][4], json!({ "name": "HTTPS_PROXY", "value": "http://proxy:3128" }));
    assert!(full["args"].to_string().contains("\"--selector=shard in (a, b)\""));
    let pod = &deployment["spec"]["template"];
    assert_eq!(pod["spec"]["volumes"][0]["configMap"]["name"], "ca");
    assert_eq!(pod["spec"]["priorityClassName"], "system-cluster-critical");
    assert_eq!(pod["spec"]["nodeSelector"]["disk"], "ssd");
    assert_eq!(pod["spec"]["tolerations"][0]["operator"], "Exists");
    assert_eq!(pod["spec"]["imagePullSecrets"][0]["name"], "registry");
    assert_eq!(pod["metadata"]["annotations"]["note"], "x");
    // The chart's own labels win: the Deployment finds its pods by them.
    let labels = &pod["metadata"]["labels"];
    assert_eq!((&labels["team"], &labels["app.kubernetes.io/name"]), (&json!("a"), &json!("audit-log-sweeper")));

    let objects = mode(6);
    let pod = &of_kind(&objects, "Deployment")["spec"]["template"]["spec"];
    assert_eq!(pod["volumes"][0]["secret"]["secretName"], "ca");
    assert_eq!(pod["volumes"][1], json!({ "name": "sockets", "emptyDir": { "medium": "Memory" } }));
    let mounts = &container(&objects)["volumeMounts"];
    assert_eq!((&mounts[0]["name"], &mounts[1]["mountPath"]), (&json!("ca"), &json!("/cloudsql")));
    assert_eq!((&pod["containers"][1]["name"], &pod["initContainers"][0]["name"]), (&json!("beside"), &json!("proxy")));
    assert_eq!(container(&objects)["env"][3]["value"], "/etc/audit-log-sweeper/ca/roots.pem");
    assert_eq!(pod["topologySpreadConstraints"].as_array().unwrap().len(), 1);
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert!(pod["securityContext"].get("runAsUser").is_none(), "{pod}");
    let args = container(&objects)["args"].to_string();
    assert!(
        [
            "--log-level=trace",
            "--log-format=text",
            "--max-concurrent-sweeps=3",
            "--max-sweeps-per-server=2",
            "--max-deadline=30m"
        ]
        .iter()
        .all(|arg| args.contains(arg))
    );
    assert!(!args.contains("--object-metrics"), "{args}");

    let objects = mode(8);
    let (service, args) = (of_kind(&objects, "Service"), container(&objects)["args"].to_string());
    assert!(args.contains("\"--object-metrics=false\""), "{args}");
    let labels = of_kind(&objects, "Deployment")["spec"]["template"]["metadata"]["labels"].as_object().unwrap();
    let selector = service["spec"]["selector"].as_object().unwrap();
    assert!(!selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value)), "{service}");
    assert_eq!(service["spec"]["ports"][0]["targetPort"], container(&objects)["ports"][0]["name"]);
    let ingress = &of_kind(&objects, "NetworkPolicy")["spec"]["ingress"];
    assert_eq!(ingress[0]["from"][0]["namespaceSelector"]["matchLabels"]["team"], "monitoring");
    assert_eq!(ingress[0]["ports"][0]["port"], container(&objects)["ports"][0]["name"]);
}

/// What Helm renders of the monitoring kinds, whose CRDs the test's API server does not have.
#[test]
fn what_prometheus_watches_is_what_there_is() {
    let objects = rendered();
    let (service, monitor) = (of_kind(&objects, "Service"), of_kind(&objects, "ServiceMonitor"));
    let wanted = monitor["spec"]["selector"]["matchLabels"].as_object().unwrap();
    let labels = service["metadata"]["labels"].as_object().unwrap();
    assert!(!wanted.is_empty() && wanted.iter().all(|(key, value)| labels.get(key) == Some(value)), "{service}");
    let endpoint = &monitor["spec"]["endpoints"][0];
    assert_eq!(endpoint["port"], service["spec"]["ports"][0]["name"]);
    // Else the namespace of an object would be that of the pod.
    assert_eq!(
        [&endpoint["honorLabels"], &endpoint["interval"], &endpoint["path"]],
        [&json!(true), &json!("15s"), &json!("/metrics")]
    );
    assert_eq!(monitor["metadata"]["labels"]["release"], "mine");

    let rule = of_kind(&objects, "PrometheusRule");
    assert_eq!(rule["metadata"]["labels"]["release"], "yours");
    for rule in alerts(&objects) {
        let (name, expr) = (rule["alert"].as_str().unwrap(), rule["expr"].as_str().unwrap());
        let used = selectors(expr);
        let names: Vec<&str> = used.iter().map(|used| used.split('{').next().unwrap()).collect();
        assert!(!names.is_empty() && names.iter().all(|metric| samples().contains(*metric)), "{name}: {names:?}");
        // Of this release alone, and by the job that a ServiceMonitor gives it: the name of the Service.
        let job = format!("{{job={}", service["metadata"]["name"]);
        assert_eq!(expr.matches(&job).count(), used.len(), "{name}: {expr}");
        assert_eq!(expr.matches('(').count(), expr.matches(')').count(), "{name}: {expr}");
        assert_eq!(rule["annotations"]["runbook_url"], format!("https://docs/#{}", name.to_lowercase()));
        let texts = [&rule["annotations"]["summary"], &rule["annotations"]["description"], &rule["labels"]["severity"]];
        assert!(texts.iter().all(|text| !text.as_str().unwrap().is_empty()), "{rule}");
    }
}

#[test]
fn the_dashboard_is_found_by_grafana_and_every_part_of_it_can_be_told_apart() {
    let objects = rendered();
    let map = of_kind(&objects, "ConfigMap");
    assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
    assert_eq!(map["metadata"]["annotations"]["grafana_folder"], "Audit");
    let dashboard = dashboard(&objects);
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let variables: Vec<&str> = variables.iter().map(|variable| variable["name"].as_str().unwrap()).collect();
    assert_eq!(variables, ["datasource", "namespace", "name"]);
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<i64> = panels.iter().map(|panel| panel["id"].as_i64().unwrap()).collect();
    let titles: BTreeSet<&str> = panels.iter().map(|panel| panel["title"].as_str().unwrap()).collect();
    assert_eq!((ids.len(), titles.len()), (panels.len(), panels.len()));
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{panel}");
        assert!(!panel["description"].as_str().unwrap().is_empty(), "{panel}");
        let place = &panel["gridPos"];
        assert!(place["x"].as_i64().unwrap() + place["w"].as_i64().unwrap() <= 24, "{panel}");
    }
    let queries = queries(&dashboard);
    let used: Vec<&str> = queries.iter().flat_map(|query| selectors(query)).collect();
    for selector in used {
        let name = selector.split('{').next().unwrap();
        assert!(samples().contains(name.trim_end_matches("_bucket")), "{selector}");
    }
}

#[test]
fn nonsense_is_refused_and_named() {
    let helm = support::tools::Tools::helm().unwrap();
    let refused = |values: &str| {
        let mut command = Command::new(&helm);
        command.args(["template", "x"]).arg(chart()).args(["--set", values]);
        output(&mut command).map(drop).map_err(|error| error.to_string())
    };
    for (values, said) in [
        ("replicas=2", "additional properties 'replicas' not allowed"),
        ("image.digset=x", "additional properties 'digset' not allowed"),
        ("image.digest=sha256:12", "'/image/digest': 'sha256:12' does not match pattern"),
        ("image.tag=a:b", "'/image/tag': 'a:b' does not match pattern"),
        ("image.repository=", "'/image/repository': minLength"),
        ("image.pullPolicy=Sometimes", "'/image/pullPolicy': value must be one of 'Always', 'IfNotPresent', 'Never'"),
        ("replicaCount=-1", "'/replicaCount': minimum: got -1, want 0"),
        ("replicaCount=two", "'/replicaCount': got string, want integer"),
        ("watchNamespaces=team-a", "'/watchNamespaces': got string, want array"),
        ("watchNamespaces={Team}", "'/watchNamespaces/0': 'Team' does not match pattern"),
        ("watchNamespaces={a,a}", "'/watchNamespaces': items at 0 and 1 are equal"),
        ("logLevel=loud", "'/logLevel': value must be one of 'error', 'warn', 'info', 'debug', 'trace'"),
        ("metrics.serviceMonitor.interval=often", "'/metrics/serviceMonitor/interval': 'often' does not match pattern"),
        ("metrics.dashboard.folder=1", "'/metrics/dashboard/folder': got number, want string"),
        ("metrics.enabled=true", "additional properties 'enabled' not allowed"),
        ("maxConcurrentSweeps=0", "'/maxConcurrentSweeps': minimum: got 0, want 1"),
        ("maxSweepsPerServer=0", "'/maxSweepsPerServer': minimum: got 0, want 1"),
        ("crds.enabled=maybe", "'/crds/enabled': got string, want boolean"),
        ("extraEnv[0].value=x", "'/extraEnv/0': missing property 'name'"),
        ("networkPolicy.databasePorts={99999}", "'/networkPolicy/databasePorts/0': maximum: got 99,999, want 65,535"),
        ("podAnnotations.count=1", "'/podAnnotations/count': got number, want string"),
        ("fullnameOverride=Als", "'/fullnameOverride': 'Als' does not match pattern"),
        ("caBundle.configMapName=a,caBundle.secretName=b", "caBundle: set configMapName or secretName, not both"),
        ("serviceAccount.create=false", "serviceAccount.name is required when serviceAccount.create is false"),
    ] {
        let error = refused(values).expect_err(values);
        assert!(error.contains(said), "{values}: {error}");
    }
    refused("global.anything.at=all").unwrap();
    // To no port at all would be to every one.
    let none = ["template", "x", "--set-json", "networkPolicy.databasePorts=[]"];
    let error = output(Command::new(&helm).args(none).arg(chart())).unwrap_err().to_string();
    assert!(error.contains("'/networkPolicy/databasePorts': minItems: got 0, want 1"), "{error}");
    // A chart that this one is a part of may have it on a condition.
    refused("enabled=true").unwrap();
}

/// YAML takes some names for numbers or truth values.
#[test]
fn names_are_text_whatever_they_look_like() {
    let helm = support::tools::Tools::helm().unwrap();
    for (release, namespace) in [("123", "456"), ("on", "true"), ("a.b", "null")] {
        let mut command = Command::new(&helm);
        command.args(["template", release, "-n", namespace]).arg(chart());
        let rendered = output(&mut command).unwrap();
        let objects = rendered.split("\n---\n").filter(|text| text.lines().any(|line| line.starts_with("kind:")));
        for object in objects.map(|text| serde_saphyr::from_str::<Value>(text).unwrap()) {
            let labels = object["metadata"]["labels"].as_object().into_iter().flatten();
            assert!(labels.clone().all(|(_, value)| value.is_string()), "{object:#}");
            let places = [&object["metadata"]["namespace"], &object["subjects"][0]["namespace"]];
            assert!(places.iter().all(|place| place.is_null() || **place == json!(namespace)), "{object:#}");
            let name = object["metadata"]["name"].as_str().unwrap();
            let dots = object["kind"] == "CustomResourceDefinition";
            assert!(dots || !name.contains('.'), "{name}");
        }
    }
}

/// Every key of the values, with those that it lies in.
fn keys(values: &Value, within: &str) -> Vec<String> {
    let Some(map) = values.as_object() else { return vec![] };
    let keys = |(key, value): (&String, &Value)| {
        let path = if within.is_empty() { key.clone() } else { format!("{within}.{key}") };
        let inner = keys(value, &path);
        [vec![path], inner].concat()
    };
    map.iter().flat_map(keys).collect()
}

/// With null Helm takes a default away.
#[test]
fn a_value_that_is_taken_away_is_empty_or_named_as_missing() {
    let helm = support::tools::Tools::helm().unwrap();
    let values = output(Command::new(&helm).args(["show", "values"]).arg(chart())).unwrap();
    let everything = "metrics.serviceMonitor.enabled=true,metrics.prometheusRule.enabled=true,\
        metrics.dashboard.enabled=true,networkPolicy.enabled=true";
    let (mut empty, mut missing) = (vec![], vec![]);
    for key in keys(&serde_saphyr::from_str(&values).unwrap(), "") {
        let mut command = Command::new(&helm);
        command.args(["template", "x"]).arg(chart()).args(["--set", everything, "--set", &format!("{key}=null")]);
        let name = key.rsplit('.').next().unwrap();
        match output(&mut command) {
            Ok(rendered) => {
                // No flag is left without its value.
                let half = |line: &str| line.trim_start().starts_with("- --") && line.ends_with('=');
                let halves: Vec<&str> = rendered.lines().filter(|line| half(line) || line.contains("<nil>")).collect();
                assert!(halves.is_empty(), "{key}: {halves:?}");
                empty.push(key);
            }
            Err(error) => {
                assert!(error.to_string().contains(&format!("missing property '{name}'")), "{key}: {error}");
                missing.push(key);
            }
        }
    }
    assert!(empty.contains(&"resources".into()) && empty.contains(&"podLabels".into()), "{empty:?}");
    assert!(missing.contains(&"image".into()) && missing.contains(&"metrics.service.enabled".into()), "{missing:?}");
}
