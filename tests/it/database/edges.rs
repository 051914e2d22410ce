//! Corners where a sweep could hang, starve rows, lose counts or show what it must not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use audit_log_sweeper::api::Reason;
use audit_log_sweeper::api::status::Outcome;
use audit_log_sweeper::sweep::sweep;
use audit_log_sweeper::sweep::throttle::Peers;
use serde_json::{Value, json};
use support::wait::eventually;
use tokio::net::TcpListener;
use tokio_postgres::NoTls;
use tokio_util::sync::CancellationToken;

use crate::fixtures::operator::has;
use crate::fixtures::{AuditTable, Operator, id};

/// A port that accepts and never answers.
async fn silent() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut kept = vec![];
        while let Ok(stream) = listener.accept().await {
            kept.push(stream);
        }
    });
    format!("postgresql://u:p@{address}/d")
}

#[tokio::test]
async fn a_silent_server_is_unreachable_and_not_a_deadline_that_was_reached() {
    let (log, operator) = (AuditTable::empty().await, Operator::new().await);
    let uri = silent().await;
    let report =
        sweep(&log.job_at(&uri, json!({ "deadline": "1s", "statementTimeout": "1s" })), &CancellationToken::new())
            .await;
    assert_eq!((report.outcome(), report.end.unwrap_err().reason), (Outcome::Failed, Reason::LoginTimeout));
    operator.secret("db", &[("uri", &uri)]).await;
    operator.apply("app", json!({ "deadline": "1s", "statementTimeout": "1s" })).await;
    let status = operator.until("app", "the failure", |s| s["lastError"] != Value::Null).await;
    assert!(
        has(&status, "Ready=False/LoginTimeout") && has(&status, "DatabaseReachable=False/LoginTimeout"),
        "{status:#}"
    );
    assert_eq!(status["lastSuccessfulTime"], Value::Null);
}

#[tokio::test]
async fn a_stop_while_connecting_keeps_the_slot() {
    let mut operator = Operator::new().await;
    operator.secret("db", &[("uri", &silent().await)]).await;
    operator.apply("app", json!({ "period": "8760h" })).await;
    operator.until("app", "the acknowledgement", |s| has(s, "Reconciling=True/Pending")).await;
    operator.terminate().await;
    let log = AuditTable::new().await;
    log.start(1, "2 h").await;
    operator.secret_for(&log).await;
    operator.start().await;
    operator.until("app", "the sweep", |s| has(s, "Ready=True/Swept")).await;
    assert_eq!(log.timed_out().await, [1]);
}

#[tokio::test]
async fn a_batch_too_large_for_the_deadline_shrinks_until_it_fits() {
    let log = AuditTable::new().await;
    log.start_many(500).await;
    log.before_update("PERFORM pg_sleep(0.02);").await;
    let report = log.sweep(json!({ "batchSize": 500, "deadline": "6s", "statementTimeout": "6s" })).await;
    assert_eq!(report.outcome(), Outcome::DeadlineReached, "{report:?}");
    let swept: Vec<u32> = (1..=u32::try_from(report.timed_out).unwrap()).collect();
    assert!(report.timed_out > 0 && report.skipped == 0, "{report:?}");
    assert_eq!(log.timed_out().await, swept);
}

#[tokio::test]
async fn a_deadline_in_which_nothing_can_be_done_is_a_failure() {
    let log = AuditTable::new().await;
    log.start_many(3).await;
    log.before_update("PERFORM pg_sleep(30);").await;
    let report = log.sweep(json!({ "deadline": "1s", "statementTimeout": "1s" })).await;
    assert_eq!((report.timed_out, report.end.unwrap_err().reason), (0, Reason::StatementTimeout));
}

#[tokio::test]
async fn a_slow_row_blocks_nothing_behind_it_in_batches_of_one() {
    let log = AuditTable::new().await;
    log.start_many(4).await;
    log.before_update(&format!("IF NEW.id = '{}' THEN PERFORM pg_sleep(30); END IF;", id(2))).await;
    let report = log.sweep(json!({ "batchSize": 1, "statementTimeout": "400ms" })).await;
    assert_eq!((log.open().await, report.skipped, report.outcome()), (vec![2], 1, Outcome::Drained), "{report:?}");
}

#[tokio::test]
async fn a_row_without_a_key_is_an_error_and_not_a_loop() {
    let log = AuditTable::empty().await;
    log.run(
        "CREATE TABLE audit_log (id bigint, time_started timestamptz, time_completed timestamptz, result_kind text); \
         INSERT INTO audit_log VALUES (NULL, '2019-01-01'), (1, '2019-01-02')",
    )
    .await;
    for spec in [json!({ "batchSize": 1 }), json!({ "limit": 1 })] {
        let start = Instant::now();
        let report = log.sweep(spec).await;
        let error = report.end.unwrap_err();
        assert!(
            error.to_string().contains("no key that can be read") && start.elapsed() < Duration::from_secs(5),
            "{error}"
        );
    }
    // In a batch with others it is left, and they are not.
    let report = log.sweep(json!({})).await;
    assert_eq!((report.timed_out, report.suppressed), (1, 1));
}

#[tokio::test]
async fn a_place_behind_refused_rows_never_holds_a_text_key() {
    let log = AuditTable::empty().await;
    log.run(
        "CREATE TABLE audit_log (id text PRIMARY KEY, time_started timestamptz NOT NULL, time_completed timestamptz, result_kind text); \
         INSERT INTO audit_log SELECT 'alice' || lpad(n::text, 80, '0'), '2020-01-01'::timestamptz + n * interval '1 s' FROM generate_series(1, 20) AS n",
    )
    .await;
    log.before_update("IF right(NEW.id, 2)::int <= 8 THEN RAISE EXCEPTION 'no'; END IF;").await;
    let first = log.sweep(json!({})).await;
    let mut job = log.job(json!({ "limit": 3 }));
    job.resume_after.clone_from(&first.resume_after);
    let second = sweep(&job, &CancellationToken::new()).await;
    assert_eq!((first.refused, second.timed_out), (8, 3));
    for report in [&first, &second] {
        assert_eq!(report.resume_after.as_ref().unwrap().id, None, "{report:?}");
    }
    let mut job = log.job(json!({}));
    job.resume_after = second.resume_after;
    assert_eq!(sweep(&job, &CancellationToken::new()).await.timed_out, 9);
}

#[tokio::test]
async fn neither_a_cast_nor_names_made_up_by_a_trigger_show_a_row() {
    let log = AuditTable::new().await;
    log.start_many(2).await;
    log.before_update(
        "RAISE EXCEPTION 'SECRET' USING ERRCODE = '23514', CONSTRAINT = 'SECRET ' || NEW.request_uri, COLUMN = 'SECRET', TABLE = 'SECRET';",
    )
    .await;
    let report = log.sweep(json!({})).await;
    assert_eq!(report.refused, 2);
    let text = AuditTable::empty().await;
    text.run(
        "CREATE TABLE t (id bigint PRIMARY KEY, started text, time_completed timestamptz, result_kind text); \
         INSERT INTO t VALUES (1, 'SECRET'); \
         CREATE VIEW audit_log AS SELECT id, started::timestamptz AS time_started, time_completed, result_kind FROM t",
    )
    .await;
    let mut shown = vec![format!("{report:?}")];
    for mode in ["Apply", "Observe"] {
        let report = text.sweep(json!({ "mode": mode })).await;
        assert!(report.end.is_err(), "{report:?}");
        shown.push(format!("{report:?}"));
    }
    assert!(!shown.concat().contains("SECRET"), "{shown:?}");
}

#[tokio::test]
async fn a_stop_during_the_count_of_the_backlog_keeps_what_was_done() {
    let log = AuditTable::empty().await;
    log.run(
        "CREATE TABLE t (id bigint PRIMARY KEY, time_started timestamptz, time_completed timestamptz, result_kind text); \
         INSERT INTO t SELECT n, '2020-01-01' FROM generate_series(1, 3) AS n; \
         CREATE FUNCTION slow(x timestamptz) RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN \
           IF current_setting('transaction_read_only') = 'on' THEN PERFORM pg_sleep(20); END IF; RETURN x; END $$; \
         CREATE VIEW audit_log AS SELECT id, slow(time_started) AS time_started, time_completed, result_kind FROM t; \
         CREATE FUNCTION through() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
           UPDATE t SET time_completed = NEW.time_completed, result_kind = NEW.result_kind WHERE id = NEW.id; RETURN NEW; END $$; \
         CREATE TRIGGER through INSTEAD OF UPDATE ON audit_log FOR EACH ROW EXECUTE FUNCTION through()",
    )
    .await;
    // A row is left, so that the count looks at one.
    let job = log.job(json!({ "limit": 2 }));
    let stop = CancellationToken::new();
    let stopping = async {
        eventually("the count to be slow", Duration::from_secs(10), async || {
            let asleep = log
                .query("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'")
                .await;
            if asleep.is_empty() { Err("nobody sleeps".to_owned()) } else { Ok(()) }
        })
        .await;
        stop.cancel();
        Instant::now()
    };
    let (report, stopped) = tokio::join!(sweep(&job, &stop), stopping);
    assert!(stopped.elapsed() < Duration::from_secs(3), "{:?}", stopped.elapsed());
    assert_eq!(
        (report.timed_out, report.outcome(), report.backlog.is_none()),
        (2, Outcome::LimitReached, true),
        "{report:?}"
    );
}

#[tokio::test]
async fn a_sweep_gives_way_to_others_who_write_for_a_while_and_leaves_nothing_undone() {
    let log = AuditTable::new().await;
    log.start_many(24_000).await;
    let (done, written) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
    let others: Vec<_> = (0..2)
        .map(|_| {
            let (uri, done, written) = (log.uri(), done.clone(), written.clone());
            tokio::spawn(async move {
                let (client, connection) = tokio_postgres::connect(&uri, NoTls).await.unwrap();
                let connection = tokio::spawn(connection);
                while !done.is_cancelled() {
                    client.batch_execute("SELECT pg_catalog.pg_current_xact_id()").await.unwrap();
                    written.fetch_add(1, Ordering::SeqCst);
                }
                drop(client);
                connection.await.unwrap().unwrap();
            })
        })
        .collect();
    eventually("the others to write", Duration::from_secs(30), || async {
        let written = written.load(Ordering::SeqCst);
        if written > 100 { Ok(()) } else { Err(format!("{written} transactions")) }
    })
    .await;
    let whole = log.sweep(json!({ "limit": 2000, "batchSize": 200 })).await;
    let mut job = log.job(json!({ "limit": 2000, "batchSize": 200 }));
    // Somebody waits until it is over.
    let waiting = Arc::new(AtomicUsize::new(1));
    job.peers = Peers::new(Arc::default(), waiting, Arc::default());
    let waited_for = sweep(&job, &CancellationToken::new()).await;
    // At full speed again after twice its yield budget.
    let mut job = log.job(json!({ "limit": 20_000, "batchSize": 200 }));
    job.plan.yield_budget = Duration::from_secs(1);
    let short = sweep(&job, &CancellationToken::new()).await;
    done.cancel();
    for other in others {
        other.await.unwrap();
    }
    for (report, rows) in [(&whole, 2000), (&waited_for, 2000), (&short, 20_000)] {
        assert_eq!(report.timed_out, rows, "{report:?}");
    }
    assert_eq!(log.timed_out().await, (1..=24_000).collect::<Vec<_>>());
    // All but the first two batches, unless a busy machine keeps the others from writing between two of them.
    assert!(whole.small_batches > 20, "{whole:?}");
    assert_eq!((waited_for.small_batches, waited_for.batches), (0, 10), "{waited_for:?}");
    // A batch takes 50 ms where the processors are shared with eight more tests.
    assert!(short.small_batches > 2 && short.batches - short.small_batches > 10, "{short:?}");
}
