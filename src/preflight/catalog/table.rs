//! The question about the table itself: its columns, rules, triggers and constraints. A part of `catalog`.

use crate::preflight::json::list;
use crate::sweep::Plan;
use crate::sweep::plan::literal;
use crate::sweep::start::COMPUTED_FROM;

pub(super) fn question(plan: &Plan) -> String {
    let (columns, triggers, constraints) = (columns(), triggers(plan), constraints());
    let rules = list(
        "r.rulename ORDER BY r.rulename",
        "pg_rewrite r WHERE r.ev_class = c.oid AND r.ev_type = '2' AND r.ev_enabled IN ('O', 'A')",
    );
    let parent = "coalesce((SELECT min('table ' || h.inhparent::regclass::text) FROM pg_inherits h WHERE h.inhrelid = c.oid), \
         'type ' || nullif(c.reloftype, 0)::regtype::text)";
    format!(
        "SELECT json_build_object('owner', pg_get_userbyid(c.relowner), 'owned', pg_has_role(c.relowner, 'USAGE'), \
           'parent', {parent}, \
           'row_security', c.relrowsecurity, 'force_row_security', c.relforcerowsecurity, 'columns', {columns}, \
           'rules', {rules}, 'triggers', {triggers}, 'constraints', {constraints}) \
         FROM pg_class c WHERE c.oid = (SELECT tree.oid FROM tree WHERE tree.level = 0)"
    )
}

fn columns() -> String {
    let generated = "a.attgenerated <> '' OR a.attidentity = 'a'";
    // Since 18 a NOT NULL can be NOT VALID: old rows may hold a NULL.
    let not_null = "a.attnotnull AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conrelid = c.oid \
                    AND k.contype = 'n' AND NOT k.convalidated AND k.conkey[1] = a.attnum)";
    // A column of a partition key, be it in an expression, depends on its table.
    // A domain may refuse NULL, too.
    let not_null = format!(
        "({not_null} OR EXISTS (WITH RECURSIVE b AS (SELECT t.typnotnull, t.typbasetype UNION ALL \
           SELECT u.typnotnull, u.typbasetype FROM b JOIN pg_type u ON u.oid = b.typbasetype) SELECT FROM b WHERE typnotnull))"
    );
    let partition_key = "EXISTS (SELECT FROM tree JOIN pg_attribute p ON p.attrelid = tree.oid AND p.attname = a.attname \
                         JOIN pg_partitioned_table t ON t.partrelid = tree.oid WHERE p.attnum = ANY (t.partattrs::int2[]) \
                         OR EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = tree.oid \
                         AND d.objsubid = p.attnum AND d.refclassid = 'pg_class'::regclass AND d.refobjid = tree.oid \
                         AND d.refobjsubid = 0 AND d.deptype = 'i'))";
    let collate =
        "CASE WHEN a.attcollation <> t.typcollation THEN ' COLLATE ' || a.attcollation::regcollation ELSE '' END";
    let expression = "(SELECT pg_get_expr(f.adbin, f.adrelid) FROM pg_attrdef f \
                      WHERE f.adrelid = c.oid AND f.adnum = a.attnum AND a.attgenerated <> '')";
    let reads = list("DISTINCT r.attname", COMPUTED_FROM);
    let labels = "(SELECT json_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = t.oid)";
    let base = |what: &str| {
        format!(
            "(WITH RECURSIVE b AS (SELECT t.oid, t.typbasetype, a.atttypmod AS typmod, t.typtypmod \
             UNION ALL SELECT u.oid, u.typbasetype, b.typtypmod, u.typtypmod FROM b JOIN pg_type u ON u.oid = b.typbasetype) SELECT {what} FROM b JOIN pg_type u ON u.oid = b.oid \
             JOIN pg_namespace un ON un.oid = u.typnamespace WHERE b.typbasetype = 0)"
        )
    };
    let (base_schema, base_type, typmod) = (base("un.nspname"), base("u.typname"), base("b.typmod"));
    let base_usage = base("has_schema_privilege(un.oid, 'USAGE')");
    let base_owner = base("pg_get_userbyid(un.nspowner)");
    list(
        &format!(
            "json_build_object('name', a.attname, 'type_schema', tn.nspname, 'type', t.typname, \
             'type_text', format_type(a.atttypid, a.atttypmod), 'collate', {collate}, 'typmod', {typmod}, \
             'not_null', {not_null}, 'generated', {generated}, 'partition_key', {partition_key}, \
             'select', has_column_privilege(c.oid, a.attnum, 'SELECT'), \
             'update', has_column_privilege(c.oid, a.attnum, 'UPDATE'), \
             'labels', {labels}, 'type_owner', pg_get_userbyid(t.typowner), \
             'base_schema', {base_schema}, 'base', {base_type}, \
             'base_usage', {base_usage}, 'base_schema_owner', {base_owner}, 'expression', {expression}, 'reads', {reads}) ORDER BY a.attnum"
        ),
        "pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace \
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped",
    )
}

/// The bits of tgtype: 1 for each row, 2 before, 16 on update. What a partition got from the table is its parent's.
fn triggers(plan: &Plan) -> String {
    // The condition of `manifests/sql/immutable.sql`: no row that is open meets it.
    let of_complete_rows =
        format!("format(' WHEN ((old.%I IS NOT NULL)) EXECUTE FUNCTION ', {})", literal(&plan.names.time_completed));
    let of_columns = list(
        "a.attname",
        "pg_attribute a WHERE a.attrelid = g.tgrelid AND a.attnum = ANY (g.tgattr::int2[]) AND a.attnum > 0",
    );
    list(
        &format!(
            "json_build_object('name', g.tgname, 'function', p.proname, 'before', g.tgtype & 2 <> 0, \
             'for_each_row', g.tgtype & 1 <> 0, 'columns', {of_columns}, 'of_complete_rows', position({of_complete_rows} \
             IN pg_get_triggerdef(g.oid)) > 0) ORDER BY g.tgname"
        ),
        "pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid WHERE g.tgrelid IN (SELECT tree.oid FROM tree) \
         AND NOT g.tgisinternal AND g.tgparentid = 0 AND g.tgtype & 16 <> 0 AND g.tgenabled IN ('O', 'A')",
    )
}

/// A CHECK without columns has no conkey.
fn constraints() -> String {
    let of_constraint = list(
        "a.attname ORDER BY a.attnum",
        "unnest(k.conkey) AS key(attnum) LEFT JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = key.attnum",
    );
    list(
        &format!(
            "json_build_object('schema', s.nspname, 'table', o.relname, 'owner', pg_get_userbyid(o.relowner), \
             'name', k.conname, 'validated', k.convalidated, \
             'expression', pg_get_expr(k.conbin, k.conrelid), 'columns', {of_constraint}) ORDER BY o.relname, k.conname"
        ),
        "pg_constraint k JOIN pg_class o ON o.oid = k.conrelid JOIN pg_namespace s ON s.oid = o.relnamespace \
         WHERE k.conrelid IN (SELECT tree.oid FROM tree) AND k.contype IN ('c', 'f') AND k.coninhcount = 0 \
         AND coalesce((to_jsonb(k) ->> 'conenforced')::boolean, true)",
    )
}
