//! `cargo xtask test`: gets what the tests run on, runs them in temporary folders of their own, and sees what they left.

mod lane;

use anyhow::{Context, ensure};
use lane::Lane;
use std::fs;
use std::io::Write;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Instant;
use support::build::cargo;
use support::postgres::Binaries;
use support::process::{installed, output};
use support::tools::Tools;
use support::{bouncer, progress};

/// What to run.
pub struct Options<'a> {
    /// The database suite alone, on these major versions.
    pub postgres: &'a [u32],
    /// The database suite alone, through PgBouncer.
    pub pgbouncer: bool,
    /// Another minor version of Kubernetes than the newest.
    pub kubernetes: Option<&'a str>,
    pub repeat: u32,
    /// For `cargo test`.
    pub arguments: &'a [String],
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let tools = Tools::of(options.kubernetes)?;
    println!("{}", output(Command::new(&tools.kube_apiserver).arg("--version"))?.trim());
    let skips = skips(options)?;
    // Before the tests, so that lanes do not wait for each other's build.
    let built = cargo().args(["test", "--locked", "--workspace", "--no-run", "--quiet"]).status();
    ensure!(built.context("cargo cannot be started")?.success(), "the tests do not compile");
    for round in 1..=options.repeat {
        if options.repeat > 1 {
            println!("\n== Round {round} of {}, after {} s", options.repeat, started.elapsed().as_secs());
        }
        if !round_passes(options, &skips)? {
            return Ok(ExitCode::FAILURE);
        }
    }
    println!("\nTests took {} s in all", started.elapsed().as_secs());
    Ok(ExitCode::SUCCESS)
}

/// Runs everything once. Lanes run side by side: most tests wait for something most of the time.
fn round_passes(options: &Options, skips: &[&'static str]) -> anyhow::Result<bool> {
    let lanes = lanes(options, skips)?;
    let [lane] = lanes.as_slice() else {
        let done = thread::scope(|scope| {
            let running: Vec<_> = lanes.iter().map(|lane| scope.spawn(|| lane.run_quietly())).collect();
            running.into_iter().map(|lane| lane.join().unwrap_or_else(|_| Ok(false))).collect::<Vec<_>>()
        });
        let mut passed = true;
        for done in done {
            passed &= done?;
        }
        return Ok(passed);
    };
    lane.run()
}

fn lanes(options: &Options, skips: &[&'static str]) -> anyhow::Result<Vec<Lane>> {
    let mut lanes = vec![];
    for major in options.postgres {
        let binaries = Binaries::of_major(*major)?;
        println!("PostgreSQL {} in {}", binaries.version, binaries.folder.display());
        lanes
            .push(Lane::database(format!("PostgreSQL {major}"))?.env("AUDIT_LOG_SWEEPER_POSTGRES", &major.to_string()));
    }
    if options.pgbouncer {
        lanes.push(Lane::database("PgBouncer".into())?.env("AUDIT_LOG_SWEEPER_POOLED", "1"));
    }
    if lanes.is_empty() {
        let binaries = Binaries::ensure()?;
        println!("PostgreSQL {} in {}", binaries.version, binaries.folder.display());
        let mut lane = Lane::everything()?;
        if let Some(minor) = options.kubernetes {
            // The sweeps of the database suite have no API server.
            lane = lane.env(support::tools::KUBERNETES, minor).skip("database::");
        }
        lanes.push(lane);
    }
    let side_by_side = lanes.len();
    let finish = |lane: Lane| {
        let lane = skips.iter().fold(lane, |lane, tests| lane.skip(tests));
        lane.arguments(options.arguments).beside(side_by_side)
    };
    Ok(lanes.into_iter().map(finish).collect())
}

/// Tests that cannot run here. What is not everywhere is left out aloud, and not counted as passed.
fn skips(options: &Options) -> anyhow::Result<Vec<&'static str>> {
    let there = |programs: &[&str]| programs.iter().all(|program| installed(program).is_some());
    let bouncer = bouncer::installed().is_some();
    ensure!(
        bouncer || !options.pgbouncer,
        "PgBouncer is not installed (Debian and Ubuntu: `apt-get install pgbouncer`)"
    );
    let mut skips = vec![];
    for (there, tests, what) in [
        (
            bouncer,
            "bouncer::",
            "through PgBouncer, which is not installed (Debian and Ubuntu: `apt-get install pgbouncer`)",
        ),
        (
            there(&["prometheus", "promtool"]),
            "prometheus::",
            "of alerts, dashboard and metrics with Prometheus, which is not installed (Debian and Ubuntu: `apt-get install prometheus`)",
        ),
        (
            there(&["psql", "jq", "bash"]),
            "docs::commands::",
            "of the commands in the documents, which need psql, jq and bash (Debian and Ubuntu: `apt-get install postgresql-client jq`)",
        ),
        (
            nix::unistd::geteuid().is_root(),
            "a_name_server_that_never_answers",
            "of a silent name server, which needs root",
        ),
    ] {
        if !there {
            not_run(&format!("NOT RUN: the tests {what}"))?;
            skips.push(tests);
        }
    }
    Ok(skips)
}

/// Says what is left out; also in the file that CI ends with.
fn not_run(what: &str) -> anyhow::Result<()> {
    progress::note(what);
    if let Some(file) = std::env::var_os("AUDIT_LOG_SWEEPER_NOT_RUN") {
        writeln!(fs::File::options().append(true).open(file)?, "{what}")?;
    }
    Ok(())
}
