//! What `sweep` and `check` work on: the object and its Secrets, from a file or from the cluster, or a URI in their place.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use anyhow::Context;
use clap::Args;

use super::cluster::{Cluster, ClusterError};
use super::{Output, default_roots};
use crate::api::manifest::{self, Manifest};
use crate::api::{Reason, Sweeper, validate};
use crate::credentials::{self, ConnectionUri, Credentials, CredentialsError, SecretData};
use crate::database::Target;
use crate::sweep::Plan;
use crate::telemetry::LogLevel;

/// How the database is found without its Secret, and how to tell of it.
#[derive(Debug, Args)]
pub struct Source {
    /// URI of the database, in place of the Secret [env: DATABASE_URL, which no other user of the machine sees; with --file]
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

/// Reads a file.
///
/// # Errors
/// When the file, the object in it, or what it says of the database is not right: bad input.
pub fn read(file: &Path, args: &Source) -> anyhow::Result<Input> {
    let manifest = manifest::read(&read_file(file)?).with_context(|| file.display().to_string())?;
    let sweeper = &manifest.sweeper;
    let namespace = if sweeper.namespace().is_empty() { "default" } else { sweeper.namespace() };
    let url = args.database_url.clone().or_else(|| std::env::var("DATABASE_URL").ok().filter(|url| !url.is_empty()));
    let mut secrets = BTreeMap::new();
    // The first holds the URI.
    let names = credentials::names(&sweeper.spec.database).into_iter().enumerate();
    for (index, name) in names.skip(usize::from(url.is_some())) {
        let or = if index == 0 { ", or set --database-url or DATABASE_URL" } else { "" };
        secrets.insert(name.to_owned(), secret(&manifest, namespace, name, or)?.clone());
    }
    resolve(sweeper, namespace, &secrets, url)
}

/// Why an object of the cluster cannot be worked on.
#[derive(Debug)]
pub enum FetchError {
    /// The cluster did not give it out.
    Cluster(ClusterError),
    /// What the operator would tell of the object in its status.
    Found(Reason, String),
    /// Something else is not right.
    Input(anyhow::Error),
}

/// Reads an object of the cluster, and the Secrets it names.
///
/// # Errors
/// When one of them is not there, not readable for the user, or not right.
pub async fn fetch(cluster: &Cluster, name: &str, args: &Source) -> Result<Input, FetchError> {
    let object = cluster.get(name).await.map_err(FetchError::Cluster)?;
    let sweeper = serde_json::to_value(object)
        .map_err(|error| error.to_string())
        .and_then(|object| validate::parse(&object))
        .and_then(|object| Sweeper::new(object).map_err(|broken| broken.join("; ")));
    let sweeper = sweeper.map_err(|error| {
        FetchError::Found(Reason::InvalidSpec, format!("the object is not a valid AuditLogSweeper: {error}"))
    })?;
    let database = &sweeper.spec.database;
    // Not DATABASE_URL: what is asked is whether the object's own Secret is right.
    let url = args.database_url.clone();
    let mut secrets = BTreeMap::new();
    for name in credentials::names(database).into_iter().skip(usize::from(url.is_some())) {
        let secret = cluster.secret(name).await.map_err(|error| match error {
            ClusterError::NoSecret { .. } => FetchError::Found(Reason::SecretNotFound, error.to_string()),
            error => FetchError::Cluster(error),
        })?;
        secrets.insert(name.to_owned(), secret.data.unwrap_or_default());
    }
    resolve(&sweeper, &cluster.namespace, &secrets, url).map_err(|error| {
        let credentials = error.downcast_ref::<CredentialsError>().map(CredentialsError::reason);
        match credentials.or_else(|| error.downcast_ref::<crate::database::Error>().map(crate::database::Error::reason))
        {
            // It stands on the command line, and not in the object's Secret.
            Some(Reason::InvalidConnectionURI) if args.database_url.is_some() => FetchError::Input(error),
            Some(reason) => FetchError::Found(reason, format!("{error:#}")),
            None => FetchError::Input(error),
        }
    })
}

/// From the object and its Secrets to what a sweep works on; `url` takes the place of the first Secret.
///
/// # Errors
/// When what they hold is not right.
fn resolve(
    sweeper: &Sweeper,
    namespace: &str,
    secrets: &BTreeMap<String, SecretData>,
    url: Option<String>,
) -> anyhow::Result<Input> {
    let database = &sweeper.spec.database;
    let credentials = Credentials::read(database, namespace, secrets, url.map(|url| ConnectionUri::new(&url)))?;
    let mode = database.tls.as_ref().and_then(|tls| tls.mode);
    let application_name = format!("audit-log-sweeper/{namespace}/{}", sweeper.name());
    let target = Target::new(&credentials, mode, &default_roots()?, &application_name)?;
    Ok(Input { plan: Plan::new(&sweeper.spec), target })
}

/// The text of a file, or of standard input.
///
/// # Errors
/// When it cannot be read.
pub fn read_file(path: &Path) -> anyhow::Result<String> {
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
