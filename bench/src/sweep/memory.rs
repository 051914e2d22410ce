//! How much memory the program takes while it drains as much as a sweep may.

use super::Bench;
use crate::results::{Sample, Samples};
use crate::subjects::Subject;
use crate::table;
use anyhow::{Context, ensure};
use std::fs;
use std::time::{Duration, Instant};
use support::progress;
use tokio::time::sleep;

/// How often it is looked at.
const PAUSE: Duration = Duration::from_millis(20);

/// So many looks are kept.
const KEPT: usize = 20;

impl Bench<'_> {
    pub(super) async fn memory(&mut self) -> anyhow::Result<Samples> {
        let rows = self.options.memory_rows;
        let client = table::empty(self.server, "memory").await?;
        table::stale(&client, "a table", rows).await?;
        let uri = self.server.superuser_uri("memory");
        let started = Instant::now();
        let product = self.means.product;
        let mut child = product.start(&uri, rows, self.options.batch)?;
        let pid = child.id().context("the sweep has ended already")?;
        let mut looks = vec![];
        while child.try_wait()?.is_none() {
            // It may end in between.
            looks.extend(resident(pid).map(|megabytes| (started.elapsed().as_secs_f64(), megabytes)));
            sleep(PAUSE).await;
        }
        let swept = product.end(child, started).await?;
        ensure!(swept.number("timedOut") == rows as f64, "{} of {rows} rows were swept", swept.report["timedOut"]);
        progress::note(&format!("  {rows} rows in {:.1} s", started.elapsed().as_secs_f64()));
        ensure!(looks.len() >= 8, "the sweep ended before it could be looked at");
        let mut samples = Samples::default();
        let apart = looks.len().div_ceil(KEPT);
        for (index, looks) in looks.chunks(apart).enumerate() {
            let peak = looks.iter().map(|(_, megabytes)| *megabytes).fold(0.0, f64::max);
            let seconds = looks.last().map_or(0.0, |(seconds, _)| *seconds);
            let values = [("seconds", seconds), ("megabytes", peak)];
            samples.push(Sample::new("drain", Subject::Ours.name(), u32::try_from(index)?, values));
        }
        drop(client);
        let admin = self.server.connect("postgres").await?;
        admin.batch_execute("DROP DATABASE memory WITH (FORCE)").await?;
        Ok(samples)
    }
}

/// The resident memory of a process, in MB.
pub fn resident(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().split(' ').next()?.parse::<f64>().ok()? * 1024.0 / 1e6)
}
