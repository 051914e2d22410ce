//! The command line: `run` the operator, `sweep` once or `check` without a cluster, print the `crd`. Reads the
//! environment.

mod check;
mod input;
mod run;
mod sweep;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::api::crd;

/// Completes audit log rows that a crash left open, on a schedule, in any PostgreSQL table.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the operator: sweep what the AuditLogSweepers of the cluster say
    Run(run::Run),
    /// Sweep once, without a cluster, what the AuditLogSweeper in a file says
    Sweep(sweep::Sweep),
    /// Look whether a sweep could run, and print the SQL that mends what is in its way; change nothing
    Check(check::Check),
    /// Print the CustomResourceDefinition as YAML
    Crd,
}

/// How a result is printed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Output {
    Text,
    Json,
}

impl Cli {
    /// Runs the command. Exits with 0 when it did what it should, 1 when it failed or found something not ready, 2 when
    /// its input is bad.
    pub fn main(self) -> ExitCode {
        let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return complain(&anyhow::Error::from(error).context("cannot start threads"), 1),
        };
        let code = match self.command {
            Command::Run(args) => runtime.block_on(run::run(args)),
            Command::Sweep(args) => runtime.block_on(sweep::sweep(args)),
            Command::Check(args) => runtime.block_on(check::check(args)),
            Command::Crd => print_crd(),
        };
        // A name that is being looked up must not hold the exit up.
        runtime.shutdown_background();
        code
    }
}

fn complain(error: &anyhow::Error, code: u8) -> ExitCode {
    drop(writeln!(std::io::stderr(), "error: {error:#}"));
    ExitCode::from(code)
}

fn print(text: &str) -> ExitCode {
    match writeln!(std::io::stdout(), "{}", text.trim_end()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(&anyhow::Error::from(error).context("cannot write the output"), 1),
    }
}

fn print_crd() -> ExitCode {
    let yaml = || anyhow::Ok(serde_saphyr::to_string(&crd::json()?)?);
    yaml().map_or_else(|error| complain(&error, 1), |yaml| print(&yaml))
}

/// A token that the first SIGTERM or SIGINT cancels, and the task that listens until then.
fn stop_signal() -> std::io::Result<(CancellationToken, JoinHandle<()>)> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let listening = tokio::spawn({
        let stop = stop.clone();
        async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            stop.cancel();
        }
    });
    Ok((stop, listening))
}

/// The CAs to trust where a spec names none: those of `SSL_CERT_FILE`, else those compiled in.
fn default_roots() -> anyhow::Result<Arc<rustls::RootCertStore>> {
    let pem = std::env::var_os("SSL_CERT_FILE")
        .filter(|path| !path.is_empty())
        .map(|path| std::fs::read(&path).with_context(|| format!("cannot read SSL_CERT_FILE {}", path.display())))
        .transpose()?;
    crate::sweep::tls::default_roots(pem.as_deref()).map(Arc::new).context("SSL_CERT_FILE")
}
