//! Any table of the shape: other keys, names, types and triggers; never a row beside the chosen ones.

use audit_log_sweeper::api::status::Outcome;
use audit_log_sweeper::sweep::statement::Locking;
use serde_json::{Value, json};
use support::json::merged;

use crate::fixtures::AuditTable;

/// A table with hostile names everywhere, whose key has this type.
const SCHEMA: &str = "Au\"dit.AuditTable; --";
const TABLE: &str = "select \"*\" from $$x$$";

async fn hostile(key: &str, kind: &str) -> AuditTable {
    let log = AuditTable::empty().await;
    let (schema, table) = (quoted(SCHEMA), quoted(TABLE));
    log.run(&format!(
        "CREATE SCHEMA {schema}; CREATE TYPE public.outcome AS ENUM ('ok', 'timed out'); \
         CREATE TABLE {schema}.{table} (\"Key\" {key} PRIMARY KEY, \"Time.Started\" timestamptz NOT NULL, \
           \"completed 'at'\" timestamptz, \"Kind\" {kind}, \"Status\" int, \"Note\" text DEFAULT 'running'); \
         CREATE INDEX ON {schema}.{table} (\"Time.Started\", \"Key\") WHERE \"completed 'at'\" IS NULL"
    ))
    .await;
    log
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn spec(more: Value) -> Value {
    merged(
        json!({
            "schema": SCHEMA, "table": TABLE,
            "columns": { "id": "Key", "timeStarted": "Time.Started", "timeCompleted": "completed 'at'" },
            "complete": [{ "column": "Kind", "value": "timed out" }, { "column": "Status", "value": "-504" }, { "column": "Note", "setNull": true }],
        }),
        &more,
    )
}

#[tokio::test]
async fn keys_of_every_type_hostile_names_enum_and_text_kinds() {
    let keys = [
        ("uuid", "md5(n::text)::uuid"),
        ("bigint", "-n"),
        ("text", "'it''s \\ \"' || n"),
        ("text COLLATE \"en-x-icu\"", "CASE n WHEN 1 THEN 'B' WHEN 2 THEN 'a' WHEN 3 THEN 'Ä' ELSE 'z' || n END"),
    ];
    for (key, value) in keys {
        for kind in ["public.outcome", "text"] {
            let log = hostile(key, kind).await;
            let table = format!("{}.{}", quoted(SCHEMA), quoted(TABLE));
            // Six start together, so that the order within is the key's own.
            log.run(&format!(
                "INSERT INTO {table} (\"Key\", \"Time.Started\") SELECT {value}, '2020-01-01' FROM generate_series(1, 6) AS n; \
                 INSERT INTO {table} (\"Key\", \"Time.Started\") SELECT {value}, clock_timestamp() FROM generate_series(7, 8) AS n"
            ))
            .await;
            let chosen = format!(
                "SELECT \"Key\" FROM {table} WHERE \"Time.Started\" < '2021-01-01' ORDER BY \"Time.Started\", \"Key\" LIMIT 4"
            );
            let chosen = log.query(&chosen).await;
            let report = log.sweep(spec(json!({ "limit": 4, "batchSize": 2 }))).await;
            assert_eq!((report.timed_out, report.end.err()), (4, None), "{key} {kind}");
            let swept = format!(
                "SELECT \"Key\" FROM {table} WHERE \"completed 'at'\" IS NOT NULL ORDER BY \"Time.Started\", \"Key\""
            );
            assert_eq!(log.query(&swept).await, chosen, "{key} {kind}");
            assert_eq!(
                log.query(&format!("SELECT DISTINCT \"Kind\"::text, \"Status\", \"Note\" FROM {table} WHERE \"completed 'at'\" IS NOT NULL")).await,
                ["timed out|-504|NULL"]
            );
            let rest = log.sweep(spec(json!({ "batchSize": 1 }))).await;
            assert_eq!((rest.timed_out, rest.outcome()), (2, Outcome::Drained), "{key} {kind}");
        }
    }
}

/// The driver reads UTF-8 alone, and what a SQL_ASCII database holds is in no encoding, or in several.
#[tokio::test]
async fn text_keys_that_are_not_utf8_are_swept_in_order_and_one_that_is_refused_is_stepped_over() {
    let server = tokio::task::spawn_blocking(support::postgres::shared).await.unwrap();
    let mut log = AuditTable::empty().await;
    let database = format!("ascii_{}", log.database.name);
    let superuser = server.connect("postgres").await.unwrap();
    let create = format!(
        "CREATE DATABASE {database} OWNER {} TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'",
        log.database.user
    );
    superuser.batch_execute(&create).await.unwrap();
    log.database.name = database;
    log.pooler = None;
    log.client = log.database.client().await.unwrap();
    log.run(
        r"CREATE TABLE audit_log (id text PRIMARY KEY, time_started timestamptz NOT NULL, time_completed timestamptz, result_kind text);
        CREATE INDEX ON audit_log (time_started, id) WHERE pg_catalog.num_nulls(time_completed) = 1;
        INSERT INTO audit_log SELECT n || key, '2020-01-01' FROM generate_series(1, 4) AS n,
          unnest(ARRAY[E'\xe9', E'\\', E'it''s\xc3', E'\\351']) AS key;
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON audit_log FOR EACH ROW WHEN (OLD.id = E'2\xe9') EXECUTE FUNCTION refuse()",
    )
    .await;
    let chosen = "SELECT encode(convert_to(id, 'SQL_ASCII'), 'hex') FROM audit_log";
    let first = log.query(&format!("{chosen} ORDER BY id LIMIT 6")).await;
    let report = log.sweep(json!({ "limit": 6, "batchSize": 2 })).await;
    assert_eq!((report.timed_out, report.end.err()), (6, None));
    let swept = format!("{chosen} WHERE time_completed IS NOT NULL ORDER BY id");
    assert_eq!(log.query(&swept).await, first);
    let report = log.sweep(json!({ "batchSize": 2 })).await;
    assert_eq!((report.timed_out, report.refused, report.outcome()), (9, 1, Outcome::Drained));
    let open = "SELECT encode(convert_to(id, 'SQL_ASCII'), 'hex') FROM audit_log WHERE time_completed IS NULL";
    assert_eq!(log.query(open).await, ["32e9"]);
}

/// The order of `citext` is another than that of `text`, and its operators are in a schema of their own.
#[tokio::test]
async fn keys_of_type_citext_are_compared_by_their_own_operators() {
    let log = AuditTable::empty().await;
    log.run(
        "CREATE SCHEMA \"Ext; --\"; CREATE EXTENSION citext SCHEMA \"Ext; --\"; CREATE DOMAIN key AS \"Ext; --\".citext; \
         CREATE TABLE audit_log (id key PRIMARY KEY, time_started timestamptz NOT NULL, time_completed timestamptz, result_kind text); \
         CREATE INDEX ON audit_log (time_started, id) WHERE num_nulls(time_completed) = 1; \
         INSERT INTO audit_log SELECT k, '2020-01-01' FROM unnest('{f,A,b,C,d,E}'::text[]) AS k",
    )
    .await;
    let plan = super::plans::batch_plan(&log, Locking::Pessimistic).await.join("\n");
    assert_eq!(plan.matches("using audit_log_time_started_id_idx on audit_log").count(), 2, "{plan}");
    for (limit, open) in [(3, "d,E,f"), (2, "f"), (1, "NULL")] {
        let report = log.sweep(json!({ "batchSize": 2, "limit": limit })).await;
        assert_eq!((report.timed_out, report.end.err()), (limit, None));
        let left =
            "SELECT string_agg(id::text, ',' ORDER BY lower(id::text)) FROM audit_log WHERE time_completed IS NULL";
        assert_eq!(log.query(left).await, [open]);
    }
}

#[tokio::test]
async fn no_name_and_no_value_can_be_anything_but_itself() {
    // Names that would end a quotation or a statement, or that PostgreSQL would fold.
    let names = [
        "x\" = 1; DROP TABLE victim; --",
        "x'); DROP TABLE victim; --",
        "\\",
        "$1",
        "a\nb",
        "/*",
        "NULL",
        "ÄÖ\u{200d}",
        "%s",
        "E'",
    ];
    let values = [
        "'; DROP TABLE victim; --",
        "\\'; DROP TABLE victim; --",
        "$$",
        "it's",
        "\\",
        "\n",
        "",
        "NULL",
        "now()",
        "\u{1F600}",
    ];
    let log = AuditTable::empty().await;
    log.run("CREATE TABLE victim ()").await;
    let fixed = names.map(str::to_owned).into_iter().zip(values.map(str::to_owned));
    // And whatever else can be made of such pieces; the seed makes a failure come again.
    let pieces = [
        "\"",
        "'",
        "\\",
        ";",
        "--",
        "/*",
        "*/",
        "$$",
        "$1",
        "%",
        "\n",
        "\t",
        " ",
        "(",
        ")",
        "E'",
        "U&'",
        "\u{1F600}",
        "x",
        "NULL",
    ];
    let mut random = fastrand::Rng::with_seed(7);
    let mut made = || (0..random.usize(1..8)).map(|_| pieces[random.usize(0..pieces.len())]).collect::<String>();
    let made: Vec<(String, String)> = (0..40).map(|n| (format!("{}{n}", made()), made())).collect();
    for (name, value) in fixed.chain(made) {
        let column = quoted(&name);
        log.run(&format!(
            "CREATE TABLE {column} (id int8 PRIMARY KEY, started timestamptz NOT NULL, {column} timestamptz, kind text); \
             INSERT INTO {column} VALUES (1, '2020-01-01')"
        ))
        .await;
        let report = log
            .sweep(json!({
                "table": name, "columns": { "timeStarted": "started", "timeCompleted": name },
                "complete": [{ "column": "kind", "value": value }],
            }))
            .await;
        assert_eq!((report.timed_out, report.end.err()), (1, None), "{name:?}");
        let stored = log.client.query_one(&format!("SELECT kind FROM {column}"), &[]).await.unwrap();
        assert_eq!(stored.get::<_, &str>(0), value, "{name:?}");
    }
    log.run("SELECT FROM victim").await;
}

#[tokio::test]
async fn partitions_with_the_same_ids_never_lose_a_row_beside_the_chosen_ones() {
    let log = AuditTable::empty().await;
    log.run(
        "CREATE TABLE audit_log (id uuid, time_started timestamptz, time_completed timestamptz, result_kind text, \
           PRIMARY KEY (id, time_started)) PARTITION BY RANGE (time_started); \
         CREATE TABLE p1 PARTITION OF audit_log FOR VALUES FROM (MINVALUE) TO ('2020-01-01'); \
         CREATE TABLE p2 PARTITION OF audit_log FOR VALUES FROM ('2020-01-01') TO ('2021-01-01'); \
         CREATE TABLE p3 PARTITION OF audit_log DEFAULT; \
         CREATE INDEX ON audit_log (time_started, id) WHERE num_nulls(time_completed) = 1; \
         INSERT INTO audit_log SELECT md5(n::text)::uuid, day FROM generate_series(1, 10) AS n, \
           unnest(ARRAY['2019-06-01', '2020-06-01', clock_timestamp()::text]::timestamptz[]) AS day; \
         UPDATE audit_log SET time_completed = '2020-07-01', result_kind = 'success' WHERE time_started = '2020-06-01' AND id < '80000000-0000-0000-0000-000000000000'",
    )
    .await;
    let complete = log.query("SELECT t::text FROM audit_log t WHERE result_kind = 'success' ORDER BY 1").await;
    assert!(!complete.is_empty() && complete.len() < 10);
    let stale = 20 - i64::try_from(complete.len()).unwrap();
    for limit in [3, 4] {
        let chosen = log.query(&format!("SELECT time_started, id FROM audit_log WHERE time_completed IS NULL ORDER BY time_started, id LIMIT {limit}")).await;
        let before = log
            .query("SELECT time_started, id FROM audit_log WHERE result_kind = 'timeout' ORDER BY time_started, id")
            .await;
        let report = log.sweep(json!({ "limit": limit, "batchSize": 2 })).await;
        assert_eq!(report.timed_out, limit);
        let after = log
            .query("SELECT time_started, id FROM audit_log WHERE result_kind = 'timeout' ORDER BY time_started, id")
            .await;
        assert_eq!(after, [before, chosen].concat());
    }
    assert_eq!(log.sweep(json!({})).await.timed_out, stale - 7);
    assert_eq!(log.query("SELECT t::text FROM audit_log t WHERE result_kind = 'success' ORDER BY 1").await, complete);
    assert_eq!(log.query("SELECT count(*) FROM audit_log WHERE time_completed IS NULL").await, ["10"]);
}
