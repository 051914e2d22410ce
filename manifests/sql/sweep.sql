-- One batch of a sweep, for those who do without the operator: psql from a CronJob, pg_cron, a loop in the service. Needs the
-- index of index.sql. Run it again, soon, for as long as it says UPDATE 1000. Why each piece is as it is: docs/design.md.

BEGIN;
-- Whatever statistics there are, the index is the way.
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off;
SET LOCAL enable_sort = off;
SET LOCAL statement_timeout = '30s';

WITH stale AS MATERIALIZED (
    SELECT time_started, id FROM public.audit_log
    -- Exactly the predicate of the index.
    WHERE pg_catalog.num_nulls(time_completed) = 1 AND time_started < clock_timestamp() - interval '4 hours'
    ORDER BY time_started, id LIMIT 1000
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE public.audit_log AS t SET time_completed = clock_timestamp(), result_kind = 'timeout'
FROM stale
WHERE t.time_started = stale.time_started AND t.id = stale.id AND (t.time_completed IS NULL) IS TRUE;
COMMIT;
