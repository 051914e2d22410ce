//! The plans of the sweep's statements, and of the application's own beside them: with every index, kind of statistics and
//! table, the sweep walks its index and the application does not.

use std::time::Duration;

use audit_log_sweeper::sweep::start;
use audit_log_sweeper::sweep::statement::{self, Locking};
use serde_json::json;

use crate::fixtures::{AuditTable, id};

const COLUMNS: &str =
    "id uuid NOT NULL, time_started timestamptz NOT NULL, time_completed timestamptz, result_kind text";

/// One table, and three partitions that all hold rows.
const TABLES: [(&str, &str); 2] = [
    ("plain", "CREATE TABLE audit_log (COLUMNS, PRIMARY KEY (id))"),
    (
        "partitioned",
        "CREATE TABLE audit_log (COLUMNS, PRIMARY KEY (id, time_started)) PARTITION BY RANGE (time_started); \
         CREATE TABLE p1 PARTITION OF audit_log FOR VALUES FROM (MINVALUE) TO ('2020-01-01'); \
         CREATE TABLE p2 PARTITION OF audit_log FOR VALUES FROM ('2020-01-01') TO ('2020-01-15'); \
         CREATE TABLE p3 PARTITION OF audit_log DEFAULT",
    ),
];

const PRIVATE: &str = "num_nulls(time_completed) = 1";
const PLAIN: &str = "time_completed IS NULL";

/// 5,000 complete rows, in all partitions.
const COMPLETE: &str = "INSERT INTO audit_log SELECT ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid, \
    '2019-12-01'::timestamptz + n * interval '16 min', '2020-03-01', 'success' FROM generate_series(1, 5000) AS n";

/// 1,500 open rows more.
const BACKLOG: &str = "INSERT INTO audit_log SELECT ('00000000-0000-0000-0001-' || lpad(n::text, 12, '0'))::uuid, \
    '2019-12-01'::timestamptz + n * interval '54 min' FROM generate_series(1, 1500) AS n";

/// What the planner knows of the table.
const STATISTICS: [(&str, &[&str]); 3] = [
    ("none", &[COMPLETE, BACKLOG]),
    ("from before the backlog", &[COMPLETE, "ANALYZE audit_log", BACKLOG]),
    ("fresh", &[COMPLETE, BACKLOG, "ANALYZE audit_log"]),
];

/// Indexes that an application may have besides.
const OTHERS: [&str; 2] = [
    "SELECT 1",
    "CREATE INDEX by_start ON audit_log (time_started); CREATE INDEX by_end ON audit_log (time_completed)",
];

async fn table(log: &AuditTable, create: &str, index: &str, statistics: &[&str], others: &str) {
    log.run(&format!("DROP TABLE IF EXISTS audit_log; {}; {others}", create.replace("COLUMNS", COLUMNS))).await;
    // Autovacuum would analyze in the midst.
    let tables = log.query("SELECT relid::regclass FROM pg_partition_tree('audit_log') WHERE isleaf").await;
    for table in tables {
        log.run(&format!("ALTER TABLE {table} SET (autovacuum_enabled = off)")).await;
    }
    if !index.is_empty() {
        log.run(&format!("CREATE INDEX open ON audit_log (time_started, id) WHERE {index}")).await;
    }
    for sql in statistics {
        log.run(sql).await;
    }
}

/// A plan as lines without what differs between versions and runs: numbers of nodes, times, and marks of pinned nodes.
async fn plan(log: &AuditTable, sql: &str) -> Vec<String> {
    let lines = log.query(sql).await.into_iter().filter(|line| !line.trim().starts_with("Disabled: "));
    let tidy = |line: String| {
        let line = line.split(" (returns ").next().unwrap_or_default().to_owned();
        match line.split_once("time_started < '").map(|(before, rest)| (before, rest.split_once(')'))) {
            Some((before, Some((_, rest)))) => format!("{before}time_started < CUTOFF){rest}"),
            _ => line,
        }
    };
    lines.map(tidy).collect()
}

/// The next batch as EXPLAIN with these options.
async fn explained(log: &AuditTable, locking: Locking, options: &str) -> String {
    let (job, limit) = (log.job(json!({ "batchSize": 10_000, "limit": 10_000 })).plan, Duration::from_secs(60));
    let answer = log.client.simple_query(&start::start(&job, limit)).await.unwrap();
    let explain = statement::explain(&job, &start::read_start(&answer).unwrap(), locking, limit);
    explain.replace("EXPLAIN (COSTS OFF)", &format!("EXPLAIN ({options})"))
}

/// The plan of the next batch.
pub async fn batch_plan(log: &AuditTable, locking: Locking) -> Vec<String> {
    plan(log, &explained(log, locking, "COSTS OFF").await).await
}

/// Buffers that the next batch reads. It is rolled back.
async fn batch_buffers(log: &AuditTable, locking: Locking) -> u64 {
    let plan = log.query(&explained(log, locking, "ANALYZE, BUFFERS, COSTS OFF, TIMING OFF").await).await;
    let buffers = plan.iter().find_map(|line| line.trim().strip_prefix("Buffers: shared ")).unwrap();
    let of = |kind: &str| buffers.split(' ').find_map(|part| part.strip_prefix(kind)).map_or(0, |n| n.parse().unwrap());
    of("hit=") + of("read=")
}

const LOCKINGS: [Locking; 2] = [Locking::Optimistic, Locking::Pessimistic];

/// Fails unless the index of open rows leads to the rows of each of the partitions, both to select and to update them. The
/// update beside the plain index looks the selected rows up by another one.
fn assert_walks_open_rows(plan: &[String], partitions: usize, predicate: &str, locking: Locking) {
    let nodes: Vec<_> = plan.iter().map(|line| line.trim().trim_start_matches("->  ")).collect();
    let count = |test: &dyn Fn(&str) -> bool| nodes.iter().filter(|node| test(node)).count();
    let of_open = |node: &str| {
        let (kind, index) = node.split_once(" using ").unwrap_or_default();
        ["Index Scan", "Index Only Scan"].contains(&kind)
            && (index.starts_with("open ") || index.contains("_time_started_id_idx "))
    };
    let bad = ["Seq Scan", "Bitmap", "Hash ", "Merge Join", "Incremental Sort"];
    // The one sort finds the last of the selected rows.
    assert!(
        count(&|node| bad.iter().any(|kind| node.starts_with(kind))) == 0 && count(&|node| node.ends_with("Sort")) == 1,
        "{plan:#?}"
    );
    let scans = count(&|node| {
        node.contains("Scan") && !["CTE", "Values", "Subquery"].iter().any(|kind| node.starts_with(kind))
    });
    if predicate == PLAIN {
        assert_eq!((scans, count(&of_open)), (2 * partitions, partitions), "{plan:#?}");
        return;
    }
    let up_to_last = |node: &str| node.starts_with("Index Cond") && node.contains("(ROW(time_started, id) <= ROW(");
    let stated = |node: &str| node.starts_with("Filter") && node.contains(PRIVATE);
    let hashed = if locking == Locking::Pessimistic { partitions } else { 0 };
    assert_eq!((scans, count(&of_open)), (2 * partitions, 2 * partitions), "{plan:#?}");
    assert_eq!(count(&up_to_last), partitions, "{plan:#?}");
    // A scan of the index alone states no filter.
    assert!(count(&stated) >= partitions, "{plan:#?}");
    assert_eq!(count(&|node| node.contains("hashed SubPlan")), hashed, "{plan:#?}");
}

#[tokio::test]
async fn a_batch_walks_either_index_whatever_the_statistics_and_other_indexes() {
    let log = AuditTable::empty().await;
    for ((_, create), partitions) in TABLES.into_iter().zip([1, 3]) {
        for (_, sql) in STATISTICS {
            for predicate in [PRIVATE, PLAIN] {
                for others in OTHERS {
                    table(&log, create, predicate, sql, others).await;
                    for locking in LOCKINGS {
                        let plan = batch_plan(&log, locking).await;
                        assert_walks_open_rows(&plan, partitions, predicate, locking);
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn statistics_from_before_the_backlog_cost_a_batch_nothing_however_many_partitions_there_are() {
    for partitions in [1, 26, 200] {
        let log = AuditTable::empty().await;
        let days = format!("FOR day IN 0..{} LOOP", partitions - 1);
        log.run(&format!(
            "CREATE TABLE audit_log ({COLUMNS}, PRIMARY KEY (id, time_started)) PARTITION BY RANGE (time_started); \
             CREATE INDEX by_start ON audit_log (time_started); CREATE INDEX by_end ON audit_log (time_completed); \
             CREATE INDEX open ON audit_log (time_started, id) WHERE {PRIVATE}; \
             DO $$ BEGIN {days} \
               EXECUTE format('CREATE TABLE p%s PARTITION OF audit_log FOR VALUES FROM (%L) TO (%L) WITH (autovacuum_enabled = off)', \
                 day, '2020-01-01'::date + day, '2020-01-02'::date + day); \
             END LOOP; END $$; \
             INSERT INTO audit_log SELECT gen_random_uuid(), '2020-01-01'::timestamptz + {partitions} * n * interval '14.4 s', '2021-01-01', 'success' \
               FROM generate_series(0, 5999) AS n; \
             ANALYZE audit_log; \
             INSERT INTO audit_log SELECT gen_random_uuid(), '2020-01-01'::timestamptz + {partitions} * n * interval '4.32 s' \
               FROM generate_series(0, 19999) AS n",
        ))
        .await;
        let both = async || [batch_buffers(&log, LOCKINGS[0]).await, batch_buffers(&log, LOCKINGS[1]).await];
        let before = both().await;
        log.run("ANALYZE audit_log").await;
        for (before, fresh) in before.into_iter().zip(both().await) {
            assert!(
                before * 2 <= fresh * 3 && fresh * 2 <= before * 3,
                "{partitions} partitions: {before} and {fresh}"
            );
            // About ten for each of 10,000 rows.
            assert!(before < 250_000, "{partitions} partitions: {before}");
        }
    }
}

#[tokio::test]
async fn triggers_for_each_row_are_planned_as_outside_of_a_sweep() {
    let log = AuditTable::new().await;
    log.start(1, "6 h").await;
    log.run(
        "CREATE TABLE one AS SELECT n, n % 7 AS m FROM generate_series(1, 20000) AS n; CREATE TABLE other AS SELECT * FROM one; \
         ANALYZE one; ANALYZE other; CREATE TABLE plans (line text)",
    )
    .await;
    let explain = "EXPLAIN (COSTS OFF) SELECT count(*) FROM one JOIN other ON one.n OPERATOR(pg_catalog.=) other.n";
    log.before_update(&format!(
        "DECLARE line text; BEGIN FOR line IN EXECUTE '{explain}' LOOP INSERT INTO plans VALUES (line); END LOOP; \
           INSERT INTO plans SELECT pg_catalog.string_agg(DISTINCT setting, ' ') FROM pg_settings \
             WHERE name OPERATOR(pg_catalog.~) '^enable_(seqscan|bitmapscan|.*sort|hashjoin|mergejoin)$|^plan_cache_mode$'; END;"
    ))
    .await;
    assert_eq!(log.sweep(json!({})).await.timed_out, 1);
    // How an operator is written depends on the role's search_path.
    let inside =
        log.query("SELECT replace(string_agg(trim(line), ' '), 'OPERATOR(pg_catalog.=)', '=') FROM plans").await;
    assert_eq!(
        inside,
        [log.query(explain).await.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ") + " auto on"]
    );
    assert!(inside[0].contains("Hash Join"), "{inside:?}");
}

#[tokio::test]
async fn a_batch_states_the_private_predicate_only_when_every_partition_can_use_it() {
    let log = AuditTable::empty().await;
    table(&log, TABLES[1].1, "", &[], OTHERS[0]).await;
    let uses = async || {
        let plan = batch_plan(&log, Locking::Pessimistic).await.join("\n");
        (
            plan.matches("num_nulls(time_completed) = 1").count(),
            plan.matches("Filter: (time_completed IS NULL)").count(),
        )
    };
    let mut on = vec![];
    for partition in ["p1", "p2", "p3"] {
        assert_eq!(uses().await, (0, 3), "with the index on {on:?}");
        log.run(&format!("CREATE INDEX ON {partition} (time_started, id) WHERE {PRIVATE}")).await;
        on.push(partition);
    }
    assert_eq!(uses().await, (6, 0));
    // A new partition comes without it, and the plain one serves all.
    log.run(&format!(
        "CREATE TABLE p4 PARTITION OF audit_log FOR VALUES FROM ('2021-01-01') TO ('2022-01-01'); \
         CREATE INDEX ON audit_log (time_started, id) WHERE {PLAIN}"
    ))
    .await;
    assert_eq!(uses().await, (0, 4));
    log.run(&format!("CREATE INDEX ON audit_log (time_started, id) WHERE {PRIVATE}")).await;
    assert_eq!(uses().await, (8, 0), "one that is private comes before one that is not");
}

/// A batch walks the plain index as long as the private one cannot serve it, whatever else has the private predicate.
#[tokio::test]
async fn a_batch_states_the_private_predicate_only_for_an_index_that_it_can_walk() {
    for (kind, create) in TABLES {
        for other in [
            "USING hash (id)",
            "USING brin (time_started, id)",
            "(id)",
            "(time_started DESC, id)",
            "(id, time_started)",
        ] {
            let log = AuditTable::empty().await;
            table(&log, create, PLAIN, &[COMPLETE, BACKLOG], OTHERS[0]).await;
            log.run(&format!("CREATE INDEX other ON audit_log {other} WHERE {PRIVATE}")).await;
            let plan = batch_plan(&log, Locking::Pessimistic).await.join("\n");
            assert!(!plan.contains("num_nulls") && !plan.contains("Seq Scan"), "{kind}, {other}: {plan}");
        }
        // Beside a transaction that began before the index, and sees a version of a row that is not in it.
        let log = AuditTable::empty().await;
        table(&log, create, PLAIN, &[COMPLETE, BACKLOG], OTHERS[0]).await;
        // Room for a new version of a row on the page of the old one.
        let leaf = if kind == "plain" { "audit_log" } else { "p1" };
        log.run(&format!("ALTER TABLE {leaf} SET (fillfactor = 50)")).await;
        log.run(&format!("VACUUM FULL {leaf}")).await;
        let mut old = log.database.client().await.unwrap();
        let level = tokio_postgres::IsolationLevel::RepeatableRead;
        let old = old.build_transaction().isolation_level(level).start().await.unwrap();
        old.batch_execute("SELECT pg_current_xact_id(), count(*) FROM audit_log").await.unwrap();
        log.run("UPDATE audit_log SET result_kind = 'x' WHERE id::text LIKE '%-0001-%'").await;
        log.run(&format!("CREATE INDEX private ON audit_log (time_started, id) WHERE {PRIVATE}")).await;
        let plan = batch_plan(&log, Locking::Pessimistic).await.join("\n");
        assert!(!plan.contains("num_nulls") && !plan.contains("Seq Scan"), "{kind}, pending: {plan}");
        old.rollback().await.unwrap();
    }
}

#[tokio::test]
async fn quotes_around_all_names_and_a_partition_that_is_leaving_hide_no_index() {
    let log = AuditTable::empty().await;
    table(&log, TABLES[1].1, PRIVATE, &[], OTHERS[0]).await;
    log.run("SET quote_all_identifiers = on").await;
    let plan = batch_plan(&log, Locking::Pessimistic).await.join("\n");
    assert_eq!(plan.matches("\"num_nulls\"(\"time_completed\") = 1").count(), 6, "{plan}");
    log.run("SET quote_all_identifiers = off").await;
    if log.query("SELECT current_setting('server_version_num')::int >= 140000").await == ["f"] {
        return;
    }
    // It leaves once this transaction has ended.
    log.run("DROP INDEX open; ALTER TABLE audit_log DETACH PARTITION p3").await;
    log.run("CREATE TABLE p4 PARTITION OF audit_log FOR VALUES FROM ('2021-01-01') TO ('2022-01-01')").await;
    for partition in ["p1", "p2"] {
        log.run(&format!("CREATE INDEX ON {partition} (time_started, id) WHERE {PRIVATE}")).await;
    }
    let old = log.database.client().await.unwrap();
    old.batch_execute("BEGIN; SELECT count(*) FROM audit_log").await.unwrap();
    let leaving = log.database.client().await.unwrap();
    leaving.batch_execute("SET statement_timeout = '200ms'").await.unwrap();
    leaving.batch_execute("ALTER TABLE audit_log DETACH PARTITION p4 CONCURRENTLY").await.unwrap_err();
    let plan = batch_plan(&log, Locking::Pessimistic).await.join("\n");
    assert_eq!(plan.matches("num_nulls(time_completed) = 1").count(), 4, "{plan}");
}

/// The application's own statements, as texts and as prepared statements with generic plans.
const COMPLETION: &str =
    "UPDATE audit_log SET time_completed = clock_timestamp() WHERE id = KEY AND time_completed IS NULL";
const LOOK: &str = "SELECT time_completed FROM audit_log WHERE id = KEY AND time_completed IS NULL";

async fn application_plans(log: &AuditTable) -> Vec<Vec<String>> {
    let mut plans = vec![];
    for sql in [COMPLETION, LOOK] {
        let key = format!("'{}'", id(7));
        plans.push(plan(log, &format!("EXPLAIN (COSTS OFF) {}", sql.replace("KEY", &key))).await);
        let generic = format!(
            "SET plan_cache_mode = force_generic_plan; DEALLOCATE ALL; PREPARE s (uuid) AS {}; \
             EXPLAIN (COSTS OFF) EXECUTE s ({key})",
            sql.replace("KEY", "$1")
        );
        plans.push(plan(log, &generic).await);
    }
    plans
}

#[tokio::test]
async fn the_application_plans_its_statements_as_if_the_private_index_were_not_there() {
    let log = AuditTable::empty().await;
    let plans = async |create, index, statistics, others| {
        table(&log, create, index, statistics, others).await;
        application_plans(&log).await
    };
    for (kind, create) in TABLES {
        for (statistics, sql) in STATISTICS {
            for others in OTHERS {
                let without = plans(create, "", sql, others).await;
                let with = plans(create, PRIVATE, sql, others).await;
                assert_eq!(with, without, "{kind} table, statistics {statistics}, {others}");
            }
        }
    }
    // It would use the plain one: what is asserted above can fail.
    let empty = [COMPLETE, "ANALYZE audit_log"];
    let with = plans(TABLES[0].1, PLAIN, &empty, OTHERS[0]).await;
    assert!(with.iter().all(|plan| plan.iter().any(|line| line.contains("using open"))), "{with:#?}");
}

/// Requests that start and complete, each statement its own transaction, and no vacuum.
const LOAD: &str = "CREATE PROCEDURE load(first int, last int) LANGUAGE plpgsql AS $$ DECLARE key uuid; BEGIN \
    FOR n IN first..last LOOP \
      key := ('00000000-0000-0000-0002-' || lpad(n::text, 12, '0'))::uuid; \
      INSERT INTO audit_log VALUES (key, clock_timestamp()); COMMIT; \
      UPDATE audit_log SET time_completed = clock_timestamp(), result_kind = 'success' \
        WHERE id = key AND time_completed IS NULL; COMMIT; \
    END LOOP; END $$";

/// Buffers that the server reads to find the row of a completion, as a text and as a prepared statement.
async fn buffers(log: &AuditTable) -> Vec<u64> {
    let mut read = vec![];
    let [one, other] = [900_001, 900_002].map(id);
    for sql in [
        format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {}", COMPLETION.replace("KEY", &format!("'{one}'"))),
        format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE complete ('{other}')"),
    ] {
        // Its own row for each: one that was rolled back leaves a version behind.
        log.run(&format!(
            "INSERT INTO audit_log VALUES ('{one}', now()), ('{other}', now()) ON CONFLICT DO NOTHING; BEGIN"
        ))
        .await;
        let text = log.query(&sql).await.join("\n");
        log.run("ROLLBACK").await;
        let plan: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut node = &plan[0]["Plan"];
        // The node that finds the row, below the one that writes it.
        while let Some(child) = node["Plans"].get(0) {
            node = child;
        }
        assert_eq!(node["Actual Rows"].as_f64(), Some(1.0), "{plan:#}");
        read.push(["Shared Hit Blocks", "Shared Read Blocks"].iter().map(|name| node[*name].as_u64().unwrap()).sum());
    }
    read
}

/// What a completion reads after 100,000 requests, and beside a backlog that the statistics do not know of.
async fn buffers_of_a_completion(index: &str, requests: u32) -> [Vec<u64>; 2] {
    let log = AuditTable::empty().await;
    table(&log, TABLES[0].1, index, &[COMPLETE, "ANALYZE audit_log"], OTHERS[0]).await;
    log.run(LOAD).await;
    let prepare = COMPLETION.replace("KEY", "$1");
    log.run(&format!("SET plan_cache_mode = force_generic_plan; PREPARE complete (uuid) AS {prepare}")).await;
    let load = |worker: u32| {
        let database = &log.database;
        async move {
            let client = database.client().await.unwrap();
            let (first, last) = (worker * requests / 2 + 1, (worker + 1) * requests / 2);
            client.batch_execute("SET synchronous_commit = off").await.unwrap();
            client.batch_execute(&format!("CALL load({first}, {last})")).await.unwrap();
        }
    };
    tokio::join!(load(0), load(1));
    let after_load = buffers(&log).await;
    log.run("TRUNCATE audit_log").await;
    log.run(&format!("{COMPLETE}; ANALYZE audit_log")).await;
    log.run(&BACKLOG.replace("1500", "50000").replace("54 min", "1 s")).await;
    [after_load, buffers(&log).await]
}

#[tokio::test]
async fn a_completion_reads_no_more_with_the_private_index_than_without_any() {
    let (without, private, plain) = tokio::join!(
        buffers_of_a_completion("", 100_000),
        buffers_of_a_completion(PRIVATE, 100_000),
        // So few do for this one; it becomes slower with each.
        buffers_of_a_completion(PLAIN, 15_000)
    );
    println!("buffers of a completion: without {without:?}, private {private:?}, plain {plain:?}");
    assert_eq!(private, without);
    assert!(plain.iter().flatten().all(|plain| *plain > 50), "the plain index does no harm here: {plain:?}");
}
