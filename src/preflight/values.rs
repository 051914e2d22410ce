//! Tries what a sweep sets, after the catalog was judged: whether each value fits its column and passes the CHECKs on it.

use super::catalog::{Catalog, Column, Constraint, Index, Table};
use super::finding::{PreflightReport, Severity, Subject};
use super::fix::{self, field, qualified, quoted};
use crate::api::Reason;
use crate::database::Error;
use crate::sweep::Plan;
use crate::sweep::plan::literal;

use Severity::{Blocking, Warning};

/// An expression that the server is to evaluate, and what it means for the sweep.
#[derive(Debug, Eq, PartialEq)]
pub struct Trial {
    /// One SELECT of one value.
    pub sql: String,
    check: Check,
    /// What is tried, for a message.
    what: String,
    /// The field of the spec to change.
    field: String,
}

/// What an answer means.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Check {
    /// Any passes.
    No,
    /// False fails, NULL passes.
    Decided,
    /// True alone holds whatever else is in the row.
    Undecided,
    /// Any passes; an error may have to do with what else is in the row.
    Computed,
}

/// What there is to try. The expressions are the server's own text of its catalog.
pub fn trials(plan: &Plan, table: &Table) -> Vec<Trial> {
    let rows = Rows { plan, table };
    let mut trials = vec![];
    for (position, (name, value)) in plan.names.complete.iter().enumerate() {
        let (Some(column), field) = (table.column(name), path(position, value)) else { continue };
        let what = format!("{} (of type {}) cannot hold what {field} sets", quoted(name), column.type_text);
        trials.push(Trial { sql: format!("SELECT {}", cast(value, column)), check: Check::No, what, field });
    }
    trials.extend(table.constraints.iter().filter_map(|constraint| of_constraint(&rows, constraint)));
    trials.extend(table.columns.iter().filter_map(|column| of_generated(&rows, column)));
    trials
}

fn of_constraint(rows: &Rows, constraint: &Constraint) -> Option<Trial> {
    let (expression, reads) = (constraint.expression.as_ref()?, rows.read_by(&constraint.columns));
    let field = set_by(rows.plan, &reads)?;
    let (decided, name) = (is_decided(rows.plan, &reads), name(constraint));
    let what = if decided {
        format!("{name} refuses what a sweep sets")
    } else {
        format!("{name}, which also reads what a sweep does not set, may refuse rows; that was not tried")
    };
    // NULL passes a CHECK. Where more is read than a sweep sets, another value may not.
    let passes = if decided { format!("({expression})") } else { format!("({expression}) IS TRUE") };
    Some(Trial {
        sql: format!("SELECT bool_and({passes}) FROM ({}) AS t", rows.sql(&constraint.columns)),
        check: if decided { Check::Decided } else { Check::Undecided },
        what,
        field,
    })
}

fn of_generated(rows: &Rows, generated: &Column) -> Option<Trial> {
    let reads: Vec<Option<String>> = generated.reads.iter().cloned().map(Some).collect();
    let (expression, field) = (generated.expression.as_ref()?, set_by(rows.plan, &reads)?);
    let (name, type_) = (quoted(&generated.name), &generated.type_text);
    // A domain may refuse the value, too.
    let value = format!("CAST(({expression}) AS {type_})");
    let (check, test, what) = if generated.not_null {
        let what =
            format!("the generated column {name}, which is NOT NULL, may refuse rows; that was not tried with theirs");
        (Check::Undecided, format!("bool_and({value} IS NOT NULL)"), what)
    } else {
        let what = format!("the server cannot compute the generated column {name} for a row");
        (Check::Computed, format!("count({value})"), what)
    };
    Some(Trial { sql: format!("SELECT {test} FROM ({}) AS t", rows.sql(&reads)), check, what, field })
}

fn cast(value: &Option<String>, column: &Column) -> String {
    let value = value.as_deref().map_or_else(|| "NULL".into(), literal);
    format!("CAST({value} AS {}){}", column.type_text, column.collate)
}

/// Rows as a sweep would complete them.
struct Rows<'a> {
    plan: &'a Plan,
    table: &'a Table,
}

impl Rows<'_> {
    /// What something reads that reads these columns: of a generated one, what it is made of besides.
    fn read_by(&self, columns: &[Option<String>]) -> Vec<Option<String>> {
        let generated =
            columns.iter().flatten().filter_map(|name| self.table.column(name)).flat_map(|column| &column.reads);
        columns.iter().cloned().chain(generated.cloned().map(Some)).collect()
    }

    /// Two rows with what a sweep sets and the further columns that something reads. Their starts are one of the newest stale ones
    /// and a very old one. The rest is NULL, as mostly in open rows.
    fn sql(&self, reads: &[Option<String>]) -> String {
        let names = &self.plan.names;
        let item = |name: &str, value: String| format!("{value} AS {}", quoted(name));
        let time = |name: &str, time: &str| {
            let type_ = self.table.column(name).map_or("timestamptz", |column| column.type_text.as_str());
            item(name, format!("CAST({time} AS {type_})"))
        };
        let set = names.complete.iter();
        let set = set.filter_map(|(name, value)| Some(item(name, cast(value, self.table.column(name)?))));
        let generated: Vec<&Column> = reads
            .iter()
            .flatten()
            .filter_map(|name| self.table.column(name))
            .filter(|column| column.expression.is_some())
            .collect();
        let is_made = |name: &str| generated.iter().any(|column| column.name == name);
        let others = reads.iter().flatten();
        let others = others.filter(|name| !names.sets(name) && **name != names.time_started && !is_made(name));
        let others = others.filter_map(|name| Some(item(name, cast(&None, self.table.column(name)?))));
        let mut row: Vec<String> = set.chain(others).collect();
        row.push(time(&names.time_completed, "clock_timestamp()"));
        let newest = format!("clock_timestamp() - interval '{} seconds'", self.plan.timeout.as_secs());
        let start = |start: &str| format!("SELECT {}, {}", row.join(", "), time(&names.time_started, start));
        let rows = format!("{} UNION ALL {}", start(&newest), start("timestamptz '1970-01-01'"));
        let made = generated
            .iter()
            .filter_map(|column| Some(item(&column.name, format!("({})", column.expression.as_ref()?))));
        let made: String = made.map(|made| format!(", {made}")).collect();
        format!("SELECT *{made} FROM ({rows}) AS open")
    }
}

/// The field of the spec by which a sweep sets one of these columns, if it sets one. None among them stands for all.
fn set_by(plan: &Plan, columns: &[Option<String>]) -> Option<String> {
    let reads = |name: &String| columns.iter().any(|column| column.as_ref().is_none_or(|column| column == name));
    let complete = plan.names.complete.iter().enumerate().find(|(_, (name, _))| reads(name));
    match complete {
        Some((position, (_, value))) => Some(path(position, value)),
        None => reads(&plan.names.time_completed).then(|| "spec.columns.timeCompleted".to_owned()),
    }
}

fn path(position: usize, value: &Option<String>) -> String {
    format!("spec.complete[{position}].{}", if value.is_some() { "value" } else { "setNull" })
}

/// Judges what became of a trial: the server's answer, or its error.
pub fn trial(trial: &Trial, answer: Result<Option<&str>, &Error>, checked: &mut PreflightReport) {
    let state = match (answer, trial.check) {
        (Ok(Some("t")), _) | (Ok(_), Check::No | Check::Computed) | (Ok(None), Check::Decided) => return,
        (Err(error), Check::No | Check::Decided | Check::Computed) => {
            format!(" (SQLSTATE {})", error.sqlstate().unwrap_or("unknown"))
        }
        _ => String::new(),
    };
    // Never the server's text: an expression may call a function that quotes rows.
    checked.unpass(Subject::Complete);
    let refused =
        |error: &&Error| error.sqlstate().is_some_and(|code| code.starts_with("22") || code.starts_with("23"));
    if trial.check == Check::Undecided {
        checked.find(Subject::Complete, Warning, Reason::RowRefused, trial.what.clone(), None);
    } else if trial.check == Check::Computed {
        let message = format!("{}, so that it may refuse rows{state}", trial.what);
        checked.find(Subject::Complete, Warning, Reason::RowRefused, message, None);
    } else if answer.err().is_none_or(|error| refused(&error)) {
        let message = format!("{}, so that no row could be completed{state}", trial.what);
        checked.find(Subject::Complete, Blocking, Reason::SchemaMismatch, message, field(&trial.field));
    } else {
        let message = format!("whether {} could not be tried{state}", trial.what);
        checked.find(Subject::Complete, Warning, Reason::RowRefused, message, None);
    }
}

/// Says what may refuse rows and cannot be tried without them.
pub fn untried(plan: &Plan, facts: &Catalog, table: &Table, checked: &mut PreflightReport) {
    let Plan { names, .. } = plan;
    // NULL refers to nothing and equals nothing.
    let sets = |columns: &[Option<String>]| {
        names.complete.iter().any(|(name, value)| value.is_some() && columns.contains(&Some(name.clone())))
    };
    let mut may_refuse = vec![];
    for key in table.constraints.iter().filter(|key| key.expression.is_none() && sets(&key.columns)) {
        may_refuse.push(format!("the foreign key {}", name(key)));
    }
    for node in &facts.tree {
        for index in node.indexes.iter().filter(|index| index.parent.is_none() && may_collide(index, &names.id)) {
            let reads: Vec<_> = index.reads.iter().cloned().map(Some).collect();
            let reads = Rows { plan, table }.read_by(&reads);
            if sets(&reads) || reads.contains(&Some(names.time_completed.clone())) {
                let kind = if index.exclusion { "exclusion constraint" } else { "unique index" };
                may_refuse.push(format!("the {kind} {}", qualified(&node.schema, &index.name)));
            }
        }
    }
    for what in may_refuse {
        let message = format!("{what} may refuse rows that a sweep completes; that was not tried");
        checked.unpass(Subject::Complete);
        checked.find(Subject::Complete, Warning, Reason::RowRefused, message, None);
    }
}

/// Whether a row can collide with another in this index when it is completed.
fn may_collide(index: &Index, id: &str) -> bool {
    // One that holds the key is as unique as before, and one of open rows loses the row.
    let harmless = index.columns.iter().any(|column| column.as_deref() == Some(id)) || index.open.is_some();
    index.exclusion || index.unique && !harmless
}

/// Whether what a sweep sets decides a CHECK by itself.
fn is_decided(plan: &Plan, reads: &[Option<String>]) -> bool {
    reads.iter().all(|column| column.as_ref().is_some_and(|name| plan.names.sets(name)))
}

fn name(constraint: &Constraint) -> String {
    format!("{} on {}", fix::names([constraint.name.as_str()]), qualified(&constraint.schema, &constraint.table))
}
