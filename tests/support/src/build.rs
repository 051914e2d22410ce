//! Runs cargo in the workspace, and builds the operator: for `xtask`, and for the benchmark.

use crate::progress;
use anyhow::Context;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder of the workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("this package is a folder of the workspace")
}

/// `cargo` in the workspace.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.current_dir(root());
    // What `cargo run` says of xtask is not so for what it builds, and ring is built again whenever it is said or not said.
    for (key, _) in std::env::vars_os() {
        if key.to_str().is_some_and(|key| key.starts_with("CARGO_PKG_") || key.starts_with("CARGO_MANIFEST_")) {
            cargo.env_remove(key);
        }
    }
    cargo
}

/// What a build made: the binary, and cargo's message about every library and program that it is made of.
pub struct Built {
    pub binary: PathBuf,
    pub artifacts: Vec<Value>,
}

/// Builds the operator, with its progress and errors on the screen. Where it is.
pub fn build_operator(profile: &str) -> anyhow::Result<PathBuf> {
    progress::note(&format!("Building the operator ({profile})"));
    let mut build = cargo();
    build.args(["build", "--locked", "--bin", "audit-log-sweeper", "--profile", profile]);
    Ok(compile(build)?.binary)
}

/// Runs a build of the operator.
pub fn compile(mut build: Command) -> anyhow::Result<Built> {
    // Only the messages for programs tell where the result is: the target folder can be anywhere.
    build.args(["--message-format", "json-render-diagnostics"]).stderr(std::process::Stdio::inherit());
    let output = build.output().context("cargo cannot be started")?;
    anyhow::ensure!(output.status.success(), "the operator does not compile");
    let messages = String::from_utf8(output.stdout)?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let artifacts: Vec<Value> = messages.filter(|message| message["reason"] == "compiler-artifact").collect();
    // Those of build scripts are not named.
    let binary = artifacts.iter().find_map(|artifact| artifact["executable"].as_str().map(PathBuf::from));
    Ok(Built { binary: binary.context("cargo did not say where it put the operator")?, artifacts })
}
