//! The demo's audit log in PostgreSQL: made by the SQL that users run, filled, and looked at after the sweeps.

use super::screen::Screen;
use anyhow::Context;
use std::fs;
use support::build::root;
use support::postgres::PostgresServer;

pub const COMPLETED: i64 = 200_000;
pub const STALE: i64 = 2_500;
pub const RECENT: i64 = 5;

/// Every kind of row is told by its request.
const FILL: &str = "
    INSERT INTO audit_log (id, time_started, request_id, request_uri, operation_id, source_ip, user_agent, actor_id,
        actor_kind, time_completed, http_status_code, error_message, result_kind, auth_method, credential_id)
    SELECT gen_random_uuid(), started, KIND || n, '/v1/instances', 'instance_list', '192.0.2.7', 'demo', gen_random_uuid(),
        'user_builtin', COMPLETION, 'access_token', gen_random_uuid()
    FROM generate_series(1, COUNT) AS n, LATERAL (SELECT now() - (AGE) AS started) AS row";

/// The columns of the completion, of a row that has none.
const OPEN: &str = "NULL, NULL, NULL, NULL";

/// How the application completes a row: never one that is complete already.
const LATE: &str = "UPDATE audit_log SET time_completed = now(), result_kind = 'success', http_status_code = 200 WHERE id = $1 AND time_completed IS NULL";

/// What must never change, as one number each.
#[derive(PartialEq)]
pub struct Untouched {
    completed: String,
    recent: String,
}

pub struct Table<'server> {
    server: &'server PostgresServer,
}

impl<'server> Table<'server> {
    /// Makes and fills it. The password is for the login that the operator uses.
    pub async fn make(screen: &Screen, server: &'server PostgresServer, password: &str) -> anyhow::Result<Self> {
        server.create_database("app").await?;
        let client = server.connect("app").await?;
        for file in ["table.sql", "index.sql", "role.sql"] {
            let file = format!("manifests/sql/{file}");
            screen.command(&format!("psql app -f {file}"));
            let sql = fs::read_to_string(root().join(&file)).with_context(|| format!("{file} cannot be read"))?;
            client.batch_execute(&sql).await.with_context(|| format!("{file} failed"))?;
        }
        let login =
            |password: &str| format!("CREATE ROLE app_sweeper LOGIN PASSWORD '{password}' IN ROLE audit_log_sweeper");
        screen.command(&format!("psql app -c \"{}\"", login("...")));
        client.batch_execute(&login(password)).await?;

        let done = "started + interval '120 ms', 200 + n % 10 / 9 * 300, CASE n % 10 WHEN 9 THEN 'it broke' END,
            (CASE n % 10 WHEN 9 THEN 'error' ELSE 'success' END)::audit_log_result_kind";
        let table = Table { server };
        for (kind, count, age, completion) in [
            ("completed", COMPLETED, "n * interval '13 s'", done),
            ("stale", STALE, "interval '5 h' + n * interval '36 s'", OPEN),
            ("recent", RECENT, "n * interval '1 min'", OPEN),
        ] {
            table.fill(kind, count, age, completion).await?;
        }
        client.batch_execute("ANALYZE audit_log").await?;
        screen
            .say(&format!("{COMPLETED} rows are complete, {STALE} open for 5 to 30 hours, {RECENT} open for minutes"));
        Ok(table)
    }

    async fn fill(&self, kind: &str, count: i64, age: &str, completion: &str) -> anyhow::Result<()> {
        let sql = FILL.replace("KIND", &format!("'{kind}-'")).replace("COUNT", &count.to_string());
        let client = self.server.connect("app").await?;
        Ok(client.batch_execute(&sql.replace("AGE", age).replace("COMPLETION", completion)).await?)
    }

    /// More rows whose request has crashed.
    pub async fn crash(&self, screen: &Screen, count: i64) -> anyhow::Result<()> {
        screen.say(&format!("{count} more rows are open for 5 hours"));
        self.fill("late", count, "interval '5 h'", OPEN).await
    }

    /// What a sweep by hand made of the rows of [`Table::crash`].
    pub async fn check_late(&self, screen: &Screen, count: i64) -> anyhow::Result<()> {
        let swept = "SELECT count(*) FROM audit_log WHERE result_kind = 'timeout' AND request_id LIKE 'late-%'";
        screen.check("rows that timed out by hand", self.ask(swept).await?, count)
    }

    async fn ask(&self, sql: &str) -> anyhow::Result<String> {
        let row = self.server.connect("app").await?.query_one(&format!("SELECT ({sql})::text"), &[]).await?;
        Ok(row.get(0))
    }

    pub async fn untouched(&self) -> anyhow::Result<Untouched> {
        let sum = |kind| {
            format!(
                "SELECT count(*) || ' rows, checksum ' || sum(hashtextextended(row::text, 0)) FROM audit_log AS row WHERE request_id LIKE '{kind}-%'"
            )
        };
        Ok(Untouched { completed: self.ask(&sum("completed")).await?, recent: self.ask(&sum("recent")).await? })
    }

    pub async fn check(&self, screen: &Screen, before: &Untouched) -> anyhow::Result<()> {
        let now = self.untouched().await?;
        screen.check("complete rows are what they were", now.completed, &before.completed)?;
        screen.check("recent rows are what they were", now.recent, &before.recent)?;
        let swept = "SELECT count(*) FROM audit_log WHERE result_kind = 'timeout'";
        screen.check("rows that timed out", self.ask(swept).await?, STALE)?;
        let right = format!("{swept} AND request_id LIKE 'stale-%' AND time_completed > time_started");
        screen.check("of them, rows that were stale", self.ask(&right).await?, STALE)?;

        let client = self.server.connect("app").await?;
        screen.command(&format!("psql app -c \"{}\"", LATE.replace("$1", "(a swept row)")));
        let id = client.query_one("SELECT id::text FROM audit_log WHERE result_kind = 'timeout' LIMIT 1", &[]).await?;
        let late = LATE.replace("$1", &format!("'{}'", id.get::<_, &str>(0)));
        screen.check("rows changed by a request that ends after all", client.execute(&late, &[]).await?, 0)
    }
}
