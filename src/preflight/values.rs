//! Tries what a sweep sets, after the catalog was judged: whether each value fits its column and passes the CHECKs on it.

use super::catalog::{Catalog, Column, Constraint, Table};
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
}

/// What there is to try. The expressions are the server's own text of its catalog.
pub fn trials(plan: &Plan, table: &Table) -> Vec<Trial> {
    let complete = &plan.names.complete;
    let column = |name: &str| table.columns.iter().find(|column| column.name == name);
    let cast = |value: &Option<String>, column: &Column| {
        let value = value.as_deref().map_or_else(|| "NULL".into(), literal);
        format!("CAST({value} AS {}){}", column.type_text, column.collate)
    };
    let path = |position: usize, value: &Option<String>| {
        format!("spec.complete[{position}].{}", if value.is_some() { "value" } else { "setNull" })
    };
    let mut trials = vec![];
    for (position, (name, value)) in complete.iter().enumerate() {
        let (Some(column), field) = (column(name), path(position, value)) else { continue };
        let what = format!("{} (of type {}) cannot hold what {field} sets", quoted(name), column.type_text);
        trials.push(Trial { sql: format!("SELECT {}", cast(value, column)), check: Check::No, what, field });
    }
    let mut row: Vec<String> = complete
        .iter()
        .filter_map(|(name, value)| Some(format!("{} AS {}", cast(value, column(name)?), quoted(name))))
        .collect();
    row.push(format!("clock_timestamp() AS {}", plan.time_completed));
    for constraint in &table.constraints {
        let (Some(expression), Some((position, (_, value)))) = (
            &constraint.expression,
            complete.iter().enumerate().find(|(_, (name, _))| constraint.columns.contains(&Some(name.clone()))),
        ) else {
            continue;
        };
        let (decided, name) = (is_decided(plan, constraint), name(constraint));
        // What a sweep does not set is mostly NULL in incomplete rows.
        let others = constraint.columns.iter().flatten().filter(|name| !plan.names.sets(name));
        let others = others.filter_map(|name| Some(format!("{} AS {}", cast(&None, column(name)?), quoted(name))));
        let row: Vec<String> = row.iter().cloned().chain(others).collect();
        let what = if decided {
            format!("{name} refuses what a sweep sets")
        } else {
            format!("{name}, which also reads what a sweep does not set, may refuse rows; that was not tried")
        };
        trials.push(Trial {
            sql: format!("SELECT ({expression}) FROM (SELECT {}) AS t", row.join(", ")),
            check: if decided { Check::Decided } else { Check::Undecided },
            what,
            field: path(position, value),
        });
    }
    trials
}

/// Judges what became of a trial: the server's answer, or its error.
pub fn trial(trial: &Trial, answer: Result<Option<&str>, &Error>, checked: &mut PreflightReport) {
    let state = match (answer, trial.check) {
        (Ok(Some("t")), _) | (Ok(_), Check::No) | (Ok(None), Check::Decided) => return,
        (Err(error), Check::No | Check::Decided) => format!(" (SQLSTATE {})", error.sqlstate().unwrap_or("unknown")),
        _ => String::new(),
    };
    // Never the server's text: an expression may call a function that quotes rows.
    checked.unpass(Subject::Complete);
    let refused =
        |error: &&Error| error.sqlstate().is_some_and(|code| code.starts_with("22") || code.starts_with("23"));
    if trial.check == Check::Undecided {
        checked.find(Subject::Complete, Warning, Reason::RowRefused, trial.what.clone(), None);
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
        // One that holds the key is as unique as before.
        let unique = node.indexes.iter().filter(|index| index.unique && index.parent.is_none());
        for index in unique.filter(|index| sets(&index.columns) && !index.columns.contains(&Some(names.id.clone()))) {
            may_refuse.push(format!("the unique index {}", qualified(&node.schema, &index.name)));
        }
    }
    for what in may_refuse {
        let message = format!("{what} may refuse rows that a sweep completes; that was not tried");
        checked.unpass(Subject::Complete);
        checked.find(Subject::Complete, Warning, Reason::RowRefused, message, None);
    }
}

/// Whether what a sweep sets decides a CHECK by itself.
fn is_decided(plan: &Plan, constraint: &Constraint) -> bool {
    constraint.columns.iter().all(|column| column.as_ref().is_some_and(|name| plan.names.sets(name)))
}

fn name(constraint: &Constraint) -> String {
    format!("{} on {}", fix::names([constraint.name.as_str()]), qualified(&constraint.schema, &constraint.table))
}
