//! Several replicas: exactly one sweeps, and another takes over, whatever happens to the first.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::process::{Process, output};
use support::wait::eventually;

use crate::fixtures::audit_table::assert_one_swept_at_a_time;
use crate::fixtures::operator::{RELEASE, WAIT_TIMEOUT, has, port, probe, replica, until_says};
use crate::fixtures::tcp_fault_proxy::Course;
use crate::fixtures::{AuditTable, DedicatedControlPlane, Operator, TcpFaultProxy};

/// With it the holder gives up after 2 s, and renews every 0.4 s.
const SHORT: &str = "--lease-duration=3s";

fn start(operator: &Operator, pod: &str, kubeconfig: &std::path::Path, args: &[&str]) -> Process {
    replica(pod, kubeconfig, &operator.scratch, &operator.namespace, args)
}

fn leases(operator: &Operator) -> Api<Lease> {
    Api::namespaced(operator.client.clone(), &operator.namespace)
}

/// The pod that holds the lease; empty: nobody does.
async fn holder(leases: &Api<Lease>) -> Result<String, String> {
    let lease = leases.get(RELEASE.1).await.map_err(|error| error.to_string())?;
    let holder = lease.spec.and_then(|spec| spec.holder_identity).unwrap_or_default();
    Ok(holder.split('_').next().unwrap_or_default().to_owned())
}

async fn until_held_by(leases: &Api<Lease>, pod: &str) {
    eventually("the lease to change hands", Duration::from_secs(30), async || {
        let holder = holder(leases).await?;
        if holder == pod { Ok(()) } else { Err(holder) }
    })
    .await;
}

/// The times between which a process led, by its own log.
fn terms(log: &str) -> Vec<(DateTime<Utc>, DateTime<Utc>)> {
    let mut terms = vec![];
    let mut began = None;
    for line in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let at: DateTime<Utc> = line["timestamp"].as_str().unwrap().parse().unwrap();
        let message = line["message"].as_str().unwrap_or_default();
        if message == "leading" {
            began = Some(at);
        } else if message.starts_with("lost the lease") || message == "given back" {
            terms.extend(began.take().map(|began| (began, at)));
        }
    }
    terms.extend(began.map(|began| (began, Utc::now())));
    terms
}

/// Fails if two ever led at once.
fn assert_one_led_at_a_time(logs: &[String]) {
    let mut all: Vec<_> = logs.iter().flat_map(|log| terms(log)).collect();
    all.sort();
    assert!(all.windows(2).all(|pair| pair[0].1 <= pair[1].0), "two led at once: {all:?}\n{}", logs.join("\n---\n"));
}

#[tokio::test]
async fn a_restarted_container_takes_over_from_its_dead_predecessor_at_once() {
    let operator = Operator::absent().await;
    let (config, leases) = (operator.kubeconfig(None).await, leases(&operator));
    let long = "--lease-duration=10m";
    let first = start(&operator, "pod", &config, &["--pod-uid=u", long]);
    until_held_by(&leases, "pod").await;
    first.kill9().unwrap();
    let before = leases.get(RELEASE.1).await.unwrap().spec.unwrap().holder_identity;
    let again = start(&operator, "pod", &config, &["--pod-uid=u", long]);
    eventually("the lease to change hands", WAIT_TIMEOUT, async || {
        let now = leases.get(RELEASE.1).await.unwrap().spec.unwrap().holder_identity;
        if now == before { Err(format!("{now:?}\n{}", again.log_tail(20))) } else { Ok(()) }
    })
    .await;
    // Another pod of that name is another.
    let other = start(&operator, "pod", &config, &["--pod-uid=v", long]);
    until_says(&other, "\"leads\":false").await;
}

#[tokio::test]
async fn of_two_replicas_one_sweeps_and_both_are_ready() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    let config = operator.kubeconfig(None).await;
    let a = start(&operator, "a", &config, &[]);
    until_held_by(&leases(&operator), "a").await;
    let b = start(&operator, "b", &config, &[]);
    for process in [&a, &b] {
        let ready =
            eventually("readiness", WAIT_TIMEOUT, async || probe(&process.log_tail(usize::MAX), "/readyz").await).await;
        assert_eq!(ready, "ready\n");
        assert_eq!(probe(&process.log_tail(usize::MAX), "/healthz").await.unwrap(), "serving\n");
    }
    log.start(1, "2 h").await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "5s" })).await;
    operator.until("app", "three sweeps", |s| s["totals"]["sweeps"].as_i64() >= Some(3)).await;
    assert_eq!(log.timed_out().await, [1]);
    let (a, b) = (a.log_tail(usize::MAX), b.log_tail(usize::MAX));
    assert!(a.contains("rows timed out") && a.contains("nothing to time out"), "{a}");
    assert!(!b.contains("time out") && !b.contains("timed out"), "{b}");
    assert_one_led_at_a_time(&[a, b]);
}

#[tokio::test]
async fn sigterm_hands_over_within_two_seconds() {
    let operator = Operator::absent().await;
    let config = operator.kubeconfig(None).await;
    let a = start(&operator, "a", &config, &[]);
    until_held_by(&leases(&operator), "a").await;
    let b = start(&operator, "b", &config, &[]);
    until_says(&b, "watching").await;
    let start = Instant::now();
    a.signal(Signal::SIGTERM).unwrap();
    until_held_by(&leases(&operator), "b").await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    let logs = [a.log_tail(usize::MAX), b.log_tail(usize::MAX)];
    assert!(logs[0].contains("given back"), "{}", logs[0]);
    assert_one_led_at_a_time(&logs);
}

#[tokio::test]
async fn sigterm_during_a_sweep_hands_its_rest_over_within_five_seconds() {
    let (log, operator) = (AuditTable::slow(200).await, Operator::absent().await);
    let config = operator.kubeconfig(None).await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 4, "limit": 60, "period": "1h" })).await;
    let a = start(&operator, "a", &config, &[]);
    log.until_swept(4).await;
    let b = start(&operator, "b", &config, &[]);
    until_says(&b, "watching").await;
    let start = Instant::now();
    a.signal(Signal::SIGTERM).unwrap();
    until_held_by(&leases(&operator), "b").await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let status = operator.until("app", "the end", |s| s["lastSweep"]["outcome"] == json!("LimitReached")).await;
    // What the first did was published before the second began, which went on with the rest of the limit.
    let trail = log.trail().await;
    assert_one_swept_at_a_time(&trail);
    assert_eq!((log.timed_out().await, trail.len()), ((1..=60).collect(), 2));
    assert_eq!((&status["lastSweep"]["timedOut"], &status["lastSweep"]["attempts"]), (&json!(60), &json!(2)));
    assert_eq!(status["totals"], json!({ "sweeps": 2, "failures": 0, "timedOut": 60 }));
    let (_, given_back) = *terms(&a.log_tail(usize::MAX)).last().unwrap();
    let published: Vec<DateTime<Utc>> = operator
        .plane
        .audit_events()
        .unwrap()
        .iter()
        .filter(|event| event["verb"] == "patch" && event["objectRef"]["namespace"] == json!(operator.namespace))
        .filter(|event| event["objectRef"]["subresource"] == "status")
        .map(|event| event["stageTimestamp"].as_str().unwrap().parse().unwrap())
        .collect();
    // Seen, stopped, and then the other's.
    assert!(published[1] < given_back && given_back < published[2], "{published:?} {given_back}");
    assert_one_led_at_a_time(&[a.log_tail(usize::MAX), b.log_tail(usize::MAX)]);
}

#[tokio::test]
async fn a_killed_leader_is_followed_within_the_leases_time() {
    let (log, operator) = (AuditTable::slow(40).await, Operator::absent().await);
    let config = operator.kubeconfig(None).await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 2, "period": "1h" })).await;
    let a = start(&operator, "a", &config, &[SHORT]);
    log.until_swept(4).await;
    let b = start(&operator, "b", &config, &[SHORT]);
    until_says(&b, "watching").await;
    let start = Instant::now();
    a.kill9().unwrap();
    until_held_by(&leases(&operator), "b").await;
    let took = start.elapsed();
    // The last renewal may have been 0.4 s old, and is seen, as its end is, within 0.2 s. A busy machine takes longer.
    assert!(took > Duration::from_millis(2300) && took < Duration::from_secs(6), "{took:?}");
    operator.until("app", "the rest", |s| s["lastSweep"]["outcome"] == json!("Drained")).await;
    assert_eq!(log.timed_out().await, (1..=40).collect::<Vec<_>>());
    assert_one_swept_at_a_time(&log.trail().await);
}

/// Two replicas and a table that takes long: the first leads and sweeps, and hears the API server through a relay; the
/// second stands by.
async fn first_behind_a_relay() -> (AuditTable, Operator, TcpFaultProxy, Process, Process) {
    let (log, operator) = (AuditTable::slow(1000).await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 2, "period": "1h" })).await;
    let relay = TcpFaultProxy::new(port(operator.plane)).await;
    let a = start(&operator, "a", &operator.kubeconfig(Some(&relay)).await, &[SHORT]);
    log.until_swept(4).await;
    let b = start(&operator, "b", &operator.kubeconfig(None).await, &[SHORT]);
    until_says(&b, "watching").await;
    (log, operator, relay, a, b)
}

#[tokio::test]
async fn a_leader_cut_off_from_the_api_server_stops_before_the_next_one_starts() {
    let (log, operator, relay, a, b) = first_behind_a_relay().await;
    relay.set(Course::Deaf);
    until_held_by(&leases(&operator), "b").await;
    eventually("the second to sweep", WAIT_TIMEOUT, async || {
        let trail = log.trail().await;
        if trail.len() == 2 { Ok(()) } else { Err(format!("{trail:?}")) }
    })
    .await;
    let swept = log.trail().await;
    assert_one_swept_at_a_time(&swept);
    // It did not stop for nothing: until its time was up it went on.
    assert!(swept[0].2 > 8, "{swept:?}");
    relay.set(Course::To(port(operator.plane)));
    // What the first did by itself is told once it is heard again, and stands beside what the second does.
    let published = operator.until("app", "the counts of the first", |s| s["totals"]["sweeps"] == json!(1)).await;
    assert_eq!(published["totals"]["timedOut"], json!(swept[0].2), "{published:#}");
    b.signal(Signal::SIGTERM).unwrap();
    until_held_by(&leases(&operator), "a").await;
    a.signal(Signal::SIGTERM).unwrap();
    eventually("the end", WAIT_TIMEOUT, async || {
        let log = a.log_tail(usize::MAX);
        if log.contains("given back") { Ok(()) } else { Err(log) }
    })
    .await;
    let status = json!(operator.api().get("app").await.unwrap().status);
    let done = log.timed_out().await;
    assert_eq!(done, (1..=u32::try_from(done.len()).unwrap()).collect::<Vec<_>>());
    assert_eq!(status["totals"]["timedOut"], json!(done.len()), "{status:#}");
    assert_one_swept_at_a_time(&log.trail().await);
    assert_one_led_at_a_time(&[a.log_tail(usize::MAX), b.log_tail(usize::MAX)]);
}

#[tokio::test]
async fn the_counts_of_a_lost_lead_are_published_without_it() {
    let (log, operator, relay, a, b) = first_behind_a_relay().await;
    relay.set(Course::Closed);
    until_says(&a, "trying this object again").await;
    until_held_by(&leases(&operator), "b").await;
    relay.set(Course::To(port(operator.plane)));
    let status = operator.until("app", "the counts of the first", |s| s["totals"]["sweeps"] == json!(1)).await;
    assert_eq!(holder(&leases(&operator)).await.unwrap(), "b");
    let trail = log.trail().await;
    assert_one_swept_at_a_time(&trail);
    assert_eq!(status["totals"]["timedOut"], json!(trail[0].2), "{status:#}");
    assert_one_led_at_a_time(&[a.log_tail(usize::MAX), b.log_tail(usize::MAX)]);
}

#[tokio::test]
async fn a_leader_that_comes_back_goes_by_what_the_other_left() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "1h" })).await;
    let relay = TcpFaultProxy::new(port(operator.plane)).await;
    let a = start(&operator, "a", &operator.kubeconfig(Some(&relay)).await, &[SHORT]);
    operator.until("app", "its sweep", |s| s["totals"]["sweeps"] == json!(1)).await;
    relay.set(Course::Deaf);
    until_says(&a, "lost the lease").await;
    let b = start(&operator, "b", &operator.kubeconfig(None).await, &[SHORT]);
    // It begins a failure, whose retry is due long before the slot that the first one remembers.
    operator.apply("app", json!({ "period": "1h", "table": "elsewhere" })).await;
    operator.until("app", "the failure", |s| has(s, "Ready=False/TableNotFound")).await;
    b.signal(Signal::SIGTERM).unwrap();
    until_says(&b, "given back").await;
    relay.set(Course::To(port(operator.plane)));
    until_held_by(&leases(&operator), "a").await;
    log.run("ALTER TABLE audit_log RENAME TO elsewhere").await;
    let status = operator.until("app", "the recovery", |s| s["consecutiveFailures"] == json!(0)).await;
    assert!(has(&status, "Ready=True/SchemaReady"), "{status:#}");
    assert_one_led_at_a_time(&[a.log_tail(usize::MAX), b.log_tail(usize::MAX)]);
}

#[tokio::test]
async fn without_an_election_there_is_no_lease() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    log.start(1, "2 h").await;
    operator.secret_for(&log).await;
    let a = start(&operator, "a", &operator.kubeconfig(None).await, &["--leader-elect=false"]);
    operator.apply("app", json!({})).await;
    operator.until("app", "the sweep", |s| has(s, "Ready=True/Swept")).await;
    assert_eq!(log.timed_out().await, [1]);
    assert!(leases(&operator).list(&Default::default()).await.unwrap().items.is_empty());
    let (mut a, stopping) = (a, Instant::now());
    a.signal(Signal::SIGTERM).unwrap();
    while a.is_running() {
        assert!(stopping.elapsed() < Duration::from_secs(2), "{}", a.log_tail(20));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn nobody_goes_by_the_clock_of_another() {
    let operator = Operator::absent().await;
    let leases = leases(&operator);
    let record = |renewed: DateTime<Utc>| {
        json!({ "holderIdentity": "stranger_1", "leaseDurationSeconds": 3, "leaseTransitions": 7,
            "renewTime": renewed.to_rfc3339_opts(chrono::SecondsFormat::Micros, true) })
    };
    let hours = |hours| Utc::now() + chrono::TimeDelta::hours(hours);
    let lease = json!({ "metadata": { "name": RELEASE.1 }, "spec": record(hours(-1)) });
    leases.create(&PostParams::default(), &serde_json::from_value(lease).unwrap()).await.unwrap();
    let a = start(&operator, "a", &operator.kubeconfig(None).await, &[SHORT]);
    until_says(&a, "watching").await;
    // Its clock is an hour behind, but it renews.
    for _ in 0..12 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(holder(&leases).await.unwrap(), "stranger");
        let patch = json!({ "spec": record(hours(-1)) });
        leases.patch(RELEASE.1, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    }
    // Its clock is an hour ahead, but it died.
    let patch = json!({ "spec": record(hours(1)) });
    leases.patch(RELEASE.1, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
    let start = Instant::now();
    until_held_by(&leases, "a").await;
    assert!(start.elapsed() > Duration::from_millis(2700) && start.elapsed() < Duration::from_secs(5));
    let spec = leases.get(RELEASE.1).await.unwrap().spec.unwrap();
    assert_eq!((spec.lease_transitions, spec.lease_duration_seconds), (Some(8), Some(3)));
}

#[tokio::test]
async fn a_deleted_lease_stays_with_its_holder() {
    let operator = Operator::absent().await;
    let config = operator.kubeconfig(None).await;
    let a = start(&operator, "a", &config, &[SHORT]);
    let leases = leases(&operator);
    until_held_by(&leases, "a").await;
    let b = start(&operator, "b", &config, &[SHORT]);
    until_says(&b, "watching").await;
    for _ in 0..5 {
        leases.delete(RELEASE.1, &DeleteParams::default()).await.unwrap();
        eventually("the lease to be there again", WAIT_TIMEOUT, async || holder(&leases).await).await;
        assert_eq!(holder(&leases).await.unwrap(), "a");
    }
    assert_one_led_at_a_time(&[a.log_tail(usize::MAX), b.log_tail(usize::MAX)]);
}

#[tokio::test]
async fn an_api_server_that_was_gone_for_a_minute_finds_one_leader_and_both_processes() {
    // For its own API server, which it stops.
    let DedicatedControlPlane { mut plane, namespace, scratch, config, .. } = DedicatedControlPlane::new().await;
    let mut processes = ["a", "b"].map(|pod| replica(pod, &config, &scratch, &namespace, &[SHORT]));
    for process in &processes {
        until_says(process, "watching").await;
    }
    let leading = |processes: &[Process; 2]| {
        let leads = |process: &Process| {
            terms(&process.log_tail(usize::MAX))
                .last()
                .is_some_and(|(_, end)| Utc::now() - end < chrono::TimeDelta::milliseconds(50))
        };
        processes.iter().filter(|process| leads(process)).count()
    };
    eventually("a leader", WAIT_TIMEOUT, async || if leading(&processes) == 1 { Ok(()) } else { Err(String::new()) })
        .await;
    plane.stop_api_server();
    let gone = Instant::now();
    eventually("nobody to lead", WAIT_TIMEOUT, async || {
        let logs = processes.each_ref().map(|process| process.log_tail(usize::MAX));
        let lost = logs.iter().any(|log| log.contains("lost the lease"));
        if lost && leading(&processes) == 0 { Ok(()) } else { Err(logs.join("\n---\n")) }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(60).saturating_sub(gone.elapsed())).await;
    for process in &processes {
        let ready = probe(&process.log_tail(usize::MAX), "/readyz").await.unwrap_err();
        assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("waiting for Lease "), "{ready}");
        assert_eq!(probe(&process.log_tail(usize::MAX), "/healthz").await.unwrap(), "serving\n");
    }
    plane.start_api_server().await.unwrap();
    eventually("a leader again", WAIT_TIMEOUT, async || {
        let logs = processes.each_ref().map(|process| process.log_tail(usize::MAX));
        if leading(&processes) == 1 { Ok(()) } else { Err(logs.join("\n---\n")) }
    })
    .await;
    for process in &mut processes {
        assert!(process.is_running(), "{}", process.log_tail(50));
        eventually("readiness", WAIT_TIMEOUT, async || probe(&process.log_tail(usize::MAX), "/readyz").await).await;
    }
    assert_one_led_at_a_time(&processes.each_ref().map(|process| process.log_tail(usize::MAX)));
    drop(output(plane.kubectl().args(["delete", "namespace", &namespace, "--wait=false"])));
}
