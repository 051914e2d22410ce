//! Judges what the role may do, pure: its rights, and row security.

use super::catalog::Column;
use super::finding::{PreflightReport, RunAs, Severity, Subject};
use super::fix::{self, quoted, sql};
use super::judge::Judge;
use crate::api::Reason;
use crate::sweep::plan::Names;

use Severity::Blocking;

impl Judge<'_> {
    pub(super) fn rights(&self, checked: &mut PreflightReport) {
        let user = quoted(&self.server.user);
        if !self.schema.usage {
            let schema = quoted(&self.names.schema);
            let message = format!("{user} may not use the schema {schema}");
            let grant = format!("GRANT USAGE ON SCHEMA {schema} TO {user}");
            let fix = sql(RunAs::SchemaOwner(self.schema.owner.clone()), [grant]);
            checked.find(Subject::Rights, Blocking, Reason::PermissionDenied, message, fix);
        }
        if let Some(key) = self.column(&self.names.id).filter(|key| !key.base_usage) {
            let schema = quoted(&key.base_schema);
            let message =
                format!("{user} may not use the schema {schema}, where the type of the key has its operators");
            let grant = format!("GRANT USAGE ON SCHEMA {schema} TO {user}");
            let fix = sql(RunAs::SchemaOwner(key.base_schema_owner.clone()), [grant]);
            checked.find(Subject::Rights, Blocking, Reason::PermissionDenied, message, fix);
        }
        let Names { id, time_started, time_completed, complete, .. } = self.names;
        let missing = |names: &[&str], has: fn(&Column) -> bool| {
            let columns = names.iter().filter_map(|name| self.column(name));
            fix::names(columns.filter(|column| !has(column)).map(|column| column.name.as_str()))
        };
        let read = missing(&[id, time_started, time_completed], |column| column.select);
        let mut set = vec![time_completed.as_str()];
        set.extend(complete.iter().map(|(name, _)| name.as_str()));
        let set = missing(&set, |column| column.update);
        let rights: Vec<String> = [("SELECT", read), ("UPDATE", set)]
            .into_iter()
            .filter(|(_, columns)| !columns.is_empty())
            .map(|(right, columns)| format!("{right} ({columns})"))
            .collect();
        if !rights.is_empty() {
            let (rights, table) = (rights.join(", "), &self.plan.table);
            let message = format!("{user} lacks {rights} on {table}");
            let fix = self.by_owner([format!("GRANT {rights} ON {table} TO {user}")]);
            checked.find(Subject::Rights, Blocking, Reason::PermissionDenied, message, fix);
        }
        if checked.is_clean(Subject::Rights) {
            checked.pass(Subject::Rights, format!("{user} may read the key and set what a sweep sets"));
        }
    }

    pub(super) fn row_security(&self, checked: &mut PreflightReport) {
        let table = self.table;
        if !table.row_security {
            checked.pass(Subject::RowSecurity, "off for this table");
        } else if self.server.bypass || table.owned && !table.force_row_security {
            checked.pass(Subject::RowSecurity, "does not apply to this role");
        } else {
            let user = quoted(&self.server.user);
            let (forced, fix) = if table.owned {
                let action = fix::alter(&self.plan.table, "NO FORCE ROW LEVEL SECURITY");
                (", also to its owner (FORCE)", self.by_owner([action]))
            } else {
                ("", sql(RunAs::Superuser, [format!("ALTER ROLE {user} BYPASSRLS")]))
            };
            let message = format!(
                "row security applies to {user}{forced}. Policies can hide stale rows without a word, so a sweep asks \
                 the server to refuse instead; none can be written that it accepts"
            );
            checked.find(Subject::RowSecurity, Blocking, Reason::RowSecurity, message, fix);
        }
    }
}
