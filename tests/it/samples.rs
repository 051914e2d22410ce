//! What users start from: every sample applies as it stands and is swept, and the SQL does what it says, as often as it is run.

use std::fs;
use std::path::Path;

use audit_log_sweeper::api::{crd, manifest};
use serde_json::Value;
use support::postgres::{self, PostgresServer};
use support::process::{Process, Program, output};
use support::random_hex;
use support::scratch::Scratch;

use crate::fixtures::operator::{RELEASE, conditions};
use crate::fixtures::{AuditTable, Operator, id};

/// The URI in the samples.
const PLACEHOLDER: &str = "postgresql://app_sweeper:change-me@app-postgres.default.svc:5432/app";

fn manifests(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests").join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A namespace with an operator that trusts the database's CA, and an audit log with three stale rows, 1 to 3, and a fresh
/// one, 9, which a login with the rights of role.sql may sweep.
struct Place {
    operator: Operator,
    server: &'static PostgresServer,
    log: AuditTable,
    uri: String,
    _process: Process,
    scratch: Scratch,
}

impl Place {
    async fn new() -> Self {
        let (operator, log) = (Operator::absent().await, AuditTable::new().await);
        log.start_many(3).await;
        log.start(9, "10 min").await;
        let server = tokio::task::spawn_blocking(postgres::shared).await.unwrap();
        let admin = server.connect(&log.database.name).await.unwrap();
        admin.batch_execute(&manifests("sql/role.sql")).await.unwrap();
        let (login, password) = (format!("sweeper_{}", &random_hex()[..10]), random_hex());
        let create = format!("CREATE ROLE {login} LOGIN PASSWORD '{password}' IN ROLE audit_log_sweeper");
        admin.batch_execute(&create).await.unwrap();
        let uri = format!("postgresql://{login}:{password}@127.0.0.1:{}/{}", log.database.port, log.database.name);

        let scratch = Scratch::new(None).unwrap();
        let ca = scratch.write("ca.crt", server.ca_pem(), None).unwrap();
        let token = operator.plane.service_account_token(RELEASE.0, RELEASE.1).await.unwrap();
        let program = Program::new("operator", env!("CARGO_BIN_EXE_audit-log-sweeper"))
            .arg("run")
            .arg(format!("--namespace={}", operator.namespace))
            .arg(format!("--lease-name={}", RELEASE.1))
            .arg("--health-address=127.0.0.1:0")
            .env("KUBECONFIG", operator.plane.kubeconfig_for(&token, &operator.namespace).unwrap())
            .env("SSL_CERT_FILE", ca);
        let process = program.start(&scratch).unwrap();
        Self { operator, server, log, uri, _process: process, scratch }
    }

    /// The URI's host, port, database, user and password.
    fn fields(&self) -> [&str; 5] {
        let (login, address) = self.uri.trim_start_matches("postgresql://").split_once('@').unwrap();
        let (user, password) = login.split_once(':').unwrap();
        let (server, database) = address.split_once('/').unwrap();
        let (host, port) = server.split_once(':').unwrap();
        [host, port, database, user, password]
    }

    /// Runs SQL as the administrator.
    async fn administrate(&self, sql: &str) {
        self.server.connect(&self.log.database.name).await.unwrap().batch_execute(sql).await.unwrap();
    }

    /// Applies a sample: as it stands in a dry run, and then with this database in it.
    fn apply(&self, sample: &str) {
        self.apply_with(sample, &[(PLACEHOLDER, &self.uri)]);
    }

    /// The same with other replacements. A kind of another operator, which the test's API server does not know, is left out.
    fn apply_with(&self, sample: &str, replaced: &[(&str, &str)]) {
        let text = manifests(sample);
        manifest::read(&text).unwrap_or_else(|error| panic!("{sample}: {error}"));
        let apply = |text: &str, how: &[&str]| {
            let file = self.scratch.write(sample, text, None).unwrap();
            let mut kubectl = self.operator.kubectl();
            let answer = kubectl.args(["apply", "--server-side", "-f"]).arg(file).args(how).output().unwrap();
            let said = String::from_utf8_lossy(&answer.stderr);
            assert!(answer.status.success() && said.is_empty(), "{sample}: {said}");
        };
        let known: Vec<&str> = text.split("\n---\n").filter(|part| !part.contains("kind: ExternalSecret")).collect();
        let text = known.join("\n---\n");
        apply(&text, &["--dry-run=server"]);
        let replace = |text: String, (placeholder, real): &(&str, &str)| {
            assert!(*placeholder == PLACEHOLDER || text.contains(placeholder), "{sample} lacks {placeholder}");
            text.replace(placeholder, real)
        };
        apply(&replaced.iter().fold(text, replace), &[]);
    }

    /// Waits for the sweep and sees that it did its work: Ready's reason, and the rows that timed out.
    async fn swept(&self, name: &str, reason: &str, rows: &[u32]) -> Value {
        let status = self.operator.until(name, "a sweep", |status| !status["lastSweep"].is_null()).await;
        assert_eq!(conditions(&status)[0], format!("Ready=True/{reason}"), "{status:#}");
        assert_eq!(self.log.timed_out().await, rows);
        status
    }
}

#[tokio::test]
async fn the_least_is_swept() {
    let place = Place::new().await;
    assert!(manifests("sample.yaml").contains(PLACEHOLDER));
    place.apply("sample.yaml");
    place.swept("app", "Swept", &[1, 2, 3]).await;
}

#[tokio::test]
async fn the_full_one_is_swept_and_leaves_no_field_out() {
    let place = Place::new().await;
    place.operator.secret("app-db", &[("uri", &place.uri)]).await;
    place.operator.secret("app-postgres-ca", &[("ca.crt", &place.server.ca_pem())]).await;
    place.apply("sample-full.yaml");
    place.swept("app", "Swept", &[1, 2, 3]).await;

    let crd = crd::json().unwrap();
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let text = manifests("sample-full.yaml");
    let fields = fields(spec);
    assert!(fields.len() > 20, "{fields:?}");
    for field in fields {
        assert!(text.contains(&format!("{field}: ")) || text.contains(&format!("{field}:\n")), "{field} is left out");
    }
}

/// The names of all fields in a schema.
fn fields(schema: &Value) -> Vec<String> {
    let mut names = vec![];
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        names.push(name.clone());
        names.extend(fields(inner));
    }
    if schema["items"].is_object() {
        names.extend(fields(&schema["items"]));
    }
    names
}

#[tokio::test]
async fn the_one_for_omicron_sets_all_four_columns() {
    let place = Place::new().await;
    let text = manifests("sample-omicron.yaml");
    let grant = text.lines().find_map(|line| line.strip_prefix("#     GRANT")).expect("a GRANT in the sample");
    place.administrate(&format!("GRANT{grant}")).await;
    // Its own constraints keep details out of open rows. Without them it shows that they are cleared.
    place.log.run("ALTER TABLE audit_log DROP CONSTRAINT audit_log_result_has_its_details").await;
    let details = format!("http_status_code = 500, error_code = 'e', error_message = 'm' WHERE id = '{}'", id(2));
    place.log.run(&format!("UPDATE audit_log SET {details}")).await;
    place.operator.secret("app-db", &[("uri", &place.uri)]).await;
    place.apply("sample-omicron.yaml");
    place.swept("omicron", "Swept", &[1, 2, 3]).await;
    let rows =
        "SELECT result_kind, http_status_code, error_code, error_message FROM audit_log WHERE result_kind IS NOT NULL";
    assert_eq!(place.log.query(rows).await, ["timeout|NULL|NULL|NULL"; 3]);
}

#[tokio::test]
async fn the_one_for_cloudnative_pg_takes_its_secrets_as_they_are() {
    let place = Place::new().await;
    let nowhere = place.uri.replace("127.0.0.1", "app-pg-rw");
    let plain = ["host", "port", "dbname", "user", "username", "password", "pgpass", "jdbc-uri", "fqdn-jdbc-uri"];
    let mut data = vec![("fqdn-uri", place.uri.as_str()), ("uri", nowhere.as_str())];
    // Not looked at, or the sweep would not find the database.
    data.extend(plain.map(|key| (key, "app-pg-rw")));
    place.operator.secret("app-pg-app", &data).await;
    place.operator.secret("app-pg-ca", &[("ca.crt", &place.server.ca_pem())]).await;
    place.apply("sample-cloudnative-pg.yaml");
    place.swept("app-pg", "Swept", &[1, 2, 3]).await;
}

#[tokio::test]
async fn the_one_for_crunchy_takes_its_secrets_as_they_are() {
    let place = Place::new().await;
    let others = ["jdbc-uri", "verifier", "pgbouncer-uri", "pgbouncer-host", "pgbouncer-port", "pgbouncer-jdbc-uri"];
    let [host, port, database, user, password] = place.fields();
    let keys = [("host", host), ("port", port), ("dbname", database), ("user", user), ("password", password)];
    // Once with its uri, once with the keys that it is made of.
    for uri in [Some(("uri", place.uri.as_str())), None] {
        place.log.run("UPDATE audit_log SET time_completed = NULL, result_kind = NULL").await;
        place.operator.kubectl().args(["delete", "als,secrets", "--all"]).output().unwrap();
        let mut data: Vec<(&str, &str)> = others.map(|key| (key, "nowhere")).to_vec();
        match uri {
            Some(uri) => data.extend(keys.map(|(key, _)| (key, "nowhere")).into_iter().chain([uri])),
            None => data.extend(keys),
        }
        place.operator.secret("hippo-pguser-app", &data).await;
        place.operator.secret("hippo-cluster-cert", &[("ca.crt", &place.server.ca_pem())]).await;
        place.apply("sample-crunchy.yaml");
        place.swept("hippo", "Swept", &[1, 2, 3]).await;
    }
}

#[tokio::test]
async fn the_one_that_observes_counts_and_changes_nothing() {
    let place = Place::new().await;
    let before = place.log.rows().await;
    place.operator.secret("app-db", &[("uri", &place.uri)]).await;
    place.apply("sample-observe.yaml");
    let status = place.swept("app", "Observed", &[]).await;
    assert_eq!(status["backlog"]["display"], "3");
    assert_eq!(place.log.rows().await, before);

    // And then for real, as its comment says.
    let text = manifests("sample-observe.yaml");
    let patch = text.lines().find_map(|line| line.strip_prefix("#     kubectl ")).expect("a command in the sample");
    output(place.operator.kubectl().args(patch.replace('\'', "").split(' '))).unwrap();
    // Which a sweep of the new period shows.
    output(place.operator.kubectl().args(["patch", "als", "app", "--type=merge", "-p", r#"{"spec":{"period":"5s"}}"#]))
        .unwrap();
    place
        .operator
        .until("app", "a sweep that changes rows", |status| status["lastSweep"]["outcome"] == "Drained")
        .await;
    assert_eq!(place.log.timed_out().await, [1, 2, 3]);
}

#[tokio::test]
async fn those_for_frameworks_fit_the_tables_that_these_make() {
    let frameworks = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/frameworks");
    for (framework, table, row) in [
        (
            "rails",
            "audit_logs",
            "(started_at, actor, action, created_at, updated_at) VALUES (now() - interval '5 h', 'a', 'a', now(), now())",
        ),
        (
            "prisma",
            "\"AuditLog\"",
            "(\"startedAt\", actor, action, \"updatedAt\") VALUES (now() - interval '5 h', 'a', 'a', now())",
        ),
        (
            "django",
            "app_auditlog",
            "(time_started, actor, action, details) VALUES (now() - interval '5 h', 'a', 'a', '{}')",
        ),
    ] {
        let place = Place::new().await;
        let ddl = fs::read_to_string(frameworks.join(format!("{framework}.sql"))).unwrap();
        place.log.run(&format!("SET TimeZone = UTC; {ddl}; INSERT INTO {table} {row}")).await;
        // What the sample says to run.
        let text = manifests(&format!("sample-{framework}.yaml"));
        let statements: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("#     ")).collect();
        assert_eq!(statements.len(), 2, "{framework}");
        for sql in statements {
            place.log.run(&sql.replace("app_sweeper", "audit_log_sweeper")).await;
        }
        place.operator.secret("app-db", &[("uri", &place.uri)]).await;
        place.apply(&format!("sample-{framework}.yaml"));
        let status = place.operator.until("app", "a sweep", |status| !status["lastSweep"].is_null()).await;
        assert_eq!(
            (&status["lastSweep"]["timedOut"], &conditions(&status)[0]),
            (&Value::from(1), &"Ready=True/Swept".to_owned()),
            "{status:#}"
        );
        let schema = conditions(&status).into_iter().find(|one| one.starts_with("SchemaReady"));
        assert_eq!(schema.as_deref(), Some("SchemaReady=True/SchemaReady"), "{framework}: {status:#}");
    }
}

#[tokio::test]
async fn those_for_clouds_and_poolers_are_swept_once_the_database_is_named() {
    for (sample, cloud) in [
        ("cloud-sql", "postgresql://app_sweeper:change-me@127.0.0.1:5432/app"),
        ("pgbouncer", "postgresql://app_sweeper:change-me@app-pgbouncer.default.svc:6432/app"),
    ] {
        let place = Place::new().await;
        place.apply_with(&format!("sample-{sample}.yaml"), &[(cloud, &place.uri)]);
        place.swept("app", "Swept", &[1, 2, 3]).await;
    }

    let place = Place::new().await;
    place.operator.secret("rds-ca", &[("ca.crt", &place.server.ca_pem())]).await;
    let [host, port, name, login, password] = place.fields();
    let replaced = [
        ("app.cluster-example.eu-central-1.rds.amazonaws.com", host),
        ("5432", port),
        ("dbname: app", &format!("dbname: {name}")),
        ("app_sweeper", login),
        ("change-me", password),
    ];
    place.apply_with("sample-rds.yaml", &replaced);
    place.swept("app", "Swept", &[1, 2, 3]).await;

    // With the Secret that the External Secrets operator makes.
    let place = Place::new().await;
    place.operator.secret("app-postgres-ca", &[("ca.crt", &place.server.ca_pem())]).await;
    let keys = ["host", "port", "dbname", "username", "password"];
    let keys: Vec<_> = keys.into_iter().zip(place.fields()).collect();
    place.operator.secret("app-db", &keys).await;
    place.apply_with("sample-external-secrets.yaml", &[]);
    place.swept("app", "Swept", &[1, 2, 3]).await;
}

#[tokio::test]
async fn every_sample_is_one_of_those() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests");
    let mut files: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("sample"))
        .collect();
    files.sort();
    let tested = [
        "sample-cloud-sql.yaml",
        "sample-cloudnative-pg.yaml",
        "sample-crunchy.yaml",
        "sample-django.yaml",
        "sample-external-secrets.yaml",
        "sample-full.yaml",
        "sample-observe.yaml",
        "sample-omicron.yaml",
        "sample-pgbouncer.yaml",
        "sample-prisma.yaml",
        "sample-rails.yaml",
        "sample-rds.yaml",
        "sample.yaml",
    ];
    assert_eq!(files, tested);
}

#[tokio::test]
async fn the_sql_can_be_run_again_and_says_what_is_missing() {
    let log = AuditTable::empty().await;
    let server = tokio::task::spawn_blocking(postgres::shared).await.unwrap();
    let admin = server.connect(&log.database.name).await.unwrap();
    let verify = async || -> Vec<(String, String)> {
        let rows = log.query(&manifests("sql/verify.sql")).await;
        let pairs = rows.iter().map(|row| row.split('|').collect::<Vec<_>>());
        pairs.map(|row| (row[0].to_owned(), row[1].to_owned())).collect()
    };
    let missing = async || -> Vec<String> {
        verify().await.into_iter().filter(|(_, found)| found != "t").map(|(wanted, _)| wanted).collect()
    };
    let absent = missing().await;
    assert!(absent.contains(&"the table".to_owned()) && absent.len() >= 5, "{absent:?}");

    for _ in 0..2 {
        for file in ["sql/table.sql", "sql/index.sql"] {
            log.run(&manifests(file)).await;
        }
        admin.batch_execute(&manifests("sql/role.sql")).await.unwrap();
    }
    assert_eq!(missing().await, Vec::<String>::new());

    let index = "a valid index of the open rows by time and key";
    let invalid =
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'audit_log_open_by_time_started'::regclass";
    admin.batch_execute(invalid).await.unwrap();
    assert_eq!(missing().await, [index]);
    // As its comment says.
    log.run("DROP INDEX CONCURRENTLY audit_log_open_by_time_started").await;
    log.run("CREATE INDEX wrong ON audit_log (time_started) WHERE num_nulls(time_completed) = 1").await;
    assert_eq!(missing().await, [index]);
    log.run(&manifests("sql/index.sql")).await;
    assert_eq!(missing().await, Vec::<String>::new());

    for (sql, wanted) in [
        ("REVOKE SELECT (id) ON audit_log FROM audit_log_sweeper", "its right to read the key and the times"),
        ("REVOKE UPDATE (result_kind) ON audit_log FROM audit_log_sweeper", "its right to complete a row"),
        ("GRANT DELETE ON audit_log TO audit_log_sweeper", "no right to more than that"),
        ("GRANT SELECT (request_uri) ON audit_log TO audit_log_sweeper", "no right to more than that"),
    ] {
        admin.batch_execute(sql).await.unwrap();
        assert_eq!(missing().await, [wanted], "{sql}");
        admin.batch_execute("REVOKE ALL ON audit_log FROM audit_log_sweeper").await.unwrap();
        admin.batch_execute(&manifests("sql/role.sql")).await.unwrap();
    }
}

#[tokio::test]
async fn the_batch_for_those_without_the_operator_takes_what_a_sweep_takes() {
    let log = AuditTable::new().await;
    log.start_many(1003).await;
    log.start(2000, "3 h").await;
    assert_eq!(log.complete(7).await, 1);
    let mut application = log.database.client().await.unwrap();
    let transaction = application.transaction().await.unwrap();
    transaction.execute("UPDATE audit_log SET user_agent = 'x' WHERE request_id <> '' AND id = (SELECT min(id::text) FROM audit_log)::uuid", &[]).await.unwrap();

    // The oldest 1000, but for the one that is complete and the one that somebody writes.
    log.run(&manifests("sql/sweep.sql")).await;
    let expected: Vec<u32> = (2..=1002).filter(|number| *number != 7).collect();
    assert_eq!(log.timed_out().await, expected);
    transaction.commit().await.unwrap();
    log.run(&manifests("sql/sweep.sql")).await;
    assert_eq!((log.open().await, log.with_kind("success").await), (vec![2000], vec![7]));
}
