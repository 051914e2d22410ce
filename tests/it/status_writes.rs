//! Writes of the status: whatever the API server answers, whoever else wrote there, no count is lost and no object forgotten.

use std::time::Duration;

use kube::api::{Patch, PatchParams};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::process::output;
use support::wait::eventually;

use crate::fixtures::http_fault_proxy::Refusal;
use crate::fixtures::operator::{has, replica, until_says};
use crate::fixtures::{AuditTable, HttpFaultProxy, Operator};

/// A write that was refused is tried again after at most a minute.
const RETRIED: Duration = Duration::from_secs(75);

impl Operator {
    /// Applies a cluster-wide object that concerns this namespace alone.
    fn create(&self, object: &Value) {
        let file = self.scratch.write("object.json", object.to_string(), None).unwrap();
        output(self.kubectl().args(["apply", "-f"]).arg(file)).unwrap();
    }

    fn delete(&self, kinds: &str) {
        output(self.kubectl().args(["delete", kinds, &self.namespace])).unwrap();
    }

    /// Waits until the status counts so many rows, and is well.
    async fn until_counted(&self, rows: u32) -> Value {
        eventually("the counts", RETRIED, async || {
            let status = json!(self.api().get("app").await.map_err(|error| error.to_string())?.status);
            let counted = status["totals"]["timedOut"] == json!(rows) && has(&status, "Ready=True/Swept");
            if counted { Ok(status) } else { Err(format!("{status:#}\n{}", self.log())) }
        })
        .await
    }

    /// A webhook or policy for writes of the status in this namespace.
    fn of_status_writes(&self) -> Value {
        let selector = json!({ "matchLabels": { "kubernetes.io/metadata.name": self.namespace } });
        let rule = json!({ "apiGroups": ["auditlog.dev"], "apiVersions": ["*"], "operations": ["UPDATE"],
                           "resources": ["auditlogsweepers/status"] });
        json!({ "namespaceSelector": selector, "resourceRules": [rule.clone()], "rules": [rule] })
    }

    fn deny_by_policy(&self) {
        let of = self.of_status_writes();
        let constraints = json!({ "namespaceSelector": of["namespaceSelector"], "resourceRules": of["resourceRules"] });
        let (api, name) = ("admissionregistration.k8s.io/v1", &self.namespace);
        self.create(&json!({
            "apiVersion": api, "kind": "ValidatingAdmissionPolicy", "metadata": { "name": name },
            "spec": { "matchConstraints": constraints, "validations": [{ "expression": "false", "message": "denied" }] },
        }));
        self.create(&json!({
            "apiVersion": api, "kind": "ValidatingAdmissionPolicyBinding", "metadata": { "name": name },
            "spec": { "policyName": name, "validationActions": ["Deny"] },
        }));
    }

    /// A webhook that leads to a port.
    fn ask_webhook(&self, port: u16) {
        let of = self.of_status_writes();
        self.create(&json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": { "name": self.namespace },
            "webhooks": [{
                "name": "status.test.auditlog.dev", "sideEffects": "None", "admissionReviewVersions": ["v1"],
                "failurePolicy": "Fail", "timeoutSeconds": 2, "rules": of["rules"],
                "namespaceSelector": of["namespaceSelector"],
                "clientConfig": { "url": format!("https://127.0.0.1:{port}/") },
            }],
        }));
    }
}

#[tokio::test]
async fn a_policy_that_denies_status_writes_delays_the_counts_and_loses_none() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "5s" })).await;
    operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    operator.deny_by_policy();
    eventually("a write to be denied", RETRIED, async || {
        let log = operator.log();
        if log.contains("trying this object again") { Ok(()) } else { Err(log) }
    })
    .await;
    let before = json!(operator.api().get("app").await.unwrap().status)["totals"]["sweeps"].as_i64().unwrap();
    log.start_many(3).await;
    operator.delete("validatingadmissionpolicybinding,validatingadmissionpolicy");
    let status = operator.until_counted(3).await;
    assert!(status["totals"]["sweeps"].as_i64() >= Some(before + 1), "{status:#}");
    assert_eq!((&status["totals"]["failures"], log.timed_out().await), (&json!(0), vec![1, 2, 3]));
}

#[tokio::test]
async fn a_webhook_that_never_answers_delays_the_counts_and_loses_none() {
    let (log, mut operator) = (AuditTable::new().await, Operator::absent().await);
    log.start_many(3).await;
    operator.secret_for(&log).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    operator.apply("app", json!({ "period": "1h" })).await;
    operator.ask_webhook(listener.local_addr().unwrap().port());
    operator.start().await;
    until_says(operator.process.as_ref().unwrap(), "trying this object again").await;
    operator.delete("validatingwebhookconfiguration");
    let status = operator.until_counted(3).await;
    assert_eq!(status["totals"]["sweeps"], json!(1), "{status:#}");
    assert_eq!(log.timed_out().await, [1, 2, 3]);
}

#[tokio::test]
async fn no_answer_to_a_status_write_loses_a_count_or_an_object() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    let proxy = HttpFaultProxy::new(&operator.kubeconfig(None).await, &operator.scratch).await;
    let mut process = replica("a", &proxy.kubeconfig, &operator.scratch, &operator.namespace, &[]);
    operator.apply("app", json!({ "period": "5s" })).await;
    operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    for (number, code) in (1..).zip([400, 403, 409, 413, 422, 429, 500, 503]) {
        let refused = proxy.refused("/status");
        log.start(number, "2 h").await;
        proxy.refuse(Some(Refusal { code, of: "/status", spare: 0 }));
        log.until_swept(usize::try_from(number).unwrap()).await;
        eventually("writes to be refused", RETRIED, async || {
            let now = proxy.refused("/status");
            if now > refused { Ok(()) } else { Err(now.to_string()) }
        })
        .await;
        proxy.refuse(None);
        operator.until_counted(number).await;
    }
    assert_eq!(log.timed_out().await, (1..=8).collect::<Vec<_>>());
    assert!(process.is_running(), "{}", process.log_tail(30));
}

/// Writes parts of a status in the name of somebody else, who owns them from then on.
async fn write_as_somebody(operator: &Operator, status: Value) {
    let body = json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": "app" },
                       "status": status });
    let params = PatchParams::apply("somebody").force();
    operator.api().patch_status("app", &params, &Patch::Apply(&body)).await.unwrap();
}

#[tokio::test]
async fn a_resume_place_that_somebody_owns_hides_no_row() {
    let (log, mut operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "5s" })).await;
    operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    operator.terminate().await;
    log.start_many(7).await;
    let place = json!({ "timeStarted": "infinity" });
    write_as_somebody(&operator, json!({ "unsweepable": { "count": 1, "ids": [], "resumeAfter": place } })).await;
    operator.start().await;
    let status = operator.until("app", "the sweep", |s| s["totals"]["timedOut"] == json!(7)).await;
    assert_eq!((&status["unsweepable"], log.timed_out().await), (&Value::Null, (1..=7).collect()), "{status:#}");
}

#[tokio::test]
async fn conditions_of_others_stay_and_ours_do_not_outlast_the_next_write() {
    let (log, mut operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "5s" })).await;
    let condition = |type_: String| {
        json!({ "type": type_, "status": "True", "reason": "ByHand", "message": "by a person",
                "lastTransitionTime": "2026-01-01T00:00:00Z" })
    };
    let mut theirs: Vec<Value> = (0..30).map(|number| condition(format!("Foreign{number}"))).collect();
    theirs.push(condition("Stalled".into()));
    write_as_somebody(
        &operator,
        json!({ "conditions": theirs, "totals": { "sweeps": 1000, "failures": 5, "timedOut": 7 } }),
    )
    .await;
    log.start(1, "2 h").await;
    operator.start().await;
    let status = operator.until("app", "a sweep", |s| s["totals"]["timedOut"] == json!(8)).await;
    assert!(!has(&status, "Stalled=True/ByHand") && has(&status, "Ready=True/Swept"), "{status:#}");
    assert!((0..30).all(|number| has(&status, &format!("Foreign{number}=True/ByHand"))), "{status:#}");
    assert!(status["totals"]["sweeps"].as_i64() > Some(1000), "{status:#}");
}

#[tokio::test]
async fn a_status_that_cannot_be_read_is_written_anew_and_keeps_what_can() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "5s" })).await;
    operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    for time in ["2026-11-27T10:00:00+99:99", "9999-12-31T23:59:59Z"] {
        log.run("TRUNCATE audit_log").await;
        log.start(1, "2 h").await;
        let before = json!(operator.api().get("app").await.unwrap().status)["totals"]["timedOut"].as_i64().unwrap();
        let patch = json!({ "status": { "lastSuccessfulTime": time, "nextScheduleTime": time } }).to_string();
        let args = ["patch", "als/app", "--subresource=status", "--type=merge", "-p", &patch];
        if output(operator.kubectl().args(args)).is_err() {
            // This API server does not take such a time.
            continue;
        }
        operator.until("app", "a sweep", move |s| s["totals"]["timedOut"] == json!(before + 1)).await;
    }
}

/// As Velero does it: the object is created without its status, and then the old status is written.
#[tokio::test]
async fn a_restored_object_goes_on_from_the_status_of_its_backup() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    log.start(1, "2 h").await;
    operator.apply("app", json!({ "period": "5s" })).await;
    operator.until("app", "the first sweep", |s| s["totals"]["timedOut"] == json!(1)).await;
    // The new object begins at generation 1 again, and its status has seen 2.
    operator.apply("app", json!({ "period": "6s" })).await;
    operator.until("app", "the edit", |s| s["observedGeneration"] == json!(2)).await;
    let mut backup = json!(operator.api().get("app").await.unwrap());
    operator.api().delete("app", &Default::default()).await.unwrap();
    eventually("the object to be gone", RETRIED, async || match operator.api().get_opt("app").await.unwrap() {
        None => Ok(()),
        Some(object) => Err(format!("{object:?}")),
    })
    .await;
    let status = backup["status"].take();
    backup["metadata"] = json!({ "name": "app" });
    let restored: audit_log_sweeper::api::AuditLogSweeper = serde_json::from_value(backup).unwrap();
    operator.api().create(&Default::default(), &restored).await.unwrap();
    let patch = json!({ "status": status });
    operator.api().patch_status("app", &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    log.start(2, "2 h").await;
    let status = operator.until("app", "sweeps", |s| s["totals"]["timedOut"].as_i64() >= Some(2)).await;
    assert!(has(&status, "Ready=True/Swept") && status["observedGeneration"] == json!(1), "{status:#}");
    assert_eq!(log.timed_out().await, [1, 2]);
}

#[tokio::test]
async fn a_leader_that_was_frozen_says_nothing_of_what_it_no_longer_leads() {
    let (log, operator) = (AuditTable::slow(400).await, Operator::absent().await);
    operator.secret_for(&log).await;
    let config = operator.kubeconfig(None).await;
    let start = |pod: &str| replica(pod, &config, &operator.scratch, &operator.namespace, &["--lease-duration=3s"]);
    let a = start("a");
    operator.apply("app", json!({ "batchSize": 1, "period": "1h" })).await;
    log.until_swept(2).await;
    a.signal(Signal::SIGSTOP).unwrap();
    let b = start("b");
    until_says(&b, "leading").await;
    // Nothing is left for the other to sweep, so that no later attempt of it stands in the way.
    operator.apply("app", json!({ "batchSize": 1, "period": "1h", "suspend": true })).await;
    let before = operator.until("app", "the suspension", |s| has(s, "Suspended=True/Suspended")).await;
    log.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'audit-log-sweeper/%' AND datname = current_database()").await;
    a.signal(Signal::SIGCONT).unwrap();
    until_says(&a, "lost the lease").await;
    // Its rows are counted, and that is all.
    let rows = log.timed_out().await.len();
    let after = operator.until("app", "its count", move |s| s["totals"]["timedOut"] == json!(rows)).await;
    assert_eq!((&after["conditions"], &after["lastError"]), (&before["conditions"], &Value::Null), "{after:#}");
    drop(b);
}
