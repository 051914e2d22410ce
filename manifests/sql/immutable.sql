-- Optional: makes complete rows immutable. A completion without the guard (`AND time_completed IS NULL`) that comes after
-- `timeout` then fails, in place of rewriting what readers have seen. You may run it again. PostgreSQL 13 or later.
--
-- The condition is part of the trigger, so the completion of an open row never calls the function. Deletes are not its concern.

BEGIN;

CREATE OR REPLACE FUNCTION audit_log_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION 'the row % of % is complete and cannot be changed', OLD.id, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation',
              HINT = 'Complete a row with "WHERE id = ... AND time_completed IS NULL", and see how many rows that changed.';
END $$;

DROP TRIGGER IF EXISTS audit_log_complete_is_final ON audit_log;
CREATE TRIGGER audit_log_complete_is_final BEFORE UPDATE ON audit_log
    FOR EACH ROW WHEN (OLD.time_completed IS NOT NULL) EXECUTE FUNCTION audit_log_refuse_change();

COMMIT;
