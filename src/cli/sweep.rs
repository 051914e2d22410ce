//! `audit-log-sweeper sweep`: one sweep without a cluster, by the same code.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::input::{self, Input, Source};
use super::{Output, complain, note, print, respond, stop_signal};
use crate::api::Failure;
use crate::api::status::Outcome;
use crate::preflight;
use crate::sweep::report::Ended;
use crate::sweep::{self, Connected, Job, Report};
use crate::telemetry::{LogFormat, start_logs};

#[derive(Debug, Args)]
pub struct Sweep {
    /// File with the AuditLogSweeper, and its Secrets if the database is to be found by them; - for standard input
    #[arg(short, long)]
    file: PathBuf,
    /// Sweep without checking the table first: in an emergency, where the check itself is in the way
    #[arg(long)]
    no_check: bool,
    #[command(flatten)]
    source: Source,
}

/// Sweeps once.
pub async fn run(args: Sweep) -> ExitCode {
    start_logs(LogFormat::Text, args.source.log_level);
    let job = match input::read(&args.file, &args.source) {
        Ok(Input { plan, target }) => Job::new(plan, target),
        Err(error) => return complain(&error, 2),
    };
    let (stop, listening) = match stop_signal() {
        Ok(listening) => listening,
        Err(error) => return complain(&anyhow::Error::from(error).context("cannot listen for signals"), 1),
    };
    let report = if args.no_check {
        note("sweeping without a check of the table (--no-check)");
        sweep::sweep(&job, &stop).await
    } else {
        check_and_sweep(&job, &stop).await
    };
    listening.abort();
    let written = match args.source.output {
        Output::Text => print(&text_report(&report)),
        output => respond(output, &machine_report(&job, &report)),
    };
    if let Err(failure) = &report.end {
        complain(&anyhow::Error::msg(format!("{}: {failure}", failure.reason.as_str())), 1)
    } else if report.outcome() == Outcome::Stopped {
        complain(&anyhow::Error::msg("stopped by a signal"), 1)
    } else {
        written
    }
}

/// The same verdict as the operator's: a blocking finding is a failure, and no row is touched.
async fn check_and_sweep(job: &Job, stop: &CancellationToken) -> Report {
    let checked = async {
        let mut connected = Connected::open(&job.plan, &job.target).await?;
        let began = Instant::now();
        let checked = preflight::look(&connected.session, &job.plan).await.map_err(|error| Failure::from(&error))?;
        match checked.blocking() {
            None => {
                // The deadline is that of the sweep alone.
                connected.exclude(began.elapsed());
                Ok(connected)
            }
            Some(finding) => {
                connected.close().await;
                Err(Failure::from(finding))
            }
        }
    };
    match stop.run_until_cancelled(checked).await {
        None => Report::new(Ok(Ended::Stopped)),
        Some(Err(failure)) => Report::new(Err(failure)),
        Some(Ok(connected)) => {
            let mut report = Report::new(Ok(Ended::Stopped));
            sweep::run(connected, job, stop, &mut report).await;
            report
        }
    }
}

fn machine_report(job: &Job, report: &Report) -> Value {
    let failure = report.end.as_ref().err();
    json!({
        "timedOut": report.timed_out,
        "cutoff": report.cutoff,
        "limit": job.plan.limit,
        "outcome": report.outcome(),
        "batches": report.batches,
        "smallBatches": report.small_batches,
        "fallbackBatches": report.fallback_batches,
        "refused": report.refused,
        "refusedIds": report.refused_ids,
        "refusedWhy": report.refused_why,
        "skipped": report.skipped,
        "suppressed": report.suppressed,
        "uncertain": report.uncertain,
        "durationMilliseconds": report.duration_milliseconds(),
        "backlog": report.backlog,
        "error": failure.map(|failure| json!({ "reason": failure.reason.as_str(), "message": failure.message })),
    })
}

fn batches(report: &Report) -> String {
    let Report { batches, small_batches, fallback_batches, .. } = report;
    let mut parts = vec![batches.to_string()];
    if *small_batches > 0 {
        parts.push(format!("{small_batches} of them small: others seem to write to the server"));
    }
    if *fallback_batches > 0 {
        parts.push(format!("{fallback_batches} of them slower: a row was in use, or a trigger stands in the way"));
    }
    parts.join(", ")
}

fn text_report(report: &Report) -> String {
    let backlog = report.backlog.as_ref();
    let mut lines = vec![
        ("outcome", format!("{:?}", report.outcome())),
        ("timed out", report.timed_out.to_string()),
        ("batches", batches(report)),
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
    if let Some(why) = &report.refused_why {
        lines.push(("why", why.clone()));
    }
    if !report.refused_ids.is_empty() {
        lines.push(("keys", report.refused_ids.join(", ")));
    }
    lines.iter().map(|(name, value)| format!("{name:<11}{value}\n")).collect()
}
