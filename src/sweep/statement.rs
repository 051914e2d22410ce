//! All SQL of the sweep is written here, and its answers are read here. Why each piece is as it is stands beside it.
//! What the preflight asks the catalog is written in `preflight/catalog.rs`, the SQL for people in `preflight/fix.rs`.
//!
//! Every function, operator and type is named with its schema, or looked for in `pg_catalog` alone. Otherwise, someone
//! who may create objects in a schema of the role's `search_path` could run code with the rights of the sweep. A batch
//! keeps the role's path, since triggers of the table may need it, so it qualifies every name.
//!
//! Everything goes as simple queries, several statements in one message: an error in it skips the rest, so nothing
//! runs outside its transaction, and no prepared statement is left behind in a pooler.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_postgres::SimpleQueryMessage;

use super::open_index::{EQUALS, INDEX_ORDERED, INDEX_PENDING, NOT_DETACHING, OpenPredicate};
use super::plan::{Names, Plan, literal};
use crate::database::session::{last_row, text};

/// Waiting for a lock longer than this is a schema change.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// A client that was stopped or cut off must not hold its row locks for long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Times in a form that neither DateStyle nor TimeZone changes.
const ISO: &str = r#"'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"#;

/// For a transaction that runs no trigger. Without `pg_temp`, a temporary type or table would come before `pg_catalog`.
/// The server also writes expressions down in one form, with quotes only where they are needed.
pub const SEARCH_PATH: &str = "SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL quote_all_identifiers = off; ";

/// The server's own operator, whatever an operator of that name elsewhere does.
const GREATER: &str = "OPERATOR(pg_catalog.>)";

/// What a sweep asks first. It stays the same until the sweep ends.
#[derive(Clone, Debug)]
pub struct Start {
    /// Rows that started before this are stale, as the database writes it.
    pub cutoff: String,
    /// The database's clock.
    pub now: Option<DateTime<Utc>>,
    /// The predicate of the index that is there.
    pub predicate: OpenPredicate,
    /// Whether a key may be shown: a uuid or an integer is no data of the row.
    pub key_is_shown: bool,
    /// The key type's own operators, qualified: those of `citext` are in the schema of its extension.
    key_equals: String,
    key_greater: String,
}

impl Start {
    /// A cursor as the status may keep it: without a key that is data of the row.
    pub fn shown(&self, cursor: Option<Cursor>) -> Option<Cursor> {
        cursor.map(|cursor| Cursor { id: cursor.id.filter(|_| self.key_is_shown), ..cursor })
    }
}

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
         SET LOCAL plan_cache_mode = force_custom_plan; SET LOCAL jit = off; SET LOCAL client_min_messages = error; {}",
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

/// Asks for a [`Start`].
pub fn start(plan: &Plan, statement_timeout: Duration) -> String {
    let Names { schema, table, id, time_started, time_completed, .. } = &plan.names;
    let column = |n| {
        format!("(SELECT a.attname FROM pg_attribute a WHERE (a.attrelid, a.attnum) = (x.indrelid, x.indkey[{n}]))")
    };
    // Of a partitioned table's index, only those of the partitions tell whether it may be used.
    let private = format!(
        "EXISTS (SELECT FROM pg_index x JOIN pg_class ic ON ic.oid = x.indexrelid JOIN pg_am m ON m.oid = ic.relam \
         WHERE x.indrelid = tree.oid AND x.indisvalid AND NOT {INDEX_PENDING} AND {INDEX_ORDERED} \
         AND {} = {} AND {} = {} AND x.indpred IS NOT NULL AND pg_get_expr(x.indpred, x.indrelid) = {})",
        column(0),
        literal(time_started),
        column(1),
        literal(id),
        OpenPredicate::Private.written(time_completed)
    );
    // Of the default operator class, as the order and the indexes of the column: 3 is "equal", 5 is "greater".
    let operators = "(SELECT json_agg(format('OPERATOR(%I.%s)', n.nspname, o.oprname) ORDER BY s.amopstrategy) \
        FROM key JOIN pg_opclass k ON k.opcintype = key.oid AND k.opcdefault \
        JOIN pg_am m ON m.oid = k.opcmethod AND m.amname = 'btree' \
        JOIN pg_amop s ON (s.amopfamily, s.amoplefttype, s.amoprighttype) = (k.opcfamily, key.oid, key.oid) \
          AND s.amopstrategy IN (3, 5) \
        JOIN pg_operator o ON o.oid = s.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace WHERE key.typbasetype = 0)";
    let select = format!(
        "WITH RECURSIVE root AS (SELECT c.oid, c.relkind FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = {schema} AND c.relname = {table}), \
           tree AS (SELECT * FROM root UNION ALL SELECT c.oid, c.relkind FROM tree JOIN pg_inherits i \
             ON i.inhparent = tree.oid JOIN pg_class c ON c.oid = i.inhrelid WHERE tree.relkind = 'p' AND {NOT_DETACHING}), \
           key AS (SELECT t.oid, t.typbasetype FROM root JOIN pg_attribute a ON a.attrelid = root.oid AND a.attname = {id} \
             JOIN pg_type t ON t.oid = a.atttypid \
             UNION ALL SELECT t.oid, t.typbasetype FROM key JOIN pg_type t ON t.oid = key.typbasetype) \
         SELECT to_char((now - interval '{timeout} milliseconds') AT TIME ZONE 'UTC', {ISO}), \
           to_char(now AT TIME ZONE 'UTC', {ISO}), \
           NOT EXISTS (SELECT FROM tree WHERE tree.relkind <> 'p' AND NOT {private}), {operators}, \
           (SELECT oid IN ('uuid'::regtype, 'int8'::regtype, 'int4'::regtype, 'int2'::regtype) FROM key WHERE typbasetype = 0) \
         FROM clock_timestamp() AS now",
        schema = literal(schema),
        table = literal(table),
        id = literal(id),
        timeout = plan.timeout.as_millis(),
    );
    read_only(&select, statement_timeout)
}

/// Reads the answer of [`start`].
pub fn read_start(answer: &[SimpleQueryMessage]) -> Option<Start> {
    let row = last_row(answer)?;
    // A type without operators of its own has those of a type it is the same as, such as varchar and text.
    let operators = text(row, 3).and_then(|json| serde_json::from_str(json).ok());
    let [key_equals, key_greater] = operators.unwrap_or_else(|| [EQUALS, GREATER].map(str::to_owned));
    Some(Start {
        cutoff: text(row, 0)?.to_owned(),
        now: text(row, 1).and_then(read_time),
        predicate: if text(row, 2) == Some("t") { OpenPredicate::Private } else { OpenPredicate::Plain },
        key_is_shown: text(row, 4) == Some("t"),
        key_equals,
        key_greater,
    })
}

/// The stale rows beyond the cursor, oldest first.
fn stale(plan: &Plan, start: &Start, cursor: Option<&Cursor>) -> String {
    let Plan { table, id, time_started, time_completed, .. } = plan;
    let beyond = cursor.map_or_else(String::new, |cursor| {
        let time = literal(&cursor.time_started);
        match &cursor.id {
            None => format!(" AND {time_started} {GREATER} {time}"),
            // One condition of the index.
            Some(key) if start.key_greater == GREATER => {
                format!(" AND ({time_started}, {id}) {GREATER} ({time}, {})", literal(key))
            }
            // A comparison of rows takes one operator for all its columns.
            Some(key) => format!(
                " AND {time_started} OPERATOR(pg_catalog.>=) {time} AND ({time_started} {GREATER} {time} OR {id} {} {})",
                start.key_greater,
                literal(key)
            ),
        }
    });
    format!(
        "SELECT {time_started}, {id} FROM {table} \
         WHERE {} AND {time_started} OPERATOR(pg_catalog.<) {}{beyond} ORDER BY {time_started}, {id}",
        start.predicate.sql(time_completed),
        literal(&start.cutoff)
    )
}

/// Completes the next `size` stale rows.
///
/// - The rows are chosen once (MATERIALIZED) and locked, skipping those that somebody is completing right now.
///   NO KEY UPDATE lets others insert rows that reference them.
/// - The join is on both columns: an id alone may repeat in a partitioned table. By `ctid` it would be a little faster (3
///   to 8 % of a drain), but a right to that column is in no grant of the columns that a sweep needs.
/// - The guard `time_completed IS NULL` is the promise that a complete row is never touched. It is spelt
///   `(...) IS TRUE`, unlike both predicates of [`OpenPredicate`]: a guard that states the predicate of the index is a
///   reason for the planner to walk that index once for every row of the batch.
/// - The outer query counts what was *selected*, on which the cursor and the end of the sweep rest, and what was
///   completed. Only two rows are written out as text, without sorting: aggregates that sort all of them took a tenth of
///   a batch's time. The transaction id is NULL where there was nothing to lock, so an idle sweep uses none. The
///   snapshot's end tells from batch to batch how many transactions of others wrote meanwhile.
fn update(plan: &Plan, start: &Start, cursor: Option<&Cursor>, size: i64) -> String {
    let Plan { table, id, time_started, time_completed, assignments, .. } = plan;
    let (stale, key_equals) = (stale(plan, start, cursor), &start.key_equals);
    format!(
        "WITH stale AS MATERIALIZED ({stale} LIMIT {size} FOR NO KEY UPDATE SKIP LOCKED), \
         done AS (UPDATE {table} AS t SET {time_completed} = (SELECT pg_catalog.clock_timestamp()){assignments} \
           FROM stale WHERE t.{time_started} {EQUALS} stale.{time_started} AND t.{id} {key_equals} stale.{id} \
           AND (t.{time_completed} IS NULL) IS TRUE \
           RETURNING t.{time_started}, t.{id}, t.{time_completed}) \
         SELECT s.n, d.n, pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text, last.ts, last.id, one.ts, one.id, one.at, \
           pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text FROM \
           (SELECT pg_catalog.count(*) AS n FROM stale) AS s CROSS JOIN (SELECT pg_catalog.count(*) AS n FROM done) AS d \
           LEFT JOIN (SELECT {time_started}::pg_catalog.text AS ts, {id}::pg_catalog.text AS id FROM stale \
             ORDER BY stale.{time_started} DESC, stale.{id} DESC LIMIT 1) AS last ON true \
           LEFT JOIN (SELECT {time_started}::pg_catalog.text AS ts, {id}::pg_catalog.text AS id, {time_completed}::pg_catalog.text AS at FROM done \
             LIMIT 1) AS one ON true"
    )
}

/// One batch up to, and without, its COMMIT.
pub fn batch(plan: &Plan, start: &Start, cursor: Option<&Cursor>, size: i64, statement_timeout: Duration) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {}\
         SET CONSTRAINTS ALL IMMEDIATE; {}",
        settings(statement_timeout),
        update(plan, start, cursor, size)
    )
}

/// Chooses and locks the next stale row, in a transaction that [`complete_one`] goes on with: the one way to learn
/// which row the server refuses.
pub fn choose_one(plan: &Plan, start: &Start, cursor: Option<&Cursor>, statement_timeout: Duration) -> String {
    let Plan { id, time_started, .. } = plan;
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {}\
         SET CONSTRAINTS ALL IMMEDIATE; \
         SELECT {time_started}::pg_catalog.text, {id}::pg_catalog.text FROM \
           ({} LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) AS stale",
        settings(statement_timeout),
        stale(plan, start, cursor)
    )
}

/// Completes the row that was chosen; answers as [`batch`] does.
pub fn complete_one(plan: &Plan, start: &Start, row: &Cursor) -> String {
    let Plan { table, id, time_started, time_completed, assignments, .. } = plan;
    let key_equals = &start.key_equals;
    let (time, key) = (literal(&row.time_started), literal(row.id.as_deref().unwrap_or_default()));
    format!(
        "WITH done AS (UPDATE {table} AS t SET {time_completed} = (SELECT pg_catalog.clock_timestamp()){assignments} \
           WHERE t.{time_started} {EQUALS} {time} AND t.{id} {key_equals} {key} AND (t.{time_completed} IS NULL) IS TRUE \
           RETURNING t.{time_completed}) \
         SELECT 1, pg_catalog.count(*), pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text, {time}::pg_catalog.text, {key}::pg_catalog.text, {time}::pg_catalog.text, \
           {key}::pg_catalog.text, pg_catalog.min({time_completed})::pg_catalog.text FROM done"
    )
}

/// The row that was chosen.
pub fn read_chosen(answer: &[SimpleQueryMessage]) -> Option<Cursor> {
    let row = last_row(answer)?;
    Some(Cursor { time_started: text(row, 0)?.to_owned(), id: Some(text(row, 1)?.to_owned()) })
}

/// Asks for the plan of a batch: finds a missing table, column or right and an unfit value without touching a row.
pub fn explain(plan: &Plan, start: &Start, statement_timeout: Duration) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {}EXPLAIN (COSTS OFF) {}; ROLLBACK",
        settings(statement_timeout),
        update(plan, start, None, plan.batch_size.min(plan.limit))
    )
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

/// Evaluates a SELECT under the settings of a sweep; what it calls can change nothing.
pub fn read_only(select: &str, statement_timeout: Duration) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {}{SEARCH_PATH}{select}; COMMIT",
        settings(statement_timeout)
    )
}

/// Counts the stale rows beyond the cursor, up to one more than `bound`.
pub fn backlog(plan: &Plan, start: &Start, cursor: Option<&Cursor>, bound: i64, statement_timeout: Duration) -> String {
    let stale = stale(plan, start, cursor);
    let select = format!(
        "SELECT count(*), to_char(min({}) AT TIME ZONE 'UTC', {ISO}) FROM ({stale} LIMIT {}) AS stale",
        plan.time_started,
        bound + 1
    );
    read_only(&select, statement_timeout)
}

/// Asks how the transaction of a receipt ended.
pub fn transaction_status(receipt: &Receipt) -> String {
    format!("SELECT pg_catalog.pg_xact_status({}::pg_catalog.xid8)", literal(&receipt.xid))
}

/// Asks whether the row of a receipt carries the receipt's time.
pub fn row_status(plan: &Plan, start: &Start, receipt: &Receipt) -> String {
    let key_equals = &start.key_equals;
    let Plan { table, id, time_started, time_completed, .. } = plan;
    format!(
        "SELECT {time_completed} {EQUALS} {}::pg_catalog.timestamptz FROM {table} WHERE {time_started} {EQUALS} {} AND {id} {key_equals} {}",
        literal(&receipt.time_completed),
        literal(&receipt.row.time_started),
        literal(receipt.row.id.as_deref().unwrap_or_default())
    )
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
