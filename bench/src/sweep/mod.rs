//! `cargo xtask bench sweep`: which sections run, on which servers, and what they have in common.

mod drain;
mod foreground;
mod idle;
mod memory;

pub use memory::resident;

use super::product::Product;
use super::results::{Part, Samples};
use super::subjects::{Means, Subject};
use super::table::{Copy, Layout, Templates};
use super::{Output, PROFILE, conclude, machine, until_interrupted};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use support::build::build_operator;
use support::postgres::{Binaries, PostgresOptions, PostgresServer};
use support::progress;

#[derive(Args, Clone)]
pub struct Options {
    /// Major versions of PostgreSQL
    #[arg(long, value_delimiter = ',', default_value = "13,15,18")]
    postgres: Vec<u32>,
    /// Rows of the table
    #[arg(long, default_value_t = 5_000_000, value_parser = clap::value_parser!(i64).range(1..))]
    rows: i64,
    /// Stale rows among them
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(i64).range(1..=1_000_000))]
    stale: i64,
    /// Rows in one transaction
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(i64).range(1..=10_000))]
    batch: i64,
    /// How often each subject runs
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// What to measure [default: all]
    #[arg(long = "section", value_enum, value_delimiter = ',')]
    sections: Vec<Section>,
    /// Sizes of the table for the idle sweep, rows that are completed without a vacuum being as many as the middle one
    #[arg(long, value_delimiter = ',', default_value = "100000,1000000,10000000")]
    idle_rows: Vec<i64>,
    /// Stale rows for the section memory
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(i64).range(1..=1_000_000))]
    memory_rows: i64,
    /// Stale rows for the section foreground
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(i64).range(1..=1_000_000))]
    foreground_rows: i64,
    /// How long requests are measured without a sweep, in the section foreground
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Section {
    Drain,
    Statistics,
    Snapshot,
    Trips,
    Idle,
    Foreground,
    Memory,
}

impl Section {
    /// Its key in the file; findings are shown in the order of the keys.
    fn key(self) -> &'static str {
        match self {
            Section::Drain => "1 drain",
            Section::Statistics => "2 statistics",
            Section::Snapshot => "3 snapshot",
            Section::Trips => "4 trips",
            Section::Idle => "5 idle",
            Section::Foreground => "6 foreground",
            Section::Memory => "7 memory",
        }
    }

    /// The options that matter to it.
    fn options(self, options: &Options) -> Value {
        let Options { rows, stale, batch, rounds, idle_rows, memory_rows, foreground_rows, seconds, .. } = options;
        match self {
            Section::Idle => json!({ "rows": idle_rows, "stale": stale, "batch": batch, "rounds": rounds }),
            Section::Memory => json!({ "stale": memory_rows, "batch": batch }),
            Section::Foreground => {
                json!({ "rows": rows, "stale": foreground_rows, "batch": batch, "rounds": rounds, "seconds": seconds })
            }
            _ => json!({ "rows": rows, "stale": stale, "batch": batch, "rounds": rounds }),
        }
    }
}

/// What a section has at hand.
struct Bench<'a> {
    options: &'a Options,
    server: &'a PostgresServer,
    templates: Templates<'a>,
    means: &'a Means<'a>,
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(options.rows >= 2 * options.stale, "at least half of the rows must not be stale");
    let started = Instant::now();
    let mut store = options.output.open("sweep.json")?;
    let sections =
        if options.sections.is_empty() { Section::value_variants().to_vec() } else { options.sections.clone() };
    let product = Product::new(build_operator(PROFILE)?)?;
    let psql = psql();
    if psql.is_none() {
        progress::note(
            "NOT RUN: the shell loop, for want of psql (Debian and Ubuntu: `apt-get install postgresql-client`)",
        );
    }
    let means = Means { product: &product, psql, batch: options.batch };
    for major in &options.postgres {
        let name = format!("PostgreSQL {major}");
        let to_do = |section: &&Section| !store.has(&name, section.key(), &section.options(options));
        let left: Vec<Section> = sections.iter().filter(to_do).copied().collect();
        if left.is_empty() {
            progress::note(&format!("{name}: all sections are measured (--afresh measures again)"));
            continue;
        }
        let binaries = Binaries::of_major(*major)?;
        store.results.machine = machine::describe()?;
        until_interrupted(async {
            let server = PostgresServer::start(settings(binaries)).await?;
            let templates = Templates::new(&server, options.rows, options.stale);
            let mut bench = Bench { options, server: &server, templates, means: &means };
            for section in left {
                progress::note(&format!("PostgreSQL {}, section {section:?}", server.version()));
                let began = Instant::now();
                let samples = bench.measure(section).await?;
                let seconds = began.elapsed().as_secs_f64().round();
                store.keep(&name, section.key(), Part { options: section.options(options), seconds, samples })?;
                progress::note(&format!("  section {section:?} took {seconds} s"));
            }
            anyhow::Ok(())
        })?;
    }
    progress::note(&format!("The benchmark took {} s", started.elapsed().as_secs()));
    conclude(&store.path)
}

/// As large as a small production server's; nothing that happens by itself unless a section asks for it.
pub fn settings(binaries: Binaries) -> PostgresOptions {
    let settings = [
        ("shared_buffers", "'1GB'"),
        ("max_wal_size", "'16GB'"),
        ("checkpoint_timeout", "'1h'"),
        ("autovacuum", "off"),
        // A drain is over in seconds: where autovacuum is on, it comes into that time.
        ("autovacuum_naptime", "'5s'"),
    ];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    PostgresOptions { binaries: Some(binaries), settings, fsync: true, ..Default::default() }
}

/// The one that is installed.
fn psql() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join("psql")).find(|psql| psql.is_file())
}

impl<'a> Bench<'a> {
    async fn measure(&mut self, section: Section) -> anyhow::Result<Samples> {
        match section {
            Section::Drain => self.drain().await,
            Section::Statistics => self.statistics().await,
            Section::Snapshot => self.snapshot().await,
            Section::Trips => self.trips().await,
            Section::Idle => self.idle().await,
            Section::Foreground => self.foreground().await,
            Section::Memory => self.memory().await,
        }
    }

    async fn copy(&mut self, layout: Layout) -> anyhow::Result<Copy<'a>> {
        self.templates.copy(layout).await
    }

    /// Drains a copy; how long it took, and how many rows it completed: all.
    async fn time(&self, subject: Subject, copy: &Copy<'_>) -> anyhow::Result<(Duration, f64)> {
        let took = subject.drain(self.means, &copy.uri(), self.options.stale).await?;
        Ok((took, copy.check_all().await? as f64))
    }
}

/// The order of a round: another begins in each.
pub fn rotated<T: Clone>(subjects: &[T], round: u32) -> Vec<T> {
    let mut subjects = subjects.to_vec();
    let by = (round as usize).checked_rem(subjects.len()).unwrap_or_default();
    subjects.rotate_left(by);
    subjects
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_subject_begins_in_each_round() {
        let order = |round| rotated(&["a", "b", "c"], round).concat();
        assert_eq!([0, 1, 2, 3].map(order), ["abc", "bca", "cab", "abc"]);
    }
}
