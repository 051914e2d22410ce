//! The tables that frameworks make (`tests/frameworks`): checked, given what `check` prints, then swept.

use std::fs;
use std::path::Path;

use audit_log_sweeper::preflight::Severity;
use audit_log_sweeper::sweep::sweep;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::{Stage, quoted};
use crate::fixtures::AuditTable;

/// Each framework's name, DDL and part of a spec.
fn corpus() -> Vec<(String, String, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/frameworks");
    let mut names: Vec<String> = fs::read_dir(&folder)
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_suffix(".sql").map(str::to_owned))
        .collect();
    names.sort();
    assert!(names.len() >= 10, "{names:?}");
    let read = |name: &str, kind: &str| fs::read_to_string(folder.join(format!("{name}.{kind}"))).unwrap();
    let case = |name: String| {
        let (ddl, spec) = (read(&name, "sql"), serde_saphyr::from_str(&read(&name, "yaml")).unwrap());
        (name, ddl, spec)
    };
    names.into_iter().map(case).collect()
}

/// An INSERT of a row of this age that gives values to nothing else but what the table demands.
async fn insert(log: &AuditTable, table: &str, started: &str, age: &str) -> String {
    let demanded = log
        .query(&format!(
            "SELECT quote_ident(attname) || '|' || CASE atttypid::regtype::text WHEN 'jsonb' THEN '''{{}}''' \
               WHEN 'character varying' THEN '''x''' WHEN 'text' THEN '''x''' ELSE 'now()' END FROM pg_attribute \
             WHERE attrelid = '{table}'::regclass AND attnum > 0 AND attnotnull AND NOT atthasdef AND attidentity = '' \
               AND attname <> '{started}' ORDER BY attnum"
        ))
        .await;
    let (names, values): (Vec<&str>, Vec<&str>) = demanded.iter().map(|one| one.split_once('|').unwrap()).unzip();
    let is_local = log
        .query(&format!("SELECT atttypid = 'timestamp'::regtype FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attname = '{started}'"))
        .await;
    let zone = if is_local == ["t"] { " AT TIME ZONE 'UTC'" } else { "" };
    format!(
        "INSERT INTO {table} ({}) VALUES ({})",
        [&[quoted(started).as_str()], names.as_slice()].concat().join(", "),
        [&[format!("(clock_timestamp() - interval '{age}'){zone}").as_str()], values.as_slice()].concat().join(", ")
    )
}

#[tokio::test]
async fn each_table_is_swept_with_what_check_prints_for_it() {
    for (name, ddl, spec) in corpus() {
        let log = AuditTable::empty().await;
        log.run(&ddl).await;
        let stage = Stage::bare(log).await;
        let columns = &spec["columns"];
        let column = |field: &str, default: &str| columns[field].as_str().unwrap_or(default).to_owned();
        let (id, started) = (column("id", "id"), column("timeStarted", "time_started"));
        let completed = column("timeCompleted", "time_completed");
        let table = quoted(spec["table"].as_str().unwrap_or("audit_log"));
        // Nothing but SQL is in the way, and nothing but that SQL is run.
        let checked = stage.check(&spec).await;
        for found in checked.findings.iter().filter(|found| found.severity != Severity::Warning) {
            stage.fix(found.fix.as_ref().unwrap_or_else(|| panic!("{name}: {found:#?}"))).await;
        }
        let fixed = stage.check(&spec).await;
        assert!(fixed.ready(), "{name}: {fixed:#?}");
        for age in ["3 h", "2 h", "59 min", "0"] {
            stage.log.run(&insert(&stage.log, &table, &started, age).await).await;
        }
        let stale = stage
            .log
            .query(&format!("SELECT {} FROM {table} ORDER BY {} LIMIT 2", quoted(&id), quoted(&started)))
            .await;
        let report = sweep(&stage.job(spec.clone()), &CancellationToken::new()).await;
        assert_eq!((report.timed_out, report.end.clone().err()), (2, None), "{name}: {report:?}");
        let (set, value) = match &spec["complete"][0] {
            Value::Null => ("result_kind", "timeout"),
            item => (item["column"].as_str().unwrap(), item["value"].as_str().unwrap()),
        };
        let completed = quoted(&completed);
        let zone = format!(
            "CASE WHEN pg_typeof({completed})::text LIKE '%without%' THEN {completed}::timestamp AT TIME ZONE 'UTC' ELSE {completed}::timestamptz END"
        );
        let swept = format!(
            "SELECT {} FROM {table} WHERE {}::text = '{value}' AND {zone} BETWEEN clock_timestamp() - interval '1 min' AND clock_timestamp() ORDER BY {}",
            quoted(&id),
            quoted(set),
            quoted(&started)
        );
        assert_eq!(stage.log.query(&swept).await, stale, "{name}");
    }
}
