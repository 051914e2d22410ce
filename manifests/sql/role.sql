-- The rights that a sweep needs, and no others: it cannot read what was requested or by whom. May be run again.
-- A login gets them as a member:
--     CREATE ROLE app_sweeper LOGIN PASSWORD '...' IN ROLE audit_log_sweeper;

DO $$ BEGIN
    CREATE ROLE audit_log_sweeper NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END $$;

GRANT USAGE ON SCHEMA public TO audit_log_sweeper;

-- SELECT: the three columns of spec.columns. UPDATE: the time completed and the columns of spec.complete.
GRANT SELECT (id, time_started, time_completed), UPDATE (time_completed, result_kind)
    ON public.audit_log TO audit_log_sweeper;
