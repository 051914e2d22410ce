//! Those who take part: writers that follow the two-step protocol and crash, sweepers, and one who kills backends.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use audit_log_sweeper::api::ValidSpec;
use audit_log_sweeper::credentials::{ConnectionUri, Credentials};
use audit_log_sweeper::database::{Target, tls};
use audit_log_sweeper::sweep::{Job, Plan, Report, sweep};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use support::json::merged;
use tokio_postgres::{Client, NoTls};
use tokio_util::sync::CancellationToken;

use super::{SOON, TIMEOUT};

/// A writer's transaction on one row, from before its BEGIN until its end was known.
#[derive(Clone, Debug)]
pub struct Touch {
    pub id: String,
    pub from: DateTime<Utc>,
    pub to: DateTime<Utc>,
}

/// What a sweep reported.
#[derive(Clone, Debug)]
pub struct Swept {
    pub app: String,
    pub limit: i64,
    pub from: DateTime<Utc>,
    pub to: DateTime<Utc>,
    pub cutoff: Option<DateTime<Utc>>,
    pub timed_out: i64,
    pub uncertain: i64,
    pub failed: bool,
}

/// All that was done, as those who did it know it.
#[derive(Debug, Default)]
pub struct Journal {
    pub touches: Mutex<Vec<Touch>>,
    pub sweeps: Mutex<Vec<Swept>>,
    pub trouble: Mutex<BTreeMap<&'static str, u64>>,
}

impl Journal {
    /// Counts what was done to the server.
    pub fn count(&self, what: &'static str, times: u64) {
        *self.trouble.lock().unwrap().entry(what).or_default() += times;
    }

    /// Takes down a sweep.
    pub fn swept(&self, name: &str, limit: i64, report: &Report, from: Option<DateTime<Utc>>) {
        self.sweeps.lock().unwrap().push(Swept {
            app: app(name),
            limit,
            from: from.unwrap_or_else(Utc::now),
            to: Utc::now(),
            cutoff: report.cutoff,
            timed_out: report.timed_out,
            uncertain: report.uncertain,
            failed: report.end.is_err(),
        });
    }
}

/// The application name of a sweep.
fn app(name: &str) -> String {
    format!("audit-log-sweeper/history/{name}")
}

/// A job whose application name tells the sweep.
pub fn job(uri: &str, name: &str, spec: Value) -> Job {
    let whole = merged(
        json!({ "database": { "secretRef": { "name": "db" } }, "timeout": format!("{}s", TIMEOUT.as_secs()) }),
        &spec,
    );
    let plan = Plan::new(&ValidSpec::new(serde_json::from_value(whole).unwrap()).unwrap());
    let roots = Arc::new(tls::default_roots(None).unwrap());
    let mode = Some(audit_log_sweeper::api::spec::TlsMode::Disable);
    let target = Target::new(&Credentials::new(ConnectionUri::new(uri)), mode, &roots, &app(name)).unwrap();
    Job::new(plan, target)
}

/// Sweeps again and again.
pub async fn sweep_on(
    sweeper: &'static str,
    make: impl Fn(&str) -> Job + Send,
    stop: Arc<AtomicBool>,
    journal: Arc<Journal>,
) {
    for number in 0.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let name = format!("{sweeper}-{number}");
        let job = make(&name);
        let from = Utc::now();
        let report = sweep(&job, &CancellationToken::new()).await;
        journal.swept(&name, job.limit, &report, Some(from));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub async fn connect(uri: &str, name: &str) -> Option<Client> {
    let uri = format!("{uri}?application_name={name}");
    let (client, connection) = tokio_postgres::connect(&uri, NoTls).await.ok()?;
    tokio::spawn(connection);
    // The database's own may be hostile.
    client.batch_execute("SET search_path = public").await.ok()?;
    Some(client)
}

/// A key that would end a quotation or a comment.
fn key(writer: u64, number: u64) -> String {
    let hostile = ["it's \\", "\"; --", "$$/*", "E'\\n", "\u{1f600}", "%s"];
    format!("{}{writer}-{number}", hostile[usize::try_from(number).unwrap_or_default() % hostile.len()])
}

fn quoted(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// Starts rows and completes them, as an application does: with a retry, or not at all, slowly, or in two phases.
pub async fn write_on(uri: &str, writer: u64, seed: u64, prepares: bool, stop: &AtomicBool, journal: &Journal) {
    let mut random = fastrand::Rng::with_seed(seed ^ (writer << 32));
    let name = format!("writer-{writer}");
    let mut client = None;
    for number in 0.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let Some(connected) = client.take().filter(|client: &Client| !client.is_closed()) else {
            client = connect(uri, &name).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        let id = key(writer, number);
        // Some start long ago, so that they are stale before they are complete.
        let age = (TIMEOUT - SOON).as_millis() + random.u128(0..2 * SOON.as_millis());
        let literal = quoted(&id);
        let start = format!("INSERT INTO audit_log VALUES ({literal}, clock_timestamp() - interval '{age} ms')");
        let complete = format!(
            "UPDATE audit_log SET time_completed = clock_timestamp(), result_kind = 'success' WHERE id = {literal} AND time_completed IS NULL"
        );
        let started = touch(&connected, journal, &[&id], &start).await;
        let pause = random.u64(20..200);
        match random.u8(0..10) {
            // A crash: nobody completes it.
            _ if !started => {}
            0..3 => {}
            // Slow in its transaction, and then done or not.
            3..5 => {
                let end = if random.bool() { "COMMIT" } else { "ROLLBACK" };
                let slow = format!("BEGIN; {complete}; SELECT pg_sleep({pause} / 1000.0); {end}");
                touch(&connected, journal, &[&id], &slow).await;
            }
            5 if prepares => {
                let from = Utc::now();
                let gid = format!("w-{writer}-{number}");
                let prepared = connected.simple_query(&format!("BEGIN; {complete}; PREPARE TRANSACTION '{gid}'")).await;
                tokio::time::sleep(Duration::from_millis(pause)).await;
                let end = if random.bool() { "COMMIT" } else { "ROLLBACK" };
                let ended = connected.simple_query(&format!("{end} PREPARED '{gid}'")).await;
                // What is left prepared holds the row until the end.
                let to = if prepared.is_ok() && ended.is_ok() { Utc::now() } else { DateTime::<Utc>::MAX_UTC };
                journal.touches.lock().unwrap().push(Touch { id: id.clone(), from, to });
            }
            _ => {
                tokio::time::sleep(Duration::from_millis(random.u64(0..30))).await;
                if !touch(&connected, journal, &[&id], &complete).await
                    && let Some(again) = connect(uri, &name).await
                {
                    touch(&again, journal, &[&id], &complete).await;
                }
            }
        }
        client = Some(connected);
    }
}

/// Starts many rows at once, and completes most of them in one statement.
pub async fn write_in_bulk(uri: &str, writer: u64, seed: u64, stop: &AtomicBool, journal: &Journal) {
    const ROWS: u64 = 500;
    let mut random = fastrand::Rng::with_seed(seed ^ (writer << 32));
    let mut client = None;
    for number in 0.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let Some(connected) = client.take().filter(|client: &Client| !client.is_closed()) else {
            client = connect(uri, &format!("writer-{writer}")).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        let ids: Vec<String> = (0..ROWS).map(|row| key(writer, number * ROWS + row)).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let age = (TIMEOUT - SOON).as_millis() + random.u128(0..2 * SOON.as_millis());
        let rows = ids.iter().map(|id| format!("({}, clock_timestamp() - interval '{age} ms')", quoted(id)));
        let start = format!("INSERT INTO audit_log VALUES {}", rows.collect::<Vec<_>>().join(", "));
        if touch(&connected, journal, &ids, &start).await {
            let most = ids.iter().filter(|_| random.u8(0..10) < 9).copied().collect::<Vec<_>>();
            let list = most.iter().map(|id| quoted(id)).collect::<Vec<_>>().join(", ");
            let complete = format!(
                "UPDATE audit_log SET time_completed = clock_timestamp(), result_kind = 'success' WHERE id IN ({list}) \
                 AND time_started > clock_timestamp() - interval '5 min' AND time_completed IS NULL"
            );
            touch(&connected, journal, &most, &complete).await;
        }
        client = Some(connected);
    }
}

/// Runs SQL on rows and takes down from when to when; whether it went well.
async fn touch(client: &Client, journal: &Journal, ids: &[&str], sql: &str) -> bool {
    let from = Utc::now();
    let done = client.simple_query(sql).await.is_ok();
    // The server may be busy with a killed backend for a while.
    let to = if done { Utc::now() } else { Utc::now() + chrono::TimeDelta::seconds(5) };
    let touch = |id: &&str| Touch { id: (*id).to_owned(), from, to };
    journal.touches.lock().unwrap().extend(ids.iter().map(touch));
    done
}
