//! `cargo xtask bench index`: measures what the sweep's partial index costs an application that inserts and completes rows.

mod finding;

pub use finding::finding;

use super::load::{Request, Saturation};
use super::results::{Part, Sample, Samples};
use super::stats::{number, percentile};
use super::steps::Steps;
use super::sweep::{rotated, settings};
use super::table::{completed, copy_database, execute_file, one, stale, without_index};
use super::{Output, conclude, machine, until_interrupted};
use anyhow::ensure;
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use support::postgres::{Binaries, PostgresServer};
use support::progress;
use tokio_postgres::Client;

/// The database with the complete rows, and its copy for one run.
const TEMPLATE: &str = "complete";
const RUN: &str = "run";

/// Successive intervals show whether requests become slower.
const INTERVALS: u32 = 3;

/// The key of the section in the file.
const SECTION: &str = "index";

#[derive(Args, Clone)]
pub struct Options {
    /// Major versions of PostgreSQL
    #[arg(long, value_delimiter = ',', default_value = "13,15,18")]
    postgres: Vec<u32>,
    /// Complete rows of the table
    #[arg(long, default_value_t = 500_000, value_parser = clap::value_parser!(i64).range(1..))]
    rows: i64,
    /// Stale rows that a crash leaves
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(i64).range(1..))]
    stale: i64,
    /// How often each subject runs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of each of the three intervals
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Connections of the application
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32))]
    connections: u8,
    #[command(flatten)]
    output: Output,
}

impl Options {
    /// The options that matter to the numbers.
    fn kept(&self) -> Value {
        let Options { rows, stale, rounds, seconds, connections, .. } = self;
        json!({ "rows": rows, "stale": stale, "rounds": rounds, "seconds": seconds, "connections": connections })
    }
}

/// The index that the table has for the sweep.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Subject {
    Without,
    Plain,
    Private,
}

impl Subject {
    const ALL: [Subject; 3] = [Subject::Without, Subject::Plain, Subject::Private];

    fn name(self) -> &'static str {
        match self {
            Subject::Without => "no index",
            Subject::Plain => "plain index",
            Subject::Private => "private index",
        }
    }

    async fn create(self, client: &Client) -> anyhow::Result<()> {
        let plain = "CREATE INDEX ON audit_log (time_started, id) WHERE time_completed IS NULL";
        match self {
            Subject::Without => Ok(()),
            Subject::Plain => Ok(client.batch_execute(plain).await?),
            Subject::Private => execute_file(client, "index.sql").await,
        }
    }
}

/// The state of the table when requests begin.
#[derive(Clone, Copy, Debug)]
struct Situation {
    crash: bool,
    autovacuum: bool,
}

impl Situation {
    const ALL: [Situation; 4] = [
        Situation { crash: false, autovacuum: false },
        Situation { crash: false, autovacuum: true },
        Situation { crash: true, autovacuum: false },
        Situation { crash: true, autovacuum: true },
    ];

    fn name(self) -> String {
        let state = if self.crash { "crash" } else { "healthy" };
        format!("{state}, autovacuum {}", self.switch())
    }

    fn switch(self) -> &'static str {
        if self.autovacuum { "on" } else { "off" }
    }
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let mut store = options.output.open("index.json")?;
    for major in &options.postgres {
        let name = format!("PostgreSQL {major}");
        if store.has(&name, SECTION, &options.kept()) {
            progress::note(&format!("{name}: all is measured (--afresh measures again)"));
            continue;
        }
        let mut settings = settings(Binaries::of_major(*major)?);
        // Each run sets the table's own switch.
        settings.settings.push(("autovacuum".into(), "on".into()));
        store.results.machine = machine::describe()?;
        until_interrupted(async {
            let server = PostgresServer::start(settings).await?;
            progress::note(&format!("PostgreSQL {}", server.version()));
            let began = Instant::now();
            let samples = Bench { options, server: &server }.measure().await?;
            let seconds = began.elapsed().as_secs_f64().round();
            store.keep(&name, SECTION, Part { options: options.kept(), seconds, samples })?;
            progress::note(&format!("  PostgreSQL {} took {seconds} s", server.version()));
            anyhow::Ok(())
        })?;
    }
    progress::note(&format!("The benchmark took {} s", started.elapsed().as_secs()));
    conclude(&store.path)
}

struct Bench<'a> {
    options: &'a Options,
    server: &'a PostgresServer,
}

impl Bench<'_> {
    async fn measure(&self) -> anyhow::Result<Samples> {
        self.make_template().await?;
        let mut samples = Samples::default();
        let runs = Subject::ALL.len() * Situation::ALL.len() * self.options.rounds as usize;
        let mut steps = Steps::new("requests", runs);
        let mut turn = 0;
        for round in 0..self.options.rounds {
            for situation in Situation::ALL {
                // One round is common, so another subject begins in each situation too.
                for subject in rotated(&Subject::ALL, turn) {
                    steps.next(&format!("{}, {}", situation.name(), subject.name()));
                    let values = self.requests(situation, subject).await?;
                    samples.push(Sample { case: situation.name(), subject: subject.name().into(), round, values });
                }
                turn += 1;
            }
        }
        Ok(samples)
    }

    async fn make_template(&self) -> anyhow::Result<()> {
        let client = without_index(self.server, TEMPLATE).await?;
        client.batch_execute("ALTER TABLE audit_log SET (autovacuum_enabled = off)").await?;
        completed(&client, "a table", self.options.rows).await?;
        Ok(client.batch_execute("VACUUM (FREEZE, ANALYZE) audit_log").await?)
    }

    /// Measures one subject on a copy of its own.
    async fn requests(&self, situation: Situation, subject: Subject) -> anyhow::Result<BTreeMap<String, f64>> {
        copy_database(self.server, TEMPLATE, RUN).await?;
        let client = self.server.connect(RUN).await?;
        self.prepare(&client, situation, subject).await?;
        let interval = Duration::from_secs(self.options.seconds);
        let saturation = Saturation::run(self.server, RUN, self.options.connections, interval * INTERVALS).await?;
        let open = one(&client, "SELECT count(*) FROM audit_log WHERE time_completed IS NULL").await?;
        let expected = if situation.crash { self.options.stale } else { 0 };
        ensure!(open == expected, "{open} rows are open after the requests, not {expected}");
        let values = values(&saturation.requests, saturation.began, interval);
        progress::note(&format!("    {} requests/s", rates(&values).join(", ")));
        Ok(values)
    }

    /// Brings a copy into a situation. No row is open at its ANALYZE, as on a server whose requests all end.
    async fn prepare(&self, client: &Client, situation: Situation, subject: Subject) -> anyhow::Result<()> {
        subject.create(client).await?;
        client.batch_execute("ANALYZE audit_log").await?;
        if situation.crash {
            stale(client, "a table after a crash", self.options.stale).await?;
        }
        client.batch_execute("CHECKPOINT").await?;
        // Last, so that autovacuum does not come before the requests.
        let autovacuum = format!("ALTER TABLE audit_log SET (autovacuum_enabled = {})", situation.switch());
        Ok(client.batch_execute(&autovacuum).await?)
    }
}

/// What the application felt in each interval. A request belongs to the interval in which its completion ends.
fn values(requests: &[Request], began: Instant, interval: Duration) -> BTreeMap<String, f64> {
    let mut values = BTreeMap::new();
    for index in 0..INTERVALS {
        let from = began + interval * index;
        let window = from..from + interval;
        let within: Vec<&Request> = requests.iter().filter(|request| window.contains(&request.completed)).collect();
        let p99 = |since: fn(&Request) -> Instant| {
            let took = |request: &&Request| (request.completed - since(request)).as_secs_f64() * 1000.0;
            percentile(&within.iter().map(took).collect::<Vec<_>>(), 99.0)
        };
        let found = [
            ("rate", Some(within.len() as f64 / interval.as_secs_f64())),
            ("complete p99", p99(|request| request.complete_due)),
            ("request p99", p99(|request| request.due)),
        ];
        // An interval without a request has a rate, and no latency.
        values.extend(found.into_iter().filter_map(|(name, value)| Some((format!("{name} {}", index + 1), value?))));
    }
    values
}

/// The rates of the intervals, in their order.
fn rates(values: &BTreeMap<String, f64>) -> Vec<String> {
    (1..=INTERVALS).filter_map(|index| values.get(&format!("rate {index}")).copied().map(number)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_in_the_interval_in_which_it_ends() {
        let began = Instant::now();
        let at = |millis| began + Duration::from_millis(millis);
        let request = |due, started, completed| Request {
            due: at(due),
            started: at(started),
            complete_due: at(started),
            completed: at(completed),
        };
        let requests =
            [request(0, 1, 4), request(1900, 1995, 2000), request(2500, 2501, 2600), request(5900, 5950, 6000)];
        let found = values(&requests, began, Duration::from_secs(2));
        let expected = [
            ("complete p99 1", 3.0),
            ("complete p99 2", 99.0),
            ("rate 1", 0.5),
            ("rate 2", 1.0),
            // Nothing ended in the third interval: the last request ended after it.
            ("rate 3", 0.0),
            ("request p99 1", 4.0),
            ("request p99 2", 100.0),
        ];
        assert_eq!(found, expected.map(|(name, value)| (name.to_owned(), value)).into());
        assert_eq!(rates(&found), ["0.500", "1", "0"]);
    }

    #[test]
    fn every_situation_has_a_name_of_its_own() {
        let names = Situation::ALL.map(Situation::name);
        assert_eq!(names[0], "healthy, autovacuum off");
        assert_eq!(names[3], "crash, autovacuum on");
        assert!(names[1] != names[2]);
    }

    #[test]
    fn the_number_of_rounds_matters_and_the_file_does_not() {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            options: Options,
        }
        let kept = |arguments: &[&str]| {
            let all = ["index"].iter().chain(arguments);
            <Cli as clap::Parser>::try_parse_from(all).unwrap().options.kept()
        };
        assert_eq!(kept(&["--output", "x", "--postgres", "15"]), kept(&[]));
        assert_ne!(kept(&["--rounds", "2"]), kept(&[]));
    }
}
