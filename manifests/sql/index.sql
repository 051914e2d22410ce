-- The index that a sweep reads. Not in a transaction: CONCURRENTLY lets the application go on writing. May be run again.
--
-- When this is interrupted it leaves an invalid index, which IF NOT EXISTS takes for the real one. verify.sql then says f, and
-- so does this:
--     SELECT indisvalid FROM pg_index WHERE indexrelid = 'audit_log_incomplete_by_time_started'::regclass;
-- If it says f, run this, and then this file again:
--     DROP INDEX CONCURRENTLY audit_log_incomplete_by_time_started;
--
-- A partitioned table takes no CONCURRENTLY: it needs one index for each partition, attached to its own. For that, and
-- for whatever else is missing, audit-log-sweeper check prints the SQL.

CREATE INDEX CONCURRENTLY IF NOT EXISTS audit_log_incomplete_by_time_started
    ON audit_log (time_started, id) WHERE time_completed IS NULL;
