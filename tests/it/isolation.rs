//! Servers that are slow or do not answer keep no other server's objects waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::time::Duration;

use audit_log_sweeper::schedule::Grid;
use chrono::{DateTime, TimeDelta, Utc};
use futures::{StreamExt, stream};
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::{Value, json};
use support::json::merged;
use support::postgres;
use support::wait::eventually;
use tokio::net::TcpListener;

use crate::fixtures::operator::has;
use crate::fixtures::{AuditTable, Operator, TcpFaultProxy, id};

fn at(status: &Value, field: &str) -> DateTime<Utc> {
    status[field].as_str().unwrap_or_else(|| panic!("no {field} in {status:#}")).parse().unwrap()
}

fn spec(secret: &str, rest: Value) -> Value {
    merged(
        json!({ "period": "5s", "database": { "secretRef": { "name": secret }, "tls": { "mode": "Disable" } } }),
        &rest,
    )
}

#[tokio::test]
async fn the_healthy_are_on_time_beside_the_slow_and_the_silent() {
    let (healthy, slow) = (AuditTable::new().await, AuditTable::new().await);
    healthy.start_many(20).await;
    slow.start_many(5000).await;
    slow.before_update("PERFORM pg_sleep(0.2);").await;
    let mut operator = Operator::absent().await;
    operator.secret_for(&healthy).await;
    // Another port is another server.
    let relay = TcpFaultProxy::new(postgres::shared().port()).await;
    let by_relay =
        slow.database.uri().replace(&format!(":{}/", slow.database.port), &format!(":{}/", relay.address.port()));
    operator.secret("slow", &[("uri", &by_relay)]).await;
    // Connections are made, and nobody ever answers: more servers than there are sweeps at once.
    let mut silent = vec![];
    for number in 0..20 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("postgresql://u:p@{}/d", listener.local_addr().unwrap());
        operator.secret(&format!("silent-{number}"), &[("uri", &uri)]).await;
        silent.push(listener);
    }
    operator.start_with(&["--max-concurrent-sweeps=4", "--max-sweeps-per-server=2"]).await;
    for number in 0..20 {
        operator.apply(&format!("silent-{number}"), spec(&format!("silent-{number}"), json!({}))).await;
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
            assert!(Utc::now() - at(&status, "lastSuccessfulTime") < TimeDelta::seconds(8), "{status:#}");
            let late = at(&status, "lastAttemptTime") - at(&status, "lastScheduleTime");
            assert!(late <= TimeDelta::seconds(2), "{late}: {status:#}");
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
    let log = AuditTable::slow(60).await;
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

/// How many objects have a table of their own that is as it should be, and of each kind that cannot work.
const CROWD: (u32, u32) = (220, 3);

/// How often each is swept, and how many seconds late a healthy one may be: an unoptimized build on two cores is busy then.
const PERIOD: &str = "20s";
const LATE: i64 = 10;

/// What is wrong with the others: the spec, and what the status says of it.
fn broken() -> Vec<(&'static str, Value, &'static str)> {
    let database = |secret: &str| json!({ "database": { "secretRef": { "name": secret, "key": "uri" }, "tls": { "mode": "Disable" } } });
    let key = json!({ "database": { "secretRef": { "name": "db", "key": "dsn" }, "tls": { "mode": "Disable" } } });
    vec![
        ("no-secret", database("absent"), "SecretNotFound"),
        ("no-key", key, "SecretKeyMissing"),
        ("bad-uri", database("bad-uri"), "InvalidConnectionURI"),
        ("bad-password", database("bad-password"), "AuthenticationFailed"),
        ("no-database", database("no-database"), "DatabaseNotFound"),
        ("no-port", database("no-port"), "DatabaseUnreachable"),
        ("no-table", json!({ "table": "absent" }), "TableNotFound"),
        ("no-column", json!({ "columns": { "timeStarted": "absent" } }), "ColumnNotFound"),
        ("bad-value", json!({ "complete": [{ "column": "result_kind", "value": "absent" }] }), "SchemaMismatch"),
        ("no-right", json!({ "table": "forbidden" }), "PermissionDenied"),
    ]
}

/// A log with a table for each that works, with two stale rows and one fresh one, and one that is another's.
async fn crowded() -> AuditTable {
    let log = AuditTable::new().await;
    log.run(&format!(
        "DO $$ BEGIN FOR n IN 1..{} LOOP \
           EXECUTE format('CREATE TABLE t_%s (LIKE audit_log INCLUDING ALL)', n); \
           EXECUTE format($i$INSERT INTO t_%s (id, time_started, request_id, request_uri, operation_id, source_ip, actor_kind) \
             SELECT ('00000000-0000-0000-0000-' || lpad((%s * 10 + i)::text, 12, '0'))::uuid, now() - age::interval, \
               'r', '/v1', 'op', '::1', 'unauthenticated' FROM (VALUES (1, '5 h'), (2, '4 h'), (3, '1 m')) AS v (i, age)$i$, n, n); \
         END LOOP; END $$",
        CROWD.0
    ))
    .await;
    let superuser = postgres::shared().connect(&log.database.name).await.unwrap();
    superuser.batch_execute("CREATE TABLE forbidden (LIKE audit_log INCLUDING ALL)").await.unwrap();
    log
}

#[tokio::test]
async fn hundreds_are_on_time_beside_those_that_are_broken_in_ten_ways() {
    let (log, mut operator) = (crowded().await, Operator::absent().await);
    operator.secret_for(&log).await;
    let (uri, mine) = (log.database.uri(), &log.database);
    let (password, port) = (format!("{}x", mine.password), mine.port);
    operator.secret("bad-uri", &[("uri", "127.0.0.1")]).await;
    operator.secret("bad-password", &[("uri", &uri.replace(&mine.password, &password))]).await;
    operator.secret("no-database", &[("uri", &format!("{uri}_absent"))]).await;
    operator.secret("no-port", &[("uri", &uri.replace(&format!(":{port}/"), ":1/"))]).await;
    operator.start_with(&[]).await;

    let often = |spec: Value| merged(json!({ "period": PERIOD }), &spec);
    let mut specs: Vec<(String, Value)> = vec![];
    for number in 0..CROWD.1 {
        specs.extend(broken().into_iter().map(|(name, spec, _)| (format!("{name}-{number}"), often(spec))));
    }
    for number in 1..=CROWD.0 {
        specs.push((format!("healthy-{number}"), often(json!({ "table": format!("t_{number}") }))));
    }
    let applied = specs.iter().map(|(name, spec)| operator.apply(name, spec.clone()));
    drop(stream::iter(applied).buffer_unordered(8).collect::<Vec<_>>().await);

    // How late each healthy object was in the slots that came once all had been swept: new ones have to queue.
    let (mut swept, mut settled) = (BTreeSet::new(), DateTime::<Utc>::MAX_UTC);
    let mut late: BTreeMap<String, Vec<(i64, Value)>> = BTreeMap::new();
    let watch = async {
        let mut seen = pin!(watcher(operator.api(), watcher::Config::default()).default_backoff().applied_objects());
        while late.len() < CROWD.0 as usize {
            let object = seen.next().await.unwrap().unwrap();
            let (name, uid) = (object.metadata.name.clone().unwrap(), object.metadata.uid.clone().unwrap());
            let status = json!(object.status);
            if !name.starts_with("healthy-") || status["lastSweep"] == Value::Null {
                continue;
            }
            if swept.insert(name.clone()) && swept.len() == CROWD.0 as usize {
                settled = Utc::now();
            }
            let (slot, start) = (at(&status, "lastScheduleTime"), at(&status, "lastAttemptTime"));
            if slot > settled {
                assert_eq!(
                    Grid::new(&uid, PERIOD.parse::<audit_log_sweeper::api::Duration>().unwrap().as_std()).latest(slot),
                    slot,
                    "{name}: {status:#}"
                );
                late.entry(name).or_default().push(((start - slot).num_seconds(), status));
            }
        }
    };
    let within = tokio::time::timeout(Duration::from_secs(240), watch).await;
    assert!(within.is_ok(), "{} were swept, and then in a slot only {}: {:?}", swept.len(), late.len(), late.keys());
    let mut all: Vec<_> = late.values().flatten().map(|(seconds, _)| *seconds).collect();
    all.sort_unstable();
    let (median, most) = (all[all.len() / 2], all[all.len() - 1]);
    println!(
        "{} sweeps in slots, in seconds late: median {median}, 99% {}, most {most}",
        all.len(),
        all[all.len() * 99 / 100]
    );
    late.retain(|_, seen| seen.iter().any(|(seconds, _)| *seconds > LATE));
    assert!(late.is_empty(), "{late:#?}\n{}", operator.log());

    for number in 1..=CROWD.0 {
        let done = format!("SELECT id FROM t_{number} WHERE result_kind = 'timeout' ORDER BY id");
        assert_eq!(log.query(&done).await, [id(number * 10 + 1), id(number * 10 + 2)], "t_{number}");
    }
    for object in operator.api().list(&Default::default()).await.unwrap() {
        let (name, status) = (object.metadata.name.unwrap(), json!(object.status));
        let kind = broken().into_iter().find(|(kind, ..)| name.starts_with(kind));
        let Some((_, _, reason)) = kind else {
            assert!(has(&status, "Ready=True/Swept"), "{name}: {status:#}");
            assert_eq!(
                (&status["totals"]["failures"], &status["totals"]["timedOut"]),
                (&json!(0), &json!(2)),
                "{name}"
            );
            continue;
        };
        assert!(has(&status, &format!("Ready=False/{reason}")), "{name}: {status:#}");
        assert_eq!(status["totals"]["timedOut"].as_i64().unwrap_or(0), 0, "{name}: {status:#}");
    }
}
