//! The command line: `run` the operator; `status`, `sweep-now`, `suspend`, `resume` and `check` for people with a cluster,
//! also as a plugin of kubectl; `sweep` and `check` without one. Reads the environment.

mod check;
mod cluster;
mod complete;
mod input;
mod names;
mod reasons;
mod run;
mod status;
mod style;
mod suspend;
mod sweep;
mod sweep_now;

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde_json::Value;
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
    /// Show what the AuditLogSweepers of a cluster did, what comes next, and what is wrong
    Status(status::Status),
    /// Have an AuditLogSweeper of a cluster sweep now
    SweepNow(sweep_now::SweepNow),
    /// Pause an AuditLogSweeper of a cluster
    Suspend(suspend::Suspend),
    /// Let an AuditLogSweeper of a cluster go on
    Resume(suspend::Suspend),
    /// Look whether a sweep could run, and print the SQL that mends what is in its way; change nothing
    Check(check::Check),
    /// Sweep once, without a cluster, what the AuditLogSweeper in a file says
    Sweep(sweep::Sweep),
    /// Run the operator: sweep what the AuditLogSweepers of the cluster say
    Run(run::Run),
    /// Print the CustomResourceDefinition as YAML
    Crd,
    /// Print the tables of reasons in docs/operating.md
    #[command(hide = true)]
    Reasons,
    /// Print the script that completes command lines in a shell
    Completions(complete::Completions),
}

/// How a result is printed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Output {
    Text,
    Json,
    Yaml,
}

/// Under these names kubectl finds its plugin, and what completes the plugin's words.
const PLUGIN: &str = "kubectl-sweeper";
const PLUGIN_COMPLETION: &str = "kubectl_complete-sweeper";

/// Does what the command line says, and as what the program was called. Exits with 0 when it did what it should, 1 when
/// it failed or found something not ready, 2 when its input is bad.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let called = args.first().and_then(|path| Path::new(path).file_name()).unwrap_or_default().to_owned();
    let completes = called == PLUGIN_COMPLETION;
    let command = command(completes || called == PLUGIN);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return complain(&anyhow::Error::from(error).context("cannot start threads"), 1),
    };
    let code = if completes {
        runtime.block_on(complete::answer(&command, args.get(1..).unwrap_or_default()))
    } else {
        match parse(command.clone(), args, called == PLUGIN) {
            Ok(cli) => runtime.block_on(cli.run(command)),
            Err(error) => error.exit(),
        }
    };
    // A name that is being looked up must not hold the exit up.
    runtime.shutdown_background();
    code
}

/// The commands that the plugin does not have: it starts no operator, and prints nothing that is for developers.
const NOT_PLUGIN: [&str; 3] = ["run", "crd", "reasons"];

/// What can be typed. A plugin has the commands that people with a cluster use.
fn command(plugin: bool) -> clap::Command {
    let command = Cli::command();
    if plugin {
        let command = command.name(PLUGIN).bin_name("kubectl sweeper");
        NOT_PLUGIN.iter().fold(command, |command, name| command.mut_subcommand(name, |hidden| hidden.hide(true)))
    } else {
        command
    }
}

/// Parses the command line. The plugin does not know what it does not show.
fn parse(mut command: clap::Command, args: Vec<OsString>, plugin: bool) -> Result<Cli, clap::Error> {
    let found = command.try_get_matches_from_mut(args)?;
    match found.subcommand_name().filter(|name| plugin && NOT_PLUGIN.contains(name)) {
        Some(name) => {
            let message = format!("kubectl sweeper has no command {name}; use audit-log-sweeper {name}");
            Err(command.error(ErrorKind::InvalidSubcommand, message))
        }
        None => Cli::from_arg_matches(&found),
    }
}

impl Cli {
    async fn run(self, command: clap::Command) -> ExitCode {
        match self.command {
            Command::Status(args) => status::status(args).await,
            Command::SweepNow(args) => sweep_now::sweep_now(args).await,
            Command::Suspend(args) => suspend::suspend(args, true).await,
            Command::Resume(args) => suspend::suspend(args, false).await,
            Command::Check(args) => check::check(args).await,
            Command::Sweep(args) => sweep::run(args).await,
            Command::Run(args) => run::run(args).await,
            Command::Crd => print_crd(),
            Command::Reasons => print(&reasons::tables()),
            Command::Completions(args) => complete::completions(&args, command),
        }
    }
}

fn complain(error: &anyhow::Error, code: u8) -> ExitCode {
    // What a server or a file said may be part of it.
    let text = format!("{error:#}").replace(|c: char| c.is_control() && c != '\n', " ");
    note(&format!("error: {text}"));
    ExitCode::from(code)
}

/// Says why the cluster did not do what it was asked.
fn refuse(error: &cluster::ClusterError) -> ExitCode {
    note(&format!("error: {}", status::plain(&error.to_string())));
    ExitCode::from(error.exit_code())
}

/// Tells something beside the result.
fn note(text: &str) {
    drop(writeln!(std::io::stderr(), "{text}"));
}

/// Prints a result for people, in colours where they are wanted.
fn show(text: &str) -> ExitCode {
    written(writeln!(anstream::stdout(), "{}", text.trim_end()))
}

/// Prints a result for machines.
fn respond(output: Output, value: &Value) -> ExitCode {
    match output {
        Output::Yaml => match serde_saphyr::to_string(value) {
            Ok(yaml) => print(&yaml),
            Err(error) => complain(&error.into(), 1),
        },
        Output::Text | Output::Json => print(&value.to_string()),
    }
}

fn print(text: &str) -> ExitCode {
    written(writeln!(std::io::stdout(), "{}", text.trim_end()))
}

fn written(result: std::io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Who reads has seen enough, as `head` has. The code is that of a process that SIGPIPE ended.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::from(141),
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
    crate::database::tls::default_roots(pem.as_deref()).map(Arc::new).context("SSL_CERT_FILE")
}
