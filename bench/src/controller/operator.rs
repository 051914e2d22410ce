//! The operator's process: what it takes, and what it tells of itself.

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use support::process::{Process, Program};
use support::scratch::Scratch;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::sweep::resident;

/// How often it is looked after while it is waited for.
const PAUSE: Duration = Duration::from_millis(200);

/// Clock ticks of Linux in a second, in /proc.
const TICKS: f64 = 100.0;

pub struct Operator {
    // Dropped first: the process ends before its folder.
    process: Process,
    _scratch: Scratch,
    address: String,
}

/// What /metrics says.
#[derive(Debug, Default, PartialEq)]
pub struct Metrics {
    pub sweeps: f64,
    /// Upper bounds in seconds, and how many scheduled sweeps began no later.
    pub lags: Vec<(f64, f64)>,
}

impl Operator {
    /// Starts it, and waits until it serves.
    pub async fn start(binary: &Path, kubeconfig: &Path) -> anyhow::Result<Operator> {
        let scratch = Scratch::new(None)?;
        let program = ["run", "--lease-namespace", "sweeper", "--health-address", "127.0.0.1:0"];
        let program = program.into_iter().fold(Program::new("operator", binary), Program::arg);
        let mut process = program.env("KUBECONFIG", kubeconfig).start(&scratch)?;
        let end = Instant::now() + Duration::from_secs(10);
        let address = loop {
            let log = process.log_tail(usize::MAX);
            let said =
                |line: &str| serde_json::from_str::<Value>(line).ok()?["health_address"].as_str().map(str::to_owned);
            if let Some(address) = log.lines().find_map(said) {
                break address;
            }
            process.check()?;
            ensure!(Instant::now() < end, "the operator does not serve; its log:\n{log}");
            tokio::time::sleep(PAUSE).await;
        };
        Ok(Operator { process, _scratch: scratch, address })
    }

    /// Waits, as long as it runs.
    pub async fn sleep(&mut self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.process.check()?;
            tokio::time::sleep(PAUSE.min(end.saturating_duration_since(Instant::now()))).await;
        }
        Ok(())
    }

    /// Sends SIGTERM and waits for the end.
    pub async fn terminate(mut self) -> anyhow::Result<()> {
        self.process.signal(Signal::SIGTERM)?;
        let end = Instant::now() + Duration::from_secs(20);
        while self.process.is_running() {
            ensure!(Instant::now() < end, "the operator does not end");
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    pub fn log_tail(&self) -> String {
        format!("the end of its log:\n{}", self.process.log_tail(20))
    }

    /// Resident memory, in MB.
    pub fn resident(&self) -> anyhow::Result<f64> {
        resident(self.process.pid().as_raw().cast_unsigned()).context("the operator has ended")
    }

    /// The time that it had on processors, its own and the kernel's for it.
    pub fn cpu(&self) -> anyhow::Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.pid()))?;
        cpu(&stat).context("/proc is not as expected")
    }

    pub async fn metrics(&self) -> anyhow::Result<Metrics> {
        let mut stream = TcpStream::connect(&self.address).await?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "/metrics is not well");
        Ok(read(&answer))
    }
}

/// User and system time, the 14th and 15th field; the name before may hold blanks.
fn cpu(stat: &str) -> Option<Duration> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    Some(Duration::from_secs_f64(ticks / TICKS))
}

fn read(text: &str) -> Metrics {
    let mut metrics = Metrics::default();
    for (name, value) in text.lines().filter_map(|line| line.rsplit_once(' ')) {
        let Ok(value) = value.parse::<f64>() else { continue };
        let lag = name.strip_prefix("audit_log_sweeper_schedule_lag_seconds_bucket{le=\"");
        if let Some(bound) = lag.and_then(|rest| rest.strip_suffix("\"}")) {
            // `+Inf` is a number too.
            metrics.lags.extend(bound.parse::<f64>().ok().map(|bound| (bound, value)));
        } else if name == "audit_log_sweeper_sweep_duration_seconds_count" {
            metrics.sweeps = value;
        }
    }
    metrics
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_on_processors_is_read_past_a_name_with_blanks() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 5 0 1 2 3";
        assert_eq!(cpu(stat), Some(Duration::from_secs(2)));
    }

    #[test]
    fn lags_are_read_by_their_buckets() {
        let text = "audit_log_sweeper_schedule_lag_seconds_bucket{le=\"0.1\"} 5\n\
                    audit_log_sweeper_schedule_lag_seconds_bucket{le=\"+Inf\"} 7\n\
                    audit_log_sweeper_sweep_duration_seconds_count 9\n\
                    audit_log_sweeper_sweeps_total{namespace=\"a\"} 3\n";
        assert_eq!(read(text), Metrics { sweeps: 9.0, lags: vec![(0.1, 5.0), (f64::INFINITY, 7.0)] });
    }
}
