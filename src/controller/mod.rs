//! The controller: drives each object through five steps, and decides nothing itself.
//!
//! `fetch` (reads the object and its Secrets) -> `decide` (pure: what is due) -> `execute` (the sweep or a preflight) ->
//! `status` (pure: the status and the events that follow) -> `publish` (writes it). `model` has what they hand to each
//! other, `client` sends their requests, `limits` bounds what runs at once, and `lifecycle` ends what is done for an object
//! that is deleted, or no longer this install's. What must outlive a reconcile but not the process is in `cache`, and
//! `shutdown` publishes at the end what could not be published before. Of several replicas the `leader` works; the others
//! keep their `watch` warm, so that a takeover costs no list of all objects, and a replica that could not take over is not
//! ready.

mod breaker;
pub mod cache;
mod client;
pub mod decide;
mod execute;
mod fair_slots;
pub mod fetch;
pub mod leader;
mod lifecycle;
pub mod limits;
mod log;
pub mod model;
#[cfg(test)]
mod properties;
pub mod publish;
pub mod reconcile;
pub mod shutdown;
pub mod status;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kube::runtime::events::Reporter;
use kube::runtime::reflector::Store;
use kube::{Client, Config, ResourceExt};
use rustls::RootCertStore;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::telemetry::http::Readiness;
use crate::telemetry::metrics::{self, Metrics, ObjectSeries, Snapshot};
use breaker::Breakers;
use cache::ObjectCache;
use client::ApiServer;
use fair_slots::FairSlots;
use leader::Leadership;
use limits::Limiter;
use model::ParsedObject;
use shutdown::ShutdownReport;
use watch::Scope;

/// The most connections to databases at once. Each takes a descriptor, and up to 64 kB until it may sweep.
const MAX_CONNECTIONS: usize = 256;

/// What is set at start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The namespaces to work in; none: all of them.
    pub namespaces: Vec<String>,
    /// The label selector of the objects to work on, as kubectl takes it; None: all of them.
    pub selector: Option<String>,
    /// The most sweeps at once, and the most preflights.
    pub max_concurrent_sweeps: usize,
    /// The most sweeps at once on one database server, and the most preflights.
    pub max_sweeps_per_server: usize,
    /// The longest that a sweep may take, whatever its spec says.
    pub max_deadline: Duration,
    /// Whether each object has series in the metrics.
    pub object_metrics: bool,
    /// The name of this process in events: the pod's.
    pub instance: Option<String>,
    /// The CAs to trust where a spec names none.
    pub default_roots: Arc<RootCertStore>,
}

/// The ways to one API server.
#[derive(Clone)]
pub struct Clients {
    /// Asks again by itself what is refused for the moment (429, 503, 504).
    pub requests: Client,
    /// Does not: its pauses grow to minutes, and a watch that is refused has its own, see [`watch`].
    pub watches: Client,
}

impl Clients {
    /// Both, as the configuration says.
    ///
    /// # Errors
    /// When the configuration cannot be used, such as a certificate that is none.
    pub fn new(config: Config) -> kube::Result<Self> {
        let mut impatient = config.clone();
        impatient.default_retry = false;
        Ok(Self { requests: Client::try_from(config)?, watches: Client::try_from(impatient)? })
    }
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clients")
    }
}

/// What every reconcile shares.
pub struct Context {
    server: ApiServer,
    settings: Settings,
    cache: ObjectCache,
    sweep_limiter: Limiter,
    /// Preflights answer to an edit, so long sweeps do not keep them waiting.
    preflight_limiter: Limiter,
    /// Of servers that did not answer.
    breakers: Breakers,
    /// Bounds how many connections to databases are open, those included on which nothing was answered yet.
    connections: FairSlots,
    /// Bounds how many objects are prepared at once. Waiting objects hold only their key, so 10,000 due objects stay small.
    prepare_slots: Semaphore,
    reporter: Reporter,
    leadership: Leadership,
    /// What the watches have seen.
    stores: Arc<lifecycle::Stores>,
    /// What is being reconciled right now.
    running: TaskTracker,
    /// Events that are being sent.
    events: TaskTracker,
    stop: CancellationToken,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Context {
    /// What the metrics show right now: of each object what its status says, as the watch last saw it.
    fn snapshot(&self) -> Snapshot {
        let leader = self.leadership.term().is_some();
        let objects = self.stores.iter().map(Store::len).sum();
        let sweeps_in_flight = self.sweep_limiter.in_use();
        let shown = if leader && self.settings.object_metrics { &*self.stores } else { &[] };
        let series = shown.iter().flat_map(Store::state).map(|object| self.series(&object)).collect();
        Snapshot { sweeps_in_flight, objects, leader, series }
    }

    fn series(&self, object: &ParsedObject) -> ObjectSeries {
        let gauges = match &object.0 {
            Ok(object) => metrics::values(&object.spec, &object.status.clone().unwrap_or_default()),
            Err(_) => metrics::invalid(),
        };
        let counts = self.cache.get(&object.uid().unwrap_or_default()).counts;
        ObjectSeries { namespace: object.namespace().unwrap_or_default(), name: object.name_any(), gauges, counts }
    }
}

/// Works, whenever it leads, until `stop`: then running sweeps end, their counts are published, and it returns, at the
/// latest after [`shutdown::SHUTDOWN`]. Any earlier return means that a watch has ended.
pub async fn run(
    clients: Clients,
    settings: Settings,
    leadership: Leadership,
    readiness: Readiness,
    metrics: &Metrics,
    stop: CancellationToken,
) -> ShutdownReport {
    let scopes = Scope::all(&clients.watches, &settings);
    let limiter = || Limiter::new(settings.max_concurrent_sweeps, settings.max_sweeps_per_server);
    let (sweep_limiter, preflight_limiter) = (limiter(), limiter());
    let (cache, running, events) = (ObjectCache::default(), TaskTracker::new(), TaskTracker::new());
    let reporter =
        Reporter { controller: "auditlog.dev/audit-log-sweeper".into(), instance: settings.instance.clone() };
    let client = clients.requests;
    let server = ApiServer::new(client, metrics.instruments.clone(), readiness.clone());
    let stores: Arc<lifecycle::Stores> = scopes.iter().map(Scope::store).collect();
    let context = Arc::new(Context {
        server,
        settings,
        cache,
        sweep_limiter,
        preflight_limiter,
        breakers: Breakers::default(),
        connections: FairSlots::new(MAX_CONNECTIONS),
        prepare_slots: Semaphore::new(client::REQUEST_SLOTS),
        reporter,
        leadership,
        stores,
        running,
        events,
        stop: stop.clone(),
    });
    metrics.show({
        let context = context.clone();
        move || context.snapshot()
    });
    let mut watched: FuturesUnordered<_> =
        scopes.into_iter().map(|scope| scope.run(&context, &readiness, &stop)).collect();
    readiness.started();
    let ended = async {
        while watched.next().await.is_some() {
            if !stop.is_cancelled() {
                return;
            }
        }
        std::future::pending().await
    };
    // A watch that waits to try again holds nobody up: what counts is that no object is being worked on.
    let stopped = async {
        stop.cancelled().await;
        shutdown::drain(&context).await
    };
    tokio::select! {
        () = ended => ShutdownReport::default(),
        stopped = stopped => stopped,
    }
}
