//! The command line: `run` the operator, `sweep` once without a cluster, print the `crd`. Reads the environment.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use kube::ResourceExt;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::api::manifest::{self, Manifest};
use crate::api::status::Outcome;
use crate::api::{crd, spec::TlsMode};
use crate::controller::{self, Settings};
use crate::credentials::{self, ConnectionUri, SecretData};
use crate::sweep::{self, Job, Plan, Report, Target};
use crate::telemetry::http::{self, Readiness};
use crate::telemetry::{LogFormat, LogLevel, start_logs};

/// From SIGTERM on, running sweeps have this long to end and be published.
const SHUTDOWN: Duration = Duration::from_millis(4500);

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
    Run(Run),
    /// Sweep once, without a cluster, what the AuditLogSweeper in a file says
    Sweep(Sweep),
    /// Print the CustomResourceDefinition as YAML
    Crd,
}

#[derive(Debug, Args)]
struct Run {
    /// Work in this namespace only [default: all namespaces]
    #[arg(long)]
    namespace: Option<String>,
    /// Where to serve /healthz and /readyz
    #[arg(long, default_value = "0.0.0.0:8080")]
    health_address: SocketAddr,
    /// The most sweeps at once
    #[arg(long, default_value = "10", value_parser = clap::value_parser!(u16).range(1..))]
    max_concurrent_sweeps: u16,
    /// How log lines look
    #[arg(long, value_enum, default_value = "json")]
    log_format: LogFormat,
    /// The least severe log lines that are written
    #[arg(long, value_enum, default_value = "info")]
    log_level: LogLevel,
}

#[derive(Debug, Args)]
struct Sweep {
    /// File with the AuditLogSweeper, and its Secrets if the database is to be found by them; - for standard input
    #[arg(short, long)]
    file: PathBuf,
    /// URI of the database, in place of the Secret [env: DATABASE_URL, which no other user of the machine sees]
    #[arg(long)]
    database_url: Option<String>,
    /// How the result is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
    /// The least severe log lines that are written
    #[arg(long, value_enum, default_value = "warn")]
    log_level: LogLevel,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Text,
    Json,
}

impl Cli {
    /// Runs the command. Exits with 0 when it did what it should, 1 when it failed, 2 when its input is bad.
    pub fn main(self) -> ExitCode {
        let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return complain(&anyhow::Error::from(error).context("cannot start threads"), 1),
        };
        let code = match self.command {
            Command::Run(args) => runtime.block_on(run(args)),
            Command::Sweep(args) => runtime.block_on(sweep(args)),
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

/// Cancelled at the first SIGTERM or SIGINT.
fn stop_signal() -> std::io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn({
        let stop = stop.clone();
        async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            stop.cancel();
        }
    });
    Ok(stop)
}

/// The CAs to trust where a spec names none: those of `SSL_CERT_FILE`, else those compiled in.
fn default_roots() -> anyhow::Result<Arc<rustls::RootCertStore>> {
    let pem = std::env::var_os("SSL_CERT_FILE")
        .filter(|path| !path.is_empty())
        .map(|path| std::fs::read(&path).with_context(|| format!("cannot read SSL_CERT_FILE {}", path.display())))
        .transpose()?;
    sweep::tls::default_roots(pem.as_deref()).map(Arc::new).context("SSL_CERT_FILE")
}

async fn run(args: Run) -> ExitCode {
    start_logs(args.log_format, args.log_level);
    match operate(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The causes between repeat each other.
            tracing::error!(error = format!("{error}: {}", error.root_cause()), "the operator ends");
            ExitCode::FAILURE
        }
    }
}

async fn operate(args: Run) -> anyhow::Result<()> {
    let stop = stop_signal().context("cannot listen for signals")?;
    let settings = Settings {
        namespace: args.namespace,
        max_concurrent_sweeps: args.max_concurrent_sweeps.into(),
        default_roots: default_roots()?,
    };
    let client = kube::Client::try_default()
        .await
        .context("cannot find a cluster: run in a pod, or set KUBECONFIG to a kubeconfig file")?;
    let listener = http::listen(args.health_address)
        .await
        .with_context(|| format!("cannot listen on {} (--health-address)", args.health_address))?;
    let readiness = Readiness::waiting_for("the first list of AuditLogSweepers");
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        health_address = %listener.local_addr()?,
        namespace = settings.namespace.as_deref().unwrap_or("(all)"),
        "starting"
    );
    let served = tokio::spawn(http::serve(listener, readiness.clone(), stop.clone()));
    let mut controlled = tokio::spawn(controller::run(client, settings, readiness, stop.clone()));
    // Whichever long-lived task ends first, the process ends with it.
    tokio::select! {
        result = served => if !stop.is_cancelled() { bail!("the health server ended: {result:?}") },
        result = &mut controlled => {
            if !stop.is_cancelled() { bail!("the controller ended: {result:?}") }
            return Ok(());
        }
        () = stop.cancelled() => {}
    }
    tracing::info!("stopping");
    match tokio::time::timeout(SHUTDOWN, controlled).await {
        Ok(ended) => ended.context("the controller panicked"),
        Err(_) => bail!("sweeps did not end within {SHUTDOWN:?} of the signal; what they committed may be uncounted"),
    }
}

async fn sweep(args: Sweep) -> ExitCode {
    start_logs(LogFormat::Text, args.log_level);
    let (job, stop) = match prepare(&args) {
        Ok(ready) => ready,
        Err(error) => return complain(&error, 2),
    };
    let report = sweep::sweep(&job, &stop).await;
    let written = match args.output {
        Output::Json => print(&json_report(&job, &report)),
        Output::Text => print(&text_report(&report)),
    };
    if let Some(error) = &report.error {
        complain(&anyhow::Error::msg(format!("{}: {error}", error.reason().as_str())), 1)
    } else if report.outcome() == Outcome::Stopped {
        complain(&anyhow::Error::msg("stopped by a signal"), 1)
    } else {
        written
    }
}

fn prepare(args: &Sweep) -> anyhow::Result<(Job, CancellationToken)> {
    let manifest = manifest::read(&read_file(&args.file)?).with_context(|| args.file.display().to_string())?;
    let sweeper = &manifest.sweeper;
    let database = &sweeper.spec.database;
    let secret_ref = &database.secret_ref;
    let namespace = sweeper.namespace().unwrap_or_else(|| "default".into());
    let url = args.database_url.clone().or_else(|| std::env::var("DATABASE_URL").ok().filter(|url| !url.is_empty()));
    let uri = match url {
        Some(url) => ConnectionUri::new(&url),
        None => {
            let data = secret(&manifest, &namespace, &secret_ref.name, ", or set --database-url or DATABASE_URL")?;
            credentials::uri(data, &namespace, &secret_ref.name, secret_ref.key.as_deref())?
        }
    };
    let tls = database.tls.as_ref().filter(|tls| tls.mode != Some(TlsMode::Disable));
    let ca = tls
        .and_then(|tls| tls.ca_secret_ref.as_ref())
        .map(|ca| anyhow::Ok(credentials::ca(secret(&manifest, &namespace, &ca.name, "")?, &ca.name)?))
        .transpose()?;
    let mode = database.tls.as_ref().and_then(|tls| tls.mode);
    let application_name = format!("audit-log-sweeper/{namespace}/{}", sweeper.name_any());
    let target = Target::new(&uri, mode, ca.as_deref(), &default_roots()?, &application_name)?;
    let plan = Plan::new(&sweeper.spec)?;
    Ok((Job { limit: plan.limit, plan, target, resume_after: None }, stop_signal()?))
}

fn read_file(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
    } else {
        text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(text)
}

fn secret<'a>(manifest: &'a Manifest, namespace: &str, name: &str, or: &str) -> anyhow::Result<&'a SecretData> {
    let found = manifest.secrets.iter().find(|secret| {
        secret.metadata.name.as_deref() == Some(name)
            && secret.metadata.namespace.as_deref().unwrap_or("default") == namespace
    });
    found
        .and_then(|secret| secret.data.as_ref())
        .with_context(|| format!("the file holds no Secret {name} of namespace {namespace}: add it{or}"))
}

fn json_report(job: &Job, report: &Report) -> String {
    let error = report.error.as_ref();
    json!({
        "timedOut": report.timed_out,
        "cutoff": report.cutoff,
        "limit": job.plan.limit,
        "outcome": report.outcome(),
        "batches": report.batches,
        "refused": report.refused,
        "skipped": report.skipped,
        "suppressed": report.suppressed,
        "uncertain": report.uncertain,
        "durationMilliseconds": report.duration_milliseconds(),
        "backlog": report.backlog,
        "error": error.map(|error| json!({ "reason": error.reason().as_str(), "message": error.to_string() })),
    })
    .to_string()
}

fn text_report(report: &Report) -> String {
    let backlog = report.backlog.as_ref();
    let mut lines = vec![
        ("outcome", format!("{:?}", report.outcome())),
        ("timed out", report.timed_out.to_string()),
        ("batches", report.batches.to_string()),
        ("backlog", backlog.map_or_else(|| "not counted".into(), |backlog| backlog.display.clone())),
        ("cutoff", report.cutoff.map_or_else(|| "none".into(), |cutoff| cutoff.to_rfc3339())),
        ("took", format!("{:.0?}", report.duration)),
    ];
    for (name, count) in [
        ("refused", report.refused),
        ("suppressed", report.suppressed),
        ("skipped", report.skipped),
        ("uncertain", report.uncertain),
    ] {
        if count > 0 {
            lines.push((name, count.to_string()));
        }
    }
    lines.iter().map(|(name, value)| format!("{name:<11}{value}\n")).collect()
}
