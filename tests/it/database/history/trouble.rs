//! The one who makes trouble: kills and stops backends, restarts the server, kills the pooler.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::bouncer::Bouncer;
use support::postgres::{PostgresServer, Shutdown};
use tokio::time::sleep;
use tokio_postgres::Client;

use super::players::{Journal, connect};
use crate::fixtures::AuditTable;

const VICTIMS: &str = "FROM pg_stat_activity WHERE datname = current_database() \
    AND (application_name LIKE 'writer-%' OR application_name LIKE 'audit-log-sweeper/%') ORDER BY random() LIMIT 1";

pub struct Trouble<'a> {
    uri: String,
    /// Its own, if there is one.
    server: Option<&'a mut PostgresServer>,
    pooler: Option<Bouncer>,
    random: fastrand::Rng,
    journal: &'a Journal,
}

impl<'a> Trouble<'a> {
    pub fn new(
        database: &'a AuditTable,
        server: Option<&'a mut PostgresServer>,
        pooler: Option<Bouncer>,
        seed: u64,
        journal: &'a Journal,
    ) -> Self {
        let random = fastrand::Rng::with_seed(seed ^ 0xdead);
        Self { uri: database.database.uri(), server, pooler, random, journal }
    }

    pub async fn make_until(mut self, end: Instant) {
        let mut client = None;
        while Instant::now() < end {
            sleep(Duration::from_millis(self.random.u64(20..150))).await;
            let Some(connected) = client.take().filter(|client: &Client| !client.is_closed()) else {
                client = connect(&self.uri, "troublemaker").await;
                continue;
            };
            match self.random.u8(0..100) {
                0 => self.restart(end).await,
                1 => self.kill_pooler().await,
                2..15 => self.freeze(&connected).await,
                _ => {
                    let sql = format!("SELECT pg_terminate_backend(pid) {VICTIMS}");
                    let killed = connected.query(&sql, &[]).await.map_or(0, |rows| rows.len());
                    self.journal.count("kills", u64::try_from(killed).unwrap());
                }
            }
            client = Some(connected);
        }
    }

    /// Stops a backend for a while. The server's processes may belong to another account.
    async fn freeze(&mut self, client: &Client) {
        let Ok(rows) = client.query(&format!("SELECT pid {VICTIMS}"), &[]).await else { return };
        let Some(pid) = rows.first().map(|row| Pid::from_raw(row.get(0))) else { return };
        if kill(pid, Signal::SIGSTOP).is_ok() {
            sleep(Duration::from_millis(self.random.u64(50..800))).await;
            kill(pid, Signal::SIGCONT).ok();
            self.journal.count("stops", 1);
        }
    }

    /// Not shortly before the end, so that all can be told apart by then.
    async fn restart(&mut self, end: Instant) {
        let how = if self.random.bool() { Shutdown::Fast } else { Shutdown::Immediate };
        if let Some(server) = self.server.as_mut().filter(|_| Instant::now() + Duration::from_secs(5) < end) {
            server.restart(how).await.unwrap();
            self.journal.count("restarts", 1);
        }
    }

    async fn kill_pooler(&mut self) {
        if let Some(pooler) = &mut self.pooler {
            pooler.kill_and_start_again().await.unwrap();
            self.journal.count("pooler kills", 1);
        }
    }
}

/// Ends what was prepared and left: its writer was killed in between.
pub async fn end_prepared(log: &AuditTable) {
    for id in log.query("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()").await {
        log.run(&format!("ROLLBACK PREPARED '{id}'")).await;
    }
}
