//! The annotation by which users ask for a sweep now.

/// Each new value of this annotation asks for one sweep now.
pub const REQUESTED_AT: &str = "auditlog.dev/requestedAt";

/// So many bytes of that value are looked at.
pub const MAX_REQUEST: usize = 128;
