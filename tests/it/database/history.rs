//! Many writers, two sweepers and a troublemaker at once; then a checker proves from what the database recorded that no
//! promise was broken.
//!
//! A trigger records every committed change of every row with its transaction and application name, which names the
//! sweep. Writers and sweepers keep journals. The table is partitioned, and its keys are hostile texts. Change the length by
//! `HISTORY_SECONDS` and the course by `HISTORY_SEED` (`cargo xtask history`). A long history has a server and a PgBouncer of its
//! own, which are restarted and killed.

mod checker;
mod players;
mod trouble;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use support::bouncer::Bouncer;
use support::postgres::{PostgresOptions, PostgresServer};
use tokio_util::sync::CancellationToken;

use crate::fixtures::AuditTable;
use players::{Journal, job, sweep_on, write_in_bulk, write_on};
use trouble::Trouble;

/// The table, the record of its changes, and a window for races: some updates take a millisecond. A partition holds 20 s.
const SCHEMA: &str = r#"
    CREATE TABLE audit_log (id text COLLATE "C", time_started timestamptz, time_completed timestamptz, result_kind text,
      PRIMARY KEY (id, time_started)) PARTITION BY RANGE (time_started);
    CREATE TABLE other PARTITION OF audit_log DEFAULT;
    DO $$ BEGIN FOR n IN 0..19 LOOP
      EXECUTE format('CREATE TABLE p%s PARTITION OF audit_log FOR VALUES FROM (%L) TO (%L)', n,
        date_trunc('second', now()) + (n - 5) * interval '20 s', date_trunc('second', now()) + (n - 4) * interval '20 s');
    END LOOP; END $$;
    CREATE INDEX ON audit_log (time_started, id) WHERE num_nulls(time_completed) = 1;
    CREATE TABLE change (seq bigserial, xid bigint, began timestamptz, at timestamptz, app text, id text,
      time_started timestamptz, old_completed timestamptz, new_completed timestamptz);
    CREATE FUNCTION record() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      INSERT INTO change (xid, began, at, app, id, time_started, old_completed, new_completed)
      VALUES (pg_current_xact_id()::text::bigint, transaction_timestamp(), clock_timestamp(), current_setting('application_name'),
        NEW.id, NEW.time_started, CASE TG_OP WHEN 'UPDATE' THEN OLD.time_completed END, NEW.time_completed);
      RETURN NULL; END $$;
    CREATE TRIGGER record AFTER INSERT OR UPDATE ON audit_log FOR EACH ROW EXECUTE FUNCTION record();
    CREATE FUNCTION widen() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.001); RETURN NEW; END $$;
    CREATE TRIGGER widen BEFORE UPDATE ON audit_log FOR EACH ROW WHEN (NEW.id LIKE '%7') EXECUTE FUNCTION widen();"#;

/// How old a row must be in this test.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Rows are stale at most so long after they were written: they are written as old as that makes them.
pub const SOON: Duration = Duration::from_secs(2);

/// From this many seconds on, a history has a server of its own, since it is restarted.
const LONG: u64 = 30;

/// Writers of single rows and of many rows at once.
const WRITERS: u64 = 6;
const BULK_WRITERS: u64 = 2;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} must be a number")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_history_breaks_a_promise() {
    let (seconds, seed) = (setting("HISTORY_SECONDS", 8), setting("HISTORY_SEED", 1));
    let mut server = None;
    let mut log = if seconds >= LONG {
        let settings = vec![("max_prepared_transactions".to_owned(), "50".to_owned())];
        let own = PostgresServer::start(PostgresOptions { settings, ..Default::default() }).await.unwrap();
        AuditTable::empty_on(server.insert(own)).await
    } else {
        AuditTable::empty().await
    };
    log.run(SCHEMA).await;
    let pooler = if server.is_some() { Some(Bouncer::start(&log.database, 10).await.unwrap()) } else { None };
    let (journal, stop) = (Arc::new(Journal::default()), Arc::new(AtomicBool::new(false)));
    let mut players = vec![];
    let uri = log.database.uri();
    for writer in 0..WRITERS {
        let (uri, stop, journal, prepares) = (uri.clone(), stop.clone(), journal.clone(), server.is_some());
        players.push(tokio::spawn(async move { write_on(&uri, writer, seed, prepares, &stop, &journal).await }));
    }
    for writer in WRITERS..WRITERS + BULK_WRITERS {
        let (uri, stop, journal) = (uri.clone(), stop.clone(), journal.clone());
        players.push(tokio::spawn(async move { write_in_bulk(&uri, writer, seed, &stop, &journal).await }));
    }
    // One of them through the pooler, if there is one.
    let pooled = pooler.as_ref().map_or_else(|| log.uri(), Bouncer::uri);
    for (sweeper, limit, batch, uri) in [("a", 7, 3, log.uri()), ("b", 500, 100, pooled)] {
        let make = move |name: &str| job(&uri, name, json!({ "limit": limit, "batchSize": batch }));
        players.push(tokio::spawn(sweep_on(sweeper, make, stop.clone(), journal.clone())));
    }
    let end = Instant::now() + Duration::from_secs(seconds);
    Trouble::new(&log, server.as_mut(), pooler, seed, &journal).make_until(end).await;
    stop.store(true, Ordering::SeqCst);
    for player in players {
        player.await.unwrap();
    }
    log.client = log.database.client().await.unwrap();
    trouble::end_prepared(&log).await;
    // Rows that were started last go stale, and then two sweeps close whatever is open.
    tokio::time::sleep(SOON + Duration::from_millis(100)).await;
    for last in ["last-1", "last-2"] {
        let job = job(&log.uri(), last, json!({ "limit": 1_000_000, "batchSize": 10_000, "deadline": "1h" }));
        let report = audit_log_sweeper::sweep::sweep(&job, &CancellationToken::new()).await;
        assert!(report.end.is_ok(), "{report:?}");
        journal.swept(last, 1_000_000, &report, None);
    }
    let told = checker::check(&log, &journal).await;
    println!("history of {seconds} s, seed {seed}: {told}");
}
