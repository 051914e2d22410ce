-- A schema that an attacker fills with lookalikes of everything in pg_catalog: functions, operators, and types (domains with
-- a CHECK). Each tells the server's log that it ran, and then does what the server's own does.
CREATE SCHEMA evil;
GRANT USAGE ON SCHEMA evil TO PUBLIC;
SET search_path = pg_catalog;
CREATE FUNCTION evil.steal(what text) RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE stack text;
BEGIN
  GET DIAGNOSTICS stack = PG_CONTEXT;
  -- One call from a statement of the session itself; more are those of the table's own triggers and functions.
  IF (array_length(string_to_array(stack, 'PL/pgSQL function'), 1) <= (CASE WHEN what LIKE 'type %' THEN 2 ELSE 3 END)) THEN
    RAISE LOG 'HIJACKED: % in %', what, left(translate(current_query(), E'\n', ' '), 2000);
  END IF;
  RETURN true;
END $$;
DO $$
DECLARE f record; made text;
BEGIN
  FOR f IN
    SELECT p.oid, p.proname, p.prorettype::regtype AS result, coalesce(r.types, '') AS types, coalesce(r.args, '') AS args
    FROM pg_proc p
    LEFT JOIN LATERAL (
      SELECT string_agg(a.type::regtype::text, ', ' ORDER BY a.n) AS types, string_agg('$' || a.n, ', ' ORDER BY a.n) AS args,
        bool_or(t.typtype = 'p') AS pseudo
      FROM unnest(p.proargtypes::oid[]) WITH ORDINALITY AS a(type, n) JOIN pg_type t ON t.oid = a.type
    ) r ON true
    WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f' AND NOT p.proretset AND p.provariadic = 0
      AND NOT coalesce(r.pseudo, false)
      AND (SELECT t.typtype FROM pg_type t WHERE t.oid = p.prorettype) <> 'p'
  LOOP
    made := format('CREATE FUNCTION evil.%I(%s) RETURNS %s LANGUAGE plpgsql AS %L', f.proname, f.types, f.result,
      format('BEGIN PERFORM evil.steal(%L); RETURN pg_catalog.%I(%s); END', 'function ' || f.oid::regprocedure, f.proname, f.args));
    BEGIN EXECUTE made; EXCEPTION WHEN OTHERS THEN RAISE NOTICE '% %', SQLERRM, made; END;
  END LOOP;
  FOR f IN
    SELECT o.oprname, o.oprleft::regtype AS l, o.oprright::regtype AS r, p.proname
    FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode
    WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND o.oprleft <> 0
      AND EXISTS (SELECT FROM pg_proc e WHERE e.pronamespace = 'evil'::regnamespace AND e.proname = p.proname
        AND e.proargtypes = p.proargtypes AND p.proargtypes = array_to_string(ARRAY[o.oprleft, o.oprright], ' ')::oidvector)
  LOOP
    EXECUTE format('CREATE OPERATOR evil.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = evil.%I)', f.oprname, f.l, f.r, f.proname);
  END LOOP;
  FOR f IN SELECT unnest(ARRAY['text', 'name', 'timestamptz', 'timestamp', 'uuid', 'oid', 'json', 'jsonb', 'regclass', 'regtype', 'regrole',
    'regcollation', 'xid', 'xid8', 'int2', 'int4', 'int8', 'bool', 'numeric', 'bytea', 'inet']) AS type
  LOOP
    EXECUTE format('CREATE DOMAIN evil.%I AS pg_catalog.%1$I CHECK (evil.steal(%L))', f.type, 'type ' || f.type);
  END LOOP;
END $$;
