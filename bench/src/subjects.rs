//! Who drains a backlog: ours, and what people use instead. Each from opening its connection to its end.

use super::product::Product;
use anyhow::{Context, ensure};
use chrono::{DateTime, Utc};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::Command;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls};

/// What takes longer is stopped, and scored by what it did.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is open, as the private index says it: so each uses the same index.
const OPEN: &str = "num_nulls(time_completed) = 1";

/// What is older than the timeout, for all but ours, which asks the database itself.
const OLD: &str = "time_started < now() - interval '4 h'";
const SET: &str = "time_completed = clock_timestamp(), result_kind = 'timeout'";

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Subject {
    Ours,
    Unbounded,
    Original,
    Shell,
    Procedure,
}

/// What they need.
pub struct Means<'a> {
    pub product: &'a Product,
    /// None: it is not installed.
    pub psql: Option<PathBuf>,
    pub batch: i64,
}

impl Subject {
    pub fn name(self) -> &'static str {
        match self {
            Subject::Ours => "audit-log-sweeper",
            Subject::Unbounded => "one unbounded UPDATE",
            Subject::Original => "the original's statement in a loop",
            Subject::Shell => "a shell loop with psql",
            Subject::Procedure => "a PL/pgSQL loop, as for pg_cron",
        }
    }

    /// Drains up to `stale` rows; how long that took. Whether it came to its end is seen in the table.
    pub async fn drain(self, means: &Means<'_>, uri: &str, stale: i64) -> anyhow::Result<Duration> {
        let batch = means.batch;
        match self {
            Subject::Ours => return Ok(means.product.sweep(uri, stale, batch).await?.took),
            Subject::Shell => return shell(means, uri).await,
            _ => {}
        }
        let started = Instant::now();
        let client = connect(uri).await?;
        let cancel = client.cancel_token();
        let work = async {
            match self {
                Subject::Unbounded => {
                    client.batch_execute(&format!("UPDATE audit_log SET {SET} WHERE {OPEN} AND {OLD}")).await?
                }
                Subject::Original => original(&client, batch).await?,
                // Only what is sent alone may commit.
                Subject::Procedure => {
                    client.batch_execute(&procedure(batch)).await?;
                    client.batch_execute("CALL close_stale()").await?;
                }
                Subject::Ours | Subject::Shell => {}
            }
            anyhow::Ok(())
        };
        match timeout(PATIENCE, work).await {
            Ok(done) => done.with_context(|| self.name())?,
            Err(_) => cancel.cancel_query(NoTls).await?,
        }
        let took = started.elapsed();
        drop(client);
        Ok(took)
    }
}

async fn connect(uri: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(uri, NoTls).await?;
    // Its end is an error of the client's next statement, where it is seen.
    tokio::spawn(connection);
    Ok(client)
}

/// As Diesel sends it: prepared, with the times as parameters, each statement a transaction.
async fn original(client: &Client, batch: i64) -> anyhow::Result<()> {
    let sql = format!(
        "UPDATE audit_log SET time_completed = $1, result_kind = 'timeout' WHERE id IN (
            SELECT id FROM audit_log WHERE {OPEN} AND time_started < $2 ORDER BY time_started, id LIMIT $3)"
    );
    let statement = client.prepare(&sql).await?;
    let cutoff: DateTime<Utc> = Utc::now() - Duration::from_secs(4 * 3600);
    while client.execute(&statement, &[&Utc::now(), &cutoff, &batch]).await? == u64::try_from(batch)? {}
    Ok(())
}

fn procedure(batch: i64) -> String {
    format!(
        "CREATE PROCEDURE close_stale() LANGUAGE plpgsql AS $$ BEGIN
            LOOP
                UPDATE audit_log SET {SET} WHERE id IN (
                    SELECT id FROM audit_log WHERE {OPEN} AND {OLD} ORDER BY time_started LIMIT {batch} FOR UPDATE SKIP LOCKED);
                EXIT WHEN NOT FOUND;
                COMMIT;
            END LOOP;
        END $$"
    )
}

async fn shell(means: &Means<'_>, uri: &str) -> anyhow::Result<Duration> {
    let psql = means.psql.as_ref().context("psql is not installed")?;
    let sql = format!(
        "UPDATE audit_log SET {SET} WHERE id IN (
            SELECT id FROM audit_log WHERE {OPEN} AND {OLD} ORDER BY time_started LIMIT {} FOR UPDATE SKIP LOCKED)",
        means.batch
    );
    let script = r#"while done=$("$0" -X -d "$URI" -c "$SQL") && [ "$done" != "UPDATE 0" ]; do :; done; [ "$done" = "UPDATE 0" ]"#;
    let started = Instant::now();
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]).arg(psql).env("URI", uri).env("SQL", sql).stdin(Stdio::null()).kill_on_drop(true);
    if let Ok(status) = timeout(PATIENCE, command.status()).await {
        ensure!(status?.success(), "the shell loop failed");
    }
    Ok(started.elapsed())
}
