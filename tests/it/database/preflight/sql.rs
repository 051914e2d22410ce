//! Faults of table, columns, values, rights and row security that SQL fixes.

use audit_log_sweeper::api::Reason::{ColumnNotFound, PermissionDenied, RowRefused, RowSecurity, SchemaMismatch};
use audit_log_sweeper::preflight::Severity::{Blocking, Warning};
use audit_log_sweeper::preflight::Subject::{self, Complete, Constraints, Rights, Table};
use audit_log_sweeper::preflight::{Fix, RunAs};
use serde_json::json;

use super::{INDEX, PARTITIONED, Stage, TABLE, all_found_and_mended, fault};
use crate::fixtures::id;

#[tokio::test]
async fn children_foreign_partitions_and_rules() {
    let expected = (Table, Blocking, SchemaMismatch);
    all_found_and_mended([
        fault(&["CREATE TABLE child () INHERITS (audit_log)"], expected, "\"child\" inherits from the table"),
        fault(&["CREATE RULE log AS ON UPDATE TO audit_log DO ALSO NOTHING"], expected, "the rule \"log\""),
        fault(
            &["CREATE RULE r AS ON UPDATE TO audit_log WHERE OLD.note = 'x' DO INSTEAD NOTHING"],
            expected,
            "the rule",
        ),
    ])
    .await;

    // A unique index on the whole and a partition elsewhere shut each other out.
    let not_null = PARTITIONED
        .replace("id uuid, time_started timestamptz", "id uuid NOT NULL, time_started timestamptz NOT NULL")
        .replace(", PRIMARY KEY (id, time_started)", "");
    let stage = Stage::new(&format!("{not_null}; {INDEX}")).await;
    let foreign = "CREATE FOREIGN DATA WRAPPER elsewhere; CREATE SERVER s FOREIGN DATA WRAPPER elsewhere; \
                   CREATE FOREIGN TABLE far PARTITION OF p2 DEFAULT SERVER s";
    stage.admin.batch_execute(foreign).await.unwrap();
    let checked = stage.check(&json!({})).await;
    let [far, key] = checked.findings.as_slice() else { panic!("{checked:#?}") };
    assert_eq!((far.subject, far.severity, far.reason), expected);
    assert!(far.message.contains("\"far\" is a partition on another server"), "{}", far.message);
    assert_eq!(key.subject, Subject::Key);
    for found in [far, key] {
        stage.fix(found.fix.as_ref().unwrap()).await;
    }
    let fixed = stage.check(&json!({})).await;
    assert!(fixed.findings.is_empty(), "{fixed:#?}");
    stage.sweeps(&id(1), &json!({})).await.unwrap();
}

#[tokio::test]
async fn what_completes_a_row() {
    let kinds = "CREATE TYPE kind AS ENUM ('success', 'error'); ".to_owned()
        + &format!("{}; {INDEX}", TABLE.replace("result_kind text", "result_kind kind"));
    let mut missing =
        fault(&[], (Complete, Blocking, ColumnNotFound), "no column \"outcome\" (spec.complete[1]); it has \"id\"");
    missing.spec =
        json!({ "complete": [{ "column": "result_kind", "value": "x" }, { "column": "outcome", "value": "x" }] });
    let stage = Stage::new(&missing.table).await;
    let checked = stage.check(&missing.spec).await;
    assert_eq!(checked.findings.len(), 1, "{checked:#?}");
    assert!(checked.findings[0].message.contains(missing.says), "{checked:#?}");
    stage.fix(checked.findings[0].fix.as_ref().unwrap()).await;
    assert!(stage.check(&missing.spec).await.findings.is_empty());
    stage.sweeps(&id(1), &missing.spec).await.unwrap();

    all_found_and_mended([
        fault(&[], (Complete, Blocking, SchemaMismatch), "takes no value \"timeout\", only \"success\", \"error\"")
            .on(&kinds),
        fault(
            &["ALTER TABLE audit_log ADD CONSTRAINT old CHECK (note <> 'x') NOT VALID"],
            (Constraints, Warning, RowRefused),
            "\"old\" on \"public\".\"audit_log\" is NOT VALID",
        ),
    ])
    .await;
}

#[tokio::test]
async fn rights_that_are_missing() {
    let expected = (Rights, Blocking, PermissionDenied);
    all_found_and_mended([
        fault(&["REVOKE SELECT (id) ON audit_log FROM LOGIN"], expected, "lacks SELECT (\"id\") on"),
        fault(&["REVOKE SELECT (time_started) ON audit_log FROM LOGIN"], expected, "lacks SELECT (\"time_started\") on"),
        fault(&["REVOKE SELECT (time_completed) ON audit_log FROM LOGIN"], expected, "SELECT (\"time_completed\") on"),
        fault(&["REVOKE UPDATE (time_completed) ON audit_log FROM LOGIN"], expected, "UPDATE (\"time_completed\") on"),
        fault(&["REVOKE UPDATE (result_kind) ON audit_log FROM LOGIN"], expected, "lacks UPDATE (\"result_kind\") on"),
        fault(
            &["REVOKE ALL ON audit_log FROM LOGIN"],
            expected,
            "lacks SELECT (\"id\", \"time_started\", \"time_completed\"), UPDATE (\"time_completed\", \"result_kind\") on",
        ),
        fault(&["ALTER SCHEMA public OWNER TO TABLE_OWNER; REVOKE USAGE ON SCHEMA public FROM LOGIN, PUBLIC"], expected, "may not use the schema \"public\"").by_superuser(),
    ])
    .await;
}

#[tokio::test]
async fn row_security_that_would_hide_rows() {
    let stage = Stage::new(&format!("{TABLE}; {INDEX}; ALTER TABLE audit_log ENABLE ROW LEVEL SECURITY")).await;
    let checked = stage.check(&json!({})).await;
    let [found] = checked.findings.as_slice() else { panic!("{checked:#?}") };
    assert_eq!((found.subject, found.severity, found.reason), (Subject::RowSecurity, Blocking, RowSecurity));
    let Some(Fix::Sql(parts)) = &found.fix else { panic!("{found:#?}") };
    assert!(parts.len() == 1 && parts[0].run_as == RunAs::Superuser, "{found:#?}");
    // No policy helps: the sweep asks the server to refuse where one would apply.
    stage.log.run("CREATE POLICY all_rows ON audit_log USING (true)").await;
    stage.sweeps(&id(1), &json!({})).await.unwrap_err();
    assert_eq!(stage.check(&json!({})).await.findings.len(), 1);
    stage.fix(found.fix.as_ref().unwrap()).await;
    assert!(stage.check(&json!({})).await.findings.is_empty());
    stage.log.run("DELETE FROM audit_log").await;
    stage.sweeps(&id(2), &json!({})).await.unwrap();

    // The owner is exempt, unless it is forced.
    let mut stage = Stage::new(&format!("{TABLE}; {INDEX}; ALTER TABLE audit_log ENABLE ROW LEVEL SECURITY")).await;
    stage.uri = stage.log.database.uri();
    assert!(stage.check(&json!({})).await.findings.is_empty());
    stage.log.run("ALTER TABLE audit_log FORCE ROW LEVEL SECURITY").await;
    let checked = stage.check(&json!({})).await;
    let [found] = checked.findings.as_slice() else { panic!("{checked:#?}") };
    assert!(found.reason == RowSecurity && found.message.contains("also to its owner (FORCE)"), "{found:#?}");
    stage.fix(found.fix.as_ref().unwrap()).await;
    assert!(stage.check(&json!({})).await.findings.is_empty());
    stage.sweeps(&id(1), &json!({})).await.unwrap();
}
