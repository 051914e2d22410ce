//! The metrics of the real operator: every line is one that a strict reader takes, every name is one that is promised,
//! and every value is the one that the status has.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use kube::api::DeleteParams;
use serde_json::{Value, json};
use support::process::{Process, output};
use support::wait::eventually;

use crate::fixtures::operator::{WAIT_TIMEOUT, ask, has, probe, replica};
use crate::fixtures::{AuditTable, Operator};

pub const PREFIX: &str = "audit_log_sweeper_";

/// Every family of an object, without the prefix, and its type.
const OBJECT: [(&str, &str); 12] = [
    ("rows_timed_out", "counter"),
    ("sweeps", "counter"),
    ("last_success_timestamp_seconds", "gauge"),
    ("next_sweep_timestamp_seconds", "gauge"),
    ("backlog_rows", "gauge"),
    ("oldest_stale_timestamp_seconds", "gauge"),
    ("backlog_bounded", "gauge"),
    ("consecutive_failures", "gauge"),
    ("unsweepable_rows", "gauge"),
    ("suspended", "gauge"),
    ("ready", "gauge"),
    ("period_seconds", "gauge"),
];

/// Every family of the process.
const PROCESS: [(&str, &str); 7] = [
    ("build", "info"),
    ("sweep_duration_seconds", "histogram"),
    ("schedule_lag_seconds", "histogram"),
    ("api_request_failures", "counter"),
    ("sweeps_in_flight", "gauge"),
    ("objects", "gauge"),
    ("leader", "gauge"),
];

/// The names of all samples that are exposed, but for those of histograms, with the prefix.
pub fn samples() -> BTreeSet<String> {
    families().map(named).collect()
}

/// Those of the process.
pub fn process_samples() -> BTreeSet<String> {
    PROCESS.into_iter().map(named).collect()
}

fn named((name, kind): (&str, &str)) -> String {
    let suffix = match kind {
        "counter" => "_total",
        "info" => "_info",
        _ => "",
    };
    format!("{PREFIX}{name}{suffix}")
}

/// Every family and its type.
fn families() -> impl Iterator<Item = (&'static str, &'static str)> {
    OBJECT.into_iter().chain(PROCESS)
}

/// A scrape: every sample by its name without the prefix and its labels, and every family with its type.
#[derive(Debug, Default)]
pub struct Scrape {
    samples: BTreeMap<(String, BTreeMap<String, String>), f64>,
    families: BTreeMap<String, String>,
}

impl Scrape {
    /// Reads an exposition as strictly as OpenMetrics says: HELP and TYPE before the samples of each family, nothing
    /// between them, nothing twice, and an end.
    fn read(text: &str) -> Result<Self, String> {
        let (mut scrape, mut family, mut help) = (Self::default(), None::<String>, None::<String>);
        let body = text.strip_suffix("# EOF\n").ok_or("no end")?;
        for line in body.lines() {
            let wrong = |what: &str| format!("{what}: {line}");
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, text) = rest.split_once(' ').ok_or_else(|| wrong("no help"))?;
                if text.trim().is_empty() || help.replace(name.to_owned()).is_some() {
                    return Err(wrong("help of nothing"));
                }
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').ok_or_else(|| wrong("no type"))?;
                if help.take().as_deref() != Some(name) {
                    return Err(wrong("a type without its help"));
                }
                let name = name.strip_prefix(PREFIX).ok_or_else(|| wrong("not of ours"))?;
                if scrape.families.insert(name.to_owned(), kind.to_owned()).is_some() {
                    return Err(wrong("a family twice"));
                }
                family = Some(name.to_owned());
            } else {
                let family =
                    family.as_ref().filter(|_| help.is_none()).ok_or_else(|| wrong("a sample of no family"))?;
                let (name, labels, value) = sample(line).ok_or_else(|| wrong("no sample"))?;
                let name = name.strip_prefix(PREFIX).ok_or_else(|| wrong("not of ours"))?;
                let suffix = name.strip_prefix(family.as_str()).ok_or_else(|| wrong("a sample of another family"))?;
                let suffixes: &[&str] = match scrape.families[family].as_str() {
                    "counter" => &["_total"],
                    "gauge" => &[""],
                    "histogram" => &["_bucket", "_sum", "_count"],
                    "info" => &["_info"],
                    _ => return Err(wrong("of no type")),
                };
                if !suffixes.contains(&suffix) || !value.is_finite() {
                    return Err(wrong("not of the type"));
                }
                if scrape.samples.insert((name.to_owned(), labels), value).is_some() {
                    return Err(wrong("a sample twice"));
                }
            }
        }
        Ok(scrape)
    }

    async fn of(log: &str) -> Result<Self, String> {
        Self::read(&probe(log, "/metrics").await?)
    }

    /// The value of a sample with just these labels.
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        self.samples.get(&(name.to_owned(), labels)).copied()
    }

    /// What the gauges of an object say.
    pub fn gauges(&self, operator: &Operator, name: &str) -> BTreeMap<&'static str, f64> {
        let labels = [("namespace", operator.namespace.as_str()), ("name", name)];
        let gauges = OBJECT.iter().filter(|(_, kind)| *kind == "gauge");
        gauges.filter_map(|(gauge, _)| Some((*gauge, self.value(gauge, &labels)?))).collect()
    }

    /// The attempts of an object that ended so.
    fn sweeps(&self, operator: &Operator, name: &str, outcome: &str, trigger: &str) -> Option<f64> {
        let labels = [("namespace", operator.namespace.as_str()), ("name", name)];
        self.value("sweeps_total", &[&labels[..], &[("outcome", outcome), ("trigger", trigger)]].concat())
    }

    /// The objects that have series.
    fn objects(&self) -> BTreeSet<&str> {
        self.samples.keys().filter_map(|(_, labels)| labels.get("name").map(String::as_str)).collect()
    }
}

/// A line as name, labels and value.
fn sample(line: &str) -> Option<(&str, BTreeMap<String, String>, f64)> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, labels) = match series.split_once('{') {
        None => (series, ""),
        Some((name, rest)) => (name, rest.strip_suffix('}')?),
    };
    // No value in these tests holds a comma or a quote.
    let labels: Option<Vec<_>> = labels
        .split_terminator(',')
        .map(|label| {
            let (key, value) = label.split_once('=')?;
            let value = value.strip_prefix('"')?.strip_suffix('"')?;
            Some((key.to_owned(), value.to_owned()))
        })
        .collect();
    let labels = labels?;
    let (count, labels) = (labels.len(), labels.into_iter().collect::<BTreeMap<_, _>>());
    (labels.len() == count).then_some((name, labels, value.parse().ok()?))
}

/// What the gauges of an object must say, given its status and its period.
fn expected(status: &Value, period: f64) -> BTreeMap<&'static str, f64> {
    let time = |value: &Value| value.as_str().map(|at| at.parse::<DateTime<Utc>>().unwrap().timestamp() as f64);
    let condition = |type_: &str| {
        let all = ["True", "False", "Unknown"];
        let conditions = status["conditions"].as_array().unwrap();
        let found = conditions.iter().find(|c| c["type"] == type_).unwrap();
        *all.iter().find(|status| found["status"] == **status).unwrap()
    };
    let flag = |type_: &str| if condition(type_) == "True" { 1.0 } else { 0.0 };
    let all = [
        ("last_success_timestamp_seconds", time(&status["lastSuccessfulTime"])),
        ("next_sweep_timestamp_seconds", time(&status["nextScheduleTime"])),
        ("backlog_rows", status["backlog"]["remaining"].as_f64()),
        ("oldest_stale_timestamp_seconds", time(&status["backlog"]["oldestTimeStarted"])),
        ("backlog_bounded", (condition("BacklogBounded") != "Unknown").then(|| flag("BacklogBounded"))),
        ("consecutive_failures", status["consecutiveFailures"].as_f64()),
        ("unsweepable_rows", Some(status["unsweepable"]["count"].as_f64().unwrap_or(0.0))),
        ("suspended", Some(flag("Suspended"))),
        ("ready", Some(flag("Ready"))),
        ("period_seconds", Some(period)),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

/// Waits until the metrics of an object say what its status says by then, and gives the scrape back.
pub async fn until_as_status(operator: &Operator, name: &str, period: f64) -> Scrape {
    eventually("the metrics to be as the status", WAIT_TIMEOUT, async || {
        let status = json!(operator.api().get(name).await.map_err(|error| error.to_string())?.status);
        let scrape = Scrape::of(&operator.log()).await?;
        let (found, expected) = (scrape.gauges(operator, name), expected(&status, period));
        if found == expected { Ok(scrape) } else { Err(format!("{found:?}, not {expected:?}")) }
    })
    .await
}

fn is_process(name: &str) -> bool {
    PROCESS.iter().any(|(process, _)| *process == name)
}

#[tokio::test]
async fn every_value_is_that_of_the_status_and_goes_with_the_object() {
    let (log, mut operator) = (AuditTable::new().await, Operator::new().await);
    log.start_many(3).await;
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "limit": 2, "period": "1h" })).await;
    operator.apply("bad", json!({ "table": "nowhere", "period": "2h" })).await;
    operator.apply("off", json!({ "suspend": true })).await;
    operator.until("app", "the first sweep", |s| has(s, "Ready=True/LimitReached")).await;
    operator.until("bad", "the failure", |s| has(s, "Ready=False/TableNotFound")).await;
    operator.until("off", "the acknowledgement", |s| has(s, "Suspended=True/Suspended")).await;

    until_as_status(&operator, "bad", 7200.0).await;
    until_as_status(&operator, "off", 600.0).await;
    let scrape = until_as_status(&operator, "app", 3600.0).await;
    // Not by accident all alike.
    let app = scrape.gauges(&operator, "app");
    assert_eq!((app["backlog_rows"], app["backlog_bounded"], app["ready"]), (1.0, 0.0, 1.0));
    assert!(scrape.gauges(&operator, "bad")["consecutive_failures"] >= 1.0);
    assert_eq!(scrape.gauges(&operator, "off")["suspended"], 1.0);

    let promised: BTreeMap<_, _> = families().map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect();
    assert_eq!(scrape.families, promised);
    assert_eq!(scrape.objects(), ["app", "bad", "off"].into());
    let namespace = operator.namespace.clone();
    let labels = [("namespace", namespace.as_str()), ("name", "app")];
    assert_eq!(scrape.value("rows_timed_out_total", &labels), Some(2.0));
    assert_eq!(scrape.sweeps(&operator, "app", "LimitReached", "Create"), Some(1.0));
    assert_eq!(scrape.sweeps(&operator, "app", "LimitReached", "Schedule"), Some(0.0));
    assert!(scrape.sweeps(&operator, "bad", "Failed", "Create") >= Some(1.0), "{scrape:?}");
    assert_eq!((scrape.value("leader", &[]), scrape.value("objects", &[])), (Some(1.0), Some(3.0)));
    assert_eq!(scrape.value("sweeps_in_flight", &[]), Some(0.0));
    assert!(scrape.value("sweep_duration_seconds_count", &[]) >= Some(1.0), "{scrape:?}");
    let build = scrape.samples.keys().find(|(name, _)| name == "build_info").unwrap();
    assert_eq!((build.1["version"].as_str(), build.1.len()), (env!("CARGO_PKG_VERSION"), 2));
    let text = probe(&operator.log(), "/metrics").await.unwrap();
    // Prometheus goes by it, and takes nothing without.
    let head = ask(&operator.log(), "/metrics").await.unwrap().to_lowercase();
    assert!(
        head.contains("\r\ncontent-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"),
        "{head}"
    );
    assert!(!text.contains(&log.database.password) && !text.contains("postgres"), "{text}");

    // One more by request, and the counts go on.
    output(operator.kubectl().args(["annotate", "als/app", "auditlog.dev/requestedAt=1"])).unwrap();
    operator.until("app", "the requested sweep", |s| s["totals"]["timedOut"] == json!(3)).await;
    let scrape = until_as_status(&operator, "app", 3600.0).await;
    assert_eq!(scrape.sweeps(&operator, "app", "Drained", "Request"), Some(1.0));
    assert_eq!(scrape.value("rows_timed_out_total", &labels), Some(3.0));

    // After a restart what the status says is there at once, and what this process did is nothing.
    operator.terminate().await;
    operator.start().await;
    let scrape = until_as_status(&operator, "app", 3600.0).await;
    assert_eq!(scrape.value("rows_timed_out_total", &labels), Some(0.0));
    assert_eq!(scrape.sweeps(&operator, "app", "Drained", "Request"), None);

    operator.api().delete("app", &DeleteParams::default()).await.unwrap();
    eventually("the series to go", WAIT_TIMEOUT, async || {
        let scrape = Scrape::of(&operator.log()).await?;
        let objects = scrape.value("objects", &[]) == Some(2.0);
        if objects && scrape.objects() == ["bad", "off"].into() { Ok(()) } else { Err(format!("{scrape:?}")) }
    })
    .await;
}

#[tokio::test]
async fn sweeps_in_flight_are_seen_and_slots_are_met() {
    let (log, operator) = (AuditTable::held(1, 20).await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "batchSize": 1, "period": "5s" })).await;
    log.until_swept(1).await;
    let scrape = Scrape::of(&operator.log()).await.unwrap();
    assert_eq!(scrape.value("sweeps_in_flight", &[]), Some(1.0), "{scrape:?}");
    assert_eq!(scrape.value("schedule_lag_seconds_count", &[]), Some(0.0), "the first is for the creation");
    log.release().await;
    eventually("a sweep of the schedule", WAIT_TIMEOUT, async || {
        let scrape = Scrape::of(&operator.log()).await?;
        let of_schedule = scrape.sweeps(&operator, "app", "Drained", "Schedule") >= Some(1.0);
        let counted = scrape.value("schedule_lag_seconds_count", &[]) >= Some(1.0);
        if of_schedule && counted { Ok(()) } else { Err(format!("{scrape:?}")) }
    })
    .await;
}

#[tokio::test]
async fn without_object_metrics_only_the_process_is_shown() {
    let (log, mut operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.start_with(&["--object-metrics=false"]).await;
    operator.apply("app", json!({})).await;
    operator.until("app", "the first sweep", |s| has(s, "Ready=True/Swept")).await;
    let scrape = Scrape::of(&operator.log()).await.unwrap();
    assert!(scrape.families.keys().all(|name| is_process(name)), "{scrape:?}");
    assert_eq!(scrape.families.len(), PROCESS.len());
    assert_eq!((scrape.value("leader", &[]), scrape.value("objects", &[])), (Some(1.0), Some(1.0)));
}

#[tokio::test]
async fn a_replica_that_does_not_lead_shows_no_object_until_it_does() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    let config = operator.kubeconfig(None).await;
    let start = |pod: &str| replica(pod, &config, &operator.scratch, &operator.namespace, &["--lease-duration=3s"]);
    let shown = |process: &Process, leads: f64, objects: BTreeSet<&'static str>| {
        let log = process.log_tail(usize::MAX);
        async move {
            let scrape = Scrape::of(&log).await?;
            let watched = scrape.value("objects", &[]) == Some(1.0);
            let right = watched && scrape.value("leader", &[]) == Some(leads) && scrape.objects() == objects;
            if right { Ok(()) } else { Err(format!("{scrape:?}")) }
        }
    };
    let first = start("a");
    operator.apply("app", json!({ "period": "1h" })).await;
    operator.until("app", "the first sweep", |s| has(s, "Ready=True/Swept")).await;
    eventually("the leader's series", WAIT_TIMEOUT, async || shown(&first, 1.0, ["app"].into()).await).await;
    let second = start("b");
    eventually("the other's lack of them", WAIT_TIMEOUT, async || shown(&second, 0.0, [].into()).await).await;
    drop(first);
    eventually("the takeover", WAIT_TIMEOUT, async || shown(&second, 1.0, ["app"].into()).await).await;
}

#[tokio::test]
async fn failed_api_requests_are_counted_by_operation() {
    let mut operator = Operator::absent().await;
    let accounts: kube::Api<k8s_openapi::api::core::v1::ServiceAccount> =
        kube::Api::namespaced(operator.client.clone(), &operator.namespace);
    let account = serde_json::from_value(json!({ "metadata": { "name": "nobody" } })).unwrap();
    accounts.create(&Default::default(), &account).await.unwrap();
    let token = operator.plane.service_account_token(&operator.namespace, "nobody").await.unwrap();
    operator.start_as(&token, &[]);
    eventually("the failures", WAIT_TIMEOUT, async || {
        let scrape = Scrape::of(&operator.log()).await?;
        let failed = |operation| scrape.value("api_request_failures_total", &[("operation", operation)]);
        let counted = failed("watch") >= Some(1.0) && failed("lease") >= Some(1.0);
        if counted && failed("get_secret") == Some(0.0) { Ok(()) } else { Err(format!("{scrape:?}")) }
    })
    .await;
}
