//! Columns of another type: what is made of them and stops the SQL, defaults, time zones, and where there is no SQL.

use audit_log_sweeper::api::Reason::SchemaMismatch;
use audit_log_sweeper::preflight::Severity::Blocking;
use audit_log_sweeper::preflight::Subject::Columns;
use audit_log_sweeper::preflight::{Finding, Fix};
use serde_json::json;

use super::{INDEX, PARTITIONED, Stage, TABLE};
use crate::fixtures::id;

/// A table whose start time, or another column, is of this type.
fn with(from: &str, to: &str) -> String {
    format!("{}; {INDEX}", TABLE.replace(from, to))
}

async fn only_finding(stage: &Stage) -> Finding {
    let checked = stage.check(&json!({})).await;
    let [found] = checked.findings.as_slice() else { panic!("{checked:#?}") };
    assert_eq!((found.subject, found.reason), (Columns, SchemaMismatch), "{found:#?}");
    found.clone()
}

fn drop_first(found: &Finding) -> &[String] {
    let Some(Fix::Sql { drop_first, .. }) = &found.fix else { panic!("{found:#?}") };
    drop_first
}

#[tokio::test]
async fn what_stops_a_type_from_being_altered_is_listed_and_nothing_else_is() {
    let coarse = TABLE.replace("time_completed timestamptz", "time_completed timestamptz(0)");
    let body = "FOR EACH ROW EXECUTE FUNCTION f()";
    // What makes it, what it is called, and what takes it away.
    let mut dependants = vec![
        ("CREATE VIEW \"Shown\" AS SELECT * FROM audit_log", "view public.\"Shown\"", "DROP VIEW \"Shown\""),
        (
            "CREATE MATERIALIZED VIEW kept AS SELECT time_completed FROM audit_log",
            "materialized view public.kept",
            "DROP MATERIALIZED VIEW kept",
        ),
        (
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; \
             CREATE TRIGGER \"a t\" AFTER UPDATE OF time_completed ON audit_log FOR EACH ROW EXECUTE FUNCTION f()",
            "trigger \"a t\" on public.audit_log",
            "DROP TRIGGER \"a t\" ON audit_log",
        ),
        (
            "CREATE POLICY p ON audit_log USING (time_completed IS NULL)",
            "policy p on public.audit_log",
            "DROP POLICY p ON audit_log",
        ),
        (
            "CREATE RULE r AS ON INSERT TO audit_log WHERE NEW.time_completed IS NULL DO ALSO NOTHING",
            "rule r on public.audit_log",
            "DROP RULE r ON audit_log",
        ),
        (
            "ALTER TABLE audit_log ADD done bool GENERATED ALWAYS AS (time_completed IS NOT NULL) STORED",
            "generated column public.audit_log.done",
            "ALTER TABLE audit_log DROP done",
        ),
    ];
    let stage = Stage::new(&format!("{coarse}; {INDEX}")).await;
    let version: i32 = stage.log.query("SHOW server_version_num").await[0].parse().unwrap();
    if version >= 140_000 {
        dependants.push((
            "CREATE FUNCTION open() RETURNS bigint BEGIN ATOMIC SELECT count(*) FROM audit_log WHERE time_completed IS NULL; END",
            "function public.open()",
            "DROP FUNCTION open()",
        ));
    }
    if version >= 150_000 {
        dependants.push((
            "CREATE PUBLICATION pub FOR TABLE audit_log WHERE (time_completed IS NULL) WITH (publish = 'insert')",
            "publication relation public.audit_log in publication pub",
            "DROP PUBLICATION pub",
        ));
    }
    // None of these stops it.
    stage
        .log
        .run(&format!(
            "CREATE INDEX ON audit_log ((time_completed AT TIME ZONE 'UTC')) WHERE time_completed > '2020-01-01'; \
             ALTER TABLE audit_log ADD CHECK (time_completed > '2000-01-01'); CREATE STATISTICS s ON time_started, time_completed FROM audit_log; \
             CREATE FUNCTION g() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; \
             CREATE TRIGGER of_all AFTER INSERT ON audit_log {}; CREATE VIEW other AS SELECT note FROM audit_log; \
             CREATE TABLE rows (r audit_log)",
            body.replace("f()", "g()")
        ))
        .await;
    let found = only_finding(&stage).await;
    assert!(drop_first(&found).is_empty() && !found.message.contains("again"), "{found:#?}");
    // It stops what rewrites the table, such as a new generated column.
    stage.log.run("DROP TABLE rows").await;
    for (create, name, drop) in &dependants {
        stage.log.run(create).await;
        let found = only_finding(&stage).await;
        assert_eq!(drop_first(&found), [*name], "{found:#?}");
        assert!(found.message.contains("does not run as it is") && found.message.contains(name), "{}", found.message);
        assert!(found.in_one_line().contains(&format!("; to fix it, drop {name}, make them again")), "{found:#?}");
        // It is so.
        let Some(Fix::Sql { parts, .. }) = &found.fix else { panic!("{found:#?}") };
        stage.log.client.batch_execute(&parts[0].statements[0]).await.unwrap_err();
        stage.log.run(drop).await;
    }
    stage.fix(found.fix.as_ref().unwrap()).await;
    assert!(stage.check(&json!({})).await.findings.is_empty());
    stage.sweeps(&id(1), &json!({})).await.unwrap();
}

#[tokio::test]
async fn what_a_partition_has_of_its_own_stops_it_too() {
    let coarse = PARTITIONED.replace("time_completed timestamptz", "time_completed timestamptz(0)");
    let stage = Stage::new(&format!("{coarse}; {INDEX}; CREATE VIEW v AS SELECT time_completed FROM p2b")).await;
    let found = only_finding(&stage).await;
    assert_eq!(drop_first(&found), ["view public.v"]);
    // A partition has its columns from the table.
    stage.log.run("DROP VIEW v; GRANT SELECT, UPDATE ON p1 TO PUBLIC").await;
    let checked = stage.check(&json!({ "table": "p1" })).await;
    let found = &checked.findings[0];
    assert_eq!(found.fix, Some(Fix::Field("spec.columns.timeCompleted".into())), "{found:#?}");
    assert!(
        found.message.contains("has it from the table audit_log")
            || found.message.contains("from the table public.audit_log"),
        "{found:#?}"
    );
    let spec = json!({ "table": "p1", "complete": [{ "column": "none", "value": "x" }] });
    let checked = stage.check(&spec).await;
    let found = checked.findings.last().unwrap();
    assert_eq!(found.fix, Some(Fix::Field("spec.complete[0].column".into())), "{found:#?}");
    stage.fix(&only_finding(&stage).await.fix.unwrap()).await;
    assert!(stage.check(&json!({})).await.findings.is_empty());
}

#[tokio::test]
async fn another_kind_of_values_shuts_out_what_refers_to_them() {
    let table = with("id uuid", "id numeric CHECK (id > 0)");
    let stage = Stage::new(&format!(
        "{table}; CREATE TABLE part (of_log numeric REFERENCES audit_log); CREATE TABLE whole (rows audit_log[])"
    ))
    .await;
    let found = only_finding(&stage).await;
    assert_eq!(drop_first(&found), ["column public.whole.rows", "foreign key part_of_log_fkey on public.part"]);
    assert!(
        found.message.contains("it makes constraint audit_log_id_check on public.audit_log again and fails"),
        "{found:#?}"
    );
    stage.log.run("DROP TABLE part, whole; ALTER TABLE audit_log DROP CONSTRAINT audit_log_id_check").await;
    stage.fix(found.fix.as_ref().unwrap()).await;
    assert!(stage.check(&json!({})).await.findings.is_empty());
}

#[tokio::test]
async fn times_stay_what_they_are_whatever_the_zone_of_the_session() {
    for (type_, default, written, is) in [
        ("timestamp", "DEFAULT (now() AT TIME ZONE 'utc')", "2020-01-01 00:00", "2020-01-01 00:00"),
        ("timestamp", "DEFAULT now()", "2020-01-01 00:00", "2020-01-01 00:00"),
        ("date", "", "2020-01-01", "2020-01-01 00:00"),
        ("text", "DEFAULT now()::text", "2020-01-01T02:00:00+02", "2020-01-01 00:00"),
        ("varchar(40)", "", "2020-01-01 00:00", "2020-01-01 00:00"),
        ("moment", "", "2020-01-01 00:00+00", "2020-01-01 00:00"),
        ("moment", "DEFAULT now()", "2020-01-01 00:00+00", "2020-01-01 00:00"),
    ] {
        let column = with("time_started timestamptz NOT NULL", &format!("time_started {type_} NOT NULL {default}"));
        let stage = Stage::new(&format!("CREATE DOMAIN moment AS timestamptz; {column}")).await;
        stage.log.run("SET TimeZone = 'America/New_York'").await;
        stage.log.run(&format!("INSERT INTO audit_log (id, time_started) VALUES ('{}', '{written}')", id(1))).await;
        let found = only_finding(&stage).await;
        assert!(drop_first(&found).is_empty());
        assert_eq!(found.message.contains("UTC"), type_ != "moment", "{}", found.message);
        stage.fix(found.fix.as_ref().unwrap()).await;
        stage.log.run("SET TimeZone = 'America/New_York'").await;
        let kept = format!("SELECT time_started = '{is}+00' FROM audit_log");
        assert_eq!(stage.log.query(&kept).await, ["t"], "{type_} {default}");
        if !default.is_empty() {
            stage.log.run(&format!("INSERT INTO audit_log (id) VALUES ('{}')", id(2))).await;
            let now = format!(
                "SELECT abs(extract(epoch FROM now() - time_started)) < 600 FROM audit_log WHERE id = '{}'",
                id(2)
            );
            assert_eq!(stage.log.query(&now).await, ["t"], "{type_} {default}");
        }
        let fixed = stage.check(&json!({})).await;
        assert!(fixed.findings.is_empty(), "{type_}: {fixed:#?}");
    }
    // A key by a domain stays of its own kind.
    let stage = Stage::new(&format!("CREATE DOMAIN key AS uuid; {}", with("id uuid", "id key"))).await;
    stage.fix(&only_finding(&stage).await.fix.unwrap()).await;
    assert!(stage.check(&json!({})).await.findings.is_empty());
    assert_eq!(stage.log.query("SELECT pg_typeof(id) FROM audit_log RIGHT JOIN (SELECT) x ON true").await, ["uuid"]);
}

#[tokio::test]
async fn what_cannot_become_a_time_gets_no_sql() {
    let always = "GENERATED ALWAYS AS ('2020-01-01'::timestamp) STORED";
    for (type_, says) in [
        ("bigint", "PostgreSQL cannot turn the one into the other"),
        ("double precision", "PostgreSQL cannot turn the one into the other"),
        ("time", "PostgreSQL cannot turn the one into the other"),
        (&format!("timestamp {always}"), "the database generates it"),
    ] {
        let stage = Stage::new(&with("time_completed timestamptz", &format!("time_completed {type_}"))).await;
        let checked = stage.check(&json!({})).await;
        let found = &checked.findings[0];
        assert_eq!((found.subject, found.severity, found.reason), (Columns, Blocking, SchemaMismatch));
        assert!(found.message.contains(says), "{}", found.message);
        assert_eq!(found.fix, Some(Fix::Field("spec.columns.timeCompleted".into())));
    }
}

/// The columns of a typed table are those of its type: no ALTER of the table changes them.
#[tokio::test]
async fn a_table_of_a_type_is_altered_there() {
    let stage = Stage::new(
        "CREATE TYPE entry AS (id uuid, time_started timestamp, time_completed timestamptz(0)); \
         CREATE TABLE audit_log OF entry (id PRIMARY KEY, time_started NOT NULL); \
         CREATE INDEX sweep_index ON audit_log (time_started, id) WHERE num_nulls(time_completed) = 1; \
         ALTER TABLE audit_log NOT OF; ALTER TABLE audit_log ADD result_kind text; \
         ALTER TYPE entry ADD ATTRIBUTE result_kind text; ALTER TABLE audit_log OF entry",
    )
    .await;
    let checked = stage.check(&json!({})).await;
    let columns: Vec<_> = checked.findings.iter().filter(|finding| finding.subject == Columns).collect();
    assert_eq!(columns.len(), 2, "{checked:#?}");
    for finding in columns {
        assert!(matches!(finding.fix, Some(Fix::Field(_))), "{finding:#?}");
        assert!(finding.message.contains("has it from the type public.entry"), "{}", finding.message);
    }
}
