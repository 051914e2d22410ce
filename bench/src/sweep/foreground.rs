//! What the application feels while a backlog is drained.

use super::{Bench, rotated};
use crate::load::{Latencies, Load, capacity};
use crate::results::{Sample, Samples};
use crate::stats::percentile;
use crate::steps::Steps;
use crate::subjects::Subject;
use crate::table::{Copy, Layout, Statistics, Templates};
use anyhow::Context;
use std::time::{Duration, Instant};
use support::progress;
use tokio::time::sleep;

/// Requests run so long before anything is measured, and after a drain, so that all due in it are done.
const WARM_UP: Duration = Duration::from_secs(3);

/// The share of what the server can do at most.
const SHARE: f64 = 0.5;

/// The name of the run without a sweep.
pub const NOBODY: &str = "without a sweep";

impl<'a> Bench<'a> {
    pub(super) async fn foreground(&mut self) -> anyhow::Result<Samples> {
        // So many that the drain is slow enough to be felt, and so few that it is over in time.
        let stale = self.options.foreground_rows;
        self.templates = Templates::new(self.server, self.options.rows, stale);
        self.autovacuum("on").await?;
        let measured = self.beside_requests(stale).await;
        self.autovacuum("off").await?;
        self.templates = Templates::new(self.server, self.options.rows, self.options.stale);
        measured
    }

    async fn beside_requests(&mut self, stale: i64) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        let copy = self.requested().await?;
        let most = capacity(self.server, "run", Duration::from_secs(self.options.seconds.min(10))).await?;
        copy.drop().await?;
        let rate = most * SHARE;
        progress::note(&format!("  at most {most:.0} requests a second; {rate:.0} are made"));
        let subjects = [None, Some(Subject::Ours), Some(Subject::Original), Some(Subject::Unbounded)];
        let name = |subject: Option<Subject>| subject.map_or(NOBODY, Subject::name);
        let mut steps = Steps::new("beside requests", subjects.len() * self.options.rounds as usize);
        for round in 0..self.options.rounds {
            for subject in rotated(&subjects, round) {
                steps.next(name(subject));
                let copy = self.requested().await?;
                copy.connect().await?.batch_execute("ALTER TABLE audit_log RESET (autovacuum_enabled)").await?;
                let load = Load::start(self.server, "run", rate).await?;
                sleep(WARM_UP).await;
                let from = Instant::now();
                match subject {
                    Some(subject) => _ = subject.drain(self.means, &copy.uri(), stale).await?,
                    None => sleep(Duration::from_secs(self.options.seconds)).await,
                }
                let to = Instant::now();
                let requests = load.end().await?;
                if subject.is_some() {
                    copy.check_all().await?;
                }
                let latencies = Latencies::within(&requests, from, to);
                let at = |all: &[f64], percent| percentile(all, percent).context("no request fell into the drain");
                let values = [
                    ("requests", latencies.start.len() as f64),
                    ("rate", rate),
                    ("seconds", (to - from).as_secs_f64()),
                    ("start p50", at(&latencies.start, 50.0)?),
                    ("start p99", at(&latencies.start, 99.0)?),
                    ("complete p50", at(&latencies.complete, 50.0)?),
                    ("complete p99", at(&latencies.complete, 99.0)?),
                ];
                samples.push(Sample::new("requests", name(subject), round, values));
                copy.drop().await?;
            }
        }
        Ok(samples)
    }

    /// A copy for requests. With statistics from before the backlog a request that completes its row by `id` and
    /// `time_completed IS NULL` walks all open rows, takes ten times as long, and drowns what a sweep adds.
    async fn requested(&mut self) -> anyhow::Result<Copy<'a>> {
        self.copy(Layout::Interleaved).await?.with(Statistics::Fresh).await
    }

    async fn autovacuum(&self, value: &str) -> anyhow::Result<()> {
        let admin = self.server.connect("postgres").await?;
        admin.batch_execute(&format!("ALTER SYSTEM SET autovacuum = {value}")).await?;
        Ok(admin.batch_execute("SELECT pg_reload_conf()").await?)
    }
}
