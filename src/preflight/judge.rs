//! Judges the facts, pure: what passes, what does not, why that matters, and what fixes it.

use super::catalog::{Catalog, Column, Node, Schema, Server, Table, Trigger};
use super::finding::{Fix, PreflightReport, RunAs, Severity, Subject};
use super::fix::{self, Does, Wanted, field, part, parts, qualified, quoted};
use crate::api::Reason;
use crate::sweep::Plan;
use crate::sweep::open_index::OpenPredicate;
use crate::sweep::plan::Names;

use Severity::{Blocking, NotReady, Warning};

/// The oldest version that the sweep is tested on.
const OLDEST: i64 = 130_000;

/// More dead entries than this make an idle sweep read thousands of pages. Measured: 9,859 pages and 26 ms after a million
/// completions without vacuum.
const MAX_DEAD_ROWS: i64 = 250_000;

/// The threshold that we advise for such a table: well below, and far from vacuuming all the time.
const GOOD_THRESHOLD: i64 = 100_000;

/// Judges the server. False: there is no sense in asking it more.
pub fn server(server: &Server, checked: &mut PreflightReport) -> bool {
    let at = Some(field("spec.database.secretRef"));
    if server.product != "PostgreSQL" || server.number < OLDEST {
        let message = format!(
            "the server is {} {}; a sweep needs PostgreSQL 13 or later: upgrade it, or name another one",
            server.product, server.version
        );
        checked.find(Subject::Server, Blocking, Reason::ServerNotSupported, message, at);
        return false;
    }
    if server.standby {
        let message = "the server is a standby, which takes no writes: connect to the primary";
        checked.find(Subject::Server, Blocking, Reason::NotPrimary, message, at);
    } else {
        checked.pass(Subject::Server, format!("PostgreSQL {}, a primary", server.version));
    }
    true
}

/// Judges all that the catalog tells.
pub fn catalog(plan: &Plan, server: &Server, facts: &Catalog, checked: &mut PreflightReport) {
    let names = &plan.names;
    let Some(schema) = &facts.schema else {
        let message = format!("there is no schema {} in this database{}", quoted(&names.schema), elsewhere(facts));
        checked.find(Subject::Table, Blocking, Reason::TableNotFound, message, field("spec.schema"));
        return;
    };
    let (Some(table), Some(root)) = (&facts.table, facts.tree.first()) else {
        let message = format!("there is no table {}{}", plan.table, elsewhere(facts));
        checked.find(Subject::Table, Blocking, Reason::TableNotFound, message, field("spec.table"));
        return;
    };
    if !matches!(root.kind.as_str(), "r" | "p") {
        let message = format!("{} is {}, not a table or a partitioned table", plan.table, kind(root));
        checked.find(Subject::Table, Blocking, Reason::SchemaMismatch, message, field("spec.table"));
        return;
    }
    let judge = Judge { plan, names, server, schema, table, root, facts };
    judge.table(checked);
    judge.columns(checked);
    judge.key(checked);
    judge.complete(checked);
    judge.index(checked);
    judge.autovacuum(checked);
    judge.rights(checked);
    judge.row_security(checked);
    judge.constraints(checked);
    judge.triggers(checked);
}

/// The facts at hand.
pub(super) struct Judge<'a> {
    pub(super) plan: &'a Plan,
    pub(super) names: &'a Names,
    pub(super) server: &'a Server,
    pub(super) schema: &'a Schema,
    pub(super) table: &'a Table,
    root: &'a Node,
    facts: &'a Catalog,
}

impl Judge<'_> {
    pub(super) fn column(&self, name: &str) -> Option<&Column> {
        self.table.column(name)
    }

    /// Statements for the table's owner.
    pub(super) fn by_owner(&self, statements: impl IntoIterator<Item = String>) -> Fix {
        self.by(&self.table.owner, &self.names.schema, RunAs::Owner(self.table.owner.clone()), statements)
    }

    /// Statements that alter the table and with it each partition, which may have owners of their own.
    pub(super) fn by_owners(&self, statements: impl IntoIterator<Item = String>) -> Fix {
        let mut owners = vec![self.table.owner.clone()];
        // What is no partition to stay is no part of the table any more when this is run.
        for node in self.facts.tree.iter().filter(|node| self.root.kind == "p" && node.kind != "f") {
            if !owners.contains(&node.owner) {
                owners.push(node.owner.clone());
            }
        }
        let run_as = if owners.len() == 1 { RunAs::Owner(self.table.owner.clone()) } else { RunAs::Owners(owners) };
        self.by(&self.table.owner, &self.names.schema, run_as, statements)
    }

    /// Statements for the owner of something, who must be able to name what is in its schema and the table.
    fn by(&self, owner: &str, schema: &str, run_as: RunAs, statements: impl IntoIterator<Item = String>) -> Fix {
        let needs = [(owner, schema, Does::Names), (owner, self.names.schema.as_str(), Does::Names)];
        let mut all = fix::grants(&self.facts.schemas, needs);
        all.push(part(run_as, statements));
        parts(all)
    }

    fn table(&self, checked: &mut PreflightReport) {
        let table = &self.plan.table;
        let mut find = |message: String, owner: &str, schema: &str, action: String| {
            let fix = self.by(owner, schema, RunAs::Owner(owner.into()), [action]);
            checked.find(Subject::Table, Blocking, Reason::SchemaMismatch, message, fix);
        };
        for node in self.facts.tree.iter().skip(1) {
            let name = qualified(&node.schema, &node.name);
            if self.root.kind == "r" && node.parent == Some(self.root.oid) {
                let message = format!(
                    "{name} inherits from the table (INHERITS): no key is unique across both, so a sweep could meet the \
                     wrong row. Once it inherits no more, queries on {table} leave its rows out, and it needs an \
                     AuditLogSweeper of its own"
                );
                find(message, &node.owner, &node.schema, fix::alter(&name, &format!("NO INHERIT {table}")));
            } else if node.kind == "f" {
                let message = format!(
                    "{name} is a partition on another server, whose rows cannot be locked for a sweep. Once detached, \
                     queries on {table} leave its rows out"
                );
                let parent = self.facts.tree.iter().find(|above| Some(above.oid) == node.parent).unwrap_or(self.root);
                let of = qualified(&parent.schema, &parent.name);
                find(message, &parent.owner, &node.schema, fix::alter(&of, &format!("DETACH PARTITION {name}")));
            }
        }
        for rule in &self.table.rules {
            let rule = quoted(rule);
            let message =
                format!("the rule {rule} rewrites every UPDATE of the table: what a sweep would do is not to be told");
            find(message, &self.table.owner, &self.names.schema, fix::alter(table, &format!("DISABLE RULE {rule}")));
        }
        for node in self.facts.tree.iter().filter(|node| node.unidentified) {
            let name = qualified(&node.schema, &node.name);
            let message = format!(
                "the updates of {name} are published, and it has no replica identity: the server refuses every UPDATE. A unique \
                 index on NOT NULL columns would do, too, and writes less WAL (REPLICA IDENTITY USING INDEX)"
            );
            find(message, &node.owner, &node.schema, fix::alter(&name, "REPLICA IDENTITY FULL"));
        }
        if checked.is_clean(Subject::Table) {
            let partitions = self.facts.tree.iter().filter(|node| node.kind == "r" && node.parent.is_some()).count();
            let partitions = if self.root.kind == "p" { format!(", {partitions} partitions") } else { String::new() };
            checked.pass(Subject::Table, format!("{table}, owned by {}{partitions}", self.table.owner));
        }
    }

    fn key(&self, checked: &mut PreflightReport) {
        let (id, started) = (self.names.id.as_str(), self.names.time_started.as_str());
        let columns: Vec<&Column> = [id, started].into_iter().filter_map(|name| self.column(name)).collect();
        if columns.len() < 2 {
            return;
        }
        for column in columns.iter().filter(|column| !column.not_null) {
            let message = format!(
                "{} may be NULL: such a row is never completed, and can fail the batch that it is in. The SQL fails at VALIDATE \
                 while there is one",
                quoted(&column.name)
            );
            let fix = self.by_owners(fix::set_not_null(&self.plan.table, &column.name));
            checked.find(Subject::Key, Blocking, Reason::SchemaMismatch, message, fix);
        }
        let wanted = Wanted { unique: true, columns: [id, started], open: None, suffix: "_sweep_key" };
        if wanted.is_there(self.facts) {
            if checked.is_clean(Subject::Key) {
                checked.pass(Subject::Key, format!("unique by {}, NOT NULL", fix::names([id, started])));
            }
            return;
        }
        // A unique index of a partitioned table holds the whole partition key.
        let outside = self.table.columns.iter().find(|c| c.partition_key && c.name != id && c.name != started);
        let by_expression = self.facts.tree.iter().any(|node| node.by_expression).then(|| "an expression".to_owned());
        let (why, fix) = match outside.map(|column| quoted(&column.name)).or(by_expression) {
            Some(by) => (
                format!(
                    "; none is possible while the table is partitioned by {by}, but on each partition, with an \
                     AuditLogSweeper of its own"
                ),
                field("spec.table"),
            ),
            None => (
                format!("{}; the SQL fails while two rows share one", self.composite_key()),
                parts(wanted.parts(self.facts)),
            ),
        };
        let obstacle = wanted.obstacle(self.facts).map(|why| format!(" ({why})")).unwrap_or_default();
        let message = format!(
            "no valid unique index on {} or part of it{obstacle}: one key could mean several rows, and finding a row by \
             its key would read the whole table{why}",
            fix::names([id, started])
        );
        checked.find(Subject::Key, Blocking, Reason::SchemaMismatch, message, fix);
    }

    /// The key of several columns that the table has instead, if it has one.
    fn composite_key(&self) -> String {
        let unique = self.root.indexes.iter().filter(|index| index.unique && index.constraint && !index.partial);
        let mut composite = unique.filter(|index| index.columns.len() > 1);
        composite.next().map_or_else(String::new, |index| {
            let columns = index.columns.iter().flatten().map(String::as_str);
            format!(". Its key is ({}), and a key of several columns is not supported", fix::names(columns))
        })
    }

    fn index(&self, checked: &mut PreflightReport) {
        let Names { id, time_started, time_completed, .. } = self.names;
        if [id, time_started, time_completed].iter().any(|name| self.column(name).is_none()) {
            return;
        }
        let wanted = Wanted {
            unique: false,
            columns: [time_started, id],
            open: Some((OpenPredicate::Private, time_completed)),
            suffix: "_open_by_time_started",
        };
        let plain = wanted.with(OpenPredicate::Plain);
        let describe = |wanted: &Wanted| {
            format!("({}) WHERE {}", fix::names(wanted.columns), wanted.predicate().unwrap_or_default())
        };
        let private_is_there = wanted.is_there(self.facts);
        if let Some((node, index)) = plain.all_serving(self.facts).next()
            && (private_is_there || plain.is_there(self.facts) || plain.is_on_every_partition(self.facts))
        {
            let (message, replace) = wanted.replacement(&plain, node, index, self.facts);
            let fix = (!replace.is_empty()).then(|| parts(replace));
            checked.find(Subject::Index, Warning, Reason::IndexNotPrivate, message, fix);
        } else if private_is_there {
            checked.pass(Subject::Index, describe(&wanted));
        } else if self.root.kind == "p" && wanted.is_on_every_partition(self.facts) {
            let message = format!(
                "every partition has an index on {}, but new partitions will come without it",
                describe(&wanted)
            );
            let fix = parts(wanted.parts(self.facts));
            checked.find(Subject::Index, Warning, Reason::IndexMissing, message, fix);
        } else {
            let obstacle = wanted.obstacle(self.facts).map(|why| format!(" ({why})")).unwrap_or_default();
            let message = format!(
                "no valid index on {}{obstacle}: each batch reads more and more of the table",
                describe(&wanted)
            );
            let fix = parts(wanted.parts(self.facts));
            checked.find(Subject::Index, NotReady, Reason::IndexMissing, message, fix);
        }
    }

    /// Dead entries stay in the index until vacuum comes, and each sweep reads past them.
    fn autovacuum(&self, checked: &mut PreflightReport) {
        let rarely = |node: &&Node| node.kind == "r" && node.autovacuum_at.unwrap_or(node.rows) > MAX_DEAD_ROWS;
        for node in self.facts.tree.iter().filter(|node| node.rows > MAX_DEAD_ROWS).filter(rarely) {
            let table = qualified(&node.schema, &node.name);
            let when = node.autovacuum_at.map_or_else(
                || {
                    format!(
                        "is off{}",
                        if self.facts.autovacuum { "" } else { " for the whole server: set autovacuum = on" }
                    )
                },
                |dead| format!("cleans it only after {dead} updates"),
            );
            let message = format!(
                "{table} has about {} rows, and autovacuum {when}. Each completion leaves a dead entry in the sweep's \
                 index, and each sweep reads past all of them",
                node.rows
            );
            let set = format!(
                "SET (autovacuum_enabled = true, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = {GOOD_THRESHOLD})"
            );
            let owner = RunAs::Owner(node.owner.clone());
            // Where the server has it switched off, nothing said of the table helps.
            let fix =
                self.facts.autovacuum.then(|| self.by(&node.owner, &node.schema, owner, [fix::alter(&table, &set)]));
            checked.find(Subject::Index, Warning, Reason::IndexBloat, message, fix);
        }
    }

    fn constraints(&self, checked: &mut PreflightReport) {
        for constraint in self.table.constraints.iter().filter(|c| c.expression.is_some() && !c.validated) {
            let (table, name) = (qualified(&constraint.schema, &constraint.table), quoted(&constraint.name));
            let message = format!(
                "{name} on {table} is NOT VALID: old rows may break it, and it then refuses to complete them. The SQL \
                 fails while there are any"
            );
            let validate = fix::alter(&table, &format!("VALIDATE CONSTRAINT {name}"));
            let fix =
                self.by(&constraint.owner, &constraint.schema, RunAs::Owner(constraint.owner.clone()), [validate]);
            checked.find(Subject::Constraints, Warning, Reason::RowRefused, message, fix);
        }
        if checked.is_clean(Subject::Constraints) {
            checked.pass(Subject::Constraints, "every CHECK is valid for the rows that are there");
        }
    }

    fn triggers(&self, checked: &mut PreflightReport) {
        let fires = self
            .table
            .triggers
            .iter()
            .filter(|t| t.columns.is_empty() || t.columns.iter().any(|name| self.names.sets(name)))
            .filter(|t| !t.of_complete_rows);
        let (before, others): (Vec<_>, Vec<_>) = fires.partition(|trigger| trigger.before && trigger.for_each_row);
        for trigger in before {
            let message = format!(
                "the trigger {} runs {} before each row is updated: it may change, refuse or suppress what a sweep does. \
                 Neither that nor the rights and the row security where it writes were looked at",
                quoted(&trigger.name),
                quoted(&trigger.function)
            );
            // Whether anything is to be fixed, only its function tells.
            checked.find(Subject::Triggers, Warning, Reason::RowRefused, message, None);
        }
        if checked.is_clean(Subject::Triggers) {
            let seen = if others.is_empty() {
                "none has a say in an update".to_owned()
            } else {
                let names = fix::names(others.iter().map(|trigger| trigger.name.as_str()));
                format!("{names}; what they write to, and the rights and row security there, were not looked at")
            };
            let protects = |t: &&Trigger| t.of_complete_rows && t.before && t.for_each_row && t.columns.is_empty();
            let protected = match self.table.triggers.iter().find(protects) {
                Some(trigger) => format!("{} keeps complete rows as they are", quoted(&trigger.name)),
                None => {
                    "nothing keeps the application from changing complete rows (manifests/sql/immutable.sql)".into()
                }
            };
            checked.pass(Subject::Triggers, format!("{seen}; {protected}"));
        }
    }
}

/// Where else a table of that name is.
fn elsewhere(facts: &Catalog) -> String {
    match facts.similar.as_slice() {
        [] => "; is it the right database?".into(),
        similar => {
            let names: Vec<String> = similar.iter().take(5).map(|(schema, name)| qualified(schema, name)).collect();
            format!("; there is {}", names.join(", "))
        }
    }
}

fn kind(node: &Node) -> &'static str {
    match node.kind.as_str() {
        "v" => "a view",
        "m" => "a materialized view",
        "f" => "a foreign table",
        "S" => "a sequence",
        "i" | "I" => "an index",
        _ => "something else",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(product: &str, version: &str, number: i64) -> (bool, PreflightReport) {
        let server = Server {
            product: product.into(),
            version: version.into(),
            number,
            standby: false,
            user: "u".into(),
            bypass: false,
        };
        let mut checked = PreflightReport::default();
        (super::server(&server, &mut checked), checked)
    }

    #[test]
    fn a_server_too_old_or_of_another_kind_is_asked_no_more() {
        for (product, version, number) in [("PostgreSQL", "12.22", 120_022), ("CockroachDB", "13.0.0", 130_000)] {
            let (on, checked) = judged(product, version, number);
            assert!(!on && !checked.ready() && checked.blocking().is_some(), "{checked:?}");
            assert_eq!(checked.findings[0].reason, Reason::ServerNotSupported);
            assert!(checked.findings[0].message.contains(&format!("the server is {product} {version}")), "{checked:?}");
        }
        let (on, checked) = judged("PostgreSQL", "13.0", 130_000);
        assert!(on && checked.ready() && checked.passed.len() == 1, "{checked:?}");
    }
}
