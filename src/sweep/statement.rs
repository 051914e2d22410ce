//! All SQL of the sweep is written here, and its answers are read here. Why each piece is as it is stands beside it.
//! What the preflight asks the catalog is written in `preflight/catalog.rs`, the SQL for people in `preflight/mend.rs`.
//!
//! A function or an operator is named with its schema, or looked for in `pg_catalog` alone: whoever may create in a
//! schema of the role's `search_path` could else have one of ours run, with the rights of the sweep. In a batch the path
//! stays as it is, since the triggers of the table may rest on it.
//!
//! Everything goes as simple queries, several statements in one message: an error in it skips the rest, so nothing
//! runs outside its transaction, and no prepared statement is left behind in a pooler.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};

use super::plan::{Plan, literal};

/// Waiting for a lock longer than this is somebody else's schema change.
pub(super) const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// A client that was stopped or cut off must not hold its row locks for long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Times in a form that neither DateStyle nor TimeZone changes.
const ISO: &str = r#"'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"#;

/// For a transaction in which nobody's code rests on the path.
pub(super) const SEARCH_PATH: &str = "SET LOCAL search_path = pg_catalog; ";

/// Equality of the server's own, whatever an operator of that name elsewhere does.
const EQUALS: &str = "OPERATOR(pg_catalog.=)";

/// The place in the order of `(time_started, id)` up to which a sweep has looked, as texts of the database's own.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cursor {
    /// The start time, as the database writes it.
    pub time_started: String,
    /// The key. None: behind every row of that time.
    pub id: Option<String>,
}

/// What one batch did, before its COMMIT.
#[derive(Debug)]
pub struct Batch {
    /// Rows selected and locked.
    pub selected: i64,
    /// Rows completed. Fewer than selected: a trigger suppressed the update.
    pub completed: i64,
    /// The last row selected: where the next batch goes on. None: nothing was selected.
    pub cursor: Option<Cursor>,
    /// How to find out whether a COMMIT without an answer took place. None: nothing was completed.
    pub receipt: Option<Receipt>,
    /// One past the last transaction on the server that wrote and had ended when this one began. None: it was not asked.
    pub ended: Option<u64>,
}

/// One completed row and its transaction, by which a lost COMMIT is looked up.
#[derive(Clone, Debug)]
pub struct Receipt {
    xid: String,
    row: Cursor,
    time_completed: String,
}

/// Limits that the server keeps for one transaction. SET LOCAL only: a pooler hands a session's settings on to the
/// next client.
fn settings(statement_timeout: Duration) -> String {
    // Zero would switch a limit off. The wait for a lock ends first: the server would else call it a slow statement.
    let lock_timeout = LOCK_TIMEOUT.min(statement_timeout / 2);
    let millis = |limit: Duration| limit.as_millis().max(1);
    format!(
        "SET LOCAL statement_timeout = {}; SET LOCAL lock_timeout = {}; \
         SET LOCAL idle_in_transaction_session_timeout = {}; SET LOCAL row_security = off; \
         SET LOCAL DateStyle = 'ISO, YMD'; SET LOCAL TimeZone = 'UTC'; \
         SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL jit = off; {}",
        millis(statement_timeout),
        millis(lock_timeout),
        millis(IDLE_TIMEOUT),
        // The one good plan walks the partial index in order. With statistics from before a backlog, or none, the
        // planner prefers plans that cost a thousand times as much.
        ["seqscan", "bitmapscan", "hashjoin", "mergejoin", "sort"]
            .map(|node| format!("SET LOCAL enable_{node} = off; "))
            .concat(),
    )
}

/// Reads the cutoff: the database's clock, so that there is one clock, less the timeout.
pub fn cutoff(plan: &Plan) -> String {
    format!(
        "SELECT pg_catalog.to_char((now OPERATOR(pg_catalog.-) interval '{} milliseconds') AT TIME ZONE 'UTC', {ISO}), \
           pg_catalog.to_char(now AT TIME ZONE 'UTC', {ISO}) FROM pg_catalog.clock_timestamp() AS now",
        plan.timeout.as_millis()
    )
}

/// The stale rows beyond the cursor, oldest first.
fn stale(plan: &Plan, cutoff: &str, cursor: Option<&Cursor>) -> String {
    let Plan { table, id, time_started, time_completed, .. } = plan;
    let beyond = cursor.map_or_else(String::new, |cursor| {
        let time = literal(&cursor.time_started);
        match &cursor.id {
            Some(key) => format!(" AND ({time_started}, {id}) OPERATOR(pg_catalog.>) ({time}, {})", literal(key)),
            None => format!(" AND {time_started} OPERATOR(pg_catalog.>) {time}"),
        }
    });
    format!(
        "SELECT {time_started}, {id} FROM {table} \
         WHERE {time_completed} IS NULL AND {time_started} OPERATOR(pg_catalog.<) {}{beyond} ORDER BY {time_started}, {id}",
        literal(cutoff)
    )
}

/// Completes the next `size` stale rows.
///
/// - The rows are chosen once (MATERIALIZED) and locked, skipping those that somebody is completing right now.
///   NO KEY UPDATE lets others insert rows that reference them.
/// - The join is on both columns: an id alone may repeat in a partitioned table. By `ctid` it would be a little faster (3
///   to 8 % of a drain), but a right to that column is in no grant of the columns that a sweep needs.
/// - The guard `time_completed IS NULL` is the promise that a complete row is never touched. It is spelt
///   `(...) IS TRUE` so that the planner does not take it for a reason to use the partial index there too.
/// - The outer query counts what was *selected*, on which the cursor and the end of the sweep rest, and what was
///   completed. Only two rows are written out as text, without sorting: aggregates that sort all of them took a tenth of
///   a batch's time. The transaction id is NULL where there was nothing to lock, so an idle sweep uses none. The
///   snapshot's end tells from batch to batch how many transactions of others wrote meanwhile.
fn update(plan: &Plan, cutoff: &str, cursor: Option<&Cursor>, size: i64) -> String {
    let Plan { table, id, time_started, time_completed, assignments, .. } = plan;
    let stale = stale(plan, cutoff, cursor);
    format!(
        "WITH stale AS MATERIALIZED ({stale} LIMIT {size} FOR NO KEY UPDATE SKIP LOCKED), \
         done AS (UPDATE {table} AS t SET {time_completed} = (SELECT pg_catalog.clock_timestamp()){assignments} \
           FROM stale WHERE t.{time_started} {EQUALS} stale.{time_started} AND t.{id} {EQUALS} stale.{id} \
           AND (t.{time_completed} IS NULL) IS TRUE \
           RETURNING t.{time_started}, t.{id}, t.{time_completed}) \
         SELECT s.n, d.n, pg_catalog.pg_current_xact_id_if_assigned()::text, last.ts, last.id, one.ts, one.id, one.at, \
           pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text FROM \
           (SELECT pg_catalog.count(*) AS n FROM stale) AS s CROSS JOIN (SELECT pg_catalog.count(*) AS n FROM done) AS d \
           LEFT JOIN (SELECT {time_started}::text AS ts, {id}::text AS id FROM stale \
             ORDER BY stale.{time_started} DESC, stale.{id} DESC LIMIT 1) AS last ON true \
           LEFT JOIN (SELECT {time_started}::text AS ts, {id}::text AS id, {time_completed}::text AS at FROM done \
             LIMIT 1) AS one ON true"
    )
}

/// One batch up to, and without, its COMMIT.
pub fn batch(plan: &Plan, cutoff: &str, cursor: Option<&Cursor>, size: i64, statement_timeout: Duration) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {}\
         SET CONSTRAINTS ALL IMMEDIATE; {}",
        settings(statement_timeout),
        update(plan, cutoff, cursor, size)
    )
}

/// Chooses and locks the next stale row, in a transaction that [`complete_one`] goes on with: the one way to learn
/// which row the server refuses.
pub fn choose_one(plan: &Plan, cutoff: &str, cursor: Option<&Cursor>, statement_timeout: Duration) -> String {
    let Plan { id, time_started, .. } = plan;
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {}\
         SET CONSTRAINTS ALL IMMEDIATE; \
         SELECT {time_started}::text, {id}::text, pg_catalog.pg_typeof({id})::text FROM \
           ({} LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS stale",
        settings(statement_timeout),
        stale(plan, cutoff, cursor)
    )
}

/// Completes the row that was chosen; answers as [`batch`] does.
pub fn complete_one(plan: &Plan, row: &Cursor) -> String {
    let Plan { table, id, time_started, time_completed, assignments, .. } = plan;
    let (time, key) = (literal(&row.time_started), literal(row.id.as_deref().unwrap_or_default()));
    format!(
        "WITH done AS (UPDATE {table} AS t SET {time_completed} = (SELECT pg_catalog.clock_timestamp()){assignments} \
           WHERE t.{time_started} {EQUALS} {time} AND t.{id} {EQUALS} {key} AND (t.{time_completed} IS NULL) IS TRUE \
           RETURNING t.{time_completed}) \
         SELECT 1, pg_catalog.count(*), pg_catalog.pg_current_xact_id_if_assigned()::text, {time}::text, {key}::text, {time}::text, \
           {key}::text, pg_catalog.min({time_completed})::text FROM done"
    )
}

/// A row that was chosen: its place, and the type of its key.
pub fn read_chosen(answer: &[SimpleQueryMessage]) -> Option<(Cursor, String)> {
    let row = last_row(answer)?;
    let cursor = Cursor { time_started: text(row, 0)?.to_owned(), id: Some(text(row, 1)?.to_owned()) };
    Some((cursor, text(row, 2)?.to_owned()))
}

/// Asks for the plan of the batch: finds a missing table, column or right and an unfit value without touching a row.
pub fn explain(plan: &Plan, statement_timeout: Duration) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {}EXPLAIN (COSTS OFF) {}; ROLLBACK",
        settings(statement_timeout),
        // Any time will do: nothing is run.
        update(plan, "2000-01-01T00:00:00Z", None, 1)
    )
}

/// Evaluates a SELECT under the settings of a sweep; what it calls can change nothing.
pub fn read_only(select: &str, statement_timeout: Duration) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {}{SEARCH_PATH}{select}; COMMIT",
        settings(statement_timeout)
    )
}

/// Counts the stale rows beyond the cursor, up to one more than `bound`.
pub fn backlog(plan: &Plan, cutoff: &str, cursor: Option<&Cursor>, bound: i64, statement_timeout: Duration) -> String {
    let stale = stale(plan, cutoff, cursor);
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {}{SEARCH_PATH}\
         SELECT count(*), to_char(min({}) AT TIME ZONE 'UTC', {ISO}) FROM ({stale} LIMIT {}) AS stale; COMMIT",
        settings(statement_timeout),
        plan.time_started,
        bound + 1
    )
}

/// Asks how the transaction of a receipt ended.
pub fn transaction_status(receipt: &Receipt) -> String {
    format!("SELECT pg_catalog.pg_xact_status({}::pg_catalog.xid8)", literal(&receipt.xid))
}

/// Asks whether the row of a receipt carries the receipt's time.
pub fn row_status(plan: &Plan, receipt: &Receipt) -> String {
    let Plan { table, id, time_started, time_completed, .. } = plan;
    format!(
        "SELECT {time_completed} {EQUALS} {}::timestamptz FROM {table} WHERE {time_started} {EQUALS} {} AND {id} {EQUALS} {}",
        literal(&receipt.time_completed),
        literal(&receipt.row.time_started),
        literal(receipt.row.id.as_deref().unwrap_or_default())
    )
}

/// The last row that an answer holds.
pub fn last_row(answer: &[SimpleQueryMessage]) -> Option<&SimpleQueryRow> {
    answer.iter().rev().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    })
}

/// A field of a row as text.
pub fn text(row: &SimpleQueryRow, index: usize) -> Option<&str> {
    row.try_get(index).ok().flatten()
}

/// Reads the answer of [`batch`].
pub fn read_batch(answer: &[SimpleQueryMessage]) -> Option<Batch> {
    let row = last_row(answer)?;
    let place = |ts, id| Some(Cursor { time_started: text(row, ts)?.to_owned(), id: Some(text(row, id)?.to_owned()) });
    let receipt =
        || Some(Receipt { xid: text(row, 2)?.to_owned(), row: place(5, 6)?, time_completed: text(row, 7)?.to_owned() });
    let [selected, completed] = [0, 1].map(|index| text(row, index).and_then(|n| n.parse().ok()));
    Some(Batch {
        selected: selected?,
        completed: completed?,
        cursor: place(3, 4),
        receipt: receipt(),
        ended: text(row, 8).and_then(|n| n.parse().ok()),
    })
}

/// Reads a time written in [`ISO`]; None for times that no calendar has, such as `-infinity`.
pub fn read_time(text: &str) -> Option<DateTime<Utc>> {
    DateTime::parse_from_rfc3339(text).ok().map(|time| time.to_utc())
}
