//! Many writers, two sweepers and a killer at once; then a checker proves from what the database recorded that no
//! promise was broken.
//!
//! A trigger records every committed change of every row with its transaction and application name, which names the
//! sweep. Writers and sweepers keep journals. Change the length by `HISTORY_SECONDS` and the course by `HISTORY_SEED`
//! (`cargo xtask history`).

mod checker;
mod players;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::fixtures::AuditTable;
use players::{Journal, job, kill, sweep_on, write_on};

/// The table, the record of its changes, and a window for races: each update takes a millisecond.
const SCHEMA: &str = "
    CREATE TABLE audit_log (id bigint PRIMARY KEY, time_started timestamptz NOT NULL, time_completed timestamptz, result_kind text);
    CREATE INDEX ON audit_log (time_started, id) WHERE num_nulls(time_completed) = 1;
    CREATE TABLE change (seq bigserial, xid bigint, began timestamptz, at timestamptz, app text, id bigint,
      time_started timestamptz, old_completed timestamptz, new_completed timestamptz);
    CREATE FUNCTION record() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      INSERT INTO change (xid, began, at, app, id, time_started, old_completed, new_completed)
      VALUES (pg_current_xact_id()::text::bigint, transaction_timestamp(), clock_timestamp(), current_setting('application_name'),
        NEW.id, NEW.time_started, CASE TG_OP WHEN 'UPDATE' THEN OLD.time_completed END, NEW.time_completed);
      RETURN NULL; END $$;
    CREATE TRIGGER record AFTER INSERT OR UPDATE ON audit_log FOR EACH ROW EXECUTE FUNCTION record();
    CREATE FUNCTION widen() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.001); RETURN NEW; END $$;
    CREATE TRIGGER widen BEFORE UPDATE ON audit_log FOR EACH ROW EXECUTE FUNCTION widen();";

/// How old a row must be in this test.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Rows are stale at most so long after they were written: they are written as old as that makes them.
pub const SOON: Duration = Duration::from_secs(2);

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} must be a number")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_history_breaks_a_promise() {
    let (seconds, seed) = (setting("HISTORY_SECONDS", 8), setting("HISTORY_SEED", 1));
    let log = AuditTable::empty().await;
    log.run(SCHEMA).await;
    let journal = Arc::new(Journal::default());
    let stop = Arc::new(AtomicBool::new(false));
    let mut players = vec![];
    for writer in 0..8 {
        players.push(tokio::spawn(write_on(log.database.uri(), writer, seed, stop.clone(), journal.clone())));
    }
    for (sweeper, limit, batch) in [("a", 7, 3), ("b", 50, 10)] {
        let make = {
            let (uri, spec) = (log.uri(), json!({ "limit": limit, "batchSize": batch }));
            move |name: &str| job(&uri, name, spec.clone())
        };
        players.push(tokio::spawn(sweep_on(sweeper, make, stop.clone(), journal.clone())));
    }
    players.push(tokio::spawn(kill(log.database.uri(), seed, stop.clone(), journal.clone())));
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    stop.store(true, Ordering::SeqCst);
    for player in players {
        player.await.unwrap();
    }
    // Rows that were started last go stale, and then two sweeps close whatever is open.
    tokio::time::sleep(SOON + Duration::from_millis(100)).await;
    for last in ["last-1", "last-2"] {
        let report = audit_log_sweeper::sweep::sweep(
            &job(&log.uri(), last, json!({ "limit": 1_000_000 })),
            &CancellationToken::new(),
        )
        .await;
        assert!(report.end.is_ok(), "{report:?}");
        journal.swept(last, 1_000_000, &report, None);
    }
    let told = checker::check(&log, &journal).await;
    println!("history of {seconds} s, seed {seed}: {told}");
}
