//! The command line without a cluster: the same sweep, or a check, from a file.

use std::process::{Command, Output};

use serde_json::{Value, json};
use support::leaks;
use support::scratch::Scratch;

use crate::fixtures::AuditTable;

fn sweep(file: &str, args: &[&str], env: &[(&str, &str)]) -> Output {
    run("sweep", file, args, env)
}

fn run(subcommand: &str, file: &str, args: &[&str], env: &[(&str, &str)]) -> Output {
    let scratch = Scratch::new(None).unwrap();
    let path = scratch.write("file.yaml", file, None).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_audit-log-sweeper"));
    command.arg(subcommand).arg("-f").arg(path).args(args).env_remove("DATABASE_URL").envs(env.iter().copied());
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
    let log = AuditTable::new().await;
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
                "smallBatches": 0, "fallbackBatches": 0, "refused": 0, "refusedIds": [], "refusedWhy": null, "skipped": 0, "suppressed": 0, "uncertain": 0,
                "backlog": { "remaining": 1, "atLeast": false, "display": "1" } })
    );
}

#[tokio::test]
async fn rows_that_are_refused_are_named_with_the_cause() {
    let log = AuditTable::new().await;
    log.start_many(3).await;
    log.run("ALTER TABLE audit_log ADD CONSTRAINT no_twos CHECK (time_completed IS NULL OR id::text NOT LIKE '%2') NOT VALID").await;
    let output = sweep(&(sweeper("") + &secret(&log.database.uri())), &[], &[]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("\nrefused    1\n") && said.contains("constraint no_twos"), "{said}");
    assert!(said.contains(&format!("\nkeys       {}\n", crate::fixtures::id(2))), "{said}");
    assert_eq!((output.status.code(), log.timed_out().await), (Some(0), vec![1, 3]));
}

#[tokio::test]
async fn a_table_that_the_operator_would_not_sweep_is_not_swept_from_a_file_either() {
    let log = AuditTable::new().await;
    log.start_many(3).await;
    log.run("ALTER TABLE audit_log ALTER time_started DROP NOT NULL").await;
    let file = sweeper("") + &secret(&log.database.uri());
    let output = sweep(&file, &["--output", "json"], &[]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &report["error"]["reason"]), (Some(1), &json!("SchemaMismatch")), "{report}");
    assert!(stderr(&output).contains("\"time_started\" may be NULL"), "{}", stderr(&output));
    assert_eq!(log.open().await, [1, 2, 3]);
    let forced = sweep(&file, &["--no-check"], &[]);
    assert_eq!((forced.status.code(), log.timed_out().await), (Some(0), vec![1, 2, 3]), "{}", stderr(&forced));
    assert!(stderr(&forced).contains("sweeping without a check of the table (--no-check)"), "{}", stderr(&forced));
}

#[tokio::test]
async fn the_uri_comes_from_the_flag_then_the_environment_then_the_file() {
    let log = AuditTable::new().await;
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
    let log = AuditTable::new().await;
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
        // As `kubectl get als -o yaml` prints them.
        (
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: auditlog.dev/v1alpha1, kind: AuditLogSweeper}\n"
                .to_owned()
                + "- {apiVersion: auditlog.dev/v1alpha1, kind: AuditLogSweeper}\n",
            "holds 2 AuditLogSweepers",
        ),
        (sweeper(", limit: 1, limit: 2") + &secret, "a key stands there for the second time"),
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

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[tokio::test]
async fn a_check_of_what_is_ready_exits_with_0_and_says_what_it_saw() {
    let log = AuditTable::new().await;
    log.start(1, "2 h").await;
    let file = sweeper("") + &secret(&log.database.uri());
    let output = run("check", &file, &[], &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    let text = stdout(&output);
    let owner = &log.database.user;
    for line in [
        &format!("ok       table         \"public\".\"audit_log\", owned by {owner}\n"),
        "ok       index         (\"time_started\", \"id\") WHERE pg_catalog.num_nulls(\"time_completed\") = 1\n",
        "; the application's completions use \"audit_log_pkey\"\n",
        "\n-- ready: 0 errors, 0 warnings\n-- the first sweep takes 1 row; the oldest started 20",
    ] {
        assert!(text.contains(line), "{line}{text}");
    }
    let output = run("check", &file, &["--output", "json"], &[]);
    let mut report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let version = log.query("SHOW server_version").await;
    assert!(report["firstSweep"].as_object_mut().unwrap().remove("oldestTimeStarted").unwrap().is_string());
    let first = json!({ "remaining": 1, "atLeast": false, "display": "1" });
    assert_eq!(
        report,
        json!({ "ready": true, "server": { "version": version[0] }, "findings": [], "firstSweep": first })
    );
    assert_eq!((output.status.code(), log.open().await), (Some(0), vec![1]));
    log.complete(1).await;
    let none = stdout(&run("check", &file, &[], &[]));
    assert!(none.contains("\n-- the first sweep takes no row: none is stale\n"), "{none}");
    log.run("DELETE FROM audit_log").await;
    log.start_many(4).await;
    let more = stdout(&run("check", &(sweeper(", limit: 3") + &secret(&log.database.uri())), &[], &[]));
    assert!(more.contains("\n-- the first sweep takes 3 rows, and more are stale; the oldest started "), "{more}");
    assert!(more.contains(". That cannot be undone\n"), "{more}");
    let observed = stdout(&run("check", &(sweeper(", mode: Observe") + &secret(&log.database.uri())), &[], &[]));
    let first = "\n-- mode: Observe changes nothing; with Apply, the first sweep takes 4 rows; the oldest started ";
    assert!(observed.contains(first) && !observed.contains("undone"), "{observed}");
}

#[tokio::test]
async fn a_check_of_what_is_not_ready_exits_with_1_and_prints_what_mends_it() {
    let log = AuditTable::new().await;
    log.run(
        "DROP INDEX audit_log_open_by_time_started; ALTER TYPE audit_log_result_kind RENAME VALUE 'timeout' TO 'late'",
    )
    .await;
    let file = sweeper("") + &secret(&log.database.uri());
    let output = run("check", &file, &["--output", "json"], &[]);
    assert_eq!(output.status.code(), Some(1));
    let mut report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for finding in report["findings"].as_array_mut().unwrap() {
        assert!(finding["message"].as_str().unwrap().len() > 20);
        finding["message"] = json!("");
    }
    let (owner, create) = (
        &log.database.user,
        "CREATE INDEX CONCURRENTLY IF NOT EXISTS \"audit_log_open_by_time_started\" ON \"public\".\"audit_log\" \
         (\"time_started\", \"id\") WHERE pg_catalog.num_nulls(\"time_completed\") = 1",
    );
    let fix = |sql: &str| json!({ "steps": [{ "role": owner, "runAs": owner, "sql": [sql] }] });
    let label = "ALTER TYPE \"public\".\"audit_log_result_kind\" ADD VALUE IF NOT EXISTS 'timeout'";
    assert_eq!(
        (&report["ready"], &report["findings"]),
        (
            &json!(false),
            &json!([
                { "severity": "error", "blocksSweep": true, "reason": "SchemaMismatch", "message": "", "fix": fix(label) },
                { "severity": "error", "blocksSweep": false, "reason": "IndexMissing", "message": "", "fix": fix(create) },
            ])
        )
    );
    // What follows the verdict runs as it stands, for those who paste it.
    let text = stdout(&run("check", &file, &[], &[]));
    let (lines, sql) = text.split_once("\n-- not ready: 2 errors, 0 warnings\n").unwrap_or_else(|| panic!("{text}"));
    assert!(lines.contains("\nerror    index         no valid index on"), "{text}");
    assert!(lines.ends_with("-        statement     not looked at\n"), "{text}");
    assert!(sql.contains(&format!("-- IndexMissing (index): as {owner}\nCREATE INDEX")), "{text}");
    for statement in sql.split_inclusive(";\n") {
        log.run(statement).await;
    }
    let output = run("check", &file, &[], &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    // A field rather than SQL; and a warning is no error.
    log.run("ALTER TABLE audit_log ADD CHECK (request_id <> '') NOT VALID").await;
    let text = stdout(&run("check", &(sweeper(", table: Audit_Log") + &secret(&log.database.uri())), &[], &[]));
    assert!(text.contains("\n-- TableNotFound (table): change spec.table\n"), "{text}");
    let output = run("check", &file, &[], &[]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).contains("\n-- ready: 0 errors, 1 warning\n"), "{}", stdout(&output));
}

#[tokio::test]
async fn a_check_without_a_connection_exits_with_1_and_on_bad_input_with_2() {
    let file = sweeper("") + &secret("postgresql://u:hunter2@127.0.0.1:1/d");
    let output = run("check", &file, &["--output", "json"], &[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let finding = &report["findings"][0];
    assert_eq!((&report["ready"], &report["server"]), (&json!(false), &Value::Null));
    assert_eq!(
        (&finding["reason"], &finding["fix"]),
        (&json!("DatabaseUnreachable"), &json!({ "field": "spec.database.secretRef" }))
    );
    let text = run("check", &file, &[], &[]);
    assert!(
        stdout(&text).contains("\n-        the rest      not looked at\n\n-- not ready: 1 error,"),
        "{}",
        stdout(&text)
    );
    assert!(stdout(&text).starts_with("error    connection    cannot connect to 127.0.0.1"), "{}", stdout(&text));
    assert!(!format!("{}{}{report}", stdout(&text), stderr(&text)).contains("hunter2"));
    let bad = run("check", &sweeper(", limit: 0"), &[], &[]);
    assert_eq!((bad.status.code(), stdout(&bad).as_str()), (Some(2), ""));
    assert!(stderr(&bad).contains("spec.limit"), "{}", stderr(&bad));
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
