//! `audit-log-sweeper run`: the operator, from its flags to its end.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;

use super::{default_roots, stop_signal};
use crate::controller::{self, Settings};
use crate::telemetry::http::{self, Readiness};
use crate::telemetry::{LogFormat, LogLevel, start_logs};

/// From SIGTERM on, running sweeps have this long to end and be published.
const SHUTDOWN: Duration = Duration::from_millis(4500);

#[derive(Debug, Args)]
pub struct Run {
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

/// Runs until it is told to stop.
pub async fn run(args: Run) -> ExitCode {
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
