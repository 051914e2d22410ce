//! One corpus of specs, accepted and refused, that runs against the real API server and against the CLI's reader: the
//! verdicts and the defaults are the same.

use audit_log_sweeper::api::manifest;
use audit_log_sweeper::api::status::{
    AuditLogSweeperStatus, Backlog, HistoryEntry, LastError, LastSweep, Outcome, ResumeAfter, Totals, Trigger,
    Unsweepable,
};
use audit_log_sweeper::api::{AuditLogSweeper, AuditLogSweeperSpec, ConditionType, ConditionUpdate, Reason, condition};
use chrono::DateTime;
use kube::Resource;
use kube::api::{ApiResource, PostParams};
use kube::core::DynamicObject;
use serde_json::{Value, json};
use support::json::merged;
use support::process::output;
use support::wait::eventually;

use crate::fixtures::Operator;
use crate::fixtures::operator::WAIT_TIMEOUT;

fn object(fields: &Value) -> Value {
    let spec = merged(json!({ "database": { "secretRef": { "name": "db" } } }), fields);
    json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": "app" }, "spec": spec })
}

fn accepted() -> Vec<Value> {
    let long = "x".repeat(63);
    vec![
        json!({}),
        json!({ "database": { "secretRef": { "name": "db", "key": "uri" }, "tls": { "mode": "Disable" } } }),
        json!({ "database": { "secretRef": { "name": "db" }, "tls": { "mode": "VerifyFull", "caSecretRef": { "name": "ca" } } } }),
        json!({ "database": { "secretRef": { "name": "db", "key": null }, "tls": null } }),
        json!({ "database": { "secretRef": { "name": "my.db-1" }, "tls": { "clientCertSecretRef": { "name": "me" } } } }),
        json!({ "database": { "secretRef": { "name": "db" }, "tls": { "mode": "Require", "caSecretRef": { "name": "ca" } } } }),
        json!({ "schema": "Audit.AuditTable", "table": "my \"table\"; DROP", "columns": { "id": "Key" } }),
        json!({ "table": long }),
        json!({ "columns": { "timeZone": "UTC" } }),
        json!({ "columns": { "timeZone": "Europe/Berlin" } }),
        json!({ "columns": { "timeZone": "America/Argentina/Buenos_Aires" } }),
        json!({ "columns": { "timeZone": "Etc/GMT+3" } }),
        json!({ "complete": [] }),
        json!({ "complete": null, "period": null, "limit": null }),
        json!({ "complete": [{ "column": "a", "value": "" }, { "column": "b", "setNull": true }] }),
        json!({ "period": "5s", "timeout": "1m" }),
        json!({ "period": "8760h", "timeout": "87600h" }),
        json!({ "period": "1h30m", "timeout": "90m" }),
        json!({ "limit": 1, "batchSize": 1 }),
        json!({ "limit": 1_000_000, "batchSize": 10_000 }),
        json!({ "statementTimeout": "100ms", "deadline": "1s" }),
        json!({ "statementTimeout": "1s", "deadline": "1s" }),
        json!({ "statementTimeout": "1h", "deadline": "24h" }),
        json!({ "suspend": true, "mode": "Observe" }),
        json!({ "historyLimit": 0 }),
        json!({ "historyLimit": 20 }),
    ]
}

/// Each with its field, and a part of the message where the message is ours.
fn refused() -> Vec<(Value, &'static str, &'static str)> {
    let duration = "must be a duration such as 4h or 1h30m, from";
    let identifier = "must be a name of at most 63 bytes";
    let exactly = "must have exactly one of value (a string: quote numbers) and setNull: true";
    let completion = |item: Value| json!({ "complete": [item] });
    let zones =
        ["", "Local", "CET", "Japan", "+02:00", "UTC+2", "Europe", "Europe/Atlantis", "../etc/passwd", "UTC'; --"];
    let zones = zones.map(|zone| (json!({ "columns": { "timeZone": zone } }), "spec.columns.timeZone", ""));
    let others = vec![
        (json!({ "database": {} }), "spec.database.secretRef", ""),
        (json!({ "database": { "secretRef": {} } }), "spec.database.secretRef.name", ""),
        (json!({ "database": { "secretRef": { "name": "" } } }), "spec.database.secretRef.name", ""),
        (
            json!({ "database": { "secretRef": { "name": "db" }, "tls": { "mode": "Prefer" } } }),
            "spec.database.tls.mode",
            "",
        ),
        (
            json!({ "database": { "secretRef": { "name": "db" }, "tls": { "caSecretRef": {} } } }),
            "spec.database.tls.caSecretRef.name",
            "",
        ),
        (
            json!({ "database": { "secretRef": { "name": "../db" } } }),
            "spec.database.secretRef.name",
            "must be the name of a Secret",
        ),
        (
            json!({ "database": { "secretRef": { "name": "db" }, "tls": { "mode": "Disable", "caSecretRef": { "name": "ca" } } } }),
            "spec.database.tls",
            "must not name caSecretRef or clientCertSecretRef with mode Disable",
        ),
        (
            json!({ "database": { "secretRef": { "name": "db" }, "tls": { "mode": "Disable", "clientCertSecretRef": { "name": "me" } } } }),
            "spec.database.tls",
            "must not name caSecretRef or clientCertSecretRef with mode Disable",
        ),
        (json!({ "table": "" }), "spec.table", ""),
        (json!({ "table": "x".repeat(64) }), "spec.table", ""),
        (json!({ "table": "ä".repeat(40) }), "spec.table", identifier),
        (json!({ "schema": "a\u{0}b" }), "spec.schema", identifier),
        (json!({ "columns": { "id": "" } }), "spec.columns.id", ""),
        (json!({ "columns": { "id": "time_started" } }), "spec.columns", "must be three different columns"),
        (completion(json!({ "column": "a" })), "spec.complete[0]", exactly),
        (completion(json!({ "column": "a", "value": null })), "spec.complete[0]", exactly),
        (completion(json!({ "column": "a", "value": "x", "setNull": true })), "spec.complete[0]", exactly),
        (completion(json!({ "column": "a", "setNull": false })), "spec.complete[0]", exactly),
        (completion(json!({ "column": "a", "value": 500 })), "spec.complete[0].value", ""),
        (
            completion(json!({ "column": "a", "value": "\u{0}" })),
            "spec.complete[0].value",
            "must not contain a NUL character",
        ),
        (completion(json!({ "value": "x" })), "spec.complete[0].column", ""),
        (
            completion(json!({ "column": "time_completed", "value": "x" })),
            "spec.complete",
            "must not name the id, timeStarted or timeCompleted column",
        ),
        (
            json!({ "complete": [{ "column": "a", "value": "x" }, { "column": "a", "setNull": true }] }),
            "spec.complete",
            "must not name a column twice",
        ),
        (json!({ "complete": vec![json!({ "column": "a", "value": "x" }); 17] }), "spec.complete", ""),
        (json!({ "period": "4s" }), "spec.period", duration),
        (json!({ "period": "8761h" }), "spec.period", duration),
        (json!({ "period": "" }), "spec.period", duration),
        (json!({ "period": 600 }), "spec.period", ""),
        (json!({ "timeout": "0s" }), "spec.timeout", duration),
        (json!({ "timeout": "59s" }), "spec.timeout", duration),
        (json!({ "timeout": "4d" }), "spec.timeout", "days are not a unit: write 24h"),
        (json!({ "timeout": "4" }), "spec.timeout", duration),
        (json!({ "timeout": "-4h" }), "spec.timeout", duration),
        (json!({ "timeout": "1.5h" }), "spec.timeout", duration),
        (json!({ "timeout": "87601h" }), "spec.timeout", "from 1m to 87600h"),
        (json!({ "limit": 0 }), "spec.limit", ""),
        (json!({ "limit": 1_000_001 }), "spec.limit", ""),
        (json!({ "limit": "10" }), "spec.limit", ""),
        (json!({ "limit": 1.5 }), "spec.limit", ""),
        (json!({ "batchSize": 0 }), "spec.batchSize", ""),
        (json!({ "batchSize": 10_001 }), "spec.batchSize", ""),
        (json!({ "statementTimeout": "0s" }), "spec.statementTimeout", duration),
        (
            json!({ "statementTimeout": "2s", "deadline": "1s" }),
            "spec.statementTimeout",
            "statementTimeout (30s unless set) must not be longer than deadline (5m unless set)",
        ),
        (json!({ "deadline": "25h" }), "spec.deadline", duration),
        (json!({ "historyLimit": 21 }), "spec.historyLimit", ""),
        (json!({ "historyLimit": -1 }), "spec.historyLimit", ""),
        (json!({ "suspend": "yes" }), "spec.suspend", ""),
        (json!({ "timeOut": "4h" }), "spec.timeOut", "unknown field"),
        (json!({ "mode": "observe" }), "spec.mode", ""),
    ];
    others.into_iter().chain(zones).collect()
}

async fn dry_run(operator: &Operator, object: Value) -> kube::Result<DynamicObject> {
    let kind = ApiResource::erase::<AuditLogSweeper>(&());
    // As kubectl does it: an unknown field is an error.
    let params = PostParams { dry_run: true, ..PostParams::default() };
    let request = kube::core::Request::new(DynamicObject::url_path(&kind, Some(&operator.namespace)));
    let body = serde_json::to_vec(&object).unwrap();
    let mut request = request.create(&params, body).unwrap();
    let uri = format!("{}&fieldValidation=Strict", request.uri());
    *request.uri_mut() = uri.parse().unwrap();
    operator.client.request(request).await
}

#[tokio::test]
async fn accepted_specs_get_the_same_defaults_from_the_api_server_and_the_cli() {
    let operator = Operator::absent().await;
    for fields in accepted() {
        let object = object(&fields);
        let stored = dry_run(&operator, object.clone()).await.unwrap_or_else(|error| panic!("{fields}: {error}"));
        let read = manifest::read(&object.to_string()).unwrap_or_else(|error| panic!("{fields}: {error}"));
        // Through our types, so that what is not written there shows too.
        let stored: AuditLogSweeperSpec = serde_json::from_value(stored.data["spec"].clone()).unwrap();
        assert_eq!(stored, *read.sweeper.spec, "{fields}");
    }
}

#[tokio::test]
async fn refused_specs_are_refused_by_both_with_the_field_and_what_to_do() {
    let operator = Operator::absent().await;
    for (fields, field, message) in refused() {
        let object = object(&fields);
        let by_api = dry_run(&operator, object.clone()).await.expect_err(&format!("the API server took {fields}"));
        let kube::Error::Api(by_api) = by_api else { panic!("{fields}: {by_api}") };
        let by_cli = manifest::read(&object.to_string()).expect_err(&format!("the CLI took {fields}")).to_string();
        for (who, said) in [("the API server", by_api.message), ("the CLI", by_cli)] {
            assert!(
                said.contains(field) && said.contains(message),
                "{who} on {fields} should name {field} ({message}): {said}"
            );
            if message.starts_with("must be a duration") {
                assert_eq!(said.matches(message).count(), 1, "{who} says it once: {said}");
            }
        }
    }
}

#[tokio::test]
async fn an_object_that_no_operator_has_seen_says_so() {
    let operator = Operator::absent().await;
    let object = operator.apply("app", json!({})).await;
    assert_eq!(object.status.unwrap().observed_generation, Some(-1));
}

#[tokio::test]
async fn a_maximal_status_is_accepted() {
    let operator = Operator::absent().await;
    operator.apply("app", json!({})).await;
    let now = DateTime::from_timestamp(4_102_444_799, 999_999_999).unwrap();
    let text = "ä\"\\\n".repeat(2000);
    let updates: Vec<_> =
        ConditionType::ALL.iter().map(|t| ConditionUpdate::new(*t, None, *longest_reason(), text.clone())).collect();
    let status = AuditLogSweeperStatus {
        observed_generation: Some(i64::MAX),
        conditions: condition::apply(&[], &updates, i64::MAX, now),
        last_schedule_time: Some(now),
        last_attempt_time: Some(now),
        last_successful_time: Some(now),
        last_failure_time: Some(now),
        next_schedule_time: Some(DateTime::<chrono::Utc>::MAX_UTC.min(now)),
        last_sweep: Some(LastSweep {
            schedule_time: now,
            start_time: now,
            duration_milliseconds: i64::MAX,
            trigger: Trigger::Schedule,
            outcome: Outcome::DeadlineReached,
            attempts: i32::MAX,
            cutoff: Some(now),
            limit: i32::MAX,
            timed_out: i64::MAX,
            skipped: i64::MAX,
            suppressed: i64::MAX,
            uncertain: i64::MAX,
            batches: i64::MAX,
        }),
        backlog: Some(Backlog::new(i64::MAX, i64::MAX - 1, Some(now))),
        unsweepable: Some(Unsweepable {
            count: i64::MAX,
            ids: vec!["x".repeat(36); 10],
            resume_after: Some(ResumeAfter { time_started: "x".repeat(40), id: Some("x".repeat(36)) }),
        }),
        history: vec![
            HistoryEntry {
                outcome: Outcome::DeadlineReached,
                reason: Some(longest_reason().as_str().into()),
                trigger: Trigger::Schedule,
                timed_out: i64::MAX,
                count: i64::MAX,
                first_time: now,
                last_time: now,
            };
            20
        ],
        last_handled_request: Some("ä".repeat(64)),
        clock_skew_milliseconds: Some(i64::MIN),
        totals: Some(Totals { sweeps: i64::MAX, failures: i64::MAX, timed_out: i64::MAX }),
        consecutive_failures: i32::MAX,
        last_error: Some(LastError::new(*longest_reason(), &text, now)),
    };
    let body = json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "status": status });
    let params = kube::api::PatchParams::apply("test").force();
    let written = operator.api().patch_status("app", &params, &kube::api::Patch::Apply(&body)).await.unwrap();
    assert_eq!(json!(written.status), json!(status));
}

fn longest_reason() -> &'static Reason {
    Reason::ALL.iter().max_by_key(|reason| reason.as_str().len()).unwrap()
}

#[tokio::test]
async fn explain_reads_as_a_manual() {
    let operator = Operator::absent().await;
    // The API server publishes the descriptions a moment after the type.
    let text = eventually("the manual", WAIT_TIMEOUT, async || {
        output(operator.kubectl().args(["explain", "als.spec.timeout"])).map_err(|error| error.to_string())
    })
    .await;
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(text.contains("FIELD: timeout <string>"), "{text}");
    assert!(text.contains("How old an open row must be to be completed: from 1m to 87600h"), "{text}");
    let all = output(operator.kubectl().args(["explain", "als", "--recursive"])).unwrap();
    assert!(all.contains("enum: Disable, Require, VerifyCA, VerifyFull"), "{all}");
}
