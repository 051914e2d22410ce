//! The preflight as a whole: what passes, hostile names, old and other servers, a pooler, and that nothing is changed.

use audit_log_sweeper::api::Reason;
use audit_log_sweeper::preflight::{self, Fix, Severity, Subject};
use audit_log_sweeper::sweep::sweep;
use serde_json::json;
use support::bouncer::Bouncer;
use support::leaks::MARKER;
use support::postgres::{PostgresOptions, PostgresServer, Shutdown};
use tokio_util::sync::CancellationToken;

use super::{INDEX, PARTITIONED, Stage, TABLE};
use crate::fixtures::{AuditTable, id};

#[tokio::test]
async fn the_shipped_sql_is_all_that_is_needed_also_when_run_again() {
    let stage = Stage::bare(AuditTable::new().await).await;
    let empty = stage.check(&json!({})).await;
    assert!(!empty.ready() && empty.findings.iter().all(|found| found.subject == Subject::Rights), "{empty:#?}");
    for _ in 0..2 {
        stage.log.create().await;
        stage.admin.batch_execute(include_str!("../../../../manifests/sql/role.sql")).await.unwrap();
    }
    stage.admin.batch_execute(&format!("GRANT audit_log_sweeper TO {}", stage.login)).await.unwrap();
    let checked = stage.check(&json!({})).await;
    assert!(checked.findings.is_empty(), "{checked:#?}");
    assert_eq!(checked.passed.iter().map(|(subject, _)| *subject).collect::<Vec<_>>(), Subject::LOOKED_AT);
    let major = support::postgres::shared().version().split('.').next().unwrap();
    assert!(checked.server_version.unwrap().starts_with(&format!("{major}.")));
    stage.log.start(1, "2 h").await;
    assert_eq!(sweep(&stage.job(json!({})), &CancellationToken::new()).await.timed_out, 1);
}

#[tokio::test]
async fn keys_of_every_type_that_passes_are_swept_in_order() {
    let keys = [
        ("uuid", "md5(n::text)::uuid"),
        ("bigint", "-n"),
        ("int", "-n"),
        ("smallint", "-n"),
        ("text", "'a ' || n"),
        ("varchar(40)", "'a ' || n"),
        ("text COLLATE \"POSIX\"", "'a ' || n"),
    ];
    for (key, value) in keys {
        let stage = Stage::new(&format!("{}; {INDEX}", TABLE.replace("id uuid", &format!("id {key}")))).await;
        let checked = stage.check(&json!({})).await;
        assert!(checked.findings.is_empty(), "{key}: {checked:#?}");
        stage
            .log
            .run(&format!("INSERT INTO audit_log SELECT {value}, '2020-01-01' FROM generate_series(1, 7) AS n"))
            .await;
        let first = stage.log.query("SELECT id FROM audit_log ORDER BY time_started, id LIMIT 5").await;
        let job = stage.job(json!({ "batchSize": 2, "limit": 5 }));
        let report = sweep(&job, &CancellationToken::new()).await;
        assert_eq!((report.timed_out, report.end.err()), (5, None), "{key}");
        let swept = "SELECT id FROM audit_log WHERE time_completed IS NOT NULL ORDER BY time_started, id";
        assert_eq!(stage.log.query(swept).await, first, "{key}");
    }
}

#[tokio::test]
async fn partitions_pass_and_so_does_a_single_partition() {
    let stage = Stage::new(&format!("{PARTITIONED}; {INDEX}; GRANT SELECT, UPDATE ON p2 TO PUBLIC")).await;
    for table in ["audit_log", "p2"] {
        let checked = stage.check(&json!({ "table": table })).await;
        assert!(checked.findings.is_empty(), "{table}: {checked:#?}");
    }
    // Rows go where the key says, so the key may be unique in each partition by itself.
    stage.sweeps(&id(1), &json!({})).await.unwrap();
}

#[tokio::test]
async fn hostile_names_are_found_and_mended_like_any_other() {
    let log = AuditTable::empty().await;
    let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let (schema, table) = ("Au\"dit.AuditTable; --", "select \"*\" from $$x$$ %I \\ \n'; --");
    let (key, started, completed, kind) = ("Key\"; --", "Time.Started", "completed 'at' \\", "Kind\n--");
    let (s, t) = (quoted(schema), quoted(table));
    let all = [key, started, completed, kind].map(quoted);
    let [k, st, c, ki] = &all;
    log.run(&format!(
        "CREATE SCHEMA {s}; CREATE TYPE {s}.{ki} AS ENUM ('it''s'); \
         CREATE TABLE {s}.{t} ({k} uuid, {st} timestamptz, {c} timestamptz, {ki} {s}.{ki}); \
         CREATE INDEX {k} ON {s}.{t} ({st}, {k}) WHERE {c} IS NOT NULL; \
         ALTER TABLE {s}.{t} ADD CONSTRAINT {k} CHECK (true) NOT VALID; ALTER TABLE {s}.{t} ENABLE ROW LEVEL SECURITY; \
         CREATE RULE {k} AS ON UPDATE TO {s}.{t} DO ALSO NOTHING; CREATE TABLE {s}.{st} () INHERITS ({s}.{t})"
    ))
    .await;
    let stage = Stage::bare(log).await;
    let renamed = format!("may \"sweep\"; -- {}", stage.login);
    stage
        .admin
        .batch_execute(&format!(
            "ALTER ROLE {0} RENAME TO {1}; ALTER ROLE {1} PASSWORD '{MARKER}'",
            stage.login,
            quoted(&renamed)
        ))
        .await
        .unwrap();
    let user: String = renamed.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let uri = stage.uri.replacen(&stage.login, &user, 1);
    let spec = json!({
        "schema": schema, "table": table,
        "columns": { "id": key, "timeStarted": started, "timeCompleted": completed },
        "complete": [{ "column": kind, "value": "timed \"out\" \\ '; --" }],
    });
    let job = stage.log.job_at(&uri, spec);
    let checked = preflight::check(&job.plan, &job.target).await.unwrap();
    let found: Vec<Subject> = checked.findings.iter().map(|found| found.subject).collect();
    use Subject::{Complete, Constraints, Index, Key, Rights, RowSecurity, Table};
    assert_eq!(
        found,
        [Table, Table, Key, Key, Key, Complete, Index, Rights, Rights, RowSecurity, Constraints],
        "{checked:#?}"
    );
    for found in &checked.findings {
        stage.fix(found.fix.as_ref().unwrap()).await;
    }
    let fixed = preflight::check(&job.plan, &job.target).await.unwrap();
    assert!(fixed.findings.is_empty(), "{fixed:#?}");
    stage.log.run(&format!("INSERT INTO {s}.{t} VALUES ('{}', '2020-01-01')", id(1))).await;
    assert_eq!(sweep(&job, &CancellationToken::new()).await.timed_out, 1);
}

#[tokio::test]
async fn triggers_are_told_and_mended_by_nobody() {
    let body = "FOR EACH ROW EXECUTE FUNCTION f()";
    let stage = Stage::new(&format!(
        "{TABLE}; {INDEX}; CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$; \
         CREATE TRIGGER unfit BEFORE UPDATE OF note ON audit_log {body}; CREATE TRIGGER i BEFORE INSERT ON audit_log {body}; \
         CREATE TRIGGER off BEFORE UPDATE ON audit_log {body}; ALTER TABLE audit_log DISABLE TRIGGER off; \
         CREATE TRIGGER later AFTER UPDATE ON audit_log {body}"
    ))
    .await;
    let checked = stage.check(&json!({})).await;
    assert!(checked.findings.is_empty(), "{checked:#?}");
    let seen = checked.passed.iter().find(|(subject, _)| *subject == Subject::Triggers).unwrap();
    assert!(seen.1.starts_with("\"later\"; what they write to"), "{seen:?}");
    for of in ["", "OF time_completed", "OF note, result_kind"] {
        stage.log.run(&format!("CREATE TRIGGER x BEFORE UPDATE {of} ON audit_log {body}")).await;
        let checked = stage.check(&json!({})).await;
        let [found] = checked.findings.as_slice() else { panic!("{of}: {checked:#?}") };
        assert_eq!((found.subject, found.severity, &found.fix), (Subject::Triggers, Severity::Warning, &None));
        assert!(found.message.contains("the trigger \"x\" runs \"f\""), "{}", found.message);
        assert!(checked.ready());
        stage.log.run("DROP TRIGGER x ON audit_log").await;
    }
}

#[tokio::test]
async fn nothing_is_changed_and_no_row_is_locked() {
    let stage = Stage::new(&format!("{TABLE}; {INDEX}")).await;
    // Older than any time that a plan may be asked for.
    stage.log.run(&format!("INSERT INTO audit_log (id, time_started) VALUES ('{}', '1990-01-01')", id(1))).await;
    let snapshot = async || {
        let mut all = vec![];
        for rows in [
            "audit_log",
            // Without what vacuum and analyze write in place.
            "(SELECT oid, relname, relnamespace, relowner, relkind, relhasindex, relchecks, relacl, reloptions, xmin, xmax, ctid FROM pg_class)",
            "pg_attribute",
            "pg_index",
            "pg_constraint",
            "pg_namespace",
            "pg_trigger",
            // Shared by all databases.
            "(SELECT *, xmin, xmax, ctid FROM pg_db_role_setting WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()))",
        ] {
            let sql = format!(
                "SELECT count(*), md5(string_agg(t::text || t.xmin || t.xmax || t.ctid, ',' ORDER BY t.ctid)) FROM {rows} AS t"
            );
            all.push((rows, stage.log.query(&sql).await));
        }
        all
    };
    // What vacuum and analyze would change, they must have changed before.
    stage.log.run("ALTER TABLE audit_log SET (autovacuum_enabled = off)").await;
    let before = snapshot().await;
    for _ in 0..3 {
        assert!(stage.check(&json!({})).await.ready());
    }
    assert_eq!(snapshot().await, before);
    let locks = "SELECT locktype, mode FROM pg_locks WHERE relation = 'audit_log'::regclass";
    assert!(stage.log.query(locks).await.is_empty());
}

#[tokio::test]
async fn a_standby_a_read_only_database_and_no_database() {
    let mut server = PostgresServer::start(PostgresOptions::default()).await.unwrap();
    let log = AuditTable::on(&server).await;
    // Straight to the server: a pooler answers for one that is gone.
    let job = log.job_at(&log.database.uri(), json!({}));
    // A sweep asks for read and write by itself.
    log.run(&format!("ALTER DATABASE {} SET default_transaction_read_only = on", log.database.name)).await;
    assert!(preflight::check(&job.plan, &job.target).await.unwrap().findings.is_empty());
    let admin = server.connect("postgres").await.unwrap();
    admin.batch_execute("COPY (SELECT) TO PROGRAM 'cat > standby.signal'").await.unwrap();
    server.restart(Shutdown::Fast).await.unwrap();
    let checked = preflight::check(&job.plan, &job.target).await.unwrap();
    let [found] = checked.findings.as_slice() else { panic!("{checked:#?}") };
    assert_eq!((found.subject, found.reason), (Subject::Server, Reason::NotPrimary));
    assert_eq!(found.fix, Some(Fix::Field("spec.database.secretRef".into())));
    assert!(checked.blocking().is_some());
    server.stop(Shutdown::Fast).unwrap();
    let error = preflight::check(&job.plan, &job.target).await.unwrap_err();
    assert_eq!(error.reason(), Reason::DatabaseUnreachable);
}

#[tokio::test]
async fn a_table_that_is_locked_is_an_error_and_not_a_finding() {
    let log = AuditTable::new().await;
    let job = log.job(json!({}));
    let mut other = log.database.client().await.unwrap();
    let transaction = other.transaction().await.unwrap();
    transaction.batch_execute("LOCK TABLE audit_log").await.unwrap();
    let error = preflight::check(&job.plan, &job.target).await.unwrap_err();
    assert_eq!(error.reason(), Reason::TableLocked, "{error}");
    transaction.rollback().await.unwrap();
    assert!(preflight::check(&job.plan, &job.target).await.unwrap().ready());
}

#[tokio::test]
#[ignore = "needs PgBouncer (Debian and Ubuntu: apt-get install pgbouncer)"]
async fn through_a_pooler_and_leaves_no_setting_behind() {
    let log = AuditTable::new().await;
    let bouncer = Bouncer::start(&log.database, 1).await.unwrap();
    let job = log.job_at(&bouncer.uri(), json!({}));
    let client = bouncer.client().await.unwrap();
    let settings = async || {
        let mut shown = vec![];
        for setting in ["statement_timeout", "search_path", "enable_seqscan"] {
            let answer = client.simple_query(&format!("SHOW {setting}")).await.unwrap();
            shown.extend(answer.iter().find_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                _ => None,
            }));
        }
        shown
    };
    let before = settings().await;
    assert_eq!(before.len(), 3, "{before:?}");
    for _ in 0..2 {
        assert!(preflight::check(&job.plan, &job.target).await.unwrap().findings.is_empty());
    }
    assert_eq!(settings().await, before);
}
