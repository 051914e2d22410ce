//! Judges the types of the columns that a sweep reads, pure.

use chrono::TimeDelta;

use super::catalog::Column;
use super::finding::{PreflightReport, Severity, Subject};
use super::fix::{field, quoted};
use super::judge::Judge;
use crate::api::Reason;
use crate::sweep::Plan;
use crate::sweep::start::TimeColumn;

use Severity::{Blocking, Warning};

/// Types of keys that the sweep is tested with, and domains over them. `citext` is an extension's, wherever that is.
const KEY_TYPES: [&str; 9] = ["uuid", "int8", "int4", "int2", "text", "varchar", "bpchar", "numeric", "bytea"];

/// Types of times, and domains over them.
const TIME_TYPES: [&str; 2] = ["timestamptz", "timestamp"];

/// With fewer digits of a second, a time that is written down lies noticeably beside the true one.
const DIGITS: i64 = 3;

/// Clocks differ. A zone that is not the right one makes more than this.
const MAX_AHEAD: TimeDelta = TimeDelta::seconds(60);

impl Judge<'_> {
    pub(super) fn key_type(&self, column: &Column, path: &str, checked: &mut PreflightReport) {
        let known = column.base_schema == "pg_catalog" && KEY_TYPES.contains(&column.base.as_str());
        if known || column.base == "citext" {
            return;
        }
        let accepted = "uuid, bigint, integer, smallint, text, varchar, char, citext, numeric, bytea, or a domain over one of these";
        unfit("the key", column, accepted, path, checked);
    }

    pub(super) fn time_type(&self, column: &Column, path: &str, checked: &mut PreflightReport) {
        if column.not_null && column.name == self.names.time_completed {
            let message = format!(
                "{} is NOT NULL, so no row can be open, and no sweep would find any: is it the completion time?",
                quoted(&column.name)
            );
            checked.find(Subject::Columns, Blocking, Reason::SchemaMismatch, message, field(path));
            return;
        }
        if column.base_schema != "pg_catalog" || !TIME_TYPES.contains(&column.base.as_str()) {
            unfit("the time", column, "timestamptz or timestamp", path, checked);
        } else if (0..DIGITS).contains(&column.typmod) {
            let unit =
                ["1 s", "0.1 s", "0.01 s"].get(usize::try_from(column.typmod).unwrap_or_default()).unwrap_or(&"1 s");
            let effect = if column.name == self.names.time_completed {
                format!(
                    "a completion time is rounded down by up to {unit}. Readers that page by that time must leave out the last \
                     second, or miss rows"
                )
            } else {
                format!("a row is swept up to {unit} later than spec.timeout says, never earlier")
            };
            let message = format!("{} keeps {} digits of a second: {effect}", quoted(&column.name), column.typmod);
            checked.find(Subject::Columns, Warning, Reason::SchemaMismatch, message, None);
        }
    }
}

/// Judges how far the newest open start lies ahead of the server's clock.
pub(super) fn starts_ahead(plan: &Plan, started: TimeColumn, ahead: TimeDelta, checked: &mut PreflightReport) {
    if ahead <= MAX_AHEAD {
        return;
    }
    let (column, minutes) = (&plan.time_started, ahead.num_minutes());
    let (cause, fix) = if started.local {
        let zone = &plan.time_zone;
        let cause = format!(
            "spec.columns.timeZone says {zone}: the application writes another zone, or its clock is ahead. Rows are swept so much \
             later"
        );
        (cause, Some(field("spec.columns.timeZone")))
    } else {
        ("the application's clock is ahead. Rows are swept so much later".to_owned(), None)
    };
    let message = format!("the newest open row starts {minutes} min after the server's clock by {column}; {cause}");
    checked.unpass(Subject::Columns);
    checked.find(Subject::Columns, Warning, Reason::SchemaMismatch, message, fix);
}

fn unfit(what: &str, column: &Column, accepted: &str, path: &str, checked: &mut PreflightReport) {
    let message = format!(
        "{what} {} is of type {}; a sweep takes {accepted} (docs/sql-contract.md, \"The table\"). Name another column, or change \
         its type",
        quoted(&column.name),
        column.type_text
    );
    checked.find(Subject::Columns, Blocking, Reason::SchemaMismatch, message, field(path));
}
