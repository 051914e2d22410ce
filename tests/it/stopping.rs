//! SIGTERM while something that the operator needs is away, slow or silent: what was committed is counted or named, and
//! the lease is given back.

use std::path::Path;
use std::time::{Duration, Instant};

use k8s_openapi::api::events::v1::Event;
use kube::Api;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::process::Process;
use support::wait::eventually;

use crate::fixtures::operator::{WAIT_TIMEOUT, has, port, replica, until_says};
use crate::fixtures::tcp_fault_proxy::Course;
use crate::fixtures::{AuditTable, HttpFaultProxy, Operator, TcpFaultProxy};

fn start(operator: &Operator, kubeconfig: &Path, args: &[&str]) -> Process {
    replica("a", kubeconfig, &operator.scratch, &operator.namespace, args)
}

/// How a process ended that was told to.
struct End {
    took: Duration,
    code: i32,
    log: String,
}

impl End {
    /// Sends SIGTERM and waits.
    async fn of(process: Process) -> Self {
        process.signal(Signal::SIGTERM).unwrap();
        Self::after_signal(process).await
    }

    /// Waits for one that was sent it just now.
    async fn after_signal(mut process: Process) -> Self {
        let start = Instant::now();
        let code = loop {
            if let Some(code) = process.exit_code() {
                break code;
            }
            assert!(start.elapsed() < WAIT_TIMEOUT, "{}", process.log_tail(30));
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        Self { took: start.elapsed(), code, log: process.log_tail(usize::MAX) }
    }

    /// Fails unless it ended well and in time.
    fn assert_handed_over_within(&self, most: Duration) {
        assert!(self.code == 0 && self.took < most, "exit {}, {:?}: {}", self.code, self.took, self.log);
        assert!(
            self.log.contains(r#""message":"given back""#) && !self.log.contains("the operator ends"),
            "{}",
            self.log
        );
    }

    /// The operator's own lines of a level.
    fn lines(&self, level: &str) -> Vec<Value> {
        let lines = self.log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let ours = |line: &Value| line["target"].as_str().unwrap_or_default().starts_with("audit_log_sweeper");
        lines.filter(|line| ours(line) && line["level"] == json!(level)).collect()
    }
}

async fn status(operator: &Operator, name: &str) -> Value {
    json!(operator.api().get(name).await.unwrap().status)
}

/// The URI of a log by way of a relay.
fn by(relay: &TcpFaultProxy, log: &AuditTable) -> String {
    log.database.uri().replace(&format!(":{}/", log.database.port), &format!(":{}/", relay.address.port()))
}

#[tokio::test]
async fn counts_that_could_not_be_published_are_published_at_the_end() {
    let (log, operator) = (AuditTable::held(2, 12).await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 2, "period": "1h" })).await;
    let relay = TcpFaultProxy::new(port(operator.plane)).await;
    let a = start(&operator, &operator.kubeconfig(Some(&relay)).await, &[]);
    log.until_swept(2).await;
    relay.set(Course::Closed);
    log.release().await;
    until_says(&a, "trying this object again").await;
    relay.set(Course::To(port(operator.plane)));
    // It would try again by itself a second after it failed.
    let end = End::of(a).await;
    end.assert_handed_over_within(Duration::from_secs(4));
    let status = status(&operator, "app").await;
    assert_eq!((log.timed_out().await.len(), &status["totals"]["timedOut"]), (12, &json!(12)), "{status:#}");
    assert_eq!(status["totals"]["sweeps"], json!(1), "{status:#}");
}

#[tokio::test]
async fn an_api_server_that_comes_back_after_the_signal_hears_of_all_that_was_swept() {
    let (log, operator) = (AuditTable::slow(200).await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 2, "period": "1h" })).await;
    let relay = TcpFaultProxy::new(port(operator.plane)).await;
    let a = start(&operator, &operator.kubeconfig(Some(&relay)).await, &[]);
    log.until_swept(4).await;
    relay.set(Course::Closed);
    a.signal(Signal::SIGTERM).unwrap();
    let away = async {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        relay.set(Course::To(port(operator.plane)));
    };
    let (end, ()) = tokio::join!(End::after_signal(a), away);
    end.assert_handed_over_within(Duration::from_secs(5));
    let (done, status) = (log.timed_out().await.len(), status(&operator, "app").await);
    assert_eq!(status["totals"], json!({ "sweeps": 1, "failures": 0, "timedOut": done }), "{status:#}");
}

#[tokio::test]
async fn rows_that_cannot_be_counted_are_named_and_make_the_end_a_failure() {
    let (log, operator) = (AuditTable::slow(200).await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 2, "period": "1h" })).await;
    let relay = TcpFaultProxy::new(port(operator.plane)).await;
    let a = start(&operator, &operator.kubeconfig(Some(&relay)).await, &[]);
    log.until_swept(4).await;
    relay.set(Course::Closed);
    let end = End::of(a).await;
    assert!(end.code == 1 && end.took > Duration::from_secs(4) && end.took < Duration::from_secs(6), "{:?}", end.took);
    let errors = end.lines("ERROR");
    assert_eq!(errors.len(), 2, "{errors:#?}");
    let done = log.timed_out().await.len();
    assert_eq!(
        (&errors[0]["namespace"], &errors[0]["name"], &errors[0]["rows"], &errors[0]["uncertain"]),
        (&json!(operator.namespace), &json!("app"), &json!(done), &json!(0)),
        "{errors:#?}"
    );
    let said = errors[1]["error"].as_str().unwrap();
    assert_eq!(said, "rows of 1 object are swept and not counted in the status; the log names them");
}

#[tokio::test]
async fn a_silent_database_holds_neither_the_counts_nor_the_lease_back() {
    let (log, operator) = (AuditTable::slow(200).await, Operator::absent().await);
    let relay = TcpFaultProxy::new(log.database.port).await;
    operator.secret("db", &[("uri", &by(&relay, &log))]).await;
    operator.apply("app", json!({ "batchSize": 2, "period": "1h" })).await;
    let a = start(&operator, &operator.kubeconfig(None).await, &[]);
    log.until_swept(4).await;
    relay.set(Course::Deaf);
    let end = End::of(a).await;
    end.assert_handed_over_within(Duration::from_secs(5));
    let (done, status) = (log.timed_out().await.len(), status(&operator, "app").await);
    let counted = usize::try_from(status["totals"]["timedOut"].as_i64().unwrap()).unwrap();
    let uncertain = usize::try_from(status["lastSweep"]["uncertain"].as_i64().unwrap()).unwrap();
    assert!(counted >= 4 && counted <= done && done <= counted + uncertain, "{done}: {status:#}");
    assert_eq!(status["lastSweep"]["outcome"], json!(if uncertain == 0 { "Stopped" } else { "Failed" }), "{status:#}");
    // What there is to tell is told all the same.
    let events: Api<Event> = Api::namespaced(operator.client.clone(), &operator.namespace);
    let events = events.list(&Default::default()).await.unwrap();
    assert!(events.items.iter().any(|event| event.reason.as_deref() == Some("RowsTimedOut")), "{events:#?}");
}

#[tokio::test]
async fn a_preflight_of_a_silent_database_ends_with_the_signal() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    let relay = TcpFaultProxy::new(log.database.port).await;
    operator.secret("db", &[("uri", &by(&relay, &log))]).await;
    operator.apply("app", json!({ "period": "1h" })).await;
    let a = start(&operator, &operator.kubeconfig(None).await, &[]);
    operator.until("app", "its sweep", |s| has(s, "Ready=True/Swept")).await;
    relay.set(Course::Deaf);
    let before = relay.accepted();
    operator.apply("app", json!({ "period": "2h" })).await;
    eventually(
        "the preflight",
        WAIT_TIMEOUT,
        async || if relay.accepted() > before { Ok(()) } else { Err(a.log_tail(20)) },
    )
    .await;
    End::of(a).await.assert_handed_over_within(Duration::from_secs(4));
    assert_eq!(status(&operator, "app").await["consecutiveFailures"], json!(0));
}

#[tokio::test]
async fn a_silent_api_server_is_waited_for_only_for_counts() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "5s" })).await;
    let gateway = HttpFaultProxy::new(&operator.kubeconfig(None).await, &operator.scratch).await;
    let a = start(&operator, &gateway.kubeconfig, &[]);
    operator.until("app", "its sweep", |s| has(s, "Ready=True/Swept")).await;
    gateway.delay(Duration::from_secs(60));
    let get = "/auditlogsweepers/app";
    let before = gateway.passed(get);
    eventually("a look at the object", WAIT_TIMEOUT, async || {
        if gateway.passed(get) > before { Ok(()) } else { Err(a.log_tail(20)) }
    })
    .await;
    let end = End::of(a).await;
    assert!(end.code == 0 && end.took < Duration::from_secs(3), "exit {}, {:?}: {}", end.code, end.took, end.log);
    assert!(end.lines("ERROR").is_empty() && end.log.contains("given back"), "{}", end.log);
}

#[tokio::test]
async fn with_a_slow_api_server_the_counts_are_published_and_the_lease_is_given_back() {
    let (log, operator) = (AuditTable::slow(200).await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 2, "period": "1h" })).await;
    let gateway = HttpFaultProxy::new(&operator.kubeconfig(None).await, &operator.scratch).await;
    let a = start(&operator, &gateway.kubeconfig, &[]);
    log.until_swept(4).await;
    gateway.delay(Duration::from_secs(2));
    let end = End::of(a).await;
    end.assert_handed_over_within(Duration::from_millis(5500));
    let (done, status) = (log.timed_out().await.len(), status(&operator, "app").await);
    assert_eq!(status["totals"], json!({ "sweeps": 1, "failures": 0, "timedOut": done }), "{status:#}");
}

#[tokio::test]
async fn preflights_are_as_many_at_once_on_a_server_as_sweeps_may_be() {
    let (log, mut operator) = (AuditTable::new().await, Operator::absent().await);
    let relay = TcpFaultProxy::new(log.database.port).await;
    operator.secret("db", &[("uri", &by(&relay, &log))]).await;
    operator.start().await;
    let names: Vec<_> = (0..20).map(|number| format!("app-{number}")).collect();
    for name in &names {
        operator.apply(name, json!({ "period": "1h" })).await;
    }
    for name in &names {
        operator.until(name, "its sweep", |s| has(s, "Ready=True/Swept")).await;
    }
    // Nobody is let in any more, so that those at once are all that ever come.
    relay.set(Course::Deaf);
    let before = relay.accepted();
    for name in &names {
        operator.apply(name, json!({ "period": "2h" })).await;
    }
    eventually("three preflights", WAIT_TIMEOUT, async || match relay.accepted() - before {
        0..3 => Err(operator.log()),
        _ => Ok(()),
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(relay.accepted() - before, 3);
    // Those that wait go on, one after the other.
    relay.set(Course::To(log.database.port));
    for name in &names {
        operator.until(name, "its preflight", |s| has(s, "Ready=True/SchemaReady")).await;
    }
}

#[tokio::test]
async fn preflights_are_as_many_at_once_in_the_process_as_sweeps_may_be() {
    let (log, mut operator) = (AuditTable::new().await, Operator::absent().await);
    let relays = [TcpFaultProxy::new(log.database.port).await, TcpFaultProxy::new(log.database.port).await];
    for (relay, secret) in relays.iter().zip(["first", "second"]) {
        operator.secret(secret, &[("uri", &by(relay, &log))]).await;
    }
    operator.start_with(&["--max-concurrent-sweeps=1"]).await;
    let spec = |secret: &str, period: &str| json!({ "period": period, "database": { "secretRef": { "name": secret }, "tls": { "mode": "Disable" } } });
    for secret in ["first", "second"] {
        operator.apply(secret, spec(secret, "1h")).await;
        operator.until(secret, "its sweep", |s| has(s, "Ready=True/Swept")).await;
    }
    // Planning a statement for the table waits for it.
    let mut other = log.database.client().await.unwrap();
    let locked = other.transaction().await.unwrap();
    locked.batch_execute("LOCK TABLE audit_log").await.unwrap();
    for secret in ["first", "second"] {
        operator.apply(secret, spec(secret, "2h")).await;
    }
    let waiting = "SELECT count(*) FILTER (WHERE wait_event_type = 'Lock'), count(*) FROM pg_stat_activity \
                   WHERE datname = current_database() AND application_name LIKE 'audit-log-sweeper/%'";
    eventually("both to connect, and one to go on", WAIT_TIMEOUT, async || {
        let now = log.query(waiting).await;
        if now == ["1|2"] { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(log.query(waiting).await, ["1|2"]);
    locked.rollback().await.unwrap();
    for secret in ["first", "second"] {
        operator.until(secret, "its preflight", |s| has(s, "Ready=True/SchemaReady")).await;
    }
}
