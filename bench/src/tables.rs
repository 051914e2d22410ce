//! Tables and verdicts, as people read them: aligned on the screen, Markdown in the document. Pure.

use std::fmt::Write;

/// A table with a heading.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    pub title: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(title: impl Into<String>, columns: &[&str]) -> Table {
        let columns = columns.iter().map(|column| (*column).to_owned()).collect();
        Table { title: title.into(), columns, rows: vec![] }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// For the screen: the first column to the left, numbers to the right.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", self.title);
        for row in self.lines() {
            let cells = row.iter().zip(self.widths()).enumerate();
            let cells: String = cells
                .map(|(index, (cell, width))| match index {
                    0 => format!("  {cell:width$}"),
                    _ => format!("   {cell:>width$}"),
                })
                .collect();
            text.push_str(cells.trim_end());
            text.push('\n');
        }
        text
    }

    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | ")).replace("  ", " ");
        let ruler: String = (0..self.columns.len()).map(|index| if index == 0 { "|---" } else { "|---:" }).collect();
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        format!("**{}**\n\n{}{ruler}|\n{rows}", self.title, line(&self.columns))
    }

    fn lines(&self) -> impl Iterator<Item = &Vec<String>> {
        std::iter::once(&self.columns).chain(&self.rows)
    }

    fn widths(&self) -> Vec<usize> {
        let width =
            |column: usize| self.lines().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
        (0..self.columns.len()).map(|column| width(column).unwrap_or_default()).collect()
    }
}

/// What a number is held against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
    Exactly(f64),
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Bound::AtLeast(bound) => value >= bound,
            Bound::AtMost(bound) => value <= bound,
            Bound::Exactly(bound) => value == bound,
        }
    }

    fn words(self) -> String {
        match self {
            Bound::AtLeast(bound) => format!("at least {bound}"),
            Bound::AtMost(bound) => format!("at most {bound}"),
            Bound::Exactly(bound) => format!("exactly {bound}"),
        }
    }
}

/// Whether something reached what was asked of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    pub what: String,
    /// None: it was not measured.
    pub value: Option<f64>,
    /// What it has to reach.
    pub must: Option<Bound>,
    /// What would be good.
    pub aim: Option<Bound>,
}

impl Verdict {
    pub fn must(what: impl Into<String>, value: Option<f64>, bound: Bound) -> Verdict {
        Verdict { what: what.into(), value, must: Some(bound), aim: None }
    }

    pub fn aim(what: impl Into<String>, value: Option<f64>, bound: Bound) -> Verdict {
        Verdict { what: what.into(), value, must: None, aim: Some(bound) }
    }

    pub fn aiming(self, bound: Bound) -> Verdict {
        Verdict { aim: Some(bound), ..self }
    }

    /// Whether it has what it must.
    pub fn passed(&self) -> bool {
        self.must.is_none_or(|bound| self.value.is_some_and(|value| bound.holds(value)))
    }

    /// `FAIL` is what must not be; `missed` an aim.
    pub fn word(&self) -> &'static str {
        match (self.value, self.aim) {
            _ if !self.passed() => "FAIL",
            (None, _) => "not measured",
            (Some(value), Some(aim)) if !aim.holds(value) => "missed",
            _ => "PASS",
        }
    }
}

/// All verdicts as one table.
pub fn verdicts(verdicts: &[Verdict]) -> Table {
    let mut table = Table::new("What was asked", &["", "measured", "must be", "aim", ""]);
    let words = |bound: Option<Bound>| bound.map_or_else(String::new, Bound::words);
    for verdict in verdicts {
        let value = verdict.value.map_or_else(|| "-".into(), super::stats::number);
        table.row([verdict.what.clone(), value, words(verdict.must), words(verdict.aim), verdict.word().into()]);
    }
    table
}

/// What a section found.
#[derive(Clone, Debug, Default)]
pub struct Finding {
    pub tables: Vec<Table>,
    pub verdicts: Vec<Verdict>,
}

impl Finding {
    pub fn text(&self) -> String {
        let mut text = String::new();
        for table in &self.tables {
            let _ = writeln!(text, "{}", table.text());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_markdown_is_a_table() {
        let mut table = Table::new("Speed", &["", "rows/s"]);
        table.row(["ours".into(), "61 000".into()]);
        table.row(["the original".into(), "9".into()]);
        assert_eq!(table.text(), "Speed\n                 rows/s\n  ours           61 000\n  the original        9\n");
        assert_eq!(
            table.markdown(),
            "**Speed**\n\n| | rows/s |\n|---|---:|\n| ours | 61 000 |\n| the original | 9 |\n"
        );
    }

    #[test]
    fn a_verdict_fails_below_what_it_must_and_misses_below_its_aim() {
        let verdict = |value| Verdict::must("x", value, Bound::AtLeast(0.5)).aiming(Bound::AtLeast(0.8)).word();
        assert_eq!([Some(0.49), Some(0.5), Some(0.8), None].map(verdict), ["FAIL", "missed", "PASS", "FAIL"]);
        let aim = |value| Verdict::aim("x", value, Bound::AtMost(1.2)).word();
        assert_eq!([Some(1.2), Some(1.3), None].map(aim), ["PASS", "missed", "not measured"]);
        assert!(!Verdict::must("x", Some(1.001), Bound::Exactly(1.0)).passed());
        assert!(Verdict::must("x", Some(1.0), Bound::Exactly(1.0)).passed());
    }
}
