//! `cargo xtask bench`: measures the sweep and the controller against what people would use instead, in the same run.
//!
//! `sweep`, `controller` and `index` measure. `results` keeps every run in a file. `findings` makes tables and verdicts of it.
//! They are shown here and written into docs/performance.md by `cargo xtask generate`.

mod controller;
pub mod findings;
mod index;
mod load;
mod machine;
mod product;
mod relay;
pub mod results;
pub mod stats;
mod steps;
mod subjects;
mod sweep;
mod table;
pub mod tables;

use anyhow::bail;
use clap::{Args, Subcommand};
use std::future::Future;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use support::build::{cargo, root};
use support::progress;

/// Optimized; also the program that makes the load is built so.
const PROFILE: &str = "bench-quick";

#[derive(Subcommand)]
pub enum Bench {
    /// The sweep, on PostgreSQL alone
    Sweep(sweep::Options),
    /// The operator with many objects, on a real API server and PostgreSQL
    Controller(controller::Options),
    /// What the sweep's index costs the application
    Index(index::Options),
}

/// Where results go.
#[derive(Args, Clone)]
pub struct Output {
    /// The file of results, in which another run goes on [default: a file in target/bench]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Forget what the file holds
    #[arg(long)]
    afresh: bool,
}

impl Output {
    fn open(&self, default: &str) -> anyhow::Result<results::Store> {
        let default = root().join("target/bench").join(default);
        let path = self.output.clone().unwrap_or(default);
        progress::note(&format!("Results: {}", path.display()));
        results::Store::open(&path, self.afresh)
    }
}

pub fn run(bench: &Bench) -> anyhow::Result<ExitCode> {
    // A debug build of the load would take half of the machine.
    if cfg!(debug_assertions) {
        let mut again = cargo();
        again.args(["run", "--locked", "--profile", PROFILE, "--package", "xtask", "--"]);
        again.args(std::env::args_os().skip(1));
        return Err(again.exec().into());
    }
    match bench {
        Bench::Sweep(options) => sweep::run(options),
        Bench::Controller(options) => controller::run(options),
        Bench::Index(options) => index::run(options),
    }
}

/// Runs to the end, or to Ctrl-C: then everything is stopped and removed, and what was measured whole is kept.
fn until_interrupted<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        tokio::select! {
            biased;
            _ = tokio::signal::ctrl_c() => bail!("interrupted; everything is stopped, and the next run goes on here"),
            result = work => result,
        }
    })
}

/// Shows what all sections of the file found. Fails if something did not reach what it must.
fn conclude(path: &Path) -> anyhow::Result<ExitCode> {
    let results = results::read(path)?;
    let mut passed = true;
    for (server, parts) in &results.servers {
        println!("\n== {server}\n");
        let mut all = vec![];
        for (section, part) in parts {
            let finding = findings::of(section, &part.samples);
            print!("{}", finding.text());
            all.extend(finding.verdicts);
        }
        passed &= all.iter().all(tables::Verdict::passed);
        if !all.is_empty() {
            print!("{}", tables::verdicts(&all).text());
        }
    }
    println!();
    for (what, value) in &results.machine {
        println!("{what:<8}{value}");
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
