-- Whether everything is there that a sweep needs. Changes nothing. Every line must say t; where one says f, see the last column.

SELECT wanted, coalesce(found, false) AS found, mended_by
FROM (
    SELECT to_regclass('public.audit_log') AS log, (SELECT oid FROM pg_roles WHERE rolname = 'audit_log_sweeper') AS sweeper
) AS it
CROSS JOIN LATERAL (VALUES
    ('the table', log IS NOT NULL, 'table.sql'),
    ('a valid index of the open rows by time and key', (
        SELECT bool_or(
            i.indisvalid
            AND pg_get_expr(i.indpred, i.indrelid) = '(num_nulls(time_completed) = 1)'
            AND pg_get_indexdef(i.indexrelid, 1, true) = 'time_started'
            AND pg_get_indexdef(i.indexrelid, 2, true) = 'id'
        ) FROM pg_index AS i WHERE i.indrelid = log
    ), 'index.sql'),
    ('the role', sweeper IS NOT NULL, 'role.sql'),
    ('its way into the schema', has_schema_privilege(sweeper, 'public', 'USAGE'), 'role.sql'),
    ('its right to read the key and the times', (
        SELECT bool_and(has_column_privilege(sweeper, log, name, 'SELECT'))
        FROM unnest('{id,time_started,time_completed}'::text[]) AS name WHERE log IS NOT NULL
    ), 'role.sql'),
    ('its right to complete a row', (
        SELECT bool_and(has_column_privilege(sweeper, log, name, 'UPDATE'))
        FROM unnest('{time_completed,result_kind}'::text[]) AS name WHERE log IS NOT NULL
    ), 'role.sql'),
    -- Any of these on the table as a whole, or a look at what else is in a row.
    ('no right to more than that', NOT has_table_privilege(sweeper, log, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE') AND NOT EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = log AND a.attnum > 0 AND NOT a.attisdropped
            AND a.attname NOT IN ('id', 'time_started', 'time_completed')
            AND has_column_privilege(sweeper, log, a.attnum, 'SELECT')
    ), 'REVOKE')
) AS checks (wanted, found, mended_by);
