//! Time columns of every type: no row is swept early, and no completion lies ahead of the clock.

use audit_log_sweeper::api::status::Outcome;
use audit_log_sweeper::sweep::start;
use serde_json::{Value, json};

use crate::fixtures::AuditTable;

/// A table with a start and a completion time of these types, its index, and no rows.
async fn table(key: &str, started: &str, completed: &str) -> AuditTable {
    let log = AuditTable::empty().await;
    log.run(&format!(
        "CREATE DOMAIN moment AS timestamp(2); \
         CREATE TABLE audit_log (id {key} PRIMARY KEY, time_started {started} NOT NULL, time_completed {completed}, result_kind text); \
         CREATE INDEX ON audit_log (time_started, id) WHERE num_nulls(time_completed) = 1"
    ))
    .await;
    log
}

/// Compares the product's bound with the server's own zones, around each change of a clock: a start that is not stale must
/// not lie before the bound.
#[tokio::test]
async fn no_clock_change_makes_a_row_stale_early() {
    let log = AuditTable::empty().await;
    log.run("CREATE TEMPORARY TABLE zones AS SELECT name AS z FROM pg_timezone_names WHERE name ~ '^[A-Z][a-z]+/' OR name = 'UTC'")
        .await;
    log.run(
        "CREATE TEMPORARY TABLE changes AS SELECT z, day FROM (SELECT z, day, day AT TIME ZONE z - day AT TIME ZONE 'UTC' AS away, \
           (day + interval '24 h') AT TIME ZONE z - (day + interval '24 h') AT TIME ZONE 'UTC' AS next FROM zones, \
           (SELECT generate_series('2011-01-01'::timestamptz, '2012-03-01', '24 h') UNION ALL \
            SELECT generate_series('2024-01-01'::timestamptz, '2025-06-01', '24 h')) AS days(day)) AS d WHERE away <> next",
    )
    .await;
    let [changes] = log.query("SELECT count(*) FROM changes").await.try_into().unwrap();
    assert!(changes.parse::<u32>().unwrap() > 200, "{changes}");
    let early = format!(
        "SELECT z, cutoff, now, s, b FROM (SELECT z, day + n * interval '50 min' AS cutoff, day + n * interval '50 min' + timeout AS now \
             FROM changes, generate_series(-30, 30) AS n, \
             unnest('{{1 min, 1 h, 3 h, 23 h, 25 h, 87600 h}}'::interval[]) AS timeout) AS clock, \
           LATERAL (SELECT true AS local, -1 AS typmod) AS started, LATERAL {} AS bound(b), \
           LATERAL (SELECT cutoff + after AS s FROM unnest('{{1 us, 20 min, 59 min, 1 h, 61 min, 2 h, 24 h}}'::interval[]) AS after) AS starts \
         WHERE s <= now AND s AT TIME ZONE z < b::timestamp LIMIT 5",
        start::bound("z").replace("FROM started, ", "FROM ")
    );
    assert_eq!(log.query(&early).await, [""; 0]);
}

#[tokio::test]
async fn rows_of_every_type_of_time_are_swept_when_they_are_stale_and_not_before() {
    let types = ["timestamptz", "timestamptz(0)", "timestamp", "timestamp(0)", "timestamp(3)", "moment"];
    for (number, started) in types.into_iter().enumerate() {
        let completed = types[(number + 2) % types.len()];
        let log = table("bigint", started, completed).await;
        let local = |type_: &str, time: &str| match type_.starts_with("timestamptz") {
            true => time.to_owned(),
            false => format!("(({time}) AT TIME ZONE 'Asia/Kathmandu')"),
        };
        // A row is cut off at the digits of its column, as applications do it.
        let insert = |id: u32, age: &str| {
            let time = local(started, &format!("clock_timestamp() - interval '{age}'"));
            let unit = if started.ends_with("(0)") { "second" } else { "milliseconds" };
            format!("INSERT INTO audit_log VALUES ({id}, date_trunc('{unit}', {time}));")
        };
        log.run(
            &[
                insert(1, "62 min"),
                insert(2, "61 min"),
                insert(3, "60 min 2 s"),
                insert(4, "59 min 59 s"),
                insert(5, "0"),
            ]
            .concat(),
        )
        .await;
        let spec = json!({ "columns": { "timeZone": "Asia/Kathmandu" }, "batchSize": 2 });
        let before = log.query("SELECT clock_timestamp()").await;
        let report = log.sweep(spec.clone()).await;
        assert_eq!((report.timed_out, report.outcome()), (3, Outcome::Drained), "{started} {completed}: {report:?}");
        let at = if completed.starts_with("timestamptz") {
            "time_completed"
        } else {
            "time_completed AT TIME ZONE 'Asia/Kathmandu'"
        };
        // Rounded down, and by no more than a second.
        let swept = format!(
            "SELECT id, {at} <= clock_timestamp() AND {at} >= '{}'::timestamptz - interval '1 s' FROM audit_log WHERE time_completed IS NOT NULL ORDER BY id",
            before[0]
        );
        assert_eq!(log.query(&swept).await, ["1|t", "2|t", "3|t"], "{started} {completed}");
        // What is left is told in UTC.
        log.run(&insert(6, "3 h")).await;
        let left =
            log.sweep(json!({ "columns": { "timeZone": "Asia/Kathmandu" }, "mode": "Observe" })).await.backlog.unwrap();
        let age = chrono::Utc::now() - left.oldest_time_started.unwrap();
        assert!((179..=181).contains(&age.num_minutes()), "{started}: {left:?}");
    }
}

#[tokio::test]
async fn a_completion_time_is_never_later_than_the_clock() {
    // A trigger looks at the clock in the midst of the update; rounding up would show half of the time.
    for digits in 0..3 {
        let log = table("int", "timestamptz", &format!("timestamp({digits})")).await;
        log.run(
            "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
               IF NEW.time_completed > clock_timestamp() AT TIME ZONE 'UTC' THEN RAISE EXCEPTION 'ahead'; END IF; RETURN NEW; END $$; \
             CREATE TRIGGER late BEFORE UPDATE ON audit_log FOR EACH ROW EXECUTE FUNCTION late(); \
             INSERT INTO audit_log SELECT n, '2020-01-01' FROM generate_series(1, 40) AS n",
        )
        .await;
        let report = log.sweep(json!({ "batchSize": 1 })).await;
        assert_eq!((report.timed_out, report.refused), (40, 0), "{digits}: {report:?}");
    }
}

#[tokio::test]
async fn keys_of_every_type_are_swept_in_their_own_order() {
    for (key, value) in [
        ("smallint", "n"),
        ("integer", "-n"),
        ("numeric", "n * 1.5 - 4"),
        ("bytea", "decode(lpad(to_hex(n * 37), 6, '0'), 'hex')"),
        ("char(8)", "'k ' || n"),
        ("varchar(9)", "'\\' || n"),
    ] {
        let log = table(key, "timestamp", "timestamptz").await;
        log.run(&format!(
            "CREATE DOMAIN k AS {key}; ALTER TABLE audit_log ALTER id TYPE k; SET bytea_output = escape; \
             INSERT INTO audit_log SELECT {value}, '2020-01-01' FROM generate_series(1, 9) AS n"
        ))
        .await;
        let order = log.query("SELECT id FROM audit_log ORDER BY id").await;
        for (limit, done) in [(4, 4), (3, 7), (9, 9)] {
            let report = log.sweep(json!({ "limit": limit, "batchSize": 2 })).await;
            assert_eq!(report.end.err(), None, "{key}");
            let swept = log.query("SELECT id FROM audit_log WHERE time_completed IS NOT NULL ORDER BY id").await;
            assert_eq!(swept, order[..done], "{key}");
        }
    }
}

#[tokio::test]
async fn a_zone_that_the_server_does_not_know_is_told_as_such() {
    // The name is in the IANA database and, so far, in no version of PostgreSQL's.
    let log = table("int", "timestamp", "timestamp").await;
    let zone = |zone: &str| -> Value { json!({ "columns": { "timeZone": zone } }) };
    assert_eq!(log.sweep(zone("Europe/Berlin")).await.end.err(), None);
    log.run("INSERT INTO audit_log VALUES (1, now() AT TIME ZONE 'Europe/Berlin')").await;
    assert_eq!(log.sweep(zone("Europe/Berlin")).await.timed_out, 0);
    // In a zone to the west of the true one, the start lies in the future.
    assert_eq!(log.sweep(zone("UTC")).await.timed_out, 0);
}

#[tokio::test]
async fn a_start_that_its_column_cut_off_does_not_make_a_row_stale_early() {
    for type_ in ["timestamptz(0)", "timestamp(0)"] {
        let log = table("int", type_, "timestamptz").await;
        log.run("SET TimeZone = UTC").await;
        // It starts 0.9 s after a whole second, at which it is written down. Once more if the sweep comes too late to tell.
        loop {
            log.run(
                "SELECT pg_sleep(1 - extract(epoch FROM clock_timestamp())::numeric % 1); DELETE FROM audit_log; \
                 INSERT INTO audit_log VALUES (1, date_trunc('second', clock_timestamp()) - interval '1 h')",
            )
            .await;
            let report = log.sweep(json!({})).await;
            let started = log.query("SELECT extract(epoch FROM time_started) + 0.9 FROM audit_log").await;
            let cutoff = report.cutoff.unwrap().timestamp_micros() as f64 / 1e6;
            if cutoff < started[0].parse().unwrap() {
                assert_eq!((report.timed_out, report.end.err()), (0, None), "{type_}");
                break;
            }
        }
    }
}
