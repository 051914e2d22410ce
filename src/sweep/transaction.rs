//! The settings of every transaction of a sweep: limits that the server keeps, and plans that stay good.

use std::time::Duration;

/// Waiting for a lock longer than this is a schema change.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// A client that was stopped or cut off must not hold its row locks for long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// For a transaction that runs no trigger. Without `pg_temp`, a temporary type or table would come before `pg_catalog`.
/// The server also writes expressions down in one form, with quotes only where they are needed.
pub const SEARCH_PATH: &str = "SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL quote_all_identifiers = off; ";

/// Limits that the server keeps for one transaction. SET LOCAL only: a pooler hands a session's settings on to the
/// next client.
pub fn settings(statement_timeout: Duration) -> String {
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
    format!("BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {}{SEARCH_PATH}{select}", settings(statement_timeout))
}
