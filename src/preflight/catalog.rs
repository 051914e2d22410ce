//! What the preflight asks the server, and the shape of the answers: facts, which `judge`, `batch`, `columns` and `index` judge.
//!
//! Each question is one SELECT that answers with one JSON document. Every role may read these catalogs, so that a
//! missing right hides no other fault. Columns that not every version has are read through `to_jsonb`.

mod table;

use std::time::Duration;

use serde::Deserialize;

use super::json::list;
use crate::sweep::Plan;
use crate::sweep::open_index::{INDEX_ORDERED, INDEX_PENDING, NOT_DETACHING, OpenPredicate};
use crate::sweep::plan::literal;
use crate::sweep::transaction::{LOCK_TIMEOUT, SEARCH_PATH};

/// Who answers, and as whom.
#[derive(Clone, Debug, Deserialize)]
pub struct Server {
    /// Such as `15.18 (Debian 15.18-0+deb12u1)`.
    pub version: String,
    /// Such as 150018.
    pub number: i64,
    /// What the server calls itself, to tell PostgreSQL from what imitates it.
    pub product: String,
    pub standby: bool,
    /// The role.
    pub user: String,
    /// Row security does not apply to the role.
    pub bypass: bool,
}

/// The facts about the table and what surrounds it.
#[derive(Clone, Debug, Deserialize)]
pub struct Catalog {
    /// None: there is no such schema.
    pub schema: Option<Schema>,
    /// Tables whose names differ from the one looked for by nothing but case or schema: schema and name.
    pub similar: Vec<(String, String)>,
    /// None: there is no such relation.
    pub table: Option<Table>,
    /// The relation and all below it, whether partitions or children by INHERITS. A parent comes before its children.
    pub tree: Vec<Node>,
    /// Autovacuum is on for the server.
    pub autovacuum: bool,
    /// Names, by schema, that could collide with those of new indexes.
    pub taken: Vec<(String, String)>,
    /// What the owners of these may do in their schemas.
    pub schemas: Vec<InSchema>,
}

/// What a role may do in a schema.
#[derive(Clone, Debug, Deserialize)]
pub struct InSchema {
    pub schema: String,
    /// Who may grant it.
    pub owner: String,
    pub role: String,
    pub usage: bool,
    /// An index of its own table, too, needs this.
    pub create: bool,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Schema {
    /// The role has USAGE.
    pub usage: bool,
    /// Who may grant it.
    pub owner: String,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Table {
    pub owner: String,
    /// The role has the rights of the owner.
    pub owned: bool,
    /// The table that it is a partition or a child of, or the type that it is a table of: there its columns are altered.
    pub parent: Option<String>,
    pub row_security: bool,
    pub force_row_security: bool,
    pub columns: Vec<Column>,
    /// Rules ON UPDATE that are in force.
    pub rules: Vec<String>,
    /// Triggers on UPDATE that are in force.
    pub triggers: Vec<Trigger>,
    /// CHECKs and foreign keys that are in force, here and on partitions.
    pub constraints: Vec<Constraint>,
}

impl Table {
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }
}

#[derive(Clone, Debug, Deserialize)]
pub struct Column {
    pub name: String,
    /// The type's schema and name.
    pub type_schema: String,
    #[serde(rename = "type")]
    pub type_name: String,
    /// The type as SQL writes it, with its schema unless that is `pg_catalog`.
    pub type_text: String,
    /// ` COLLATE ...`, unless the collation is that of the type.
    pub collate: String,
    /// The type that a domain is over in the end, or the type itself.
    pub base_schema: String,
    pub base: String,
    /// The role may use the schema of the base type, whose operators a sweep names.
    pub base_usage: bool,
    /// Who may grant that.
    pub base_schema_owner: String,
    /// What a stored generated column computes, and the columns that it reads.
    pub expression: Option<String>,
    pub reads: Vec<String>,
    /// The base type's modifier: the digits of a second for a time, or -1.
    pub typmod: i64,
    /// NULL is refused, and was always.
    pub not_null: bool,
    /// GENERATED ALWAYS, be it by an expression or as identity.
    pub generated: bool,
    /// Part of the partition key of the table or of a partition.
    pub partition_key: bool,
    /// The role has the right.
    pub select: bool,
    pub update: bool,
    /// The labels, if the type is an enum.
    pub labels: Option<Vec<String>>,
    /// Who may add a label.
    pub type_owner: String,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Trigger {
    pub name: String,
    pub function: String,
    pub before: bool,
    pub for_each_row: bool,
    /// UPDATE OF these; empty: any.
    pub columns: Vec<String>,
    /// It fires for complete rows alone, so no sweep meets it.
    pub of_complete_rows: bool,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Constraint {
    pub schema: String,
    pub table: String,
    /// Of the table.
    pub owner: String,
    pub name: String,
    /// Old rows are known not to break it.
    pub validated: bool,
    /// What a CHECK evaluates. None: a foreign key.
    pub expression: Option<String>,
    /// The columns that it reads; None: all.
    pub columns: Vec<Option<String>>,
}

/// The table, a partition or a child.
#[derive(Clone, Debug, Deserialize)]
pub struct Node {
    pub oid: i64,
    /// None: the table itself.
    pub parent: Option<i64>,
    pub schema: String,
    pub name: String,
    /// `pg_class.relkind`.
    pub kind: String,
    pub owner: String,
    /// It is partitioned by an expression.
    pub by_expression: bool,
    /// Its updates are published, and nothing identifies a row for that: the server refuses them.
    pub unidentified: bool,
    /// Rows, as VACUUM and ANALYZE last estimated them.
    pub rows: i64,
    /// Autovacuum comes when more rows than this are dead. None: it never comes.
    pub autovacuum_at: Option<i64>,
    pub indexes: Vec<Index>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Index {
    pub oid: i64,
    /// The index of the parent that it is attached to.
    pub parent: Option<i64>,
    pub name: String,
    /// It belongs to a constraint.
    pub constraint: bool,
    pub valid: bool,
    pub unique: bool,
    /// A btree whose first two columns are in one direction, with the default operators and the columns' collations.
    pub ordered: bool,
    /// Names of the key columns; None stands for an expression.
    pub columns: Vec<Option<String>>,
    /// It has further columns.
    pub includes: bool,
    /// Every column that it reads: in its columns, its expressions and its WHERE.
    pub reads: Vec<String>,
    /// It belongs to an exclusion constraint.
    pub exclusion: bool,
    /// It holds exactly the open rows, by this predicate.
    pub open: Option<OpenPredicate>,
    /// It is valid, but PostgreSQL does not use it before older transactions end.
    pub pending: bool,
    /// It has a WHERE of any kind.
    pub partial: bool,
}

/// Asks who answers. Under a limit of its own, since that of the role may end any question; with nothing that other
/// products than PostgreSQL may not know.
pub fn server(statement_timeout: Duration) -> String {
    format!(
        "BEGIN READ ONLY; {SEARCH_PATH}SET LOCAL statement_timeout = {}; SELECT json_build_object('version', current_setting('server_version'), \
       'number', current_setting('server_version_num')::int, 'product', split_part(version(), ' ', 1), \
       'standby', pg_is_in_recovery(), 'user', current_user, \
       'bypass', (SELECT rolsuper OR rolbypassrls FROM pg_catalog.pg_roles WHERE rolname = current_user)); COMMIT",
        statement_timeout.as_millis().max(1)
    )
}

/// So many characters of a document come in one row: a message has a bound.
const PIECE: usize = 200_000;

/// Asks for a [`Catalog`]. In a transaction that can change nothing and sees one state of the catalog.
pub fn catalog(plan: &Plan, statement_timeout: Duration) -> String {
    let [schema, table] = [&plan.names.schema, &plan.names.table].map(|name| literal(name));
    format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL statement_timeout = {timeout}; \
         SET LOCAL lock_timeout = {lock_timeout}; \
         {SEARCH_PATH}\
         WITH RECURSIVE tree AS ( \
           SELECT c.oid, NULL::oid AS parent, 0 AS level FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = {schema} AND c.relname = {table} \
           UNION SELECT i.inhrelid, i.inhparent, tree.level + 1 FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid \
             WHERE {NOT_DETACHING}) \
         , answer AS MATERIALIZED (SELECT json_build_object( \
           'schema', (SELECT json_build_object('usage', has_schema_privilege(n.oid, 'USAGE'), 'owner', {schema_owner}) \
             FROM pg_namespace n WHERE n.nspname = {schema}), \
           'autovacuum', current_setting('autovacuum')::boolean, \
           'similar', {similar}, 'table', ({about_table}), 'tree', {tree}, 'taken', {taken}, 'schemas', {schemas})::text AS document) \
         SELECT substr(document, piece, {PIECE}) FROM answer, generate_series(1, length(document), {PIECE}) AS piece \
         ORDER BY piece; COMMIT",
        timeout = statement_timeout.as_millis().max(1),
        // To write a predicate down the server locks its table.
        lock_timeout = LOCK_TIMEOUT.min(statement_timeout / 2).as_millis().max(1),
        schema_owner = SCHEMA_OWNER,
        similar = list(
            "json_build_array(n.nspname, c.relname) ORDER BY n.nspname, c.relname",
            &format!(
                "pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p') \
                 AND lower(c.relname) = lower({table}) AND (n.nspname, c.relname) <> ({schema}, {table}) \
                 AND c.relpersistence <> 't'"
            )
        ),
        about_table = table::question(plan),
        tree = list(
            &format!(
                "json_build_object('oid', c.oid::bigint, 'parent', tree.parent::bigint, 'schema', n.nspname, \
                 'name', c.relname, 'kind', c.relkind::text, 'owner', pg_get_userbyid(c.relowner), 'by_expression', \
                 EXISTS (SELECT FROM pg_partitioned_table t WHERE t.partrelid = c.oid AND t.partexprs IS NOT NULL), \
                 'unidentified', c.relkind = 'r' AND {UNIDENTIFIED}, 'rows', greatest(c.reltuples, 0)::bigint, 'autovacuum_at', {AUTOVACUUM_AT}, \
                 'indexes', {}) ORDER BY tree.level, c.oid",
                indexes(&plan.names.time_completed)
            ),
            "tree JOIN pg_class c ON c.oid = tree.oid JOIN pg_namespace n ON n.oid = c.relnamespace"
        ),
        taken = list(
            "json_build_array(n.nspname, c.relname)",
            "pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relnamespace IN \
               (SELECT s.relnamespace FROM tree JOIN pg_class s ON s.oid = tree.oid) \
               AND c.relname LIKE ANY (ARRAY['%\\_open\\_by\\_time\\_started%', '%\\_sweep\\_key%'])"
        ),
        schemas = list(
            &format!(
                "json_build_object('schema', n.nspname, 'owner', {SCHEMA_OWNER}, 'role', pg_get_userbyid(o.relowner), \
                 'usage', has_schema_privilege(o.relowner, n.oid, 'USAGE'), \
                 'create', has_schema_privilege(o.relowner, n.oid, 'CREATE'))"
            ),
            "(SELECT DISTINCT s.relnamespace FROM tree JOIN pg_class s ON s.oid = tree.oid) AS s \
             JOIN pg_namespace n ON n.oid = s.relnamespace \
             CROSS JOIN (SELECT DISTINCT s.relowner FROM tree JOIN pg_class s ON s.oid = tree.oid) AS o"
        ),
    )
}

/// Whether `c`, in the schema `n`, lacks a replica identity while a publication has its updates.
const UNIDENTIFIED: &str = "NOT EXISTS (SELECT FROM pg_index x WHERE x.indrelid = c.oid \
      AND CASE c.relreplident WHEN 'd' THEN x.indisprimary WHEN 'i' THEN x.indisreplident END) AND c.relreplident <> 'f' \
    AND EXISTS (SELECT FROM pg_publication_tables t JOIN pg_publication p ON p.pubname = t.pubname \
      WHERE p.pubupdate AND (t.schemaname, t.tablename) = (n.nspname, c.relname))";

/// How many rows of `c` must be dead for autovacuum to come; NULL: it never comes. A setting of the table wins over that of
/// the server, and 18 has an upper bound.
const AUTOVACUUM_AT: &str = "(SELECT CASE WHEN current_setting('autovacuum')::boolean \
    AND coalesce((o ->> 'autovacuum_enabled')::boolean, true) THEN least( \
      coalesce(o ->> 'autovacuum_vacuum_threshold', current_setting('autovacuum_vacuum_threshold'))::numeric \
      + coalesce(o ->> 'autovacuum_vacuum_scale_factor', current_setting('autovacuum_vacuum_scale_factor'))::numeric \
      * greatest(c.reltuples, 0)::numeric, \
      nullif(coalesce(o ->> 'autovacuum_vacuum_max_threshold', current_setting('autovacuum_vacuum_max_threshold', true)), '-1')::numeric, \
      9e18)::bigint END \
    FROM (SELECT coalesce(json_object_agg(option_name, option_value), '{}'::json) AS o FROM pg_options_to_table(c.reloptions)) AS s)";

/// `pg_database_owner` is a role that nobody can be: whoever owns the database is in it.
const SCHEMA_OWNER: &str = "CASE pg_get_userbyid(n.nspowner) WHEN 'pg_database_owner' \
    THEN (SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()) \
    ELSE pg_get_userbyid(n.nspowner) END";

/// Asks for every [`Index`] of the table `c`; `completed` is the name of its completion time.
fn indexes(completed: &str) -> String {
    let [private, plain] = [OpenPredicate::Private, OpenPredicate::Plain].map(|predicate| predicate.written(completed));
    let columns = "(SELECT json_agg(a.attname ORDER BY key.n) \
                   FROM unnest(x.indkey::int2[]) WITH ORDINALITY AS key(attnum, n) \
                   LEFT JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = key.attnum AND key.attnum <> 0 \
                   WHERE key.n <= x.indnkeyatts)";
    // What is in an expression or a predicate is a dependency; a plain column may be only in the key.
    let reads = list(
        "a.attname",
        "pg_attribute a WHERE a.attrelid = x.indrelid AND a.attnum > 0 AND (a.attnum = ANY (x.indkey::int2[]) \
         OR EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = ic.oid \
           AND d.refclassid = 'pg_class'::regclass AND d.refobjid = x.indrelid AND d.refobjsubid = a.attnum))",
    );
    list(
        &format!(
            "json_build_object('oid', ic.oid::bigint, 'parent', (SELECT h.inhparent::bigint FROM pg_inherits h \
               WHERE h.inhrelid = ic.oid), 'name', ic.relname, \
             'constraint', EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = ic.oid AND k.contype IN ('p', 'u', 'x')), 'valid', x.indisvalid AND x.indisready, \
             'unique', x.indisunique, 'columns', {columns}, 'ordered', {INDEX_ORDERED}, \
             'includes', x.indnatts > x.indnkeyatts, 'reads', {reads}, 'exclusion', x.indisexclusion, 'partial', x.indpred IS NOT NULL, \
             'open', CASE pg_get_expr(x.indpred, x.indrelid) WHEN {private} THEN 'private' WHEN {plain} THEN 'plain' END, \
             'pending', {INDEX_PENDING}) \
             ORDER BY ic.relname"
        ),
        "pg_index x JOIN pg_class ic ON ic.oid = x.indexrelid JOIN pg_am m ON m.oid = ic.relam \
         WHERE x.indrelid = c.oid AND x.indislive",
    )
}
