//! From the Secrets that a spec names to what the sweep connects with. Pure; the controller and the CLI both come
//! through here.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU16;

use k8s_openapi::ByteString;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::api::Reason;
use crate::api::spec::{Database, SecretKeyRef, Tls, TlsMode};

/// The key that holds the CA in a Secret named by `caSecretRef`.
const CA_KEY: &str = "ca.crt";

/// The key beside the URI that holds the CA in a Secret of the Service Binding specification.
const BINDING_CA_KEY: &str = "certificates";

/// The keys of a Secret named by `clientCertSecretRef`: as in Secrets of type kubernetes.io/tls.
const CLIENT_KEYS: [&str; 2] = ["tls.crt", "tls.key"];

/// The data of a Secret.
pub type SecretData = BTreeMap<String, ByteString>;

/// A connection URI. It holds a password, so it has no Display, and its Debug shows nothing.
#[derive(Clone)]
pub struct ConnectionUri(String);

impl ConnectionUri {
    /// Takes a URI as it stands, but for white space around it: a Secret made from a file ends in a newline.
    pub fn new(uri: &str) -> Self {
        Self(uri.trim().to_owned())
    }

    /// The secret itself. Only the code that connects may ask for it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ConnectionUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConnectionUri([redacted])")
    }
}

/// All that a spec's Secrets hold. Its Debug shows nothing.
#[derive(Clone)]
pub struct Credentials {
    pub uri: ConnectionUri,
    /// The CA to trust, as PEM; None: the public ones.
    pub ca: Option<Vec<u8>>,
    /// What to show a server that asks for it.
    pub client: Option<ClientCertificate>,
}

/// A certificate and its key, as PEM.
#[derive(Clone)]
pub struct ClientCertificate {
    pub certificate: Vec<u8>,
    pub key: Vec<u8>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials([redacted])")
    }
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientCertificate([redacted])")
    }
}

impl Credentials {
    /// A URI alone.
    pub fn new(uri: ConnectionUri) -> Self {
        Self { uri, ca: None, client: None }
    }

    /// The credentials of a spec. `secrets` are those that [`names`] lists; `uri` takes the place of the first.
    ///
    /// # Errors
    /// When a key is missing or is not text.
    pub fn read(
        database: &Database,
        namespace: &str,
        secrets: &BTreeMap<String, SecretData>,
        uri: Option<ConnectionUri>,
    ) -> Result<Self, CredentialsError> {
        let none = SecretData::new();
        let data = |name: &str| secrets.get(name).unwrap_or(&none);
        let binary = |name: &str, key: &str| {
            data(name).get(key).map(|value| value.0.clone()).ok_or_else(|| missing(data(name), name, key))
        };
        let SecretKeyRef { name, key } = &database.secret_ref;
        let tls = encrypted(database);
        let client = tls.and_then(|tls| tls.client_cert_secret_ref.as_ref());
        let uri = uri.map_or_else(|| self::uri(data(name), namespace, name, key.as_deref(), client.is_some()), Ok)?;
        let ca = match tls.and_then(|tls| tls.ca_secret_ref.as_ref()) {
            Some(ca) => Some(binary(&ca.name, CA_KEY)?),
            None if is_plain(database) => None,
            None => data(name).get(BINDING_CA_KEY).map(|pem| pem.0.clone()).filter(|pem| !pem.is_empty()),
        };
        let [certificate, key] = CLIENT_KEYS;
        let client = match client {
            None => None,
            Some(client) => Some(ClientCertificate {
                certificate: binary(&client.name, certificate)?,
                key: binary(&client.name, key)?,
            }),
        };
        Ok(Self { uri, ca, client })
    }
}

/// The Secrets that a spec needs, each once: the first holds the URI.
pub fn names(database: &Database) -> Vec<&str> {
    let mut names = vec![database.secret_ref.name.as_str()];
    if let Some(tls) = encrypted(database) {
        let ca = tls.ca_secret_ref.as_ref().map(|ca| ca.name.as_str());
        let client = tls.client_cert_secret_ref.as_ref().map(|client| client.name.as_str());
        for name in [ca, client].into_iter().flatten() {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names
}

/// The spec's TLS, where it does not say to do without.
fn encrypted(database: &Database) -> Option<&Tls> {
    database.tls.as_ref().filter(|_| !is_plain(database))
}

/// Whether the spec says to do without TLS.
fn is_plain(database: &Database) -> bool {
    database.tls.as_ref().is_some_and(|tls| tls.mode == Some(TlsMode::Disable))
}

/// A Secret that is there and does not hold what is needed.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("Secret {secret} has no key {key}, or an empty one; its keys are: {present}")]
    MissingKey { secret: String, key: String, present: String },
    #[error(
        "Secret {secret} has none of the keys fqdn-uri, uri, or host with dbname, user and password; its keys are: \
         {present}. Name the key that holds the connection URI in spec.database.secretRef.key"
    )]
    NoKnownKey { secret: String, present: String },
    #[error("key {key} of Secret {secret} is not text")]
    NotText { secret: String, key: String },
    #[error("key port of Secret {secret} must be a number from 1 to 65535, or one for each host with commas between")]
    Port { secret: String },
}

impl CredentialsError {
    /// The reason for the condition.
    pub const fn reason(&self) -> Reason {
        match self {
            Self::MissingKey { .. } | Self::NoKnownKey { .. } => Reason::SecretKeyMissing,
            Self::NotText { .. } | Self::Port { .. } => Reason::InvalidConnectionURI,
        }
    }
}

/// The connection URI in the Secret `name` of `namespace`: under `key` if that is given, else under the keys that
/// operators for PostgreSQL and the Service Binding specification use. With a client certificate, it needs no password.
///
/// # Errors
/// When a key is missing or is not text.
fn uri(
    data: &SecretData,
    namespace: &str,
    name: &str,
    key: Option<&str>,
    has_client: bool,
) -> Result<ConnectionUri, CredentialsError> {
    if let Some(key) = key {
        return text(data, name, key)?.map(ConnectionUri::new).ok_or_else(|| missing(data, name, key));
    }
    for key in ["fqdn-uri", "uri"] {
        // An empty one is none: some operators leave a key empty.
        if let Some(uri) = text(data, name, key)?.filter(|uri| !uri.trim().is_empty()) {
            return Ok(ConnectionUri::new(uri));
        }
    }
    // An empty part is none, too.
    let part = |key| text(data, name, key).map(|text| text.filter(|text| !text.trim().is_empty()));
    let Some(host) = part("host")? else {
        return Err(CredentialsError::NoKnownKey { secret: name.into(), present: keys(data) });
    };
    let either = |key, other| part(key)?.or(part(other)?).ok_or_else(|| missing(data, name, key));
    let (user, dbname) = (either("user", "username")?, either("dbname", "database")?);
    let password = part("password")?;
    if password.is_none() && !has_client {
        return Err(missing(data, name, "password"));
    }
    // A name without a dot is a Service of the Secret's own namespace.
    let qualified = |host: &str| match host.trim() {
        host if host.eq_ignore_ascii_case("localhost") || host.contains(['.', ':', '/']) => bracketed(host),
        host => format!("{host}.{namespace}"),
    };
    let hosts: Vec<_> = host.split(',').map(qualified).collect();
    let port = || CredentialsError::Port { secret: name.into() };
    let ports: Result<Vec<NonZeroU16>, _> =
        part("port")?.unwrap_or("5432").split(',').map(|p| p.trim().parse()).collect();
    let ports = ports.map_err(|_| port())?;
    if ![1, hosts.len()].contains(&ports.len()) {
        return Err(port());
    }
    let hosts: Vec<_> = hosts.iter().zip(ports.iter().cycle()).map(|(host, port)| format!("{host}:{port}")).collect();
    let encoded = |part: &str| encode(part.trim_end_matches(['\r', '\n']));
    let password = password.map(|password| format!(":{}", encoded(password))).unwrap_or_default();
    let (user, dbname) = (encoded(user), encoded(dbname));
    Ok(ConnectionUri::new(&format!("postgresql://{user}{password}@{}/{dbname}", hosts.join(","))))
}

fn text<'a>(data: &'a SecretData, secret: &str, key: &str) -> Result<Option<&'a str>, CredentialsError> {
    data.get(key)
        .map(|bytes| std::str::from_utf8(&bytes.0))
        .transpose()
        .map_err(|_| CredentialsError::NotText { secret: secret.into(), key: key.into() })
}

fn missing(data: &SecretData, secret: &str, key: &str) -> CredentialsError {
    CredentialsError::MissingKey { secret: secret.into(), key: key.into(), present: keys(data) }
}

/// The names of the keys there are, to find a typo by. Names only.
fn keys(data: &SecretData) -> String {
    if data.is_empty() {
        return "(none)".into();
    }
    data.keys().take(20).cloned().collect::<Vec<_>>().join(", ")
}

/// A host as it stands in a URI: an IPv6 address in brackets, a folder encoded.
fn bracketed(host: &str) -> String {
    match host {
        // A folder of sockets.
        folder if folder.starts_with('/') => encode(folder),
        six if six.contains(':') && !six.starts_with('[') => format!("[{six}]"),
        name => name.to_owned(),
    }
}

/// All but the unreserved characters of RFC 3986.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

fn encode(part: &str) -> String {
    utf8_percent_encode(part, ENCODED).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(pairs: &[(&str, &str)]) -> SecretData {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), ByteString(v.as_bytes().to_vec()))).collect()
    }

    fn found(pairs: &[(&str, &str)], key: Option<&str>) -> String {
        uri(&data(pairs), "ns", "db", key, false).unwrap().expose().to_owned()
    }

    #[test]
    fn a_named_key_wins_then_the_keys_of_operators() {
        let all = [("dsn", "postgresql://a\n"), ("fqdn-uri", "postgresql://b"), ("uri", "postgresql://c")];
        assert_eq!(found(&all, Some("dsn")), "postgresql://a");
        assert_eq!(found(&all, None), "postgresql://b");
        assert_eq!(found(&all[2..], None), "postgresql://c");
    }

    #[test]
    fn single_keys_make_a_uri_with_everything_encoded() {
        let crunchy = [
            ("host", "hippo-primary.db.svc"),
            ("port", "5433"),
            ("dbname", "a b"),
            ("user", "u@x"),
            ("password", "p:/?#[]@!% ä"),
        ];
        assert_eq!(
            found(&crunchy, None),
            "postgresql://u%40x:p%3A%2F%3F%23%5B%5D%40%21%25%20%C3%A4@hippo-primary.db.svc:5433/a%20b"
        );
        let cnpg = [("host", "app-rw"), ("dbname", "app"), ("username", "app"), ("password", "x")];
        assert_eq!(found(&cnpg, None), "postgresql://app:x@app-rw.ns:5432/app");
        let several =
            [("host", "db-1,db-2"), ("port", ""), ("dbname", "d"), ("user", "u"), ("password", "x"), ("uri", "")];
        assert_eq!(found(&several, None), "postgresql://u:x@db-1.ns:5432,db-2.ns:5432/d");
        let each = [
            ("host", "a.b,LocalHost"),
            ("port", "1, 2"),
            ("dbname", "d"),
            ("user", ""),
            ("username", "u"),
            ("password", "x"),
        ];
        assert_eq!(found(&each, None), "postgresql://u:x@a.b:1,LocalHost:2/d");
        let socket = [("host", "/run/postgresql"), ("dbname", "d"), ("user", "u"), ("password", "x")];
        assert_eq!(found(&socket, None), "postgresql://u:x@%2Frun%2Fpostgresql:5432/d");
        let binding =
            [("host", "a.b"), ("database", "d"), ("username", "u"), ("password", "x"), ("type", "postgresql")];
        assert_eq!(found(&binding, None), "postgresql://u:x@a.b:5432/d");
        let six = [("host", "fd00::1"), ("dbname", "app"), ("user", "app"), ("password", "x")];
        assert_eq!(found(&six, None), "postgresql://app:x@[fd00::1]:5432/app");
    }

    fn read(tls: serde_json::Value, keys: &[(&str, &str)]) -> Result<Credentials, CredentialsError> {
        let database = serde_json::json!({ "secretRef": { "name": "db" }, "tls": tls });
        let secrets = [
            ("db", data(keys)),
            ("ca", data(&[("ca.crt", "named")])),
            ("client", data(&[("tls.crt", "c"), ("tls.key", "k")])),
        ];
        let secrets = secrets.into_iter().map(|(name, data)| (name.to_owned(), data)).collect();
        Credentials::read(&serde_json::from_value(database).unwrap(), "ns", &secrets, None)
    }

    #[test]
    fn a_client_certificate_needs_no_password() {
        let keys = [("host", "a.b"), ("dbname", "d"), ("user", "u")];
        let client = serde_json::json!({ "clientCertSecretRef": { "name": "client" } });
        assert_eq!(read(client.clone(), &keys).unwrap().uri.expose(), "postgresql://u@a.b:5432/d");
        let both = [keys.as_slice(), &[("password", "x")]].concat();
        assert_eq!(read(client, &both).unwrap().uri.expose(), "postgresql://u:x@a.b:5432/d");
        let error = read(serde_json::json!({}), &keys).unwrap_err().to_string();
        assert!(error.starts_with("Secret db has no key password,"), "{error}");
    }

    #[test]
    fn the_ca_of_a_service_binding_is_trusted_unless_another_is_named_or_nothing_is_verified() {
        let keys = [("uri", "postgresql://u:x@a.b/d"), ("certificates", "bound")];
        let ca = |tls| read(tls, &keys).unwrap().ca.map(|ca| String::from_utf8(ca).unwrap());
        assert_eq!(ca(serde_json::Value::Null).as_deref(), Some("bound"));
        assert_eq!(ca(serde_json::json!({ "mode": "VerifyCA" })).as_deref(), Some("bound"));
        assert_eq!(ca(serde_json::json!({ "caSecretRef": { "name": "ca" } })).as_deref(), Some("named"));
        assert_eq!(ca(serde_json::json!({ "mode": "Disable" })), None);
    }

    #[test]
    fn a_part_that_is_empty_or_no_port_is_told_and_not_shown() {
        let with = |key: &'static str, value: &'static str| {
            let whole = [("host", "h"), ("dbname", "d"), ("user", "u"), ("password", "x"), ("port", "1")];
            let parts: Vec<_> = whole.map(|(k, v)| if k == key { (k, value) } else { (k, v) }).to_vec();
            uri(&data(&parts), "ns", "db", None, false).unwrap_err().to_string()
        };
        for bad in ["0", "65536", "1,hunter2", "1@hunter2", "1,2", "hunter2"] {
            let error = with("port", bad);
            assert!(
                error.starts_with("key port of Secret db must be a number") && !error.contains("hunter2"),
                "{error}"
            );
        }
        for key in ["dbname", "user", "password"] {
            assert!(with(key, " ").starts_with(&format!("Secret db has no key {key},")), "{key}");
        }
        assert!(with("host", "").starts_with("Secret db has none of the keys fqdn-uri, uri, or host"));
    }

    #[test]
    fn errors_name_the_keys_that_are_there_and_no_value() {
        let secret = data(&[("url", "postgresql://u:hunter2@h/d")]);
        let error = uri(&secret, "ns", "db", Some("uri"), false).unwrap_err();
        assert_eq!(error.reason(), Reason::SecretKeyMissing);
        assert_eq!(error.to_string(), "Secret db has no key uri, or an empty one; its keys are: url");
        let error = uri(&secret, "ns", "db", None, false).unwrap_err().to_string();
        assert!(error.contains("spec.database.secretRef.key") && !error.contains("hunter2"), "{error}");
        assert!(!format!("{:?}", ConnectionUri::new("postgresql://u:hunter2@h/d")).contains("hunter2"));
    }
}
