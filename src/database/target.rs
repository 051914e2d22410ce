//! Where a database is and how to log in to it: the connection URI and the TLS files of a spec, read and validated once.

use std::sync::Arc;

use rustls::RootCertStore;
use tokio_postgres::Config;
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::uri::{self, Parsed};
use super::{Error, tls};
use crate::api::cut;
use crate::api::spec::TlsMode;
use crate::credentials::Credentials;

/// Where to connect, and how. Holds a password; its Debug shows none.
#[derive(Clone)]
pub struct Target {
    pub(super) config: Config,
    pub(super) writable: bool,
    pub(super) connector: MakeRustlsConnect,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Target([redacted])")
    }
}

impl Target {
    /// A target from what the Secrets of a spec hold. `mode` is the spec's, and wins over the URI's sslmode; without a
    /// CA, `default_roots` are trusted. `application_name` is what `pg_stat_activity` shows.
    ///
    /// # Errors
    /// When the URI, the CA or the client certificate cannot be read.
    pub fn new(
        credentials: &Credentials,
        mode: Option<TlsMode>,
        default_roots: &Arc<RootCertStore>,
        application_name: &str,
    ) -> Result<Self, Error> {
        let Parsed { mut config, mode: sslmode, writable } = uri::read(&credentials.uri)?;
        let mode = mode.or(sslmode).unwrap_or(TlsMode::VerifyFull);
        if mode == TlsMode::Disable && (credentials.ca.is_some() || credentials.client.is_some()) {
            return Err(Error::NamedForNothing);
        }
        // Never the driver's default, Prefer, which falls back to plain text.
        config.ssl_mode(if mode == TlsMode::Disable { SslMode::Disable } else { SslMode::Require });
        config.application_name(cut(application_name, 63));
        let tls = tls::client_config(mode, credentials, default_roots)?;
        Ok(Self { config, writable, connector: MakeRustlsConnect::new(tls) })
    }

    /// The database servers that it may reach, hosts and ports: alike for all targets of the same ones.
    pub fn servers(&self) -> String {
        format!("{:?} {:?} {:?}", self.config.get_hosts(), self.config.get_hostaddrs(), self.config.get_ports())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::ConnectionUri;

    #[test]
    fn a_target_shows_nothing() {
        let roots = Arc::new(tls::default_roots(None).unwrap());
        let credentials = Credentials::new(ConnectionUri::new("postgresql://u:hunter2@h/d"));
        let target = Target::new(&credentials, None, &roots, "test").unwrap();
        assert!(!format!("{target:?} {credentials:?}").contains("hunter2"));
    }
}
