//! `cargo xtask history`: plays a long history of writers, sweepers and killed backends, and checks every promise on it.

use anyhow::Context;
use std::process::ExitCode;
use support::build::cargo;
use support::postgres::Binaries;

pub fn run(seconds: u64, seed: u64) -> anyhow::Result<ExitCode> {
    Binaries::ensure()?;
    let mut test = cargo();
    test.args(["test", "--locked", "--test", "it", "--", "--exact", "--nocapture"]);
    test.arg("database::history::no_history_breaks_a_promise");
    test.env("HISTORY_SECONDS", seconds.to_string()).env("HISTORY_SEED", seed.to_string());
    let status = test.status().context("cargo cannot be started")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
