//! The audit logs that are swept: made once for each layout as a template, copied for every run, and looked at after it.

use super::steps::Steps;
use anyhow::{Context, ensure};
use std::collections::BTreeSet;
use std::fs;
use support::build::root;
use support::postgres::PostgresServer;
use support::progress;
use tokio_postgres::Client;

/// Open rows that are too young to be swept.
const RECENT: i64 = 100;

/// So many rows are inserted at once.
const CHUNK: i64 = 250_000;

/// Every kind of row is told by its request. `n` counts from the oldest; rows are 10 hours to 35 days old.
const FILL: &str = "
    INSERT INTO audit_log (id, time_started, request_id, request_uri, operation_id, source_ip, user_agent, actor_id,
        actor_kind, time_completed, http_status_code, result_kind, auth_method, credential_id)
    SELECT gen_random_uuid(), started, (KIND) || n, '/v1/instances', 'instance_list', '192.0.2.7', 'bench',
        gen_random_uuid(), 'user_builtin', COMPLETION, 'access_token', gen_random_uuid()
    FROM generate_series(FROM_N, TO_N) AS n, LATERAL (SELECT now() - (AGE) AS started) AS row";

const DONE: &str = "started + interval '120 ms', 200, 'success'::audit_log_result_kind";
const OPEN: &str = "NULL, NULL, NULL::audit_log_result_kind";

/// Where the stale rows lie.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Layout {
    /// Together, as after one crash.
    Block,
    /// Between all others, on a page each.
    Interleaved,
}

impl Layout {
    pub fn name(self) -> &'static str {
        match self {
            Layout::Block => "one block",
            Layout::Interleaved => "interleaved",
        }
    }

    fn database(self) -> &'static str {
        match self {
            Layout::Block => "block",
            Layout::Interleaved => "interleaved",
        }
    }
}

/// What the planner knows of the table.
#[derive(Clone, Copy, Debug)]
pub enum Statistics {
    /// The normal state after a crash: autovacuum came before it.
    BeforeBacklog,
    Fresh,
    /// As after pg_restore.
    Never,
}

impl Statistics {
    pub const ALL: [Statistics; 3] = [Statistics::BeforeBacklog, Statistics::Fresh, Statistics::Never];

    pub fn name(self) -> &'static str {
        match self {
            Statistics::BeforeBacklog => "from before the backlog",
            Statistics::Fresh => "fresh",
            Statistics::Never => "never analyzed",
        }
    }
}

/// Templates on one server.
pub struct Templates<'server> {
    server: &'server PostgresServer,
    rows: i64,
    stale: i64,
    made: BTreeSet<Layout>,
}

/// A database that one run has to itself. It has to be dropped: nobody else can.
pub struct Copy<'server> {
    server: &'server PostgresServer,
    name: &'static str,
    /// Rows in all, stale rows, and the last transaction before the run.
    rows: i64,
    stale: i64,
    before: i64,
}

impl<'server> Templates<'server> {
    pub fn new(server: &'server PostgresServer, rows: i64, stale: i64) -> Self {
        Templates { server, rows, stale, made: BTreeSet::new() }
    }

    /// A fresh copy of a layout: the same files each time, and nothing left to be written.
    pub async fn copy(&mut self, layout: Layout) -> anyhow::Result<Copy<'server>> {
        if !self.made.contains(&layout) {
            self.make(layout).await?;
            self.made.insert(layout);
        }
        let name = "run";
        copy_database(self.server, layout.database(), name).await?;
        let admin = self.server.connect("postgres").await?;
        admin.batch_execute("CHECKPOINT").await?;
        let before = one(&admin, "SELECT txid_current()").await?;
        Ok(Copy { server: self.server, name, rows: self.rows + RECENT, stale: self.stale, before })
    }

    async fn make(&self, layout: Layout) -> anyhow::Result<()> {
        let (rows, stale) = (self.rows, self.stale);
        let client = empty(self.server, layout.database()).await?;
        // Where autovacuum is on, it comes to copies alone.
        client.batch_execute("ALTER TABLE audit_log SET (autovacuum_enabled = off)").await?;
        let name = layout.name();
        let apart = rows / stale.max(1);
        let old = format!("interval '5 h' + (({rows} - n)::float8 / {rows}) * interval '30 days'");
        match layout {
            Layout::Block => {
                fill(&client, name, "'done-'", (1, rows - stale), &format!("interval '5 h' + {old}"), DONE).await?;
                client.batch_execute("VACUUM (FREEZE, ANALYZE) audit_log").await?;
                let age = format!("interval '5 h' + (({stale} - n)::float8 / {stale}) * interval '5 h'");
                fill(&client, name, "'stale-'", (1, stale), &age, OPEN).await?;
            }
            // Rows are taken out, one on each page or so, and stale rows of their times put in their places: this way the
            // statistics are those from before the backlog here too.
            Layout::Interleaved => {
                let kind = format!("CASE WHEN n % {apart} = 0 AND n <= {apart} * {stale} THEN 'gap-' ELSE 'done-' END");
                fill(&client, name, &kind, (1, rows), &old, DONE).await?;
                client.batch_execute("DELETE FROM audit_log WHERE request_id LIKE 'gap-%'").await?;
                client.batch_execute("VACUUM (FREEZE, ANALYZE) audit_log").await?;
                fill(&client, name, "'stale-'", (1, stale), &old.replace(" n)", &format!(" n * {apart})")), OPEN)
                    .await?;
            }
        }
        fill(&client, name, "'recent-'", (1, RECENT), "interval '1 h' + n * interval '1 s'", OPEN).await?;
        let pages = "SELECT count(DISTINCT (ctid::text::point)[0]) FROM audit_log WHERE request_id LIKE 'stale-%'";
        let all = "SELECT pg_relation_size('audit_log') / 8192";
        let (pages, all) = (one(&client, pages).await?, one(&client, all).await?);
        progress::note(&format!("  {name}: {stale} stale rows on {pages} of {all} pages"));
        Ok(())
    }
}

impl Copy<'_> {
    pub fn uri(&self) -> String {
        self.server.superuser_uri(self.name)
    }

    pub async fn connect(&self) -> anyhow::Result<Client> {
        self.server.connect(self.name).await
    }

    /// Brings the planner's statistics into a state.
    pub async fn with(self, statistics: Statistics) -> anyhow::Result<Self> {
        let client = self.connect().await?;
        match statistics {
            Statistics::BeforeBacklog => {}
            Statistics::Fresh => client.batch_execute("ANALYZE audit_log").await?,
            // Data is restored first, and indexes then count it.
            Statistics::Never => {
                let sql = "DELETE FROM pg_statistic WHERE starelid = 'audit_log'::regclass; REINDEX TABLE audit_log; CHECKPOINT";
                for sql in sql.split("; ") {
                    client.batch_execute(sql).await?;
                }
            }
        }
        Ok(self)
    }

    /// Sees which rows a run wrote. Every write makes a new version of a row, so the transactions that made the versions tell.
    /// Gives back how many stale rows it completed: all.
    pub async fn check_all(&self) -> anyhow::Result<i64> {
        let client = self.connect().await?;
        let swept = "request_id LIKE 'stale-%' AND result_kind = 'timeout' AND time_completed > time_started";
        let count = |what: &str| format!("count(*) FILTER (WHERE {what})");
        let sql = format!(
            "SELECT count(*), {}, {}, {} FROM audit_log WHERE request_id NOT LIKE 'load-%'",
            count(swept),
            count("request_id LIKE 'stale-%' AND time_completed IS NULL"),
            count(&format!("request_id NOT LIKE 'stale-%' AND xmin::text::bigint > {}", self.before)),
        );
        let row = client.query_one(&sql, &[]).await?;
        let [all, swept, open, touched] = [0, 1, 2, 3].map(|index| row.get::<_, i64>(index));
        ensure!(touched == 0, "{touched} rows were written that are not stale");
        ensure!(all == self.rows, "{all} rows are left of {}", self.rows);
        ensure!(swept == self.stale, "of {} stale rows {swept} are swept and {open} open", self.stale);
        Ok(swept)
    }

    pub async fn drop(self) -> anyhow::Result<()> {
        let admin = self.server.connect("postgres").await?;
        Ok(admin.batch_execute(&format!("DROP DATABASE {} WITH (FORCE)", self.name)).await?)
    }
}

pub fn major(server: &PostgresServer) -> u32 {
    server.version().split('.').next().and_then(|major| major.parse().ok()).unwrap_or_default()
}

/// Copies a database, and replaces the one of that name.
pub async fn copy_database(server: &PostgresServer, template: &str, name: &str) -> anyhow::Result<()> {
    let admin = server.connect("postgres").await?;
    admin.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await?;
    // Page by page through the log, the other way of 15 and later, leaves shared buffers and checkpoints as it happens.
    let strategy = if major(server) >= 15 { "STRATEGY FILE_COPY" } else { "" };
    let copied = admin.batch_execute(&format!("CREATE DATABASE {name} TEMPLATE {template} {strategy}")).await;
    copied.context("the template cannot be copied")
}

/// A database with the table and the index that users get, and no rows; made anew if it was there.
pub async fn empty(server: &PostgresServer, name: &str) -> anyhow::Result<Client> {
    let client = without_index(server, name).await?;
    execute_file(&client, "index.sql").await?;
    Ok(client)
}

/// The same, before its users made the index of the sweep.
pub async fn without_index(server: &PostgresServer, name: &str) -> anyhow::Result<Client> {
    let admin = server.connect("postgres").await?;
    admin.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await?;
    server.create_database(name).await?;
    let client = server.connect(name).await?;
    execute_file(&client, "table.sql").await?;
    Ok(client)
}

/// Executes a file that users get.
pub async fn execute_file(client: &Client, file: &str) -> anyhow::Result<()> {
    let file = format!("manifests/sql/{file}");
    let sql = fs::read_to_string(root().join(&file)).with_context(|| format!("{file} cannot be read"))?;
    client.batch_execute(&sql).await.with_context(|| format!("{file} failed"))
}

/// Rows that are complete, as many as wanted; older ones first.
pub async fn completed(client: &Client, what: &str, rows: i64) -> anyhow::Result<()> {
    let age = format!("interval '5 h' + (({rows} - n)::float8 / {rows}) * interval '30 days'");
    fill(client, what, "'done-'", (1, rows), &age, DONE).await
}

/// Rows that are open and stale.
pub async fn stale(client: &Client, what: &str, rows: i64) -> anyhow::Result<()> {
    let age = format!("interval '5 h' + (({rows} - n)::float8 / {rows}) * interval '5 h'");
    fill(client, what, "'stale-'", (1, rows), &age, OPEN).await
}

async fn fill(
    client: &Client,
    what: &str,
    kind: &str,
    (from, to): (i64, i64),
    age: &str,
    completion: &str,
) -> anyhow::Result<()> {
    let chunks = usize::try_from((to - from) / CHUNK + 1)?;
    let mut steps = Steps::new(&format!("filling {what} with {to} rows"), chunks);
    let sql = FILL.replace("KIND", kind).replace("AGE", age).replace("COMPLETION", completion);
    let mut n = from;
    while n <= to {
        let end = (n + CHUNK - 1).min(to);
        if chunks > 1 {
            steps.next("");
        }
        client.batch_execute(&sql.replace("FROM_N", &n.to_string()).replace("TO_N", &end.to_string())).await?;
        n = end + 1;
    }
    Ok(())
}

/// A query of one number.
pub async fn one(client: &Client, sql: &str) -> anyhow::Result<i64> {
    Ok(client.query_one(&format!("SELECT ({sql})::bigint"), &[]).await?.get(0))
}
