-- An audit log: a row is written when a request starts and completed when it ends.
-- Goes into the first schema of the search_path. May be run again. PostgreSQL 13 or later.

DO $$ BEGIN
    CREATE TYPE audit_log_actor_kind AS ENUM ('user_builtin', 'silo_user', 'unauthenticated', 'scim');
EXCEPTION WHEN duplicate_object THEN NULL;
END $$;

DO $$ BEGIN
    CREATE TYPE audit_log_result_kind AS ENUM ('success', 'error', 'timeout');
EXCEPTION WHEN duplicate_object THEN NULL;
END $$;

DO $$ BEGIN
    CREATE TYPE audit_log_auth_method AS ENUM ('session_cookie', 'access_token', 'scim_token', 'spoof');
EXCEPTION WHEN duplicate_object THEN NULL;
END $$;

CREATE TABLE IF NOT EXISTS audit_log (
    id               uuid PRIMARY KEY,

    -- Known when the request starts.
    time_started     timestamptz NOT NULL,
    request_id       varchar(63) NOT NULL,
    request_uri      varchar(512) NOT NULL,
    operation_id     varchar(512) NOT NULL,
    source_ip        inet NOT NULL,
    user_agent       varchar(256),
    actor_id         uuid,
    actor_silo_id    uuid,
    actor_kind       audit_log_actor_kind NOT NULL,

    -- Known when it ends.
    time_completed   timestamptz,
    http_status_code int4,
    error_code       text,
    error_message    text,
    result_kind      audit_log_result_kind,

    -- How the actor proved who it is, and with which session or token.
    auth_method      audit_log_auth_method,
    credential_id    uuid,

    -- A completed row says how it ended.
    CONSTRAINT audit_log_completed_with_result
        CHECK ((time_completed IS NULL) = (result_kind IS NULL)),

    -- Only an answered request has a status, only a failed one an error. A row that timed out, or is still open, has neither.
    CONSTRAINT audit_log_result_has_its_details CHECK (CASE result_kind
        WHEN 'success' THEN http_status_code IS NOT NULL AND num_nonnulls(error_code, error_message) = 0
        WHEN 'error' THEN http_status_code IS NOT NULL AND error_message IS NOT NULL
        ELSE num_nonnulls(http_status_code, error_code, error_message) = 0
    END),

    -- Users have an id; users of a silo and SCIM clients have a silo.
    CONSTRAINT audit_log_actor_has_its_ids CHECK (
        (actor_id IS NOT NULL) = (actor_kind IN ('user_builtin', 'silo_user'))
        AND (actor_silo_id IS NOT NULL) = (actor_kind IN ('silo_user', 'scim'))
    ),

    -- Sessions and tokens have an id; whoever spoofs or does not authenticate has none.
    CONSTRAINT audit_log_credential_has_its_id CHECK (
        (credential_id IS NOT NULL) = (auth_method IS NOT NULL AND auth_method <> 'spoof')
    )
);

-- The order in which readers page through the log.
CREATE UNIQUE INDEX IF NOT EXISTS audit_log_by_time_completed
    ON audit_log (time_completed, id) WHERE time_completed IS NOT NULL;

-- What readers see.
CREATE OR REPLACE VIEW audit_log_complete AS
    SELECT * FROM audit_log WHERE time_completed IS NOT NULL AND result_kind IS NOT NULL;
