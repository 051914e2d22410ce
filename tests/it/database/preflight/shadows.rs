//! Functions and operators that somebody made in a schema of the path, to be taken for the server's own: none is run.

use audit_log_sweeper::sweep::sweep;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::Stage;

/// Each tells that it was run, and then does what the server's own does. All fit better than those: a key of type
/// varchar, and a value of type text.
const SHADOWS: &str = "
    CREATE TABLE loot (what text); GRANT INSERT ON loot TO PUBLIC;
    CREATE FUNCTION tell(what text) RETURNS void LANGUAGE sql AS $$ INSERT INTO public.loot VALUES (what) $$;
    CREATE FUNCTION eq(varchar, varchar) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
      PERFORM public.tell('='); RETURN $1::text OPERATOR(pg_catalog.=) $2::text; END $$;
    CREATE FUNCTION lt(varchar, varchar) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
      PERFORM public.tell('<'); RETURN $1::text OPERATOR(pg_catalog.<) $2::text; END $$;
    CREATE FUNCTION gt(varchar, varchar) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
      PERFORM public.tell('>'); RETURN $1::text OPERATOR(pg_catalog.>) $2::text; END $$;
    CREATE OPERATOR = (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = eq);
    CREATE OPERATOR < (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = lt);
    CREATE OPERATOR > (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = gt);
    CREATE FUNCTION append(text[], text) RETURNS text[] LANGUAGE plpgsql AS $$ BEGIN
      PERFORM public.tell('array_agg'); RETURN pg_catalog.array_append($1, $2); END $$;
    CREATE AGGREGATE array_agg(text) (sfunc = append, stype = text[]);
    CREATE FUNCTION pg_typeof(varchar) RETURNS regtype LANGUAGE plpgsql AS $$ BEGIN
      PERFORM public.tell('pg_typeof'); RETURN 'text'::regtype; END $$;
    CREATE FUNCTION num_nonnulls(text) RETURNS integer LANGUAGE plpgsql AS $$ BEGIN
      PERFORM public.tell('num_nonnulls'); RETURN 1; END $$;
    CREATE FUNCTION json_build_object(text, text, text, integer, text, text, text, boolean, text, name, text, boolean)
      RETURNS json LANGUAGE plpgsql AS $$ BEGIN
      PERFORM public.tell('json_build_object');
      RETURN pg_catalog.json_build_object('version', '15', 'number', 150000, 'product', 'PostgreSQL',
        'standby', false, 'user', current_user::text, 'bypass', true); END $$;";

/// The table is older than the shadows, so that what it says itself is the server's own. One row is refused.
const TABLE: &str = "
    CREATE TABLE audit_log (id varchar PRIMARY KEY, time_started timestamptz NOT NULL, time_completed timestamptz,
      result_kind text, CONSTRAINT kind CHECK (num_nonnulls(result_kind) <= 1));
    CREATE INDEX sweep_index ON audit_log (time_started, id) WHERE num_nulls(time_completed) = 1;
    INSERT INTO audit_log SELECT 'row ' || n, now() - interval '9 h' + n / 2 * interval '1 s' FROM generate_series(1, 6) AS n;
    ALTER TABLE audit_log ADD CONSTRAINT not_the_third CHECK (id <> 'row 3' OR time_completed IS NULL) NOT VALID;";

#[tokio::test]
async fn no_function_or_operator_of_another_schema_is_run() {
    let stage = Stage::new(&format!("{TABLE}{SHADOWS}")).await;
    // What one may not run may not have been reached either.
    stage.log.run("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO PUBLIC").await;
    let spec = json!({ "batchSize": 2 });
    let checked = stage.check(&spec).await;
    let looted = async || {
        let rows = stage.log.client.query("SELECT DISTINCT what FROM loot", &[]).await.unwrap();
        rows.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>()
    };
    assert_eq!(looted().await, [""; 0], "{checked:#?}");
    let said = format!("{:?}", checked.findings);
    assert!(checked.ready() && !said.contains("could not be tried") && !said.contains("would read"), "{said}");

    let report = sweep(&stage.job(spec), &CancellationToken::new()).await;
    assert_eq!(looted().await, [""; 0], "{report:?}");
    let open = stage.log.client.query("SELECT id FROM audit_log WHERE time_completed IS NULL", &[]).await.unwrap();
    let open: Vec<String> = open.iter().map(|row| row.get(0)).collect();
    assert_eq!((open, report.timed_out, report.refused), (vec!["row 3".to_owned()], 5, 1), "{report:?}");
}
