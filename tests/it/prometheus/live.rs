//! A real Prometheus on real operators and objects: every query of the dashboard and of the alerts finds what it is for.

use std::collections::BTreeSet;
use std::time::Duration;

use kube::api::DeleteParams;
use serde_json::{Value, json};
use support::process::{Process, output};
use support::prometheus::{Prometheus, promtool};
use support::wait::eventually;

use super::{alerts, dashboard, queries, rendered, selectors};
use crate::fixtures::operator::{RELEASE, WAIT_TIMEOUT, ask_for, has, health_address, replica};
use crate::fixtures::{AuditTable, Operator, id};
use crate::metrics::{process_samples, samples, until_as_status};

/// How long it may take until rates have something to go by.
const SCRAPED: Duration = Duration::from_secs(40);

/// A leader, a standby, and an object in every state that a metric is about.
struct Fleet {
    operator: Operator,
    standby: Process,
    _logs: [AuditTable; 2],
}

impl Fleet {
    async fn new() -> Self {
        let (log, poisoned, mut operator) =
            (AuditTable::new().await, AuditTable::new().await, Operator::absent().await);
        log.start_many(500).await;
        poisoned.start_many(2).await;
        let refuse = format!("IF NEW.id = '{}' THEN RAISE EXCEPTION 'no'; END IF;", id(1));
        poisoned.before_update(&refuse).await;
        operator.secret_for(&log).await;
        operator.secret("db2", &[("uri", &poisoned.database.uri())]).await;
        operator.start_with(&["--lease-duration=3s"]).await;
        let database = json!({ "secretRef": { "name": "db2" }, "tls": { "mode": "Disable" } });
        // Many sweeps of one row each: there is always a backlog.
        operator.apply("app", json!({ "limit": 1, "period": "5s" })).await;
        operator.apply("bad", json!({ "table": "nowhere", "period": "2h" })).await;
        operator.apply("off", json!({ "suspend": true })).await;
        operator.apply("poisoned", json!({ "period": "1h", "database": database })).await;
        operator.until("app", "a sweep", |s| has(s, "Ready=True/LimitReached")).await;
        operator.until("bad", "the failure", |s| has(s, "Ready=False/TableNotFound")).await;
        // As if it had once gone well, long ago.
        let once = json!({ "status": { "lastSuccessfulTime": "2026-01-02T03:04:05Z" } }).to_string();
        output(operator.kubectl().args(["patch", "als/bad", "--subresource=status", "--type=merge", "-p", &once]))
            .unwrap();
        operator.until("off", "the acknowledgement", |s| has(s, "Suspended=True/Suspended")).await;
        operator.until("poisoned", "the refused row", |s| s["unsweepable"]["count"] == json!(1)).await;
        let config = operator.kubeconfig(None).await;
        let standby = replica("standby", &config, &operator.scratch, &operator.namespace, &["--lease-duration=3s"]);
        eventually("the standby", WAIT_TIMEOUT, async || {
            health_address(&standby.log_tail(usize::MAX)).ok_or_else(|| standby.log_tail(5))
        })
        .await;
        Self { operator, standby, _logs: [log, poisoned] }
    }

    /// Prometheus as it is set by the ServiceMonitor, but for the interval, with the rules.
    async fn prometheus(&self, rules: &[Value]) -> Prometheus {
        let target = |pod: &str, log: &str| json!({ "targets": [health_address(log).unwrap()], "labels": { "namespace": RELEASE.0, "pod": pod } });
        let targets = [target("leader", &self.operator.log()), target("standby", &self.standby.log_tail(usize::MAX))];
        let configuration = json!({
            "global": { "scrape_interval": "1s", "evaluation_interval": "1s" },
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{ "job_name": RELEASE.1, "honor_labels": true, "static_configs": targets }],
        });
        let rules = json!({ "groups": [{ "name": "rendered", "rules": rules }] });
        Prometheus::start(&configuration.to_string(), &[("rules.yaml", &rules.to_string())]).await.unwrap()
    }
}

/// Each alert that Prometheus evaluates, and its state; how it went wrong if it did.
async fn states(prometheus: &Prometheus) -> Vec<(String, String)> {
    let data = prometheus.api("rules").await.unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let rules = data["groups"][0]["rules"].as_array().cloned().unwrap_or_default();
    let state = |rule: &Value| match rule["health"].as_str() {
        Some("ok") => text(&rule["state"]),
        _ => format!("{} {}", rule["health"], rule["lastError"]),
    };
    rules.iter().map(|rule| (text(&rule["name"]), state(rule))).collect()
}

/// Waits until an expression has so many series.
async fn until_series(prometheus: &Prometheus, expression: &str, count: usize) -> Vec<Value> {
    eventually(expression, SCRAPED, async || {
        let series = prometheus.query(expression).await.map_err(|error| format!("{error:#}"))?;
        if series.len() == count { Ok(series) } else { Err(format!("{series:?}")) }
    })
    .await
}

#[tokio::test]
async fn every_query_finds_series_and_every_alert_its_state() {
    let objects = rendered();
    let (fleet, rules) = (Fleet::new().await, alerts(&objects));
    let prometheus = fleet.prometheus(rules).await;

    // Of an alert its parts: that it finds nothing is what one hopes.
    let exprs: Vec<&str> = rules.iter().map(|rule| rule["expr"].as_str().unwrap()).collect();
    let parts = exprs.iter().flat_map(|expr| selectors(expr)).map(|selector| format!("last_over_time({selector}[5m])"));
    let queries = queries(&dashboard(&objects));
    // And of a query too: a sum of nothing beside a sum of something would go unseen.
    let pieces = queries.iter().flat_map(|query| selectors(query)).map(str::to_owned);
    let mut all: Vec<String> = queries.iter().cloned().chain(parts).chain(pieces).collect();
    all.sort();
    all.dedup();
    assert!(all.len() > 50, "{all:?}");
    eventually("every query to find series", SCRAPED, async || {
        let mut empty = vec![];
        for query in &all {
            match prometheus.query(query).await {
                Ok(series) if series.is_empty() => empty.push(query.clone()),
                Ok(_) => {}
                Err(error) => panic!("{query}: {error:#}"),
            }
        }
        if empty.is_empty() { Ok(()) } else { Err(empty.join("\n")) }
    })
    .await;
    // Every metric is shown or alerts.
    let used: String = [exprs.concat(), queries.concat()].concat();
    let unused: Vec<_> = samples().into_iter().filter(|metric| !used.contains(metric.as_str())).collect();
    assert!(unused.is_empty(), "{unused:?}");

    let expected = [
        ("AuditLogSweeperNotSucceeding", "pending"),
        ("AuditLogSweeperBacklogNotBounded", "pending"),
        ("AuditLogSweeperLimitReached", "firing"),
        ("AuditLogSweeperRowsTimedOut", "firing"),
        ("AuditLogSweeperSuspended", "inactive"),
        ("AuditLogSweeperUnsweepableRows", "firing"),
        ("AuditLogSweeperNoLeader", "inactive"),
    ];
    let expected = expected.map(|(alert, state)| (alert.to_owned(), state.to_owned()));
    eventually("the alerts", SCRAPED, async || {
        let states = states(&prometheus).await;
        if states == expected { Ok(()) } else { Err(format!("{states:?}")) }
    })
    .await;
}

#[tokio::test]
async fn series_go_with_the_object_and_with_the_lead() {
    let mut fleet = Fleet::new().await;
    let prometheus = fleet.prometheus(&[]).await;
    let pods = |series: &[Value]| -> Vec<String> {
        series.iter().map(|series| series["metric"]["pod"].as_str().unwrap().to_owned()).collect()
    };
    // One of each object, of the leader, with the object's own namespace.
    let ready = format!("audit_log_sweeper_ready{{namespace=\"{}\"}}", fleet.operator.namespace);
    assert_eq!(pods(&until_series(&prometheus, &ready, 4).await), ["leader"; 4]);
    until_series(&prometheus, "audit_log_sweeper_leader", 2).await;
    fleet.operator.api().delete("off", &DeleteParams::default()).await.unwrap();
    let off = "{__name__=~\"audit_log_sweeper_.*\", name=\"off\"}";
    until_series(&prometheus, off, 0).await;
    until_series(&prometheus, &ready, 3).await;

    fleet.operator.terminate().await;
    eventually("the takeover", SCRAPED, async || {
        let pods = pods(&prometheus.query(&ready).await.map_err(|error| format!("{error:#}"))?);
        if pods == ["standby"; 3] { Ok(()) } else { Err(format!("{pods:?}")) }
    })
    .await;
}

#[tokio::test]
async fn promtool_finds_nothing_wrong_with_the_metrics() {
    let fleet = Fleet::new().await;
    // Of one with a refused row.
    let scrape = until_as_status(&fleet.operator, "poisoned", 3600.0).await;
    assert_eq!(scrape.gauges(&fleet.operator, "poisoned")["unsweepable_rows"], 1.0);
    let all = samples();
    let of_standby = process_samples();
    for (log, names) in [(fleet.operator.log(), &all), (fleet.standby.log_tail(usize::MAX), &of_standby)] {
        let answer = ask_for(&log, "/metrics", "*/*").await.unwrap();
        let (head, text) = answer.split_once("\r\n\r\n").unwrap();
        let head = head.to_lowercase();
        assert!(head.contains("\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
        // What people type: curl -s .../metrics | promtool check metrics
        let said = promtool(fleet.operator.scratch.path(), &["check", "metrics"], text).unwrap();
        assert_eq!(said, "");
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        assert_eq!(types.map(str::to_owned).collect::<BTreeSet<_>>(), *names);
    }
}
