//! The history as a line of bars, oldest first: how many rows each sweep timed out, and which failed. Pure.

use std::collections::BTreeMap;

use super::words::{count, number, plain};
use crate::api::status::{HistoryEntry, Outcome};
use crate::cli::style::{BAD, FAINT, UNSURE, paint};

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const NOTHING: char = '·';
const FAILED: char = '×';

/// One mark for each entry; the highest bar is the most rows.
pub fn bars(history: &[HistoryEntry]) -> String {
    let most = most(history);
    let marks = history.iter().rev().map(|entry| match entry {
        HistoryEntry { outcome: Outcome::Failed, .. } => paint(BAD, &FAILED.to_string()),
        HistoryEntry { timed_out: ..=0, .. } => paint(FAINT, &NOTHING.to_string()),
        entry => paint(UNSURE, &bar(entry.timed_out, most).to_string()),
    });
    marks.collect()
}

fn most(history: &[HistoryEntry]) -> i64 {
    history.iter().map(|entry| entry.timed_out).max().unwrap_or_default()
}

/// Of `most` rows, in eighths, rounded up so that one row among many is still seen.
fn bar(rows: i64, most: i64) -> char {
    let eighths = (i128::from(rows) * 8 + i128::from(most) - 1) / i128::from(most.max(1));
    let index = usize::try_from(eighths - 1).unwrap_or_default();
    BARS.get(index).copied().unwrap_or('█')
}

/// What the marks mean in this history, and how many attempts they are about.
pub fn legend(history: &[HistoryEntry]) -> String {
    let sum = |entries: &mut dyn Iterator<Item = &HistoryEntry>| {
        entries.fold(0_i64, |sum, entry| sum.saturating_add(entry.count))
    };
    let mut parts = vec![count(sum(&mut history.iter()), "attempt", "attempts")];
    if most(history) > 0 {
        parts.push(format!("{} is {}", '█', count(most(history), "row", "rows")));
    }
    if history.iter().any(|entry| entry.timed_out <= 0 && entry.outcome != Outcome::Failed) {
        parts.push(format!("{NOTHING} none"));
    }
    let mut failures: BTreeMap<String, i64> = BTreeMap::new();
    for entry in history.iter().filter(|entry| entry.outcome == Outcome::Failed) {
        let reason = entry.reason.as_deref().map_or_else(|| "unknown".into(), plain);
        let count = failures.entry(reason).or_default();
        *count = count.saturating_add(entry.count);
    }
    if !failures.is_empty() {
        let each: Vec<_> = failures.iter().map(|(reason, count)| format!("{} {reason}", number(*count))).collect();
        parts.push(format!("{FAILED} failed ({})", each.join(", ")));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::status::Trigger;
    use chrono::DateTime;

    fn entry(timed_out: i64, reason: Option<&str>, count: i64) -> HistoryEntry {
        HistoryEntry {
            outcome: if reason.is_some() { Outcome::Failed } else { Outcome::Drained },
            reason: reason.map(Into::into),
            trigger: Trigger::Schedule,
            timed_out,
            count,
            first_time: DateTime::UNIX_EPOCH,
            last_time: DateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn the_oldest_is_left_and_the_most_rows_are_the_highest_bar() {
        let history = [
            entry(0, None, 499),
            entry(1, None, 1),
            entry(0, Some("ConnectTimeout"), 3),
            entry(1000, None, 1),
            entry(500, None, 1),
            entry(7, Some("TableLocked"), 1),
        ];
        let bars = anstream::adapter::strip_str(&bars(&history)).to_string();
        assert_eq!(bars, "×▄█×▁·");
        let legend = legend(&history);
        assert_eq!(legend, "506 attempts, █ is 1,000 rows, · none, × failed (3 ConnectTimeout, 1 TableLocked)");
    }

    #[test]
    fn no_history_and_huge_numbers_are_drawn_too() {
        assert_eq!((bars(&[]), legend(&[])), (String::new(), "0 attempts".into()));
        let history = [entry(i64::MAX, None, i64::MAX), entry(i64::MIN, None, i64::MAX), entry(1, None, 1)];
        assert_eq!(anstream::adapter::strip_str(&bars(&history)).to_string(), "▁·█");
        assert!(legend(&history).starts_with("9,223,372,036,854,775,807 attempts"));
    }
}
