//! What the numbers were measured on.

use anyhow::Context;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::process::Command;
use std::time::Instant;
use support::process::output;
use support::scratch::Scratch;

use super::stats::percentile;

/// So many writes tell how fast the disk is.
const WRITES: usize = 300;

/// CPU, memory, kernel, disk, by name.
pub fn describe() -> anyhow::Result<BTreeMap<String, String>> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let (cpu, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kilobytes = field(&memory, "MemTotal").and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
    let kernel = output(Command::new("uname").args(["-srm"])).unwrap_or_default();
    let machine = [
        ("cpu", format!("{}, {cores} cores", field(&cpu, "model name").unwrap_or_else(|| "unknown".into()))),
        ("memory", kilobytes.map_or_else(|| "unknown".into(), |kb| format!("{:.0} GiB", kb / 1024.0 / 1024.0))),
        ("kernel", kernel.trim().to_owned()),
        ("disk", disk()?),
        ("date", chrono::Utc::now().format("%Y-%m-%d").to_string()),
    ];
    Ok(machine.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

/// How long the disk takes to keep one page, as a COMMIT asks it to: what pg_test_fsync measures.
fn disk() -> anyhow::Result<String> {
    let scratch = Scratch::new(None)?;
    let mut file = File::create(scratch.path().join("fsync")).context("no file can be made")?;
    let mut millis = vec![];
    for write in 0..WRITES {
        // Over and over in 16 MB, as the write-ahead log.
        file.seek(std::io::SeekFrom::Start((write as u64 % 2048) * 8192))?;
        let started = Instant::now();
        file.write_all(&[write as u8; 8192])?;
        file.sync_data()?;
        millis.push(started.elapsed().as_secs_f64() * 1000.0);
    }
    let at = |percent| percentile(&millis, percent).unwrap_or_default();
    Ok(format!("8 kB write and fdatasync: median {:.2} ms, p99 {:.2} ms", at(50.0), at(99.0)))
}
