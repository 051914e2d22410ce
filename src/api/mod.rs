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

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn cut_keeps_whole_characters() {
        assert_eq!(cut("abc", 5), "abc");
        assert_eq!(cut("abc", 2), "ab");
        assert_eq!(cut("aäb", 2), "a");
        assert_eq!(cut("ä", 1), "");
    }
}
