//! Values that the server plans without a word and then refuses for every row.

use audit_log_sweeper::api::Reason::{RowRefused, SchemaMismatch};
use audit_log_sweeper::preflight::Severity::{Blocking, Warning};
use audit_log_sweeper::preflight::{Fix, Subject};
use serde_json::{Value, json};

use super::{INDEX, PARTITIONED, Stage, TABLE};
use crate::fixtures::id;

fn column(type_: &str) -> String {
    format!("{}; {INDEX}", TABLE.replace("result_kind text", &format!("result_kind {type_}")))
}

fn value(value: &str) -> Value {
    json!({ "complete": [{ "column": "result_kind", "value": value }] })
}

#[tokio::test]
async fn a_value_that_a_check_or_a_domain_refuses_blocks() {
    let null = json!({ "complete": [{ "column": "result_kind", "setNull": true }] });
    let (domain, not_null) = (
        format!("CREATE DOMAIN kind AS text CHECK (VALUE IN ('success', 'error')); {}", column("kind")),
        format!("CREATE DOMAIN kind AS text NOT NULL DEFAULT ''; {}", column("kind")),
    );
    let list = "CHECK (result_kind IN ('success', 'error'))";
    let whole = format!(
        "{PARTITIONED}; {INDEX}; ALTER TABLE audit_log ADD CONSTRAINT known {list} NOT VALID; \
                         ALTER TABLE audit_log VALIDATE CONSTRAINT known"
    );
    let part = format!("{PARTITIONED}; {INDEX}; ALTER TABLE p2a ADD CONSTRAINT known {list}");
    let bad = value("timeout");
    let cases = [
        (
            column(&format!("text CONSTRAINT known {list}")),
            &bad,
            value("error"),
            "\"known\" on \"public\".\"audit_log\" refuses",
        ),
        (column(&format!("varchar(20) {list}")), &bad, value("error"), "refuses what a sweep sets"),
        (whole, &bad, value("error"), "\"known\" on \"public\".\"audit_log\" refuses"),
        (part, &bad, value("error"), "\"known\" on \"public\".\"p2a\" refuses"),
        (column("text CHECK ((result_kind IS NULL) = (time_completed IS NULL))"), &null, bad.clone(), "refuses what"),
        (domain, &bad, value("error"), "(of type public.kind) cannot hold what spec.complete[0].value sets"),
        (not_null, &null, value("x"), "\"result_kind\" is NOT NULL, and spec.complete[0] sets it to NULL"),
        (column("text CHECK (result_kind::int > 0)"), &bad, value("7"), "(SQLSTATE 22P02)"),
    ];
    for (table, spec, fixed, says) in cases {
        let stage = Stage::new(&table).await;
        let checked = stage.check(spec).await;
        let [found] = checked.findings.as_slice() else { panic!("{table}: {checked:#?}") };
        assert_eq!((found.subject, found.severity, found.reason), (Subject::Complete, Blocking, SchemaMismatch));
        assert!(found.message.contains(says), "{table}: {}", found.message);
        assert!(checked.passed.iter().all(|(subject, _)| *subject != Subject::Complete), "{checked:#?}");
        let part = if spec == &null { "setNull" } else { "value" };
        assert_eq!(found.fix, Some(Fix::Field(format!("spec.complete[0].{part}"))), "{table}");
        let after = stage.check(&fixed).await;
        assert!(after.findings.is_empty(), "{table}: {after:#?}");
        stage.sweeps(&id(1), &fixed).await.unwrap();
        // What was found is so: the same row would have been refused.
        stage.log.run("DELETE FROM audit_log").await;
        stage.sweeps(&id(2), spec).await.unwrap_err();
    }
}

#[tokio::test]
async fn what_passes_in_the_column_is_not_refused_by_the_check() {
    let collation = "CREATE COLLATION blind (provider = icu, locale = 'und-u-ks-level2', deterministic = false)";
    for table in [
        format!("{collation}; {}", column("text COLLATE blind CHECK (result_kind = 'TIMEOUT')")),
        column("text CHECK (result_kind <> NULL)"),
        column("char(9) CHECK (result_kind = 'timeout')"),
        // Only the time of the row tells.
        column("text, CHECK (time_completed >= time_started)"),
    ] {
        let stage = Stage::new(&table).await;
        let checked = stage.check(&json!({})).await;
        assert!(checked.findings.is_empty(), "{table}: {checked:#?}");
        stage.sweeps(&id(1), &json!({})).await.unwrap();
    }
}

#[tokio::test]
async fn what_only_rows_can_tell_is_a_warning() {
    let kinds = "CREATE TABLE kinds (k text PRIMARY KEY); INSERT INTO kinds VALUES ('timeout')";
    let secret = "CREATE FUNCTION known(text) RETURNS boolean LANGUAGE plpgsql AS \
                  $$ BEGIN RAISE EXCEPTION 'secret row'; END $$";
    for (table, says) in [
        (column("text CHECK (result_kind <> note)"), "which also reads what a sweep does not set, may refuse rows"),
        (format!("{kinds}; {}", column("text REFERENCES kinds")), "the foreign key \"audit_log_result_kind_fkey\""),
        (column("text UNIQUE"), "the unique index \"public\".\"audit_log_result_kind_key\" may refuse rows"),
        (format!("{secret}; {}", column("text CHECK (known(result_kind))")), "could not be tried (SQLSTATE P0001)"),
    ] {
        let stage = Stage::new(&table).await;
        let checked = stage.check(&json!({})).await;
        let [found] = checked.findings.as_slice() else { panic!("{table}: {checked:#?}") };
        assert_eq!((found.subject, found.severity, found.reason), (Subject::Complete, Warning, RowRefused));
        assert!(found.message.contains(says) && !found.message.contains("secret"), "{table}: {}", found.message);
        assert!(checked.ready() && found.fix.is_none());
    }
    // Each depends on the completion time alone.
    let generated = "text, passed int GENERATED ALWAYS AS (1 / (extract(epoch FROM (time_completed - time_completed)))::int) STORED";
    for (sql, says) in [
        (column("text, CONSTRAINT soon CHECK (time_completed < time_started + interval '1 day')"), "soon\" on"),
        (
            column("text, CHECK (time_completed IS NULL OR note = 'done')"),
            "which also reads what a sweep does not set, may refuse",
        ),
        (
            column("text, CONSTRAINT one EXCLUDE (time_completed WITH =)"),
            "the exclusion constraint \"public\".\"one\" may refuse",
        ),
        (
            column("text, UNIQUE (time_completed)"),
            "the unique index \"public\".\"audit_log_time_completed_key\" may refuse",
        ),
        (
            format!(
                "{}; CREATE UNIQUE INDEX by_day ON audit_log (date_trunc('day', time_completed AT TIME ZONE 'UTC'))",
                column("text")
            ),
            "the unique index \"public\".\"by_day\" may refuse",
        ),
        (
            format!(
                "{}; CREATE UNIQUE INDEX done ON audit_log (note) WHERE time_completed IS NOT NULL",
                column("text")
            ),
            "the unique index \"public\".\"done\" may refuse",
        ),
        (
            column(generated),
            "cannot compute the generated column \"passed\" for a row, so that it may refuse rows (SQLSTATE 22012)",
        ),
        // By way of a generated column, or of the row as a whole.
        (
            column(
                "text, done bool GENERATED ALWAYS AS (time_completed IS NOT NULL) STORED, CONSTRAINT noted CHECK (NOT done OR note = 'x')",
            ),
            "\"noted\" on",
        ),
        (
            column(
                "text, k int GENERATED ALWAYS AS (CASE coalesce(result_kind, 'open') WHEN 'open' THEN 0 WHEN 'success' THEN 1 END) STORED NOT NULL",
            ),
            "the generated column \"k\", which is NOT NULL, may refuse rows",
        ),
        (
            format!(
                "CREATE DOMAIN small AS int CHECK (VALUE < 2); {}",
                column("text, k small GENERATED ALWAYS AS (length(result_kind)) STORED")
            ),
            "cannot compute the generated column \"k\" for a row, so that it may refuse rows (SQLSTATE 23514)",
        ),
        (
            column("text, g text GENERATED ALWAYS AS (upper(result_kind)) STORED UNIQUE"),
            "the unique index \"public\".\"audit_log_g_key\" may refuse",
        ),
        (
            format!(
                "{}; CREATE FUNCTION ok(audit_log) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT $1.time_completed IS NULL'; \
                 ALTER TABLE audit_log ADD CONSTRAINT whole CHECK (ok(audit_log))",
                column("text")
            ),
            "\"whole\" on",
        ),
    ] {
        let stage = Stage::new(&sql).await;
        let checked = stage.check(&json!({})).await;
        let [found] = checked.findings.as_slice() else { panic!("{sql}: {checked:#?}") };
        assert_eq!((found.subject, found.severity, found.reason), (Subject::Complete, Warning, RowRefused), "{sql}");
        assert!(found.message.contains(says), "{sql}: {}", found.message);
    }
    // What the completion time decides by itself blocks, and what it cannot break says nothing.
    let never = Stage::new(&column("text, CONSTRAINT never CHECK (time_completed IS NULL)")).await;
    let blocked = never.check(&json!({})).await;
    let found = blocked.blocking().unwrap();
    assert!(
        found.message.contains("\"never\" on \"public\".\"audit_log\" refuses what a sweep sets"),
        "{}",
        found.message
    );
    assert_eq!(found.fix, Some(Fix::Field("spec.columns.timeCompleted".into())));
    for harmless in [
        column("text, took interval GENERATED ALWAYS AS (time_completed - time_started) STORED"),
        format!("{}; CREATE UNIQUE INDEX open ON audit_log (note) WHERE time_completed IS NULL", column("text")),
        column("text, UNIQUE (time_completed, id)"),
    ] {
        let stage = Stage::new(&harmless).await;
        assert!(stage.check(&json!({})).await.findings.is_empty(), "{harmless}");
        stage.sweeps(&id(1), &json!({})).await.unwrap();
    }
    // NULL refers to nothing and equals nothing, and a key that is in it stays unique.
    let null = json!({ "complete": [{ "column": "result_kind", "setNull": true }] });
    let stage = Stage::new(&format!("{kinds}; {}", column("text UNIQUE REFERENCES kinds"))).await;
    assert!(stage.check(&null).await.findings.is_empty());
    let stage = Stage::new(&column("text, UNIQUE (result_kind, id)")).await;
    assert!(stage.check(&json!({})).await.findings.is_empty());
}

#[tokio::test]
async fn what_a_trial_calls_leaves_nothing_behind() {
    let notify = "CREATE FUNCTION told(text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS \
                  $$ BEGIN PERFORM pg_notify('told', $1); RETURN true; END $$";
    let stage = Stage::new(&format!("{notify}; {}", column("text CHECK (told(result_kind))"))).await;
    let (client, mut connection) =
        tokio_postgres::connect(&stage.log.database.uri(), tokio_postgres::NoTls).await.unwrap();
    let (send, mut told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            if let tokio_postgres::AsyncMessage::Notification(notification) = message {
                send.send(notification.payload().to_owned()).unwrap();
            }
        }
    });
    client.batch_execute("LISTEN told").await.unwrap();
    assert!(stage.check(&json!({})).await.findings.is_empty());
    // The row tells as it is inserted and as it is swept; the trial before did not.
    stage.sweeps(&id(1), &json!({})).await.unwrap();
    client.batch_execute("NOTIFY told, 'last'").await.unwrap();
    let mut heard = vec![];
    while heard.last().is_none_or(|last| last != "last") {
        heard.push(told.recv().await.unwrap());
    }
    assert_eq!(heard, ["", "timeout", "last"]);
}
