//! One run of tests for `cargo xtask test`, in temporary folders of its own, and what is looked for after it.

use anyhow::{Context, ensure};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::thread::{available_parallelism, sleep};
use std::time::{Duration, Instant};
use support::build::cargo;
use support::postgres::hostile;
use support::process::output;
use support::scratch::Scratch;
use support::{leaks, progress};

/// Servers get a signal when the tests end, and then their folders go: hundreds of databases on a slow disk.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(90);

/// Tests at once for each core, of all lanes: most wait for a server most of the time.
const PER_CORE: usize = 5;

pub struct Lane {
    name: String,
    database_only: bool,
    env: Vec<(String, String)>,
    skips: Vec<String>,
    arguments: Vec<String>,
    threads: usize,
    /// For what the tests make.
    temporary: Scratch,
    /// What the product said, to be searched for secrets.
    output: Scratch,
    /// The logs of database servers, to be searched for lookalikes that ran.
    server_logs: Scratch,
}

impl Lane {
    /// Every test.
    pub fn everything() -> anyhow::Result<Self> {
        Self::new("all tests".into(), false)
    }

    /// The database suite alone.
    pub fn database(name: String) -> anyhow::Result<Self> {
        Self::new(name, true)
    }

    fn new(name: String, database_only: bool) -> anyhow::Result<Self> {
        let [temporary, output] = [Scratch::fast()?, Scratch::new(None)?];
        // A log is linked into it, which needs the same file system.
        let server_logs = Scratch::fast()?;
        // As root, PostgreSQL runs as another user, who has to get to its folder in there.
        fs::set_permissions(temporary.path(), Permissions::from_mode(0o711))?;
        let (env, skips, arguments, threads) = (vec![], vec![], vec![], 1);
        Ok(Self { name, database_only, env, skips, arguments, threads, temporary, output, server_logs })
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Leaves out the tests with this in their names.
    pub fn skip(mut self, tests: &str) -> Self {
        self.skips.push(tests.into());
        self
    }

    /// Hands these to `cargo test`.
    pub fn arguments(mut self, arguments: &[String]) -> Self {
        self.arguments.extend_from_slice(arguments);
        self
    }

    /// Says how many lanes there are.
    pub fn beside(mut self, lanes: usize) -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        self.threads = (cores * PER_CORE / lanes).max(2);
        self
    }

    /// Runs the tests, with their output on the screen. Whether all is well.
    pub fn run(&self) -> anyhow::Result<bool> {
        self.run_with(|mut tests| tests.status().context("cargo cannot be started").map(|status| status.success()))
    }

    /// The same, with the output on the screen once the lane has ended.
    pub fn run_quietly(&self) -> anyhow::Result<bool> {
        let started = Instant::now();
        let folder = Scratch::new(None)?;
        let log = folder.path().join("log");
        let passed = self.run_with(|mut tests| {
            let file = File::options().create(true).append(true).open(&log)?;
            let status = tests.stdout(file.try_clone()?).stderr(file).status().context("cargo cannot be started")?;
            Ok(status.success())
        });
        let (verdict, seconds) =
            (if matches!(passed, Ok(true)) { "passed" } else { "FAILED" }, started.elapsed().as_secs());
        println!("\n== {}: {verdict} in {seconds} s\n{}", self.name, fs::read_to_string(&log).unwrap_or_default());
        passed
    }

    fn run_with(&self, mut run: impl FnMut(Command) -> anyhow::Result<bool>) -> anyhow::Result<bool> {
        let mut passed = run(self.tests(self.threads))?;
        let left = left_behind(self.temporary.path())?;
        if !left.is_empty() {
            passed = false;
            println!("{LEAVE_TIMEOUT:?} after {} these are still there:\n{}", self.name, left.join("\n"));
        }
        Ok(passed & self.is_clean()?)
    }

    /// `cargo test` with the folders of the lane. Always for the workspace: another selection of packages has other features, and
    /// builds everything anew.
    fn command(&self, what: &[&str]) -> Command {
        let mut tests = cargo();
        tests.args(["test", "--locked"]).args(what).env("TMPDIR", self.temporary.path());
        tests.env(leaks::FOLDER, self.output.path()).env(hostile::FOLDER, self.server_logs.path());
        // A backtrace is sixty lines of the runtime, and hides the message that says what was seen.
        tests.env("RUST_BACKTRACE", "0").envs(self.env.iter().map(|(name, value)| (name, value)));
        tests
    }

    fn tests(&self, threads: usize) -> Command {
        let mut tests =
            self.command(if self.database_only { &["--workspace", "--test", "it"] } else { &["--workspace"] });
        tests.args(&self.arguments);
        if !self.arguments.iter().any(|argument| argument == "--") {
            tests.arg("--");
        }
        tests.args((self.database_only && self.arguments.is_empty()).then_some("database::"));
        tests.arg("--include-ignored");
        if !self.arguments.iter().any(|argument| argument.starts_with("--test-threads")) {
            tests.arg(format!("--test-threads={threads}"));
        }
        tests.args(self.skips.iter().flat_map(|tests| ["--skip", tests]));
        tests
    }

    /// Searches what the lane's tests left to be searched.
    fn is_clean(&self) -> anyhow::Result<bool> {
        let (leaks, files, bytes) = leaks::search(self.output.path())?;
        let (hijacked, servers) = hostile::search(self.server_logs.path())?;
        let everything = self.arguments.is_empty();
        ensure!(files > 0 || !everything, "no output was kept, so nothing was searched");
        ensure!(servers > 0 || !everything, "no server's log was kept, so nothing was searched");
        let kilobytes = bytes / 1024;
        progress::note(&format!(
            "{}: searched {files} outputs of the product, {kilobytes} kB, for the secrets planted in the tests, and the logs \
             of {servers} servers for lookalikes of another schema that ran",
            self.name
        ));
        if !leaks.is_empty() {
            println!("Secrets were shown {} times:\n{}", leaks.len(), leaks.join("\n"));
        }
        for (what, statement) in &hijacked {
            println!("A lookalike of another schema ran instead of the server's own: {what}, in {statement}");
        }
        Ok(leaks.is_empty() && hijacked.is_empty())
    }
}

/// Folders in the temporary folder, and processes that have one of them on their command line, as all servers do.
fn left_behind(temporary: &Path) -> anyhow::Result<Vec<String>> {
    let end = Instant::now() + LEAVE_TIMEOUT;
    let place = format!("{}/audit-log-sweeper-", temporary.display());
    loop {
        let entries = fs::read_dir(temporary)?.collect::<Result<Vec<_>, _>>()?;
        let folders = entries.iter().map(|entry| entry.path().display().to_string());
        let mut left: Vec<String> = folders.filter(|folder| folder.starts_with(&place)).collect();
        let processes = output(Command::new("ps").args(["-ww", "-A", "-o", "pid=,args="]));
        let processes = processes.context("ps is needed (Debian and Ubuntu: `apt-get install procps`)")?;
        left.extend(processes.lines().filter(|process| process.contains(&place)).map(str::to_owned));
        if left.is_empty() || Instant::now() > end {
            return Ok(left);
        }
        sleep(Duration::from_millis(100));
    }
}
