//! `cargo xtask test`: gets what the tests run on, runs them in a temporary folder of their own, and sees what they left.

use crate::cargo;
use anyhow::Context;
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread::sleep;
use std::time::{Duration, Instant};
use support::postgres::{Binaries, hostile};
use support::process::output;
use support::scratch::Scratch;
use support::tools::Tools;
use support::{bouncer, leaks, prometheus, tools};

/// Servers get a signal when the tests end; this is how long they may take.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn run(
    major: Option<u32>,
    pgbouncer: bool,
    kubernetes: Option<&str>,
    arguments: &[String],
) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let tools = Tools::of(kubernetes)?;
    println!("{}", output(Command::new(&tools.kube_apiserver).arg("--version"))?.trim());
    let postgres = match major {
        Some(major) => Binaries::of_major(major)?,
        None => Binaries::ensure()?,
    };
    println!("PostgreSQL {} in {}", postgres.version, postgres.folder.display());

    let temporary = Scratch::new(None)?;
    // As root, PostgreSQL runs as another user, who has to get to its folder in there.
    fs::set_permissions(temporary.path(), Permissions::from_mode(0o711))?;
    let output_of_all = Scratch::new(None)?;
    let mut tests = cargo();
    tests.args(["test", "--locked"]).env("TMPDIR", temporary.path()).env(leaks::FOLDER, output_of_all.path());
    let server_logs = Scratch::new(None)?;
    tests.env(hostile::FOLDER, server_logs.path());
    if let Some(major) = major {
        tests.env("AUDIT_LOG_SWEEPER_POSTGRES", major.to_string());
    }
    if pgbouncer {
        tests.env("AUDIT_LOG_SWEEPER_POOLED", "1");
    }
    if let Some(minor) = kubernetes {
        tests.env(tools::KUBERNETES, minor);
    }
    let database_only = major.is_some() || pgbouncer;
    tests.args(if database_only { &["--test", "it"][..] } else { &["--workspace"] });
    tests.args(arguments);
    if !arguments.iter().any(|argument| argument == "--") {
        tests.arg("--");
    }
    tests.args(database_only.then_some("database::")).arg("--include-ignored");
    if kubernetes.is_some() {
        // Its sweeps have no API server.
        tests.args(["--skip", "database::"]);
    }
    // What is not everywhere is left out aloud, and not counted as passed.
    let bouncer = bouncer::installed().is_some();
    anyhow::ensure!(
        bouncer || !pgbouncer,
        "PgBouncer is not installed (Debian and Ubuntu: `apt-get install pgbouncer`)"
    );
    for (there, tests_left_out, what) in [
        (
            bouncer,
            "bouncer::",
            "through PgBouncer, which is not installed (Debian and Ubuntu: `apt-get install pgbouncer`)",
        ),
        (
            ["prometheus", "promtool"].iter().all(|program| prometheus::installed(program).is_some()),
            "prometheus::",
            "of alerts, dashboard and metrics with Prometheus, which is not installed (Debian and Ubuntu: `apt-get install prometheus`)",
        ),
        (
            ["psql", "jq", "bash"].iter().all(|program| prometheus::installed(program).is_some()),
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
            tests.args(["--skip", tests_left_out]);
        }
    }
    let status = tests.status().context("cargo cannot be started")?;

    let left = left_behind(temporary.path())?;
    println!("\nTests took {} s in all", started.elapsed().as_secs());
    if !left.is_empty() {
        println!("{PATIENCE:?} after the tests these are still there:\n{}", left.join("\n"));
        return Ok(ExitCode::FAILURE);
    }
    println!("No process and no folder was left behind");
    let (leaks, files, bytes) = leaks::search(output_of_all.path())?;
    println!("Searched {files} outputs of the product, {} kB, for the secrets planted in the tests", bytes / 1024);
    anyhow::ensure!(files > 0 || database_only || !arguments.is_empty(), "no output was kept, so nothing was searched");
    let (hijacked, canaries) = hostile::search(server_logs.path())?;
    anyhow::ensure!(
        canaries > 0 || !arguments.is_empty(),
        "no server's log was kept, so no hijacked name would be seen"
    );
    if !hijacked.is_empty() {
        println!("These lookalikes of another schema ran instead of the server's own:");
        hijacked.iter().for_each(|(what, statement)| println!("{what}, in {statement}"));
        return Ok(ExitCode::FAILURE);
    }
    println!("No lookalike of another schema ran, on {canaries} servers with a hostile search_path");
    if !leaks.is_empty() {
        println!("Secrets were shown {} times:\n{}", leaks.len(), leaks.join("\n"));
        return Ok(ExitCode::FAILURE);
    }
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Says what is left out; also in the file that CI ends with.
fn not_run(what: &str) -> anyhow::Result<()> {
    println!("{what}");
    if let Some(file) = std::env::var_os("AUDIT_LOG_SWEEPER_NOT_RUN") {
        writeln!(fs::File::options().append(true).open(file)?, "{what}")?;
    }
    Ok(())
}

/// Folders in the temporary folder, and processes that have one of them on their command line, as all servers do.
fn left_behind(temporary: &Path) -> anyhow::Result<Vec<String>> {
    let end = Instant::now() + PATIENCE;
    let place = format!("{}/audit-log-sweeper-", temporary.display());
    loop {
        let entries = fs::read_dir(temporary)?.collect::<Result<Vec<_>, _>>()?;
        let folders = entries.iter().map(|entry| entry.path().display().to_string());
        let mut left: Vec<String> = folders.filter(|folder| folder.starts_with(&place)).collect();
        let processes = output(Command::new("ps").args(["-ww", "-A", "-o", "pid=,args="]));
        let processes = processes.context("ps is needed (Debian and Ubuntu: `apt-get install procps`)")?;
        left.extend(processes.lines().filter(|process| process.contains(&place)).map(str::to_owned));
        if left.is_empty() || Instant::now() > end {
            return Ok(left);
        }
        sleep(Duration::from_millis(100));
    }
}
