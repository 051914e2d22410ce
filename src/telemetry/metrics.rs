//! What Prometheus reads from `/metrics`, in the OpenMetrics text format or the older one. The controller counts through
//! the handles here; what can be read off its state is read at each scrape, so that it can neither be stale nor be forgotten.

mod object;

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::encoding::{prometheus_text, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

pub use object::{Counts, GAUGES, ObjectSeries, invalid, values};

/// What `/metrics` answers with to those who ask for it.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The older format, for all others: curl, promtool, and scrapers that know nothing else.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The begin of every name.
const PREFIX: &str = "audit_log_sweeper";

/// The bounds of the buckets, in seconds: from a sweep that finds nothing to the longest deadline of most specs.
const DURATION_BUCKETS: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0];

/// The bounds of the buckets, in seconds: from a slot that was met to one that was missed for days.
const LAG_BUCKETS: [f64; 11] = [0.1, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 14400.0, 86400.0];

/// The commit that the binary was built from, if the build said so.
const REVISION: &str = match option_env!("AUDIT_LOG_SWEEPER_REVISION") {
    Some(revision) if !revision.is_empty() => revision,
    _ => "unknown",
};

/// A kind of request to the API server.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Operation {
    /// Reads an AuditLogSweeper.
    GetObject,
    /// Reads a Secret.
    GetSecret,
    /// Writes a status.
    PatchStatus,
    /// Writes an event.
    PublishEvent,
    /// Watches AuditLogSweepers.
    Watch,
    /// Reads or writes the Lease.
    Lease,
}

impl Operation {
    /// Every kind.
    pub const ALL: [Self; 6] =
        [Self::GetObject, Self::GetSecret, Self::PatchStatus, Self::PublishEvent, Self::Watch, Self::Lease];

    /// The value of the label `operation`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::GetObject => "get_object",
            Self::GetSecret => "get_secret",
            Self::PatchStatus => "patch_status",
            Self::PublishEvent => "publish_event",
            Self::Watch => "watch",
            Self::Lease => "lease",
        }
    }
}

/// The handles by which the controller counts what it does.
#[derive(Clone, Debug)]
pub struct Instruments {
    sweep_duration: Histogram,
    schedule_lag: Histogram,
    api_failures: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Default for Instruments {
    fn default() -> Self {
        let api_failures = Family::default();
        // From the start, so that the first failure is an increase.
        for operation in Operation::ALL {
            drop(api_failures.get_or_create(&[("operation", operation.as_str())]));
        }
        Self {
            sweep_duration: Histogram::new(DURATION_BUCKETS),
            schedule_lag: Histogram::new(LAG_BUCKETS),
            api_failures,
        }
    }
}

impl Instruments {
    /// An attempt at a sweep took so long.
    pub fn swept(&self, duration: Duration) {
        self.sweep_duration.observe(duration.as_secs_f64());
    }

    /// A slot of a schedule got its first attempt so late.
    pub fn began_after(&self, lag: Duration) {
        self.schedule_lag.observe(lag.as_secs_f64());
    }

    /// A request to the API server failed.
    pub fn api_request_failed(&self, operation: Operation) {
        self.api_failures.get_or_create(&[("operation", operation.as_str())]).inc();
    }
}

/// What the controller knows at the moment of a scrape.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Sweeps that are going on.
    pub sweeps_in_flight: usize,
    /// Objects in the watch, whoever leads.
    pub objects: usize,
    /// Whether this replica leads.
    pub leader: bool,
    /// The series of each object. A replica that does not lead has none: they would be another's.
    pub series: Vec<ObjectSeries>,
}

type Source = Box<dyn Fn() -> Snapshot + Send + Sync>;

/// All that is exposed.
#[derive(Debug)]
pub struct Metrics {
    /// For whoever counts.
    pub instruments: Instruments,
    registry: Registry,
    state: State,
}

impl Default for Metrics {
    fn default() -> Self {
        let (instruments, state) = (Instruments::default(), State::default());
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register(
            "build",
            "The binary",
            Info::new([("version", env!("CARGO_PKG_VERSION")), ("revision", REVISION)]),
        );
        let help = "How long attempts at sweeps took, without the wait for a slot";
        registry.register("sweep_duration_seconds", help, instruments.sweep_duration.clone());
        let help = "How long after their slot of the schedule sweeps began, retries left out";
        registry.register("schedule_lag_seconds", help, instruments.schedule_lag.clone());
        let help = "Requests to the API server that failed; 404 and 409 are answers and not counted";
        registry.register("api_request_failures", help, instruments.api_failures.clone());
        registry.register_collector(Box::new(state.clone()));
        Self { instruments, registry, state }
    }
}

impl Metrics {
    /// Asks `source` at each scrape from now on. Only the first one counts.
    pub fn show(&self, source: impl Fn() -> Snapshot + Send + Sync + 'static) {
        drop(self.state.0.set(Box::new(source)));
    }

    /// The content type and the exposition that suit a request's header `Accept`.
    ///
    /// # Errors
    /// None that a String can have.
    pub fn answer(&self, accept: &str) -> Result<(&'static str, String), fmt::Error> {
        let mut exposition = String::new();
        if accept.contains("application/openmetrics-text") {
            text::encode(&mut exposition, &self.registry)?;
            return Ok((OPENMETRICS, exposition));
        }
        prometheus_text::encode(&mut exposition, &self.registry)?;
        Ok((PROMETHEUS, exposition))
    }
}

/// What is read off the controller's state at each scrape.
#[derive(Clone, Default)]
struct State(Arc<OnceLock<Source>>);

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("State")
    }
}

impl Collector for State {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let snapshot = self.0.get().map(|source| source()).unwrap_or_default();
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let gauges = [
            ("sweeps_in_flight", "Sweeps that are going on", count(snapshot.sweeps_in_flight)),
            ("objects", "AuditLogSweepers that are watched", count(snapshot.objects)),
            ("leader", "Whether this replica leads: 1 or 0", i64::from(snapshot.leader)),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        if !snapshot.series.is_empty() {
            encode_objects(&mut encoder, &snapshot.series)?;
        }
        Ok(())
    }
}

fn encode_objects(encoder: &mut DescriptorEncoder, all: &[ObjectSeries]) -> fmt::Result {
    let labels = |series: &ObjectSeries| [("namespace", series.namespace.clone()), ("name", series.name.clone())];
    let help = "Rows that this process completed as timed out since it leads";
    let mut family = encoder.encode_descriptor("rows_timed_out", help, None, MetricType::Counter)?;
    for series in all {
        count(&mut family, &labels(series), series.counts.rows_timed_out)?;
    }
    let help = "Attempts at sweeps that this process made since it leads";
    let mut family = encoder.encode_descriptor("sweeps", help, None, MetricType::Counter)?;
    for series in all {
        let [namespace, name] = labels(series);
        for (outcome, trigger, sweeps) in series.counts.sweeps() {
            let further = [("outcome", format!("{outcome:?}")), ("trigger", format!("{trigger:?}"))];
            let [outcome, trigger] = further;
            count(&mut family, &[namespace.clone(), name.clone(), outcome, trigger], sweeps)?;
        }
    }
    for (index, gauge) in GAUGES.iter().enumerate() {
        let mut family = encoder.encode_descriptor(gauge.name, gauge.help, None, MetricType::Gauge)?;
        for series in all {
            if let Some(value) = series.gauges.get(index).copied().flatten() {
                ConstGauge::new(value).encode(family.encode_family(&labels(series))?)?;
            }
        }
    }
    Ok(())
}

fn count(
    family: &mut prometheus_client::encoding::MetricEncoder,
    labels: &impl EncodeLabelSet,
    value: u64,
) -> fmt::Result {
    ConstCounter::new(value).encode(family.encode_family(labels)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_objects_only_the_process_is_shown() {
        let metrics = Metrics::default();
        metrics.instruments.swept(Duration::from_millis(20));
        metrics.instruments.began_after(Duration::from_secs(3));
        metrics.instruments.api_request_failed(Operation::Lease);
        let text = metrics.answer("application/openmetrics-text").unwrap().1;
        for line in [
            "audit_log_sweeper_sweep_duration_seconds_bucket{le=\"0.01\"} 0",
            "audit_log_sweeper_sweep_duration_seconds_bucket{le=\"0.025\"} 1",
            "audit_log_sweeper_schedule_lag_seconds_sum 3.0",
            "audit_log_sweeper_api_request_failures_total{operation=\"lease\"} 1",
            "audit_log_sweeper_api_request_failures_total{operation=\"watch\"} 0",
            "audit_log_sweeper_leader 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        assert!(!text.contains("namespace="), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
        let (kind, older) = metrics.answer("*/*").unwrap();
        assert_eq!(kind, PROMETHEUS);
        for line in [
            "# TYPE audit_log_sweeper_api_request_failures_total counter",
            "audit_log_sweeper_api_request_failures_total{operation=\"lease\"} 1",
            "# TYPE audit_log_sweeper_build_info gauge",
        ] {
            assert!(older.lines().any(|found| found == line), "{line}: {older}");
        }
    }

    #[test]
    fn the_state_is_read_at_each_scrape_and_labels_are_escaped() {
        let metrics = Metrics::default();
        let scrapes = std::sync::atomic::AtomicUsize::new(0);
        metrics.show(move || {
            let scrape = scrapes.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let series = |name: &str| ObjectSeries {
                namespace: "ns".into(),
                name: name.into(),
                gauges: invalid(),
                counts: Counts::default(),
            };
            let all = if scrape == 0 { vec![series("a"), series("quo\"te")] } else { vec![] };
            Snapshot { sweeps_in_flight: scrape, objects: 7, leader: true, series: all }
        });
        let text = metrics.answer("application/openmetrics-text").unwrap().1;
        assert!(text.contains("audit_log_sweeper_ready{namespace=\"ns\",name=\"a\"} 0\n"), "{text}");
        assert!(text.contains("{namespace=\"ns\",name=\"quo\\\"te\"}"), "{text}");
        assert!(
            text.contains("audit_log_sweeper_objects 7\n") && text.contains("audit_log_sweeper_leader 1\n"),
            "{text}"
        );
        let text = metrics.answer("application/openmetrics-text").unwrap().1;
        assert!(!text.contains("namespace=") && text.contains("audit_log_sweeper_sweeps_in_flight 1\n"), "{text}");
    }
}
