//! The documents say what the code does: every name that an operator of the system may meet is in docs/operating.md, no
//! other is, and every command can be typed.

mod blocks;
mod commands;

use std::fs;
use std::path::Path;

use audit_log_sweeper::api::Reason;
use audit_log_sweeper::api::condition::ConditionType;
use audit_log_sweeper::controller::status::events::Event;
use audit_log_sweeper::telemetry::metrics::Operation;
use support::tools::OLDEST;

use crate::metrics::samples;
use crate::prometheus::{alerts, rendered};

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
    assert_rows(events, Event::REASONS);
    let metrics = samples();
    assert_rows(&text, metrics.iter().map(String::as_str));
    for operation in Operation::ALL {
        assert!(text.contains(&format!("`{}`", operation.as_str())), "{operation:?}");
    }
}

#[test]
fn nothing_is_explained_that_is_not_there() {
    let text = document("operating.md");
    let rows = |section: &str| -> Vec<String> {
        let (_, rest) = text.split_once(&format!("\n## {section}\n")).unwrap_or_else(|| panic!("no ## {section}"));
        let rows = rest.split("\n## ").next().unwrap().lines().filter_map(|line| line.strip_prefix("| `"));
        rows.map(|row| row.split(['`', '{']).next().unwrap().to_owned()).collect()
    };
    let conditions = ConditionType::ALL.map(|type_| type_.as_str().to_owned());
    assert_eq!(sorted(rows("Conditions")), sorted(conditions.into()));
    assert_eq!(sorted(rows("Reasons")), sorted(Reason::ALL.iter().map(|reason| reason.as_str().to_owned()).collect()));
    assert_eq!(sorted(rows("Events")), sorted(Event::REASONS.map(str::to_owned).into()));
    assert_eq!(sorted(rows("Metrics")), samples().into_iter().collect::<Vec<_>>());
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names
}

#[test]
fn every_alert_has_a_runbook_that_begins_with_what_to_type() {
    let (text, objects) = (document("operating.md"), rendered());
    let section = text.split_once("\n## Alerts\n").and_then(|(_, rest)| rest.split("\n## ").next()).expect("alerts");
    let runbooks: Vec<&str> = section.split("\n### ").skip(1).collect();
    let headings: Vec<&str> = runbooks.iter().filter_map(|runbook| runbook.lines().next()).collect();
    let names: Vec<&str> = alerts(&objects).iter().map(|rule| rule["alert"].as_str().unwrap()).collect();
    assert_eq!(headings, names);
    for runbook in runbooks {
        let first: Vec<&str> = runbook.lines().skip(1).filter(|line| !line.is_empty()).take(2).collect();
        assert!(first[0] == "```console" && first[1].starts_with("$ kubectl "), "{first:?}");
    }
    // What the annotation of an alert leads to, as Markdown's readers make it from the heading.
    for rule in alerts(&objects) {
        let (url, name) = (rule["annotations"]["runbook_url"].as_str().unwrap(), rule["alert"].as_str().unwrap());
        assert_eq!(url.split_once('#').unwrap().1, name.to_lowercase());
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
fn the_tests_of_the_threat_model_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.join("tests/it"), root.join("src")];
    let mut tests = String::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => tests.push_str(&fs::read_to_string(&path).unwrap_or_default()),
            }
        }
    }
    let text = document("threat-model.md");
    let named = text.lines().filter_map(|line| line.strip_suffix("` |")).filter_map(|line| line.rsplit_once('`'));
    let named: Vec<&str> = named.map(|(_, name)| name).collect();
    assert!(named.len() > 20, "{named:?}");
    for name in named {
        assert!(
            tests.contains(&format!("fn {name}()")),
            "the threat model names the test {name}, which does not exist"
        );
    }
}

#[test]
fn documents_link_to_files_that_are_there() {
    let root = env!("CARGO_MANIFEST_DIR");
    let files = [
        "using.md",
        "threat-model.md",
        "operating.md",
        "sql-contract.md",
        "design.md",
        "compare.md",
        "api.md",
        "../README.md",
    ];
    for name in files {
        let text = document(name);
        let links = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link);
        for link in links.filter(|link| !link.starts_with("https://") && !link.starts_with('#')) {
            let folder = if name.starts_with("../") { root.to_owned() } else { format!("{root}/docs") };
            let path = format!("{folder}/{}", link.split('#').next().unwrap());
            assert!(fs::exists(&path).unwrap(), "{name} links to {link}");
        }
    }
}
