//! Judges the plan that the server makes for a batch, and for the application's own completion. Pure, as `judge` is.

use super::catalog::{Catalog, Index};
use super::finding::{PreflightReport, Severity, Subject};
use super::fix::{self, field, qualified, quoted};
use crate::api::Reason;
use crate::database::Error;
use crate::sweep::open_index::OpenPredicate;

use Severity::{Blocking, NotReady, Warning};

/// Judges the plan of a batch. `completion`: the indexes that the server would use for the application's own completion of
/// a row by its key, if it could be asked.
pub fn judge(steps: &[String], completion: Option<&[String]>, facts: &Catalog, checked: &mut PreflightReport) {
    if let Some(indexes) = completion {
        completion_by_key(indexes, facts, checked);
    }
    if !reads_the_whole_table(steps, facts) {
        let uses = completion.filter(|indexes| !indexes.is_empty());
        let uses = uses.map(|indexes| fix::names(indexes.iter().take(3).map(String::as_str)));
        let uses = uses.map(|names| format!("; the application's completions use {names}")).unwrap_or_default();
        checked.pass(Subject::Statement, format!("planned without reading the whole table{uses}"));
        return;
    }
    // A missing index was found before.
    if checked.findings.iter().any(|found| found.subject == Subject::Index && found.severity != Warning) {
        return;
    }
    let indexes = facts.tree.iter().flat_map(|node| node.indexes.iter().map(move |index| (node, index)));
    let pending = indexes.filter(|(_, index)| index.open.is_some() && index.pending);
    let pending: Vec<String> = pending.map(|(node, index)| qualified(&node.schema, &index.name)).collect();
    let message = if pending.is_empty() {
        "the index is there, but the server plans to read the whole table for each batch. Run ANALYZE on the table; if \
         the plan stays, report it with the output of check"
            .to_owned()
    } else {
        format!(
            "the server does not use {} yet and reads the whole table for each batch: the index was made while older \
             transactions were running. It serves once they have ended; check again then",
            pending.join(", ")
        )
    };
    checked.find(Subject::Statement, NotReady, Reason::IndexMissing, message, None);
}

/// Whether a plan scans the table otherwise than by an index of open rows. The rows that it chose are looked up by any.
fn reads_the_whole_table(steps: &[String], facts: &Catalog) -> bool {
    let open = |index: &&Index| index.open.is_some() && index.ordered;
    let open: Vec<_> = facts.tree.iter().flat_map(|node| &node.indexes).filter(open).map(|index| &index.name).collect();
    // A name may hold the end of a line.
    let plan = steps.join("\n");
    let walks = |name: &str| plan.contains(&format!(" using {name} on "));
    let walks_open = open.iter().any(|name| walks(name) || walks(&quoted(name)));
    plan.contains("Seq Scan") || plan.contains(" using ") && !walks_open
}

fn completion_by_key(indexes: &[String], facts: &Catalog, checked: &mut PreflightReport) {
    let private = facts.tree.iter().flat_map(|node| &node.indexes);
    let mut private = private.filter(|index| index.open == Some(OpenPredicate::Private));
    if let Some(index) = private.find(|index| indexes.contains(&index.name)) {
        let message = format!(
            "the server would use the sweep's index {} to complete a row by its key, instead of the key's own index. \
             Each completion leaves a dead entry there, so the application's completions become slower until vacuum \
             comes. Please report it with the server's version",
            quoted(&index.name)
        );
        checked.find(Subject::Index, Warning, Reason::IndexNotPrivate, message, None);
    }
}

/// Judges the server's refusal to plan a batch.
pub fn judge_refusal(error: &Error, checked: &mut PreflightReport) {
    // Of all that the catalog does not tell, what is left is a value that does not fit its column.
    let fix = (error.reason() == Reason::SchemaMismatch).then(|| field("spec.complete"));
    let message = format!("the server refuses the statement of a sweep: {error}");
    checked.find(Subject::Statement, Blocking, error.reason(), message, fix);
}

#[cfg(test)]
mod tests {
    use super::super::catalog::Node;
    use super::*;

    fn nothing() -> Catalog {
        let (similar, tree, taken, schemas) = (vec![], vec![], vec![], vec![]);
        Catalog { schema: None, similar, table: None, tree, autovacuum: true, taken, schemas }
    }

    #[test]
    fn a_seq_scan_is_no_news_where_the_index_is_missing_and_not_excused_by_a_warning() {
        let steps = ["Update on audit_log t".to_owned(), "  ->  Seq Scan on audit_log".to_owned()];
        let facts = nothing();
        for (severity, findings) in [(None, 1), (Some(NotReady), 1), (Some(Warning), 2)] {
            let mut checked = PreflightReport::default();
            if let Some(severity) = severity {
                checked.find(Subject::Index, severity, Reason::IndexMissing, "", None);
            }
            judge(&steps, None, &facts, &mut checked);
            assert_eq!((checked.findings.len(), checked.passed.len()), (findings, 0), "{severity:?}");
        }
    }

    #[test]
    fn a_planner_that_sees_through_the_private_index_is_told() {
        let index = |name: &str, open: Option<OpenPredicate>| Index {
            oid: 1,
            parent: None,
            name: name.into(),
            constraint: false,
            valid: true,
            unique: false,
            ordered: true,
            columns: vec![],
            includes: false,
            reads: vec![],
            exclusion: false,
            open,
            pending: false,
            partial: open.is_some(),
        };
        let node = Node {
            oid: 1,
            parent: None,
            schema: "public".into(),
            name: "audit_log".into(),
            kind: "r".into(),
            owner: "o".into(),
            by_expression: false,
            unidentified: false,
            rows: 0,
            autovacuum_at: None,
            indexes: vec![index("pkey", None), index("open", Some(OpenPredicate::Private))],
        };
        let facts = Catalog { tree: vec![node], ..nothing() };
        for (used, findings) in [("pkey", 0), ("open", 1)] {
            let mut checked = PreflightReport::default();
            judge(&[], Some(&[used.to_owned()]), &facts, &mut checked);
            assert_eq!(checked.findings.len(), findings, "{checked:#?}");
            assert!(checked.ready() && checked.passed[0].1.ends_with(&format!("completions use \"{used}\"")));
        }
    }
}
