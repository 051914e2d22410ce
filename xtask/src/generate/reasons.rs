//! The tables of reasons in docs/operating.md, as the operator prints them.

use anyhow::Context;
use std::fs;
use std::path::Path;
use std::process::Command;
use support::build::root;
use support::process::output;

pub const DOCUMENT: &str = "docs/operating.md";

/// A table stands between these.
const MARKS: (&str, &str) =
    ("<!-- made by `cargo xtask generate` from src/api/reason.rs -->\n", "<!-- end of what is made -->\n");

/// The document with the reasons as they are.
pub fn document(program: &Path) -> anyhow::Result<String> {
    let tables = output(Command::new(program).arg("reasons"))?;
    let mut rest = fs::read_to_string(root().join(DOCUMENT))?;
    let mut document = String::new();
    for table in tables.split("\n\n") {
        let parts = rest.split_once(MARKS.0).and_then(|(before, rest)| Some((before, rest.split_once(MARKS.1)?.1)));
        let (before, after) = parts.with_context(|| format!("{DOCUMENT} has lost the marks of a table of reasons"))?;
        document.push_str(&format!("{before}{}\n{}\n\n{}", MARKS.0, table.trim_end(), MARKS.1));
        rest = after.to_owned();
    }
    Ok(document + &rest)
}
