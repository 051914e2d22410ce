//! What a command without a cluster works on: the file with the object and its Secrets, or a URI in their place.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use kube::ResourceExt;

use super::{Output, default_roots};
use crate::api::manifest::{self, Manifest};
use crate::credentials::{self, ConnectionUri, Credentials, SecretData};
use crate::sweep::{Plan, Target};
use crate::telemetry::LogLevel;

/// Where the object and its database are found, and how to tell of them.
#[derive(Debug, Args)]
pub struct Source {
    /// File with the AuditLogSweeper, and its Secrets if the database is to be found by them; - for standard input
    #[arg(short, long)]
    file: PathBuf,
    /// URI of the database, in place of the Secret [env: DATABASE_URL, which no other user of the machine sees]
    #[arg(long)]
    database_url: Option<String>,
    /// How the result is printed
    #[arg(short, long, value_enum, default_value = "text")]
    pub output: Output,
    /// The least severe log lines that are written
    #[arg(long, value_enum, default_value = "warn")]
    pub log_level: LogLevel,
}

/// What a command works on.
pub struct Input {
    pub plan: Plan,
    pub target: Target,
}

/// Reads it.
///
/// # Errors
/// When the file, the object in it, or what it says of the database is not right: bad input.
pub fn read(args: &Source) -> anyhow::Result<Input> {
    let manifest = manifest::read(&read_file(&args.file)?).with_context(|| args.file.display().to_string())?;
    let sweeper = &manifest.sweeper;
    let database = &sweeper.spec.database;
    let namespace = sweeper.namespace().unwrap_or_else(|| "default".into());
    let url = args.database_url.clone().or_else(|| std::env::var("DATABASE_URL").ok().filter(|url| !url.is_empty()));
    let uri = url.map(|url| ConnectionUri::new(&url));
    let mut secrets = BTreeMap::new();
    // The first holds the URI.
    for (index, name) in credentials::names(database).into_iter().enumerate().skip(usize::from(uri.is_some())) {
        let or = if index == 0 { ", or set --database-url or DATABASE_URL" } else { "" };
        secrets.insert(name.to_owned(), secret(&manifest, &namespace, name, or)?.clone());
    }
    let credentials = Credentials::read(database, &namespace, &secrets, uri)?;
    let mode = database.tls.as_ref().and_then(|tls| tls.mode);
    let application_name = format!("audit-log-sweeper/{namespace}/{}", sweeper.name_any());
    let target = Target::new(&credentials, mode, &default_roots()?, &application_name)?;
    let plan = Plan::new(&sweeper.spec)?;
    Ok(Input { plan, target })
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
