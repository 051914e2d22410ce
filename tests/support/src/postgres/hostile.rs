//! Databases whose `search_path` begins with lookalikes of everything in `pg_catalog`, so that `cargo xtask test` finds any name
//! that a statement of the product leaves unqualified.

use super::{PostgresServer, connect_as_is};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The folder for the servers' logs, if databases are to be hostile.
pub const FOLDER: &str = "AUDIT_LOG_SWEEPER_HIJACKS";

/// The database that hostile ones are copied from.
pub(super) const TEMPLATE: &str = "hostile";

/// What the log says of a lookalike that ran.
const MARK: &str = "HIJACKED: ";

/// What it says once for each server, on purpose: it shows that the log is heard.
const CANARY: &str = "canary";

pub(super) fn folder() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

/// Creates the template, about 1 s.
pub(super) async fn create_template(server: &PostgresServer) -> anyhow::Result<()> {
    server.create_database(TEMPLATE).await?;
    let client = connect_as_is(&server.superuser_uri(TEMPLATE)).await?;
    client.batch_execute(include_str!("hostile.sql")).await?;
    Ok(client.batch_execute(&format!("SELECT evil.steal('{CANARY}')")).await?)
}

/// Keeps a server's log after its folder has gone.
pub(super) fn keep_log(log: &Path) -> anyhow::Result<()> {
    match folder() {
        Some(folder) => Ok(fs::hard_link(log, folder.join(format!("{}.log", crate::random_hex())))?),
        None => Ok(()),
    }
}

/// The lookalikes that ran, each with a statement in which it did, and how many canaries were heard.
pub fn search(folder: &Path) -> anyhow::Result<(BTreeMap<String, String>, usize)> {
    let (mut found, mut canaries) = (BTreeMap::new(), 0);
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if !path.is_file() {
            continue;
        }
        let log = fs::read(path)?;
        for line in String::from_utf8_lossy(&log).lines() {
            let Some((_, what)) = line.split_once(MARK) else { continue };
            match what.split_once(" in ") {
                Some((CANARY, _)) => canaries += 1,
                Some((what, statement)) => drop(found.insert(what.to_owned(), statement.to_owned())),
                None => drop(found.insert(what.to_owned(), String::new())),
            }
        }
    }
    Ok((found, canaries))
}
