//! Serves `/healthz` (the process serves), `/readyz` (it is able to work, or what it waits for) and `/metrics`.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use super::metrics::Metrics;

/// What the process waits for, if it does: a text for each of its parts that is not able to work.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<Mutex<BTreeMap<String, String>>>);

/// So many connections may wait to be accepted.
const BACKLOG: i32 = 128;

/// So many connections may be open: kubelet, Prometheus and some people need far fewer.
const MAX_CONNECTIONS: usize = 64;

/// The longest that a connection lasts, from its first byte to its last.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The pause after a connection could not be taken, as when there are no descriptors left.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);

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

/// Serves until `stop`. A connection is for one request and ends with [`TIMEOUT`]; when too many are open, the oldest
/// ends, so that slow clients keep no probe out and no descriptor from a sweep.
///
/// # Errors
/// None: the signature is that of a long-lived task.
pub async fn serve(
    listener: TcpListener,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let service = TowerToHyperService::new(routes(readiness, metrics));
    let mut server = Builder::new(TokioExecutor::new());
    server.http1().timer(TokioTimer::new()).header_read_timeout(TIMEOUT).keep_alive(false);
    let mut connections: VecDeque<AbortOnDropHandle<()>> = VecDeque::new();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        connections.retain(|connection| !connection.is_finished());
        match accepted {
            Ok((stream, _)) => {
                if connections.len() >= MAX_CONNECTIONS {
                    drop(connections.pop_front());
                }
                let (server, service) = (server.clone(), service.clone());
                let answer = async move {
                    // A client that went away, or was too slow, concerns nobody.
                    drop(timeout(TIMEOUT, server.serve_connection(TokioIo::new(stream), service)).await);
                };
                connections.push_back(AbortOnDropHandle::new(tokio::spawn(answer)));
            }
            Err(error) => {
                warn!(error = error.to_string(), "cannot take a connection to the health port");
                drop(connections.pop_front());
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
    Ok(())
}

fn routes(readiness: Readiness, metrics: Arc<Metrics>) -> Router {
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
    Router::new()
        .route("/healthz", get(|| async { "serving\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(exposition))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
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

    #[tokio::test]
    async fn slow_clients_keep_no_probe_out_and_few_descriptors() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(listener, Readiness::default(), Arc::default(), stop.clone()));
        let mut slow = vec![];
        for _ in 0..3 * MAX_CONNECTIONS {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(b"GET /healthz HTTP/1.1\r\nhost: ").await.unwrap();
            slow.push(client);
        }
        let mut probe = TcpStream::connect(address).await.unwrap();
        probe.write_all(b"GET /healthz HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(1), probe.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("serving\n"), "{answer}");
        // The oldest were ended, all but the newest.
        let mut open = 0;
        for client in &mut slow {
            let ended = timeout(Duration::from_millis(10), client.read_u8()).await;
            open += usize::from(ended.is_err());
        }
        assert_eq!(open, MAX_CONNECTIONS - 1, "the probe took the place of one more");
        stop.cancel();
        server.await.unwrap().unwrap();
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
