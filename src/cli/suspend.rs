//! `suspend` and `resume`: an AuditLogSweeper of the cluster is told to pause, or to go on.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::cluster::{self, Cluster, ClusterArgs, ClusterError};
use super::status::ObjectView;
use super::{Output, refuse, respond, show};

#[derive(Debug, Args)]
pub struct Suspend {
    /// AuditLogSweeper
    #[arg(value_parser = cluster::name)]
    name: String,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// How the result is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

/// Sets `spec.suspend`, unless it is so already.
pub async fn suspend(args: Suspend, suspend: bool) -> ExitCode {
    match set(&args, suspend).await {
        Ok((seen, changed)) => match args.output {
            Output::Text => show(&sentence(&seen.namespace, &seen.name, suspend, changed)),
            output => respond(
                output,
                &json!({ "namespace": seen.namespace, "name": seen.name, "suspend": suspend, "changed": changed }),
            ),
        },
        Err(error) => refuse(&error),
    }
}

async fn set(args: &Suspend, suspend: bool) -> Result<(ObjectView, bool), ClusterError> {
    let cluster = Cluster::connect(&args.cluster).await?;
    let found = ObjectView::from(&cluster.get(&args.name).await?);
    // Of a spec that cannot be read nothing is known.
    if found.spec.is_ok() && found.suspend() == suspend {
        return Ok((found, false));
    }
    let patched = cluster.patch(&args.name, &json!({ "spec": { "suspend": suspend } })).await?;
    Ok((ObjectView::from(&patched), true))
}

fn sentence(namespace: &str, name: &str, suspend: bool, changed: bool) -> String {
    let state = match (suspend, changed) {
        (true, true) => "suspended now: no sweep begins",
        (true, false) => "already suspended",
        (false, true) => "resumed: a sweep that is overdue begins at once",
        (false, false) => "already resumed: it is not suspended",
    };
    format!("{name} in namespace {namespace} is {state}")
}
