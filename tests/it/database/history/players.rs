//! Those who take part: writers that follow the two-step protocol and crash, sweepers, and one who kills backends.

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
    pub id: i64,
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
    pub kills: Mutex<u64>,
}

impl Journal {
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

async fn connect(uri: &str, name: &str) -> Option<Client> {
    let uri = format!("{uri}?application_name={name}");
    let (client, connection) = tokio_postgres::connect(&uri, NoTls).await.ok()?;
    tokio::spawn(connection);
    // The database's own may be hostile.
    client.batch_execute("SET search_path = public").await.ok()?;
    Some(client)
}

/// Starts rows and completes them, as an application does: with a retry, or not at all, or slowly.
pub async fn write_on(uri: String, writer: i64, seed: u64, stop: Arc<AtomicBool>, journal: Arc<Journal>) {
    let mut random = fastrand::Rng::with_seed(seed ^ (writer.unsigned_abs() << 32));
    let mut client = None;
    for number in 0.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let Some(connected) = client.take().filter(|client: &Client| !client.is_closed()) else {
            client = connect(&uri, &format!("writer-{writer}")).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        let id = number * 8 + writer;
        // Some start long ago, so that they are stale before they are complete.
        let age = (TIMEOUT - SOON).as_millis() + random.u128(0..2 * SOON.as_millis());
        let start = format!("INSERT INTO audit_log VALUES ({id}, clock_timestamp() - interval '{age} ms')");
        if touch(&connected, &journal, id, &start).await {
            let complete = format!(
                "UPDATE audit_log SET time_completed = clock_timestamp(), result_kind = 'success' \
                 WHERE id = {id} AND time_completed IS NULL"
            );
            match random.u8(0..10) {
                // A crash: nobody completes it.
                0..3 => {}
                // Slow in its transaction, and then done or not.
                3..6 => {
                    let pause = random.u64(20..200);
                    let end = if random.bool() { "COMMIT" } else { "ROLLBACK" };
                    touch(
                        &connected,
                        &journal,
                        id,
                        &format!("BEGIN; {complete}; SELECT pg_sleep({pause} / 1000.0); {end}"),
                    )
                    .await;
                }
                _ => {
                    tokio::time::sleep(Duration::from_millis(random.u64(0..30))).await;
                    let name = format!("writer-{writer}");
                    if !touch(&connected, &journal, id, &complete).await
                        && let Some(again) = connect(&uri, &name).await
                    {
                        touch(&again, &journal, id, &complete).await;
                    }
                }
            }
        }
        client = Some(connected);
    }
}

/// Runs SQL on a row and takes down from when to when; whether it went well.
async fn touch(client: &Client, journal: &Journal, id: i64, sql: &str) -> bool {
    let from = Utc::now();
    let done = client.simple_query(sql).await.is_ok();
    // The server may be busy with a killed backend for a while.
    let to = if done { Utc::now() } else { Utc::now() + chrono::TimeDelta::seconds(5) };
    journal.touches.lock().unwrap().push(Touch { id, from, to });
    done
}

/// Kills backends at random, writers' and sweepers'.
pub async fn kill(uri: String, seed: u64, stop: Arc<AtomicBool>, journal: Arc<Journal>) {
    let mut random = fastrand::Rng::with_seed(seed ^ 0xdead);
    let client = connect(&uri, "killer").await.unwrap();
    while !stop.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(random.u64(20..150))).await;
        let killed = client
            .query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() \
                 AND (application_name LIKE 'writer-%' OR application_name LIKE 'audit-log-sweeper/%') ORDER BY random() LIMIT 1",
                &[],
            )
            .await
            .unwrap();
        *journal.kills.lock().unwrap() += u64::try_from(killed.len()).unwrap();
    }
}
