//! Serves `/healthz` (the process serves), `/readyz` (it is able to work, or what it waits for) and `/metrics`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::get;
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::metrics::Metrics;

/// What the process waits for, if it does: a text for each of its parts that is not able to work.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<Mutex<BTreeMap<String, String>>>);

/// So many connections may wait to be accepted.
const BACKLOG: i32 = 128;

/// The part that waits until all others have said what they wait for.
const START: &str = "start";

impl Default for Readiness {
    /// Waits for [`Readiness::started`]: somebody may ask before any part had a chance to say that it is not ready.
    fn default() -> Self {
        Self(Arc::new(Mutex::new(BTreeMap::from([(START.into(), "the start".into())]))))
    }
}

impl Readiness {
    /// Every part has said what it waits for.
    pub fn started(&self) {
        self.set(START, None);
    }

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

/// Listens on `address`. The unspecified address of IPv6 stands for all of both kinds: a cluster may have either alone.
///
/// # Errors
/// When the address cannot be had.
pub fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let bound = bind(address);
    if bound.is_err() && address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED) {
        return bind((Ipv4Addr::UNSPECIFIED, address.port()).into());
    }
    bound
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if address.is_ipv6() {
        // Whatever the machine's default is.
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
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
    let exposition = move |headers: HeaderMap| async move {
        let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
        let (type_, body) = metrics.answer(accept).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
        Ok::<_, StatusCode>(([(header::CONTENT_TYPE, type_)], body))
    };
    let routes = Router::new()
        .route("/healthz", get(|| async { "serving\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(exposition));
    axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn all_addresses_are_those_of_both_kinds() {
        let listener = listen("[::]:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        if std::net::TcpListener::bind("[::1]:0").is_ok() {
            TcpStream::connect(("::1", port)).await.unwrap();
        }
        assert!(listen(listener.local_addr().unwrap()).is_err(), "taken");
    }

    #[test]
    fn nothing_is_ready_before_every_part_has_said_what_it_waits_for() {
        let readiness = Readiness::default();
        assert_eq!(readiness.waiting_for(), ["the start"]);
        readiness.set("watch", Some("a list".into()));
        readiness.started();
        assert_eq!(readiness.waiting_for(), ["a list"]);
        readiness.set("watch", None);
        assert!(readiness.waiting_for().is_empty());
    }
}
