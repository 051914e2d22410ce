//! Tables, partitions, schemas and databases that belong to different roles: the SQL names who runs what, and runs.

use audit_log_sweeper::api::Reason::{ColumnNotFound, IndexMissing, PermissionDenied, SchemaMismatch};
use audit_log_sweeper::preflight;
use audit_log_sweeper::preflight::Severity::{Blocking, NotReady};
use audit_log_sweeper::preflight::Subject::{Complete, Index, Key, Rights, Table};
use audit_log_sweeper::preflight::{Finding, Fix, PreflightReport, RunAs};
use serde_json::json;

use super::{INDEX, PARTITIONED, Stage, TABLE, all_found_and_mended, fault, quoted};
use crate::fixtures::id;

/// The schema is another's, as `public` is from PostgreSQL 15 on where the table's owner does not own the database.
const NO_CREATE: &str = "ALTER SCHEMA public OWNER TO postgres; REVOKE ALL ON SCHEMA public FROM PUBLIC, TABLE_OWNER; \
                         GRANT USAGE ON SCHEMA public TO LOGIN, TABLE_OWNER";

#[tokio::test]
async fn an_owner_who_may_create_nothing_in_the_schema() {
    all_found_and_mended([
        fault(&[NO_CREATE, "DROP INDEX sweep_index"], (Index, NotReady, IndexMissing), "no valid index").by_superuser(),
        fault(
            &[NO_CREATE, "ALTER TABLE audit_log DROP CONSTRAINT audit_log_pkey"],
            (Key, Blocking, SchemaMismatch),
            "no valid unique index",
        )
        .by_superuser(),
        fault(&[NO_CREATE, "DROP INDEX sweep_index"], (Index, NotReady, IndexMissing), "no valid index")
            .on(&format!("{PARTITIONED}; {INDEX}"))
            .by_superuser(),
        // What alters a column needs no such right.
        fault(
            &[NO_CREATE, "ALTER TABLE audit_log ALTER time_started DROP NOT NULL"],
            (Key, Blocking, SchemaMismatch),
            "\"time_started\" may be NULL",
        )
        .by_superuser(),
        // Without USAGE the owner cannot even name the table.
        fault(
            &["ALTER SCHEMA public OWNER TO postgres; REVOKE ALL ON SCHEMA public FROM PUBLIC, TABLE_OWNER; \
                 GRANT USAGE ON SCHEMA public TO LOGIN; REVOKE UPDATE (result_kind) ON audit_log FROM LOGIN"],
            (Rights, Blocking, PermissionDenied),
            "lacks UPDATE",
        )
        .by_superuser(),
    ])
    .await;
    // Who runs what is told apart.
    let stage = Stage::new(TABLE).await;
    let owner = &stage.log.database.user;
    stage.admin.batch_execute(&NO_CREATE.replace("LOGIN", &stage.login).replace("TABLE_OWNER", owner)).await.unwrap();
    let checked = stage.check(&json!({})).await;
    let [Finding { fix: Some(Fix::Sql(parts)), .. }] = checked.findings.as_slice() else { panic!("{checked:#?}") };
    assert_eq!(parts[0].run_as, RunAs::SchemaOwner("postgres".into()));
    assert_eq!(parts[0].statements, [format!("GRANT CREATE ON SCHEMA \"public\" TO \"{owner}\"")]);
    assert_eq!((parts.len(), &parts[1].run_as), (2, &RunAs::Owner(owner.clone())));
    let line = checked.findings[0].in_one_line();
    assert!(line.contains("run as postgres, who owns the schema, or a superuser: GRANT CREATE"), "{line}");
    assert!(line.contains(&format!("; then run as {owner}: CREATE INDEX")), "{line}");
}

/// Three owners and a schema that only one of them may use.
async fn of_three(table: &str) -> (Stage, [String; 2]) {
    let stage = Stage::new(table).await;
    let user = &stage.log.database.user;
    let roles = [format!("{user} Second.\"owner\""), format!("{user}_third")];
    let [second, third] = [quoted(&roles[0]), quoted(&roles[1])];
    stage
        .admin
        .batch_execute(&format!(
            "CREATE ROLE {second}; CREATE ROLE {third}; CREATE SCHEMA \"Else.where\" AUTHORIZATION {third}; \
             ALTER TABLE p1 SET SCHEMA \"Else.where\"; ALTER TABLE \"Else.where\".p1 OWNER TO {second}; \
             ALTER TABLE p2 OWNER TO {third}; ALTER TABLE p2a OWNER TO {second}"
        ))
        .await
        .unwrap();
    (stage, roles)
}

async fn all_mended(stage: &Stage, spec: &serde_json::Value, expected: usize) -> PreflightReport {
    let checked = stage.check(spec).await;
    assert_eq!(checked.findings.len(), expected, "{checked:#?}");
    for found in &checked.findings {
        stage.fix(found.fix.as_ref().unwrap()).await;
    }
    let fixed = stage.check(spec).await;
    assert!(fixed.findings.is_empty(), "{checked:#?} {fixed:#?}");
    checked
}

#[tokio::test]
async fn partitions_of_several_owners_and_schemas() {
    let table = PARTITIONED.replace(", PRIMARY KEY (id, time_started)", "");
    let (stage, roles) = of_three(&table).await;
    let spec = json!({ "complete": [{ "column": "outcome", "value": "x" }] });
    let checked = all_mended(&stage, &spec, 5).await;
    let subjects: Vec<_> = checked.findings.iter().map(|found| (found.subject, found.reason)).collect();
    let (mismatch, none) = (SchemaMismatch, ColumnNotFound);
    assert_eq!(subjects, [(Key, mismatch), (Key, mismatch), (Key, mismatch), (Complete, none), (Index, IndexMissing)]);
    let Some(Fix::Sql(parts)) = &checked.findings[0].fix else { panic!("{checked:#?}") };
    let RunAs::Owners(owners) = &parts[0].run_as else { panic!("{parts:#?}") };
    assert!(owners.len() == 3 && roles.iter().all(|role| owners.contains(role)), "{owners:?}");
    stage.sweeps(&id(1), &spec).await.unwrap();
}

#[tokio::test]
async fn what_hangs_on_another_owners_table_is_taken_off_by_who_may() {
    let stage = Stage::new(&format!("{TABLE}; {INDEX}; CREATE TABLE child () INHERITS (audit_log)")).await;
    let other = format!("{}_other", stage.log.database.user);
    let sql =
        format!("CREATE ROLE {other}; GRANT USAGE ON SCHEMA public TO {other}; ALTER TABLE child OWNER TO {other}");
    stage.admin.batch_execute(&sql).await.unwrap();
    let checked = all_mended(&stage, &json!({}), 1).await;
    assert_eq!(checked.findings[0].subject, Table);

    // A CHECK of a partition alone.
    let (stage, _) = of_three(&format!("{PARTITIONED}; {INDEX}")).await;
    let check = "ALTER TABLE \"Else.where\".p1 ADD CONSTRAINT old CHECK (note <> 'x') NOT VALID";
    stage.admin.batch_execute(check).await.unwrap();
    all_mended(&stage, &json!({}), 1).await;

    // A partition elsewhere below a partition of another's.
    let not_null = PARTITIONED
        .replace("id uuid, time_started timestamptz", "id uuid NOT NULL, time_started timestamptz NOT NULL")
        .replace(", PRIMARY KEY (id, time_started)", "");
    let (stage, _) = of_three(&format!("{not_null}; {INDEX}")).await;
    let foreign = "CREATE FOREIGN DATA WRAPPER elsewhere; CREATE SERVER s FOREIGN DATA WRAPPER elsewhere; \
                   CREATE FOREIGN TABLE far PARTITION OF p2 DEFAULT SERVER s";
    stage.admin.batch_execute(foreign).await.unwrap();
    all_mended(&stage, &json!({}), 2).await;
    stage.sweeps(&id(1), &json!({})).await.unwrap();
}

#[tokio::test]
async fn a_login_that_may_not_connect_is_told_what_grants_it() {
    let stage = Stage::new(&format!("{TABLE}; {INDEX}")).await;
    let name = &stage.log.database.name;
    stage.admin.batch_execute(&format!("REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")).await.unwrap();
    // Straight to the server: a pooler has its own text.
    let job = stage.log.job_at(&stage.uri, json!({}));
    let error = preflight::check(&job.plan, &job.target).await.unwrap_err();
    assert_eq!(error.reason(), PermissionDenied);
    let text = error.to_string();
    assert!(text.contains("GRANT CONNECT ON DATABASE ... TO ...") && !text.contains("USAGE on the schema"), "{text}");
    stage.admin.batch_execute(&format!("GRANT CONNECT ON DATABASE {name} TO {}", stage.login)).await.unwrap();
    assert!(stage.check(&json!({})).await.findings.is_empty());
}
