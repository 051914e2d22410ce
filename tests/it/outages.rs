//! Faults of the database under the controller: what is swept, what is said, and that it ends by itself.

use audit_log_sweeper::schedule::Grid;
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use std::time::Duration;
use support::postgres::{PostgresOptions, PostgresServer, Shutdown};

use crate::fixtures::operator::has;
use crate::fixtures::tcp_fault_proxy::Course;
use crate::fixtures::{AuditTable, Operator, TcpFaultProxy};

#[tokio::test]
async fn a_server_that_is_away_for_three_periods_is_swept_again_on_the_grid() {
    let mut server = PostgresServer::start(PostgresOptions::default()).await.unwrap();
    let (log, operator) = (AuditTable::on(&server).await, Operator::new().await);
    log.start_many(2).await;
    operator.secret_for(&log).await;
    let object = operator.apply("app", json!({ "period": "5s", "limit": 1 })).await;
    operator.until("app", "the first sweep", |s| s["totals"]["sweeps"] == json!(1)).await;
    server.stop(Shutdown::Immediate).unwrap();
    let status = operator.until("app", "three failures", |s| s["consecutiveFailures"].as_i64() >= Some(3)).await;
    assert!(has(&status, "Ready=False/DatabaseUnreachable") && has(&status, "Reconciling=True/Retrying"), "{status:#}");
    server.start_again().await.unwrap();
    let status = operator.until("app", "the recovery", |s| has(s, "Ready=True/Swept")).await;
    assert_eq!((&status["consecutiveFailures"], &status["backlog"]["display"]), (&json!(0), &json!("0")));
    let database = server.connect(&log.database.name).await.unwrap();
    let rows =
        database.query("SELECT right(id::text, 12)::int FROM audit_log WHERE result_kind = 'timeout' ORDER BY id", &[]);
    let rows: Vec<i32> = rows.await.unwrap().iter().map(|row| row.get(0)).collect();
    assert_eq!(rows, [1, 2]);
    // Nothing that was missed is made up for, and the grid is where it was.
    let next: DateTime<Utc> = status["nextScheduleTime"].as_str().unwrap().parse().unwrap();
    let grid = Grid::new(object.metadata.uid.as_deref().unwrap(), Duration::from_secs(5));
    assert_eq!(grid.latest(next), next);
}

#[tokio::test]
async fn a_secret_rotated_during_a_sweep_fails_neither_it_nor_the_next() {
    let (log, operator) = (AuditTable::slow(40).await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "5s", "batchSize": 1, "limit": 40 })).await;
    log.until_swept(2).await;
    let rotated = support::random_hex();
    log.run(&format!("ALTER ROLE {} PASSWORD '{rotated}'", log.database.user)).await;
    operator.secret("db", &[("uri", &log.database.uri().replace(&log.database.password, &rotated))]).await;
    let status = operator.until("app", "the next sweep", |s| s["totals"]["sweeps"].as_i64() >= Some(2)).await;
    assert_eq!((log.timed_out().await, log.trail().await.len()), ((1..=40).collect(), 1));
    assert_eq!((&status["totals"]["failures"], &status["totals"]["timedOut"]), (&json!(0), &json!(40)));
    assert!(!operator.log().contains(&rotated));
}

/// A second server with the same database, and a table of its own.
async fn twin(log: &AuditTable, server: &PostgresServer) -> AuditTable {
    let other = AuditTable::on(server).await;
    let (mine, theirs) = (&log.database, &other.database);
    let admin = server.connect("postgres").await.unwrap();
    let sql = format!("CREATE ROLE {} LOGIN PASSWORD '{}' IN ROLE {} INHERIT", mine.user, mine.password, theirs.user);
    admin.batch_execute(&sql).await.unwrap();
    drop(other.client);
    admin
        .batch_execute(&format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}'",
            theirs.name
        ))
        .await
        .unwrap();
    admin.batch_execute(&format!("ALTER DATABASE {} RENAME TO {}", theirs.name, mine.name)).await.unwrap();
    let mut database = other.database;
    database.name.clone_from(&mine.name);
    let client = database.client().await.unwrap();
    AuditTable { database, client, pooler: None }
}

#[tokio::test]
async fn a_failover_behind_one_name_is_followed() {
    let (old, new) = (AuditTable::slow(1000).await, PostgresServer::start(PostgresOptions::default()).await.unwrap());
    let new = twin(&old, &new).await.and_keep(new);
    new.log.start_many(3).await;
    let relay = TcpFaultProxy::new(old.database.port).await;
    let operator = Operator::new().await;
    let uri = old.database.uri().replace(&format!(":{}/", old.database.port), &format!(":{}/", relay.address.port()));
    operator.secret("db", &[("uri", &uri)]).await;
    operator.apply("app", json!({ "period": "5s", "batchSize": 1, "limit": 1000 })).await;
    old.until_swept(2).await;
    relay.set(Course::To(new.log.database.port));
    let status = operator.until("app", "the failure", |s| s["totals"]["failures"] == json!(1)).await;
    // What the old primary had committed is counted.
    let done = old.timed_out().await;
    assert_eq!(status["totals"]["timedOut"], json!(done.len()), "{status:#}");
    operator.until("app", "the sweep of the new primary", |s| has(s, "Ready=True/Swept")).await;
    assert_eq!((new.log.timed_out().await, old.timed_out().await), (vec![1, 2, 3], done));
}

#[tokio::test]
async fn of_two_hosts_the_one_that_takes_writes_is_swept() {
    let (old, new) = (AuditTable::new().await, PostgresServer::start(PostgresOptions::default()).await.unwrap());
    let new = twin(&old, &new).await.and_keep(new);
    old.start_many(1).await;
    new.log.start_many(3).await;
    let operator = Operator::new().await;
    let at = |log: &AuditTable| format!("127.0.0.1:{}", log.database.port);
    let both = format!("{},{}", at(&old), at(&new.log));
    let uri = format!("{}?target_session_attrs=read-write", old.database.uri().replace(&at(&old), &both));
    operator.secret("db", &[("uri", &uri)]).await;
    operator.apply("app", json!({ "period": "5s" })).await;
    operator.until("app", "the first sweep", |s| s["totals"]["sweeps"] == json!(1)).await;
    assert_eq!((old.timed_out().await, new.log.timed_out().await), (vec![1], vec![]));
    old.run(&format!("ALTER DATABASE {} SET default_transaction_read_only = on", old.database.name)).await;
    new.log.until_swept(3).await;
    // Sessions that were open before may still write.
    old.start(2, "2 h").await;
    let before = json!(operator.api().get("app").await.unwrap().status)["totals"]["sweeps"].as_i64().unwrap();
    let later = move |s: &Value| s["totals"]["sweeps"].as_i64() >= Some(before + 2);
    let status = operator.until("app", "two more sweeps", later).await;
    assert_eq!((old.open().await, new.log.timed_out().await), (vec![2], vec![1, 2, 3]));
    assert_eq!(status["totals"]["failures"], json!(0), "{status:#}");
}

/// A log on a server that lives as long as it.
struct Kept {
    log: AuditTable,
    _server: PostgresServer,
}

impl AuditTable {
    fn and_keep(self, server: PostgresServer) -> Kept {
        Kept { log: self, _server: server }
    }
}
