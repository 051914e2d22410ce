//! What is made of a column and so has a say when its type is altered: the part of `catalog` that asks for it.

use serde::Deserialize;

use super::json::list;

/// Something that is made of a column.
#[derive(Clone, Debug, Deserialize)]
pub struct Dependant {
    /// Kind and name, quoted, such as `view public.shown`.
    pub name: String,
    pub hold: Hold,
}

/// How a dependant takes it that the type of its column is altered.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Hold {
    /// PostgreSQL refuses.
    Always,
    /// PostgreSQL refuses unless values stay as they are.
    Type,
    /// PostgreSQL makes it again, and refuses if that fails with the new type.
    Maybe,
}

/// Asks, as part of the question about the catalog, what depends on the column `a` of `c`, or on that of a partition by the same name.
pub(super) fn question() -> String {
    let found = found();
    list(
        "json_build_object('name', y.name, 'hold', y.hold) ORDER BY y.hold, y.name",
        &format!(
            "(SELECT coalesce(x.kind, i.type) || ' ' || i.identity AS name, min(x.hold) AS hold FROM (\
               SELECT x.* FROM tree JOIN pg_attribute p ON p.attrelid = tree.oid AND p.attname = a.attname \
                 JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = tree.oid AND d.refobjsubid = p.attnum \
                 CROSS JOIN LATERAL ({found}) AS x(class, id, sub, kind, hold) \
               UNION ALL SELECT d.classid, d.objid, d.objsubid, 'column', 'type' FROM tree JOIN pg_type r ON r.typrelid = tree.oid \
                 JOIN pg_depend d ON d.refclassid = 'pg_type'::regclass AND d.refobjid IN (r.oid, r.typarray) \
                 JOIN pg_class o ON o.oid = d.objid AND o.relkind IN ('r', 'p', 'm') \
                 WHERE d.classid = 'pg_class'::regclass AND d.objsubid > 0) AS x(class, id, sub, kind, hold) \
             CROSS JOIN LATERAL pg_identify_object(x.class, x.id, x.sub) AS i GROUP BY 1) AS y"
        ),
    )
}

/// Indexes that hold the column by an expression. A predicate that asks for NULL takes any type.
const INDEXES: &str = "pg_index x JOIN pg_class i ON i.oid = x.indexrelid WHERE NOT i.relispartition AND d.classid = 'pg_class'::regclass \
         AND x.indexrelid = d.objid AND (x.indexprs IS NOT NULL OR x.indpred IS NOT NULL \
         AND pg_get_expr(x.indpred, x.indrelid) !~ '^[(]((\"([^\"]|\"\")+\"|[^ \"()]+) IS (NOT )?NULL|num_nulls[(](\"([^\"]|\"\")+\"|[^ \"()]+)[)] = 1)[)]$')";

/// Generated columns. Since 15 it is the expression that depends, before it was the column.
const GENERATED: &str = "pg_attribute x LEFT JOIN pg_attrdef f ON f.adrelid = x.attrelid AND f.adnum = x.attnum WHERE x.attgenerated <> '' \
         AND x.attinhcount = 0 AND (d.classid = 'pg_attrdef'::regclass AND f.oid = d.objid OR d.classid = 'pg_class'::regclass \
         AND x.attrelid = d.objid AND x.attnum = d.objsubid) AND (x.attrelid, x.attnum) <> (d.refobjid, d.refobjsubid)";

/// What a row `d` of pg_depend stands for, with its kind and how fast it holds the column.
fn found() -> String {
    // What a partition got from its parent goes and comes with the parent's.
    let of_column = |class: &str, id: &str, sub: &str, kind: &str, hold: &str, from: &str| {
        format!("SELECT {class}, {id}, {sub}, {kind}, '{hold}' FROM {from}")
    };
    let itself = |class: &str, from: &str| {
        let from = format!("{from} AND d.classid = '{class}'::regclass AND x.oid = d.objid");
        of_column("d.classid", "d.objid", "0", "NULL", "always", &from)
    };
    let foreign = of_column(
        "d.classid",
        "d.objid",
        "0",
        "'foreign key'",
        "type",
        "pg_constraint x WHERE x.contype = 'f' AND x.conparentid = 0 AND d.classid = 'pg_constraint'::regclass AND x.oid = d.objid",
    );
    let check = of_column(
        "d.classid",
        "d.objid",
        "0",
        "'constraint'",
        "maybe",
        "pg_constraint x WHERE x.contype IN ('c', 'x') AND x.coninhcount = 0 AND d.classid = 'pg_constraint'::regclass \
         AND x.oid = d.objid",
    );
    let index = of_column("d.classid", "d.objid", "0", "NULL", "maybe", INDEXES);
    let view = of_column(
        "'pg_class'::regclass",
        "x.ev_class",
        "0",
        "NULL",
        "always",
        "pg_rewrite x WHERE x.rulename = '_RETURN' AND d.classid = 'pg_rewrite'::regclass AND x.oid = d.objid",
    );
    let generated =
        of_column("'pg_class'::regclass", "x.attrelid", "x.attnum", "'generated column'", "always", GENERATED);
    [
        view,
        itself("pg_rewrite", "pg_rewrite x WHERE x.rulename <> '_RETURN'"),
        itself("pg_trigger", "pg_trigger x WHERE NOT x.tgisinternal AND x.tgparentid = 0"),
        itself("pg_policy", "pg_policy x WHERE true"),
        itself("pg_proc", "pg_proc x WHERE true"),
        itself("pg_publication_rel", "pg_publication_rel x WHERE true"),
        generated,
        foreign,
        check,
        index,
    ]
    .join(" UNION ALL ")
}
