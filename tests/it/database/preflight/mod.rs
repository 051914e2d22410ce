//! The preflight: every fault that it knows is made for real, found, fixed by the SQL that was printed, and is gone.

mod fields;
mod frameworks;
mod indexes;
mod owners;
mod shadows;
mod sql;
mod values;
mod whole;

use audit_log_sweeper::api::Reason;
use audit_log_sweeper::preflight::{self, Fix, PreflightReport, RunAs, Severity, Subject};
use audit_log_sweeper::sweep::{Job, sweep};
use serde_json::{Value, json};
use support::leaks::{self, MARKER};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use crate::fixtures::{AuditTable, id};

/// A table as a sweep needs it.
const TABLE: &str = "CREATE TABLE audit_log (id uuid PRIMARY KEY, time_started timestamptz NOT NULL, \
    time_completed timestamptz, result_kind text, note text)";

/// The same, by day.
const PARTITIONED: &str = "CREATE TABLE audit_log (id uuid, time_started timestamptz, time_completed timestamptz, \
    result_kind text, note text, PRIMARY KEY (id, time_started)) PARTITION BY RANGE (time_started); \
    CREATE TABLE p1 PARTITION OF audit_log FOR VALUES FROM (MINVALUE) TO ('2020-01-01'); \
    CREATE TABLE p2 PARTITION OF audit_log FOR VALUES FROM ('2020-01-01') TO ('2021-01-01') PARTITION BY RANGE (time_started); \
    CREATE TABLE p2a PARTITION OF p2 FOR VALUES FROM ('2020-01-01') TO ('2020-06-01'); \
    CREATE TABLE p2b PARTITION OF p2 FOR VALUES FROM ('2020-06-01') TO ('2021-01-01')";

const INDEX: &str = "CREATE INDEX sweep_index ON audit_log (time_started, id) WHERE num_nulls(time_completed) = 1";

/// An audit log, and a login that may do with it what a sweep does and nothing else.
struct Stage {
    log: AuditTable,
    admin: Client,
    /// The login, quoted.
    login: String,
    uri: String,
}

impl Stage {
    /// With what this SQL makes; the login has its rights.
    async fn new(sql: &str) -> Self {
        let log = AuditTable::empty().await;
        log.run(sql).await;
        let stage = Self::bare(log).await;
        let login = &stage.login;
        stage
            .log
            .run(&format!(
                "GRANT USAGE ON SCHEMA public TO {login}; GRANT SELECT (id, time_started, time_completed), \
                 UPDATE (time_completed, result_kind) ON audit_log TO {login}"
            ))
            .await;
        stage
    }

    /// With a login that has no rights yet.
    async fn bare(log: AuditTable) -> Self {
        let admin = support::postgres::shared().connect(&log.database.name).await.unwrap();
        let name = format!("{}_may_sweep", log.database.user);
        admin.batch_execute(&format!("CREATE ROLE {name} LOGIN PASSWORD '{MARKER}'")).await.unwrap();
        let uri = format!("postgresql://{name}:{MARKER}@127.0.0.1:{}/{}", log.database.port, log.database.name);
        Self { log, admin, login: name, uri }
    }

    fn job(&self, spec: Value) -> Job {
        self.log.job_at(&self.uri, spec)
    }

    async fn check(&self, spec: &Value) -> PreflightReport {
        let Job { plan, target, .. } = self.job(spec.clone());
        let checked = preflight::check(&plan, &target).await.unwrap();
        leaks::keep(&format!("{checked:?}"));
        checked
    }

    /// Runs SQL of a fix as whom it says, statement by statement. What is in its way must be gone.
    async fn fix(&self, fix: &Fix) {
        let Fix::Sql(parts) = fix else { panic!("not SQL: {fix:?}") };
        for part in parts {
            let run = async |client: &Client| {
                for sql in &part.statements {
                    client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{error:?} in {sql} of {parts:?}"));
                }
            };
            // As nobody but the role that is named: neither what the owner has nor a superuser's rights help.
            let role = match &part.run_as {
                RunAs::Superuser => {
                    run(&self.admin).await;
                    continue;
                }
                RunAs::Owner(role) if *role == self.log.database.user => {
                    run(&self.log.client).await;
                    continue;
                }
                RunAs::Owner(role) | RunAs::SchemaOwner(role) => role.clone(),
                RunAs::Owners(roles) => {
                    let member = format!("{}_member_of_all", self.log.database.user);
                    let roles = roles.iter().map(|role| quoted(role)).collect::<Vec<_>>().join(", ");
                    let create = format!("DROP ROLE IF EXISTS {member}; CREATE ROLE {member} IN ROLE {roles}");
                    self.admin.batch_execute(&create).await.unwrap();
                    member
                }
            };
            let other = support::postgres::shared().connect(&self.log.database.name).await.unwrap();
            other.batch_execute(&format!("SET ROLE {}", quoted(&role))).await.unwrap();
            run(&other).await;
        }
    }

    /// A stale row with this key comes, and a sweep by the login completes it.
    async fn sweeps(&self, key: &str, spec: &Value) -> Result<(), String> {
        self.log.run(&format!("INSERT INTO audit_log (id, time_started) VALUES ('{key}', '2020-02-02')")).await;
        let report = sweep(&self.job(spec.clone()), &CancellationToken::new()).await;
        let left = self.log.query("SELECT id FROM audit_log WHERE time_completed IS NULL").await;
        if report.timed_out == 1 && left.is_empty() { Ok(()) } else { Err(format!("{report:?}, left: {left:?}")) }
    }
}

/// A name as SQL.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A fault, and what is to be said of it.
struct Fault {
    table: String,
    /// Made by the owner, statement by statement, after the table passed.
    sql: Vec<String>,
    by_superuser: bool,
    spec: Value,
    expected: (Subject, Severity, Reason),
    /// In the message.
    says: &'static str,
    keys: [String; 2],
}

/// A fault that this SQL makes.
fn fault(sql: &[&str], expected: (Subject, Severity, Reason), says: &'static str) -> Fault {
    Fault {
        table: format!("{TABLE}; {INDEX}"),
        sql: sql.iter().map(|&sql| sql.to_owned()).collect(),
        by_superuser: false,
        spec: json!({}),
        expected,
        says,
        keys: [id(1), id(2)],
    }
}

impl Fault {
    /// On another table; one that has the fault from the start if no SQL makes it.
    fn on(self, table: &str) -> Self {
        Self { table: table.into(), ..self }
    }

    fn by_superuser(self) -> Self {
        Self { by_superuser: true, ..self }
    }

    /// Passes; with the fault, exactly that is found; fixed as printed, passes again and can be swept.
    async fn found_and_mended(self) {
        let what = self.sql.join("; ") + &self.table;
        let stage = Stage::new(&self.table).await;
        if !self.sql.is_empty() {
            let healthy = stage.check(&self.spec).await;
            assert!(healthy.findings.is_empty(), "{what}: {healthy:#?}");
        }
        for sql in &self.sql {
            let sql = sql.replace("LOGIN", &stage.login).replace("TABLE_OWNER", &stage.log.database.user);
            let client = if self.by_superuser { &stage.admin } else { &stage.log.client };
            client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{error:?} in {sql}"));
        }
        let checked = stage.check(&self.spec).await;
        let [found] = checked.findings.as_slice() else { panic!("{what}: {checked:#?}") };
        assert_eq!((found.subject, found.severity, found.reason), self.expected, "{what}: {found:#?}");
        assert!(found.message.contains(self.says), "{}: {}", self.says, found.message);
        assert_eq!(checked.ready(), found.severity == Severity::Warning);
        assert_eq!(checked.blocking().is_some(), found.severity == Severity::Blocking);
        // What does not block does not keep a sweep from its work.
        if found.severity != Severity::Blocking {
            stage.sweeps(&self.keys[0], &self.spec).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        stage.fix(found.fix.as_ref().unwrap()).await;
        let fixed = stage.check(&self.spec).await;
        assert!(fixed.findings.is_empty(), "{what}: {found:#?} {fixed:#?}");
        stage.sweeps(&self.keys[1], &self.spec).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

async fn all_found_and_mended(faults: impl IntoIterator<Item = Fault>) {
    for fault in faults {
        fault.found_and_mended().await;
    }
}
