//! First step of a sweep: a spec becomes a plan, in which every name and value is already quoted for SQL.

use std::time::Duration;

use postgres_protocol::escape::{escape_identifier, escape_literal};

use crate::api::ValidSpec;
use crate::api::spec::Mode;

/// At most this many stale rows are counted for the backlog, and one more to tell "more than".
const MAX_BACKLOG: i64 = 10_000;

/// No sweep gives way for more than a quarter of this, however much time it has.
const LONGEST_YIELD: Duration = Duration::from_mins(10);

/// What to sweep, quoted, and how far to go. Made only of a spec; needs no database.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Schema and table, quoted.
    pub table: String,
    /// The key column, quoted.
    pub id: String,
    /// The column of the start time, quoted.
    pub time_started: String,
    /// The column of the completion time, quoted.
    pub time_completed: String,
    /// What `timestamp` columns mean, as a literal.
    pub time_zone: String,
    /// `, "column" = 'value'` for each further column to set.
    pub assignments: String,
    /// Whether to complete rows, or only to count them.
    pub mode: Mode,
    /// The same names as they are in the catalog, for the preflight.
    pub names: Names,
    /// How old an incomplete row must be.
    pub timeout: Duration,
    /// The most rows that one sweep completes.
    pub limit: i64,
    /// The most rows in one transaction.
    pub batch_size: i64,
    /// The longest that a statement may take.
    pub statement_timeout: Duration,
    /// The longest that the sweep may take.
    pub deadline: Duration,
    /// How long it gives way to others who write to the server.
    pub yield_budget: Duration,
}

/// Names as the spec and the catalog have them, not quoted.
#[derive(Clone, Debug)]
pub struct Names {
    /// The schema of the table.
    pub schema: String,
    /// The table.
    pub table: String,
    /// The key column.
    pub id: String,
    /// The column of the start time.
    pub time_started: String,
    /// The column of the completion time.
    pub time_completed: String,
    /// The further columns to set, in the spec's order. None: to NULL.
    pub complete: Vec<(String, Option<String>)>,
}

impl Names {
    /// Whether a sweep sets this column.
    pub fn sets(&self, column: &str) -> bool {
        column == self.time_completed || self.complete.iter().any(|(name, _)| name == column)
    }
}

impl Plan {
    /// The plan of a spec.
    pub fn new(spec: &ValidSpec) -> Self {
        let mut assignments = String::new();
        for set in &spec.complete {
            // Without a value it says setNull: that is one of the rules.
            let value = set.value.as_deref().map_or_else(|| "NULL".into(), literal);
            assignments.push_str(&format!(", {} = {value}", escape_identifier(&set.column)));
        }
        Self {
            table: format!("{}.{}", escape_identifier(&spec.schema), escape_identifier(&spec.table)),
            id: escape_identifier(&spec.columns.id),
            time_started: escape_identifier(&spec.columns.time_started),
            time_completed: escape_identifier(&spec.columns.time_completed),
            time_zone: literal(&spec.columns.time_zone),
            assignments,
            names: Names {
                schema: spec.schema.clone(),
                table: spec.table.clone(),
                id: spec.columns.id.clone(),
                time_started: spec.columns.time_started.clone(),
                time_completed: spec.columns.time_completed.clone(),
                complete: spec.complete.iter().map(|set| (set.column.clone(), set.value.clone())).collect(),
            },
            mode: spec.mode,
            timeout: spec.timeout.as_std(),
            limit: spec.limit.into(),
            batch_size: spec.batch_size.into(),
            statement_timeout: spec.statement_timeout.as_std(),
            deadline: spec.deadline.as_std(),
            yield_budget: spec.period.as_std().min(spec.deadline.as_std()).min(LONGEST_YIELD) / 4,
        }
    }

    /// The same, but no longer than the operator allows.
    pub fn capped(self, max_deadline: Duration) -> Self {
        Self {
            deadline: self.deadline.min(max_deadline),
            statement_timeout: self.statement_timeout.min(max_deadline),
            yield_budget: self.yield_budget.min(max_deadline / 4),
            ..self
        }
    }

    /// The most stale rows to count after a sweep.
    pub fn backlog_bound(&self) -> i64 {
        self.limit.min(MAX_BACKLOG)
    }
}

/// A string literal. The driver's function puts a blank before the `E` of a literal with backslashes.
pub fn literal(text: &str) -> String {
    escape_literal(text).trim_start().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan(spec: serde_json::Value) -> Plan {
        Plan::new(&ValidSpec::new(serde_json::from_value(spec).unwrap()).unwrap())
    }

    #[test]
    fn names_and_values_are_literal() {
        let plan = plan(json!({
            "database": { "secretRef": { "name": "db" } },
            "schema": "Mixed.Case", "table": "a\"; DROP TABLE x; --",
            "complete": [{ "column": "k", "value": "it's \\ \"x\"" }, { "column": "N", "setNull": true }],
        }));
        assert_eq!(plan.table, r#""Mixed.Case"."a""; DROP TABLE x; --""#);
        assert_eq!(plan.assignments, r#", "k" = E'it''s \\ "x"', "N" = NULL"#);
    }

    #[test]
    fn defaults_are_those_of_the_original() {
        let plan = plan(json!({ "database": { "secretRef": { "name": "db" } } }));
        assert_eq!(plan.table, r#""public"."audit_log""#);
        assert_eq!(plan.assignments, r#", "result_kind" = 'timeout'"#);
        assert_eq!((plan.timeout, plan.limit), (Duration::from_secs(14_400), 1000));
        assert_eq!(plan.backlog_bound(), 1000);
    }

    #[test]
    fn a_sweep_gives_way_for_a_quarter_of_its_time() {
        for (period, deadline, seconds) in [("1m", "5m", 15), ("10m", "5m", 75), ("24h", "24h", 150), ("1m", "4s", 1)] {
            let plan = plan(json!({
                "database": { "secretRef": { "name": "db" } }, "statementTimeout": "1s", "period": period, "deadline": deadline,
            }));
            assert_eq!(plan.yield_budget, Duration::from_secs(seconds));
        }
    }

    #[test]
    fn an_empty_list_sets_the_time_alone() {
        assert_eq!(plan(json!({ "database": { "secretRef": { "name": "db" } }, "complete": [] })).assignments, "");
    }
}
