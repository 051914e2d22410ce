//! The controller, end to end: the real binary, the real API server with the chart's rights, real databases.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use support::process::output;
use support::wait::eventually;

use crate::fixtures::operator::{WAIT_TIMEOUT, conditions, has, probe};
use crate::fixtures::{AuditTable, Operator};

#[tokio::test]
async fn an_applied_object_is_swept_and_kubectl_shows_it() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    log.start_many(3).await;
    log.start(9, "10 min").await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "limit": 2 })).await;
    let status = operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;

    assert_eq!((log.timed_out().await, log.open().await), (vec![1, 2], vec![3, 9]));
    assert_eq!(
        conditions(&status),
        [
            "Ready=True/LimitReached",
            "DatabaseReachable=True/Connected",
            "SchemaReady=True/SchemaReady",
            "BacklogBounded=False/FallingBehind",
            "Suspended=False/NotSuspended"
        ]
    );
    let sweep = &status["lastSweep"];
    assert_eq!(
        [
            &sweep["timedOut"],
            &sweep["limit"],
            &sweep["batches"],
            &sweep["attempts"],
            &sweep["trigger"],
            &sweep["outcome"]
        ],
        [&json!(2), &json!(2), &json!(1), &json!(1), &json!("Create"), &json!("LimitReached")]
    );
    assert_eq!([&status["backlog"]["display"], &status["observedGeneration"]], [&json!("1"), &json!(1)]);
    assert_eq!(status["totals"], json!({ "sweeps": 1, "failures": 0, "timedOut": 2 }));

    let table = output(operator.kubectl().args(["get", "als"])).unwrap();
    let columns: Vec<_> = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    assert_eq!(columns[0].join(" "), "NAME READY REASON LAST SUCCESS TIMED OUT BACKLOG NEXT SWEEP AGE");
    assert_eq!(
        (columns[1][..3].join(" "), &columns[1][4..6]),
        ("app True LimitReached".into(), &["2", "1"][..]),
        "{table}"
    );
    let next = status["nextScheduleTime"].as_str().unwrap();
    assert_eq!(columns[1][6], next);
    output(operator.kubectl().args(["wait", "als/app", "--for=condition=Ready", "--timeout=5s"])).unwrap();
    output(operator.kubectl().args(["wait", "als/app", "--for=condition=Suspended=false", "--timeout=5s"])).unwrap();
}

#[tokio::test]
async fn sweeps_follow_one_another_on_the_grid() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    log.start_many(5).await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "limit": 2, "period": "5s" })).await;
    let mut swept = vec![];
    let mut slots = vec![];
    for sweep in 1..=4 {
        let status = operator.until("app", "the next sweep", move |s| s["totals"]["sweeps"] == json!(sweep)).await;
        swept.push(status["lastSweep"]["timedOut"].as_i64().unwrap());
        slots.push(status["lastScheduleTime"].as_str().unwrap().parse::<chrono::DateTime<chrono::Utc>>().unwrap());
    }
    assert_eq!(swept, [2, 2, 1, 0]);
    // The first is for the creation; the others lie on the grid.
    assert_eq!(((slots[2] - slots[1]).num_seconds(), (slots[3] - slots[2]).num_seconds()), (5, 5), "{slots:?}");
}

#[tokio::test]
async fn every_failure_says_what_to_do_and_shows_no_secret() {
    let log = AuditTable::empty().await;
    let operator = Operator::new().await;
    let good = log.database.uri();
    let secret = log.database.password.clone();
    let wrong_password = good.replace(&secret, "hunter2leak-wrong");
    let unreachable = good.replace(&format!(":{}/", log.database.port), ":1/");
    operator.apply("app", json!({ "period": "1h" })).await;

    let failed = |reason: &'static str| {
        let condition = format!("Ready=False/{reason}");
        operator.until("app", reason, move |status| has(status, &condition))
    };
    let message = |status: &Value| status["lastError"]["message"].as_str().unwrap().to_owned();

    let status = failed("SecretNotFound").await;
    assert!(message(&status).contains("there is no Secret db in namespace"), "{status:#}");
    assert_eq!(
        conditions(&status),
        [
            "Ready=False/SecretNotFound",
            "Reconciling=True/Retrying",
            "DatabaseReachable=Unknown/SecretNotFound",
            "SchemaReady=Unknown/NotObserved",
            "BacklogBounded=Unknown/NotObserved",
            "Suspended=False/NotSuspended"
        ]
    );
    let mut seen = vec![status];
    // Each edit of the spec ends the wait for the retry; what is tried then is the mended, or newly broken, Secret.
    let steps = [
        (json!({ "url": good }), "SecretKeyMissing", "its keys are: url"),
        (json!({ "uri": "nonsense" }), "InvalidConnectionURI", "postgresql://user:password@host:5432/dbname"),
        (json!({ "uri": wrong_password }), "AuthenticationFailed", "check the user and password in the Secret"),
        (json!({ "uri": unreachable }), "DatabaseUnreachable", "check the host and port in the connection URI"),
        (json!({ "uri": good }), "TableNotFound", "check spec.table"),
    ];
    for (limit, (data, reason, advice)) in (10..).zip(steps) {
        operator.kubectl().args(["delete", "secret", "db", "--ignore-not-found"]).output().unwrap();
        let data: Vec<_> =
            data.as_object().unwrap().iter().map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned())).collect();
        operator.secret("db", &data.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect::<Vec<_>>()).await;
        operator.apply("app", json!({ "period": "1h", "limit": limit })).await;
        let status = failed(reason).await;
        assert!(message(&status).contains(advice), "{advice}: {status:#}");
        assert!(status["consecutiveFailures"].as_i64() > Some(i64::try_from(seen.len()).unwrap()), "{status:#}");
        assert!(
            has(&status, "Reconciling=True/Retrying") && has(&status, "Suspended=False/NotSuspended"),
            "{status:#}"
        );
        let reachable = match reason {
            "DatabaseUnreachable" => "DatabaseReachable=False/DatabaseUnreachable",
            "AuthenticationFailed" | "TableNotFound" => "DatabaseReachable=True/Connected",
            _ => "DatabaseReachable=Unknown/",
        };
        assert!(conditions(&status).iter().any(|c| c.starts_with(reachable)), "{status:#}");
        seen.push(status);
    }
    let everything = format!("{seen:?}{}", operator.log());
    for secret in [secret.as_str(), "hunter2", "nonsense"] {
        assert!(!everything.contains(secret), "{secret} is shown");
    }
}

#[tokio::test]
async fn what_was_mended_elsewhere_is_found_by_itself() {
    let (log, operator) = (AuditTable::empty().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "1h" })).await;
    operator.until("app", "the failure", |s| has(s, "Ready=False/TableNotFound")).await;
    // Nobody touches the object: the first retry comes after ten seconds.
    log.create().await;
    log.start(1, "2 h").await;
    let status = operator.until("app", "the recovery", |s| has(s, "Ready=True/Swept")).await;
    assert_eq!(log.timed_out().await, [1]);
    assert_eq!((&status["consecutiveFailures"], &status["lastError"]["reason"]), (&json!(0), &json!("TableNotFound")));
    assert_eq!((&status["lastSweep"]["attempts"], &status["lastSweep"]["timedOut"]), (&json!(2), &json!(1)));
    assert!(!conditions(&status).iter().any(|c| c.starts_with("Reconciling")), "{status:#}");
}

#[tokio::test]
async fn its_own_write_makes_it_neither_sweep_nor_write_again() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "1h" })).await;
    operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    // A later object shows that the operator has seen, and let be, all that came before it.
    for other in ["b", "c"] {
        output(operator.kubectl().args(["annotate", "als/app", "--overwrite"]).arg(format!("touched={other}")))
            .unwrap();
        operator.apply(other, json!({ "period": "1h" })).await;
        operator.until(other, "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    }
    let about_app: Vec<_> = operator.requests().into_iter().filter(|request| request.ends_with(" app")).collect();
    // Seen, then swept: each acts on the object as it is then, and writes once.
    assert_eq!(
        about_app,
        [
            "get auditlogsweepers app",
            "patch auditlogsweepers/status app",
            "get auditlogsweepers app",
            "patch auditlogsweepers/status app"
        ]
    );
    let all = operator.requests();
    assert!(!all.iter().any(|r| r.contains("secrets") && !r.starts_with("get secrets db")), "{all:?}");
}

#[tokio::test]
async fn an_edit_is_looked_at_and_not_swept() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "1h" })).await;
    operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    log.start(1, "2 h").await;

    operator.apply("app", json!({ "period": "2h", "table": "nowhere" })).await;
    let status = operator.until("app", "the preflight", |s| s["observedGeneration"] == json!(2)).await;
    assert!(has(&status, "Ready=False/TableNotFound"), "{status:#}");
    assert_eq!((&status["totals"]["sweeps"], log.open().await), (&json!(1), vec![1]));

    // An edit that ends a failure sweeps.
    operator.apply("app", json!({ "period": "2h" })).await;
    let status = operator.until("app", "the sweep", |s| s["totals"]["sweeps"] == json!(2)).await;
    assert!(has(&status, "Ready=True/Swept"), "{status:#}");
    assert_eq!(log.timed_out().await, [1]);

    operator.apply("app", json!({ "period": "3h", "limit": 7 })).await;
    let status = operator.until("app", "the preflight", |s| s["observedGeneration"] == json!(4)).await;
    assert!(has(&status, "Ready=True/SchemaReady"), "{status:#}");
    assert_eq!(status["totals"]["sweeps"], json!(2));
}

#[tokio::test]
async fn a_spec_that_cannot_work_stalls_at_once() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "complete": [{ "column": "result_kind", "value": "timed out" }] })).await;
    let status = operator.until("app", "the failure", |s| s["lastError"] != Value::Null).await;
    assert_eq!(
        conditions(&status),
        [
            "Ready=False/SchemaMismatch",
            "Stalled=True/SchemaMismatch",
            "DatabaseReachable=True/Connected",
            "SchemaReady=False/SchemaMismatch",
            "BacklogBounded=Unknown/NotObserved",
            "Suspended=False/NotSuspended"
        ]
    );
}

#[tokio::test]
async fn suspend_is_acknowledged_and_a_resume_goes_on() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    log.start(1, "2 h").await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "suspend": true })).await;
    let status = operator.until("app", "the acknowledgement", |s| has(s, "Suspended=True/Suspended")).await;
    assert_eq!(
        conditions(&status),
        [
            "Ready=True/Suspended",
            "DatabaseReachable=Unknown/Suspended",
            "SchemaReady=Unknown/Suspended",
            "BacklogBounded=Unknown/Suspended",
            "Suspended=True/Suspended"
        ]
    );
    assert_eq!((log.open().await, &status["nextScheduleTime"]), (vec![1], &Value::Null));
    operator.apply("app", json!({ "suspend": false })).await;
    let status = operator.until("app", "the overdue sweep", |s| s["lastSweep"] != Value::Null).await;
    assert_eq!(log.timed_out().await, [1]);
    assert!(has(&status, "Ready=True/Swept") && has(&status, "Suspended=False/NotSuspended"), "{status:#}");
}

#[tokio::test]
async fn sigterm_ends_a_sweep_within_five_seconds_with_its_counts_written() {
    let (log, mut operator) = (AuditTable::new().await, Operator::new().await);
    log.start_many(2000).await;
    log.before_update("PERFORM pg_sleep(0.01);").await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 5, "limit": 2000 })).await;
    eventually("some batches", WAIT_TIMEOUT, async || {
        let done = log.timed_out().await.len();
        if done >= 10 { Ok(()) } else { Err(done.to_string()) }
    })
    .await;
    let start = Instant::now();
    operator.terminate().await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let status = json!(operator.api().get("app").await.unwrap().status);
    let done = log.timed_out().await;
    assert_eq!(done, (1..=u32::try_from(done.len()).unwrap()).collect::<Vec<_>>());
    assert!(done.len() < 2000);
    assert_eq!(
        (&status["lastSweep"]["outcome"], &status["lastSweep"]["timedOut"]),
        (&json!("Stopped"), &json!(done.len()))
    );
    assert_eq!(status["totals"]["timedOut"], json!(done.len()));
}

#[tokio::test]
async fn an_operator_that_may_not_watch_still_stops_at_once() {
    let mut operator = Operator::absent().await;
    let accounts: Api<ServiceAccount> = Api::namespaced(operator.client.clone(), &operator.namespace);
    let account = serde_json::from_value(json!({ "metadata": { "name": "nobody" } })).unwrap();
    accounts.create(&Default::default(), &account).await.unwrap();
    let token = operator.plane.service_account_token(&operator.namespace, "nobody").await.unwrap();
    operator.start_as(&token, &[]);
    eventually("the complaint", WAIT_TIMEOUT, async || {
        if operator.log().contains("cannot watch") { Ok(()) } else { Err(operator.log()) }
    })
    .await;
    let start = Instant::now();
    let log = operator.terminate().await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(!log.contains("did not end"), "{log}");
}

#[tokio::test]
async fn a_sweep_that_waits_for_its_turn_heeds_an_edit() {
    let (slow, queued) = (AuditTable::new().await, AuditTable::new().await);
    let mut operator = Operator::absent().await;
    slow.start_many(20).await;
    slow.before_update("PERFORM pg_sleep(0.2);").await;
    queued.start(1, "2 h").await;
    operator.secret_for(&slow).await;
    operator.secret("queued", &[("uri", &queued.database.uri())]).await;
    operator.start_with(&["--max-concurrent-sweeps=1"]).await;
    operator.apply("slow", json!({ "batchSize": 1 })).await;
    until_one_is_swept(&slow).await;
    let database = json!({ "secretRef": { "name": "queued" }, "tls": { "mode": "Disable" } });
    operator.apply("queued", json!({ "database": database })).await;
    operator.until("queued", "the acknowledgement", |s| has(s, "Reconciling=True/Pending")).await;
    operator.apply("queued", json!({ "database": database, "suspend": true })).await;
    operator.until("slow", "the sweep before it", |s| s["lastSweep"] != Value::Null).await;
    operator.until("queued", "the acknowledgement", |s| has(s, "Suspended=True/Suspended")).await;
    assert_eq!(queued.open().await, [1]);
}

async fn until_one_is_swept(log: &AuditTable) {
    eventually("the first batch", WAIT_TIMEOUT, async || {
        if log.timed_out().await.is_empty() { Err("none".to_owned()) } else { Ok(()) }
    })
    .await;
}

#[tokio::test]
async fn a_restart_changes_nothing_that_is_not_due() {
    let (log, mut operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "1h" })).await;
    let before = operator.until("app", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    operator.terminate().await;
    log.start(1, "2 h").await;
    operator.start().await;
    operator.apply("later", json!({ "period": "1h", "limit": 1 })).await;
    operator.until("later", "the first sweep", |s| s["lastSweep"] != Value::Null).await;
    assert_eq!(json!(operator.api().get("app").await.unwrap().status), before);
}

#[tokio::test]
async fn a_write_of_others_during_a_sweep_is_not_undone_and_does_not_lose_the_counts() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    log.start_many(10).await;
    log.before_update("PERFORM pg_sleep(0.2);").await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 1 })).await;
    until_one_is_swept(&log).await;
    // Both move the resourceVersion that the operator knows.
    output(operator.kubectl().args(["annotate", "als/app", "touched=yes"])).unwrap();
    let foreign = json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "status": { "conditions": [{
        "type": "Foreign", "status": "True", "reason": "Other", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z" }] } });
    operator.api().patch_status("app", &PatchParams::apply("other"), &Patch::Apply(&foreign)).await.unwrap();
    let status = operator.until("app", "the sweep", |s| s["lastSweep"] != Value::Null).await;
    assert_eq!(status["lastSweep"]["timedOut"], json!(10));
    assert!(has(&status, "Foreign=True/Other") && has(&status, "Ready=True/Swept"), "{status:#}");
    let conflicts = operator.requests().iter().filter(|r| *r == "patch auditlogsweepers/status app").count();
    assert_eq!(conflicts, 3, "seen, refused, written: {:?}", operator.requests());
}

#[tokio::test]
async fn verify_full_trusts_the_ca_of_the_secret_and_no_other() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    let server = support::postgres::shared();
    operator.secret_for(&log).await;
    operator.secret("right", &[("ca.crt", &server.ca_pem())]).await;
    operator.secret("wrong", &[("ca.crt", &server.stranger_ca_pem())]).await;
    let database = |ca: &str| json!({ "database": { "secretRef": { "name": "db" }, "tls": { "mode": "VerifyFull", "caSecretRef": { "name": ca } } } });
    operator.apply("right", database("right")).await;
    operator.apply("wrong", database("wrong")).await;
    operator.apply("none", json!({ "database": { "secretRef": { "name": "db" } } })).await;
    operator.until("right", "a sweep", |s| has(s, "Ready=True/Swept")).await;
    for name in ["wrong", "none"] {
        let status = operator.until(name, "a refusal", |s| has(s, "Ready=False/TLSFailed")).await;
        assert!(
            status["lastError"]["message"].as_str().unwrap().contains("spec.database.tls.caSecretRef"),
            "{status:#}"
        );
    }
}

#[tokio::test]
async fn probes_answer_and_say_what_is_waited_for() {
    let operator = Operator::new().await;
    let ready = eventually("readiness", WAIT_TIMEOUT, async || probe(&operator.log(), "/readyz").await).await;
    assert_eq!(ready, "ready\n");
    assert_eq!(probe(&operator.log(), "/healthz").await.unwrap(), "serving\n");
}
