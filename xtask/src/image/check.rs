//! `cargo xtask image --check`: that a commit makes one image wherever it is built, and that its binary is ready at once.

use super::platform::Platform;
use super::{ForPlatform, Image, VERSION, build};
use anyhow::{Context, bail, ensure};
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;
use std::time::{Duration, Instant};
use support::build::root;
use support::control_plane::ControlPlane;
use support::process::{Program, output};
use support::scratch::Scratch;
use support::tools::Tools;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

/// From the start of the process to the first /readyz that says so. The best of some starts, for the machine has more to do.
const READY: Duration = Duration::from_millis(100);
const STARTS: u32 = 10;

pub(super) fn run(image: &Image, profile: &str) -> anyhow::Result<()> {
    same_elsewhere(image, profile)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(ready_in_time(image))
}

/// Builds the commit again from a clone: another folder, other times, nothing compiled before.
fn same_elsewhere(image: &Image, profile: &str) -> anyhow::Result<()> {
    let git = |args: &[&str]| output(Command::new("git").args(args).current_dir(root()));
    ensure!(git(&["status", "--porcelain"])?.is_empty(), "what is not committed is in no clone: commit it first");
    let scratch = Scratch::new(None)?;
    let clone = scratch.path().join("a clone");
    git(&["clone", "--quiet", ".", &clone.display().to_string()])?;
    let (_, tag) = image.name.rsplit_once(':').unwrap_or((&image.name, VERSION));
    let platforms: Vec<_> = image.built.iter().map(|part| part.platform).collect();
    let other = build(&clone, Some(&format!("elsewhere:{tag}")), &platforms, profile)?;
    ensure!(other.digest == image.digest, "a clone of this commit makes another image: {}", other.digest);
    for (there, here) in other.built.iter().zip(&image.built) {
        ensure!(
            fs::read(&there.bill)? == fs::read(&here.bill)?,
            "a clone of this commit has another bill of materials"
        );
    }
    println!("same    image and bill of materials, built again from a clone in another folder");
    Ok(())
}

/// Starts the image's binary against a real API server that has the CRD.
async fn ready_in_time(image: &Image) -> anyhow::Result<()> {
    let runs_here = image.built.iter().find(|part| part.platform == Platform::host());
    let Some(ForPlatform { binary, .. }) = runs_here else {
        println!("NOT RUN ready in time: the image is not for this machine");
        return Ok(());
    };
    let plane = ControlPlane::start(&Tools::ensure()?).await?;
    output(plane.kubectl().args(["create", "-f"]).arg(root().join(crate::generate::CRD[0])))?;
    output(plane.kubectl().args(["wait", "crd", "--all", "--for=condition=Established", "--timeout=30s"]))?;
    let mut times = vec![];
    for _ in 0..STARTS {
        let scratch = Scratch::new(None)?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let program = Program::ours("operator", binary)
            .arg("run")
            .arg(format!("--health-address=127.0.0.1:{port}"))
            .env("KUBECONFIG", plane.kubeconfig());
        let started = Instant::now();
        let mut process = program.start(&scratch)?;
        while !ready(port).await {
            process.check()?;
            if started.elapsed() > Duration::from_secs(30) {
                bail!("the operator is not ready after 30 s:\n{}", process.log_tail(20));
            }
            sleep(Duration::from_millis(1)).await;
        }
        times.push(started.elapsed());
    }
    times.sort();
    let best = *times.first().context("nothing was started")?;
    println!(
        "ready   {} ms after the start, at best of {STARTS}; {} ms at worst",
        best.as_millis(),
        times[times.len() - 1].as_millis()
    );
    ensure!(best < READY, "the operator should be ready within {READY:?}");
    Ok(())
}

async fn ready(port: u16) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer.contains(" 200 OK"))
    };
    ask.await.unwrap_or(false)
}
