//! Sweep now, suspend, Observe to Apply, and what is told of it: by kubectl, on the real API server.

use serde_json::{Value, json};
use support::process::output;
use support::scratch::Scratch;
use support::wait::eventually;

use crate::fixtures::operator::{WAIT_TIMEOUT, has, replica};
use crate::fixtures::{AuditTable, DedicatedControlPlane, Operator};

impl Operator {
    /// Asks for a sweep, as the README says.
    fn request(&self, token: &str) {
        let annotation = format!("auditlog.dev/requestedAt={token}");
        output(self.kubectl().args(["annotate", "als/app", &annotation, "--overwrite"])).unwrap();
    }

    /// The events of the object, oldest first: type and reason, and the note.
    async fn events(&self, least: usize) -> Vec<(String, String)> {
        eventually("the events", WAIT_TIMEOUT, async || {
            let list = output(self.kubectl().args(["get", "events.events.k8s.io", "-o", "json"])).unwrap();
            let list: Value = serde_json::from_str(&list).unwrap();
            let mut events: Vec<_> = list["items"].as_array().unwrap().clone();
            events.sort_by_key(|event| event["eventTime"].as_str().unwrap().to_owned());
            let text = |event: &Value, key: &str| event[key].as_str().unwrap_or_default().to_owned();
            let events: Vec<_> = events
                .iter()
                .map(|event| {
                    assert_eq!(event["series"], Value::Null, "{event:#}");
                    (format!("{} {}", text(event, "type"), text(event, "reason")), text(event, "note"))
                })
                .collect();
            if events.len() >= least { Ok(events) } else { Err(format!("{events:?}")) }
        })
        .await
    }
}

fn reasons(events: &[(String, String)]) -> Vec<&str> {
    events.iter().map(|(reason, _)| reason.as_str()).collect()
}

#[tokio::test]
async fn each_new_value_is_one_sweep_and_no_more() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "8760h", "limit": 2 })).await;
    let first = operator.until("app", "the first sweep", |s| s["totals"]["sweeps"] == json!(1)).await;
    log.start_many(3).await;
    operator.request("one");
    let status = operator.until("app", "the answer", |s| s["lastHandledRequest"] == json!("one")).await;
    assert_eq!(status["lastSweep"]["trigger"], json!("Request"), "{status:#}");
    assert_eq!((&status["totals"]["sweeps"], log.timed_out().await), (&json!(2), vec![1, 2]));
    assert_eq!(status["lastScheduleTime"], first["lastScheduleTime"], "it took no slot");
    assert!(has(&status, "Ready=True/LimitReached"), "{status:#}");
    // The same value again asks for nothing; 500 bytes are told apart by their first 128.
    operator.request("one");
    let long = "x".repeat(500);
    operator.request(&long);
    let status = operator.until("app", "the answer", move |s| s["lastHandledRequest"] == json!(long[..128])).await;
    assert_eq!((&status["totals"]["sweeps"], log.timed_out().await), (&json!(3), vec![1, 2, 3]));
    let history: Vec<_> =
        status["history"].as_array().unwrap().iter().map(|h| (&h["trigger"], &h["timedOut"])).collect();
    assert_eq!(
        history,
        [(&json!("Request"), &json!(1)), (&json!("Request"), &json!(2)), (&json!("Create"), &json!(0))]
    );

    // Events with one reason and other texts are events of their own.
    let events = operator.events(5).await;
    let requested = "Normal SweepRequested";
    let expected = [requested, "Warning RowsTimedOut", "Normal LimitReached", requested, "Warning RowsTimedOut"];
    assert_eq!(reasons(&events), expected, "{events:?}");
    assert!(events[1].1.starts_with("completed 2 rows as timed out"), "{events:?}");
    assert!(events[4].1.starts_with("completed 1 row as timed out"), "{events:?}");
    // Each sweep wrote the status once; the first had been acknowledged before.
    let writes =
        operator.requests().iter().filter(|request| request.starts_with("patch auditlogsweepers/status")).count();
    assert_eq!(writes, 4, "{:?}", operator.requests());
    let described = output(operator.kubectl().args(["describe", "als", "app"])).unwrap();
    assert!(described.contains("RowsTimedOut") && described.contains("completed 2 rows as timed out"), "{described}");
}

#[tokio::test]
async fn a_failed_request_counts_and_moves_nothing() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "8760h" })).await;
    let before = operator.until("app", "the first sweep", |s| s["totals"]["sweeps"] == json!(1)).await;
    output(operator.kubectl().args(["delete", "secret", "db"])).unwrap();
    operator.request("one");
    let status = operator.until("app", "the answer", |s| s["lastHandledRequest"] == json!("one")).await;
    assert!(has(&status, "Ready=False/SecretNotFound"), "{status:#}");
    assert_eq!((&status["consecutiveFailures"], &status["totals"]["failures"]), (&json!(1), &json!(1)));
    // It is retried soon, as any failure; a second request that fails does not move that retry.
    let retry = status["nextScheduleTime"].clone();
    assert!(retry.as_str() < before["nextScheduleTime"].as_str(), "{status:#}");
    operator.request("two");
    let status = operator.until("app", "the answer", |s| s["lastHandledRequest"] == json!("two")).await;
    assert_eq!((&status["consecutiveFailures"], &status["nextScheduleTime"]), (&json!(2), &retry));
    operator.secret_for(&log).await;
    let status = operator.until("app", "the retry", |s| has(s, "Ready=True/Swept")).await;
    assert_eq!(status["lastHandledRequest"], json!("two"));
    let events = operator.events(4).await;
    let requested = "Normal SweepRequested";
    assert_eq!(reasons(&events), [requested, "Warning SweepFailed", requested, "Normal Recovered"], "{events:?}");
    assert!(events[1].1.starts_with("SecretNotFound: there is no Secret db"), "{events:?}");
}

#[tokio::test]
async fn on_creation_the_first_sweep_answers_and_while_suspended_none_does() {
    let (log, mut operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "8760h" })).await;
    operator.request("early");
    operator.start().await;
    let status = operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    assert_eq!((&status["lastHandledRequest"], &status["lastSweep"]["trigger"]), (&json!("early"), &json!("Create")));
    assert_eq!(status["totals"]["sweeps"], json!(1));

    log.start(1, "2 h").await;
    operator.apply("app", json!({ "period": "8760h", "suspend": true })).await;
    operator.until("app", "the suspension", |s| has(s, "Suspended=True/Suspended")).await;
    operator.request("in-vain");
    let status = operator.until("app", "the answer", |s| s["lastHandledRequest"] == json!("in-vain")).await;
    assert_eq!((&status["totals"]["sweeps"], log.open().await), (&json!(1), vec![1]));
    operator.apply("app", json!({ "period": "8760h" })).await;
    let status = operator.until("app", "the resume", |s| has(s, "Suspended=False/NotSuspended")).await;
    assert_eq!((&status["totals"]["sweeps"], log.open().await), (&json!(1), vec![1]), "{status:#}");
    let events = operator.events(4).await;
    assert_eq!(
        reasons(&events),
        ["Normal SweepRequested", "Normal Suspended", "Normal SweepRequested", "Normal Resumed"]
    );
    assert!(events[2].1.contains("does not run"), "{events:?}");
}

#[tokio::test]
async fn observe_becomes_apply_by_an_edit_and_a_request() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    log.start_many(3).await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "8760h", "mode": "Observe" })).await;
    let status = operator.until("app", "the first look", |s| has(s, "Ready=True/Observed")).await;
    assert_eq!((&status["backlog"]["display"], log.open().await), (&json!("3"), vec![1, 2, 3]));
    operator.apply("app", json!({ "period": "8760h" })).await;
    operator.until("app", "the edit", |s| s["observedGeneration"] == json!(2)).await;
    assert_eq!(log.open().await, [1, 2, 3], "an edit sweeps nothing");
    operator.request("now");
    operator.until("app", "the sweep", |s| has(s, "Ready=True/Swept")).await;
    assert_eq!(log.timed_out().await, [1, 2, 3]);
}

#[tokio::test]
async fn a_missing_index_is_told_and_its_creation_seen() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    log.start(1, "2 h").await;
    let indexes = log
        .query(
            "SELECT indexrelid::regclass FROM pg_index WHERE indpred IS NOT NULL AND indrelid = 'audit_log'::regclass",
        )
        .await;
    for index in indexes {
        log.run(&format!("DROP INDEX {index}")).await;
    }
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "8760h" })).await;
    let status = operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    // It sweeps, if slowly, and says what is missing.
    assert!(has(&status, "Ready=True/Swept") && has(&status, "SchemaReady=False/IndexMissing"), "{status:#}");
    assert_eq!(log.timed_out().await, [1]);
    let schema = status["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "SchemaReady").unwrap();
    assert!(schema["message"].as_str().unwrap().contains("CREATE INDEX CONCURRENTLY"), "{schema:#}");
    log.run(include_str!("../../manifests/sql/index.sql")).await;
    operator.request("again");
    operator.until("app", "the index to be seen", |s| has(s, "SchemaReady=True/SchemaReady")).await;
}

#[tokio::test]
async fn a_time_that_no_sweep_can_have_is_repaired_and_told() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "1h" })).await;
    operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    let patch = r#"{"status":{"nextScheduleTime":"2099-01-01T00:00:00Z","lastAttemptTime":"2098-01-01T00:00:00Z"}}"#;
    output(operator.kubectl().args(["patch", "als/app", "--subresource=status", "--type=merge", "-p", patch])).unwrap();
    let soon = (chrono::Utc::now() + chrono::TimeDelta::hours(2)).to_rfc3339();
    let status = operator
        .until("app", "the repair", move |s| s["nextScheduleTime"].as_str().is_some_and(|next| next < soon.as_str()))
        .await;
    assert_eq!(status["totals"]["sweeps"], json!(1), "{status:#}");
    assert_eq!(reasons(&operator.events(1).await), ["Warning ScheduleRepaired"]);
}

#[tokio::test]
async fn quiet_sweeps_write_once_each_tell_nothing_and_log_at_debug() {
    let (log, mut operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "5s" })).await;
    let status = operator.until("app", "four sweeps", |s| s["totals"]["sweeps"].as_i64() >= Some(4)).await;
    let lines = operator.terminate().await;
    let sweeps = json!(operator.api().get("app").await.unwrap().status)["totals"]["sweeps"].as_i64().unwrap();
    let writes =
        operator.requests().iter().filter(|request| request.starts_with("patch auditlogsweepers/status")).count();
    // And the acknowledgement.
    assert_eq!(i64::try_from(writes).unwrap(), sweeps + 1, "{:?}", operator.requests());
    assert_eq!(operator.events(0).await, []);
    let history = status["history"].as_array().unwrap();
    assert!(history.len() == 2 && history[0]["count"].as_i64() >= Some(3), "{status:#}");
    let said: Vec<Value> = lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let quiet: Vec<_> = said.iter().filter(|line| line["message"] == "nothing to time out").collect();
    assert_eq!(i64::try_from(quiet.len()).unwrap(), sweeps);
    for line in quiet {
        assert_eq!((&line["level"], &line["name"], &line["timed_out"]), (&json!("DEBUG"), &json!("app"), &json!(0)));
        assert!(
            line["cutoff"].is_string() && line["limit"] == json!(1000) && line["duration_ms"].is_number(),
            "{line}"
        );
    }
}

#[tokio::test]
async fn rows_timed_out_are_a_warning_and_failures_an_error_in_the_log() {
    let (log, mut operator) = (AuditTable::new().await, Operator::new().await);
    log.start_many(2).await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "8760h" })).await;
    operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    output(operator.kubectl().args(["delete", "secret", "db"])).unwrap();
    operator.request("one");
    operator.until("app", "the failure", |s| s["lastError"] != Value::Null).await;
    let lines = operator.terminate().await;
    let said: Vec<Value> = lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of = |level: &str| said.iter().find(|line| line["level"] == level && line["name"] == "app").unwrap();
    let warning = of("WARN");
    assert_eq!((&warning["timed_out"], &warning["outcome"]), (&json!(2), &json!("Drained")), "{warning}");
    assert!(warning["cutoff"].is_string() && warning["duration_ms"].is_number(), "{warning}");
    let error = of("ERROR");
    assert_eq!((&error["message"], &error["reason"]), (&json!("sweep failed"), &json!("SecretNotFound")), "{error}");
}

#[tokio::test]
async fn helm_waits_until_an_object_of_a_release_was_swept() {
    let (log, mut operator) = (AuditTable::new().await, Operator::absent().await);
    let scratch = Scratch::new(None).unwrap();
    std::fs::create_dir(scratch.path().join("templates")).unwrap();
    scratch.write("Chart.yaml", "apiVersion: v2\nname: app\nversion: 0.1.0\n", None).unwrap();
    let object = "apiVersion: auditlog.dev/v1alpha1\nkind: AuditLogSweeper\nmetadata: {name: app}\n\
                  spec: {period: 8760h, limit: {{ .Values.limit | default 10 }}, \
                  database: {secretRef: {name: db}, tls: {mode: Disable}}}\n";
    scratch.write("templates/app.yaml", object, None).unwrap();
    let helm = |args: &[&str], namespace: &str| {
        let mut helm = operator.plane.helm();
        helm.args(args).arg(scratch.path()).args(["-n", namespace, "--wait"]);
        output(&mut helm)
    };
    // Nobody looks at it: it is in progress, not done.
    let error = helm(&["install", "app", "--timeout=2s"], &operator.namespace).unwrap_err().to_string();
    assert!(error.contains("InProgress") || error.contains("not ready") || error.contains("deadline"), "{error}");
    operator.secret_for(&log).await;
    let namespace = operator.namespace.clone();
    operator.start().await;
    let (plane, path) = (operator.plane, scratch.path().to_owned());
    let waited = tokio::task::spawn_blocking(move || {
        let upgrade = ["upgrade", "app", "--timeout=20s", "--wait", "--set=limit=7", "-n", &namespace];
        output(plane.helm().args(upgrade).arg(path))
    });
    waited.await.unwrap().unwrap();
    let status = json!(operator.api().get("app").await.unwrap().status);
    assert!(status["observedGeneration"] == json!(2) && status["lastSweep"] != Value::Null, "{status:#}");
    assert!(has(&status, "Ready=True/Swept") || has(&status, "Ready=True/SchemaReady"), "{status:#}");
    // What cannot work is not done either.
    operator.apply("app", json!({ "period": "8760h", "table": "nowhere" })).await;
    let wait = ["wait", "als/app", "--for=condition=Ready=False", "--timeout=10s"];
    output(operator.kubectl().args(wait)).unwrap();
}

#[tokio::test]
async fn what_another_manager_wrote_into_the_status_stays() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "8760h" })).await;
    operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    let condition = json!({ "type": "Approved", "status": "True", "reason": "ByHand", "message": "by a person",
                            "lastTransitionTime": "2026-01-01T00:00:00Z" });
    let theirs = json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": "app" },
                         "status": { "conditions": [condition], "consecutiveFailures": 7 } });
    let params = kube::api::PatchParams::apply("somebody").force();
    operator.api().patch_status("app", &params, &kube::api::Patch::Apply(&theirs)).await.unwrap();
    operator.request("one");
    let status = operator.until("app", "the sweep", |s| s["lastHandledRequest"] == json!("one")).await;
    assert!(has(&status, "Approved=True/ByHand") && has(&status, "Ready=True/Swept"), "{status:#}");
    assert_eq!(status["consecutiveFailures"], json!(0), "what is ours is taken back: {status:#}");
}

#[tokio::test]
async fn a_status_that_is_refused_repeats_no_sweep() {
    let DedicatedControlPlane { plane, namespace, scratch, config, .. } = DedicatedControlPlane::new().await;
    // As under another version's CRD: no message is short enough.
    let path =
        "/spec/versions/0/schema/openAPIV3Schema/properties/status/properties/lastError/properties/message/maxLength";
    let patch = json!([{ "op": "replace", "path": path, "value": 1 }]).to_string();
    output(plane.kubectl().args(["patch", "crd", "auditlogsweepers.auditlog.dev", "--type=json", "-p", &patch]))
        .unwrap();
    let process = replica("operator", &config, &scratch, &namespace, &[]);
    let object = "apiVersion: auditlog.dev/v1alpha1\nkind: AuditLogSweeper\nmetadata: {name: app}\n\
                  spec: {period: 8760h, database: {secretRef: {name: nowhere}}}\n";
    let file = scratch.write("app.yaml", object, None).unwrap();
    output(plane.kubectl().args(["apply", "-n", &namespace, "-f"]).arg(file)).unwrap();
    let status = eventually("what can be written", WAIT_TIMEOUT, async || {
        let text = output(plane.kubectl().args(["get", "als", "app", "-n", &namespace, "-o", "json"])).unwrap();
        let status = serde_json::from_str::<Value>(&text).unwrap()["status"].clone();
        if has(&status, "Ready=False/SecretNotFound") {
            Ok(status)
        } else {
            Err(format!("{status:#}\n{}", process.log_tail(5)))
        }
    })
    .await;
    assert_eq!((&status["lastError"], &status["consecutiveFailures"]), (&Value::Null, &json!(1)), "{status:#}");
    assert!(process.log_tail(usize::MAX).contains("the status was refused"));
    process.stop();
}
