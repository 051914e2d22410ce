//! How a sweep connects: every sslmode and TLS mode against a real server, client certificates, several hosts, sockets.

use audit_log_sweeper::api::Failure;
use audit_log_sweeper::api::Reason;
use audit_log_sweeper::api::status::Outcome;
use audit_log_sweeper::credentials::{ClientCertificate, ConnectionUri, Credentials};
use audit_log_sweeper::database::Target;
use audit_log_sweeper::database::tls::default_roots;
use audit_log_sweeper::sweep::{Report, sweep};
use serde_json::{Value, json};
use support::postgres::{PostgresOptions, PostgresServer, shared};
use tokio_util::sync::CancellationToken;

use crate::fixtures::AuditTable;

/// A log in which each row that is swept gets whether its session was encrypted.
async fn log_of_encryption(server: &PostgresServer) -> AuditTable {
    let log = AuditTable::on(server).await;
    log.before_update("NEW.request_id := (SELECT ssl::text FROM pg_stat_ssl WHERE pid = pg_backend_pid());").await;
    log
}

fn credentials(uri: &str, ca: Option<&str>) -> Credentials {
    Credentials { ca: ca.map(|pem| pem.as_bytes().to_vec()), ..Credentials::new(ConnectionUri::new(uri)) }
}

async fn swept(log: &AuditTable, credentials: &Credentials, tls: Value) -> Report {
    let database = json!({ "secretRef": { "name": "db" }, "tls": tls });
    sweep(&log.job_with(credentials, json!({ "database": database })), &CancellationToken::new()).await
}

/// Sweeps one row; what was seen on the server, or the error.
async fn try_it(log: &AuditTable, credentials: &Credentials, tls: Value) -> Result<&'static str, Failure> {
    log.run("TRUNCATE audit_log").await;
    log.start(1, "2 h").await;
    let report = swept(log, credentials, tls).await;
    let encrypted = log.query("SELECT request_id FROM audit_log WHERE result_kind = 'timeout'").await;
    match (report.end, encrypted.first().map(String::as_str)) {
        (Ok(_), Some("true")) => Ok("encrypted"),
        (Ok(_), Some("false")) => Ok("plain"),
        (Err(error), None) => Err(error),
        other => panic!("{other:?}"),
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Ca {
    Right,
    Wrong,
    None,
}

/// What libpq does in this mode; for an error, what the message has to name.
fn expected(mode: &str, ca: Ca, right_name: bool) -> Result<&'static str, &'static str> {
    let verified = match ca {
        Ca::Right => Ok("encrypted"),
        Ca::Wrong | Ca::None => Err("spec.database.tls.caSecretRef"),
    };
    match mode {
        "disable" => Ok("plain"),
        "require" if ca == Ca::None => Ok("encrypted"),
        "require" | "verify-ca" => verified,
        _ if right_name => verified,
        // Rustls looks at the chain first.
        _ => verified.and(Err("spec.database.tls.mode to VerifyCA")),
    }
}

#[tokio::test]
async fn every_sslmode_and_every_mode_does_what_libpq_means_by_it() {
    let server = tokio::task::spawn_blocking(shared).await.unwrap();
    let log = log_of_encryption(server).await;
    let base = log.database.uri();
    let (right, wrong) = (server.ca_pem(), server.stranger_ca_pem());
    // The URI's word, the spec's, and the mode that it comes to. The spec wins.
    let modes = [
        ("?sslmode=disable", Value::Null, "disable"),
        ("?sslmode=allow", Value::Null, "require"),
        ("?sslmode=prefer", Value::Null, "require"),
        ("?sslmode=require", Value::Null, "require"),
        ("?sslmode=verify-ca", Value::Null, "verify-ca"),
        ("?sslmode=verify-full", Value::Null, "verify-full"),
        ("", Value::Null, "verify-full"),
        ("?sslmode=verify-full", json!("Disable"), "disable"),
        ("?sslmode=disable", json!("Require"), "require"),
        ("?sslmode=disable", json!("VerifyCA"), "verify-ca"),
        ("?sslmode=disable", json!("VerifyFull"), "verify-full"),
    ];
    for (sslmode, mode, meaning) in modes {
        for (ca, pem) in [(Ca::Right, Some(&right)), (Ca::Wrong, Some(&wrong)), (Ca::None, None)] {
            for right_name in [true, false] {
                let mut uri = format!("{base}{sslmode}");
                if !right_name {
                    // The address to connect to, and a name that is not in the certificate.
                    uri = uri.replace("@127.0.0.1", "@db.example.org");
                    uri += if sslmode.is_empty() { "?hostaddr=127.0.0.1" } else { "&hostaddr=127.0.0.1" };
                }
                let what = format!("{sslmode} {mode} {ca:?} CA, right name {right_name}");
                let credentials = credentials(&uri, pem.map(String::as_str));
                if meaning == "disable" && ca != Ca::None {
                    // Nothing would be verified by the CA: neither plain text nor silence.
                    let roots = std::sync::Arc::new(default_roots(None).unwrap());
                    let spoken = serde_json::from_value(mode.clone()).unwrap();
                    let error = Target::new(&credentials, spoken, &roots, "test").unwrap_err();
                    assert!(error.to_string().contains("set spec.database.tls.mode"), "{what}: {error}");
                    continue;
                }
                let got = try_it(&log, &credentials, json!({ "mode": mode })).await;
                match (got, expected(meaning, ca, right_name)) {
                    (Ok(got), Ok(expected)) => assert_eq!(got, expected, "{what}"),
                    (Err(error), Err(field)) => {
                        assert_eq!(error.reason, Reason::TLSFailed, "{what}: {error}");
                        assert!(error.to_string().contains(field), "{what}: {error}");
                    }
                    other => panic!("{what}: {other:?}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn a_server_without_tls_is_never_spoken_to_in_plain_text_unless_disable_was_written() {
    let settings = vec![("ssl".into(), "off".into())];
    let server = PostgresServer::start(PostgresOptions { settings, ..Default::default() }).await.unwrap();
    let log = log_of_encryption(&server).await;
    let base = log.database.uri();
    for sslmode in ["", "?sslmode=allow", "?sslmode=prefer", "?sslmode=require", "?sslmode=verify-full"] {
        let error = try_it(&log, &credentials(&format!("{base}{sslmode}"), None), json!({})).await.unwrap_err();
        assert_eq!(error.reason, Reason::TLSFailed, "{sslmode}: {error}");
        assert!(error.to_string().contains("set spec.database.tls.mode to Disable"), "{sslmode}: {error}");
    }
    assert_eq!(try_it(&log, &credentials(&base, None), json!({ "mode": "Disable" })).await.unwrap(), "plain");
    assert_eq!(try_it(&log, &credentials(&(base + "?sslmode=disable"), None), json!({})).await.unwrap(), "plain");
}

#[tokio::test]
async fn an_expired_certificate_is_refused_by_name() {
    let server = PostgresServer::start(PostgresOptions { expired: true, ..Default::default() }).await.unwrap();
    let log = log_of_encryption(&server).await;
    let right = credentials(&log.database.uri(), Some(&server.ca_pem()));
    for mode in ["VerifyCA", "VerifyFull"] {
        let error = try_it(&log, &right, json!({ "mode": mode })).await.unwrap_err();
        assert_eq!(error.reason, Reason::TLSFailed, "{error}");
        let text = error.to_string();
        assert!(text.contains("renew the server's certificate") && text.contains("spec.database.tls.mode"), "{text}");
    }
    let unverified = credentials(&log.database.uri(), None);
    assert_eq!(try_it(&log, &unverified, json!({ "mode": "Require" })).await.unwrap(), "encrypted");
}

#[tokio::test]
async fn a_server_that_asks_for_a_certificate_gets_one() {
    let access = vec!["hostssl all +certs 127.0.0.1/32 cert".into(), "hostnossl all +certs 127.0.0.1/32 reject".into()];
    let server = PostgresServer::start(PostgresOptions { access, ..Default::default() }).await.unwrap();
    let log = log_of_encryption(&server).await;
    let admin = server.connect("postgres").await.unwrap();
    let user = log.database.user.clone();
    admin.batch_execute(&format!("CREATE ROLE certs; GRANT certs TO {user}")).await.unwrap();
    let with = |client: Option<ClientCertificate>| Credentials {
        client,
        ..credentials(&log.database.uri(), Some(&server.ca_pem()))
    };
    let shown = |authority: &support::certificates::Authority, name: &str| {
        let identity = authority.client(name).unwrap();
        ClientCertificate { certificate: identity.certificate_pem.into(), key: identity.key_pem.into() }
    };
    let good = shown(server.authority(), &user);
    let tls = || json!({ "mode": "VerifyFull" });
    assert_eq!(try_it(&log, &with(Some(good.clone())), tls()).await.unwrap(), "encrypted");

    let stranger = support::certificates::Authority::new("stranger").unwrap();
    let (other_name, other_authority) = (shown(server.authority(), "somebody"), shown(&stranger, &user));
    for (what, client) in [("none", None), ("other name", Some(other_name)), ("other CA", Some(other_authority))] {
        let error = try_it(&log, &with(client), tls()).await.unwrap_err();
        let reason = if what == "other CA" { Reason::TLSFailed } else { Reason::AuthenticationFailed };
        assert_eq!(error.reason, reason, "{what}: {error}");
        assert!(error.to_string().contains("clientCertSecretRef"), "{what}: {error}");
    }
    let plain = credentials(&log.database.uri(), None);
    let error = try_it(&log, &plain, json!({ "mode": "Disable" })).await.unwrap_err();
    assert_eq!(error.reason, Reason::AuthenticationFailed, "{error}");
    assert!(error.to_string().contains("spec.database.tls.mode"), "{error}");
}

#[tokio::test]
async fn scram_is_bound_to_the_channel_where_the_uri_demands_it() {
    let server = tokio::task::spawn_blocking(shared).await.unwrap();
    let log = log_of_encryption(server).await;
    let bound = credentials(&(log.database.uri() + "?channel_binding=require"), Some(&server.ca_pem()));
    assert_eq!(try_it(&log, &bound, json!({ "mode": "VerifyFull" })).await.unwrap(), "encrypted");
    // Without TLS there is no channel to bind to.
    let plain = Credentials { ca: None, ..bound };
    let error = try_it(&log, &plain, json!({ "mode": "Disable" })).await.unwrap_err();
    assert_eq!(error.reason, Reason::AuthenticationFailed, "{error}");
    assert!(error.to_string().contains("channel binding"), "{error}");
}

#[tokio::test]
async fn hostile_passwords_work_encoded_or_not() {
    let log = AuditTable::new().await;
    let user = &log.database.user;
    let address = log.database.uri().split_once('@').unwrap().1.to_owned();
    for password in ["p@ss", "a:b", "a/b", "x#y", "100%", "two words", "@:/#% all of it?", "ünï", "%40", "it's\\"] {
        let quoted = password.replace('\'', "''");
        log.run(&format!("SET standard_conforming_strings = on; ALTER ROLE {user} PASSWORD '{quoted}'")).await;
        let encoded: String = password.bytes().map(|byte| format!("%{byte:02X}")).collect();
        // What is an encoding by itself can only be taken for one.
        let raw = (password != "%40").then_some(password);
        for written in [Some(encoded.as_str()), raw].into_iter().flatten() {
            log.run("TRUNCATE audit_log").await;
            log.start(1, "2 h").await;
            let uri = format!("postgresql://{user}:{written}@{address}");
            let report = sweep(&log.job_at(&uri, json!({})), &CancellationToken::new()).await;
            assert!(report.end.is_ok(), "{password} written {written}: {report:?}");
            assert_eq!(log.timed_out().await, [1]);
        }
    }
}

#[tokio::test]
async fn a_refused_login_shows_no_piece_of_a_badly_written_uri() {
    let log = AuditTable::new().await;
    let (user, place) = (&log.database.user, format!("127.0.0.1:{}", log.database.port));
    let password = &log.database.password;
    for (uri, reason) in [
        (format!("postgresql://{user}:{password}@{place}/app;password=hunter2"), Reason::DatabaseNotFound),
        (format!("postgresql://{user}%3Ahunter2:x@{place}/app"), Reason::AuthenticationFailed),
        (format!("postgresql://{user}:{password}@{place}/{user}?options=-c%20hunter2=1"), Reason::InvalidConnectionURI),
    ] {
        let error = sweep(&log.job_at(&uri, json!({})), &CancellationToken::new()).await.end.unwrap_err();
        assert_eq!(error.reason, reason, "{error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}

#[tokio::test]
async fn of_several_hosts_the_one_that_takes_writes_is_swept() {
    let settings = vec![("default_transaction_read_only".into(), "on".into())];
    let standby = PostgresServer::start(PostgresOptions { settings, ..Default::default() }).await.unwrap();
    let log = AuditTable::new().await;
    log.start(1, "2 h").await;
    let user = &log.database.user;
    let admin = standby.connect("postgres").await.unwrap();
    let set_up = format!(
        "SET transaction_read_only = off; CREATE ROLE {user} LOGIN PASSWORD '{}'; CREATE DATABASE {} OWNER {user}",
        log.database.password, log.database.name
    );
    for statement in set_up.split("; ").skip(1) {
        admin.batch_execute("SET default_transaction_read_only = off").await.unwrap();
        admin.batch_execute(statement).await.unwrap();
    }
    let uri = |hosts: &str| format!("postgresql://{user}:{}@{hosts}/{}", log.database.password, log.database.name);
    let (good, readonly) = (log.database.port, standby.port());
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let three = uri(&format!("127.0.0.1:{closed},127.0.0.1:{readonly},localhost:{good}"));
    for uri in
        [three.clone() + "?target_session_attrs=read-write", three.clone() + "?target_session_attrs=primary", three]
    {
        log.run("UPDATE audit_log SET time_completed = NULL, result_kind = NULL").await;
        let report = sweep(&log.job_at(&uri, json!({})), &CancellationToken::new()).await;
        assert_eq!((report.timed_out, report.outcome()), (1, Outcome::Drained), "{report:?}");
    }
    let only = uri(&format!("127.0.0.1:{readonly}")) + "?target_session_attrs=read-write";
    let error = sweep(&log.job_at(&only, json!({})), &CancellationToken::new()).await.end.unwrap_err();
    assert_eq!(error.reason, Reason::NotPrimary, "{error}");
}

#[tokio::test]
async fn a_unix_socket_is_as_good_as_a_port() {
    let folder = support::scratch::Scratch::new(support::process::Account::unprivileged().unwrap()).unwrap();
    let settings = vec![("unix_socket_directories".into(), format!("'{}'", folder.path().display()))];
    let access = vec!["local all all scram-sha-256".into()];
    let server = PostgresServer::start(PostgresOptions { settings, access, ..Default::default() }).await.unwrap();
    let log = AuditTable::on(&server).await;
    log.start_many(3).await;
    let support::postgres::Database { name, user, password, port, .. } = &log.database;
    let (path, encoded) =
        (folder.path().display().to_string(), folder.path().display().to_string().replace('/', "%2F"));
    for uri in [
        format!("postgresql://{user}:{password}@{encoded}:{port}/{name}"),
        format!("postgresql:///{name}?host={path}&port={port}&user={user}&password={password}"),
    ] {
        log.run("UPDATE audit_log SET time_completed = NULL, result_kind = NULL").await;
        // Nothing leaves the machine, so no mode of TLS applies.
        let report = swept(&log, &credentials(&uri, None), json!({ "mode": "VerifyFull" })).await;
        assert_eq!((report.timed_out, report.outcome()), (3, Outcome::Drained), "{report:?}");
    }
}
