//! Faults of the index that a sweep reads, and of the key, on a table and on partitions.

use std::time::Duration;

use audit_log_sweeper::api::Reason::{IndexBloat, IndexMissing, IndexNotPrivate, SchemaMismatch};
use audit_log_sweeper::preflight::Fix;
use audit_log_sweeper::preflight::Severity::{Blocking, NotReady, Warning};
use audit_log_sweeper::preflight::Subject::{Index, Key, Statement};
use serde_json::json;
use support::wait::eventually;

use super::{INDEX, PARTITIONED, Stage, TABLE, all_found_and_mended, fault};

#[tokio::test]
async fn an_index_that_is_missing_or_does_not_serve() {
    let missing = (Index, NotReady, IndexMissing);
    let replaced = |by: &str| {
        // By the name that the new one would have.
        format!("DROP INDEX sweep_index; CREATE INDEX audit_log_open_by_time_started ON audit_log {by}")
    };
    all_found_and_mended([
        fault(&["DROP INDEX sweep_index"], missing, "no valid index on (\"time_started\", \"id\") WHERE"),
        fault(&[&replaced("(time_started, id)")], missing, "also holds every complete row"),
        fault(&[&replaced("(time_started, id) WHERE note IS NULL")], missing, "its WHERE is another"),
        fault(
            &[&replaced("(time_started, id) WHERE num_nulls(time_completed) = 1 AND note IS NULL")],
            missing,
            "its WHERE is another",
        ),
        fault(
            &[&replaced("(time_started) WHERE num_nulls(time_completed) = 1")],
            missing,
            "do not begin with these two",
        ),
        fault(
            &[&replaced("(time_started, note, id) WHERE num_nulls(time_completed) = 1")],
            missing,
            "do not begin with",
        ),
        fault(&[&replaced("(id, time_started) WHERE num_nulls(time_completed) = 1")], missing, "no valid index"),
        fault(
            &[&replaced("(time_started, id DESC) WHERE num_nulls(time_completed) = 1")],
            missing,
            "sorted another way",
        ),
        fault(
            &[&replaced("(time_started NULLS FIRST, id) WHERE num_nulls(time_completed) = 1")],
            missing,
            "sorted another way",
        ),
        fault(
            &[&replaced("USING brin (time_started, id) WHERE num_nulls(time_completed) = 1")],
            missing,
            "sorted another way",
        ),
    ])
    .await;
    let text = |by: &str| {
        let mut fault = fault(&[&replaced(by)], missing, "sorted another way");
        fault.table = format!("{}; {INDEX}", TABLE.replace("id uuid", "id text"));
        fault
    };
    all_found_and_mended([
        text("(time_started, id COLLATE \"POSIX\") WHERE num_nulls(time_completed) = 1"),
        text("(time_started, id text_pattern_ops) WHERE num_nulls(time_completed) = 1"),
    ])
    .await;
}

#[tokio::test]
async fn an_index_that_the_application_uses_too_is_replaced() {
    let warned = (Index, Warning, IndexNotPrivate);
    let plain = |columns: &str| format!("CREATE INDEX plain ON audit_log {columns} WHERE time_completed IS NULL");
    let instead = |columns: &str| format!("DROP INDEX sweep_index; {}", plain(columns));
    let both = format!("{PARTITIONED}; {INDEX}");
    let on = |table: &str| format!("CREATE INDEX ON {table} (time_started, id) WHERE time_completed IS NULL");
    all_found_and_mended([
        fault(&[&instead("(time_started, id)")], warned, "\"public\".\"plain\" slows the application"),
        fault(&[&instead("(time_started, id, note)")], warned, "slows the application"),
        // Beside the private one.
        fault(&[&plain("(time_started, id)")], warned, "slows the application"),
        fault(&[&instead("(time_started, id)")], warned, "slows the application").on(&both),
        fault(&[&plain("(time_started, id)")], warned, "slows the application").on(&both),
        // Every partition has one of its own.
        fault(&["DROP INDEX sweep_index", &on("p1"), &on("p2a"), &on("p2b")], warned, "slows the application")
            .on(&both),
        fault(&[&on("p2a")], warned, "slows the application").on(&both),
    ])
    .await;
    // Nothing is dropped before the new one is there.
    let stage = Stage::new(&format!("{TABLE}; {}", plain("(time_started, id)"))).await;
    stage.log.run("ANALYZE audit_log").await;
    let checked = stage.check(&json!({})).await;
    let [found] = checked.findings.as_slice() else { panic!("{checked:#?}") };
    let Some(Fix::Sql(parts)) = &found.fix else { panic!("{found:#?}") };
    let sql: Vec<&String> = parts.iter().flat_map(|part| &part.statements).collect();
    let (create, drop) = (sql[sql.len() - 2], sql[sql.len() - 1]);
    assert!(
        create.starts_with("CREATE INDEX CONCURRENTLY IF NOT EXISTS \"audit_log_open_by_time_started\""),
        "{sql:?}"
    );
    assert!(create.ends_with("WHERE pg_catalog.num_nulls(\"time_completed\") = 1"), "{sql:?}");
    assert_eq!(drop, "DROP INDEX CONCURRENTLY \"public\".\"plain\"");
    assert!(checked.ready(), "{checked:#?}");
}

#[tokio::test]
async fn a_large_table_that_autovacuum_seldom_visits() {
    let warned = (Index, Warning, IndexBloat);
    let rows = |rows: u32, of: &str| format!("UPDATE pg_class SET reltuples = {rows} WHERE relname = '{of}'");
    let off = "ALTER TABLE audit_log SET (autovacuum_enabled = off)";
    all_found_and_mended([
        fault(&[&rows(2_000_000, "audit_log")], warned, "cleans it only after 400050 updates").by_superuser(),
        fault(&[&rows(300_000, "audit_log"), off], warned, "autovacuum is off").by_superuser(),
        fault(&[&rows(9_000_000, "p2b")], warned, "\"public\".\"p2b\" has about 9000000 rows")
            .by_superuser()
            .on(&format!("{PARTITIONED}; {INDEX}")),
    ])
    .await;
    let stage = Stage::new(&format!("{TABLE}; {INDEX}")).await;
    for fine in [
        &rows(1_000_000, "audit_log")[..],
        &format!("{off}; {}", rows(200_000, "audit_log")),
        &format!(
            "ALTER TABLE audit_log RESET (autovacuum_enabled); ALTER TABLE audit_log SET (autovacuum_vacuum_scale_factor = 0.01); {}",
            rows(5_000_000, "audit_log")
        ),
    ] {
        stage.admin.batch_execute(fine).await.unwrap();
        let checked = stage.check(&json!({})).await;
        assert!(checked.findings.is_empty(), "{fine}: {checked:#?}");
    }
}

#[tokio::test]
async fn an_index_that_serves_in_another_form() {
    for by in ["(time_started DESC, id DESC)", "(time_started, id, note)", "(time_started, id) INCLUDE (note)"] {
        let stage =
            Stage::new(&format!("{TABLE}; CREATE INDEX ON audit_log {by} WHERE num_nulls(time_completed) = 1")).await;
        let checked = stage.check(&json!({})).await;
        assert!(checked.findings.is_empty(), "{by}: {checked:#?}");
        stage.sweeps(&super::id(1), &json!({})).await.unwrap();
    }
}

/// CONCURRENTLY, interrupted while it waits for a transaction that writes.
async fn interrupted(stage: &Stage, create: &str, table: &str) {
    let mut other = stage.log.database.client().await.unwrap();
    let transaction = other.transaction().await.unwrap();
    transaction.batch_execute(&format!("LOCK TABLE {table} IN ROW EXCLUSIVE MODE")).await.unwrap();
    stage.log.run("SET statement_timeout = '300ms'").await;
    stage.log.client.batch_execute(create).await.unwrap_err();
    stage.log.run("RESET statement_timeout").await;
    transaction.rollback().await.unwrap();
}

#[tokio::test]
async fn an_index_whose_creation_was_interrupted_is_dropped_first() {
    let stage = Stage::new(TABLE).await;
    let create = "CREATE INDEX CONCURRENTLY audit_log_open_by_time_started ON audit_log (time_started, id) \
                  WHERE num_nulls(time_completed) = 1";
    interrupted(&stage, create, "audit_log").await;
    let checked = stage.check(&json!({})).await;
    let [found] = checked.findings.as_slice() else { panic!("{checked:#?}") };
    assert_eq!((found.subject, found.severity, found.reason), (Index, NotReady, IndexMissing));
    assert!(found.message.contains("\"audit_log_open_by_time_started\" is not valid"), "{}", found.message);
    stage.sweeps(&super::id(1), &json!({})).await.unwrap();
    stage.fix(found.fix.as_ref().unwrap()).await;
    assert!(stage.check(&json!({})).await.findings.is_empty());
    let indexes = "SELECT indexrelid::regclass, indisvalid FROM pg_index WHERE indrelid = 'audit_log'::regclass ORDER BY indexrelid::regclass::text";
    assert_eq!(
        stage.log.query(indexes).await,
        ["audit_log_open_by_time_started|t", "audit_log_pkey|t"],
        "the broken one is left"
    );
}

#[tokio::test]
async fn partitions_without_the_index() {
    let missing = (Index, NotReady, IndexMissing);
    let both = format!("{PARTITIONED}; {INDEX}");
    let only = "CREATE INDEX sweep_index ON ONLY audit_log (time_started, id) WHERE num_nulls(time_completed) = 1";
    let on = |table: &str| {
        format!("CREATE INDEX {table}_mine ON {table} (time_started, id) WHERE num_nulls(time_completed) = 1")
    };
    let attach = |to: &str, part: &str| format!("ALTER INDEX {to} ATTACH PARTITION {part}_mine");
    all_found_and_mended([
        fault(&["DROP INDEX sweep_index"], missing, "no valid index").on(&both),
        // The parent's own, and no more.
        fault(&["DROP INDEX sweep_index", only], missing, "no valid index").on(&both),
        // Some partitions have one; one is attached.
        fault(
            &["DROP INDEX sweep_index", only, &on("p1"), &on("p2a"), &attach("sweep_index", "p1")],
            missing,
            "no valid index",
        )
        .on(&both),
        // All but one within the one that is partitioned itself.
        fault(
            &[
                "DROP INDEX sweep_index",
                only,
                &on("p1"),
                "CREATE INDEX p2_mine ON ONLY p2 (time_started, id) WHERE num_nulls(time_completed) = 1",
                &on("p2b"),
                &attach("sweep_index", "p1"),
                &attach("sweep_index", "p2"),
                &attach("p2_mine", "p2b"),
            ],
            missing,
            "no valid index",
        )
        .on(&both),
        // Every partition has one, of its own.
        fault(
            &["DROP INDEX sweep_index", &on("p1"), &on("p2a"), &on("p2b")],
            (Index, Warning, IndexMissing),
            "new partitions will come without it",
        )
        .on(&both),
    ])
    .await;
}

#[tokio::test]
async fn a_broken_index_of_a_partition_alone_and_as_part_of_the_whole() {
    let only = "CREATE INDEX sweep_index ON ONLY audit_log (time_started, id) WHERE num_nulls(time_completed) = 1";
    for attached in [false, true] {
        let stage = Stage::new(&format!("{PARTITIONED}; {only}")).await;
        let create = "CREATE INDEX CONCURRENTLY p1_open_by_time_started ON p1 (time_started, id) WHERE num_nulls(time_completed) = 1";
        interrupted(&stage, create, "p1").await;
        if attached {
            stage.log.run("ALTER INDEX sweep_index ATTACH PARTITION p1_open_by_time_started").await;
        }
        let checked = stage.check(&json!({})).await;
        let [found] = checked.findings.as_slice() else { panic!("{checked:#?}") };
        assert!(found.message.contains("\"p1_open_by_time_started\" is not valid"), "{}", found.message);
        stage.fix(found.fix.as_ref().unwrap()).await;
        let fixed = stage.check(&json!({})).await;
        assert!(fixed.findings.is_empty(), "{attached}: {found:#?} {fixed:#?}");
        let broken = stage.log.query("SELECT indexrelid::regclass FROM pg_index WHERE NOT indisvalid").await;
        assert!(broken.is_empty(), "{broken:?}");
        stage.sweeps(&super::id(1), &json!({})).await.unwrap();
    }
}

#[tokio::test]
async fn a_key_that_is_not_unique() {
    let expected = (Key, Blocking, SchemaMismatch);
    let drop = "ALTER TABLE audit_log DROP CONSTRAINT audit_log_pkey";
    all_found_and_mended([
        fault(&[drop], expected, "no valid unique index on \"id\", \"time_started\" or part of it"),
        fault(&[drop, "CREATE INDEX ON audit_log (id)"], expected, "no valid unique index"),
        fault(&[drop, "CREATE UNIQUE INDEX ON audit_log (id, note)"], expected, "no valid unique index"),
        fault(&[drop, "CREATE UNIQUE INDEX ON audit_log (id) WHERE note IS NULL"], expected, "no valid unique index"),
        fault(&[drop, "CREATE UNIQUE INDEX ON audit_log ((id::text))"], expected, "no valid unique index"),
        fault(&[drop], expected, "no valid unique index").on(&format!("{PARTITIONED}; {INDEX}")),
    ])
    .await;
    // Its own creation met a key twice.
    let stage = Stage::new(&format!("{TABLE}; {INDEX}; {drop}")).await;
    let row = format!("INSERT INTO audit_log VALUES ('{}', '2020-01-01', '2020-01-01', 'success')", super::id(9));
    stage.log.run(&format!("{row}; {row}")).await;
    let create = "CREATE UNIQUE INDEX CONCURRENTLY audit_log_sweep_key ON audit_log (id, time_started)";
    stage.log.client.batch_execute(create).await.unwrap_err();
    stage.log.run("DELETE FROM audit_log").await;
    let checked = stage.check(&json!({})).await;
    let [found] = checked.findings.as_slice() else { panic!("{checked:#?}") };
    assert!(found.message.contains("\"audit_log_sweep_key\" is not valid"), "{}", found.message);
    stage.fix(found.fix.as_ref().unwrap()).await;
    assert!(stage.check(&json!({})).await.findings.is_empty());
    stage.sweeps(&super::id(1), &json!({})).await.unwrap();
}

#[tokio::test]
async fn a_key_that_may_be_null() {
    let expected = (Key, Blocking, SchemaMismatch);
    let unique = format!("{TABLE}; {INDEX}").replace("PRIMARY KEY", "UNIQUE NOT NULL");
    all_found_and_mended([
        fault(&["ALTER TABLE audit_log ALTER id DROP NOT NULL"], expected, "\"id\" may be NULL").on(&unique),
        fault(&["ALTER TABLE audit_log ALTER time_started DROP NOT NULL"], expected, "\"time_started\" may be NULL"),
    ])
    .await;
    let stage = Stage::new(&unique).await;
    if stage.log.query("SELECT current_setting('server_version_num')::int >= 180000").await == ["t"] {
        let not_valid = "ALTER TABLE audit_log ADD CONSTRAINT n NOT NULL id NOT VALID";
        let from = unique.replace("UNIQUE NOT NULL", "UNIQUE") + "; " + not_valid;
        all_found_and_mended([fault(&[], expected, "\"id\" may be NULL").on(&from)]).await;
    }
}

#[tokio::test]
async fn an_index_that_the_server_does_not_use_yet() {
    let stage = Stage::new(TABLE).await;
    let row = format!("INSERT INTO audit_log (id, time_started) VALUES ('{}', '2020-01-01')", super::id(1));
    stage.log.run(&row).await;
    let mut old = stage.log.database.client().await.unwrap();
    let old =
        old.build_transaction().isolation_level(tokio_postgres::IsolationLevel::RepeatableRead).start().await.unwrap();
    old.batch_execute("SELECT pg_current_xact_id(), count(*) FROM audit_log").await.unwrap();
    // The old version of the row is still seen, and the new index does not hold it.
    stage.log.run("UPDATE audit_log SET time_started = '2020-01-02'").await;
    stage.log.run(INDEX).await;
    let checked = stage.check(&json!({})).await;
    let [found] = checked.findings.as_slice() else { panic!("{checked:#?}") };
    assert_eq!((found.subject, found.severity, found.reason, &found.fix), (Statement, NotReady, IndexMissing, &None));
    assert!(
        found.message.contains("does not use \"public\".\"sweep_index\" yet")
            && found.message.contains("once they have ended"),
        "{}",
        found.message
    );
    old.rollback().await.unwrap();
    // Transactions of other databases count, too.
    eventually("the index to serve", Duration::from_secs(60), async || {
        let checked = stage.check(&json!({})).await;
        if checked.findings.is_empty() { Ok(()) } else { Err(format!("{checked:?}")) }
    })
    .await;
}

#[tokio::test]
async fn an_index_is_not_dropped_before_the_one_that_replaces_it_serves() {
    for table in [TABLE, PARTITIONED] {
        let stage = Stage::new(table).await;
        let plain = "CREATE INDEX plain ON audit_log (time_started, id) WHERE time_completed IS NULL";
        stage.log.run(&format!("DROP INDEX IF EXISTS sweep_index; {plain}")).await;
        let row = format!("INSERT INTO audit_log (id, time_started) VALUES ('{}', '2020-01-01')", super::id(1));
        stage.log.run(&row).await;
        let mut old = stage.log.database.client().await.unwrap();
        let level = tokio_postgres::IsolationLevel::RepeatableRead;
        let old = old.build_transaction().isolation_level(level).start().await.unwrap();
        old.batch_execute("SELECT pg_current_xact_id(), count(*) FROM audit_log").await.unwrap();
        // Its old version is on the same page, and the new index does not hold it.
        stage.log.run("UPDATE audit_log SET note = 'x'").await;
        stage.log.run(INDEX).await;
        let checked = stage.check(&json!({})).await;
        let [found] = checked.findings.as_slice() else { panic!("{checked:#?}") };
        assert_eq!((found.reason, &found.fix), (IndexNotPrivate, &None), "{found:#?}");
        assert!(found.message.contains("does not serve yet"), "{}", found.message);
        old.rollback().await.unwrap();
    }
}

#[tokio::test]
async fn an_index_that_nothing_wakes_and_one_of_a_constraint() {
    let only = "CREATE INDEX sweep_index ON ONLY audit_log (time_started, id) WHERE num_nulls(time_completed) = 1";
    let on = |table: &str| {
        format!(
            "CREATE INDEX {table}_mine ON {table} (time_started, id) WHERE num_nulls(time_completed) = 1; \
                 ALTER INDEX sweep_index ATTACH PARTITION {table}_mine"
        )
    };
    let two = "CREATE TABLE audit_log (id uuid, time_started timestamptz, time_completed timestamptz, \
               result_kind text, note text, PRIMARY KEY (id, time_started)) PARTITION BY RANGE (time_started); \
               CREATE TABLE p1 PARTITION OF audit_log DEFAULT; \
               CREATE TABLE p2 PARTITION OF audit_log FOR VALUES FROM ('2000-01-01') TO ('2001-01-01')";
    let key = (Key, Blocking, SchemaMismatch);
    let not_null = "ALTER TABLE audit_log ALTER id SET NOT NULL; ALTER TABLE audit_log ALTER time_started SET NOT NULL";
    all_found_and_mended([
        // The one partition that lacked its part went.
        fault(
            &["DROP INDEX sweep_index", only, &on("p1"), "DROP TABLE p2"],
            (Index, Warning, IndexMissing),
            "new partitions will come",
        )
        .on(&format!("{two}; {INDEX}")),
        // The parts of a constraint's index are those of constraints.
        fault(
            &[
                "ALTER TABLE audit_log DROP CONSTRAINT audit_log_pkey",
                not_null,
                "ALTER TABLE ONLY audit_log ADD CONSTRAINT mine UNIQUE (id, time_started)",
            ],
            key,
            "no valid unique index",
        )
        .on(&format!("{two}; {INDEX}")),
    ])
    .await;
    // No index is unique across partitions by an expression.
    let stage = Stage::new(
        "CREATE TABLE audit_log (id uuid NOT NULL, time_started timestamptz NOT NULL, time_completed timestamptz, result_kind text) \
         PARTITION BY RANGE ((time_started AT TIME ZONE 'UTC')); CREATE TABLE p PARTITION OF audit_log DEFAULT; \
         CREATE INDEX ON audit_log (time_started, id) WHERE num_nulls(time_completed) = 1",
    )
    .await;
    let checked = stage.check(&json!({})).await;
    let [found] = checked.findings.as_slice() else { panic!("{checked:#?}") };
    assert_eq!((found.subject, &found.fix), (Key, &Some(Fix::Field("spec.table".into()))));
    assert!(found.message.contains("partitioned by an expression"), "{}", found.message);
    stage.log.client.batch_execute("CREATE UNIQUE INDEX ON ONLY audit_log (id, time_started)").await.unwrap_err();
}
