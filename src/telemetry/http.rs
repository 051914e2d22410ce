//! Serves `/healthz` (the process serves) and `/readyz` (it is able to work, or what it waits for).

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What the process waits for, if it does.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<Mutex<Option<String>>>);

impl Readiness {
    /// Not ready, and why.
    pub fn waiting_for(what: &str) -> Self {
        Self(Arc::new(Mutex::new(Some(what.to_owned()))))
    }

    /// Sets what is waited for; None: ready.
    pub fn set(&self, waiting_for: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = waiting_for;
    }

    /// What is waited for; None: ready.
    pub fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
pub async fn serve(listener: TcpListener, readiness: Readiness, stop: CancellationToken) -> std::io::Result<()> {
    let ready = move || async move {
        readiness.get().map_or((StatusCode::OK, "ready\n".to_owned()), |what| {
            (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for {what}\n"))
        })
    };
    let routes = Router::new().route("/healthz", get(|| async { "serving\n" })).route("/readyz", get(ready));
    axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await
}
