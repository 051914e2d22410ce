//! The settings of every transaction of a sweep: limits that the server keeps, and plans that stay good.

use std::time::Duration;

/// Waiting for a lock longer than this is a schema change.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// At most these: of a statement, and of a lock.
const OPTIMISTIC_LIMITS: (Duration, Duration) = (Duration::from_millis(250), Duration::from_millis(10));

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

    /// Limits of an optimistic batch, which waits for rows in use. They bound how long a request waits for the rows that it holds
    /// meanwhile.
    pub fn optimistic(statement: Duration) -> Self {
        let Self { statement, lock } = Self::of(statement);
        Self { statement: statement.min(OPTIMISTIC_LIMITS.0), lock: lock.min(OPTIMISTIC_LIMITS.1) }
    }
}

/// Settings of the planner, while it plans a statement of a sweep and while triggers run.
///
/// The one good plan walks the partial index in order. With statistics from before a backlog, or none, the planner prefers
/// plans that cost a thousand times as much. A trigger may need any plan. One that runs once for each statement runs
/// before [`plan_triggers_as_usual`]; its plans are not kept, so none of them outlives these settings.
const PLANNER: [(&str, &str, &str); 7] = [
    ("enable_seqscan", "off", "on"),
    ("enable_bitmapscan", "off", "on"),
    ("enable_hashjoin", "off", "on"),
    ("enable_mergejoin", "off", "on"),
    ("enable_sort", "off", "on"),
    ("enable_incremental_sort", "off", "on"),
    ("plan_cache_mode", "force_custom_plan", "auto"),
];

/// A row as a source of an expression of the statement: as that is evaluated, the statement is planned, and what is planned
/// from then on is planned as usual.
pub fn plan_triggers_as_usual() -> String {
    let values = PLANNER.map(|(name, _, usual)| format!("('{name}', '{usual}')"));
    format!("({}) AS settings", set(&values))
}

/// Begins a transaction that may write.
pub fn begin(limits: Limits) -> String {
    let settings = settings(limits);
    format!("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {settings}; SET CONSTRAINTS ALL IMMEDIATE; ")
}

/// One statement, since each costs.
fn settings(limits: Limits) -> String {
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
        ("jit", "off"),
    ];
    let all = limits.iter().map(|(name, value)| (*name, value.as_str())).chain(fixed);
    let all = all.chain(PLANNER.map(|(name, value, _)| (name, value)));
    let mut values: Vec<_> = all.map(|(name, value)| format!("('{name}', '{value}')")).collect();
    // The keys of a batch must fit into a hash table.
    let work_mem = "pg_catalog.concat(GREATEST(16384, pg_catalog.pg_size_bytes(pg_catalog.current_setting('work_mem')) \
        OPERATOR(pg_catalog./) 1024), 'kB')";
    values.push(format!("('work_mem', {work_mem})"));
    set(&values)
}

/// Sets all of these. Local to the transaction: a pooler hands a session's settings on to the next client.
fn set(values: &[String]) -> String {
    format!(
        "SELECT pg_catalog.count(pg_catalog.set_config(name, value, true)) FROM (VALUES {}) AS settings (name, value)",
        values.join(", ")
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
        "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {}; {SEARCH_PATH}{select}",
        settings(Limits::of(statement_timeout))
    )
}
