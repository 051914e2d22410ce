//! Writes the SQL that people run to fix a table. Every name is quoted; what is long runs beside the application.

use postgres_protocol::escape::escape_identifier;

use super::catalog::InSchema;
use super::finding::{Fix, Part, RunAs};
use crate::api::cut;
use crate::sweep::open_index::OpenPredicate;
use crate::sweep::plan::literal;

/// The longest name that PostgreSQL keeps, in bytes.
pub const MAX_NAME: usize = 63;

/// A name with its schema.
pub fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", escape_identifier(schema), escape_identifier(name))
}

/// A name, quoted.
pub fn quoted(name: &str) -> String {
    escape_identifier(name)
}

/// Names, quoted and joined by commas.
pub fn names<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().map(escape_identifier).collect::<Vec<_>>().join(", ")
}

/// A fix for one role.
pub fn sql(run_as: RunAs, statements: impl IntoIterator<Item = String>) -> Fix {
    parts([part(run_as, statements)])
}

/// A fix for several roles, one after the other.
pub fn parts(parts: impl IntoIterator<Item = Part>) -> Fix {
    Fix::Sql(parts.into_iter().collect())
}

/// What one role runs.
pub fn part(run_as: RunAs, statements: impl IntoIterator<Item = String>) -> Part {
    Part { run_as, statements: statements.into_iter().collect() }
}

/// What an owner does in a schema.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Does {
    /// Names something there.
    Names,
    /// Makes an index there.
    Creates,
}

/// The rights in schemas that owners lack for what they are to do, as parts to run before it.
pub fn grants<'a>(
    schemas: &[InSchema],
    needs: impl IntoIterator<Item = (&'a str, &'a str, Does)> + Clone,
) -> Vec<Part> {
    let mut granting: Vec<Part> = vec![];
    for InSchema { schema, owner, role, usage, create } in schemas {
        let does =
            |what| needs.clone().into_iter().any(|(who, there, does)| who == role && there == schema && does == what);
        let creates = does(Does::Creates);
        let rights: Vec<&str> = [("USAGE", !usage && (creates || does(Does::Names))), ("CREATE", !create && creates)]
            .into_iter()
            .filter_map(|(right, lacks)| lacks.then_some(right))
            .collect();
        if rights.is_empty() {
            continue;
        }
        let grant =
            format!("GRANT {} ON SCHEMA {} TO {}", rights.join(", "), names([schema.as_str()]), names([role.as_str()]));
        granting.push(part(RunAs::SchemaOwner(owner.clone()), [grant]));
    }
    in_turn(granting)
}

/// Puts together what one role runs without a break.
pub fn in_turn(parts: impl IntoIterator<Item = Part>) -> Vec<Part> {
    let mut turns: Vec<Part> = vec![];
    for next in parts {
        match turns.last_mut() {
            Some(last) if last.run_as == next.run_as => last.statements.extend(next.statements),
            _ => turns.push(next),
        }
    }
    turns
}

/// A fix by an edit.
pub fn field(path: impl Into<String>) -> Fix {
    Fix::Field(path.into())
}

/// One action of ALTER TABLE.
pub fn alter(table: &str, action: &str) -> String {
    format!("ALTER TABLE {table} {action}")
}

/// Refuses NULL in a column. Rows are looked through by VALIDATE, while others write; SET NOT NULL then believes it.
pub fn set_not_null(table: &str, column: &str) -> Vec<String> {
    let (name, column) = (escape_identifier("audit_log_sweeper_not_null"), escape_identifier(column));
    vec![
        alter(
            table,
            &format!("DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name} CHECK ({column} IS NOT NULL) NOT VALID"),
        ),
        alter(table, &format!("VALIDATE CONSTRAINT {name}")),
        alter(table, &format!("ALTER COLUMN {column} SET NOT NULL")),
        alter(table, &format!("DROP CONSTRAINT {name}")),
    ]
}

/// One more label for an enum.
pub fn add_label(schema: &str, type_: &str, label: &str) -> String {
    format!("ALTER TYPE {} ADD VALUE IF NOT EXISTS {}", qualified(schema, type_), literal(label))
}

/// What an index is to be.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    pub unique: bool,
    pub columns: [&'a str; 2],
    /// The index holds open rows alone: how it says so, of which column. None: it holds every row.
    pub open: Option<(OpenPredicate, &'a str)>,
    /// What the name of a new one ends in.
    pub suffix: &'static str,
}

impl Wanted<'_> {
    /// What follows the name of an index.
    fn definition(&self, on: &str) -> String {
        let predicate = self.predicate().map(|predicate| format!(" WHERE {predicate}"));
        format!("ON {on} ({}){}", names(self.columns), predicate.unwrap_or_default())
    }

    /// The predicate as people write it.
    pub fn predicate(&self) -> Option<String> {
        self.open.map(|(predicate, column)| match predicate {
            OpenPredicate::Private => format!("pg_catalog.num_nulls({}) = 1", escape_identifier(column)),
            OpenPredicate::Plain => format!("{} IS NULL", escape_identifier(column)),
        })
    }

    const fn kind(&self) -> &'static str {
        if self.unique { "UNIQUE INDEX" } else { "INDEX" }
    }

    /// Creates it while the application writes.
    pub fn create(&self, index: &str, schema: &str, table: &str) -> String {
        let definition = self.definition(&qualified(schema, table));
        format!("CREATE {} CONCURRENTLY IF NOT EXISTS {} {definition}", self.kind(), escape_identifier(index))
    }

    /// Creates it on a partitioned table, without its partitions.
    pub fn create_parent(&self, index: &str, schema: &str, table: &str) -> String {
        let definition = self.definition(&format!("ONLY {}", qualified(schema, table)));
        format!("CREATE {} IF NOT EXISTS {} {definition}", self.kind(), escape_identifier(index))
    }

    /// A name for one on this table that is not taken.
    pub fn name(&self, schema: &str, table: &str, taken: &mut Vec<(String, String)>) -> String {
        let base = cut(table, MAX_NAME - self.suffix.len() - 4);
        let mut name = format!("{base}{}", self.suffix);
        for number in 2.. {
            if !taken.iter().any(|(s, n)| s == schema && *n == name) {
                break;
            }
            name = format!("{base}{}_{number}", self.suffix);
        }
        taken.push((schema.into(), name.clone()));
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted {
        unique: false,
        columns: ["time \"started\"", "id"],
        open: Some((OpenPredicate::Private, "Time.Completed")),
        suffix: "_open_by_time_started",
    };

    #[test]
    fn every_name_is_quoted() {
        assert_eq!(
            WANTED.create("i\"", "a.b", "c\"; --"),
            r#"CREATE INDEX CONCURRENTLY IF NOT EXISTS "i""" ON "a.b"."c""; --" ("time ""started""", "id") WHERE pg_catalog.num_nulls("Time.Completed") = 1"#
        );
        assert_eq!(add_label("s", "T", "it's"), r#"ALTER TYPE "s"."T" ADD VALUE IF NOT EXISTS 'it''s'"#);
    }

    #[test]
    fn a_new_name_is_free_and_not_too_long() {
        let mut taken = vec![("s".to_owned(), "t_open_by_time_started".to_owned())];
        assert_eq!(WANTED.name("s", "t", &mut taken), "t_open_by_time_started_2");
        assert_eq!(WANTED.name("s", "t", &mut taken), "t_open_by_time_started_3");
        assert_eq!(WANTED.name("other", "t", &mut taken), "t_open_by_time_started");
        let long = WANTED.name("s", &"ä".repeat(31), &mut taken);
        assert!(long.len() <= MAX_NAME - 3 && long.ends_with("ä_open_by_time_started"), "{long}");
    }
}
