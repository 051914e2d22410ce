//! Nothing that we start outlives us, whatever ends us.

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::env;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use support::process::{Account, Process, Program};
use support::scratch::Scratch;
use support::wait::eventually;

fn exists(pid: Pid) -> bool {
    kill(pid, None) != Err(Errno::ESRCH)
}

fn shell(scratch: &Scratch, script: &str) -> Process {
    let account = Account::unprivileged().unwrap();
    let program = Program { account, grace: Duration::from_secs(1), ..Program::new("shell", "/bin/sh") };
    program.arg("-c").arg(script).start(scratch).unwrap()
}

fn scratch() -> Scratch {
    Scratch::new(Account::unprivileged().unwrap()).unwrap()
}

const DEAF: &str = "trap '' TERM; while :; do sleep 0.05; done";

#[test]
fn dropping_stops_the_program_then_removes_its_folder() {
    let scratch = scratch();
    let folder = scratch.path().to_owned();
    let process = shell(&scratch, "exec sleep 600");
    let pid = process.pid();
    assert!(exists(pid) && folder.exists());
    drop(process);
    assert!(!exists(pid), "the program runs on");
    drop(scratch);
    assert!(!folder.exists(), "the folder is still there");
}

#[test]
fn a_program_that_does_not_listen_is_killed() {
    let scratch = scratch();
    let process = shell(&scratch, DEAF);
    let pid = process.pid();
    process.stop();
    assert!(!exists(pid), "the program runs on");
}

#[test]
fn a_program_that_ends_by_itself_is_noticed_with_what_it_said() {
    let scratch = scratch();
    let mut process = shell(&scratch, "echo the reason; exit 3");
    while process.is_running() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let error = process.check().unwrap_err().to_string();
    assert!(error.contains("shell ended by itself") && error.contains("the reason"), "{error}");
}

#[test]
fn a_program_can_be_killed_at_once_and_started_again_in_the_same_folder() {
    let scratch = scratch();
    let process = shell(&scratch, DEAF);
    let pid = process.pid();
    process.kill9().unwrap();
    assert!(!exists(pid), "the program runs on");
    let mut process = shell(&scratch, DEAF);
    process.check().unwrap();
}

/// The other side of the next test, which runs this one in a process of its own and kills that.
#[test]
fn a_parent_that_will_be_killed() {
    if env::var_os("TO_BE_KILLED").is_some() {
        let scratch = scratch();
        let process = shell(&scratch, DEAF);
        println!("\nstarted {} {}", process.pid(), scratch.path().display());
        std::thread::sleep(Duration::from_secs(60));
    }
}

#[tokio::test]
async fn the_program_and_its_folder_go_when_the_parent_is_killed() {
    let mut parent = Command::new(env::current_exe().unwrap());
    parent
        .args(["--exact", "a_parent_that_will_be_killed", "--nocapture"])
        .env("TO_BE_KILLED", "1")
        .stdout(Stdio::piped());
    let mut parent = parent.spawn().unwrap();
    let lines = BufReader::new(parent.stdout.take().unwrap()).lines();
    let started = lines.map(Result::unwrap).find_map(|line| line.strip_prefix("started ").map(str::to_owned)).unwrap();
    let (pid, folder) = started.split_once(' ').unwrap();
    let (pid, folder) = (Pid::from_raw(pid.parse().unwrap()), PathBuf::from(folder));
    assert!(exists(pid) && folder.exists());

    kill(Pid::from_raw(parent.id().cast_signed()), Signal::SIGKILL).unwrap();
    parent.wait().unwrap();
    eventually("the end of program and folder", Duration::from_secs(10), async || gone(pid, &folder)).await;
}

fn gone(pid: Pid, folder: &Path) -> Result<(), String> {
    match (exists(pid), folder.exists()) {
        (false, false) => Ok(()),
        (program, folder) => Err(format!("program there: {program}, folder there: {folder}")),
    }
}
