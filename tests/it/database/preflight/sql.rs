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

#[tokio::test]
async fn what_else_keeps_the_server_from_an_update() {
    // Publications belong to the database, and an extension's schema to the role that made it.
    let published = TABLE.replace("id uuid PRIMARY KEY", "id uuid NOT NULL UNIQUE");
    all_found_and_mended([fault(
        &["CREATE PUBLICATION changes FOR ALL TABLES"],
        (Table, Blocking, SchemaMismatch),
        "the updates of \"public\".\"audit_log\" are published, and it has no replica identity",
    )
    .on(&format!("{published}; {INDEX}"))
    .by_superuser()])
    .await;
    let log = crate::fixtures::AuditTable::empty().await;
    log.run(&format!(
        "CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext; {}; {INDEX}",
        TABLE.replace("id uuid", "id ext.citext")
    ))
    .await;
    let stage = Stage::bare(log).await;
    for found in stage.check(&json!({})).await.findings {
        stage.fix(found.fix.as_ref().unwrap()).await;
    }
    let fixed = stage.check(&json!({})).await;
    assert!(fixed.findings.is_empty(), "{fixed:#?}");
    stage.sweeps("A", &json!({})).await.unwrap();
}

#[tokio::test]
async fn a_domain_that_refuses_null_is_not_null() {
    let domain = TABLE.replace("time_started timestamptz NOT NULL", "time_started moment");
    let stage = Stage::new(&format!("CREATE DOMAIN moment AS timestamptz NOT NULL; {domain}; {INDEX}")).await;
    assert!(stage.check(&json!({})).await.findings.is_empty());
}

#[tokio::test]
async fn complete_rows_can_be_made_immutable_and_no_sweep_calls_the_function() {
    let immutable = include_str!("../../../../manifests/sql/immutable.sql");
    let stage = Stage::new(&format!("{TABLE}; {INDEX}")).await;
    let seen = |checked: &audit_log_sweeper::preflight::PreflightReport| {
        assert!(checked.findings.is_empty(), "{checked:#?}");
        checked.passed.iter().find(|(subject, _)| *subject == Subject::Triggers).unwrap().1.clone()
    };
    let before = seen(&stage.check(&json!({})).await);
    assert!(before.contains("nothing keeps the application from changing complete rows"), "{before}");
    for _ in 0..2 {
        stage.log.run(immutable).await;
    }
    let after = seen(&stage.check(&json!({})).await);
    assert!(after.contains("\"audit_log_complete_is_final\" keeps complete rows as they are"), "{after}");
    stage
        .admin
        .batch_execute(&format!(
            "ALTER ROLE {} SET track_functions = 'all'; ALTER ROLE {} SET track_functions = 'all'",
            stage.login, stage.log.database.user
        ))
        .await
        .unwrap();
    let application = stage.log.database.client().await.unwrap();
    application
        .batch_execute(&format!("INSERT INTO audit_log (id, time_started) VALUES ('{}', now())", id(1)))
        .await
        .unwrap();
    let complete = format!(
        "UPDATE audit_log SET time_completed = clock_timestamp(), result_kind = 'success' WHERE id = '{}'",
        id(1)
    );
    application.batch_execute(&complete).await.unwrap();
    stage.sweeps(&id(2), &json!({})).await.unwrap();
    let calls =
        "SELECT coalesce((SELECT calls FROM pg_stat_user_functions WHERE funcname = 'audit_log_refuse_change'), 0)";
    // Sessions hand in their statistics when they end.
    drop(application);
    tokio::time::sleep(std::time::Duration::from_millis(700)).await;
    assert_eq!(stage.log.query(calls).await, ["0"]);
    for late in [complete.clone(), format!("UPDATE audit_log SET note = 'x' WHERE id = '{}'", id(2))] {
        let refused = stage.log.client.batch_execute(&late).await.unwrap_err();
        assert_eq!(refused.code().unwrap().code(), "23001", "{late}");
    }
    stage.log.run(&format!("DELETE FROM audit_log WHERE id = '{}'", id(1))).await;
}
