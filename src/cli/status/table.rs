//! All AuditLogSweepers of a namespace or a cluster, a line each. Pure.

use anstyle::Style;
use chrono::{DateTime, Utc};
use unicode_width::UnicodeWidthStr;

use super::history;
use super::object_view::{ObjectView, advice};
use super::words::{ago, due, number, plain};
use crate::api::ConditionType;
use crate::cli::style::{BAD, FAINT, STRONG, UNSURE, paint, verdict};

/// A text and how it is painted; or painted already, and so many columns wide.
struct Cell {
    text: String,
    width: usize,
}

impl Cell {
    fn new(text: impl AsRef<str>, style: Style) -> Self {
        let text = plain(text.as_ref());
        Self { width: text.width(), text: paint(style, &text) }
    }

    fn plain(text: impl AsRef<str>) -> Self {
        Self::new(text, Style::new())
    }
}

struct Column {
    head: &'static str,
    /// On a narrow terminal the highest go first; 0 never goes.
    spare: u8,
    cell: fn(DateTime<Utc>, &ObjectView) -> Cell,
}

const COLUMNS: [Column; 9] = [
    Column { head: "NAMESPACE", spare: 0, cell: |_, seen| Cell::plain(&seen.namespace) },
    Column { head: "NAME", spare: 0, cell: |_, seen| Cell::plain(&seen.name) },
    Column { head: "READY", spare: 0, cell: |_, seen| ready(seen) },
    Column { head: "REASON", spare: 1, cell: |_, seen| reason(seen) },
    Column { head: "LAST SUCCESS", spare: 3, cell: last_success },
    Column { head: "TIMED OUT", spare: 4, cell: |_, seen| timed_out(seen) },
    Column { head: "BACKLOG", spare: 2, cell: |_, seen| backlog(seen) },
    Column { head: "NEXT SWEEP", spare: 5, cell: next },
    Column { head: "HISTORY", spare: 6, cell: |_, seen| bars(seen) },
];

const GAP: &str = "   ";

/// The table, on a terminal of `width` columns, and what to do about each object that is not ready.
pub fn table(now: DateTime<Utc>, all: &[ObjectView], namespaces: bool, width: usize) -> String {
    let mut columns: Vec<(&Column, Vec<Cell>)> = COLUMNS
        .iter()
        .filter(|column| namespaces || column.head != "NAMESPACE")
        .map(|column| (column, all.iter().map(|seen| (column.cell)(now, seen)).collect()))
        .collect();
    let widest = |(column, cells): &(&Column, Vec<Cell>)| {
        cells.iter().map(|cell| cell.width).chain([column.head.len()]).max().unwrap_or_default()
    };
    while columns.iter().map(widest).sum::<usize>() + GAP.len() * (columns.len() - 1) > width {
        let spare = columns.iter().map(|(column, _)| column.spare).max().unwrap_or_default();
        if spare == 0 {
            break;
        }
        columns.retain(|(column, _)| column.spare != spare);
    }
    let mut lines = vec![String::new(); all.len() + 1];
    for column in &columns {
        let heads = std::iter::once(Cell::new(column.0.head, STRONG));
        let cells = column.1.iter().map(|cell| (cell.text.as_str(), cell.width));
        let heads: Vec<Cell> = heads.collect();
        let whole = heads.iter().map(|cell| (cell.text.as_str(), cell.width)).chain(cells);
        for (line, (text, taken)) in lines.iter_mut().zip(whole) {
            if !line.is_empty() {
                line.push_str(GAP);
            }
            line.push_str(text);
            line.push_str(&" ".repeat(widest(column) - taken));
        }
    }
    let mut text: String = lines.iter().map(|line| format!("{}\n", line.trim_end())).collect();
    let troubles: Vec<String> = all.iter().filter_map(|seen| trouble(seen, namespaces)).collect();
    if !troubles.is_empty() {
        text.push('\n');
        text.push_str(&troubles.concat());
    }
    text
}

/// A line about an object that is not ready.
fn trouble(seen: &ObjectView, namespaces: bool) -> Option<String> {
    let ready = seen.condition(ConditionType::Ready).filter(|ready| ready.status == "False")?;
    let place = if namespaces { format!("{}/", plain(&seen.namespace)) } else { String::new() };
    let advice = advice(&ready.reason, "").unwrap_or_else(|| plain(&ready.message));
    Some(format!("{place}{}: {}: {advice}\n", plain(&seen.name), paint(BAD, &plain(&ready.reason))))
}

fn ready(seen: &ObjectView) -> Cell {
    let status = seen.condition(ConditionType::Ready).map_or("Unknown", |ready| &ready.status);
    Cell::new(status, verdict(status))
}

fn reason(seen: &ObjectView) -> Cell {
    Cell::plain(seen.condition(ConditionType::Ready).map_or("Pending", |ready| &ready.reason))
}

fn last_success(now: DateTime<Utc>, seen: &ObjectView) -> Cell {
    seen.status.last_successful_time.map_or_else(|| Cell::new("never", FAINT), |at| Cell::plain(ago(now, at)))
}

fn timed_out(seen: &ObjectView) -> Cell {
    let last = seen.status.last_sweep.as_ref();
    Cell::plain(last.map_or_else(|| "-".into(), |last| number(last.timed_out)))
}

fn backlog(seen: &ObjectView) -> Cell {
    let Some(backlog) = &seen.status.backlog else { return Cell::plain("-") };
    let style = match seen.condition(ConditionType::BacklogBounded) {
        Some(bounded) if bounded.status == "False" => BAD,
        _ => Style::new(),
    };
    let more = if backlog.at_least { ">" } else { "" };
    Cell::new(format!("{more}{}", number(backlog.remaining)), style)
}

fn next(now: DateTime<Utc>, seen: &ObjectView) -> Cell {
    match seen.status.next_schedule_time {
        None if seen.suspend() => Cell::new("suspended", UNSURE),
        None => Cell::plain("-"),
        Some(at) => Cell::plain(due(now, at)),
    }
}

fn bars(seen: &ObjectView) -> Cell {
    Cell { text: history::bars(&seen.status.history), width: seen.status.history.len() }
}
