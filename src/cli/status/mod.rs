//! `status`: what the AuditLogSweepers of a cluster do, for people. Fetches, and hands over to pure functions.

mod history;
mod object_view;
mod page;
mod screen;
mod table;
#[cfg(test)]
mod tests;
mod words;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use chrono::{DateTime, Utc};
use clap::Args;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::{Value, json};

pub use object_view::{ObjectView, advice};
pub use words::{count, plain};

use super::cluster::{self, Cluster, ClusterArgs};
use super::{Output, complain, input, note, refuse, respond, show};

/// How wide a screen is that is no terminal.
const WIDTH: usize = 100;

#[derive(Debug, Args)]
pub struct Status {
    /// AuditLogSweeper to tell all about [default: a line about each]
    #[arg(value_parser = cluster::name)]
    name: Option<String>,
    /// In all namespaces
    #[arg(short = 'A', long, conflicts_with = "name")]
    all_namespaces: bool,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Show what `kubectl get als -o json` saved in this file, in place of a cluster; - for standard input
    #[arg(short, long, conflicts_with_all = ["context", "kubeconfig"])]
    file: Option<PathBuf>,
    /// The time that the file is shown as of [default: now]
    #[arg(long, requires = "file", value_name = "TIME")]
    at: Option<DateTime<Utc>>,
    /// How the result is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

/// Shows one, or all.
pub async fn status(args: Status) -> ExitCode {
    let (place, objects) = match &args.file {
        Some(file) => match saved(file, &args) {
            Ok(objects) => (file.display().to_string(), objects),
            Err(error) => return complain(&error, 2),
        },
        None => {
            let fetched = async {
                let cluster = Cluster::connect(&args.cluster).await?;
                let objects = match &args.name {
                    Some(name) => vec![cluster.get(name).await?],
                    None => cluster.list(args.all_namespaces).await?,
                };
                let place = if args.all_namespaces {
                    "any namespace".into()
                } else {
                    format!("namespace {}", cluster.namespace)
                };
                Ok((place, objects))
            };
            match fetched.await {
                Ok(fetched) => fetched,
                Err(error) => return refuse(&error),
            }
        }
    };
    let seen: Vec<ObjectView> = objects.iter().map(ObjectView::from).collect();
    let now = args.at.unwrap_or_else(Utc::now);
    match (args.output, seen.as_slice()) {
        (Output::Text, []) => {
            note(&format!("there is no AuditLogSweeper in {place}"));
            ExitCode::SUCCESS
        }
        (Output::Text, [one]) if args.name.is_some() => show(&screen::screen(now, one, width())),
        (Output::Text, all) => {
            let namespaces = args.all_namespaces
                || all.iter().any(|seen| Some(&seen.namespace) != all.first().map(|first| &first.namespace));
            show(&table::table(now, all, namespaces, width()))
        }
        (output, [one]) if args.name.is_some() => respond(output, &one.report()),
        (output, all) => respond(output, &json!({ "items": all.iter().map(ObjectView::report).collect::<Vec<_>>() })),
    }
}

/// The columns of the terminal.
fn width() -> usize {
    let terminal = terminal_size::terminal_size_of(std::io::stdout());
    terminal.map_or(WIDTH, |(width, _)| usize::from(width.0))
}

/// What a file holds, as far as it is asked for.
fn saved(file: &Path, args: &Status) -> anyhow::Result<Vec<DynamicObject>> {
    let mut objects = read(&input::read_file(file)?).with_context(|| file.display().to_string())?;
    if let Some(namespace) = &args.cluster.namespace {
        objects.retain(|object| object.namespace().as_ref() == Some(namespace));
    }
    if let Some(name) = &args.name {
        objects.retain(|object| object.name_any() == *name);
        match objects.len() {
            0 => bail!("{} holds no AuditLogSweeper {name}", file.display()),
            1 => {}
            many => bail!("{} holds {many} AuditLogSweepers {name}; say which with --namespace", file.display()),
        }
    }
    Ok(objects)
}

/// The AuditLogSweepers in a text: single ones, or in lists.
fn read(text: &str) -> anyhow::Result<Vec<DynamicObject>> {
    // What the parser says quotes the text, and there may be a Secret in it.
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).ok().context("it is not YAML or JSON")?;
    let items = documents.into_iter().flat_map(|mut document| match document.get_mut("items").map(Value::take) {
        Some(Value::Array(items)) => items,
        _ => vec![document],
    });
    let objects: Result<Vec<DynamicObject>, _> = items
        .filter(|item| item.get("kind").and_then(Value::as_str) == Some("AuditLogSweeper"))
        .map(serde_json::from_value)
        .collect();
    let objects = objects.ok().context("an AuditLogSweeper in it has no readable metadata")?;
    if objects.is_empty() {
        bail!("it holds no AuditLogSweeper");
    }
    Ok(objects)
}
