//! Opens the one connection of a sweep or preflight, and sends statements over it. Each step (name, TCP, TLS, login) has
//! its own limit and its own error.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{CancelToken, Client, Connection, NoTls, SimpleQueryMessage, SimpleQueryRow};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::either::Either;
use tokio_util::task::AbortOnDropHandle;

use super::bounded::{Bounded, BoundedTls, Exceeded};
use super::error::{ConnectPhase, Error, Step};
use super::target::Target;

/// The longest that name, TCP, TLS and login may take together, for one host, unless the URI says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Whatever the URI says, no longer than this.
const LONGEST_CONNECT: Duration = Duration::from_secs(60);

/// The longest to wait for a cancelled statement to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);

/// ENFILE and EMFILE, on every Unix.
const OUT_OF_FILES: [i32; 2] = [23, 24];

/// What a connection runs over.
type Stream = Either<TcpStream, UnixStream>;

impl Target {
    /// Connects to the first host that will have us, in `limit` altogether.
    ///
    /// # Errors
    /// The last host's error.
    pub async fn connect(&self, limit: Duration) -> Result<Session, Error> {
        let end = Instant::now() + limit;
        let most = self.config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT).min(LONGEST_CONNECT);
        let (hosts, addresses) = (self.config.get_hosts(), self.config.get_hostaddrs());
        let ports = self.config.get_ports();
        let mut last = Error::Uri("it names no host");
        let places = hosts.len().max(addresses.len());
        for index in 0..places {
            // One port for all hosts, or one for each.
            let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
            // As in libpq: the address is where to connect, the host the name to verify.
            let address = addresses.get(index).map(ToString::to_string);
            let place = match (hosts.get(index), address) {
                (Some(Host::Unix(folder)), _) => Place::Unix(folder.join(format!(".s.PGSQL.{port}"))),
                (Some(Host::Tcp(name)), address) => {
                    Place::Tcp { name: name.clone(), address: address.unwrap_or_else(|| name.clone()), port }
                }
                (None, Some(address)) => Place::Tcp { name: address.clone(), address, port },
                (None, None) => break,
            };
            // A silent one leaves the others their share.
            let others = u32::try_from(places - index).unwrap_or(u32::MAX);
            let limit = most.min(end.saturating_duration_since(Instant::now()) / others);
            let mut phase = ConnectPhase::Name;
            last = match timeout(limit, self.connect_to(&place, &mut phase)).await {
                Ok(Ok(session)) => return Ok(session),
                Ok(Err(error)) => error,
                Err(_) => Error::Unanswered { host: place.label(phase), phase, after: rounded(limit) },
            };
        }
        Err(last)
    }

    async fn connect_to(&self, place: &Place, phase: &mut ConnectPhase) -> Result<Session, Error> {
        let host = place.name();
        let peer = match place {
            Place::Tcp { address, port, .. } => Peer::Tcp(resolve(address, *port).await?),
            Place::Unix(path) => Peer::Unix(path.clone()),
        };
        *phase = ConnectPhase::Tcp;
        let (stream, peer) = dial(&place.label(ConnectPhase::Tcp), &peer).await?;
        *phase = ConnectPhase::Handshake;
        let mut config = self.config.clone();
        if matches!(peer, Peer::Unix(_)) {
            // It does not leave the machine; PostgreSQL has no TLS there.
            config.ssl_mode(SslMode::Disable);
        }
        let exceeded = Exceeded::default();
        let opened = if config.get_ssl_mode() == SslMode::Disable {
            let stream = Bounded::new(stream, exceeded.clone());
            config.connect_raw(stream, NoTls).await.map(|(client, connection)| (client, run(connection)))
        } else {
            let tls = BoundedTls { connect: self.tls::<Stream>(&host)?, exceeded: exceeded.clone() };
            config.connect_raw(stream, tls).await.map(|(client, connection)| (client, run(connection)))
        };
        let (client, connection) =
            opened.map_err(|error| protocol(&exceeded, &host).unwrap_or_else(|| Error::handshake(&host, &error)))?;
        let session = Session {
            cancel: client.cancel_token(),
            client,
            connection,
            exceeded,
            target: self.clone(),
            host: host.clone(),
            peer,
        };
        // Some servers let every client log in and then say nothing.
        *phase = ConnectPhase::Statement;
        let answer = session.query(Step::Login, "SHOW transaction_read_only", LONGEST_CONNECT).await?;
        if self.writable && last_row(&answer).and_then(|row| text(row, 0)) == Some("on") {
            return Err(Error::ReadOnly { host });
        }
        Ok(session)
    }

    fn tls<S>(&self, host: &str) -> Result<<MakeRustlsConnect as MakeTlsConnect<S>>::TlsConnect, Error>
    where
        MakeRustlsConnect: MakeTlsConnect<S>,
    {
        let mut connector = self.connector.clone();
        // A socket has no name; nothing is verified there.
        let name = if host.starts_with('/') { "localhost" } else { host };
        MakeTlsConnect::<S>::make_tls_connect(&mut connector, name).map_err(|_| Error::Tls {
            host: host.to_owned(),
            cause: "the host's name cannot be in a certificate".into(),
        })
    }
}

/// The error where the server sent what is not taken.
fn protocol(exceeded: &Exceeded, host: &str) -> Option<Error> {
    exceeded.get().map(|excess| Error::Protocol { host: host.to_owned(), excess: *excess })
}

/// Runs a connection until it ends. The client's calls tell that it did.
fn run<S, T>(connection: Connection<S, T>) -> AbortOnDropHandle<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    AbortOnDropHandle::new(tokio::spawn(async move { drop(connection.await) }))
}

/// For a message: to the hundredth of a second.
fn rounded(duration: Duration) -> Duration {
    Duration::from_millis(u64::try_from((duration.as_millis() + 5) / 10 * 10).unwrap_or(u64::MAX))
}

/// One of the places where the database may be.
enum Place {
    Tcp { name: String, address: String, port: u16 },
    Unix(PathBuf),
}

impl Place {
    /// For messages: with the port, once that matters.
    fn label(&self, phase: ConnectPhase) -> String {
        match self {
            Self::Tcp { name, port, .. } if phase != ConnectPhase::Name => format!("{name} port {port}"),
            _ => self.name(),
        }
    }

    /// For the server's certificate.
    fn name(&self) -> String {
        match self {
            Self::Tcp { name, .. } => name.clone(),
            Self::Unix(path) => path.display().to_string(),
        }
    }
}

/// Where a connection leads: a cancel request has to go to the same place.
#[derive(Clone)]
enum Peer {
    Tcp(Vec<SocketAddr>),
    Unix(PathBuf),
}

/// Looks a name up.
async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, Error> {
    let unresolved = |cause: String| Error::Resolve { host: host.to_owned(), cause };
    let found = tokio::net::lookup_host((host, port)).await;
    let found = found.map_err(|error| out_of_files(host, &error).unwrap_or_else(|| unresolved(error.to_string())))?;
    let addresses: Vec<_> = found.collect();
    if addresses.is_empty() { Err(unresolved("it has no address".into())) } else { Ok(addresses) }
}

/// The error where it is this process that can open nothing more.
fn out_of_files(host: &str, error: &io::Error) -> Option<Error> {
    let is_it = error.raw_os_error().is_some_and(|code| OUT_OF_FILES.contains(&code));
    is_it.then(|| Error::OpenFiles { host: host.to_owned(), cause: error.to_string() })
}

/// Opens the connection, to the first address that takes one.
async fn dial(host: &str, peer: &Peer) -> Result<(Stream, Peer), Error> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    match peer {
        Peer::Unix(path) => match UnixStream::connect(path).await {
            Ok(stream) => return Ok((Either::Right(stream), peer.clone())),
            Err(error) => last = error,
        },
        Peer::Tcp(addresses) => {
            for address in addresses {
                match TcpStream::connect(address).await {
                    Ok(stream) => {
                        keep_alive(&stream);
                        return Ok((Either::Left(stream), Peer::Tcp(vec![*address])));
                    }
                    Err(error) => last = error,
                }
            }
        }
    }
    let refused = || Error::Connect { host: host.to_owned(), cause: last.to_string() };
    Err(out_of_files(host, &last).unwrap_or_else(refused))
}

/// A dead peer is noticed: by keepalives while we wait, by a timer where we have sent.
fn keep_alive(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(15)).with_interval(Duration::from_secs(5));
    // Best effort: the timers around every statement hold without them.
    drop(socket.set_tcp_keepalive(&keepalive));
    #[cfg(target_os = "linux")]
    drop(socket.set_tcp_user_timeout(Some(Duration::from_secs(30))));
    drop(stream.set_nodelay(true));
}

/// An open connection. Dropping it closes it.
pub struct Session {
    client: Client,
    cancel: CancelToken,
    connection: AbortOnDropHandle<()>,
    exceeded: Exceeded,
    target: Target,
    host: String,
    peer: Peer,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session([redacted])")
    }
}

impl Session {
    /// Sends one message of statements and waits for its whole answer, at most `limit`.
    pub async fn query(&self, step: Step, sql: &str, limit: Duration) -> Result<Vec<SimpleQueryMessage>, Error> {
        match timeout(limit, self.client.simple_query(sql)).await {
            Ok(answer) => answer.map_err(|error| {
                protocol(&self.exceeded, &self.host).unwrap_or_else(|| Error::statement(step, &error))
            }),
            Err(_) => {
                // Dropping the future does not stop the statement.
                self.cancel().await;
                Err(Error::Timer { what: "a statement", after: limit })
            }
        }
    }

    /// Asks the server to cancel the running statement. Best effort: the server's own timeout is behind it.
    pub async fn cancel(&self) {
        let cancel = async {
            let (stream, _) = dial(&self.host, &self.peer).await.ok()?;
            let tls = self.target.tls::<Drained>(&self.host).ok()?;
            self.cancel.cancel_query_raw(Drained(stream), tls).await.ok()
        };
        drop(timeout(CANCEL_TIMEOUT, cancel).await);
    }

    /// Ends a transaction that failed, so that a pooler gets its server back clean.
    pub async fn rollback(&self) {
        if !self.client.is_closed() {
            drop(timeout(CANCEL_TIMEOUT, self.client.simple_query("ROLLBACK")).await);
        }
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Says goodbye, so that the server logs no broken connection.
    pub async fn close(self) {
        drop(self.client);
        drop(timeout(CANCEL_TIMEOUT, self.connection).await);
    }
}

/// A stream whose shutdown first reads to the end: PgBouncer 1.18 drops all its clients when the one that sent a
/// cancel request closes before it was handled.
struct Drained(Stream);

impl AsyncRead for Drained {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Drained {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut scratch = [0; 64];
        loop {
            let mut buf = ReadBuf::new(&mut scratch);
            ready!(Pin::new(&mut self.0).poll_read(cx, &mut buf))?;
            if buf.filled().is_empty() {
                return Pin::new(&mut self.0).poll_shutdown(cx);
            }
        }
    }
}

/// The last row that an answer holds.
pub fn last_row(answer: &[SimpleQueryMessage]) -> Option<&SimpleQueryRow> {
    answer.iter().rev().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    })
}

/// A field of a row as text.
pub fn text(row: &SimpleQueryRow, index: usize) -> Option<&str> {
    row.try_get(index).ok().flatten()
}
