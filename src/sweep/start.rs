//! The first question of a sweep, in SQL, and its answer: the cutoff, the index that is there, and the types of the columns.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_postgres::SimpleQueryMessage;

use super::open_index::{EQUALS, INDEX_ORDERED, INDEX_PENDING, NOT_DETACHING, OpenPredicate};
use super::plan::{Names, Plan, literal};
use super::transaction::read_only;
use crate::database::session::{last_row, text};

/// Times in a form that neither DateStyle nor TimeZone changes.
pub const ISO: &str = r#"'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"#;

/// The server's own operator, whatever an operator of that name elsewhere does.
pub const GREATER: &str = "OPERATOR(pg_catalog.>)";

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
    pub key_equals: String,
    pub key_greater: String,
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

/// Reads a time written in [`ISO`]; None for times that no calendar has, such as `-infinity`.
pub fn read_time(text: &str) -> Option<DateTime<Utc>> {
    DateTime::parse_from_rfc3339(text).ok().map(|time| time.to_utc())
}
