//! `cargo xtask history` and `cargo xtask chaos`: play for as long as is said what the test suite plays for seconds.

use anyhow::Context;
use std::process::ExitCode;
use support::build::cargo;
use support::postgres::Binaries;

/// Writers, sweepers and killed backends on one table.
pub fn history(seconds: u64, seed: u64) -> anyhow::Result<ExitCode> {
    play("database::history::no_history_breaks_a_promise", "HISTORY", seconds, seed)
}

/// Two replicas under every fault at once.
pub fn chaos(seconds: u64, seed: u64) -> anyhow::Result<ExitCode> {
    play("chaos::no_chaos_breaks_a_promise", "CHAOS", seconds, seed)
}

fn play(test: &str, name: &str, seconds: u64, seed: u64) -> anyhow::Result<ExitCode> {
    Binaries::ensure()?;
    let mut run = cargo();
    run.args(["test", "--locked", "--test", "it", "--", "--exact", "--nocapture", test]);
    run.env(format!("{name}_SECONDS"), seconds.to_string()).env(format!("{name}_SEED"), seed.to_string());
    let status = run.status().context("cargo cannot be started")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
