//! A temporary folder that is removed when it is dropped, and also when this process panics, is interrupted or killed.

use crate::process::{Account, wait_until_ended};
use anyhow::Context;
use nix::sys::statvfs::{FsFlags, statvfs};
use std::env;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Waits for the end of its input, which is the end of whoever started it, then for the programs that run in the folder.
const WATCHDOG: &str = r#"
read -r _
tenths=0
while [ -n "$(ls "$1/.running" 2>/dev/null)" ] && [ $tenths -lt 200 ]; do sleep 0.1; tenths=$((tenths + 1)); done
rm -rf "$1"
"#;

/// Where Linux keeps files in memory.
const SHARED_MEMORY: &str = "/dev/shm";

/// Databases of a whole run take about half of this.
const ROOM: u64 = 8 << 30;

/// Whether a folder has much space, and programs can be started from it.
fn has_room(folder: &Path) -> bool {
    statvfs(folder).is_ok_and(|space| {
        let room = space.blocks_available().saturating_mul(space.fragment_size());
        room >= ROOM && !space.flags().contains(FsFlags::ST_NOEXEC)
    })
}

pub struct Scratch {
    path: PathBuf,
    watchdog: Child,
}

impl Scratch {
    /// Makes the folder, for the account alone when there is one.
    pub fn new(account: Option<Account>) -> anyhow::Result<Scratch> {
        Self::new_in(&env::temp_dir(), account)
    }

    /// Makes a folder for very many small files: in memory, where there is plenty of it.
    pub fn fast() -> anyhow::Result<Scratch> {
        let shared_memory = Path::new(SHARED_MEMORY);
        let folder = if has_room(shared_memory) { shared_memory.to_owned() } else { env::temp_dir() };
        Self::new_in(&folder, None)
    }

    fn new_in(folder: &Path, account: Option<Account>) -> anyhow::Result<Scratch> {
        let cannot = || format!("no folder can be made in {}: set TMPDIR to one where it can", folder.display());
        let made = tempfile::Builder::new().prefix("audit-log-sweeper-").tempdir_in(folder).with_context(cannot)?;
        let running = Self::running(made.path());
        fs::create_dir(&running)?;
        fs::set_permissions(made.path(), Permissions::from_mode(0o700))?;
        if let Some(account) = account {
            account.own(&running)?;
            account.own(made.path())?;
        }
        let mut watchdog = Command::new("/bin/sh");
        watchdog.args(["-c", WATCHDOG, "sh"]).arg(made.path());
        // Not ours to interrupt: Ctrl-C goes to the whole process group of the terminal.
        watchdog.process_group(0).current_dir("/").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let watchdog = watchdog.spawn().context("/bin/sh cannot be started")?;
        Ok(Scratch { path: made.keep(), watchdog })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where every running program has a file, so that the folder outlives it.
    pub(crate) fn running(path: &Path) -> PathBuf {
        path.join(".running")
    }

    /// Writes a file that only its owner may read: the owner of the folder.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>, account: Option<Account>) -> anyhow::Result<PathBuf> {
        let path = self.path.join(name);
        let written =
            fs::write(&path, contents).and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o600)));
        written.with_context(|| format!("{} cannot be written", path.display()))?;
        if let Some(account) = account {
            account.own(&path)?;
        }
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        wait_until_ended(&mut self.watchdog, Duration::from_secs(25));
    }
}
