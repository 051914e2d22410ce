//! `audit-log-sweeper check`: looks whether a sweep could run, and prints what fixes what it finds.

use std::path::PathBuf;
use std::process::ExitCode;

use chrono::SecondsFormat;
use clap::Args;
use serde_json::{Value, json};

use super::cluster::{self, Cluster, ClusterArgs};
use super::input::{self, FetchError, Input, Source};
use super::status::count;
use super::{Output, complain, note, print, refuse, respond};
use crate::api::Reason;
use crate::api::spec::Mode;
use crate::api::status::Backlog;
use crate::preflight::{self, Finding, Fix, Part, PreflightReport, Severity, Subject};
use crate::telemetry::{LogFormat, start_logs};

/// What may be otherwise where the operator runs.
const AWAY: [Reason; 3] = [Reason::NameResolutionFailed, Reason::ConnectTimeout, Reason::DatabaseUnreachable];

#[derive(Debug, Args)]
pub struct Check {
    /// AuditLogSweeper of a cluster; with its Secrets, as you may read them, and the database as this machine reaches it
    #[arg(value_parser = cluster::name, required_unless_present = "file", conflicts_with = "file")]
    name: Option<String>,
    /// File with the AuditLogSweeper, and its Secrets if the database is to be found by them; - for standard input
    #[arg(short, long, conflicts_with_all = ["namespace", "context", "kubeconfig"])]
    file: Option<PathBuf>,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    source: Source,
}

/// Checks once. Changes nothing.
pub async fn check(args: Check) -> ExitCode {
    start_logs(LogFormat::Text, args.source.log_level);
    let read = match (&args.file, &args.name) {
        (Some(file), _) => input::read(file, &args.source).map_err(|error| complain(&error, 2)),
        (None, name) => fetch(&args, name.as_deref().unwrap_or_default()).await,
    };
    let Input { plan, target } = match read {
        Ok(input) => input,
        Err(code) => return code,
    };
    // What keeps us from looking is a finding like any other.
    let checked = preflight::check(&plan, &target).await.unwrap_or_else(|error| early(Finding::from(&error)));
    let written = report(args.source.output, &checked, plan.mode);
    if args.name.is_some() && checked.findings.iter().any(|finding| AWAY.contains(&finding.reason)) {
        note(
            "note: this was looked at from here, not from the operator's pod. Where only pods reach the database, use \
             `kubectl port-forward` and --database-url 'postgresql://USER:PASSWORD@HOST/DATABASE?hostaddr=127.0.0.1', \
             where HOST is the name in its certificate",
        );
    }
    if checked.ready() { written } else { ExitCode::from(1) }
}

/// The object and its Secrets as they are in the cluster. What is wrong with the Secrets is a finding, as it is for the
/// operator: Err is the exit code after it was told.
async fn fetch(args: &Check, name: &str) -> Result<Input, ExitCode> {
    let cluster = Cluster::connect(&args.cluster).await.map_err(|error| refuse(&error))?;
    match input::fetch(&cluster, name, &args.source).await {
        Ok(input) => Ok(input),
        Err(FetchError::Cluster(error)) => Err(refuse(&error)),
        Err(FetchError::Input(error)) => Err(complain(&error, 2)),
        Err(FetchError::Found(reason, message)) => {
            let field = match reason {
                Reason::InvalidSpec => "spec",
                Reason::TLSFailed => "spec.database.tls",
                _ => "spec.database.secretRef",
            };
            let (subject, fix) = (Subject::Connection, Some(Fix::Field(field.into())));
            let finding = Finding { subject, severity: Severity::Blocking, reason, message, fix };
            // It blocks every sweep, so nothing is said about the first one.
            report(args.source.output, &early(finding), Mode::default());
            Err(ExitCode::from(1))
        }
    }
}

/// What is found before there is a connection.
fn early(finding: Finding) -> PreflightReport {
    PreflightReport { findings: vec![finding], ..PreflightReport::default() }
}

fn report(output: Output, checked: &PreflightReport, mode: Mode) -> ExitCode {
    match output {
        Output::Text => print(&text_report(checked, mode)),
        output => respond(output, &machine_report(checked)),
    }
}

fn machine_report(checked: &PreflightReport) -> Value {
    json!({
        "ready": checked.ready(),
        "server": checked.server_version.as_ref().map(|version| json!({ "version": version })),
        "findings": checked.findings.iter().map(json_finding).collect::<Vec<_>>(),
        "firstSweep": checked.first_sweep,
    })
}

fn json_finding(finding: &Finding) -> Value {
    json!({
        "severity": finding.severity.as_str(),
        "blocksSweep": finding.severity == Severity::Blocking,
        "reason": finding.reason.as_str(),
        "message": finding.message,
        "fix": finding.fix.as_ref().map(|fix| match fix {
            Fix::Sql(parts) => json!({ "steps": parts.iter().map(json_part).collect::<Vec<_>>() }),
            Fix::Field(field) => json!({ "field": field }),
        }),
    })
}

/// A role where it is one, and who may run it in words.
fn json_part(part: &Part) -> Value {
    json!({ "role": part.run_as.role(), "runAs": part.run_as.to_string(), "sql": part.statements })
}

/// A line for each thing looked at; then what fixes each finding. What follows these lines is SQL, ready to paste.
fn text_report(checked: &PreflightReport, mode: Mode) -> String {
    let (mut lines, mut unseen) = (vec![], vec![]);
    for subject in [Subject::Connection].into_iter().chain(Subject::LOOKED_AT) {
        let mut line = |state: &str, said: &str| lines.push(format!("{state:<9}{subject:<14}{}", one_line(said)));
        let findings: Vec<_> = checked.findings.iter().filter(|finding| finding.subject == subject).collect();
        let passed = checked.passed.iter().find(|(passed, _)| *passed == subject);
        match passed {
            Some((_, seen)) => line("ok", seen),
            None if findings.is_empty() => unseen.extend((subject != Subject::Connection).then_some(subject)),
            None => findings.iter().for_each(|finding| line(finding.severity.as_str(), &finding.message)),
        }
    }
    match unseen.as_slice() {
        [] => {}
        [one] => lines.push(format!("{:<9}{one:<14}not looked at", "-")),
        _ => lines.push(format!("{:<9}{:<14}not looked at", "-", "the rest")),
    }
    let count = |severity: &str| match checked.findings.iter().filter(|f| f.severity.as_str() == severity).count() {
        1 => format!("1 {severity}"),
        count => format!("{count} {severity}s"),
    };
    let verdict = if checked.ready() { "ready" } else { "not ready" };
    lines.push(format!("\n-- {verdict}: {}, {}", count("error"), count("warning")));
    if checked.blocking().is_none() {
        lines.push(format!("-- {}", first_sweep(checked.first_sweep.as_ref(), mode)));
    }
    if checked.findings.iter().any(|finding| matches!(finding.fix, Some(Fix::Sql(_)))) {
        lines.push(
            "-- SQL: each statement by itself, not in one transaction (psql without -1), as the role named above it"
                .into(),
        );
    }
    for finding in &checked.findings {
        let head = format!("\n-- {} ({})", finding.reason.as_str(), finding.subject);
        match &finding.fix {
            Some(Fix::Sql(parts)) => {
                let mut lead = format!("{head}:");
                for part in parts {
                    lines.push(format!("{lead} as {}", one_line(&part.run_as.to_string())));
                    lead = "-- then".into();
                    lines.extend(part.statements.iter().map(|sql| format!("{sql};")));
                }
            }
            Some(Fix::Field(field)) if field == "spec.database.secretRef" => {
                lines.push(format!("{head}: change {field}, or what is in the Secret that it names"));
            }
            Some(Fix::Field(field)) => lines.push(format!("{head}: change {field}")),
            None => {}
        }
    }
    lines.join("\n")
}

/// To apply the object is what cannot be taken back, unless it only observes.
fn first_sweep(stale: Option<&Backlog>, mode: Mode) -> String {
    let Some(stale) = stale else { return "the first sweep: its rows could not be counted in statementTimeout".into() };
    if stale.remaining == 0 {
        return "the first sweep takes no row: none is stale".into();
    }
    let rows = count(stale.remaining, "row", "rows");
    let rest = if stale.at_least { ", and more are stale" } else { "" };
    let oldest = stale.oldest_time_started.map(|time| time.to_rfc3339_opts(SecondsFormat::Secs, true));
    let oldest = oldest.map(|time| format!("; the oldest started {time}")).unwrap_or_default();
    match mode {
        Mode::Apply => format!("the first sweep takes {rows}{rest}{oldest}. That cannot be undone"),
        Mode::Observe => {
            format!("mode: Observe changes nothing; with Apply, the first sweep takes {rows}{rest}{oldest}")
        }
    }
}

/// Names may hold anything: none of them ends a comment.
fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}
