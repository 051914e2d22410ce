//! The documents say what the code does: every name that an operator of the system may meet is in docs/operating.md.

use std::fs;

use audit_log_sweeper::api::conditions::{ConditionType, Reason};
use audit_log_sweeper::controller::notice::Notice;
use audit_log_sweeper::telemetry::metrics::Operation;
use support::tools::OLDEST;

use crate::fixtures::operator::chart;
use crate::metrics::samples;

fn document(name: &str) -> String {
    let path = format!("{}/docs/{name}", env!("CARGO_MANIFEST_DIR"));
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Fails unless each name is at the begin of a row of a table, as code.
fn assert_rows<'a>(text: &str, names: impl IntoIterator<Item = &'a str>) {
    let rows: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("| `")).collect();
    let missing: Vec<&str> = names
        .into_iter()
        .filter(|name| {
            let is_about = |row: &&&str| row.strip_prefix(name).is_some_and(|rest| rest.starts_with(['`', '{']));
            !rows.iter().any(|row| is_about(&row))
        })
        .collect();
    assert!(missing.is_empty(), "docs/operating.md has no row for {missing:?}");
}

#[test]
fn every_condition_reason_event_and_metric_is_explained() {
    let text = document("operating.md");
    assert_rows(&text, ConditionType::ALL.map(ConditionType::as_str));
    assert_rows(&text, Reason::ALL.iter().map(|reason| reason.as_str()));
    let events = text.split_once("## Events").and_then(|(_, rest)| rest.split_once("\n## ")).expect("events").0;
    assert_rows(events, Notice::REASONS);
    let metrics = samples();
    assert_rows(&text, metrics.iter().map(String::as_str));
    for operation in Operation::ALL {
        assert!(text.contains(&format!("`{}`", operation.as_str())), "{operation:?}");
    }
}

#[test]
fn every_alert_has_a_runbook_that_begins_with_what_to_type() {
    let text = document("operating.md");
    let rules = fs::read_to_string(chart().join("templates/prometheusrule.yaml")).unwrap();
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert_eq!(alerts.len(), 7);
    for alert in alerts {
        let (_, runbook) = text.split_once(&format!("\n### {alert}\n")).unwrap_or_else(|| panic!("no ### {alert}"));
        let first: Vec<&str> = runbook.lines().filter(|line| !line.is_empty()).take(2).collect();
        assert!(first[0] == "```console" && first[1].starts_with("$ "), "{alert}: {first:?}");
    }
}

#[test]
fn the_oldest_kubernetes_that_is_promised_is_the_one_that_is_tested() {
    let read = |file: &str| fs::read_to_string(format!("{}/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let in_chart = format!("kubeVersion: \">={OLDEST}.0-0\"\n");
    assert!(read("charts/audit-log-sweeper/Chart.yaml").contains(&in_chart), "{in_chart}");
    for file in ["README.md", "charts/audit-log-sweeper/README.md"] {
        assert!(read(file).contains(&format!("\nKubernetes {OLDEST} or newer")), "{file}");
    }
    assert!(read("README.md").contains(&format!("`cargo xtask test --kubernetes {OLDEST}`")));
    assert!(read("Cargo.toml").contains(&format!("\"v{}\"", OLDEST.replace('.', "_"))), "the types of k8s-openapi");
}

#[test]
fn documents_link_to_files_that_are_there() {
    let root = env!("CARGO_MANIFEST_DIR");
    for name in ["operating.md", "sql-contract.md", "design.md", "compare.md", "api.md"] {
        let text = document(name);
        let links = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link);
        for link in links.filter(|link| !link.starts_with("https://") && !link.starts_with('#')) {
            let path = format!("{root}/docs/{}", link.split('#').next().unwrap());
            assert!(fs::exists(&path).unwrap(), "{name} links to {link}");
        }
    }
}
