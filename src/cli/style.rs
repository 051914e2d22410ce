//! Colours. `anstream` takes them out again where they are not wanted: in a file or a pipe, or with NO_COLOR.

use anstyle::{AnsiColor, Style};

pub const GOOD: Style = AnsiColor::Green.on_default();
pub const BAD: Style = AnsiColor::Red.on_default().bold();
pub const UNSURE: Style = AnsiColor::Yellow.on_default();
pub const STRONG: Style = Style::new().bold();
pub const FAINT: Style = Style::new().dimmed();

/// A text in a style.
pub fn paint(style: Style, text: &str) -> String {
    if style.is_plain() || text.is_empty() { text.into() } else { format!("{style}{text}{style:#}") }
}

/// The style of a condition's status, where True is good.
pub fn verdict(status: &str) -> Style {
    match status {
        "True" => GOOD,
        "False" => BAD,
        _ => UNSURE,
    }
}
