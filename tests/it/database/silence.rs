//! Every wait for the database has an end, with a reason of its own.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use audit_log_sweeper::api::Reason;
use audit_log_sweeper::sweep::sweep;
use serde_json::json;
use support::scratch::Scratch;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::fixtures::{AuditTable, FakePostgres, Misbehaviour};

/// Sweeps at this address, which answers nothing that would help; how long that took and why it ended.
async fn end_of(log: &AuditTable, address: SocketAddr, spec: serde_json::Value) -> (Duration, Reason, String) {
    let uri = log.database.uri().replace(&format!("127.0.0.1:{}", log.database.port), &address.to_string());
    let start = Instant::now();
    let report = sweep(&log.job_at(&(uri + "?connect_timeout=1"), spec), &CancellationToken::new()).await;
    let error = report.end.unwrap_err();
    (start.elapsed(), error.reason, error.to_string())
}

#[tokio::test]
async fn a_port_that_accepts_and_never_answers() {
    let log = AuditTable::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (took, reason, text) = end_of(&log, listener.local_addr().unwrap(), json!({})).await;
    assert_eq!(reason, Reason::LoginTimeout, "{text}");
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test]
async fn a_server_that_lets_log_in_and_answers_no_statement() {
    let log = AuditTable::new().await;
    let server = FakePostgres::new(Misbehaviour::SilentAfterLogin).await;
    let (took, reason, text) = end_of(&log, server.address, json!({})).await;
    assert_eq!(reason, Reason::ResponseTimeout, "{text}");
    // Within the limit for connecting: nothing that others wait for is held meanwhile.
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test]
async fn a_server_that_sends_more_than_any_answer_holds() {
    let log = AuditTable::new().await;
    for (misbehaviour, says) in [
        (Misbehaviour::HugeMessage, "sent a message of 1000000000 bytes"),
        (Misbehaviour::EndlessParameters, "sent more than 65536 bytes during the login"),
        (Misbehaviour::EndlessRows, "sent more than 2097152 bytes in one answer"),
        (Misbehaviour::Http, "sent a message of 1414811695 bytes"),
    ] {
        let server = FakePostgres::new(misbehaviour).await;
        let (_, reason, text) = end_of(&log, server.address, json!({})).await;
        assert_eq!(reason, Reason::ProtocolError, "{misbehaviour:?}: {text}");
        assert!(text.contains(says), "{misbehaviour:?}: {text}");
        // What was not read is in the buffers of the sockets.
        assert!(server.sent() < 16 << 20, "{misbehaviour:?}: {} bytes", server.sent());
    }
}

#[tokio::test]
async fn a_host_that_drops_packets() {
    let log = AuditTable::new().await;
    // Linux answers no further SYN once the queue of a listener that accepts nobody is full.
    let address = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    address.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    address.listen(0).unwrap();
    let address = std::net::TcpListener::from(address);
    let place = address.local_addr().unwrap();
    let mut held = vec![];
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&place, Duration::from_millis(300)) {
        held.push(stream);
        assert!(held.len() < 100, "the queue never fills");
    }
    let (took, reason, text) = end_of(&log, place, json!({})).await;
    assert_eq!(reason, Reason::ConnectTimeout, "{text}");
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test]
#[ignore = "needs root, to give one process another /etc/resolv.conf"]
async fn a_name_server_that_never_answers() {
    // The port is fixed, and other runs of this test may be under way: each process has an address of its own.
    let [.., high, low] = std::process::id().to_be_bytes();
    let host = format!("127.99.{high}.{low}");
    let silent = std::net::UdpSocket::bind(format!("{host}:53")).unwrap();
    let scratch = Scratch::new(None).unwrap();
    let settings = format!("nameserver {host}\noptions timeout:10 attempts:3\n");
    let settings = scratch.write("resolv.conf", settings, None).unwrap();
    let object = "apiVersion: auditlog.dev/v1alpha1\nkind: AuditLogSweeper\nmetadata: {name: app}\n\
                  spec: {database: {secretRef: {name: db}}}\n";
    let object = scratch.write("app.yaml", object, None).unwrap();
    let start = Instant::now();
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount --bind \"$1\" /etc/resolv.conf && exec \"$2\" sweep -f \"$3\"", "sh"]);
    command.arg(settings).arg(env!("CARGO_BIN_EXE_audit-log-sweeper")).arg(object);
    command.env("DATABASE_URL", "postgresql://u:p@db.example.org/d?connect_timeout=1");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    drop(silent);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("NameResolutionFailed: no name server answered for db.example.org within 1s"), "{text}");
    assert_eq!(output.status.code(), Some(1));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn the_deadline_ends_connecting_too() {
    let log = AuditTable::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let uri = log.database.uri().replace(&log.database.port.to_string(), &address.port().to_string());
    let start = Instant::now();
    let job = log.job_at(&uri, json!({ "deadline": "1s", "statementTimeout": "1s" }));
    let error = sweep(&job, &CancellationToken::new()).await.end.unwrap_err();
    assert_eq!(error.reason, Reason::LoginTimeout, "{error}");
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_server_that_stops_in_the_middle_of_a_result() {
    let log = AuditTable::new().await;
    log.start_many(3).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, port) = (listener.local_addr().unwrap(), log.database.port);
    let proxy = tokio::spawn(async move {
        let mut held = vec![];
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            held.push(tokio::spawn(halve_the_answer_to_a_batch(client, server)));
        }
    });
    let (took, reason, text) = end_of(&log, address, json!({ "statementTimeout": "200ms" })).await;
    proxy.abort();
    assert_eq!(reason, Reason::ResponseTimeout, "{text}");
    assert!(took < Duration::from_secs(12), "{took:?}");
    assert_eq!(log.open().await, [1, 2, 3], "nothing was committed");
}

/// Passes everything on but the second half of the answer to a batch.
async fn halve_the_answer_to_a_batch(client: TcpStream, server: TcpStream) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let (asked, mut was_asked) = tokio::sync::watch::channel(false);
    let there = async {
        let mut buffer = vec![0; 65536];
        while let Ok(n @ 1..) = from_client.read(&mut buffer).await {
            if String::from_utf8_lossy(&buffer[..n]).contains("WITH stale") {
                asked.send_replace(true);
            }
            to_server.write_all(&buffer[..n]).await.unwrap();
        }
    };
    let back = async {
        let mut buffer = vec![0; 65536];
        while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
            if *was_asked.borrow_and_update() {
                to_client.write_all(&buffer[..n / 2]).await.unwrap();
                std::future::pending::<()>().await;
            }
            to_client.write_all(&buffer[..n]).await.unwrap();
        }
    };
    tokio::join!(there, back);
}
