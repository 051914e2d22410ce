//! The alerts on series that promtool makes up: each fires, does not just below, ends, and lives through restarts.

use std::collections::BTreeSet;
use std::fs;

use serde_json::{Value, json};
use support::prometheus::promtool;
use support::scratch::Scratch;

use super::{alerts, rendered};

#[test]
fn every_alert_does_as_it_should() {
    let objects = rendered();
    let scratch = Scratch::new(None).unwrap();
    // JSON, which every reader of YAML reads.
    let groups = json!({ "groups": [{ "name": "rendered", "rules": alerts(&objects) }] });
    scratch.write("rules.yaml", groups.to_string(), None).unwrap();
    promtool(scratch.path(), &["check", "rules", "rules.yaml"], "").unwrap();

    let (mut fires, mut does_not) = (BTreeSet::new(), BTreeSet::new());
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/prometheus/alerts");
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let (name, text) = (entry.file_name().into_string().unwrap(), fs::read_to_string(entry.path()).unwrap());
        let tests: Value = serde_saphyr::from_str(&text).unwrap();
        let cases = tests["tests"].as_array().unwrap().iter();
        for case in cases.flat_map(|test| test["alert_rule_test"].as_array().unwrap()) {
            let expected = case["exp_alerts"].as_array().unwrap();
            let set = if expected.is_empty() { &mut does_not } else { &mut fires };
            set.insert(case["alertname"].as_str().unwrap().to_owned());
        }
        scratch.write(&name, text, None).unwrap();
        promtool(scratch.path(), &["test", "rules", &name], "").unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let all: BTreeSet<String> =
        alerts(&objects).iter().map(|rule| rule["alert"].as_str().unwrap().to_owned()).collect();
    assert_eq!((&fires, &does_not), (&all, &all));
}
