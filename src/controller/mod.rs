//! The controller: drives each object through five steps, and decides nothing itself.
//!
//! `resolve` (fetches the object and its Secrets) -> `decide` (pure: what is due) -> the sweep or a preflight ->
//! `outcome` (pure: the status that follows) -> `publish` (writes it). What must outlive a reconcile but not the
//! process is in `memory`.

pub mod decide;
pub mod memory;
pub mod outcome;
pub mod publish;
pub mod reconcile;
pub mod resolve;

use std::sync::Arc;

use futures::StreamExt;
use kube::core::DeserializeGuard;
use kube::runtime::{Controller, controller, watcher};
use kube::{Api, Client};
use rustls::RootCertStore;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::api::AuditLogSweeper;
use crate::sweep::error::chain;
use crate::telemetry::http::Readiness;
use memory::Memories;

/// What is set at start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The namespace to work in; None: all of them.
    pub namespace: Option<String>,
    /// The most sweeps at once.
    pub max_concurrent_sweeps: usize,
    /// The CAs to trust where a spec names none.
    pub default_roots: Arc<RootCertStore>,
}

/// What every reconcile shares.
pub struct Context {
    client: Client,
    settings: Settings,
    memories: Memories,
    sweeps: Semaphore,
    /// What is being reconciled right now.
    running: TaskTracker,
    stop: CancellationToken,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Works until `stop`: then running sweeps end, their counts are published, and it returns.
pub async fn run(client: Client, settings: Settings, readiness: Readiness, stop: CancellationToken) {
    let objects: Api<DeserializeGuard<AuditLogSweeper>> = match &settings.namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let sweeps = Semaphore::new(settings.max_concurrent_sweeps);
    let (memories, running) = (Memories::default(), TaskTracker::new());
    let context = Arc::new(Context { client, settings, memories, sweeps, running, stop: stop.clone() });
    let watched = Controller::new(objects, watcher::Config::default());
    let store = watched.store();
    let ready = async {
        if store.wait_until_ready().await.is_ok() {
            info!("watching");
            readiness.set(None);
        }
        std::future::pending::<()>().await;
    };
    let controlled = watched
        .graceful_shutdown_on(stop.clone().cancelled_owned())
        .run(reconcile::reconcile, |_, error, _| match *error {}, context.clone())
        .for_each(|result| {
            match result {
                // Its turn came after it was deleted.
                Ok(_) | Err(controller::Error::ObjectNotFound(_)) => {}
                // Reconciles do not fail; what comes here is the watch: a missing CRD, a right that is missing.
                Err(error) => warn!(error = chain(&error), "cannot watch AuditLogSweepers; trying again"),
            }
            context.memories.retain(&store.state());
            futures::future::ready(())
        });
    // A watch that waits to try again holds nobody up: what counts is that no object is being worked on.
    let stopped = async {
        stop.cancelled().await;
        context.running.close();
        context.running.wait().await;
    };
    tokio::select! {
        () = controlled => {}
        () = ready => {}
        () = stopped => {}
    }
}
