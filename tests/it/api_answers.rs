//! An API server that refuses requests for a while, or closes watches: counts arrive, and edits are seen, afterwards.

use std::time::{Duration, Instant};

use audit_log_sweeper::schedule::Grid;
use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use support::wait::eventually;

use crate::fixtures::audit_table::assert_one_swept_at_a_time;
use crate::fixtures::http_fault_proxy::{End, Refusal};
use crate::fixtures::operator::{has, replica};
use crate::fixtures::{AuditTable, HttpFaultProxy, Operator};

/// Longer than any pause of the clients in between.
const MINUTE: Duration = Duration::from_secs(60);

fn time(status: &Value, field: &str) -> DateTime<Utc> {
    status[field].as_str().unwrap_or_else(|| panic!("no {field} in {status:#}")).parse().unwrap()
}

/// Refuses during a sweep of 40 rows of 50, and while another object is swept every 5 s, a row at a time.
async fn rides_out(refusal: Refusal, refusing: Duration, args: &[&str]) {
    let (log, ticks, operator) = (AuditTable::slow(50).await, AuditTable::new().await, Operator::absent().await);
    ticks.start_many(100).await;
    operator.secret_for(&log).await;
    operator.secret("ticks", &[("uri", &ticks.database.uri())]).await;
    let gateway = HttpFaultProxy::new(&operator.kubeconfig(None).await, &operator.scratch).await;
    let mut process = replica("a", &gateway.kubeconfig, &operator.scratch, &operator.namespace, args);
    let database = json!({ "secretRef": { "name": "ticks" }, "tls": { "mode": "Disable" } });
    let tick = json!({ "period": "5s", "limit": 1, "database": database });
    let uid = operator.apply("tick", tick).await.metadata.uid.unwrap();
    operator.until("tick", "the first sweep", |s| s["totals"]["sweeps"] == json!(1)).await;
    operator.apply("app", json!({ "batchSize": 1, "limit": 40, "period": "1h" })).await;
    log.until_swept(2).await;

    gateway.refuse(Some(refusal));
    let began = Instant::now();
    eventually("every kind of request to be refused for a while", refusing + Duration::from_secs(30), async || {
        let kinds = ["/status", "/leases/", "watch=true", "GET "].map(|kind| gateway.refused(kind));
        if kinds[2] == 0 {
            gateway.end_watches(End::Closed);
        }
        // A replica that lost the lead writes no status.
        let skipped = usize::from(!args.is_empty());
        if began.elapsed() >= refusing && kinds[skipped..].iter().all(|refused| *refused > 0) {
            Ok(())
        } else {
            Err(format!("{kinds:?}"))
        }
    })
    .await;
    gateway.refuse(None);

    let wait_timeout = Duration::from_secs(60);
    eventually("the counts", wait_timeout, async || {
        let status = json!(operator.api().get("app").await.unwrap().status);
        let swept = log.timed_out().await;
        let done = status["totals"]["timedOut"] == json!(40) && has(&status, "Ready=True/LimitReached");
        if done && swept.len() == 40 { Ok(()) } else { Err(format!("{swept:?} {status:#}")) }
    })
    .await;
    // A sweep that was made again would have taken more.
    assert_eq!(log.timed_out().await, (1..=40).collect::<Vec<_>>());
    let trail = log.trail().await;
    assert_one_swept_at_a_time(&trail);
    assert_eq!(trail.iter().map(|(_, _, rows)| rows).sum::<u32>(), 40);

    let before = ticks.timed_out().await.len();
    let grid = Grid::new(&uid, Duration::from_secs(5));
    let (status, rows) =
        eventually("two sweeps on the grid, in time, and all of them counted", wait_timeout, async || {
            let status = json!(operator.api().get("tick").await.unwrap().status);
            let (counted, rows) = (status["totals"]["timedOut"].as_u64(), ticks.timed_out().await);
            let all = counted == u64::try_from(rows.len()).ok() && rows.len() >= before + 2;
            let slot = time(&status, "lastScheduleTime");
            let on_grid = grid.latest(slot) == slot && status["lastSweep"]["trigger"] == json!("Schedule");
            let in_time = time(&status, "lastAttemptTime") - slot <= TimeDelta::seconds(2);
            if all && on_grid && in_time && has(&status, "Ready=True/LimitReached") {
                Ok((status, rows))
            } else {
                Err(format!("{rows:?} {status:#}"))
            }
        })
        .await;
    let last = u32::try_from(status["totals"]["timedOut"].as_u64().unwrap()).unwrap();
    assert_eq!(rows, (1..=last).collect::<Vec<_>>());
    assert_eq!(status["totals"]["failures"], json!(0), "{status:#}");
    // So is the next one. With a short lease, the lead may change hands at any time on a busy machine.
    if args.is_empty() {
        let last = status["lastScheduleTime"].clone();
        let status = operator.until("tick", "the next sweep", |s| s["lastScheduleTime"] != last).await;
        let late = time(&status, "lastAttemptTime") - time(&status, "lastScheduleTime");
        assert!(late <= TimeDelta::seconds(2), "{late}: {status:#}");
    }
    assert!(process.is_running(), "{}", process.log_tail(30));
}

#[tokio::test]
async fn a_minute_of_too_many_requests_costs_no_count_and_no_second_sweep() {
    rides_out(Refusal::all(429), MINUTE, &[]).await;
}

#[tokio::test]
async fn a_minute_of_errors_that_costs_the_lead_costs_no_count_and_no_second_sweep() {
    rides_out(Refusal::all(500), MINUTE, &["--lease-duration=3s"]).await;
}

#[tokio::test]
async fn an_api_server_that_answers_one_in_three_costs_no_count_and_no_second_sweep() {
    rides_out(Refusal { code: 503, of: "", spare: 3 }, Duration::from_secs(10), &[]).await;
}

#[tokio::test]
async fn a_watch_that_ended_is_opened_again_and_edits_are_seen() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    let gateway = HttpFaultProxy::new(&operator.kubeconfig(None).await, &operator.scratch).await;
    let _process = replica("a", &gateway.kubeconfig, &operator.scratch, &operator.namespace, &[]);
    let edit = async |suspend: bool| operator.apply("app", json!({ "period": "1h", "suspend": suspend })).await;
    let seen = async |suspended| operator.until("app", "the edit", move |s| has(s, suspended)).await;
    let watches = || gateway.passed("auditlogsweepers?&watch=true");
    edit(false).await;
    seen("Suspended=False/NotSuspended").await;
    for how in [End::Closed, End::Broken] {
        let opened = watches();
        gateway.end_watches(how);
        eventually("another watch", Duration::from_secs(20), async || {
            if watches() > opened { Ok(()) } else { Err(opened.to_string()) }
        })
        .await;
        edit(true).await;
        seen("Suspended=True/Suspended").await;
        edit(false).await;
        seen("Suspended=False/NotSuspended").await;
    }
    // Edited while no watch is open; and 410 is how a server says that it no longer knows what came before.
    for (code, suspend, condition) in
        [(503, true, "Suspended=True/Suspended"), (410, false, "Suspended=False/NotSuspended")]
    {
        let refused = gateway.refused("watch=true");
        gateway.refuse(Some(Refusal { code, of: "watch=true", spare: 0 }));
        gateway.end_watches(End::Closed);
        eventually("the watch to be refused", Duration::from_secs(20), async || {
            let now = gateway.refused("watch=true");
            if now > refused { Ok(()) } else { Err(now.to_string()) }
        })
        .await;
        edit(suspend).await;
        gateway.refuse(None);
        seen(condition).await;
    }
}

#[tokio::test]
async fn a_watch_that_was_refused_for_a_minute_is_opened_again_within_seconds() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    let gateway = HttpFaultProxy::new(&operator.kubeconfig(None).await, &operator.scratch).await;
    let _process = replica("a", &gateway.kubeconfig, &operator.scratch, &operator.namespace, &[]);
    operator.apply("app", json!({ "period": "1h" })).await;
    operator.until("app", "the first sweep", |s| has(s, "Suspended=False/NotSuspended")).await;
    gateway.refuse(Some(Refusal { code: 503, of: "watch=true", spare: 0 }));
    gateway.end_watches(End::Closed);
    // The watch itself, and not the short ones that tell whether there could be one.
    let refused = || gateway.refused("timeoutSeconds=290");
    tokio::time::sleep(MINUTE / 2).await;
    let first = refused();
    tokio::time::sleep(MINUTE / 2).await;
    // The pauses grow to 5 s and no further; those of the client itself would be at 20 s by now.
    let second = refused() - first;
    assert!((5..20).contains(&second), "{first} and then {second} watches were refused");
    operator.apply("app", json!({ "period": "1h", "suspend": true })).await;
    gateway.refuse(None);
    let start = Instant::now();
    operator.until("app", "the edit", |s| has(s, "Suspended=True/Suspended")).await;
    assert!(start.elapsed() < Duration::from_secs(12), "{:?}", start.elapsed());
}
