//! What a sweep costs that finds nothing: buffers, time on the server, time in all; by the size of the table, and where dead
//! rows lie in its way.

use super::Bench;
use crate::results::{Sample, Samples};
use crate::steps::Steps;
use crate::subjects::Subject;
use crate::table::{self, Layout, one};
use anyhow::{Context, ensure};
use std::time::Duration;
use support::postgres::PostgresServer;
use tokio::time::sleep;
use tokio_postgres::Client;

/// Sweeps of each kind in a round: one that has to warm up is no measure.
const SWEEPS: u32 = 4;

/// Pages of the table and its indexes that were read, from memory or not. What the product did, counted by the server.
const BUFFERS: &str =
    "SELECT sum(heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read) FROM pg_statio_user_tables";

impl Bench<'_> {
    pub(super) async fn idle(&mut self) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        let sizes = self.options.idle_rows.clone();
        let name = |rows: i64| format!("idle_{rows}");
        for rows in &sizes {
            let client = table::empty(self.server, &name(*rows)).await?;
            table::completed(&client, "a table", *rows).await?;
            client.batch_execute("VACUUM (FREEZE, ANALYZE) audit_log").await?;
            self.logged(&name(*rows)).await?;
        }
        let rounds = self.options.rounds * SWEEPS;
        let mut steps = Steps::new("idle sweeps, rounds", rounds as usize);
        for round in 0..rounds {
            steps.next("");
            for rows in super::rotated(&sizes, round) {
                let case = format!("{} rows, vacuumed", crate::stats::number(rows as f64));
                samples.push(self.sweep_idle(&name(rows), &case, round).await?);
            }
        }
        for rows in &sizes {
            self.drop_database(&name(*rows)).await?;
        }
        let middle = sizes.get(sizes.len() / 2).copied().context("no sizes")?;
        self.unvacuumed(middle, &mut samples).await?;
        self.after_snapshot(&mut samples).await?;
        Ok(samples)
    }

    /// Rows that were open, completed as requests do it, and not vacuumed since.
    async fn unvacuumed(&self, rows: i64, samples: &mut Samples) -> anyhow::Result<()> {
        let client = table::empty(self.server, "churn").await?;
        table::stale(&client, "a table that is then completed", rows).await?;
        client
            .batch_execute(
                "UPDATE audit_log SET time_completed = time_started, result_kind = 'success', http_status_code = 200",
            )
            .await?;
        client.batch_execute("CHECKPOINT").await?;
        self.logged("churn").await?;
        let case = format!("{} completed, not vacuumed", crate::stats::number(rows as f64));
        self.series("churn", &case, samples).await?;
        client.batch_execute("VACUUM audit_log").await?;
        samples.push(self.sweep_idle("churn", &format!("{case}: vacuumed then"), 0).await?);
        drop(client);
        self.drop_database("churn").await
    }

    /// Rows that a sweep completed beside an old snapshot, which still sees them open.
    async fn after_snapshot(&mut self, samples: &mut Samples) -> anyhow::Result<()> {
        let copy = self.copy(Layout::Block).await?;
        self.logged("run").await?;
        let old = copy.connect().await?;
        old.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class").await?;
        self.time(Subject::Ours, &copy).await?;
        let case = format!("{} swept beside an old snapshot", crate::stats::number(self.options.stale as f64));
        self.series("run", &case, samples).await?;
        old.batch_execute("COMMIT").await?;
        old.batch_execute("VACUUM audit_log").await?;
        samples.push(self.sweep_idle("run", &format!("{case}: gone, and vacuumed"), 0).await?);
        drop(old);
        copy.drop().await
    }

    /// The first sweep, and those after it.
    async fn series(&self, database: &str, case: &str, samples: &mut Samples) -> anyhow::Result<()> {
        samples.push(self.sweep_idle(database, &format!("{case}: first"), 0).await?);
        for round in 0..self.options.rounds {
            samples.push(self.sweep_idle(database, &format!("{case}: next"), round).await?);
        }
        Ok(())
    }

    async fn sweep_idle(&self, database: &str, case: &str, round: u32) -> anyhow::Result<Sample> {
        let client = self.server.connect(database).await?;
        let before = settled(self.server, &client).await?;
        let log = self.server.log_tail(usize::MAX).len();
        let swept = self
            .means
            .product
            .sweep(&self.server.superuser_uri(database), self.options.stale, self.options.batch)
            .await?;
        ensure!(swept.number("timedOut") == 0.0, "an idle sweep completed rows: {}", swept.report);
        let buffers = settled(self.server, &client).await? - before;
        let log = self.server.log_tail(usize::MAX).split_off(log);
        let times = times(&log).context("the server's log does not tell how long statements took")?;
        let values = [
            ("buffers", buffers as f64),
            ("batch ms", times.batch),
            ("backlog ms", times.backlog),
            ("server ms", times.all),
            ("whole ms", swept.took.as_secs_f64() * 1000.0),
        ];
        Ok(Sample::new(case, Subject::Ours.name(), round, values))
    }

    /// The server logs how long statements take, from the next connection on.
    async fn logged(&self, database: &str) -> anyhow::Result<()> {
        let admin = self.server.connect("postgres").await?;
        Ok(admin.batch_execute(&format!("ALTER DATABASE {database} SET log_min_duration_statement = 0")).await?)
    }

    async fn drop_database(&self, name: &str) -> anyhow::Result<()> {
        let admin = self.server.connect("postgres").await?;
        Ok(admin.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")).await?)
    }
}

/// The count once the sweep's backend is gone, which reports with its end. Before 15 it does so by messages, which may be late by
/// half a second.
async fn settled(server: &PostgresServer, client: &Client) -> anyhow::Result<i64> {
    let pause = Duration::from_millis(if table::major(server) < 15 { 600 } else { 20 });
    let mut last = -1;
    loop {
        sleep(pause).await;
        let backends = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'audit-log-sweeper/%'";
        if one(client, backends).await? > 0 {
            continue;
        }
        let now = one(client, BUFFERS).await?;
        if now == last {
            return Ok(now);
        }
        last = now;
    }
}

/// How long the statements of a sweep took on the server, in ms.
#[derive(Debug, Default, PartialEq)]
struct Times {
    batch: f64,
    backlog: f64,
    all: f64,
}

/// Reads them from the server's log. None: nothing of a sweep is in it.
fn times(log: &str) -> Option<Times> {
    let mut times = Times::default();
    for line in log.lines() {
        let Some((_, rest)) = line.split_once("duration: ") else { continue };
        // What we ask the server ourselves is logged with another word.
        let Some((took, statement)) = rest.split_once(" ms  statement: ") else { continue };
        let Ok(took) = took.parse::<f64>() else { continue };
        times.all += took;
        if statement.contains("READ COMMITTED READ WRITE") {
            times.batch += took;
        } else if statement.contains("READ COMMITTED READ ONLY") {
            times.backlog += took;
        }
    }
    (times.batch > 0.0).then_some(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tells_how_long_each_statement_took() {
        let log = "2026-01-01 UTC [1] LOG:  duration: 0.250 ms  statement: SELECT to_char((now\n\
                   2026-01-01 UTC [1] LOG:  duration: 1.500 ms  statement: BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET\n\
                   2026-01-01 UTC [1] LOG:  duration: 0.250 ms  statement: COMMIT\n\
                   2026-01-01 UTC [1] LOG:  duration: 2.000 ms  statement: BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; SET\n";
        assert_eq!(times(log), Some(Times { batch: 1.5, backlog: 2.0, all: 4.0 }));
        assert_eq!(times("LOG:  ready\n"), None);
    }
}
