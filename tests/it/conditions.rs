//! Every situation that the status knows, through the code that the operator runs: the whole list of conditions, what
//! tools of the kstatus kind conclude from it, and what Argo CD's health check does.

use audit_log_sweeper::api::status::{AuditLogSweeperStatus, Backlog, Trigger};
use audit_log_sweeper::api::{AuditLogSweeper, Failure, Reason, Sweeper};
use audit_log_sweeper::controller::model::{AttemptResult, Done, DueSweep, SweepAttempt};
use audit_log_sweeper::controller::status::invalid;
use audit_log_sweeper::preflight::PreflightReport;
use audit_log_sweeper::sweep::Report;
use audit_log_sweeper::sweep::report::Ended;
use chrono::{DateTime, TimeDelta, Utc};
use mlua::{Lua, LuaSerdeExt};
use serde_json::{Value, json};

use crate::fixtures::operator::conditions;

fn at(second: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000 + second, 0).unwrap()
}

fn result(done: Done, time: DateTime<Utc>) -> AttemptResult {
    let object = json!({
        "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper",
        "metadata": { "name": "app", "uid": "0f8fad5b-d9cb-469f-a165-70867728950e", "generation": 3 },
        "spec": { "database": { "secretRef": { "name": "db" } } },
    });
    let sweeper = Sweeper::new(serde_json::from_value(object).unwrap()).unwrap();
    AttemptResult { sweeper, done, time, led: true }
}

fn swept(ended: Ended, second: i64) -> AttemptResult {
    let (cutoff, backlog) = (Some(at(second)), Some(Backlog::new(0, 1000, None)));
    sweep(Report { cutoff, backlog, ..Report::new(Ok(ended)) }, second)
}

fn failed(reason: Reason, second: i64) -> AttemptResult {
    sweep(Report::new(Err(Failure::new(reason, "what to do"))), second)
}

fn sweep(report: Report, second: i64) -> AttemptResult {
    let (schedule_time, trigger) = (at(second), Trigger::Schedule);
    let slot = DueSweep { schedule_time, trigger, limit: 1000, continues: None, answers: None };
    let checked = Some(PreflightReport::default());
    let attempt = SweepAttempt { slot, start: at(second), checked, report };
    result(Done::Sweep(Box::new(attempt)), at(second) + TimeDelta::seconds(1))
}

/// What a tool should take the object for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Health {
    Current,
    InProgress,
    Failed,
}

struct Situation {
    name: &'static str,
    status: AuditLogSweeperStatus,
    conditions: Vec<&'static str>,
    kstatus: Health,
    argo: &'static str,
}

fn situations() -> Vec<Situation> {
    use Health::{Current, Failed, InProgress};
    let new = AuditLogSweeperStatus { observed_generation: Some(-1), ..Default::default() };
    let after = |results: &[AttemptResult]| results.iter().fold(new.clone(), |status, result| result.apply(&status));
    let quiet = swept(Ended::Drained, 0);
    let good = || after(&[swept(Ended::Drained, 0)]);
    let with = |name, status, conditions: &[&'static str], kstatus, argo| Situation {
        name,
        status,
        conditions: conditions.to_vec(),
        kstatus,
        argo,
    };
    let healthy = |ready: &'static str| {
        vec![
            ready,
            "DatabaseReachable=True/Connected",
            "SchemaReady=True/SchemaReady",
            "BacklogBounded=True/WithinBound",
            "Suspended=False/NotSuspended",
        ]
    };
    let failing = |ready, progress, reachable, schema| {
        vec![ready, progress, reachable, schema, "BacklogBounded=Unknown/NotObserved", "Suspended=False/NotSuspended"]
    };
    let missing = |times: i64| {
        let every: Vec<_> = (0..times).map(|n| failed(Reason::SecretNotFound, n * 70)).collect();
        after(&every)
    };
    vec![
        with("never seen", new.clone(), &[], InProgress, "Progressing"),
        with(
            "seen",
            after(&[result(Done::Acknowledged, at(0))]),
            &[
                "Ready=Unknown/Pending",
                "Reconciling=True/Pending",
                "DatabaseReachable=Unknown/Pending",
                "SchemaReady=Unknown/Pending",
                "BacklogBounded=Unknown/Pending",
                "Suspended=False/NotSuspended",
            ],
            InProgress,
            "Progressing",
        ),
        with("swept", quiet.apply(&new), &healthy("Ready=True/Swept"), Current, "Healthy"),
        with(
            "limit reached",
            after(&[swept(Ended::LimitReached, 0)]),
            &healthy("Ready=True/LimitReached"),
            Current,
            "Healthy",
        ),
        with(
            "deadline reached",
            after(&[swept(Ended::DeadlineReached, 0)]),
            &healthy("Ready=True/DeadlineReached"),
            Current,
            "Healthy",
        ),
        with("observed", after(&[swept(Ended::Observed, 0)]), &healthy("Ready=True/Observed"), Current, "Healthy"),
        with(
            "stopped with the operator: what was said stands",
            swept(Ended::Stopped, 600).apply(&good()),
            &healthy("Ready=True/Swept"),
            Current,
            "Healthy",
        ),
        with(
            "preflight passed",
            result(Done::Preflight(Ok(PreflightReport::default())), at(5)).apply(&good()),
            &healthy("Ready=True/SchemaReady"),
            Current,
            "Healthy",
        ),
        with(
            "unreachable",
            failed(Reason::DatabaseUnreachable, 600).apply(&good()),
            &failing(
                "Ready=False/DatabaseUnreachable",
                "Reconciling=True/Retrying",
                "DatabaseReachable=False/DatabaseUnreachable",
                "SchemaReady=Unknown/NotObserved",
            ),
            InProgress,
            "Degraded",
        ),
        with(
            "busy",
            failed(Reason::TableLocked, 600).apply(&good()),
            &failing(
                "Ready=False/TableLocked",
                "Reconciling=True/Retrying",
                "DatabaseReachable=True/Connected",
                "SchemaReady=True/SchemaReady",
            ),
            InProgress,
            "Degraded",
        ),
        with(
            "a Secret is missing",
            missing(4),
            &failing(
                "Ready=False/SecretNotFound",
                "Reconciling=True/Retrying",
                "DatabaseReachable=Unknown/SecretNotFound",
                "SchemaReady=Unknown/NotObserved",
            ),
            InProgress,
            "Degraded",
        ),
        with(
            "a Secret is missing for five failures and five minutes",
            missing(6),
            &failing(
                "Ready=False/SecretNotFound",
                "Stalled=True/SecretNotFound",
                "DatabaseReachable=Unknown/SecretNotFound",
                "SchemaReady=Unknown/NotObserved",
            ),
            Failed,
            "Degraded",
        ),
        with(
            "a table is missing",
            failed(Reason::TableNotFound, 600).apply(&good()),
            &failing(
                "Ready=False/TableNotFound",
                "Reconciling=True/Retrying",
                "DatabaseReachable=True/Connected",
                "SchemaReady=False/TableNotFound",
            ),
            InProgress,
            "Degraded",
        ),
        with(
            "a spec that cannot work",
            after(&[failed(Reason::SchemaMismatch, 0)]),
            &failing(
                "Ready=False/SchemaMismatch",
                "Stalled=True/SchemaMismatch",
                "DatabaseReachable=True/Connected",
                "SchemaReady=False/SchemaMismatch",
            ),
            Failed,
            "Degraded",
        ),
        with(
            "suspended",
            result(Done::Suspended, at(5)).apply(&good()),
            &[
                "Ready=True/Suspended",
                "DatabaseReachable=Unknown/Suspended",
                "SchemaReady=Unknown/Suspended",
                "BacklogBounded=Unknown/Suspended",
                "Suspended=True/Suspended",
            ],
            Current,
            "Healthy",
        ),
        with(
            "an object that cannot be read",
            invalid(&good(), 3, "unknown variant", at(5)),
            &[
                "Ready=False/InvalidSpec",
                "Stalled=True/InvalidSpec",
                "DatabaseReachable=Unknown/InvalidSpec",
                "SchemaReady=Unknown/InvalidSpec",
                "BacklogBounded=Unknown/InvalidSpec",
                "Suspended=Unknown/InvalidSpec",
            ],
            Failed,
            "Degraded",
        ),
    ]
}

/// The object with this status, as the API server gives it.
fn object(status: &AuditLogSweeperStatus) -> Value {
    let mut object = AuditLogSweeper::new("app", (*result(Done::Repaired, at(0)).sweeper.spec).clone());
    object.metadata.generation = Some(3);
    object.status = Some(status.clone());
    json!(object)
}

/// The algorithm of sigs.k8s.io/cli-utils/pkg/kstatus for types that it does not know, in its order.
fn kstatus(object: &Value) -> Health {
    let generation = &object["metadata"]["generation"];
    let observed = &object["status"]["observedGeneration"];
    if !observed.is_null() && observed != generation {
        return Health::InProgress;
    }
    let is = |type_: &str, status: &str| {
        let list = object["status"]["conditions"].as_array();
        list.into_iter().flatten().any(|c| c["type"] == type_ && c["status"] == status)
    };
    if is("Reconciling", "True") {
        return Health::InProgress;
    }
    if is("Stalled", "True") {
        return Health::Failed;
    }
    if is("Ready", "False") || is("Ready", "Unknown") {
        return Health::InProgress;
    }
    Health::Current
}

#[test]
fn every_situation_has_its_conditions_and_tools_judge_them_right() {
    for Situation { name, status, conditions: expected, kstatus: health, .. } in situations() {
        let object = object(&status);
        assert_eq!(conditions(&object["status"]), expected, "{name}");
        assert_eq!(kstatus(&object), health, "{name}");
    }
}

#[test]
fn a_spec_that_was_edited_is_in_progress_whatever_was_said_before() {
    for Situation { name, status, .. } in situations() {
        let mut object = object(&status);
        object["metadata"]["generation"] = json!(4);
        assert_eq!(kstatus(&object), Health::InProgress, "{name}");
        assert_eq!(argo(&object).0, "Progressing", "{name}");
    }
}

/// Runs the health check in the interpreter, as Argo CD does.
fn argo(object: &Value) -> (String, String) {
    let lua = Lua::new();
    lua.globals().set("obj", lua.to_value(object).unwrap()).unwrap();
    let health: Value =
        lua.from_value(lua.load(include_str!("../../manifests/argocd-health.lua")).eval().unwrap()).unwrap();
    (health["status"].as_str().unwrap().to_owned(), health["message"].as_str().unwrap().to_owned())
}

#[test]
fn argo_cd_shows_every_situation_for_what_it_is() {
    for Situation { name, status, argo: expected, .. } in situations() {
        let (health, message) = argo(&object(&status));
        assert_eq!(health, expected, "{name}");
        assert!(!message.is_empty(), "{name}");
    }
    // Between `kubectl apply` and the API server's default there is no status at all.
    let mut bare = object(&AuditLogSweeperStatus::default());
    bare.as_object_mut().unwrap().remove("status");
    assert_eq!(argo(&bare).0, "Progressing");
}
