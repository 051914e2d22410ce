//! `audit-log-sweeper reasons`, which is hidden: the tables of reasons in docs/operating.md. Pure.

use crate::api::Reason;

/// Two tables, a blank line between them: of an object that is well or waits, and of failures.
pub fn tables() -> String {
    [false, true].map(table).join("\n")
}

fn table(of_failures: bool) -> String {
    let reasons = Reason::ALL.iter().filter(|reason| reason.failure().is_some() == of_failures);
    let rows = reasons.map(|reason| {
        let advice = linked(reason.advice_markdown());
        format!("| `{}` | {} | {advice} |\n", reason.as_str(), reason.meaning())
    });
    format!("| Reason | Means | Do |\n|---|---|---|\n{}", rows.collect::<String>())
}

/// In the document itself, a runbook is a link.
fn linked(advice: &str) -> String {
    let Some((before, after)) = advice.split_once(" in docs/operating.md") else { return advice.to_owned() };
    let (before, name) = before.rsplit_once(' ').unwrap_or_default();
    format!("{before} [{name}](#{}){after}", name.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runbook_is_linked_by_its_heading() {
        assert_eq!(linked("see Alert in docs/operating.md, or wait"), "see [Alert](#alert), or wait");
        assert_eq!(linked("check `a`"), "check `a`");
    }
}
