//! What is counted is what the table shows, whatever triggers, locks, lost answers and short deadlines do.

use std::time::{Duration, Instant};

use audit_log_sweeper::api::Reason;
use audit_log_sweeper::api::status::Outcome;
use audit_log_sweeper::sweep::report::Ended;
use audit_log_sweeper::sweep::sweep;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use support::postgres::{PostgresOptions, PostgresServer};
use support::wait::eventually;
use tokio_util::sync::CancellationToken;

use super::faults::commit_waits;
use crate::fixtures::AuditTable;
use crate::fixtures::proxy::{Lose, Proxy};

#[tokio::test]
async fn rows_that_a_trigger_leaves_open_are_suppressed_and_not_timed_out() {
    for body in [
        "IF right(NEW.id::text, 1) IN ('2', '4') THEN RETURN OLD; END IF;",
        "IF right(NEW.id::text, 1) IN ('2', '4') THEN NEW.time_completed := NULL; NEW.result_kind := NULL; END IF;",
    ] {
        for batch in [1, 2, 10] {
            let log = AuditTable::new().await;
            log.start_many(5).await;
            log.before_update(body).await;
            let report = log.sweep(json!({ "batchSize": batch })).await;
            assert_eq!((report.timed_out, report.suppressed, report.outcome()), (3, 2, Outcome::Drained), "{report:?}");
            assert_eq!((log.timed_out().await, log.open().await), (vec![1, 3, 5], vec![2, 4]));
            assert_eq!(report.backlog.unwrap().remaining, 2);
        }
    }
}

#[tokio::test]
async fn a_unique_index_on_the_completion_time_makes_no_sweep_wait_for_references() {
    let generated = |what: &str| {
        format!("ALTER TABLE audit_log ADD made text GENERATED ALWAYS AS ({what}) STORED, ADD UNIQUE (made, id)")
    };
    let set = "CASE WHEN time_completed IS NULL THEN 'open' END";
    // Who refers to a row holds it only against an update that changes a key.
    for (index, swept) in [
        ("CREATE UNIQUE INDEX everything ON audit_log (time_completed, id)".to_owned(), vec![1, 3, 4]),
        (generated(set), vec![1, 3, 4]),
        (generated("upper(request_id)"), vec![1, 2, 3, 4]),
    ] {
        no_wait_for_references(&index, &swept).await;
    }
}

async fn no_wait_for_references(index: &str, swept: &[u32]) {
    let log = AuditTable::new().await;
    log.start_many(4).await;
    log.run(&format!("{index}; CREATE TABLE part (log uuid REFERENCES audit_log (id))")).await;
    let mut application = log.database.client().await.unwrap();
    let transaction = application.transaction().await.unwrap();
    transaction.execute(&format!("INSERT INTO part VALUES ('{}')", crate::fixtures::id(2)), &[]).await.unwrap();
    let began = Instant::now();
    let report = log.sweep(json!({ "batchSize": 3 })).await;
    assert_eq!((report.skipped, report.end.clone()), (0, Ok(Ended::Drained)), "{index}: {report:?}");
    assert_eq!(log.timed_out().await, swept, "{index}");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    transaction.commit().await.unwrap();
    let rest = log.sweep(json!({})).await.timed_out;
    assert_eq!((rest, log.open().await), (4 - report.timed_out, vec![]), "{index}");
}

#[tokio::test]
async fn a_row_lock_is_not_taken_for_a_lock_of_the_table() {
    // A trigger reads another table's row, which somebody holds: only the one row waits for it.
    let log = AuditTable::new().await;
    log.start_many(5).await;
    log.run("CREATE TABLE other (n int); INSERT INTO other VALUES (1)").await;
    log.before_update("IF right(NEW.id::text, 1) = '3' THEN PERFORM n FROM other FOR UPDATE; END IF;").await;
    let mut application = log.database.client().await.unwrap();
    let transaction = application.transaction().await.unwrap();
    transaction.execute("UPDATE other SET n = 2", &[]).await.unwrap();
    let report = log.sweep(json!({ "statementTimeout": "1s" })).await;
    assert_eq!((report.timed_out, report.skipped, report.refused), (4, 1, 0), "{report:?}");
    assert_eq!((report.end.clone().err(), log.timed_out().await), (None, vec![1, 2, 4, 5]));
    assert_eq!(report.backlog.unwrap().remaining, 1);
}

#[tokio::test]
async fn the_backlog_counts_what_was_stepped_over_after_many_rows() {
    let log = AuditTable::new().await;
    log.start_many(10_020).await;
    log.run("ALTER TABLE audit_log ADD CONSTRAINT never CHECK (time_completed IS NULL OR id::text NOT LIKE '%00001') NOT VALID").await;
    let mut application = log.database.client().await.unwrap();
    let transaction = application.transaction().await.unwrap();
    let held = format!("UPDATE audit_log SET user_agent = 'x' WHERE id = '{}'", crate::fixtures::id(2));
    transaction.execute(&held, &[]).await.unwrap();
    let report = log.sweep(json!({ "limit": 100_000, "batchSize": 5000 })).await;
    assert_eq!((report.timed_out, report.refused, report.outcome()), (10_018, 1, Outcome::Drained), "{report:?}");
    assert_eq!(report.backlog.unwrap().remaining, 2);
}

#[tokio::test]
async fn the_transaction_tells_of_a_lost_commit_whatever_its_row_looks_like_since() {
    // A trigger after the update, and one that rounds, leave another time in the row than the statement returned.
    for trigger in [
        "CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF pg_trigger_depth() = 1 THEN UPDATE audit_log \
           SET time_completed = date_trunc('hour', time_completed) + interval '1 day' WHERE id = NEW.id; END IF; RETURN NULL; END $$; \
         CREATE TRIGGER later AFTER UPDATE ON audit_log FOR EACH ROW EXECUTE FUNCTION later()",
        "CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN DELETE FROM audit_log WHERE id = NEW.id; RETURN NULL; END $$; \
         CREATE TRIGGER gone AFTER UPDATE ON audit_log FOR EACH ROW EXECUTE FUNCTION gone()",
    ] {
        for (lose, committed) in [(Lose::Answer, 2), (Lose::Request, 0)] {
            let log = AuditTable::new().await;
            log.start_many(5).await;
            log.run(trigger).await;
            let proxy = Proxy::new(log.port(), lose).await;
            let uri = log.uri_at(proxy.address.port());
            let report = sweep(&log.job_at(&uri, json!({ "batchSize": 2 })), &CancellationToken::new()).await;
            assert_eq!((report.timed_out, report.uncertain), (committed, 0), "{lose:?}: {report:?}");
            assert_eq!(report.end.as_ref().unwrap_err().reason, Reason::ConnectionLost);
            assert_eq!(log.open().await.len(), 5 - usize::try_from(committed).unwrap());
        }
    }
}

#[tokio::test]
async fn a_sweep_ends_within_five_seconds_of_its_deadline() {
    let (_server, log) = commit_waits().await;
    for (deadline, least) in [("1s", 1), ("2s", 2)] {
        let report = log.sweep(json!({ "deadline": deadline, "statementTimeout": "1s", "batchSize": 2 })).await;
        assert!(report.duration < Duration::from_secs(least + 5), "{deadline}: {report:?}");
        assert_eq!(report.timed_out + report.uncertain, 2, "{deadline}: {report:?}");
    }

    // The answer to COMMIT is lost, and with it the way to the server.
    let log = AuditTable::new().await;
    log.start_many(3).await;
    let proxy = Proxy::new(log.port(), Lose::AnswerAndServer).await;
    let uri = log.uri_at(proxy.address.port());
    let job = log.job_at(&uri, json!({ "deadline": "1s", "statementTimeout": "1s" }));
    let report = sweep(&job, &CancellationToken::new()).await;
    assert_eq!((report.timed_out, report.uncertain), (0, 3), "{report:?}");
    // The lookup gave up by itself, so what is told is why COMMIT failed.
    assert_eq!(report.end.as_ref().unwrap_err().reason, Reason::ConnectionLost, "{report:?}");
    assert!(report.duration < Duration::from_secs(6), "{report:?}");
}

#[tokio::test]
async fn a_server_that_stands_still_holds_no_sweep_beyond_five_seconds_after_its_deadline() {
    let server = PostgresServer::start(PostgresOptions::default()).await.unwrap();
    let log = AuditTable::on(&server).await;
    log.start_many(50).await;
    log.before_update("PERFORM pg_sleep(0.02);").await;
    let job = log.job_at(&log.database.uri(), json!({ "deadline": "2s", "statementTimeout": "1s", "batchSize": 5 }));
    let running = tokio::spawn(async move { sweep(&job, &CancellationToken::new()).await });
    log.until_swept(5).await;
    // The sweep's backend and the server that would take a cancel request.
    let pids = log.query("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'audit-log-sweeper/%'").await;
    let mut pids: Vec<_> = pids.iter().map(|pid| Pid::from_raw(pid.parse().unwrap())).collect();
    pids.extend(server.pid());
    pids.iter().for_each(|pid| kill(*pid, Signal::SIGSTOP).unwrap());
    let report = running.await.unwrap();
    pids.iter().for_each(|pid| kill(*pid, Signal::SIGCONT).unwrap());
    assert!(report.duration < Duration::from_secs(7), "{report:?}");
    let swept = i64::try_from(log.timed_out().await.len()).unwrap();
    assert!((report.timed_out..=report.timed_out + report.uncertain).contains(&swept), "{swept}: {report:?}");
}

#[tokio::test]
async fn a_transaction_that_a_crash_took_back_is_not_counted() {
    // COMMIT waits before it writes to disk. Meanwhile a crash takes it back, and its number goes to another transaction.
    let settings =
        [("commit_delay", "100000"), ("commit_siblings", "0"), ("fsync", "on"), ("synchronous_commit", "on")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let server = PostgresServer::start(PostgresOptions { settings, ..Default::default() }).await.unwrap();
    let log = AuditTable::on(&server).await;
    log.start_many(3).await;
    log.run("CREATE TABLE app (n int)").await;
    let job = log.job_at(&log.database.uri(), json!({ "deadline": "10s", "statementTimeout": "1s" }));
    let running = tokio::spawn(async move { sweep(&job, &CancellationToken::new()).await });
    let sql = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'audit-log-sweeper/%' AND query = 'COMMIT' AND state = 'active'";
    let end = Instant::now() + Duration::from_secs(10);
    let pid = loop {
        if let Some(pid) = log.query(sql).await.first() {
            break Pid::from_raw(pid.parse().unwrap());
        }
        assert!(Instant::now() < end, "no COMMIT was seen");
    };
    kill(pid, Signal::SIGKILL).unwrap();
    let client = eventually("the server, and another transaction", Duration::from_secs(20), async || {
        let client = log.database.client().await.map_err(|error| error.to_string())?;
        client.batch_execute("INSERT INTO app VALUES (1)").await.map_err(|error| error.to_string())?;
        Ok(client)
    })
    .await;
    let report = running.await.unwrap();
    let sql = "SELECT count(*) FROM audit_log WHERE result_kind = 'timeout'";
    let swept: i64 = client.query_one(sql, &[]).await.unwrap().get(0);
    assert!((report.timed_out..=report.timed_out + report.uncertain).contains(&swept), "{swept}: {report:?}");
}
