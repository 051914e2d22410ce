-- The index of open rows that a sweep reads. Run it outside a transaction: CONCURRENTLY lets the application keep writing.
-- You may run it again.
--
-- The predicate is spelled so that only the sweep uses the index. With `WHERE time_completed IS NULL`, PostgreSQL also uses it
-- for your application's `UPDATE ... WHERE id = $1 AND time_completed IS NULL`, and completions become slower and slower until
-- vacuum comes.
--
-- An interrupted run leaves an invalid index, and IF NOT EXISTS then does nothing. verify.sql shows f in that case, and so does
-- this query:
--     SELECT indisvalid FROM pg_index WHERE indexrelid = 'audit_log_open_by_time_started'::regclass;
-- If it shows f, run this statement and then this file again:
--     DROP INDEX CONCURRENTLY audit_log_open_by_time_started;
--
-- To replace the index of an earlier version, run this file first. Then run:
--     DROP INDEX CONCURRENTLY audit_log_incomplete_by_time_started;
--
-- A partitioned table does not take CONCURRENTLY: each partition needs its own index, attached to that of the table.
-- `audit-log-sweeper check` prints this SQL, and the SQL for everything else that is missing.

CREATE INDEX CONCURRENTLY IF NOT EXISTS audit_log_open_by_time_started
    ON audit_log (time_started, id) WHERE pg_catalog.num_nulls(time_completed) = 1;
