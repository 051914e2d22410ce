//! How the catalog tells the index of open rows from others: SQL for the sweep's first question and for the preflight.

use serde::Deserialize;

use super::plan::literal;

/// Equality of the server's own, whatever an operator of that name elsewhere does.
pub const EQUALS: &str = "OPERATOR(pg_catalog.=)";

/// Whether PostgreSQL does not use the index `x` yet: an older transaction may still need rows that the index lacks.
/// Source: `get_relation_info` in PostgreSQL's `plancat.c`.
pub const INDEX_PENDING: &str = "(x.indcheckxmin AND age(x.xmin) <= age(xid(pg_snapshot_xmin(pg_current_snapshot()))))";

/// Whether the index `x` with the access method `m` is a btree in the order of its first two columns: both ascending with
/// NULLs last, or both the other way round, which is read backwards.
pub const INDEX_ORDERED: &str = "m.amname = 'btree' AND x.indnkeyatts >= 2 \
    AND (x.indoption[0], x.indoption[1]) IN ((0, 0), (3, 3)) \
    AND (SELECT bool_and(q.opcdefault) FROM pg_opclass q WHERE q.oid IN (x.indclass[0], x.indclass[1])) \
    AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = x.indrelid \
      AND (a.attnum, a.attcollation <> x.indcollation[0]) = (x.indkey[0], true) \
      OR a.attrelid = x.indrelid AND (a.attnum, a.attcollation <> x.indcollation[1]) = (x.indkey[1], true))";

/// Not of the inheritance `i`: a partition that is being detached. Not every version has the column.
pub const NOT_DETACHING: &str = "NOT coalesce((to_jsonb(i) ->> 'inhdetachpending')::boolean, false)";

/// How an index of open rows says which rows it holds. A selection must say exactly the same, or the planner does not
/// use the index.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum OpenPredicate {
    /// `num_nulls(column) = 1`. No planner derives it from the application's own `column IS NULL`, so the application's
    /// statements never use the index, nor suffer from its dead entries.
    Private,
    /// `column IS NULL`.
    #[default]
    Plain,
}

impl OpenPredicate {
    /// The predicate as SQL, on a quoted column.
    pub fn sql(self, column: &str) -> String {
        match self {
            Self::Private => format!("pg_catalog.num_nulls({column}) {EQUALS} 1"),
            Self::Plain => format!("{column} IS NULL"),
        }
    }

    /// An SQL expression for the predicate as `pg_get_expr` writes it down, under [`SEARCH_PATH`].
    pub fn written(self, column: &str) -> String {
        let form = match self {
            Self::Private => "'(num_nulls(%I) = 1)'",
            Self::Plain => "'(%I IS NULL)'",
        };
        format!("format({form}, {})", literal(column))
    }
}
