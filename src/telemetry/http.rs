//! Serves `/healthz` (the process serves), `/readyz` (it is able to work, or what it waits for) and `/metrics`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::metrics::{self, Metrics};

/// What the process waits for, if it does: a text for each of its parts that is not able to work.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<String, String>>>);

impl Readiness {
    /// Sets what a part waits for; None: that part is ready.
    pub fn set(&self, part: &str, waiting_for: Option<String>) {
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match waiting_for {
            Some(what) => drop(parts.insert(part.to_owned(), what)),
            None => drop(parts.remove(part)),
        }
    }

    /// All that is waited for; empty: ready.
    pub fn waiting_for(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

/// Listens on `address`.
///
/// # Errors
/// When the address cannot be had.
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until `stop`.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let ready = move || async move {
        let waiting_for = readiness.waiting_for();
        if waiting_for.is_empty() {
            return (StatusCode::OK, "ready\n".to_owned());
        }
        (StatusCode::SERVICE_UNAVAILABLE, waiting_for.iter().map(|what| format!("waiting for {what}\n")).collect())
    };
    let exposition = move || async move {
        let body = metrics.encode().map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
        Ok::<_, StatusCode>(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], body))
    };
    let routes = Router::new()
        .route("/healthz", get(|| async { "serving\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(exposition));
    axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await
}
