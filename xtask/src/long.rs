//! `cargo xtask history`, `chaos` and `crowd`: play for longer, or with more objects, what the test suite plays shortly.

use anyhow::Context;
use std::process::ExitCode;
use support::build::cargo;
use support::postgres::Binaries;

/// Writers, sweepers and killed backends on one table.
pub fn history(seconds: u64, seed: u64) -> anyhow::Result<ExitCode> {
    let settings = [("HISTORY_SECONDS", seconds), ("HISTORY_SEED", seed)];
    play("database::history::no_history_breaks_a_promise", &settings)
}

/// Two replicas under every fault at once.
pub fn chaos(seconds: u64, seed: u64) -> anyhow::Result<ExitCode> {
    play("chaos::no_chaos_breaks_a_promise", &[("CHAOS_SECONDS", seconds), ("CHAOS_SEED", seed)])
}

/// Healthy objects beside all kinds of bad neighbours, so many hundreds in all.
pub fn crowd(hundreds: u64) -> anyhow::Result<ExitCode> {
    play("isolation::in_a_crowd_the_healthy_are_on_time_whatever_the_others_meet", &[("CROWD_HUNDREDS", hundreds)])
}

fn play(test: &str, settings: &[(&str, u64)]) -> anyhow::Result<ExitCode> {
    Binaries::ensure()?;
    let mut run = cargo();
    run.args(["test", "--locked", "--workspace", "--test", "it", "--", "--exact", "--nocapture", test]);
    run.envs(settings.iter().map(|(name, value)| (name, value.to_string())));
    let status = run.status().context("cargo cannot be started")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
