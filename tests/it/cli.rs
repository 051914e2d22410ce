//! The command line without a cluster: the same sweep, from a file.

use std::process::{Command, Output};

use serde_json::{Value, json};
use support::leaks;
use support::scratch::Scratch;

use crate::fixtures::Log;

fn sweep(file: &str, args: &[&str], env: &[(&str, &str)]) -> Output {
    let scratch = Scratch::new(None).unwrap();
    let path = scratch.write("file.yaml", file, None).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_audit-log-sweeper"));
    command.arg("sweep").arg("-f").arg(path).args(args).env_remove("DATABASE_URL").envs(env.iter().copied());
    let output = command.output().unwrap();
    leaks::keep_output(&output);
    output
}

fn sweeper(spec: &str) -> String {
    format!(
        "apiVersion: auditlog.dev/v1alpha1\nkind: AuditLogSweeper\nmetadata: {{name: app}}\n\
         spec: {{database: {{secretRef: {{name: db}}, tls: {{mode: Disable}}}}, timeout: 1h{spec}}}\n"
    )
}

fn secret(uri: &str) -> String {
    format!("---\napiVersion: v1\nkind: Secret\nmetadata: {{name: db}}\nstringData: {{uri: \"{uri}\"}}\n")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn sweeps_once_from_a_file_with_its_secret_and_prints_json() {
    let log = Log::new().await;
    log.start_many(3).await;
    let file = sweeper(", limit: 2") + &secret(&log.database.uri());
    let output = sweep(&file, &["--output", "json"], &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(log.timed_out().await, [1, 2]);
    let mut report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for varying in ["cutoff", "durationMilliseconds"] {
        assert!(!report.as_object_mut().unwrap().remove(varying).unwrap().is_null());
    }
    assert!(report["backlog"].as_object_mut().unwrap().remove("oldestTimeStarted").unwrap().is_string());
    assert_eq!(
        report,
        json!({ "timedOut": 2, "limit": 2, "outcome": "LimitReached", "batches": 1, "error": null,
                "refused": 0, "skipped": 0, "suppressed": 0, "uncertain": 0,
                "backlog": { "remaining": 1, "atLeast": false, "display": "1" } })
    );
}

#[tokio::test]
async fn the_uri_comes_from_the_flag_then_the_environment_then_the_file() {
    let log = Log::new().await;
    let (good, bad) = (log.database.uri(), "postgresql://u:hunter2leak@127.0.0.1:1/d");
    let exit = |output: Output| output.status.code();
    assert_eq!(exit(sweep(&sweeper(""), &["--database-url", &good], &[("DATABASE_URL", bad)])), Some(0));
    assert_eq!(exit(sweep(&(sweeper("") + &secret(bad)), &[], &[("DATABASE_URL", &good)])), Some(0));
    assert_eq!(exit(sweep(&(sweeper("") + &secret(&good)), &[], &[("DATABASE_URL", "")])), Some(0));
    let none = sweep(&sweeper(""), &[], &[]);
    assert_eq!(none.status.code(), Some(2));
    assert!(stderr(&none).contains("set --database-url or DATABASE_URL"), "{}", stderr(&none));
}

#[tokio::test]
async fn a_failed_sweep_exits_with_1_and_counts_what_was_committed() {
    let log = Log::new().await;
    log.start_many(4).await;
    log.before_update("IF right(NEW.id::text, 1) = '3' THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;")
        .await;
    let output = sweep(&(sweeper(", batchSize: 2") + &secret(&log.database.uri())), &["--output", "json"], &[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["timedOut"], &report["outcome"]), (&json!(2), &json!("Failed")));
    assert_eq!(report["error"]["reason"], json!("DatabaseUnreachable"));
    assert_eq!(log.timed_out().await, [1, 2]);
}

#[tokio::test]
async fn bad_input_exits_with_2_says_why_and_shows_no_secret() {
    let secret = secret("postgresql://u:hunter2leak@h/d");
    let cases = [
        ("not: [yaml".to_owned() + &secret, "is not YAML"),
        (secret.clone(), "holds no AuditLogSweeper"),
        (sweeper("") + "---\n" + &sweeper(""), "holds 2 AuditLogSweepers"),
        (sweeper(", timeout: 4d") + &secret, ""),
        (sweeper(", limit: 0") + &secret, "spec.limit"),
        (sweeper(", limitt: 1") + &secret, "unknown field \"spec.limitt\""),
        (sweeper("") + &secret.replace("postgresql", "mysql"), "does not begin with postgresql://"),
        (sweeper("") + &secret.replace("uri:", "url:"), "has none of the keys"),
    ];
    for (file, message) in cases {
        let output = sweep(&file, &[], &[]);
        assert_eq!(output.status.code(), Some(2), "{file}: {}", stderr(&output));
        assert!(stderr(&output).contains(message), "{message}: {}", stderr(&output));
        assert!(!stderr(&output).contains("hunter2"), "{}", stderr(&output));
    }
    let missing =
        Command::new(env!("CARGO_BIN_EXE_audit-log-sweeper")).args(["sweep", "-f", "/nowhere"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(2));
    assert!(stderr(&missing).contains("cannot read /nowhere"));
}

#[test]
fn the_printed_crd_is_the_committed_one() {
    let output = Command::new(env!("CARGO_BIN_EXE_audit-log-sweeper")).arg("crd").output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    for file in ["crds/auditlogsweepers.auditlog.dev.yaml", "charts/audit-log-sweeper/files/crd.yaml"] {
        let committed = std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
        assert_eq!(printed, committed, "{file} is not what the types say: run cargo xtask generate");
    }
}
