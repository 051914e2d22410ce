//! The user's cache folder: what is slow to make is made once, whole or not at all, and found by every clone.

use crate::progress;
use anyhow::Context;
use std::env;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

/// Where everything is kept. Nothing in it is needed: deleting it costs the time to make it again.
pub fn folder() -> anyhow::Result<PathBuf> {
    if let Some(folder) = env::var_os("AUDIT_LOG_SWEEPER_CACHE") {
        return Ok(folder.into());
    }
    let home = || {
        env::home_dir()
            .context("no home folder is known: set HOME, or AUDIT_LOG_SWEEPER_CACHE to a folder for built tools")
    };
    let caches = match env::var_os("XDG_CACHE_HOME") {
        Some(caches) => PathBuf::from(caches),
        None if cfg!(target_os = "macos") => home()?.join("Library/Caches"),
        None => home()?.join(".cache"),
    };
    Ok(caches.join("audit-log-sweeper"))
}

/// The folder `kind/name` of the cache. When it is not there, `make` fills an empty one, which then gets the name.
pub(crate) fn get_or_make(
    kind: &str,
    name: &str,
    make: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<PathBuf> {
    let kind = folder()?.join(kind);
    let place = kind.join(name);
    if place.is_dir() {
        return Ok(place);
    }
    let cannot = || format!("{} cannot be written: set AUDIT_LOG_SWEEPER_CACHE to a folder that can", kind.display());
    fs::create_dir_all(&kind).with_context(cannot)?;
    let lock = File::create(kind.join(".lock")).with_context(cannot)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            progress::step("Waiting for another process that fills the same cache", || Ok(lock.lock()?))?
        }
        Err(TryLockError::Error(error)) => return Err(error).with_context(cannot),
    }
    if !place.is_dir() {
        let unfinished = kind.join(".unfinished");
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).with_context(cannot)?;
        }
        fs::create_dir(&unfinished).with_context(cannot)?;
        make(&unfinished)?;
        fs::rename(&unfinished, &place).with_context(cannot)?;
    }
    Ok(place)
}
