//! Watches the objects of one namespace, or of all, and has each reconciled; says while it cannot.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use kube::api::{ListParams, WatchParams};
use kube::runtime::reflector::{self, Store};
use kube::runtime::utils::Backoff;
use kube::runtime::{Controller, WatchStreamExt, controller, watcher};
use kube::{Api, Client};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::client::{ApiError, ApiServer, text};
use super::model::ParsedObject;
use super::{Context, Settings, fetch, reconcile};
use crate::telemetry::http::Readiness;
use crate::telemetry::metrics::Operation;

/// How soon, and after a while how rarely, a watch that failed is tried again: a CRD may come at any time.
const RETRY: (Duration, Duration) = (Duration::from_millis(800), Duration::from_secs(5));

/// So many objects are listed at once. Each may bring 256 kB of other people's annotations, which nothing here keeps.
const PAGE: u32 = 50;

/// How often a watch that failed is looked after.
const PROBE: Duration = Duration::from_secs(1);

type Objects = Api<ParsedObject>;

/// The objects of one namespace, or of all.
pub struct Scope {
    name: String,
    objects: Objects,
    selector: Option<String>,
    controller: Controller<ParsedObject>,
}

impl Scope {
    /// What the settings ask for: one for each namespace, or one for all.
    pub fn all(client: &Client, settings: &Settings) -> Vec<Self> {
        let scope = |name: String, objects: Objects| {
            let mut config = watcher::Config::default().page_size(PAGE);
            config.label_selector.clone_from(&settings.selector);
            let (store, writer) = reflector::store();
            let seen =
                watcher(objects.clone(), config).modify(fetch::strip_unused_fields).reflect(writer).applied_objects();
            let controller = Controller::for_stream(seen, store).trigger_backoff(Retry::default());
            Self { name, objects, selector: settings.selector.clone(), controller }
        };
        if settings.namespaces.is_empty() {
            return vec![scope("all namespaces".into(), Api::all(client.clone()))];
        }
        let named = |name: &String| scope(format!("namespace {name}"), Api::namespaced(client.clone(), name));
        settings.namespaces.iter().map(named).collect()
    }

    /// What the watch has seen.
    pub fn store(&self) -> Store<ParsedObject> {
        self.controller.store()
    }

    /// Reconciles until `stop`.
    pub fn run(
        self,
        context: &Arc<Context>,
        readiness: &Readiness,
        stop: &CancellationToken,
    ) -> impl Future<Output = ()> + use<> {
        let (context, readiness, stop) = (context.clone(), readiness.clone(), stop.clone());
        let (store, failed) = (self.store(), Arc::new(Notify::new()));
        let server = context.server.clone();
        let health = Health { part: self.name, objects: self.objects, selector: self.selector, readiness, server };
        health.list_first();
        // Whoever begins to lead looks at every object afresh.
        let terms = stream::unfold((context.leadership.clone(), context.clone()), |(mut leadership, context)| async {
            leadership.next_term().await?;
            context.cache.start_term();
            Some(((), (leadership, context)))
        });
        let controlled = self
            .controller
            .graceful_shutdown_on(stop.cancelled_owned())
            .reconcile_all_on(terms)
            .run(reconcile::reconcile, reconcile::error_policy, context.clone())
            .for_each({
                let failed = failed.clone();
                move |result| {
                    match result {
                        // Its turn came after it was deleted, or the error policy saw to it.
                        Ok(_) | Err(controller::Error::ObjectNotFound(_) | controller::Error::ReconcilerFailed(..)) => {
                        }
                        Err(error) => {
                            warn!(error = text(&error), "cannot watch AuditLogSweepers; trying again");
                            context.server.instruments.api_request_failed(Operation::Watch);
                            failed.notify_one();
                        }
                    }
                    context.cache.retain(&context.stores);
                    futures::future::ready(())
                }
            });
        async move {
            tokio::select! {
                () = controlled => {}
                () = health.look_after(&store, &failed) => {}
            }
        }
    }
}

/// The pauses before a watch that failed is tried again: doubling, with jitter.
#[derive(Debug, Default)]
struct Retry(u32);

impl Iterator for Retry {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let (first, longest) = RETRY;
        let pause = first.saturating_mul(2_u32.saturating_pow(self.0)).min(longest);
        self.0 = self.0.saturating_add(1);
        Some(pause.mul_f32(0.5 + fastrand::f32() / 2.0))
    }
}

impl Backoff for Retry {
    fn reset(&mut self) {
        self.0 = 0;
    }
}

/// Whether the watch can do its work, told to the readiness.
struct Health {
    /// The scope's name.
    part: String,
    objects: Objects,
    selector: Option<String>,
    readiness: Readiness,
    server: ApiServer,
}

impl Health {
    /// Never returns while the store has a writer.
    async fn look_after(&self, store: &Store<ParsedObject>, failed: &Notify) {
        let mut first = true;
        loop {
            if first {
                tokio::select! {
                    ready = store.wait_until_ready() => {
                        if ready.is_err() {
                            return;
                        }
                        first = false;
                        self.ready();
                        continue;
                    }
                    () = failed.notified() => {}
                }
            } else {
                failed.notified().await;
            }
            // The watch does not say when it works again.
            while let Err(error) = self.probe().await {
                self.readiness.set(&self.part, Some(waited_for(&error)));
                tokio::time::sleep(PROBE).await;
            }
            if first {
                self.list_first();
            } else {
                self.ready();
            }
        }
    }

    fn list_first(&self) {
        self.readiness.set(&self.part, Some(format!("the first list of AuditLogSweepers in {}", self.part)));
    }

    fn ready(&self) {
        info!(scope = self.part, "watching");
        self.readiness.set(&self.part, None);
    }

    /// Lists and watches, as the watch does: the one right may be there without the other.
    async fn probe(&self) -> Result<(), ApiError> {
        let one = ListParams { label_selector: self.selector.clone(), limit: Some(1), ..ListParams::default() };
        let listed = self.server.request(Operation::Watch, self.objects.list_metadata(&one)).await?;
        let version = listed.metadata.resource_version.unwrap_or_default();
        let short = WatchParams { label_selector: self.selector.clone(), timeout: Some(1), ..WatchParams::default() };
        self.server.request(Operation::Watch, self.objects.watch_metadata(&short, &version)).await.map(drop)
    }
}

/// What would let the watch work.
fn waited_for(error: &ApiError) -> String {
    let what = match error.code() {
        Some(404) => "the CustomResourceDefinition auditlogsweepers.auditlog.dev, which `audit-log-sweeper crd` prints",
        Some(403) => "the right to list and watch auditlogsweepers",
        Some(400) => "a label selector that the API server understands",
        _ => "the API server",
    };
    format!("{what}: {error}")
}
