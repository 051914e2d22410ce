//! The sweep on a real server: which rows it takes, and which it never touches.

use std::time::{Duration, Instant};

use audit_log_sweeper::api::Reason;
use audit_log_sweeper::api::status::Outcome;
use audit_log_sweeper::sweep::sweep;
use chrono::{TimeDelta, Utc};
use serde_json::json;
use support::wait::eventually;
use tokio_util::sync::CancellationToken;

use crate::fixtures::{AuditTable, id};

#[tokio::test]
async fn takes_the_oldest_first_then_the_rest_then_nothing() {
    let log = AuditTable::new().await;
    for (number, age) in [(1, "6 h"), (2, "5 h"), (3, "4 h"), (4, "3 h"), (5, "2 h"), (6, "30 min"), (7, "7 h")] {
        log.start(number, age).await;
    }
    assert_eq!(log.complete(7).await, 1);
    let completed = log.query(&format!("SELECT t::text FROM audit_log t WHERE id = '{}'", id(7))).await;

    let first = log.sweep(json!({ "limit": 3 })).await;
    assert_eq!(log.timed_out().await, [1, 2, 3]);
    assert_eq!((first.timed_out, first.fallback_batches, first.outcome()), (3, 0, Outcome::LimitReached));
    assert_eq!(first.backlog.unwrap().display, "2");

    let second = log.sweep(json!({ "limit": 3 })).await;
    assert_eq!(log.timed_out().await, [1, 2, 3, 4, 5]);
    assert_eq!((second.timed_out, second.outcome()), (2, Outcome::Drained));

    let third = log.sweep(json!({ "limit": 3 })).await;
    assert_eq!(log.timed_out().await, [1, 2, 3, 4, 5]);
    assert_eq!((third.timed_out, third.outcome()), (0, Outcome::Drained));
    assert_eq!(log.open().await, [6]);
    assert_eq!(log.query(&format!("SELECT t::text FROM audit_log t WHERE id = '{}'", id(7))).await, completed);
}

#[tokio::test]
async fn rows_of_one_start_time_go_by_id() {
    let log = AuditTable::new().await;
    for number in [3, 1, 2] {
        log.start(number, "2 h").await;
    }
    log.run("UPDATE audit_log SET time_started = '2001-01-01'").await;
    log.sweep(json!({ "limit": 2 })).await;
    assert_eq!(log.timed_out().await, [1, 2]);
}

#[tokio::test]
async fn the_order_and_the_limit_hold_without_the_index_and_over_batches() {
    let log = AuditTable::new().await;
    // The index gives the order by itself; without it only the statement does.
    log.run("DROP INDEX audit_log_open_by_time_started").await;
    for (number, age) in [(6, "2 h"), (5, "3 h"), (4, "4 h"), (3, "5 h"), (2, "5 h"), (1, "5 h")] {
        log.start(number, age).await;
    }
    log.run(
        "UPDATE audit_log SET time_started = '2001-01-01' WHERE time_started < clock_timestamp() - interval '4.5 h'",
    )
    .await;
    let report = log.sweep(json!({ "limit": 1 })).await;
    assert_eq!((report.timed_out, log.timed_out().await), (1, vec![1]));
    let report = log.sweep(json!({ "limit": 3, "batchSize": 2 })).await;
    assert_eq!((report.timed_out, log.timed_out().await), (3, vec![1, 2, 3, 4]));
}

#[tokio::test]
async fn a_limit_that_is_just_enough_holds_nothing_back() {
    let log = AuditTable::new().await;
    log.start_many(3).await;
    let report = log.sweep(json!({ "limit": 3 })).await;
    assert_eq!((report.timed_out, report.outcome()), (3, Outcome::Drained));
}

#[tokio::test]
async fn a_completion_in_flight_is_neither_overwritten_nor_waited_for() {
    for commit in [true, false] {
        let log = AuditTable::new().await;
        log.start(1, "6 h").await;
        log.start(2, "5 h").await;
        let mut application = log.database.client().await.unwrap();
        let transaction = application.transaction().await.unwrap();
        let completion = "UPDATE audit_log SET time_completed = clock_timestamp(), result_kind = 'success', \
                          http_status_code = 200 WHERE id = $1::text::uuid AND time_completed IS NULL";
        assert_eq!(transaction.execute(completion, &[&id(1)]).await.unwrap(), 1);

        let start = Instant::now();
        let report = log.sweep(json!({})).await;
        assert!(start.elapsed() < Duration::from_secs(2), "it waited: {:?}", start.elapsed());
        assert_eq!((report.timed_out, report.fallback_batches, report.end.err()), (1, 1, None));
        assert_eq!(log.timed_out().await, [2]);

        if commit {
            transaction.commit().await.unwrap();
            assert_eq!(log.with_kind("success").await, [1]);
            let before = log.rows().await;
            log.sweep(json!({})).await;
            assert_eq!(log.rows().await, before);
        } else {
            transaction.rollback().await.unwrap();
            log.sweep(json!({})).await;
            assert_eq!(log.timed_out().await, [1, 2]);
        }
    }
}

/// The batch has seen the row open, and has not come to it yet.
#[tokio::test]
async fn a_row_that_is_completed_in_the_midst_of_a_batch_stays_as_it_is() {
    let log = AuditTable::new().await;
    log.start_many(3).await;
    // It would refuse the row as well.
    log.run("ALTER TABLE audit_log DROP CONSTRAINT audit_log_result_has_its_details").await;
    let completed = format!("EXISTS (SELECT FROM audit_log WHERE id = '{}' AND time_completed IS NOT NULL)", id(3));
    log.before_update(&format!(
        "IF NEW.id = '{}' THEN FOR n IN 1..20 LOOP EXIT WHEN {completed}; PERFORM pg_sleep(0.01); END LOOP; END IF;",
        id(1)
    ))
    .await;
    let application = log.database.client().await.unwrap();
    let completing = async {
        let sql = format!(
            "UPDATE audit_log SET time_completed = clock_timestamp(), result_kind = 'success', http_status_code = 200 \
             WHERE id = '{}' AND EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' \
               AND datname = current_database() AND application_name LIKE 'audit-log-sweeper/%')",
            id(3)
        );
        while application.execute(&sql, &[]).await.unwrap() == 0 {}
    };
    let (report, ()) = tokio::join!(log.sweep(json!({})), completing);
    assert_eq!((log.timed_out().await, log.with_kind("success").await), (vec![1, 2], vec![3]), "{report:?}");
    assert_eq!((report.timed_out, report.batches, report.fallback_batches), (2, 1, 1), "{report:?}");
}

#[tokio::test]
async fn after_a_rollback_the_rest_of_the_sweep_locks_rows_first() {
    let log = AuditTable::new().await;
    log.start_many(25).await;
    log.before_update(&format!("IF NEW.id = '{}' THEN RETURN NULL; END IF;", id(13))).await;
    let report = log.sweep(json!({ "batchSize": 10 })).await;
    assert_eq!(log.open().await, [13]);
    assert_eq!((report.timed_out, report.suppressed, report.batches, report.fallback_batches), (24, 1, 3, 2));
}

#[tokio::test]
async fn a_late_guarded_completion_changes_nothing() {
    let log = AuditTable::new().await;
    log.start(1, "6 h").await;
    log.sweep(json!({})).await;
    let swept = log.rows().await;
    assert_eq!(log.complete(1).await, 0);
    assert_eq!(log.rows().await, swept);
}

#[tokio::test]
async fn the_same_id_in_two_partitions_is_two_rows() {
    let log = AuditTable::empty().await;
    log.run(
        "CREATE TABLE audit_log (id bigint, time_started timestamptz, time_completed timestamptz, result_kind text, \
           PRIMARY KEY (id, time_started)) PARTITION BY RANGE (time_started); \
         CREATE TABLE old PARTITION OF audit_log FOR VALUES FROM (MINVALUE) TO ('2020-01-01'); \
         CREATE TABLE new PARTITION OF audit_log FOR VALUES FROM ('2020-01-01') TO (MAXVALUE); \
         CREATE INDEX ON audit_log (time_started, id) WHERE num_nulls(time_completed) = 1; \
         INSERT INTO audit_log VALUES (7, '2019-01-01'), (7, clock_timestamp() - interval '1 min'), (7, '2019-06-01')",
    )
    .await;
    let report = log.sweep(json!({ "limit": 1 })).await;
    assert_eq!(report.timed_out, 1);
    assert_eq!(log.query("SELECT extract(year from time_started)::int, extract(month from time_started)::int FROM audit_log WHERE time_completed IS NOT NULL").await, ["2019|1"]);
    log.sweep(json!({})).await;
    assert_eq!(
        log.query("SELECT count(*) FROM audit_log WHERE time_completed IS NULL AND time_started > '2020-01-01'").await,
        ["1"]
    );
}

#[tokio::test]
async fn rows_that_share_a_key_are_not_completed_beside_the_chosen_ones() {
    let log = AuditTable::empty().await;
    log.run(
        "CREATE TABLE audit_log (id bigint, time_started timestamptz, time_completed timestamptz, result_kind text); \
         INSERT INTO audit_log SELECT 7, '2019-01-01' FROM generate_series(1, 3)",
    )
    .await;
    let report = log.sweep(json!({ "limit": 1 })).await;
    assert_eq!(report.end.unwrap_err().reason, Reason::SchemaMismatch);
    assert_eq!(
        (report.timed_out, log.query("SELECT count(*) FROM audit_log WHERE time_completed IS NULL").await),
        (0, vec!["3".into()])
    );
}

#[tokio::test]
async fn rows_that_are_written_anew_in_the_midst_of_a_batch_are_swept_all_the_same() {
    const ROWS: u32 = 30_000;
    let log = AuditTable::new().await;
    log.start_many(ROWS).await;
    let application = log.database.client().await.unwrap();
    let ended = CancellationToken::new();
    // Always a little ahead of the sweep, so that again and again a row is written between the snapshot of a batch and its lock.
    let writing = async {
        let sql = "UPDATE audit_log SET user_agent = 'x' WHERE id = (SELECT id FROM audit_log WHERE time_completed IS NULL \
                   ORDER BY time_started OFFSET floor(random() * 900) LIMIT 1)";
        while !ended.is_cancelled() {
            application.execute(sql, &[]).await.unwrap();
        }
    };
    let sweeping = async {
        let mut job = log.job(json!({ "limit": ROWS, "batchSize": 500 }));
        // It would give way, and hardly ever meet the other.
        job.plan.yield_budget = Duration::ZERO;
        let report = sweep(&job, &CancellationToken::new()).await;
        ended.cancel();
        report
    };
    let (report, ()) = tokio::join!(sweeping, writing);
    assert_eq!((report.outcome(), report.suppressed), (Outcome::Drained, 0), "{report:?}");
    // Those that were being written were skipped; there was one at a time.
    let open = log.open().await.len();
    assert_eq!(i64::try_from(open).unwrap(), i64::from(ROWS) - report.timed_out);
    assert!(open <= 60, "{open} rows were passed over");
}

#[tokio::test]
async fn the_rights_that_are_asked_for_are_all_that_a_sweep_makes_use_of() {
    let log = AuditTable::new().await;
    log.start_many(2500).await;
    let admin = support::postgres::shared().connect(&log.database.name).await.unwrap();
    admin.batch_execute(include_str!("../../../manifests/sql/role.sql")).await.unwrap();
    let login = format!("{}_sweeper", log.database.user);
    admin.batch_execute(&format!("CREATE ROLE {login} LOGIN PASSWORD 'pw' IN ROLE audit_log_sweeper")).await.unwrap();
    let uri = format!("postgresql://{login}:pw@127.0.0.1:{}/{}", log.database.port, log.database.name);
    let report = sweep(&log.job_at(&uri, json!({ "limit": 2000 })), &CancellationToken::new()).await;
    assert_eq!(log.timed_out().await, (1..=2000).collect::<Vec<_>>());
    // A statement that is refused is tried with ever fewer rows.
    assert_eq!((report.batches, report.outcome()), (2, Outcome::LimitReached), "{report:?}");
    let refused = "SELECT xact_rollback FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(log.query(refused).await, ["0"]);
    admin.batch_execute(&format!("DROP ROLE {login}")).await.unwrap();
}

#[tokio::test]
async fn batches_go_on_where_the_last_one_stopped() {
    let log = AuditTable::new().await;
    log.start_many(25).await;
    // A row whose update is suppressed stays open; nothing behind it is hidden, and nothing is read twice.
    log.before_update(&format!("IF NEW.id IN ('{}', '{}') THEN RETURN NULL; END IF;", id(4), id(5))).await;
    // A sweep that read rows twice would never end by itself.
    let report = log.sweep(json!({ "batchSize": 2, "deadline": "20s", "statementTimeout": "5s" })).await;
    assert_eq!(log.open().await, [4, 5]);
    assert_eq!((report.timed_out, report.suppressed, report.batches), (23, 2, 13));
    assert_eq!((report.outcome(), report.backlog.unwrap().display.as_str()), (Outcome::Drained, "2"));
}

#[tokio::test]
async fn what_was_committed_counts_when_a_later_batch_fails() {
    let log = AuditTable::new().await;
    log.start_many(10).await;
    log.before_update(&format!("IF NEW.id = '{}' THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;", id(6)))
        .await;
    let report = log.sweep(json!({ "batchSize": 2 })).await;
    assert_eq!(log.timed_out().await, [1, 2, 3, 4]);
    assert_eq!((report.timed_out, report.batches, report.outcome()), (4, 2, Outcome::Failed));
    assert_eq!(report.end.unwrap_err().reason, Reason::DatabaseUnreachable);
}

#[tokio::test]
async fn the_cutoff_is_the_databases_and_frozen() {
    let log = AuditTable::new().await;
    log.start_many(2).await;
    // Completing the first row starts another, which is not stale at the cutoff and is a moment later.
    log.before_update(&format!(
        "IF NEW.id = '{}' THEN INSERT INTO audit_log (id, time_started, request_id, request_uri, operation_id, \
           source_ip, actor_kind) VALUES ('{}', clock_timestamp() - interval '1 h', 'r', '/', 'op', '::1', 'unauthenticated'); END IF;",
        id(1), id(3)
    ))
    .await;
    let before = Utc::now();
    let report = log.sweep(json!({ "batchSize": 1 })).await;
    let cutoff = report.cutoff.unwrap();
    assert_eq!((log.timed_out().await, log.open().await), (vec![1, 2], vec![3]));
    let hour = TimeDelta::hours(1);
    assert!(cutoff >= before - hour - TimeDelta::seconds(1) && cutoff <= Utc::now() - hour + TimeDelta::seconds(1));
}

#[tokio::test]
async fn the_server_keeps_the_limits_too() {
    // A row that the optimistic batch does not get is taken by the other kind.
    let suppressed = "IF current_setting('lock_timeout') = '10ms' THEN RETURN NULL; END IF;";
    for (before, lock, statement, fallbacks) in [("", 10, 250, 0), (suppressed, 750, 1500, 1)] {
        let log = AuditTable::new().await;
        log.start(1, "6 h").await;
        log.run("CREATE TABLE seen (name text, value text)").await;
        log.before_update(&format!(
            "{before} INSERT INTO seen SELECT name, setting FROM pg_settings WHERE name IN ('statement_timeout', \
             'lock_timeout', 'idle_in_transaction_session_timeout', 'DateStyle', 'TimeZone', 'transaction_isolation', \
             'work_mem');"
        ))
        .await;
        // Settings of the role that would change what the sweep reads, or the little that it may use.
        let role = &log.database.user;
        log.run(&format!(
            "ALTER ROLE {role} SET DateStyle = 'SQL, DMY'; ALTER ROLE {role} SET TimeZone = 'Asia/Kolkata'; \
             ALTER ROLE {role} SET default_transaction_isolation = 'serializable'; \
             ALTER ROLE {role} SET default_transaction_read_only = on; ALTER ROLE {role} SET work_mem = '64kB'"
        ))
        .await;
        let report = log.sweep(json!({ "statementTimeout": "1500ms" })).await;
        assert_eq!((report.timed_out, report.fallback_batches, report.end.err()), (1, fallbacks, None));
        let seen = log.query("SELECT name, value FROM seen ORDER BY lower(name)").await.join(" ");
        assert_eq!(
            seen,
            format!(
                "DateStyle|ISO, YMD idle_in_transaction_session_timeout|10000 lock_timeout|{lock} \
                 statement_timeout|{statement} TimeZone|UTC transaction_isolation|read committed work_mem|16384"
            )
        );
    }
}

#[tokio::test]
async fn a_slow_statement_is_ended_by_the_server() {
    let log = AuditTable::new().await;
    log.start_many(12).await;
    log.before_update("PERFORM pg_sleep(30);").await;
    let report = log.sweep(json!({ "statementTimeout": "200ms", "batchSize": 2 })).await;
    assert_eq!((report.timed_out, report.end.unwrap_err().reason), (0, Reason::StatementTimeout));
    // Eight rows in a row that take too long by themselves: it is the server, not the rows.
    assert_eq!((report.skipped, report.resume_after.unwrap().id), (8, Some(id(8))));
    nothing_is_left_running(&log).await;
}

#[tokio::test]
async fn the_deadline_ends_a_sweep_and_keeps_what_was_done() {
    let log = AuditTable::new().await;
    log.start_many(1000).await;
    // Far more than the deadline in all, and a batch far less than the share of it that a statement may take.
    log.before_update("PERFORM pg_sleep(0.02);").await;
    let report = log.sweep(json!({ "batchSize": 2, "deadline": "3s", "statementTimeout": "1s" })).await;
    assert_eq!(report.outcome(), Outcome::DeadlineReached, "{report:?}");
    let expected: Vec<u32> = (1..=u32::try_from(report.timed_out).unwrap()).collect();
    assert!(report.timed_out > 0 && report.timed_out < 1000);
    assert_eq!(log.timed_out().await, expected);
    nothing_is_left_running(&log).await;
}

#[tokio::test]
async fn a_stop_cancels_the_running_statement_on_the_server() {
    let log = AuditTable::new().await;
    log.start_many(4).await;
    log.before_update(&format!("IF NEW.id = '{}' THEN PERFORM pg_sleep(30); END IF;", id(3))).await;
    let stop = CancellationToken::new();
    let job = log.job(json!({ "batchSize": 2 }));
    let stopping = async {
        eventually("the second batch to hang", Duration::from_secs(10), async || {
            let done = log.timed_out().await;
            if done == [1, 2] { Ok(()) } else { Err(format!("{done:?}")) }
        })
        .await;
        stop.cancel();
        Instant::now()
    };
    let (report, stopped) = tokio::join!(sweep(&job, &stop), stopping);
    assert!(stopped.elapsed() < Duration::from_secs(2), "{:?}", stopped.elapsed());
    assert_eq!((report.timed_out, report.outcome()), (2, Outcome::Stopped));
    assert_eq!(log.timed_out().await, [1, 2]);
    nothing_is_left_running(&log).await;
}

#[tokio::test]
async fn a_missing_table_column_or_right_is_named_with_what_to_do() {
    let log = AuditTable::empty().await;
    let error = log.sweep(json!({})).await.end.unwrap_err();
    assert_eq!(error.reason, Reason::TableNotFound);
    assert!(error.to_string().contains("spec.table"), "{error}");
    log.create().await;
    let error = log.sweep(json!({ "columns": { "id": "key" } })).await.end.unwrap_err();
    assert_eq!(error.reason, Reason::ColumnNotFound);
    let error =
        log.sweep(json!({ "complete": [{ "column": "result_kind", "value": "timed out" }] })).await.end.unwrap_err();
    assert_eq!(error.reason, Reason::SchemaMismatch, "{error}");
}

async fn nothing_is_left_running(log: &AuditTable) {
    eventually("the sweep's sessions to be gone", Duration::from_secs(2), async || {
        let sessions = log.sweeping_sessions().await;
        if sessions.is_empty() { Ok(()) } else { Err(format!("{sessions:?}")) }
    })
    .await;
}
