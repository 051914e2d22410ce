//! Faults of the database, each made to happen: what is reported is what the table shows.

use std::sync::atomic::Ordering;
use std::time::Duration;

use audit_log_sweeper::api::Reason;
use audit_log_sweeper::api::status::Outcome;
use audit_log_sweeper::sweep::{Report, sweep};
use serde_json::json;
use support::postgres::{PostgresOptions, PostgresServer, Shutdown};
use support::wait::eventually;
use tokio_util::sync::CancellationToken;

use crate::fixtures::AuditTable;
use crate::fixtures::proxy::{Lose, Proxy};

const SOON: Duration = Duration::from_secs(15);

/// Waits until at least `rows` rows are swept.
async fn until_swept(log: &AuditTable, rows: usize) {
    eventually("rows to be swept", SOON, async || {
        let done = log.timed_out().await.len();
        if done >= rows { Ok(()) } else { Err(done.to_string()) }
    })
    .await;
}

/// What is reported is what the table shows, and it is the oldest rows.
async fn tells_the_truth(log: &AuditTable, report: &Report) {
    let expected: Vec<u32> = (1..=u32::try_from(report.timed_out).unwrap()).collect();
    assert_eq!(log.timed_out().await, expected, "{report:?}");
    assert_eq!(report.uncertain, 0);
}

#[tokio::test]
async fn a_lost_answer_to_commit_is_looked_up() {
    for (lose, committed) in [(Lose::Answer, 2), (Lose::Request, 0)] {
        let log = AuditTable::new().await;
        log.start_many(5).await;
        let proxy = Proxy::new(log.port(), lose).await;
        let uri = log.uri_at(proxy.address.port());
        let report = sweep(&log.job_at(&uri, json!({ "batchSize": 2 })), &CancellationToken::new()).await;
        assert!(proxy.lost.load(Ordering::SeqCst));
        assert_eq!((report.timed_out, report.outcome()), (committed, Outcome::Failed), "{lose:?}: {report:?}");
        assert_eq!(report.end.as_ref().unwrap_err().reason, Reason::ConnectionLost);
        tells_the_truth(&log, &report).await;
    }
}

#[tokio::test]
async fn a_lost_commit_that_cannot_be_looked_up_is_reported_as_uncertain() {
    let log = AuditTable::new().await;
    log.start_many(5).await;
    let proxy = Proxy::new(log.port(), Lose::AnswerAndServer).await;
    let uri = log.uri_at(proxy.address.port());
    let stop = CancellationToken::new();
    let job = log.job_at(&uri, json!({ "batchSize": 2 }));
    let stopping = async {
        eventually("the answer to be lost", SOON, async || {
            if proxy.lost.load(Ordering::SeqCst) { Ok(()) } else { Err("not yet".to_owned()) }
        })
        .await;
        // Looking up ends soon after a stop.
        stop.cancel();
    };
    let (report, ()) = tokio::join!(sweep(&job, &stop), stopping);
    assert_eq!((report.timed_out, report.uncertain), (0, 2), "{report:?}");
    assert_eq!(log.timed_out().await, [1, 2]);
}

/// A server whose COMMITs wait for a standby that never answers, once a sweep logs in, and a table there with five stale rows.
pub async fn commit_waits() -> (PostgresServer, AuditTable) {
    let settings = vec![("synchronous_standby_names".to_owned(), "'nobody'".to_owned())];
    let mut server = PostgresServer::start(PostgresOptions { settings, ..Default::default() }).await.unwrap();
    let admin = server.connect("postgres").await.unwrap();
    admin.batch_execute("ALTER SYSTEM SET synchronous_commit = local").await.unwrap();
    server.restart(Shutdown::Fast).await.unwrap();
    let log = AuditTable::on(&server).await;
    log.start_many(5).await;
    let admin = server.connect("postgres").await.unwrap();
    admin.batch_execute(&format!("ALTER ROLE {} SET synchronous_commit = on", log.database.user)).await.unwrap();
    // A pooler may be logged in already.
    log.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = current_user AND pid <> pg_backend_pid()").await;
    (server, log)
}

#[tokio::test]
async fn a_commit_that_waits_for_a_standby_and_is_terminated_counts() {
    let (server, log) = commit_waits().await;
    let admin = server.connect("postgres").await.unwrap();
    let killing = async {
        eventually("the COMMIT to wait for the standby", SOON, async || {
            let killed = admin
                .query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name LIKE 'audit-log-sweeper%'", &[])
                .await
                .unwrap();
            if killed.is_empty() { Err("none waits".to_owned()) } else { Ok(()) }
        })
        .await;
    };
    let (report, ()) = tokio::join!(log.sweep(json!({ "batchSize": 2 })), killing);
    assert_eq!((report.timed_out, report.outcome()), (2, Outcome::Failed), "{report:?}");
    tells_the_truth(&log, &report).await;
}

#[tokio::test]
async fn restarts_end_the_attempt_and_lose_no_count() {
    let mut server = PostgresServer::start(PostgresOptions::default()).await.unwrap();
    for how in [Shutdown::Fast, Shutdown::Immediate] {
        let mut log = AuditTable::on(&server).await;
        log.start_many(1000).await;
        log.before_update("PERFORM pg_sleep(0.01);").await;
        let job = log.job(json!({ "batchSize": 3 }));
        let running = tokio::spawn(async move { sweep(&job, &CancellationToken::new()).await });
        until_swept(&log, 6).await;
        server.restart(how).await.unwrap();
        let report = running.await.unwrap();
        let reason = report.end.as_ref().unwrap_err().reason;
        // A server that goes away says so, or does not.
        let reasons = [Reason::DatabaseUnreachable, Reason::ConnectionLost];
        assert!(reasons.contains(&reason), "{how:?}: {report:?}");
        log.client = log.database.client().await.unwrap();
        assert!(report.timed_out >= 6 && report.timed_out < 1000);
        tells_the_truth(&log, &report).await;
    }
}

#[tokio::test]
async fn a_standby_and_a_full_server_have_their_own_reasons() {
    let settings = vec![("max_connections".to_owned(), "6".to_owned())];
    let mut server = PostgresServer::start(PostgresOptions { settings, ..Default::default() }).await.unwrap();
    let log = AuditTable::on(&server).await;
    log.start_many(1).await;
    // Three places are kept for superusers, and a pooler may have one. A connection that was just closed holds its place for
    // a moment longer.
    let (mut others, pooler) = (vec![], usize::from(log.pooler.is_some()));
    while others.len() < 2 {
        let place = async || match log.database.client().await {
            Ok(other) => Ok(Some(other)),
            Err(_) if others.len() + pooler >= 2 => Ok(None),
            Err(error) => Err(format!("{error:#}")),
        };
        match eventually("a place on the server", SOON, place).await {
            Some(other) => others.push(other),
            None => break,
        }
    }
    // Straight to the server: a pooler has its connection already.
    let report = sweep(&log.job_at(&log.database.uri(), json!({})), &CancellationToken::new()).await;
    let error = report.end.unwrap_err();
    assert_eq!(error.reason, Reason::TooManyConnections, "{error}");
    drop(others);

    let admin = server.connect("postgres").await.unwrap();
    admin.batch_execute("COPY (SELECT) TO PROGRAM 'cat > standby.signal'").await.unwrap();
    server.restart(Shutdown::Fast).await.unwrap();
    let error = log.sweep(json!({})).await.end.unwrap_err();
    assert_eq!(error.reason, Reason::NotPrimary, "{error}");
    assert!(error.to_string().contains("the sweep needs the primary"), "{error}");
}

#[tokio::test]
async fn a_serialization_failure_is_tried_again_at_once() {
    let log = AuditTable::new().await;
    log.start_many(4).await;
    // A sequence survives the rollback, so the third try goes well.
    log.run("CREATE SEQUENCE tries").await;
    log.before_update("IF nextval('tries') <= 2 THEN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END IF;").await;
    let report = log.sweep(json!({})).await;
    assert_eq!((report.timed_out, report.refused, report.outcome()), (4, 0, Outcome::Drained), "{report:?}");
}

#[tokio::test]
async fn a_deadlock_costs_a_retry_and_nothing_else() {
    let log = AuditTable::new().await;
    log.start_many(3).await;
    log.run("CREATE TABLE other (n int); INSERT INTO other VALUES (0)").await;
    log.before_update("UPDATE other SET n = n + 1;").await;
    let mut application = support::postgres::shared().connect(&log.database.name).await.unwrap();
    // It waits for longer than the sweep, so the sweep is the one that notices.
    application.batch_execute("SET deadlock_timeout = '1min'").await.unwrap();
    let transaction = application.transaction().await.unwrap();
    transaction.execute("UPDATE other SET n = n", &[]).await.unwrap();
    let job = log.job(json!({}));
    let running = tokio::spawn(async move { sweep(&job, &CancellationToken::new()).await });
    eventually("the sweep to wait", SOON, async || {
        let waiting = log.query("SELECT wait_event_type FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'audit-log-sweeper%'").await;
        if waiting == ["Lock"] { Ok(()) } else { Err(format!("{waiting:?}")) }
    })
    .await;
    // Now each waits for the other.
    let sql = "UPDATE audit_log SET user_agent = 'x' WHERE time_completed IS NULL";
    transaction.execute(sql, &[]).await.unwrap();
    transaction.commit().await.unwrap();
    let report = running.await.unwrap();
    assert_eq!(report.outcome(), Outcome::Drained, "{report:?}");
    tells_the_truth(&log, &report).await;
    // Where the retry came before the application's COMMIT, its rows were still locked.
    let rest = log.sweep(json!({})).await;
    assert_eq!((report.timed_out + rest.timed_out, rest.outcome()), (3, Outcome::Drained), "{report:?} {rest:?}");
    assert_eq!(log.timed_out().await, [1, 2, 3]);
}

#[tokio::test]
async fn a_table_lock_is_waited_for_a_little_and_then_left() {
    let log = AuditTable::new().await;
    log.start_many(3).await;
    let mut ddl = log.database.client().await.unwrap();
    for released in [true, false] {
        let transaction = ddl.transaction().await.unwrap();
        transaction.batch_execute("LOCK TABLE audit_log IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let job = log.job(json!({ "statementTimeout": "800ms", "limit": 1 }));
        let running = tokio::spawn(async move { sweep(&job, &CancellationToken::new()).await });
        if released {
            eventually("the sweep to wait", SOON, async || {
                let waiting = transaction
                    .query("SELECT FROM pg_locks WHERE NOT granted AND relation = 'audit_log'::regclass", &[])
                    .await
                    .unwrap();
                if waiting.is_empty() { Err("nobody waits".to_owned()) } else { Ok(()) }
            })
            .await;
            transaction.commit().await.unwrap();
            assert_eq!(running.await.unwrap().timed_out, 1);
        } else {
            let report = running.await.unwrap();
            assert_eq!((report.timed_out, report.end.unwrap_err().reason), (0, Reason::TableLocked));
        }
    }
}

#[tokio::test]
async fn a_password_changed_midway_ends_the_next_sweep_and_not_this_one() {
    let log = AuditTable::new().await;
    log.start_many(20).await;
    log.before_update("PERFORM pg_sleep(0.05);").await;
    let job = log.job(json!({ "batchSize": 2 }));
    let running = tokio::spawn(async move { sweep(&job, &CancellationToken::new()).await });
    until_swept(&log, 2).await;
    log.run(&format!("ALTER ROLE {} PASSWORD 'another'", log.database.user)).await;
    let report = running.await.unwrap();
    assert_eq!((report.timed_out, report.outcome()), (20, Outcome::Drained), "{report:?}");
    // Straight to the server: a pooler stays logged in.
    let next = sweep(&log.job_at(&log.database.uri(), json!({})), &CancellationToken::new()).await;
    assert_eq!(next.end.unwrap_err().reason, Reason::AuthenticationFailed);
}

#[tokio::test]
async fn a_right_revoked_or_a_table_replaced_midway_counts_what_was_done() {
    let log = AuditTable::new().await;
    let server = support::postgres::shared();
    let admin = server.connect(&log.database.name).await.unwrap();
    admin.batch_execute(include_str!("../../../manifests/sql/role.sql")).await.unwrap();
    log.start_many(300).await;
    log.before_update("PERFORM pg_sleep(0.02);").await;
    let login = format!("{}_sweeper", log.database.user);
    admin.batch_execute(&format!("CREATE ROLE {login} LOGIN PASSWORD 'pw' IN ROLE audit_log_sweeper")).await.unwrap();
    let uri = format!("postgresql://{login}:pw@127.0.0.1:{}/{}", log.database.port, log.database.name);

    let job = log.job_at(&uri, json!({ "batchSize": 2 }));
    let running = tokio::spawn(async move { sweep(&job, &CancellationToken::new()).await });
    until_swept(&log, 4).await;
    log.run("REVOKE UPDATE (result_kind) ON audit_log FROM audit_log_sweeper").await;
    let report = running.await.unwrap();
    let error = report.end.as_ref().unwrap_err();
    assert_eq!(error.reason, Reason::PermissionDenied, "{error}");
    assert!(error.to_string().contains("permission denied for table audit_log"), "{error}");
    tells_the_truth(&log, &report).await;

    log.run("GRANT UPDATE (result_kind) ON audit_log TO audit_log_sweeper").await;
    let before = log.timed_out().await.len();
    let job = log.job_at(&uri, json!({ "batchSize": 2 }));
    let running = tokio::spawn(async move { sweep(&job, &CancellationToken::new()).await });
    until_swept(&log, before + 4).await;
    // Another table of that name, with no rights on it yet.
    log.run(
        "BEGIN; ALTER TABLE audit_log RENAME TO former; CREATE TABLE audit_log (LIKE former INCLUDING ALL); COMMIT",
    )
    .await;
    let report = running.await.unwrap();
    assert_eq!(report.end.as_ref().unwrap_err().reason, Reason::PermissionDenied);
    let swept = log.query("SELECT count(*) FROM former WHERE result_kind = 'timeout'").await;
    assert_eq!(swept, [(i64::try_from(before).unwrap() + report.timed_out).to_string()]);
    admin.batch_execute(&format!("DROP ROLE {login}")).await.unwrap();
}
