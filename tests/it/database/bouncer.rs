//! The sweep through PgBouncer in transaction mode: nothing leaks to its other clients, and a cancel drops none of them.

use std::time::Duration;

use audit_log_sweeper::api::status::Outcome;
use audit_log_sweeper::sweep::sweep;
use serde_json::json;
use support::bouncer::Bouncer;
use support::wait::eventually;
use tokio_util::sync::CancellationToken;

use crate::fixtures::{AuditTable, id};

#[tokio::test]
#[ignore = "needs PgBouncer (Debian and Ubuntu: apt-get install pgbouncer)"]
async fn sweeps_and_leaves_no_setting_behind() {
    let log = AuditTable::new().await;
    log.start_many(25).await;
    let bouncer = Bouncer::start(&log.database, 1).await.unwrap();
    let report = sweep(&log.job_at(&bouncer.uri(), json!({ "batchSize": 10 })), &CancellationToken::new()).await;
    assert_eq!((report.timed_out, report.outcome()), (25, Outcome::Drained), "{report:?}");
    // One server connection serves all clients, so the next one sees what the sweep left.
    let client = bouncer.client().await.unwrap();
    for (setting, expected) in
        [("statement_timeout", "0"), ("enable_seqscan", "on"), ("jit", "on"), ("row_security", "on")]
    {
        let shown: String = client
            .simple_query(&format!("SHOW {setting}"))
            .await
            .unwrap()
            .iter()
            .find_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                _ => None,
            })
            .unwrap();
        assert_eq!(shown, expected, "{setting}");
    }
}

#[tokio::test]
#[ignore = "needs PgBouncer (Debian and Ubuntu: apt-get install pgbouncer)"]
async fn a_stop_cancels_through_it_and_other_clients_notice_nothing() {
    let log = AuditTable::new().await;
    log.start_many(3).await;
    log.before_update(&format!("IF NEW.id = '{}' THEN PERFORM pg_sleep(30); END IF;", id(2))).await;
    let bouncer = Bouncer::start(&log.database, 1).await.unwrap();
    let others = futures::future::try_join_all((0..5).map(|_| bouncer.client())).await.unwrap();
    for round in 0..5 {
        let stop = CancellationToken::new();
        let job = log.job_at(&bouncer.uri(), json!({ "batchSize": 2 }));
        let stopping = async {
            eventually("the batch to hang", Duration::from_secs(10), async || {
                let asleep = log.query("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'").await;
                if asleep.is_empty() { Err("nobody sleeps".to_owned()) } else { Ok(()) }
            })
            .await;
            stop.cancel();
        };
        let (report, ()) = tokio::join!(sweep(&job, &stop), stopping);
        assert_eq!((report.timed_out, report.outcome()), (0, Outcome::Stopped), "round {round}: {report:?}");
        eventually("the statement to end on the server", Duration::from_secs(2), async || {
            let active = log.query("SELECT query FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle' AND pid <> pg_backend_pid()").await;
            if active.is_empty() { Ok(()) } else { Err(format!("{active:?}")) }
        })
        .await;
        for client in &others {
            client.simple_query("SELECT 1").await.unwrap();
        }
    }
}
