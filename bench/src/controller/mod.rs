//! `cargo xtask bench controller`: the operator with many objects, as it starts, catches up and goes on.

mod cluster;
mod operator;

use super::product::Product;
use super::results::{Part, Sample, Samples};
use super::stats::histogram_percentile;
use super::{Output, PROFILE, conclude, machine, until_interrupted};
use anyhow::{Context, ensure};
use chrono::{DateTime, TimeDelta, Utc};
use clap::Args;
use cluster::{Audit, Cluster, Counted};
use operator::Operator;
use serde_json::json;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use support::build::build_operator;
use support::postgres::{Binaries, PostgresOptions, PostgresServer};
use support::tools::Tools;
use support::{control_plane::ControlPlane, progress};
use tokio::time::sleep;

const OURS: &str = "audit-log-sweeper";

#[derive(Args, Clone)]
pub struct Options {
    /// AuditLogSweepers
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    objects: u32,
    /// The period of each: whole seconds or minutes, such as 30s or 10m
    #[arg(long, default_value = "10m", value_parser = period)]
    period: Duration,
    /// Databases on the one server, each with a table
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    databases: u32,
    /// How long the operator is watched once it has caught up
    #[arg(long, default_value_t = 180)]
    seconds: u64,
    #[command(flatten)]
    output: Output,
}

fn period(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.len() - text.len().min(1));
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        _ => return Err("must be such as 30s or 10m".into()),
    };
    number.parse::<u64>().map(|number| Duration::from_secs(number * seconds)).map_err(|error| error.to_string())
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut store = options.output.open("controller.json")?;
    let Options { objects, databases, seconds, period, .. } = options;
    let period = period.as_secs();
    let kept = json!({ "objects": objects, "databases": databases, "period seconds": period, "seconds": seconds });
    let (tools, binaries) = (Tools::ensure()?, Binaries::ensure()?);
    let name = format!("PostgreSQL {}", binaries.major());
    if store.has(&name, "controller", &kept) {
        progress::note("all is measured (--afresh measures again)");
        return conclude(&store.path);
    }
    store.results.machine = machine::describe()?;
    let product = Product::new(build_operator(PROFILE)?)?;
    let began = Instant::now();
    let samples = until_interrupted(async {
        let postgres = PostgresServer::start(PostgresOptions { binaries: Some(binaries), ..Default::default() });
        let (plane, postgres) = tokio::try_join!(ControlPlane::start(&tools), postgres)?;
        // Dropped first: the operator ends before what it talks to.
        let mut bench = Bench { options, cluster: Cluster::new(&plane, &postgres), product: &product };
        bench.measure().await
    })?;
    store.keep(&name, "controller", Part { options: kept, seconds: began.elapsed().as_secs_f64().round(), samples })?;
    conclude(&store.path)
}

struct Bench<'a> {
    options: &'a Options,
    cluster: Cluster<'a>,
    product: &'a Product,
}

impl Bench<'_> {
    async fn measure(&mut self) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        let Options { objects, databases, period, .. } = *self.options;
        self.cluster.install()?;
        progress::note(&format!("  {databases} databases"));
        self.cluster.databases(databases).await?;

        progress::note("  one object");
        self.cluster.objects(0..1, databases, period).await?;
        samples.push(self.one().await?);

        self.cluster.objects(1..objects, databases, period).await?;
        progress::note("  the first start with all objects");
        let mut operator = self.start().await?;
        // But the one that was swept just now.
        let [(_, seconds), (_, rate), .., peak] = self.catch_up(&mut operator, objects - 1, None).await?;
        let values = [("seconds until every object is acknowledged", seconds), ("status writes a second", rate), peak];
        samples.push(Sample::new("first start", OURS, 0, values));
        operator.terminate().await?;

        progress::note("  a restart with all of them due");
        let before = self.cluster.sweeps().await?;
        self.cluster.make_due(Utc::now() - TimeDelta::seconds(1)).await?;
        let mut audit = self.cluster.audit()?;
        let mut operator = self.start().await?;
        samples.push(Sample::new(
            "restart",
            OURS,
            0,
            self.catch_up(&mut operator, objects, Some(audit.clone())).await?,
        ));
        // What was just swept skips a slot that comes within half a period; then slots are spread evenly.
        let settle = period / 2 + Duration::from_secs(5);
        progress::note(&format!("  waiting for {} s, until slots come evenly", settle.as_secs()));
        operator.sleep(settle).await?;
        samples.push(self.steady(&mut operator).await?);
        operator.terminate().await?;

        let sweeps = self.cluster.sweeps().await? - before;
        let requests = audit.read()?;
        let writes = requests.iter().filter(|request| request.is_status_write()).count();
        let events = requests.iter().filter(|request| request.what.ends_with(" events")).count();
        let values = [
            ("sweeps", sweeps as f64),
            ("status writes", writes as f64),
            ("events", events as f64),
            ("requests for objects and Secrets", (requests.len() - events) as f64),
        ];
        samples.push(Sample::new("in all", OURS, 0, values));
        Ok(samples)
    }

    async fn start(&self) -> anyhow::Result<Operator> {
        Operator::start(&self.product.binary, &self.cluster.kubeconfig().await?).await
    }

    /// Memory when there is hardly anything to do.
    async fn one(&self) -> anyhow::Result<Sample> {
        let mut audit = self.cluster.audit()?;
        let mut operator = self.start().await?;
        let end = Instant::now() + Duration::from_secs(30);
        while !audit.read()?.iter().any(Counted::is_status_write) {
            ensure!(Instant::now() < end, "one object was not swept; {}", operator.log_tail());
            operator.sleep(Duration::from_millis(200)).await?;
        }
        operator.sleep(Duration::from_secs(10)).await?;
        let resident = operator.resident()?;
        operator.terminate().await?;
        Ok(Sample::new("one object", OURS, 0, [("resident MB", resident)]))
    }

    /// Waits until so many objects were swept.
    async fn catch_up(
        &self,
        operator: &mut Operator,
        objects: u32,
        audit: Option<Audit>,
    ) -> anyhow::Result<[(&'static str, f64); 5]> {
        let objects = objects as usize;
        let mut audit = audit.map_or_else(|| self.cluster.audit(), Ok)?;
        let began = Instant::now();
        let at_once = self.cluster.watch_sweeps();
        let (mut writes, mut told, mut peak) = (vec![], Instant::now(), 0.0_f64);
        // By name: the first start writes the status of a new object, before or after its sweep.
        let mut swept = std::collections::BTreeSet::new();
        let end = began + Duration::from_secs(120) + Duration::from_millis(100) * self.options.objects;
        while swept.len() < objects {
            for request in audit.read()?.into_iter().filter(Counted::is_status_write) {
                swept.insert(request.name);
                writes.push(request.at);
            }
            peak = peak.max(operator.resident()?);
            if told.elapsed() > Duration::from_secs(10) {
                progress::note(&format!("    {} of {objects} after {} s", swept.len(), began.elapsed().as_secs()));
                told = Instant::now();
            }
            ensure!(Instant::now() < end, "{} of {objects} were swept; {}", swept.len(), operator.log_tail());
            operator.sleep(Duration::from_millis(100)).await?;
        }
        let seconds = began.elapsed().as_secs_f64();
        let (connections, at_once) = at_once.end().await?;
        Ok([
            ("seconds until all caught up", seconds),
            ("sweeps a second, sustained", sustained(&mut writes).context("nothing was swept")?),
            ("sweeps at once", at_once),
            ("connections at once", connections),
            ("most resident MB", peak),
        ])
    }

    /// Watches it do what it does all day.
    async fn steady(&self, operator: &mut Operator) -> anyhow::Result<Sample> {
        let seconds = self.options.seconds;
        progress::note(&format!("  watching for {seconds} s"));
        let mut audit = self.cluster.audit()?;
        let scraped = Instant::now();
        let before = operator.metrics().await?;
        let scrape = scraped.elapsed();
        let (cpu, began) = (operator.cpu()?, Instant::now());
        operator.sleep(Duration::from_secs(seconds)).await?;
        let (cpu, took) = (operator.cpu()? - cpu, began.elapsed());
        let requests = audit.read()?;
        let resident = operator.resident()?;
        let after = operator.metrics().await?;
        let sweeps = after.sweeps - before.sweeps;
        ensure!(sweeps > 0.0, "nothing was swept in {seconds} s");
        let lags: Vec<(f64, f64)> =
            after.lags.iter().zip(&before.lags).map(|((bound, after), (_, before))| (*bound, after - before)).collect();
        let lag = |percent| histogram_percentile(&lags, percent).unwrap_or(f64::MAX);
        let within = |seconds: f64| lags.iter().find(|(bound, _)| *bound >= seconds).map_or(0.0, |(_, count)| *count);
        let all = lags.last().map_or(0.0, |(_, count)| *count);
        let values = [
            ("resident MB", resident),
            ("sweeps a second", sweeps / took.as_secs_f64()),
            ("CPU ms for each sweep", cpu.as_secs_f64() * 1000.0 / sweeps),
            ("requests for each sweep", requests.len() as f64 / sweeps),
            ("lag p50 s", lag(50.0)),
            ("lag p99 s", lag(99.0)),
            ("percent with a lag of at most 1 s", within(1.0) / all * 100.0),
            ("a scrape of all objects, ms", scrape.as_secs_f64() * 1000.0),
        ];
        Ok(Sample::new("steady", OURS, 0, values))
    }
}

/// How many a second there were, but for the first and the last tenth. None: too few to tell.
fn sustained(times: &mut [DateTime<Utc>]) -> Option<f64> {
    times.sort();
    let tenth = times.len() / 10;
    let (first, last) = (times.get(tenth)?, times.get(times.len().checked_sub(tenth + 1)?)?);
    let millis = (*last - *first).num_milliseconds();
    Some((times.len() - 2 * tenth - 1) as f64 * 1000.0 / millis as f64).filter(|rate| rate.is_finite() && *rate > 0.0)
}

async fn pause() {
    sleep(Duration::from_millis(20)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_a_run_do_not_count_for_what_is_sustained() {
        let at = |millis| DateTime::from_timestamp_millis(millis).unwrap();
        let mut times: Vec<_> = (0..100).map(|n| at(1000 + n * 10)).collect();
        // A slow start and a slow end.
        times[0] = at(0);
        times[99] = at(60_000);
        assert_eq!(sustained(&mut times), Some(100.0));
        assert_eq!(sustained(&mut []), None);
        assert_eq!(sustained(&mut [at(1)]), None);
    }

    #[test]
    fn a_period_is_whole_seconds_or_minutes() {
        assert_eq!([period("30s"), period("10m")], [30, 600].map(|seconds| Ok(Duration::from_secs(seconds))));
        for wrong in ["", "s", "10", "1h", "-1s"] {
            assert!(period(wrong).is_err(), "{wrong}");
        }
    }
}
