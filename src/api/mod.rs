//! The resource `AuditLogSweeper`: what users write, what they read, and the CRD made from both.

pub mod condition;
pub mod crd;
pub mod duration;
pub mod manifest;
pub mod reason;
pub mod request;
pub mod spec;
pub mod status;
pub mod sweeper;
pub mod validate;

use std::fmt::Display;

pub use condition::{Condition, ConditionType, ConditionUpdate};
pub use duration::Duration;
pub use reason::{Class, Failure, Reason, Stage};
pub use spec::{AuditLogSweeper, AuditLogSweeperSpec};
pub use status::AuditLogSweeperStatus;
pub use sweeper::Sweeper;
pub use validate::ValidSpec;

/// The API group of the resource.
pub const GROUP: &str = "auditlog.dev";

/// Cuts `text` to at most `max` bytes at a character boundary, so that no status write is refused for its length.
pub fn cut(text: &str, max: usize) -> &str {
    text.get(..text.floor_char_boundary(max)).unwrap_or_default()
}

/// A count and what is counted: "1 row", "2 rows", ">1000 rows".
pub fn counted(count: impl Display, noun: &str) -> String {
    let count = count.to_string();
    let plural = if count == "1" { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

/// The same with a verb: "1 stale row is left".
pub fn stale_rows_left(count: impl Display) -> String {
    let stale = counted(count, "stale row");
    let are = if stale.ends_with('s') { "are" } else { "is" };
    format!("{stale} {are} left")
}

#[cfg(test)]
mod tests {
    use super::{counted, cut, stale_rows_left};

    #[test]
    fn one_is_not_many() {
        let said = [counted(0, "row"), counted(1, "row"), stale_rows_left("1"), stale_rows_left(">1")];
        assert_eq!(said, ["0 rows", "1 row", "1 stale row is left", ">1 stale rows are left"]);
    }

    #[test]
    fn cut_keeps_whole_characters() {
        assert_eq!(cut("abc", 5), "abc");
        assert_eq!(cut("abc", 2), "ab");
        assert_eq!(cut("aäb", 2), "a");
        assert_eq!(cut("ä", 1), "");
    }
}
