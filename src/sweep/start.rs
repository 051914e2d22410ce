//! The first question of a sweep, in SQL, and its answer: the cutoff, the index that is there, and the types of the columns.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_postgres::SimpleQueryMessage;

use super::open_index::{EQUALS, INDEX_ORDERED, INDEX_PENDING, NOT_DETACHING, OpenPredicate};
use super::plan::{Names, Plan, literal};
use super::transaction::{plan_triggers_as_usual, read_only};
use crate::database::session::{last_row, text};

/// Times in a form that neither DateStyle nor TimeZone changes.
pub const ISO: &str = r#"'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'"#;

/// The server's own operator, whatever an operator of that name elsewhere does.
pub const GREATER: &str = "OPERATOR(pg_catalog.>)";

/// Digits of a second that the server's clock has.
const CLOCK_DIGITS: u32 = 6;

/// What a sweep asks first. It stays the same until the sweep ends.
#[derive(Clone, Debug)]
pub struct Start {
    /// Rows that started before this are stale.
    pub cutoff: String,
    /// The same in the terms of the column of the start time. A row that it calls stale is, whatever clock changes lie between
    /// its start and now, and however coarse the column is.
    pub bound: String,
    /// How the columns of times say when something was.
    pub started: TimeColumn,
    pub completed: TimeColumn,
    /// The database's clock.
    pub now: Option<DateTime<Utc>>,
    /// The predicate of the index that is there.
    pub predicate: OpenPredicate,
    /// How a row is locked before it is updated: as the update itself does.
    pub lock: &'static str,
    /// Whether a key may be shown: a uuid or an integer is no data of the row.
    pub key_is_shown: bool,
    /// The key type's own operators, qualified: those of `citext` are in the schema of its extension.
    pub key_equals: String,
    pub key_greater: String,
}

/// How a column says when something was.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TimeColumn {
    /// `timestamp`, which says it by the clock of `spec.columns.timeZone`. Else it is `timestamptz`.
    pub local: bool,
    /// Digits of a second, where the column keeps fewer than the server's clock has.
    pub digits: Option<u32>,
}

impl TimeColumn {
    fn read(is_local: Option<&str>, typmod: Option<&str>) -> Self {
        let digits = typmod.and_then(|typmod| typmod.parse().ok()).filter(|digits| *digits < CLOCK_DIGITS);
        Self { local: is_local == Some("t"), digits }
    }

    /// The present time as the column keeps it, never later than the clock: the server rounds to the nearest. Evaluated once, before
    /// the first row is updated.
    pub fn now(self, plan: &Plan) -> String {
        let mut now = "pg_catalog.clock_timestamp()".to_owned();
        if self.local {
            now.push_str(&format!(" AT TIME ZONE {}", plan.time_zone));
        }
        if let Some(digits) = self.digits {
            let half = 0.5 / 10_f64.powi(i32::try_from(digits).unwrap_or_default());
            now = format!("({now}) OPERATOR(pg_catalog.-) '{half} seconds'::pg_catalog.interval");
        }
        format!("(SELECT {now} FROM {})", plan_triggers_as_usual())
    }

    /// A time of the column in UTC, without a zone.
    pub fn in_utc(self, time: &str, plan: &Plan) -> String {
        let zone = if self.local { format!(" AT TIME ZONE {}", plan.time_zone) } else { String::new() };
        format!("{time}{zone} AT TIME ZONE 'UTC'")
    }
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
    /// The key as [`key_text`] writes it. None: behind every row of that time.
    pub id: Option<String>,
}

/// SQL for a key in ASCII: each byte above it becomes `\ooo`, and a backslash two. The keys of a SQL_ASCII database need not be in any
/// encoding, which the driver does not read.
pub fn key_text(key: &str) -> String {
    format!(
        "pg_catalog.encode(pg_catalog.convert_to({key}::pg_catalog.text, pg_catalog.getdatabaseencoding()), 'escape')"
    )
}

/// A literal for a key as [`key_text`] writes it. Whatever else the text holds stays inside of the literal.
pub fn key_literal(text: &str) -> String {
    let mut literal = "E'".to_owned();
    let mut rest = text.chars();
    while let Some(next) = rest.next() {
        match next {
            '\'' => literal.push_str("''"),
            '\\' if rest.as_str().starts_with(|digit| matches!(digit, '0'..='3')) => literal.push('\\'),
            '\\' => {
                literal.push_str("\\\\");
                rest = rest.as_str().strip_prefix('\\').unwrap_or(rest.as_str()).chars();
            }
            other => literal.push(other),
        }
    }
    literal + "'"
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
        JOIN pg_operator o ON o.oid = s.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace)";
    let select = format!(
        "WITH RECURSIVE root AS (SELECT c.oid, c.relkind FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = {schema} AND c.relname = {table}), \
           tree AS (SELECT * FROM root UNION ALL SELECT c.oid, c.relkind FROM tree JOIN pg_inherits i \
             ON i.inhparent = tree.oid JOIN pg_class c ON c.oid = i.inhrelid WHERE tree.relkind = 'p' AND {NOT_DETACHING}), \
           type AS (SELECT a.attname, t.oid, a.atttypmod AS typmod, t.typbasetype, t.typtypmod FROM root \
             JOIN pg_attribute a ON a.attrelid = root.oid AND a.attname IN ({id}, {time_started}, {time_completed}) \
             JOIN pg_type t ON t.oid = a.atttypid \
             UNION ALL SELECT type.attname, t.oid, type.typtypmod, t.typbasetype, t.typtypmod FROM type \
             JOIN pg_type t ON t.oid = type.typbasetype), \
           key AS (SELECT * FROM type WHERE typbasetype = 0 AND attname = {id}), \
           started AS (SELECT *, oid = 'timestamp'::regtype AS local FROM type WHERE typbasetype = 0 AND attname = {time_started}), \
           completed AS (SELECT *, oid = 'timestamp'::regtype AS local FROM type WHERE typbasetype = 0 AND attname = {time_completed}), \
           clock AS (SELECT now, now - interval '{timeout} milliseconds' AS cutoff FROM clock_timestamp() AS now) \
         SELECT to_char(cutoff AT TIME ZONE 'UTC', {ISO}), to_char(now AT TIME ZONE 'UTC', {ISO}), \
           NOT EXISTS (SELECT FROM tree WHERE tree.relkind <> 'p' AND NOT {private}), {operators}, \
           (SELECT oid IN ('uuid'::regtype, 'int8'::regtype, 'int4'::regtype, 'int2'::regtype) FROM key), \
           {bound}, (SELECT local FROM started), (SELECT typmod FROM started), \
           (SELECT local FROM completed), (SELECT typmod FROM completed), {changes_a_key} FROM clock",
        schema = literal(schema),
        table = literal(table),
        id = literal(id),
        time_started = literal(time_started),
        time_completed = literal(time_completed),
        timeout = plan.timeout.as_millis(),
        bound = bound(&plan.time_zone),
        changes_a_key = changes_a_key(&plan.names),
    );
    read_only(&select, statement_timeout)
}

/// The cutoff in the terms of the column. A clock that was turned back since then showed an earlier time later: only up to
/// 24 hours after the cutoff can that be before what it showed at the cutoff. An application may cut a time off at the digits
/// that the column keeps, so a row may count as a digit older than it is.
pub fn bound(zone: &str) -> String {
    format!(
        "(SELECT CASE WHEN local \
            THEN to_char(least(cutoff AT TIME ZONE {zone}, p AT TIME ZONE {zone} - (p - cutoff)) - digit, 'YYYY-MM-DD HH24:MI:SS.US') \
            ELSE to_char((cutoff - digit) AT TIME ZONE 'UTC', {ISO}) END \
          FROM started, least(now, cutoff + interval '24 hours') AS p, \
            make_interval(secs => CASE WHEN typmod BETWEEN 0 AND 5 THEN 10.0 ^ -typmod ELSE 0 END) AS digit)"
    )
}

/// The columns `r` that the generated column `a` is computed from. Since 15 its expression depends on them, before it was the
/// column itself.
pub const COMPUTED_FROM: &str = "pg_attrdef f JOIN pg_depend d ON (d.classid, d.objid) = ('pg_attrdef'::regclass, f.oid) \
      OR (d.classid, d.objid, d.objsubid) = ('pg_class'::regclass, f.adrelid, f.adnum::int) \
    JOIN pg_attribute r ON r.attrelid = f.adrelid AND r.attnum = d.refobjsubid \
    WHERE a.attgenerated <> '' AND (f.adrelid, f.adnum) = (a.attrelid, a.attnum) AND d.refclassid = 'pg_class'::regclass \
      AND d.refobjid = a.attrelid AND d.refobjsubid <> a.attnum AND d.refobjsubid > 0";

/// Whether an update changes a column that foreign keys could refer to. It then waits for transactions that insert a reference,
/// unless the row is locked as strongly before. A generated column changes with those that it is computed from. Source: `RelationGetIndexAttrBitmap` in PostgreSQL's `relcache.c`.
fn changes_a_key(names: &Names) -> String {
    let set = names.complete.iter().map(|(name, _)| name).chain([&names.time_completed]);
    let set = set.map(|name| literal(name)).collect::<Vec<_>>().join(", ");
    format!(
        "EXISTS (SELECT FROM tree JOIN pg_index x ON x.indrelid = tree.oid \
           JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = ANY ((x.indkey::int2[])[0 : x.indnkeyatts - 1]) \
         WHERE x.indisunique AND x.indislive AND x.indexprs IS NULL AND x.indpred IS NULL \
           AND (a.attname IN ({set}) \
             OR a.attgenerated <> '' AND EXISTS (SELECT FROM {COMPUTED_FROM} AND r.attname IN ({set}))))"
    )
}

/// Reads the answer of [`start`].
pub fn read_start(answer: &[SimpleQueryMessage]) -> Option<Start> {
    let row = last_row(answer)?;
    // A type without operators of its own has those of a type it is the same as, such as varchar and text.
    let operators = text(row, 3).and_then(|json| serde_json::from_str(json).ok());
    let [key_equals, key_greater] = operators.unwrap_or_else(|| [EQUALS, GREATER].map(str::to_owned));
    Some(Start {
        cutoff: text(row, 0)?.to_owned(),
        bound: text(row, 5).or(text(row, 0))?.to_owned(),
        started: TimeColumn::read(text(row, 6), text(row, 7)),
        completed: TimeColumn::read(text(row, 8), text(row, 9)),
        lock: if text(row, 10) == Some("t") { "UPDATE" } else { "NO KEY UPDATE" },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_literal_of_a_key_ends_where_the_key_ends() {
        for (text, literal) in [
            ("a-1", "E'a-1'"),
            (r"\351\\x", r"E'\351\\x'"),
            ("it's", "E'it''s'"),
            // As no server writes it.
            (r"\' OR true --", r"E'\\'' OR true --'"),
            (r"x\", r"E'x\\'"),
            (r"\\\", r"E'\\\\'"),
        ] {
            assert_eq!(key_literal(text), literal, "{text}");
        }
    }
}
