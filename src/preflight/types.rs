//! Judges the types of the columns that a sweep reads, pure, and says how to come by the right ones.

use super::catalog::Column;
use super::dependants::Hold;
use super::finding::{Fix, PreflightReport, Severity, Subject};
use super::fix::{self, field, quoted};
use super::judge::Judge;
use crate::api::Reason;

use Severity::{Blocking, NotReady, Warning};

/// Types of keys that the sweep is tested with.
const KEY_TYPES: [&str; 6] = ["uuid", "int8", "text", "int4", "int2", "varchar"];

/// With fewer digits of a second, a time written down lies up to some hundredths of a second beside the true one.
const DIGITS: i64 = 3;

/// Defaults that are a point in time whatever the type of the column.
const CLOCKS: [&str; 5] =
    ["now()", "CURRENT_TIMESTAMP", "clock_timestamp()", "transaction_timestamp()", "statement_timestamp()"];

/// How a column comes by another type.
struct Cast {
    to: String,
    /// What follows the column after USING.
    using: &'static str,
    /// Values stay what they are.
    same: bool,
    /// The zone of the session counts.
    zone: bool,
    /// What the SQL takes for granted.
    note: &'static str,
}

impl Judge<'_> {
    pub(super) fn key_type(&self, column: &Column, path: &str, checked: &mut PreflightReport) {
        if column.type_schema == "pg_catalog" && KEY_TYPES.contains(&column.type_name.as_str()) {
            return;
        }
        let (to, same) = if column.base_schema == "pg_catalog" && KEY_TYPES.contains(&column.base.as_str()) {
            (column.base.clone(), true)
        } else {
            ("text".into(), false)
        };
        let cast = Cast { to, using: if same { "" } else { "::text" }, same, zone: false, note: "" };
        let (note, fix) = self.retyped(column, path, Some(cast));
        let message = format!(
            "the key {} is of type {}; it must be uuid, bigint or text{note}",
            quoted(&column.name),
            column.type_name
        );
        checked.find(Subject::Columns, Blocking, Reason::SchemaMismatch, message, fix);
    }

    pub(super) fn time_type(&self, column: &Column, path: &str, checked: &mut PreflightReport) {
        let name = quoted(&column.name);
        if column.type_schema != "pg_catalog" || column.type_name != "timestamptz" {
            let (note, fix) = self.retyped(column, path, to_time(column));
            let message = format!("{name} is of type {}; it must be timestamptz{note}", column.type_name);
            checked.find(Subject::Columns, Blocking, Reason::SchemaMismatch, message, fix);
        } else if (0..DIGITS).contains(&column.typmod) {
            let cast = Cast { to: "timestamptz".into(), using: "", same: true, zone: false, note: "" };
            let (digits, (note, fix)) = (column.typmod, self.retyped(column, path, Some(cast)));
            if column.name == self.names.time_completed {
                let message = format!(
                    "{name} is timestamptz({digits}), too coarse: a completion time rounded down lies in a window that \
                     readers may have left behind, and they would miss the row. It takes {DIGITS} digits or more{note}"
                );
                checked.find(Subject::Columns, NotReady, Reason::SchemaMismatch, message, fix);
            } else {
                let message = format!(
                    "{name} is timestamptz({digits}): a row counts as up to {} s older than it is{note}",
                    ["0.5", "0.05", "0.005"].get(usize::try_from(digits).unwrap_or_default()).unwrap_or(&"0.5")
                );
                checked.find(Subject::Columns, Warning, Reason::SchemaMismatch, message, fix);
            }
        }
    }

    /// Another type for a column: what that entails, and the SQL, or the field where there is none.
    fn retyped(&self, column: &Column, path: &str, cast: Option<Cast>) -> (String, Fix) {
        let none = |why: &str| (format!(" ({why})"), field(path));
        if column.partition_key {
            return none("it is part of the partition key, so its type cannot be changed");
        }
        if column.generated {
            return none("the database generates it, so its type cannot be changed without its expression");
        }
        if let Some(parent) = &self.table.parent {
            return none(&format!("the table has it from the {parent}, where its type is changed for all"));
        }
        let Some(cast) = cast else {
            return none(
                "PostgreSQL cannot turn the one into the other: only who writes it knows what it means. Name a column that is \
                 timestamptz, or add one and fill it",
            );
        };
        let holding = |holds: &[Hold]| -> Vec<String> {
            let held = column.dependants.iter().filter(|dependant| holds.contains(&dependant.hold));
            held.map(|dependant| dependant.name.clone()).collect()
        };
        let drop_first = holding(if cast.same { &[Hold::Always] } else { &[Hold::Always, Hold::Type] });
        let made_again = if cast.same { vec![] } else { holding(&[Hold::Maybe]) };

        let mut note = " (the SQL locks the table, and may rewrite it".to_owned();
        note.push_str(cast.note);
        if !made_again.is_empty() {
            let made_again = made_again.join(", ");
            note.push_str(&format!(
                "; it makes {made_again} again and fails where that does not work with the new type: then drop it before"
            ));
        }
        if !drop_first.is_empty() {
            let drop_first = drop_first.join(", ");
            note.push_str(&format!(
                "; it does not run as it is: before it, drop {drop_first}, with what depends on that, and make it again after"
            ));
        }
        note.push(')');

        // By itself the server would read the result of the old default in the zone of whoever inserts.
        let default = column.default.as_deref().filter(|_| !cast.same).filter(|_| cast.to == "timestamptz");
        let default = default.map(|default| match CLOCKS.contains(&default) {
            true => default.to_owned(),
            false => format!("(({default})::{}){}", column.type_text, cast.using),
        });
        let mut statements =
            vec![fix::retype(&self.plan.table, &column.name, &cast.to, cast.using, default.as_deref())];
        if cast.zone {
            statements.insert(0, "SET TimeZone = 'UTC'".into());
            statements.push("RESET TimeZone".into());
        }
        let mut fix = self.by_owners(statements);
        if let Fix::Sql { drop_first: first, .. } = &mut fix {
            *first = drop_first;
        }
        (note, fix)
    }
}

/// How a column becomes a timestamptz. None: by no cast.
fn to_time(column: &Column) -> Option<Cast> {
    let (using, same, zone, note) = match (column.base_schema.as_str(), column.base.as_str()) {
        ("pg_catalog", "timestamptz") => ("", true, false, ""),
        ("pg_catalog", "timestamp" | "date") => (
            "::timestamp AT TIME ZONE 'UTC'",
            false,
            false,
            "; it takes the times for UTC: put the zone there that the application writes, if it is another",
        ),
        ("pg_catalog", "text" | "varchar" | "bpchar") => (
            "::timestamptz",
            false,
            true,
            "; it takes times without a zone for UTC: put the zone there that the application writes, if it is another; it \
             fails where a text is no time",
        ),
        _ => return None,
    };
    Some(Cast { to: "timestamptz".into(), using, same, zone, note })
}
