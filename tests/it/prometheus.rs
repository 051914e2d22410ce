//! The chart's alerts and dashboard with the real promtool and Prometheus, where they are installed: `cargo xtask test`
//! leaves this module out, aloud, where they are not.

mod live;
mod rules;

use std::process::Command;

use serde_json::Value;
use support::process::output;
use support::tools::Tools;

use crate::fixtures::operator::{RELEASE, chart};

/// What Helm renders of the chart with all that watches it.
pub fn rendered() -> Vec<Value> {
    let values = "metrics.serviceMonitor.enabled=true,metrics.serviceMonitor.interval=15s,\
                  metrics.serviceMonitor.labels.release=mine,metrics.prometheusRule.enabled=true,\
                  metrics.prometheusRule.labels.release=yours,metrics.prometheusRule.runbookUrl=https://docs/#,\
                  metrics.dashboard.enabled=true,metrics.dashboard.folder=Audit";
    let mut helm = Command::new(Tools::helm().unwrap());
    helm.args(["template", RELEASE.1, "-n", RELEASE.0, "--skip-tests"]).arg(chart()).args(["--set", values]);
    let text = output(&mut helm).unwrap();
    let objects = text.split("\n---\n").filter(|text| text.lines().any(|line| line.starts_with("kind:")));
    objects.map(|text| serde_saphyr::from_str(text).unwrap()).collect()
}

/// Of the rendered objects, the one of this kind.
pub fn of_kind<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    objects.iter().find(|object| object["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"))
}

/// The alerts that are rendered.
pub fn alerts(objects: &[Value]) -> &[Value] {
    of_kind(objects, "PrometheusRule")["spec"]["groups"][0]["rules"].as_array().unwrap()
}

/// The dashboard that is rendered.
pub fn dashboard(objects: &[Value]) -> Value {
    let json = &of_kind(objects, "ConfigMap")["data"]["audit-log-sweeper.json"];
    serde_json::from_str(json.as_str().unwrap()).unwrap()
}

/// Every query of the dashboard, with the variables as they are for all objects.
pub fn queries(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let queries = targets.map(|target| target["expr"].as_str().unwrap());
    // A variable's query is a function of Grafana's: label_values(METRIC, LABEL).
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let metrics = variables.iter().filter_map(|variable| variable["query"]["query"].as_str()).map(|query| {
        let inside = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')')).unwrap();
        inside.rsplit_once(", ").unwrap().0
    });
    let all = queries
        .chain(metrics)
        .map(|query| query.replace("$__rate_interval", "30s").replace("$namespace", ".*").replace("$name", ".*"));
    all.collect()
}

/// The metrics in an expression, each with its labels.
pub fn selectors(expression: &str) -> Vec<&str> {
    let starts = expression.match_indices(crate::metrics::PREFIX).map(|(at, _)| &expression[at..]);
    let selectors = starts.map(|rest| {
        let name = rest.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').unwrap_or(rest.len());
        let end = if rest[name..].starts_with('{') { rest.find('}').unwrap() + 1 } else { name };
        &rest[..end]
    });
    selectors.collect()
}
