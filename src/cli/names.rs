//! Names as Kubernetes takes them, for arguments of the command line.

/// The name of a namespace.
///
/// # Errors
/// When no namespace can have it.
pub fn label(text: &str) -> Result<String, String> {
    let fits = (1..=63).contains(&text.len()) && is_label(text);
    if fits { Ok(text.into()) } else { Err("must be the name of a namespace, such as my-namespace".into()) }
}

/// The same, or nothing, as a variable that is not set to anything says it.
pub fn label_or_empty(text: &str) -> Result<String, String> {
    if text.is_empty() { Ok(String::new()) } else { label(text) }
}

/// The name of a Lease.
pub fn subdomain(text: &str) -> Result<String, String> {
    let fits = text.len() <= 253 && text.split('.').all(is_label);
    if fits { Ok(text.into()) } else { Err("must be the name of a Lease, such as my-lease".into()) }
}

/// What RFC 1123 calls a label, but for its length.
fn is_label(text: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    !text.is_empty() && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}
