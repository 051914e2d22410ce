//! The settings of every transaction of a sweep: limits that the server keeps, and plans that stay good.

use std::time::Duration;

use super::open_index::OpenPredicate;

/// Waiting for a lock longer than this is a schema change.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// The limits of a transaction that may make others wait: of a statement, and of a lock.
const UNNOTICED: (Duration, Duration) = (Duration::from_millis(250), Duration::from_millis(10));

/// A client that was stopped or cut off must not hold its row locks for long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// For a transaction that runs no trigger. Without `pg_temp`, a temporary type or table would come before `pg_catalog`.
/// The server also writes expressions down in one form, with quotes only where they are needed.
pub const SEARCH_PATH: &str = "SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL quote_all_identifiers = off; ";

/// Limits that the server keeps for one transaction.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub statement: Duration,
    /// Of each wait for a lock.
    pub lock: Duration,
}

impl Limits {
    /// The wait for a lock ends first: the server would else call it a slow statement.
    pub fn of(statement: Duration) -> Self {
        Self { statement, lock: LOCK_TIMEOUT.min(statement / 2) }
    }

    /// The same, but so short that nobody notices whom the transaction made wait.
    pub fn unnoticed(self) -> Self {
        Self { statement: self.statement.min(UNNOTICED.0), lock: self.lock.min(UNNOTICED.1) }
    }
}

/// Begins a transaction that may write. Only the update beside the plain index is a join. Without need, no kind of join is
/// switched off: triggers may need it.
pub fn begin(limits: Limits, predicate: OpenPredicate) -> String {
    let joins: &[_] = match predicate {
        OpenPredicate::Private => &[],
        OpenPredicate::Plain => &["enable_hashjoin", "enable_mergejoin"],
    };
    let settings = settings(limits, joins);
    format!("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {settings}SET CONSTRAINTS ALL IMMEDIATE; ")
}

/// Local to the transaction: a pooler hands a session's settings on to the next client. One statement, since each costs.
fn settings(limits: Limits, off: &[&str]) -> String {
    // Zero would switch a limit off.
    let millis = |limit: Duration| limit.as_millis().max(1).to_string();
    let limits = [
        ("statement_timeout", millis(limits.statement)),
        ("lock_timeout", millis(limits.lock)),
        ("idle_in_transaction_session_timeout", millis(IDLE_TIMEOUT)),
    ];
    let fixed = [
        ("row_security", "off"),
        ("DateStyle", "ISO, YMD"),
        ("TimeZone", "UTC"),
        ("client_min_messages", "error"),
        // Also the plans that triggers make are not kept, so none of them outlives these settings.
        ("plan_cache_mode", "force_custom_plan"),
        ("jit", "off"),
        // The one good plan walks the partial index in order. With statistics from before a backlog, or none, the planner
        // prefers plans that cost a thousand times as much.
        ("enable_seqscan", "off"),
        ("enable_bitmapscan", "off"),
        ("enable_sort", "off"),
        ("enable_incremental_sort", "off"),
    ];
    let off = off.iter().map(|name| (*name, "off"));
    let settings = limits.iter().map(|(name, value)| (*name, value.as_str())).chain(fixed).chain(off);
    let settings: String = settings.map(|(name, value)| format!("('{name}', '{value}'), ")).collect();
    // The keys of a batch must fit into a hash table.
    let work_mem = "pg_catalog.concat(GREATEST(16384, pg_catalog.pg_size_bytes(pg_catalog.current_setting('work_mem')) \
        OPERATOR(pg_catalog./) 1024), 'kB')";
    format!(
        "SELECT pg_catalog.count(pg_catalog.set_config(name, value, true)) \
         FROM (VALUES {settings}('work_mem', {work_mem})) AS settings (name, value); "
    )
}

/// Evaluates a SELECT under the settings of a sweep; what it calls can change nothing. Committed: a monitor of the server may watch
/// rollbacks.
pub fn read_only(select: &str, statement_timeout: Duration) -> String {
    format!("{}; COMMIT", evaluate(select, statement_timeout))
}

/// The same for expressions of the table, whose functions are anybody's: a read-only transaction that is committed still
/// notifies, and before 16 makes large objects.
pub fn trial(select: &str, statement_timeout: Duration) -> String {
    format!("{}; ROLLBACK", evaluate(select, statement_timeout))
}

fn evaluate(select: &str, statement_timeout: Duration) -> String {
    format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {}{SEARCH_PATH}{select}",
        settings(Limits::of(statement_timeout), &[])
    )
}
