//! A program that never outlives us: a watchdog shell stops it when the pipe that we hold ends, however we ended.

use crate::leaks;
use crate::scratch::Scratch;
use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, User};
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The program runs beside two readers: one waits for its end, the other for the end of the pipe. The parent-death signal of
/// Linux would be shorter, but it is tied to the thread that started the program, and test threads end early.
const WATCHDOG: &str = r#"
log=$1 marker=$2 signal=$3 tenths=$4; shift 4
exec 3<&0 </dev/null
: >"$marker"
"$@" >>"$log" 2>&1 3<&- &
program=$!
(
    read -r _ <&3
    kill -s "$signal" $program
    while kill -s 0 $program && [ $tenths -gt 0 ]; do sleep 0.1; tenths=$((tenths - 1)); done
    kill -s KILL $program
) >/dev/null 2>&1 &
guard=$!
echo $program
exec >/dev/null 2>&1
wait $program
status=$?
kill $guard
rm -f "$marker"
exit $status
"#;

/// Whom a program runs as.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    pub uid: Uid,
    pub gid: Gid,
}

impl Account {
    /// For programs that refuse to run as root: nobody, when we are root; else nothing has to change.
    pub fn unprivileged() -> anyhow::Result<Option<Account>> {
        if !Uid::effective().is_root() {
            return Ok(None);
        }
        let nobody = User::from_name("nobody")?
            .context("PostgreSQL refuses to run as root, and there is no user nobody to run it as")?;
        Ok(Some(Account { uid: nobody.uid, gid: nobody.gid }))
    }

    pub fn apply(self, command: &mut Command) {
        command.uid(self.uid.as_raw()).gid(self.gid.as_raw());
    }

    pub(crate) fn own(self, path: &Path) -> anyhow::Result<()> {
        let owned = chown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()));
        owned.with_context(|| format!("{} cannot be given to user {}", path.display(), self.uid))
    }
}

/// What to run, and how to stop it.
#[derive(Clone, Debug)]
pub struct Program {
    pub name: String,
    pub path: PathBuf,
    pub args: Vec<OsString>,
    pub env: Vec<(OsString, OsString)>,
    pub account: Option<Account>,
    /// What asks it to end, and how long it has before it is killed.
    pub stop_signal: Signal,
    pub grace: Duration,
    /// It is what is tested: its log is kept to be searched, if output is kept.
    pub ours: bool,
}

/// Where a program is on the PATH, if it is installed.
pub fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|program| program.is_file())
}

impl Program {
    /// The program that is tested.
    pub fn ours(name: &str, path: impl Into<PathBuf>) -> Program {
        Program { ours: true, ..Program::new(name, path) }
    }

    pub fn new(name: &str, path: impl Into<PathBuf>) -> Program {
        let (name, path) = (name.to_owned(), path.into());
        Program {
            name,
            path,
            args: vec![],
            env: vec![],
            account: None,
            stop_signal: Signal::SIGTERM,
            grace: Duration::from_secs(10),
            ours: false,
        }
    }

    pub fn arg(mut self, arg: impl Into<OsString>) -> Program {
        self.args.push(arg.into());
        self
    }

    pub fn env(mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> Program {
        self.env.push((key.into(), value.into()));
        self
    }

    /// Starts it in the folder, where its log goes too. It outlives neither the returned value nor this process.
    pub fn start(&self, scratch: &Scratch) -> anyhow::Result<Process> {
        let log = match leaks::folder().filter(|_| self.ours) {
            Some(folder) => folder.join(format!("{}-{}.log", self.name, crate::random_hex())),
            None => scratch.path().join(format!("{}.log", self.name)),
        };
        let marker = Scratch::running(scratch.path()).join(format!("{}-{}", self.name, crate::random_hex()));
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", WATCHDOG, "sh"])
            .arg(&log)
            .arg(marker)
            .arg(self.stop_signal.as_str().trim_start_matches("SIG"));
        command.arg((self.grace.as_millis() / 100).to_string()).arg(&self.path).args(&self.args);
        command.envs(self.env.iter().map(|(key, value)| (key, value))).current_dir(scratch.path());
        // Not ours to interrupt: Ctrl-C goes to the whole process group of the terminal.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        if let Some(account) = self.account {
            account.apply(&mut command);
        }
        let mut watchdog = command.spawn().with_context(|| format!("/bin/sh cannot be started for {}", self.name))?;
        let mut pid = String::new();
        BufReader::new(watchdog.stdout.take().expect("it is piped")).read_line(&mut pid)?;
        let pid = pid
            .trim()
            .parse()
            .with_context(|| format!("{} cannot be started in {}", self.name, scratch.path().display()))?;
        Ok(Process { name: self.name.clone(), grace: self.grace, pid: Pid::from_raw(pid), log, watchdog })
    }
}

/// A running program. Dropping it stops it and waits for its end.
pub struct Process {
    name: String,
    grace: Duration,
    pid: Pid,
    log: PathBuf,
    watchdog: Child,
}

impl Process {
    /// Of the program itself, not of its watchdog.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Where its log goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The watchdog ends when the program has ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.watchdog.try_wait(), Ok(None))
    }

    /// What it ended with, as a shell says it; None: it runs.
    pub fn exit_code(&mut self) -> Option<i32> {
        self.watchdog.try_wait().ok().flatten().and_then(|status| status.code())
    }

    /// For whoever waits until the program is ready: its end is an error, with what it said last.
    pub fn check(&mut self) -> anyhow::Result<()> {
        ensure!(self.is_running(), "{} ended by itself; the end of its log:\n{}", self.name, self.log_tail(20));
        Ok(())
    }

    pub fn log_tail(&self, lines: usize) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        kill(self.pid, signal).with_context(|| format!("{signal} cannot be sent to {}", self.name))
    }

    /// Asks it to end with another signal than usual and waits for the end.
    pub fn stop_with(mut self, signal: Signal) -> anyhow::Result<()> {
        // It may have ended by itself meanwhile.
        if self.is_running() {
            self.signal(signal)?;
            wait_until_ended(&mut self.watchdog, self.grace);
        }
        Ok(())
    }

    pub fn kill9(self) -> anyhow::Result<()> {
        self.stop_with(Signal::SIGKILL)
    }

    pub fn stop(self) {}
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        wait_until_ended(&mut self.watchdog, self.grace + Duration::from_secs(5));
    }
}

/// Whatever does not end in time is left to its watchdog: nothing here may hang a test.
pub(crate) fn wait_until_ended(child: &mut Child, patience: Duration) {
    let end = Instant::now() + patience;
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < end {
        sleep(Duration::from_millis(10));
    }
}

/// Runs a command to its end. Its output when it succeeds; what it said as the error when not.
pub fn output(command: &mut Command) -> anyhow::Result<String> {
    let mut tries = 0;
    let output = loop {
        match command.output() {
            // It was just copied, and a process that another thread began meanwhile still holds the file open.
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && tries < 100 => {
                tries += 1;
                sleep(Duration::from_millis(20));
            }
            ended => break ended.with_context(|| format!("{} cannot be started", command.get_program().display()))?,
        }
    };
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed ({}):\n{}", output.status, said.trim_end());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
