//! Servers that are slow or do not answer keep no other server's objects waiting.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use support::postgres;
use support::wait::eventually;
use tokio::net::TcpListener;

use crate::fixtures::operator::has;
use crate::fixtures::{Log, Operator, Relay};

fn at(status: &Value, field: &str) -> DateTime<Utc> {
    status[field].as_str().unwrap_or_else(|| panic!("no {field} in {status:#}")).parse().unwrap()
}

fn spec(secret: &str, rest: Value) -> Value {
    let mut spec =
        json!({ "period": "5s", "database": { "secretRef": { "name": secret }, "tls": { "mode": "Disable" } } });
    spec.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
    spec
}

#[tokio::test]
async fn the_healthy_are_on_time_beside_the_slow_and_the_silent() {
    let (healthy, slow) = (Log::new().await, Log::new().await);
    healthy.start_many(20).await;
    slow.start_many(5000).await;
    slow.before_update("PERFORM pg_sleep(0.2);").await;
    let mut operator = Operator::absent().await;
    operator.secret_for(&healthy).await;
    // Another port is another server.
    let relay = Relay::new(postgres::shared().port()).await;
    let by_relay =
        slow.database.uri().replace(&format!(":{}/", slow.database.port), &format!(":{}/", relay.address.port()));
    operator.secret("slow", &[("uri", &by_relay)]).await;
    // Connections are made, and nobody ever answers: more servers than there are sweeps at once.
    let mut silent = vec![];
    for number in 0..10 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("postgresql://u:p@{}/d", listener.local_addr().unwrap());
        operator.secret(&format!("silent-{number}"), &[("uri", &uri)]).await;
        silent.push(listener);
    }
    operator.start_with(&["--max-concurrent-sweeps=4", "--max-sweeps-per-server=2"]).await;
    for number in 0..20 {
        operator.apply(&format!("silent-{number}"), spec(&format!("silent-{}", number % 10), json!({}))).await;
        operator.apply(&format!("slow-{number}"), spec("slow", json!({ "batchSize": 1 }))).await;
    }
    let most = std::sync::atomic::AtomicUsize::new(0);
    let watch = async {
        loop {
            let sessions = slow.sweeping_sessions().await.len();
            most.fetch_max(sessions, std::sync::atomic::Ordering::SeqCst);
            assert!(sessions <= 2, "{sessions} sweeps at once on one server");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let check = async {
        eventually("both slow sweeps to run", Duration::from_secs(20), async || {
            let most = most.load(std::sync::atomic::Ordering::SeqCst);
            if most == 2 { Ok(()) } else { Err(most.to_string()) }
        })
        .await;
        for number in 0..20 {
            operator.apply(&format!("healthy-{number}"), spec("db", json!({}))).await;
        }
        for number in 0..20 {
            let name = format!("healthy-{number}");
            operator.until(&name, "three sweeps", |s| s["totals"]["sweeps"].as_i64() >= Some(3)).await;
        }
        // Three slots later none was left out, and each sweep began in its slot.
        for number in 0..20 {
            let status = json!(operator.api().get(&format!("healthy-{number}")).await.unwrap().status);
            assert!(has(&status, "Ready=True/Swept"), "{status:#}");
            assert!(Utc::now() - at(&status, "lastSuccessfulTime") < chrono::TimeDelta::seconds(8), "{status:#}");
            let late = at(&status, "lastAttemptTime") - at(&status, "lastScheduleTime");
            assert!(late <= chrono::TimeDelta::seconds(2), "{late}: {status:#}");
        }
    };
    tokio::select! {
        () = check => {}
        () = watch => {}
    }
    assert_eq!(healthy.timed_out().await, (1..=20).collect::<Vec<_>>());
    let status = operator.until("silent-0", "the failure", |s| has(s, "Ready=False/LoginTimeout")).await;
    assert!(status["lastError"]["message"].as_str().unwrap().contains("did not let us log in within"), "{status:#}");
}

#[tokio::test]
async fn a_sweep_that_waits_for_its_server_heeds_an_edit() {
    let log = Log::slow(60).await;
    let mut operator = Operator::absent().await;
    operator.secret_for(&log).await;
    operator.start_with(&["--max-sweeps-per-server=1"]).await;
    operator.apply("first", json!({ "batchSize": 1, "limit": 40, "period": "1h" })).await;
    log.until_swept(1).await;
    operator.apply("queued", json!({ "period": "1h" })).await;
    operator.until("queued", "the acknowledgement", |s| has(s, "Reconciling=True/Pending")).await;
    operator.apply("queued", json!({ "period": "1h", "suspend": true })).await;
    operator.until("first", "the sweep before it", |s| s["lastSweep"] != Value::Null).await;
    operator.until("queued", "the acknowledgement", |s| has(s, "Suspended=True/Suspended")).await;
    assert_eq!((log.timed_out().await, log.trail().await.len()), ((1..=40).collect(), 1));
}
