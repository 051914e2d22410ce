//! Several replicas: exactly one sweeps, and another takes over, whatever happens to the first.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::control_plane::ControlPlane;
use support::process::{Process, output};
use support::scratch::Scratch;
use support::tools::Tools;
use support::wait::eventually;

use crate::fixtures::operator::{PATIENCE, RELEASE, install, namespace, probe, replica};
use crate::fixtures::relay::Course;
use crate::fixtures::{Log, Operator, Relay};

/// With it the holder gives up after 2 s, and renews every 0.4 s.
const SHORT: &str = "--lease-duration=3s";

/// Whoever sweeps leaves a trail: its session and the time, in the same transaction.
const TRAIL: &str = "INSERT INTO trail VALUES (pg_backend_pid(), clock_timestamp()); PERFORM pg_sleep(0.05);";

/// A kubeconfig of the operator, by way of a relay if there is one.
async fn kubeconfig(operator: &Operator, via: Option<&Relay>) -> PathBuf {
    let (plane, name) = (operator.plane, &operator.namespace);
    let token = plane.service_account_token(RELEASE.0, RELEASE.1).await.unwrap();
    let direct = plane.kubeconfig_for(&token, name).unwrap();
    let Some(relay) = via else { return direct };
    let text = std::fs::read_to_string(direct).unwrap().replace(plane.url(), &format!("https://{}", relay.address));
    operator.scratch.write("relayed.kubeconfig", text, None).unwrap()
}

fn port(plane: &ControlPlane) -> u16 {
    plane.url().rsplit(':').next().unwrap().parse().unwrap()
}

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

async fn until_says(process: &Process, what: &str) {
    eventually(what, PATIENCE, async || {
        let log = process.log_tail(usize::MAX);
        if log.contains(what) { Ok(()) } else { Err(log) }
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

/// Rows that take long to sweep, each leaving its trail.
async fn slow_log(rows: u32) -> Log {
    let log = Log::new().await;
    log.run("CREATE TABLE trail (pid int, at timestamptz)").await;
    log.before_update(TRAIL).await;
    log.start_many(rows).await;
    log
}

/// The sessions that swept, in the order in which they began: when, until when, and how many rows.
async fn trail(log: &Log) -> Vec<(DateTime<Utc>, DateTime<Utc>, u32)> {
    let rows = log
        .query(
            "SELECT to_char(min(at) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), \
                to_char(max(at) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), count(*) \
                FROM trail GROUP BY pid ORDER BY min(at)",
        )
        .await;
    let read = |row: &String| {
        let fields: Vec<_> = row.split('|').collect();
        (fields[0].parse().unwrap(), fields[1].parse().unwrap(), fields[2].parse().unwrap())
    };
    rows.iter().map(read).collect()
}

/// Fails if two sessions swept at once.
fn assert_one_swept_at_a_time(trail: &[(DateTime<Utc>, DateTime<Utc>, u32)]) {
    assert!(trail.windows(2).all(|pair| pair[0].1 < pair[1].0), "two swept at once: {trail:?}");
}

async fn until_some_are_swept(log: &Log, least: usize) {
    eventually("some batches", PATIENCE, async || {
        let done = log.timed_out().await.len();
        if done >= least { Ok(()) } else { Err(done.to_string()) }
    })
    .await;
}

#[tokio::test]
async fn of_two_replicas_one_sweeps_and_both_are_ready() {
    let (log, operator) = (Log::new().await, Operator::absent().await);
    let config = kubeconfig(&operator, None).await;
    let a = start(&operator, "a", &config, &[]);
    until_held_by(&leases(&operator), "a").await;
    let b = start(&operator, "b", &config, &[]);
    for process in [&a, &b] {
        let ready =
            eventually("readiness", PATIENCE, async || probe(&process.log_tail(usize::MAX), "/readyz").await).await;
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
    let config = kubeconfig(&operator, None).await;
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
    let (log, operator) = (slow_log(200).await, Operator::absent().await);
    let config = kubeconfig(&operator, None).await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 4, "limit": 60, "period": "1h" })).await;
    let a = start(&operator, "a", &config, &[]);
    until_some_are_swept(&log, 4).await;
    let b = start(&operator, "b", &config, &[]);
    until_says(&b, "watching").await;
    let start = Instant::now();
    a.signal(Signal::SIGTERM).unwrap();
    until_held_by(&leases(&operator), "b").await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let status = operator.until("app", "the end", |s| s["lastSweep"]["outcome"] == json!("LimitReached")).await;
    // What the first did was published before the second began, which went on with the rest of the limit.
    let trail = trail(&log).await;
    assert_one_swept_at_a_time(&trail);
    assert_eq!((log.timed_out().await, trail.len()), ((1..=60).collect(), 2));
    assert_eq!((&status["lastSweep"]["timedOut"], &status["lastSweep"]["attempts"]), (&json!(60), &json!(2)));
    assert_eq!(status["totals"], json!({ "sweeps": 2, "failures": 0, "timedOut": 60 }));
    assert_one_led_at_a_time(&[a.log_tail(usize::MAX), b.log_tail(usize::MAX)]);
}

#[tokio::test]
async fn a_killed_leader_is_followed_within_the_leases_time() {
    let (log, operator) = (slow_log(40).await, Operator::absent().await);
    let config = kubeconfig(&operator, None).await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 2, "period": "1h" })).await;
    let a = start(&operator, "a", &config, &[SHORT]);
    until_some_are_swept(&log, 4).await;
    let b = start(&operator, "b", &config, &[SHORT]);
    until_says(&b, "watching").await;
    let start = Instant::now();
    a.kill9().unwrap();
    until_held_by(&leases(&operator), "b").await;
    let took = start.elapsed();
    // The last renewal may have been 0.4 s old, and is seen, as its end is, within 0.2 s.
    assert!(took > Duration::from_millis(2300) && took < Duration::from_millis(4000), "{took:?}");
    operator.until("app", "the rest", |s| s["lastSweep"]["outcome"] == json!("Drained")).await;
    assert_eq!(log.timed_out().await, (1..=40).collect::<Vec<_>>());
    assert_one_swept_at_a_time(&trail(&log).await);
}

#[tokio::test]
async fn a_leader_cut_off_from_the_api_server_stops_before_the_next_one_starts() {
    let (log, operator) = (slow_log(1000).await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 2, "period": "1h" })).await;
    let relay = Relay::new(port(operator.plane)).await;
    let a = start(&operator, "a", &kubeconfig(&operator, Some(&relay)).await, &[SHORT]);
    until_some_are_swept(&log, 4).await;
    let b = start(&operator, "b", &kubeconfig(&operator, None).await, &[SHORT]);
    until_says(&b, "watching").await;
    relay.set(Course::Deaf);
    until_held_by(&leases(&operator), "b").await;
    eventually("the second to sweep", PATIENCE, async || {
        let trail = trail(&log).await;
        if trail.len() == 2 { Ok(()) } else { Err(format!("{trail:?}")) }
    })
    .await;
    let swept = trail(&log).await;
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
    eventually("the end", PATIENCE, async || {
        let log = a.log_tail(usize::MAX);
        if log.contains("given back") { Ok(()) } else { Err(log) }
    })
    .await;
    let status = json!(operator.api().get("app").await.unwrap().status);
    let done = log.timed_out().await;
    assert_eq!(done, (1..=u32::try_from(done.len()).unwrap()).collect::<Vec<_>>());
    assert_eq!(status["totals"]["timedOut"], json!(done.len()), "{status:#}");
    assert_one_swept_at_a_time(&trail(&log).await);
    assert_one_led_at_a_time(&[a.log_tail(usize::MAX), b.log_tail(usize::MAX)]);
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
    let a = start(&operator, "a", &kubeconfig(&operator, None).await, &[SHORT]);
    until_says(&a, "watching").await;
    // Its clock is an hour behind, but it renews.
    for _ in 0..12 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let patch = json!({ "spec": record(hours(-1)) });
        leases.patch(RELEASE.1, &PatchParams::default(), &Patch::Merge(&patch)).await.unwrap();
        assert_eq!(holder(&leases).await.unwrap(), "stranger");
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
    let config = kubeconfig(&operator, None).await;
    let a = start(&operator, "a", &config, &[SHORT]);
    let leases = leases(&operator);
    until_held_by(&leases, "a").await;
    let b = start(&operator, "b", &config, &[SHORT]);
    until_says(&b, "watching").await;
    for _ in 0..5 {
        leases.delete(RELEASE.1, &DeleteParams::default()).await.unwrap();
        eventually("the lease to be there again", PATIENCE, async || holder(&leases).await).await;
        assert_eq!(holder(&leases).await.unwrap(), "a");
    }
    assert_one_led_at_a_time(&[a.log_tail(usize::MAX), b.log_tail(usize::MAX)]);
}

#[tokio::test]
async fn an_api_server_that_was_gone_finds_one_leader_and_both_processes() {
    let tools = tokio::task::spawn_blocking(Tools::ensure).await.unwrap().unwrap();
    // For its own API server, which it stops.
    let mut plane = ControlPlane::start(&tools).await.unwrap();
    install(&plane).await;
    let client = plane.client().await.unwrap();
    let (namespace, scratch) = (namespace(&client).await, Scratch::new(None).unwrap());
    let token = plane.service_account_token(RELEASE.0, RELEASE.1).await.unwrap();
    let config = plane.kubeconfig_for(&token, &namespace).unwrap();
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
    eventually("a leader", PATIENCE, async || if leading(&processes) == 1 { Ok(()) } else { Err(String::new()) }).await;
    plane.stop_api_server();
    // Long enough that whoever led gave up, and that the lease ran out for both.
    eventually("nobody to lead", PATIENCE, async || {
        let logs = processes.each_ref().map(|process| process.log_tail(usize::MAX));
        let lost = logs.iter().any(|log| log.contains("lost the lease"));
        if lost && leading(&processes) == 0 { Ok(()) } else { Err(logs.join("\n---\n")) }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    for process in &processes {
        let ready = probe(&process.log_tail(usize::MAX), "/readyz").await.unwrap_err();
        assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("waiting for Lease "), "{ready}");
        assert_eq!(probe(&process.log_tail(usize::MAX), "/healthz").await.unwrap(), "serving\n");
    }
    plane.start_api_server().await.unwrap();
    eventually("a leader again", PATIENCE, async || {
        let logs = processes.each_ref().map(|process| process.log_tail(usize::MAX));
        if leading(&processes) == 1 { Ok(()) } else { Err(logs.join("\n---\n")) }
    })
    .await;
    for process in &mut processes {
        assert!(process.is_running(), "{}", process.log_tail(50));
        eventually("readiness", PATIENCE, async || probe(&process.log_tail(usize::MAX), "/readyz").await).await;
    }
    assert_one_led_at_a_time(&processes.each_ref().map(|process| process.log_tail(usize::MAX)));
    drop(output(plane.kubectl().args(["delete", "namespace", &namespace, "--wait=false"])));
}
