//! Rows that the server refuses, and servers that are too busy: every other stale row is swept all the same.

use audit_log_sweeper::api::Class;
use audit_log_sweeper::api::Reason;
use audit_log_sweeper::api::status::Outcome;
use audit_log_sweeper::sweep::{Report, sweep};
use serde_json::{Value, json};
use support::postgres::{PostgresOptions, PostgresServer};
use tokio_util::sync::CancellationToken;

use crate::fixtures::operator::has;
use crate::fixtures::{AuditTable, Operator, id};

/// All numbers up to `count` but those in `without`.
fn all_but(count: u32, without: &[u32]) -> Vec<u32> {
    (1..=count).filter(|number| !without.contains(number)).collect()
}

/// A sequence that survives rollbacks, and so counts every row that a statement tries to complete.
async fn count_tries(log: &AuditTable) {
    log.run("CREATE SEQUENCE tries").await;
}

async fn tries(log: &AuditTable) -> i64 {
    log.query("SELECT last_value FROM tries").await[0].parse().unwrap()
}

#[tokio::test]
async fn a_row_that_breaks_a_not_valid_check_is_stepped_over_and_named() {
    let log = AuditTable::new().await;
    log.start_many(50).await;
    log.run(&format!(
        "UPDATE audit_log SET user_agent = 'old' WHERE id IN ('{}', '{}', '{}'); \
         ALTER TABLE audit_log ADD CONSTRAINT no_old CHECK (user_agent <> 'old') NOT VALID",
        id(1),
        id(17),
        id(50)
    ))
    .await;
    let report = log.sweep(json!({ "batchSize": 10 })).await;
    assert_eq!(log.open().await, [1, 17, 50]);
    assert_eq!(log.timed_out().await, all_but(50, &[1, 17, 50]));
    assert_eq!((report.timed_out, report.refused, report.outcome()), (47, 3, Outcome::Drained), "{report:?}");
    assert_eq!(report.refused_ids, [id(1), id(17), id(50)]);
    assert_eq!((report.backlog.unwrap().display.as_str(), report.resume_after), ("3", None));
}

#[tokio::test]
async fn a_trigger_that_raises_any_sqlstate_costs_only_its_row() {
    for sqlstate in
        ["P0001", "23505", "22012", "42P01", "42501", "0A000", "27000", "28000", "55000", "08006", "57P01", "40001"]
    {
        let log = AuditTable::new().await;
        log.start_many(6).await;
        log.before_update(&format!(
            "IF NEW.id = '{}' THEN RAISE EXCEPTION 'secret %', NEW.request_uri USING ERRCODE = '{sqlstate}'; END IF;",
            id(3)
        ))
        .await;
        let report = log.sweep(json!({ "batchSize": 4 })).await;
        assert_eq!(log.timed_out().await, all_but(6, &[3]), "{sqlstate}: {report:?}");
        assert_eq!(
            (report.timed_out, report.refused_ids.as_slice(), report.outcome()),
            (5, &[id(3)][..], Outcome::Drained),
            "{sqlstate}"
        );
    }
}

#[tokio::test]
async fn finding_a_refused_row_costs_a_bisection() {
    // On a server where nobody else writes, to whom the sweep would give way.
    let server = PostgresServer::start(PostgresOptions::default()).await.unwrap();
    let log = AuditTable::on(&server).await;
    log.start_many(1000).await;
    count_tries(&log).await;
    // BEFORE UPDATE for each statement: it counts statements, not rows.
    log.run(
        "CREATE FUNCTION count_statement() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM nextval('tries'); RETURN NULL; END $$; \
         CREATE TRIGGER count_statement BEFORE UPDATE ON audit_log FOR EACH STATEMENT EXECUTE FUNCTION count_statement()",
    )
    .await;
    log.before_update(&format!("IF NEW.id = '{}' THEN RAISE EXCEPTION 'no'; END IF;", id(700))).await;
    let report = log.sweep(json!({ "batchSize": 500 })).await;
    assert_eq!((report.timed_out, report.refused, log.open().await), (999, 1, vec![700]));
    // Three batches without the row: 500, 500, and the empty one; one without any row; log2(500) + 3 is 11.
    let statements = tries(&log).await;
    assert!(statements <= 3 + 1 + 11, "{statements} statements");
}

#[tokio::test]
async fn what_a_sweep_itself_does_and_takes_back_is_nobody_elses() {
    let server = PostgresServer::start(PostgresOptions::default()).await.unwrap();
    let log = AuditTable::on(&server).await;
    log.start_many(200).await;
    log.before_update(&format!("IF NEW.id BETWEEN '{}' AND '{}' THEN RAISE EXCEPTION 'no'; END IF;", id(11), id(15)))
        .await;
    let report = log.sweep(json!({ "batchSize": 50 })).await;
    assert_eq!((report.timed_out, report.refused, report.small_batches), (195, 5, 0), "{report:?}");
    assert_eq!(log.open().await, (11..=15).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_text_key_is_not_named() {
    let log = AuditTable::empty().await;
    log.run(
        "CREATE TABLE audit_log (id text PRIMARY KEY, time_started timestamptz NOT NULL, time_completed timestamptz, result_kind text); \
         INSERT INTO audit_log SELECT 'alice' || n, '2020-01-01'::timestamptz + n * interval '1 s' FROM generate_series(1, 5) AS n",
    )
    .await;
    log.before_update("IF NEW.id = 'alice2' THEN RAISE EXCEPTION 'no %', NEW.id; END IF;").await;
    let report = log.sweep(json!({})).await;
    assert_eq!((report.timed_out, report.refused, report.refused_ids.len()), (4, 1, 0));
    assert!(!format!("{report:?}").contains("alice"), "{report:?}");
}

#[tokio::test]
async fn eight_alike_in_a_row_stop_the_sweep_and_the_next_goes_on_behind_them() {
    let log = AuditTable::new().await;
    log.start_many(20).await;
    log.run(&format!(
        "UPDATE audit_log SET user_agent = 'old' WHERE id <= '{}'; \
         ALTER TABLE audit_log ADD CONSTRAINT mine CHECK (user_agent <> 'old') NOT VALID",
        id(9)
    ))
    .await;
    let first = log.sweep(json!({ "batchSize": 4 })).await;
    let error = first.end.as_ref().unwrap_err();
    assert_eq!(
        (error.reason, error.class, first.refused, first.timed_out),
        (Reason::RowRefused, Class::Spec, 8, 0),
        "{error}"
    );
    assert!(error.to_string().contains("constraint mine"), "{error}");
    let after = first.resume_after.clone().unwrap();
    assert_eq!(after.id.as_deref(), Some(id(8).as_str()));

    let mut job = log.job(json!({ "batchSize": 4 }));
    job.resume_after = Some(after);
    let second = sweep(&job, &CancellationToken::new()).await;
    assert_eq!(log.timed_out().await, (10..=20).collect::<Vec<_>>());
    assert_eq!((second.timed_out, second.refused, second.outcome()), (11, 1, Outcome::Drained));
    // At the end it wraps: the next sweep looks at the refused rows again.
    assert_eq!(second.resume_after, None);
}

#[tokio::test]
async fn a_hundred_refused_rows_end_the_sweep_and_those_behind_are_not_starved() {
    let log = AuditTable::new().await;
    log.start_many(260).await;
    // Every other row, so that they are never eight in a row.
    log.before_update("IF right(NEW.id::text, 1)::int % 2 = 1 THEN RAISE EXCEPTION 'no'; END IF;").await;
    let mut resume_after = None;
    let mut reports: Vec<Report> = vec![];
    for _ in 0..2 {
        let mut job = log.job(json!({ "batchSize": 10 }));
        job.resume_after = resume_after.clone();
        let report = sweep(&job, &CancellationToken::new()).await;
        resume_after.clone_from(&report.resume_after);
        reports.push(report);
    }
    assert_eq!(reports.iter().map(|r| (r.timed_out, r.refused)).collect::<Vec<_>>(), [(99, 100), (31, 30)]);
    assert_eq!(log.open().await, (1..=260).filter(|n| n % 2 == 1).collect::<Vec<_>>());
    assert_eq!((reports[0].refused_ids.len(), &resume_after), (10, &None));
}

#[tokio::test]
async fn while_it_goes_on_behind_refused_rows_a_limit_keeps_the_place() {
    let log = AuditTable::new().await;
    log.start_many(10).await;
    let first = log.sweep(json!({ "limit": 2 })).await;
    assert_eq!((first.timed_out, first.resume_after), (2, None));
    let mut job = log.job(json!({ "limit": 3 }));
    job.resume_after = Some(audit_log_sweeper::sweep::start::Cursor {
        time_started: log.query(&format!("SELECT time_started FROM audit_log WHERE id = '{}'", id(5))).await.remove(0),
        id: Some(id(5)),
    });
    let second = sweep(&job, &CancellationToken::new()).await;
    assert_eq!(log.timed_out().await, [1, 2, 6, 7, 8]);
    assert_eq!(second.resume_after.unwrap().id, Some(id(8)));
}

#[tokio::test]
async fn a_busy_server_gets_smaller_batches_and_at_size_one_the_row_is_left() {
    let log = AuditTable::new().await;
    log.start_many(12).await;
    // A row takes 40 ms, one takes too long by itself.
    log.before_update(&format!("PERFORM pg_sleep(CASE WHEN NEW.id = '{}' THEN 5 ELSE 0.04 END);", id(7))).await;
    let report = log.sweep(json!({ "batchSize": 8, "statementTimeout": "250ms" })).await;
    assert_eq!(log.open().await, [7], "{report:?}");
    assert_eq!((report.timed_out, report.skipped, report.refused, report.outcome()), (11, 1, 0, Outcome::Drained));
}

#[tokio::test]
async fn the_status_names_refused_rows_and_the_sweep_stays_ready() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    log.start_many(5).await;
    log.before_update(&format!("IF NEW.id = '{}' THEN RAISE EXCEPTION 'no'; END IF;", id(2))).await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({})).await;
    let status = operator.until("app", "the sweep", |s| s["lastSweep"] != Value::Null).await;
    assert_eq!(status["unsweepable"], json!({ "count": 1, "ids": [id(2)] }));
    assert!(has(&status, "Ready=True/Swept"), "{status:#}");
    let message = status["conditions"][0]["message"].as_str().unwrap();
    assert!(message.contains("the database refused 1 row,") && message.contains("SQLSTATE P0001"), "{message}");
    let skew = status["clockSkewMilliseconds"].as_i64().unwrap();
    assert!(skew.abs() < 1000, "one machine, one clock: {skew}");
}

#[tokio::test]
async fn the_time_that_a_check_takes_is_no_skew_of_clocks() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    // The check evaluates it. There is no row, so the sweep does not.
    log.run(
        "CREATE FUNCTION slow(audit_log_result_kind) RETURNS boolean LANGUAGE plpgsql AS \
           $$ BEGIN PERFORM pg_sleep(3); RETURN true; END $$; \
         ALTER TABLE audit_log ADD CHECK (slow(result_kind))",
    )
    .await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({})).await;
    let status = operator.until("app", "the sweep", |s| s["lastSweep"] != Value::Null).await;
    let skew = status["clockSkewMilliseconds"].as_i64().unwrap();
    assert!(skew.abs() < 1000, "one machine, one clock: {status:#}");
}

#[tokio::test]
async fn a_retry_behind_refused_rows_forgets_none_of_them() {
    retries_behind_refused_rows(&AuditTable::new().await).await;
}

#[tokio::test]
async fn a_retry_behind_refused_rows_finds_its_place_by_a_time_without_a_zone() {
    let log = AuditTable::new().await;
    log.run("DROP VIEW audit_log_complete; ALTER TABLE audit_log ALTER time_started TYPE timestamp USING time_started AT TIME ZONE 'UTC'").await;
    log.run("SET TimeZone = 'UTC'").await;
    retries_behind_refused_rows(&log).await;
}

async fn retries_behind_refused_rows(log: &AuditTable) {
    let operator = Operator::new().await;
    log.start_many(20).await;
    log.before_update("IF right(NEW.id::text, 2)::int <= 8 THEN RAISE EXCEPTION 'no'; END IF;").await;
    operator.secret_for(log).await;
    operator.apply("app", json!({ "timeout": "1h" })).await;
    // Eight in a row end the first attempt; the retry finds none behind them.
    let status = operator.until("app", "the retry", |s| s["lastSweep"]["attempts"] == json!(2)).await;
    assert_eq!(log.timed_out().await, (9..=20).collect::<Vec<_>>());
    assert_eq!(status["unsweepable"], json!({ "count": 8, "ids": (1..=8).map(id).collect::<Vec<_>>() }));
    assert!(has(&status, "Ready=True/Swept") && has(&status, "BacklogBounded=False/FallingBehind"), "{status:#}");
    let messages = status["conditions"].to_string();
    assert!(
        messages.contains("the database refused 8 rows") && messages.contains("see status.unsweepable\""),
        "{messages}"
    );
}

#[tokio::test]
async fn observe_counts_by_the_same_selection_and_changes_nothing() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    log.start_many(5).await;
    log.start(9, "10 min").await;
    let before = log.rows().await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "mode": "Observe" })).await;
    let status = operator.until("app", "the sweep", |s| s["lastSweep"] != Value::Null).await;
    assert!(has(&status, "Ready=True/Observed"), "{status:#}");
    assert_eq!(status["lastSweep"]["outcome"], json!("Observed"));
    assert_eq!((&status["lastSweep"]["timedOut"], &status["backlog"]["display"]), (&json!(0), &json!("5")));
    assert_eq!(log.rows().await, before);
    let updates = "SELECT n_tup_upd + n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'audit_log'";
    assert_eq!(log.query(updates).await, ["0"]);
}

#[tokio::test]
async fn a_trigger_that_refuses_every_statement_is_no_fault_of_rows() {
    for when in ["BEFORE", "AFTER"] {
        let log = AuditTable::new().await;
        log.start_many(20).await;
        log.run(&format!(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no updates today'; END $$; \
             CREATE TRIGGER refuse {when} UPDATE ON audit_log FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
        ))
        .await;
        let report = log.sweep(json!({ "batchSize": 5 })).await;
        assert_eq!((report.timed_out, report.refused, report.refused_ids.len()), (0, 0, 0), "{report:?}");
        assert!(report.end.as_ref().unwrap_err().message.contains("SQLSTATE P0001"), "{report:?}");
        log.run("DROP TRIGGER refuse ON audit_log").await;
        assert_eq!(log.sweep(json!({})).await.timed_out, 20);
    }
}

#[tokio::test]
async fn a_start_before_the_first_year_is_swept_and_not_shown() {
    let log = AuditTable::new().await;
    log.start_many(2).await;
    log.run("UPDATE audit_log SET time_started = '0044-03-15 BC'").await;
    let before = log.sweep(json!({ "mode": "Observe" })).await.backlog.unwrap();
    assert_eq!((before.remaining, before.oldest_time_started), (2, None));
    assert_eq!(log.sweep(json!({})).await.timed_out, 2);
}
