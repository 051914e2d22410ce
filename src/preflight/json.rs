//! SQL whose answer is JSON: what the questions about the catalog are made of.

/// A JSON array of what a query finds; empty where that is nothing.
pub(super) fn list(item: &str, from: &str) -> String {
    format!("(SELECT coalesce(json_agg({item}), '[]'::json) FROM {from})")
}
