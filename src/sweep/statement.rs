//! The SQL of a sweep after its first question (`start`), and its answers. Why each piece is as it is stands beside it.
//! What the preflight asks the catalog is written in `preflight/catalog.rs`, the SQL for people in `preflight/fix.rs`.
//!
//! Every function, operator and type is named with its schema, or looked for in `pg_catalog` alone. Otherwise, someone
//! who may create objects in a schema of the role's `search_path` could run code with the rights of the sweep. A batch
//! keeps the role's path, since triggers of the table may need it, so it qualifies every name.
//!
//! Everything goes as simple queries, several statements in one message: an error in it skips the rest, so nothing
//! runs outside its transaction, and no prepared statement is left behind in a pooler.

use std::time::Duration;

use tokio_postgres::SimpleQueryMessage;

use super::open_index::{EQUALS, OpenPredicate};
use super::plan::{Plan, literal};
use super::start::{Cursor, GREATER, ISO, Start, key_literal, key_text, read_time};
use super::transaction::{LOCK_TIMEOUT, Limits, SEARCH_PATH, begin, read_only};
use crate::api::status::Backlog;
use crate::database::session::{last_row, text};

/// What one batch did, before its COMMIT.
#[derive(Debug)]
pub struct Batch {
    /// Rows selected.
    pub selected: i64,
    /// Rows updated. More than selected: a key means several rows.
    pub updated: i64,
    /// Rows with a completion time now. Fewer than selected: a trigger suppressed the update, or took the time away.
    pub completed: i64,
    /// The last row selected: where the next batch goes on. None: nothing was selected.
    pub cursor: Option<Cursor>,
    /// How to find out whether a COMMIT without an answer took place. None: nothing was completed.
    pub receipt: Option<Receipt>,
    /// One past the last transaction on the server that wrote and had ended when this one began. None: it was not asked.
    pub ended: Option<u64>,
}

impl Batch {
    /// Whether it completed the rows that it selected, and no other.
    pub const fn is_exact(&self) -> bool {
        self.updated == self.selected && self.completed == self.selected
    }
}

/// One completed row and its transaction, by which a lost COMMIT is looked up.
#[derive(Clone, Debug)]
pub struct Receipt {
    xid: String,
    row: Cursor,
    time_completed: String,
}

/// Asks for the newest start of an open row, which a good clock and the right time zone do not put ahead of the server's clock.
pub fn newest(plan: &Plan, start: &Start, statement_timeout: Duration) -> String {
    let Plan { table, id, time_started, time_completed, .. } = plan;
    let select = format!(
        "SELECT to_char({}, {ISO}) FROM (SELECT {time_started} FROM {table} WHERE {} \
         ORDER BY {time_started} DESC, {id} DESC LIMIT 1) AS newest",
        start.started.in_utc(time_started, plan),
        start.predicate.sql(time_completed)
    );
    read_only(&select, statement_timeout)
}

/// What a server tells of a receipt.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Evidence {
    /// It is a standby, which may lag behind.
    pub standby: bool,
    /// It is the server that ran the batch. None: the server cannot tell which one it is.
    pub same_server: Option<bool>,
    /// How the transaction ended: `committed`, `aborted`, or `in progress`. None: the server does not know.
    pub transaction: Option<String>,
    /// The row: `open`, or `completed` at the time of the receipt. None: neither.
    pub row: Option<String>,
}

impl Evidence {
    /// Whether the transaction was committed: on the server that ran it, the transaction decides; on another, the row does.
    pub fn fate(&self) -> Fate {
        let (transaction, row) = (self.transaction.as_deref(), self.row.as_deref());
        match (self.standby, self.same_server, transaction, row) {
            (true, ..) | (_, _, Some("in progress"), _) => Fate::AskAgain,
            // A crash takes back what was not written to disk, and the transaction's number is given out again.
            (_, Some(true), Some("committed"), Some("open")) => Fate::Unknown,
            (_, Some(true), Some("committed"), _) => Fate::Committed,
            (_, Some(true), Some("aborted"), _) => Fate::NotCommitted,
            (_, Some(true), ..) => Fate::Unknown,
            (_, _, _, Some("completed")) => Fate::Committed,
            (_, _, _, Some("open")) => Fate::NotCommitted,
            _ => Fate::Unknown,
        }
    }
}

/// What became of a transaction whose COMMIT was not answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fate {
    Committed,
    NotCommitted,
    /// It may be known later.
    AskAgain,
    /// It will not be known.
    Unknown,
}

/// How a batch meets rows that somebody else is changing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Locking {
    /// The update alone locks rows. It waits for a row that is in use, and completes none that was completed meanwhile. So it
    /// counts only if it completed all the rows that were selected.
    Optimistic,
    /// Rows are locked as they are selected. A row that is in use is skipped.
    Pessimistic,
}

/// The condition for stale rows beyond the cursor.
fn stale(plan: &Plan, start: &Start, cursor: Option<&Cursor>) -> String {
    let Plan { id, time_started, time_completed, .. } = plan;
    let beyond = cursor.map_or_else(String::new, |cursor| {
        let time = literal(&cursor.time_started);
        let rest = match &cursor.id {
            None => format!("{time_started} {GREATER} {time}"),
            // One condition of the index.
            Some(key) if start.key_greater == GREATER => {
                format!("({time_started}, {id}) {GREATER} ({time}, {})", key_literal(key))
            }
            // A comparison of rows takes one operator for all its columns.
            Some(key) => {
                format!("({time_started} {GREATER} {time} OR {id} {} {})", start.key_greater, key_literal(key))
            }
        };
        // By the time alone, the server leaves partitions out.
        format!(" AND {time_started} OPERATOR(pg_catalog.>=) {time} AND {rest}")
    });
    format!(
        "{} AND {time_started} OPERATOR(pg_catalog.<) {}{beyond}",
        start.predicate.sql(time_completed),
        literal(&start.bound)
    )
}

/// Selects the stale rows beyond the cursor, oldest first.
fn select(plan: &Plan, start: &Start, cursor: Option<&Cursor>) -> String {
    let Plan { table, id, time_started, .. } = plan;
    let stale = stale(plan, start, cursor);
    format!("SELECT {time_started}, {id} FROM {table} WHERE {stale} ORDER BY {time_started}, {id}")
}

/// Which rows of the table `t` a batch updates, as the end of an UPDATE: those that it selected.
///
/// - Beside the private index, the update walks the same range of it as the selection, up to the last selected row: no join,
///   whose plan would depend on statistics from before the backlog. Measured on 200 partitions with such statistics, on 13
///   and 15: 50 to 100 ms for a batch instead of more than 20 s. Where rows are locked first, it takes only those that were:
///   `(... = ANY (...)) IS TRUE` is a lookup in a hash table, while a plain `IN` becomes a join.
/// - Beside the plain index, that would let the planner read all open rows by an index on the completion time. So the
///   update looks each row up by both columns: an id alone may repeat in a partitioned table. By `ctid` would need a right
///   that no grant of the columns has.
/// - The update states again that the row is open, which the server checks once more on the newest version of each row.
///   That is the promise that a complete row is never touched. In a join it is spelt `(...) IS TRUE`: a guard that states
///   the predicate of the index is a reason for the planner to walk that index once for every row of the batch.
fn selected(plan: &Plan, start: &Start, stale: &str, locking: Locking) -> String {
    let Plan { id, time_started, time_completed, .. } = plan;
    let Start { key_equals, key_greater, predicate, .. } = start;
    if *predicate == OpenPredicate::Plain {
        return format!(
            "FROM stale WHERE t.{time_started} {EQUALS} stale.{time_started} AND t.{id} {key_equals} stale.{id} \
               AND (t.{time_completed} IS NULL) IS TRUE"
        );
    }
    let last = |column: &str| format!("(SELECT last.{column} FROM last)");
    let (last_time, last_id) = (last(time_started), last(id));
    let up_to_last = if key_greater == GREATER {
        format!("(t.{time_started}, t.{id}) OPERATOR(pg_catalog.<=) (SELECT last.{time_started}, last.{id} FROM last)")
    } else {
        format!("(t.{time_started} OPERATOR(pg_catalog.<) {last_time} OR (t.{id} {key_greater} {last_id}) IS FALSE)")
    };
    let locked = match locking {
        Locking::Optimistic => String::new(),
        Locking::Pessimistic => format!(
            " AND ((t.{time_started}, t.{id}) {EQUALS} ANY (SELECT stale.{time_started}, stale.{id} FROM stale)) IS TRUE"
        ),
    };
    // By the time alone, the server leaves partitions out.
    format!("WHERE {stale} AND t.{time_started} OPERATOR(pg_catalog.<=) {last_time} AND {up_to_last}{locked}")
}

/// Completes the next `size` stale rows, which are selected once (MATERIALIZED).
///
/// - NO KEY UPDATE lets others insert rows that reference them, where the update itself does.
/// - The outer query counts what was *selected*, on which the cursor and the end of the sweep rest, and what was
///   completed. Only two rows are written out as text: aggregates that sort all of them took a tenth of
///   a batch's time. The transaction id is NULL where there was nothing to lock, so an idle sweep uses none. The
///   snapshot's end tells from batch to batch how many transactions of others wrote meanwhile.
fn update(plan: &Plan, start: &Start, cursor: Option<&Cursor>, size: i64, locking: Locking) -> String {
    let Plan { table, id, time_started, time_completed, assignments, .. } = plan;
    let (select, now) = (select(plan, start, cursor), start.completed.now(plan));
    let selected = selected(plan, start, &stale(plan, start, cursor), locking);
    let key = key_text(id);
    let lock = match locking {
        Locking::Optimistic => String::new(),
        Locking::Pessimistic => format!(" FOR {} SKIP LOCKED", start.lock),
    };
    format!(
        "WITH stale AS MATERIALIZED ({select} LIMIT {size}{lock}), \
         last AS MATERIALIZED (SELECT {time_started}, {id} FROM stale \
           ORDER BY stale.{time_started} DESC, stale.{id} DESC LIMIT 1), \
         done AS (UPDATE {table} AS t SET {time_completed} = {now}{assignments} {selected} \
           RETURNING t.{time_started}, t.{id}, t.{time_completed}) \
         SELECT s.n, d.n, d.completed, pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text, l.ts, l.id, one.ts, one.id, one.at, \
           pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text FROM \
           (SELECT pg_catalog.count(*) AS n FROM stale) AS s \
           CROSS JOIN (SELECT pg_catalog.count(*) AS n, pg_catalog.count({time_completed}) AS completed FROM done) AS d \
           LEFT JOIN (SELECT {time_started}::pg_catalog.text AS ts, {key} AS id FROM last) AS l ON true \
           LEFT JOIN (SELECT {time_started}::pg_catalog.text AS ts, {key} AS id, {time_completed}::pg_catalog.text AS at FROM done \
             WHERE {time_completed} IS NOT NULL LIMIT 1) AS one ON true"
    )
}

/// One batch up to, and without, its COMMIT.
pub fn batch(
    plan: &Plan,
    start: &Start,
    cursor: Option<&Cursor>,
    size: i64,
    locking: Locking,
    limits: Limits,
) -> String {
    format!("{}{}", begin(limits), update(plan, start, cursor, size, locking))
}

/// Chooses and locks the next stale row, in a transaction that [`complete_one`] goes on with: the one way to learn
/// which row the server refuses.
pub fn choose_one(plan: &Plan, start: &Start, cursor: Option<&Cursor>, statement_timeout: Duration) -> String {
    let (Plan { id, time_started, .. }, lock) = (plan, start.lock);
    format!(
        "{}SELECT {time_started}::pg_catalog.text, {} FROM \
           ({} LIMIT 1 FOR {lock} SKIP LOCKED) AS stale",
        begin(Limits::of(statement_timeout)),
        key_text(id),
        select(plan, start, cursor)
    )
}

/// Completes the row that was chosen; answers as [`batch`] does.
pub fn complete_one(plan: &Plan, start: &Start, row: &Cursor) -> String {
    let Plan { table, id, time_started, time_completed, assignments, .. } = plan;
    let (key_equals, now) = (&start.key_equals, start.completed.now(plan));
    let (time, id_text) = (literal(&row.time_started), row.id.as_deref().unwrap_or_default());
    let (key, text) = (key_literal(id_text), literal(id_text));
    format!(
        "WITH done AS (UPDATE {table} AS t SET {time_completed} = {now}{assignments} \
           WHERE t.{time_started} {EQUALS} {time} AND t.{id} {key_equals} {key} AND (t.{time_completed} IS NULL) IS TRUE \
           RETURNING t.{time_completed}) \
         SELECT 1, pg_catalog.count(*), pg_catalog.count({time_completed}), pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text, {time}::pg_catalog.text, {text}::pg_catalog.text, {time}::pg_catalog.text, \
           {text}::pg_catalog.text, pg_catalog.min({time_completed})::pg_catalog.text FROM done"
    )
}

/// The row that was chosen.
pub fn read_chosen(answer: &[SimpleQueryMessage]) -> Option<Cursor> {
    let row = last_row(answer)?;
    Some(Cursor { time_started: text(row, 0)?.to_owned(), id: Some(text(row, 1)?.to_owned()) })
}

/// Asks for the plan of a batch: finds a missing table, column or right and an unfit value without touching a row.
pub fn explain(plan: &Plan, start: &Start, locking: Locking, statement_timeout: Duration) -> String {
    let update = update(plan, start, None, plan.batch_size.min(plan.limit), locking);
    format!("{}EXPLAIN (COSTS OFF) {update}; ROLLBACK", begin(Limits::of(statement_timeout)))
}

/// Asks for the plan of the application's own completion of a row by its key, whose type is given as SQL. Under the
/// application's settings, and with a key that the planner does not know, as in a prepared statement.
pub fn explain_completion(plan: &Plan, key_type: &str, statement_timeout: Duration) -> String {
    let Plan { table, id, time_completed, .. } = plan;
    format!(
        "BEGIN READ ONLY; SET LOCAL statement_timeout = {}; SET LOCAL lock_timeout = {}; {SEARCH_PATH}\
         EXPLAIN (COSTS OFF, FORMAT JSON) UPDATE {table} SET {time_completed} = {time_completed} \
         WHERE {id} = (SELECT CAST(NULL AS {key_type})) AND {time_completed} IS NULL; ROLLBACK",
        statement_timeout.as_millis().max(1),
        LOCK_TIMEOUT.min(statement_timeout / 2).as_millis().max(1),
    )
}

/// Counts the stale rows, up to one more than `bound`. From the beginning: rows that were locked or refused lie before the
/// cursor.
pub fn backlog(plan: &Plan, start: &Start, bound: i64, statement_timeout: Duration) -> String {
    let stale = select(plan, start, None);
    let oldest = format!("min({})", plan.time_started);
    let select = format!(
        // Years before the first have no form in the status.
        "SELECT count(*), CASE WHEN {oldest} >= '0001-01-01' THEN to_char({}, {ISO}) END FROM ({stale} LIMIT {}) AS stale",
        start.started.in_utc(&oldest, plan),
        bound + 1
    );
    read_only(&select, statement_timeout)
}

/// Reads the answer of [`backlog`].
pub fn read_backlog(answer: &[SimpleQueryMessage], bound: i64) -> Option<Backlog> {
    let row = last_row(answer)?;
    Some(Backlog::new(text(row, 0)?.parse().ok()?, bound, text(row, 1).and_then(read_time)))
}

/// Which server this is, and its timeline: a promoted standby begins another one.
const SERVER: &str = "pg_catalog.concat((SELECT system_identifier FROM pg_catalog.pg_control_system()), ' ', \
    pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8))";

/// Asks which server this is. Not every product that is built on PostgreSQL can tell.
pub fn server() -> String {
    format!("SELECT {SERVER}")
}

/// Asks what became of a receipt, for [`read_evidence`]. `server`: where its batch ran, if it could tell.
pub fn evidence(plan: &Plan, start: &Start, receipt: &Receipt, server: Option<&str>) -> String {
    let key_equals = &start.key_equals;
    let Plan { table, id, time_started, time_completed, .. } = plan;
    // Another server may give the transaction's number to another one, or not know it yet.
    let same = server.map_or_else(|| "NULL".to_owned(), |server| format!("{SERVER} {EQUALS} {}", literal(server)));
    format!(
        "SELECT standby, same, CASE WHEN NOT standby AND same IS NOT FALSE \
           THEN pg_catalog.pg_xact_status({}::pg_catalog.xid8) END, \
         (SELECT CASE WHEN {time_completed} IS NULL THEN 'open' WHEN {time_completed} {EQUALS} {} THEN 'completed' END \
           FROM {table} WHERE {time_started} {EQUALS} {} AND {id} {key_equals} {} LIMIT 1) \
         FROM pg_catalog.pg_is_in_recovery() AS standby, LATERAL (SELECT CASE WHEN NOT standby THEN {same} END AS same) AS server",
        literal(&receipt.xid),
        literal(&receipt.time_completed),
        literal(&receipt.row.time_started),
        key_literal(receipt.row.id.as_deref().unwrap_or_default())
    )
}

/// Reads the answer of [`evidence`].
pub fn read_evidence(answer: &[SimpleQueryMessage]) -> Option<Evidence> {
    let row = last_row(answer)?;
    Some(Evidence {
        standby: text(row, 0)? == "t",
        same_server: text(row, 1).map(|same| same == "t"),
        transaction: text(row, 2).map(str::to_owned),
        row: text(row, 3).map(str::to_owned),
    })
}

/// Reads the answer of [`batch`].
pub fn read_batch(answer: &[SimpleQueryMessage]) -> Option<Batch> {
    let row = last_row(answer)?;
    let place = |ts, id| Some(Cursor { time_started: text(row, ts)?.to_owned(), id: Some(text(row, id)?.to_owned()) });
    let receipt =
        || Some(Receipt { xid: text(row, 3)?.to_owned(), row: place(6, 7)?, time_completed: text(row, 8)?.to_owned() });
    let [selected, updated, completed] = [0, 1, 2].map(|index| text(row, index).and_then(|n| n.parse().ok()));
    Some(Batch {
        selected: selected?,
        updated: updated?,
        completed: completed?,
        cursor: place(4, 5),
        receipt: receipt(),
        ended: text(row, 9).and_then(|n| n.parse().ok()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_server_of_the_batch_the_transaction_decides_and_elsewhere_the_row() {
        let (same, other, untold) = (Some(true), Some(false), None);
        for (standby, same_server, transaction, row, fate) in [
            (false, same, Some("committed"), Some("completed"), Fate::Committed),
            (false, same, Some("committed"), Some("open"), Fate::Unknown),
            (false, same, Some("committed"), None, Fate::Committed),
            (false, same, Some("aborted"), Some("completed"), Fate::NotCommitted),
            (false, same, Some("in progress"), Some("open"), Fate::AskAgain),
            // Too old to be known.
            (false, same, None, Some("completed"), Fate::Unknown),
            // After a failover.
            (false, other, None, Some("completed"), Fate::Committed),
            (false, other, None, Some("open"), Fate::NotCommitted),
            (false, other, None, None, Fate::Unknown),
            (false, untold, Some("in progress"), Some("open"), Fate::AskAgain),
            (false, untold, Some("committed"), Some("completed"), Fate::Committed),
            (false, untold, Some("aborted"), Some("open"), Fate::NotCommitted),
            (false, untold, Some("committed"), None, Fate::Unknown),
            // A standby may lag behind.
            (true, None, None, Some("open"), Fate::AskAgain),
            (true, None, None, Some("completed"), Fate::AskAgain),
        ] {
            let [transaction, row] = [transaction, row].map(|text: Option<&str>| text.map(str::to_owned));
            let evidence = Evidence { standby, same_server, transaction, row };
            assert_eq!(evidence.fate(), fate, "{evidence:?}");
        }
    }
}
