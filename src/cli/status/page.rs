//! Lays labelled rows out: labels on the left, texts wrapped beside them. All text from elsewhere goes through here, and
//! loses what could steer a terminal. Pure.

use anstyle::Style;
use unicode_width::UnicodeWidthStr;

use super::words::plain;
use crate::cli::style::{FAINT, paint};

/// Where texts begin.
const INDENT: usize = 20;

/// Texts are not wrapped to less than this, however narrow the terminal is.
const LEAST: usize = 24;

/// A page that is being written.
#[derive(Debug)]
pub struct Page {
    text: String,
    width: usize,
    indent: usize,
}

impl Page {
    /// An empty one, `width` columns wide.
    pub fn new(width: usize) -> Self {
        // On a narrow terminal texts go below their labels.
        let indent = if width < INDENT + LEAST + 8 { 2 } else { INDENT };
        Self { text: String::new(), width: width.saturating_sub(indent).max(LEAST), indent }
    }

    /// A line as it stands, which holds nothing from elsewhere.
    pub fn line(&mut self, line: &str) {
        self.text.push_str(line.trim_end());
        self.text.push('\n');
    }

    /// A text beside its label.
    pub fn row(&mut self, label: &str, text: &str) {
        self.marked(label, Style::new(), "", text);
    }

    /// A text under the one before.
    pub fn more(&mut self, text: &str) {
        self.row("", text);
    }

    /// The same, less loud.
    pub fn faint(&mut self, text: &str) {
        for line in wrap(&plain(text), self.width) {
            self.place("", &paint(FAINT, &line));
        }
    }

    /// A text that begins with a mark in a style.
    pub fn marked(&mut self, label: &str, style: Style, mark: &str, text: &str) {
        let mark = plain(mark);
        for (index, line) in wrap(&plain(&format!("{mark}{text}")), self.width).iter().enumerate() {
            // A mark that was itself broken is left as it is.
            let painted = line.strip_prefix(&mark).filter(|_| index == 0).map(|rest| paint(style, &mark) + rest);
            self.place(if index == 0 { label } else { "" }, painted.as_ref().unwrap_or(line));
        }
    }

    /// A short text that is painted already, and holds nothing from elsewhere.
    pub fn painted(&mut self, label: &str, text: &str) {
        self.place(label, text);
    }

    fn place(&mut self, label: &str, text: &str) {
        let indent = self.indent;
        if indent < INDENT && !label.is_empty() {
            self.line(label);
            self.line(&format!("{:indent$}{text}", ""));
        } else {
            self.line(&format!("{label:indent$}{text}"));
        }
    }

    /// What was written.
    pub fn finish(self) -> String {
        self.text
    }
}

/// The lines of a text, each at most `width` columns, broken between words where that can be.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![];
    let mut line = String::new();
    for word in text.split(' ') {
        let mut rest = word;
        if !line.is_empty() && line.width() + 1 + rest.width() > width {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        while line.width() + rest.width() > width {
            let fits = fitting(rest, width);
            let (now, later) = rest.split_at(fits);
            lines.push(std::mem::take(&mut line) + now);
            rest = later;
        }
        line.push_str(rest);
    }
    lines.push(line);
    lines
}

/// The bytes of as many characters as fit, but never none.
fn fitting(text: &str, width: usize) -> usize {
    let mut end = 0;
    for (at, c) in text.char_indices() {
        end = at + c.len_utf8();
        if text.get(..end).is_some_and(|head| head.width() > width) {
            return if at == 0 { end } else { at };
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_broken_between_words_and_long_words_within() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("abcdefghij k", 4), ["abcd", "efgh", "ij k"]);
        assert_eq!(wrap("", 4), [""]);
        // Wide characters take two columns.
        assert_eq!(wrap("日本語 x", 4), ["日本", "語 x"]);
        assert_eq!(wrap("日", 1), ["日", ""]);
        for width in 1..40 {
            let text = "the database refused user \"app\": password 日本語 authentication failed (28P01)";
            let lines = wrap(text, width.max(2));
            assert!(lines.iter().all(|line| line.width() <= width.max(2)), "{width} {lines:?}");
            assert_eq!(lines.concat().replace(' ', ""), text.replace(' ', ""));
        }
    }

    #[test]
    fn on_a_narrow_terminal_texts_stand_below_their_labels() {
        let page = |width| {
            let mut page = Page::new(width);
            page.row("Backlog", "more than 1,000 stale rows");
            page.finish()
        };
        assert_eq!(page(80), "Backlog             more than 1,000 stale rows\n");
        assert_eq!(page(30), "Backlog\n  more than 1,000 stale rows\n");
        assert_eq!(page(1), "Backlog\n  more than 1,000 stale\n  rows\n");
    }
}
