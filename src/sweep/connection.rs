//! Opens the one connection of a sweep. Each step (name, TCP, TLS, login) has its own end and its own error.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::RootCertStore;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{CancelToken, Client, Config, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::task::AbortOnDropHandle;

use super::error::Step;
use super::{Error, statement, tls};
use crate::api::cut;
use crate::api::spec::TlsMode;
use crate::credentials::ConnectionUri;

/// The longest that name, TCP, TLS and login may take together, for one host, unless the URI says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Whatever the URI says, no longer than this.
const LONGEST_CONNECT: Duration = Duration::from_secs(60);

/// The longest to wait for a cancelled statement to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);

/// Parameters of libpq that have no meaning here: the driver would refuse them.
const FOREIGN: [&str; 12] = [
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslcrl",
    "sslcompression",
    "gssencmode",
    "krbsrvname",
    "passfile",
    "service",
    "fallback_application_name",
];

/// Where to connect, and how. Holds a password; its Debug shows none.
#[derive(Clone)]
pub struct Target {
    config: Config,
    connector: MakeRustlsConnect,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Target([redacted])")
    }
}

impl Target {
    /// A target from a URI. `mode` and `ca` are those of the spec: `mode` wins over the URI's sslmode; without `ca`,
    /// `default_roots` are trusted. `application_name` is what `pg_stat_activity` shows.
    ///
    /// # Errors
    /// When the URI or the CA cannot be read.
    pub fn new(
        uri: &ConnectionUri,
        mode: Option<TlsMode>,
        ca: Option<&[u8]>,
        default_roots: &Arc<RootCertStore>,
        application_name: &str,
    ) -> Result<Self, Error> {
        let (uri, sslmode) = without_foreign_parameters(uri.expose())?;
        let mut config: Config = uri.parse().map_err(|_| Error::Uri("it is not a valid URI"))?;
        // What follows an @ in a password that is not encoded would be taken for the host, and be shown as that.
        let plain = |host: &str| host.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:-%".contains(&b));
        if config.get_hosts().iter().any(|host| matches!(host, Host::Tcp(name) if !plain(name))) {
            return Err(Error::Uri("a host in it has characters that no host name has"));
        }
        if config.get_hosts().is_empty() {
            return Err(Error::Uri("it names no host"));
        }
        if config.get_user().is_none_or(str::is_empty) {
            return Err(Error::Uri("it names no user"));
        }
        let mode = mode.or(sslmode).unwrap_or(TlsMode::VerifyFull);
        // Never the driver's default, Prefer, which falls back to plain text.
        config.ssl_mode(if mode == TlsMode::Disable { SslMode::Disable } else { SslMode::Require });
        config.application_name(cut(application_name, 63));
        let roots = ca.map_or_else(|| Ok(default_roots.clone()), |pem| tls::roots(pem).map(Arc::new))?;
        Ok(Self { config, connector: MakeRustlsConnect::new(tls::client_config(mode, roots)?) })
    }

    /// The database servers that it may reach, hosts and ports: alike for all targets of the same ones.
    pub fn servers(&self) -> String {
        format!("{:?} {:?}", self.config.get_hosts(), self.config.get_ports())
    }

    /// Connects to the first host that will have us.
    ///
    /// # Errors
    /// The last host's error.
    pub(super) async fn connect(&self) -> Result<Session, Error> {
        let limit = self.config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT).min(LONGEST_CONNECT);
        let ports = self.config.get_ports();
        let mut last = Error::Uri("it names no host");
        for (index, host) in self.config.get_hosts().iter().enumerate() {
            let Host::Tcp(host) = host else {
                last = Error::Uri("a unix socket cannot be used here");
                continue;
            };
            // One port for all hosts, or one for each.
            let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
            match timeout(limit, self.connect_host(host, port)).await {
                Ok(Ok(session)) => return Ok(session),
                Ok(Err(error)) => last = error,
                Err(_) => last = Error::Connect { host: host.clone(), cause: format!("no answer within {limit:?}") },
            }
        }
        Err(last)
    }

    async fn connect_host(&self, host: &str, port: u16) -> Result<Session, Error> {
        let stream = dial(host, port).await?;
        let peer = stream.peer_addr().map_err(|error| connect_error(host, &error))?;
        let (client, connection) =
            self.config.connect_raw(stream, self.tls(host)?).await.map_err(|error| Error::handshake(host, &error))?;
        let session = Session {
            cancel: client.cancel_token(),
            client,
            // Its errors reach the client's calls.
            connection: AbortOnDropHandle::new(tokio::spawn(async move { drop(connection.await) })),
            target: self.clone(),
            host: host.to_owned(),
            peer,
        };
        if self.config.get_target_session_attrs() == TargetSessionAttrs::ReadWrite {
            let answer = session.query(Step::Login, "SHOW transaction_read_only", CONNECT_TIMEOUT).await?;
            if statement::last_row(&answer).and_then(|row| statement::text(row, 0)) == Some("on") {
                return Err(Error::Connect { host: host.to_owned(), cause: "the server is read-only".into() });
            }
        }
        Ok(session)
    }

    fn tls(&self, host: &str) -> Result<<MakeRustlsConnect as MakeTlsConnect<TcpStream>>::TlsConnect, Error> {
        let mut connector = self.connector.clone();
        MakeTlsConnect::<TcpStream>::make_tls_connect(&mut connector, host).map_err(|_| Error::Tls {
            host: host.to_owned(),
            cause: "the host's name cannot be in a certificate".into(),
        })
    }
}

/// Opens the TCP connection. A dead peer is noticed: by keepalives while we wait, by a timer where we have sent.
async fn dial(host: &str, port: u16) -> Result<TcpStream, Error> {
    let addresses: Vec<_> = tokio::net::lookup_host((host, port))
        .await
        .map_err(|error| Error::Resolve { host: host.to_owned(), cause: error.to_string() })?
        .collect();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                let socket = SockRef::from(&stream);
                let keepalive =
                    TcpKeepalive::new().with_time(Duration::from_secs(15)).with_interval(Duration::from_secs(5));
                // Best effort: the timers around every statement hold without them.
                drop(socket.set_tcp_keepalive(&keepalive));
                #[cfg(target_os = "linux")]
                drop(socket.set_tcp_user_timeout(Some(Duration::from_secs(30))));
                drop(stream.set_nodelay(true));
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(connect_error(host, &last))
}

fn connect_error(host: &str, error: &io::Error) -> Error {
    Error::Connect { host: host.to_owned(), cause: error.to_string() }
}

/// An open connection. Dropping it closes it.
pub(super) struct Session {
    client: Client,
    cancel: CancelToken,
    connection: AbortOnDropHandle<()>,
    target: Target,
    host: String,
    peer: std::net::SocketAddr,
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
            Ok(answer) => answer.map_err(|error| Error::statement(step, &error)),
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
            let stream = TcpStream::connect(self.peer).await.ok()?;
            let tls = self.target.drained_tls(&self.host)?;
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

impl Target {
    fn drained_tls(&self, host: &str) -> Option<<MakeRustlsConnect as MakeTlsConnect<Drained>>::TlsConnect> {
        let mut connector = self.connector.clone();
        MakeTlsConnect::<Drained>::make_tls_connect(&mut connector, host).ok()
    }
}

/// A stream whose shutdown first reads to the end: PgBouncer 1.18 drops all its clients when the one that sent a
/// cancel request closes before it was handled.
struct Drained(TcpStream);

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

/// Takes libpq's parameters for TLS and the like out of the URI, and gives back its sslmode.
fn without_foreign_parameters(uri: &str) -> Result<(String, Option<TlsMode>), Error> {
    if !uri.starts_with("postgresql://") && !uri.starts_with("postgres://") {
        return Err(Error::Uri("it does not begin with postgresql://"));
    }
    let (base, query) = uri.split_once('?').unwrap_or((uri, ""));
    let (_, address) = base.split_once("://").unwrap_or_default();
    let (authority, path) = address.split_once('/').unwrap_or((address, ""));
    if path.contains('@') || authority.matches('@').count() > 1 {
        return Err(Error::Uri("it has an @ where none can be"));
    }
    let mut mode = None;
    let mut kept = Vec::new();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        if name == "sslmode" {
            mode = Some(match value {
                "disable" => TlsMode::Disable,
                "allow" | "prefer" | "require" => TlsMode::Require,
                "verify-ca" => TlsMode::VerifyCA,
                "verify-full" => TlsMode::VerifyFull,
                _ => {
                    return Err(Error::Uri(
                        "its sslmode is none of disable, allow, prefer, require, verify-ca, verify-full",
                    ));
                }
            });
        } else if !FOREIGN.contains(&name) {
            kept.push(parameter);
        }
    }
    let rest = if kept.is_empty() { base.to_owned() } else { format!("{base}?{}", kept.join("&")) };
    Ok((rest, mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sslmode_is_taken_out_and_the_rest_stays() {
        let (uri, mode) =
            without_foreign_parameters("postgresql://u:p@h/d?sslmode=prefer&connect_timeout=3&sslrootcert=x").unwrap();
        assert_eq!((uri.as_str(), mode), ("postgresql://u:p@h/d?connect_timeout=3", Some(TlsMode::Require)));
        assert_eq!(without_foreign_parameters("postgres://h/d").unwrap().1, None);
    }

    #[test]
    fn a_bad_uri_is_refused_without_quoting_it() {
        let roots = Arc::new(tls::default_roots(None).unwrap());
        for uri in [
            "hunter2",
            "mysql://u:hunter2@h/d",
            "postgresql://u:hunter2/@h:port/d",
            "postgresql:///hunter2",
            "postgresql://u:hunter2@h/d?sslmode=yes",
            "postgresql://u:hunter2@h/d?nonsense=1",
            "postgresql://u:p@hunter2@h/d",
            "postgresql://u:p@hunter2/x@h:1/d",
            "postgresql://u:x,y@hunter2@h/d",
            "postgresql://u:p@hun ter2/d",
            "postgresql://:hunter2@h/d",
        ] {
            let target = Target::new(&ConnectionUri::new(uri), None, None, &roots, "test");
            let error = target.expect_err(uri);
            assert_eq!(error.reason(), crate::api::Reason::InvalidConnectionURI, "{uri}: {error}");
            assert!(!error.to_string().contains("hunter2") && !format!("{error:?}").contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_target_shows_nothing() {
        let roots = Arc::new(tls::default_roots(None).unwrap());
        let target =
            Target::new(&ConnectionUri::new("postgresql://u:hunter2@h/d"), None, None, &roots, "test").unwrap();
        assert!(!format!("{target:?}").contains("hunter2"));
    }
}
