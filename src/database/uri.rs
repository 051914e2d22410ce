//! Reads a connection URI as Secrets hold it, before the driver does: passwords that nobody encoded, and parameters
//! that are meant for other programs.

use percent_encoding::percent_decode_str;
use tokio_postgres::Config;
use tokio_postgres::config::{Host, TargetSessionAttrs};

use super::Error;
use crate::api::spec::TlsMode;
use crate::credentials::ConnectionUri;

/// Parameters that the driver knows and that mean something here.
const KNOWN: [&str; 16] = [
    "user",
    "password",
    "dbname",
    "options",
    "application_name",
    "sslnegotiation",
    "host",
    "hostaddr",
    "port",
    "connect_timeout",
    "tcp_user_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "channel_binding",
];

/// Parameters of libpq, Prisma, JDBC and pgx that change nothing here: the Secret is often the application's own. What
/// would make a connection less safe than its author meant is not among them: that is refused.
const FOREIGN: [&str; 38] = [
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslcompression",
    "sslsni",
    "sslcertmode",
    "gsslib",
    "gssdelegation",
    "krbsrvname",
    "passfile",
    "service",
    "fallback_application_name",
    "client_encoding",
    "load_balance_hosts",
    "schema",
    "search_path",
    "pgbouncer",
    "connection_limit",
    "pool_timeout",
    "socket_timeout",
    "statement_cache_size",
    "currentSchema",
    "ApplicationName",
    "loginTimeout",
    "socketTimeout",
    "tcpKeepAlive",
    "prepareThreshold",
    "preparedStatementCacheQueries",
    "reWriteBatchedInserts",
    "stringtype",
    "binaryTransfer",
    "pool_max_conns",
    "pool_min_conns",
    "pool_max_conn_lifetime",
    "pool_max_conn_idle_time",
    "pool_health_check_period",
    "default_query_exec_mode",
    "statement_cache_capacity",
];

/// What a URI says.
#[derive(Debug)]
pub(super) struct Parsed {
    pub config: Config,
    /// By its sslmode.
    pub mode: Option<TlsMode>,
    /// Only a server that takes writes will do.
    pub writable: bool,
}

/// Reads a URI. An `@` or another special character in the password need not be encoded as long as the URI can be read
/// in one way only.
///
/// # Errors
/// When it is none, or can be read in several ways. No part of the URI is in the error.
pub(super) fn read(uri: &ConnectionUri) -> Result<Parsed, Error> {
    let uri = uri.expose();
    if uri.is_empty() {
        return Err(Error::Uri("it is empty"));
    }
    let Some(rest) = uri.strip_prefix("postgresql://").or_else(|| uri.strip_prefix("postgres://")) else {
        return Err(Error::Uri("it does not begin with postgresql://"));
    };
    let (user_info, address) = split(rest)?;
    let mut parsed = read_address(address)?;
    if let Some(user_info) = user_info {
        let (user, password) = user_info.split_once(':').map_or((user_info, None), |(user, pw)| (user, Some(pw)));
        // As in libpq, what comes after the ? wins.
        if !user.is_empty() && parsed.config.get_user().is_none() {
            parsed.config.user(decode(user));
        }
        if let Some(password) = password.filter(|_| parsed.config.get_password().is_none()) {
            parsed.config.password(decode(password));
        }
    }
    check(&parsed.config)?;
    if parsed.config.get_hosts().len() > 1 {
        // Of several servers only one takes writes; without this, a standby that answers first would be the end of it.
        parsed.writable = true;
    }
    // Found out by `connection`, which opens the connections itself.
    parsed.config.target_session_attrs(TargetSessionAttrs::Any);
    Ok(parsed)
}

/// Reads what comes after the user: the hosts, the database and the parameters.
fn read_address(address: &str) -> Result<Parsed, Error> {
    let (address, query) = address.split_once('?').unwrap_or((address, ""));
    let mut parsed = Parsed { config: Config::new(), mode: None, writable: false };
    let mut kept = Vec::new();
    let (mut root_certificate, mut hosts, mut ports) = (None, Vec::new(), Vec::new());
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match name {
            "sslmode" => parsed.mode = Some(tls_mode(value)?),
            "target_session_attrs" => parsed.writable = wants_writable(value)?,
            "sslrootcert" => root_certificate = Some(value),
            "gssencmode" if ["disable", "prefer"].contains(&value) => {}
            "host" | "port" if !address.starts_with('/') && !address.is_empty() => {
                return Err(Error::Uri("it names a host or a port twice, before and after the ?"));
            }
            // The driver does not take several there.
            "host" => hosts.extend(decoded(value)?),
            "port" => ports.extend(decoded(value)?),
            _ if KNOWN.contains(&name) => kept.push(parameter),
            _ if FOREIGN.contains(&name) => {}
            // Its name is not shown: it may be a piece of a password.
            _ => {
                return Err(Error::Uri(
                    "it has a parameter after the ? that is not known here, perhaps a misspelt one: check sslmode, \
                     target_session_attrs, connect_timeout and the like",
                ));
            }
        }
    }
    parsed.config = format!("postgresql://{address}?{}", kept.join("&"))
        .parse()
        .map_err(|_| Error::Uri("a host, port or parameter in it is not right"))?;
    for host in hosts {
        parsed.config.host(host);
    }
    for port in ports {
        let number = port.parse().map_err(|_| Error::Uri("a port in it is not a number"))?;
        parsed.config.port(number);
    }
    // The file is not here. As in libpq, to name one is to ask that the server be verified.
    parsed.mode = match (parsed.mode, root_certificate) {
        (Some(TlsMode::Require | TlsMode::VerifyCA), Some("system")) => Some(TlsMode::VerifyFull),
        (Some(TlsMode::Require), Some(_)) => Some(TlsMode::VerifyCA),
        (mode, _) => mode,
    };
    Ok(parsed)
}

/// The items of a list in a parameter.
fn decoded(value: &str) -> Result<Vec<String>, Error> {
    let value = percent_decode_str(value).decode_utf8().map_err(|_| Error::Uri("a parameter in it is not UTF-8"))?;
    Ok(value.split(',').map(str::to_owned).collect())
}

/// Refuses what the driver takes and no server has.
fn check(config: &Config) -> Result<(), Error> {
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        return Err(Error::Uri("it names no host"));
    }
    // What was not encoded in a password could else be taken for a host, and be shown as that.
    let plain = |host: &str| host.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:-%".contains(&b));
    if config.get_hosts().iter().any(|host| matches!(host, Host::Tcp(name) if !plain(name))) {
        return Err(Error::Uri("a host in it has characters that no host name has"));
    }
    if config.get_user().is_none_or(str::is_empty) {
        return Err(Error::Uri("it names no user"));
    }
    let nul = |name: Option<&str>| name.is_some_and(|name| name.contains('\0'));
    if nul(config.get_user()) || nul(config.get_dbname()) {
        return Err(Error::Uri("its user or database has a NUL character in its name"));
    }
    Ok(())
}

/// The user and password, and the rest, of what follows the scheme: at the one `@` behind which an address can stand.
fn split(rest: &str) -> Result<(Option<&str>, &str), Error> {
    let mut found = None;
    let mut problem = None;
    for (at, _) in rest.match_indices('@') {
        let (user_info, address) = (rest.get(..at).unwrap_or_default(), rest.get(at + 1..).unwrap_or_default());
        match check_address(address) {
            Ok(()) if found.is_some() => {
                return Err(Error::Uri("it has an @ too many, so that it can be read in two ways"));
            }
            Ok(()) => found = Some((Some(user_info), address)),
            Err(what) => problem = Some(what),
        }
    }
    match (found, problem) {
        (Some(found), _) => Ok(found),
        (None, Some(what)) => Err(Error::Uri(what)),
        (None, None) => check_address(rest).map(|()| (None, rest)).map_err(Error::Uri),
    }
}

/// Whether this can stand behind the user: hosts with their ports, a database, parameters.
fn check_address(address: &str) -> Result<(), &'static str> {
    let (address, query) = address.split_once('?').unwrap_or((address, ""));
    let (hosts, database) = address.split_once('/').unwrap_or((address, ""));
    if database.contains('/') {
        return Err("it has a / too many");
    }
    for host in hosts.split(',') {
        let (name, port) = match host.strip_prefix('[') {
            Some(six) => {
                let (name, port) = six.split_once(']').ok_or("an address in it has no ]")?;
                (name, port.strip_prefix(':').unwrap_or(port))
            }
            None => host.split_once(':').unwrap_or((host, "")),
        };
        if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:-%".contains(&b)) {
            return Err("a host in it has characters that no host name has");
        }
        if !port.is_empty() && port.parse::<u16>().map_or(true, |port| port == 0) {
            return Err("a port in it is not a number from 1 to 65535");
        }
    }
    let named = |parameter: &str| {
        let name = parameter.split_once('=').map_or("", |(name, _)| name);
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphabetic() || b == b'_')
    };
    if !query.split('&').filter(|parameter| !parameter.is_empty()).all(named) {
        return Err("a parameter after its ? is not of the form name=value");
    }
    Ok(())
}

/// Decodes `%40` and the like, unless a `%` stands there that encodes nothing: then nobody encoded the text.
fn decode(text: &str) -> String {
    let is_hex = |c: Option<char>| c.is_some_and(|c| c.is_ascii_hexdigit());
    let encodes = |after: &str| is_hex(after.chars().next()) && is_hex(after.chars().nth(1));
    if !text.split('%').skip(1).all(encodes) {
        return text.to_owned();
    }
    percent_decode_str(text).decode_utf8().map_or_else(|_| text.to_owned(), Into::into)
}

fn tls_mode(value: &str) -> Result<TlsMode, Error> {
    match value {
        "disable" => Ok(TlsMode::Disable),
        "allow" | "prefer" | "require" => Ok(TlsMode::Require),
        "verify-ca" => Ok(TlsMode::VerifyCA),
        "verify-full" => Ok(TlsMode::VerifyFull),
        _ => Err(Error::Uri("its sslmode is none of disable, allow, prefer, require, verify-ca, verify-full")),
    }
}

fn wants_writable(value: &str) -> Result<bool, Error> {
    match value {
        "any" => Ok(false),
        "read-write" | "primary" => Ok(true),
        _ => Err(Error::Uri("its target_session_attrs is none of any, read-write, primary: the sweep needs a primary")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(uri: &str) -> Parsed {
        read(&ConnectionUri::new(uri)).unwrap_or_else(|error| panic!("{uri}: {error}"))
    }

    #[test]
    fn passwords_need_no_encoding_where_only_one_reading_is_possible() {
        for (written, password) in [
            ("simple", "simple"),
            ("p%40ss", "p@ss"),
            ("p@ss", "p@ss"),
            ("a:b", "a:b"),
            ("a/b", "a/b"),
            ("a@b/c", "a@b/c"),
            ("a#b", "a#b"),
            ("a?b=c&d", "a?b=c&d"),
            ("100%", "100%"),
            ("50%off", "50%off"),
            ("two words", "two words"),
            ("@:/#% x", "@:/#% x"),
            ("%40%3A%2F%23%25%20x", "@:/#% x"),
            ("päss", "päss"),
            // Bytes that are no text: nobody encoded it.
            ("p%E4ss", "p%E4ss"),
            ("", ""),
        ] {
            let parsed = parsed(&format!("postgresql://app:{written}@db.example.org:5433/app?connect_timeout=3"));
            assert_eq!(parsed.config.get_password(), Some(password.as_bytes()), "{written}");
            assert_eq!(parsed.config.get_user(), Some("app"), "{written}");
            assert_eq!(parsed.config.get_hosts(), [Host::Tcp("db.example.org".into())], "{written}");
            assert_eq!(
                (parsed.config.get_ports(), parsed.config.get_dbname()),
                (&[5433][..], Some("app")),
                "{written}"
            );
        }
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        for uri in [
            // A database named hunter2@h, or a password p@h/hunter2 and a host named h?
            "postgresql://u:p@h/hunter2@h",
            "postgresql://u:p@h/d?application_name=hunter2@h",
        ] {
            let error = read(&ConnectionUri::new(uri)).unwrap_err().to_string();
            assert!(error.contains("two ways") && error.contains("%40") && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn every_address_is_read() {
        let hosts = |uri: &str| {
            let parsed = parsed(uri);
            let names: Vec<String> = parsed.config.get_hosts().iter().map(|host| format!("{host:?}")).collect();
            (names.join(" "), parsed.config.get_ports().to_vec(), parsed.writable)
        };
        assert_eq!(hosts("postgres://u@[fd00::1]:5433/d"), (r#"Tcp("fd00::1")"#.into(), vec![5433], false));
        assert_eq!(hosts("postgres://u@h"), (r#"Tcp("h")"#.into(), vec![5432], false));
        assert_eq!(
            hosts("postgres://u@a:1,b:2/d?target_session_attrs=any"),
            (r#"Tcp("a") Tcp("b")"#.into(), vec![1, 2], true)
        );
        assert!(hosts("postgres://u@h/d?target_session_attrs=primary").2);
        let socket = r#"Unix("/var/run/postgresql")"#;
        assert_eq!(hosts("postgres://u@%2Fvar%2Frun%2Fpostgresql/d").0, socket);
        assert_eq!(hosts("postgres:///d?host=/var/run/postgresql&user=u").0, socket);
        for several in
            ["postgres:///d?host=a,b&user=u", "postgres://u@/d?host=a,b", "postgres://?host=a%2Cb&user=u&dbname=d"]
        {
            assert_eq!(hosts(several).0, r#"Tcp("a") Tcp("b")"#, "{several}");
            assert!(hosts(several).2, "{several}");
        }
        assert_eq!(parsed("postgres://h/d?user=u&password=p%40").config.get_password(), Some(&b"p@"[..]));
    }

    #[test]
    fn a_user_and_a_password_after_the_question_mark_win_as_in_libpq() {
        let parsed = parsed("postgresql://owner:old@h/d?user=sweeper&password=n%26w");
        assert_eq!(parsed.config.get_user(), Some("sweeper"));
        assert_eq!(parsed.config.get_password(), Some(b"n&w".as_slice()));
    }

    #[test]
    fn sslmode_is_read_and_what_is_meant_for_others_does_no_harm() {
        let modes = [
            ("disable", TlsMode::Disable),
            ("allow", TlsMode::Require),
            ("prefer", TlsMode::Require),
            ("require", TlsMode::Require),
            ("verify-ca", TlsMode::VerifyCA),
            ("verify-full", TlsMode::VerifyFull),
        ];
        for (text, mode) in modes {
            assert_eq!(parsed(&format!("postgresql://u@h/d?sslmode={text}&sslkey=x")).mode, Some(mode));
        }
        // A file of CAs that is named asks for verification, as in libpq.
        let named =
            |mode: &str, file: &str| parsed(&format!("postgresql://u@h/d?sslmode={mode}&sslrootcert={file}")).mode;
        assert_eq!(named("require", "/ca.pem"), Some(TlsMode::VerifyCA));
        assert_eq!(named("require", "system"), Some(TlsMode::VerifyFull));
        assert_eq!(named("verify-full", "/ca.pem"), Some(TlsMode::VerifyFull));
        assert_eq!(named("disable", "/ca.pem"), Some(TlsMode::Disable));
        assert_eq!(parsed("postgresql://u@h/d?schema=public&pgbouncer=true&sslkey=/k").mode, None);
    }

    #[test]
    fn a_bad_uri_is_refused_without_quoting_it() {
        for uri in [
            "",
            "hunter2",
            "mysql://u:hunter2@h/d",
            "postgresql://u:hunter2/@h:port/d",
            "postgresql://u:hunter2@h:0/d",
            "postgresql:///hunter2",
            "postgresql://hunter2",
            "postgresql://u:hunter2@/d",
            "postgresql://u:hunter2@h/d?sslmode=yes",
            "postgresql://u:hunter2@h/d?target_session_attrs=standby",
            "postgresql://u:hunter2@h/d?nonsense=1",
            "postgresql://u:x@h/d?hunter2",
            "postgresql://u:x@h/d?password=x&hunter2=y",
            "postgresql://u:p@hun ter2/d",
            "postgresql://:hunter2@h/d",
            "postgresql://u:hunter2@[fd00::1/d",
            "postgresql://u:hunter2@h/a/b",
            "postgresql://u%00:hunter2@h/d",
            "postgresql://u:hunter2@h/d?sslcrl=/crl.pem",
            "postgresql://u:hunter2@h/d?gssencmode=require",
            "postgresql://u:hunter2@h/d?port=5433",
            "postgresql://u:hunter2@h/d?host=other",
        ] {
            let error = read(&ConnectionUri::new(uri)).expect_err(uri);
            assert_eq!(error.reason(), crate::api::Reason::InvalidConnectionURI, "{uri}: {error}");
            assert!(!error.to_string().contains("hunter2") && !format!("{error:?}").contains("hunter2"), "{error}");
        }
    }
}
