//! The screens in docs/using.md: what the program prints of docs/screens.yaml, as of a fixed time.

use anyhow::Context;
use std::fs;
use std::path::Path;
use std::process::Command;
use support::build::root;
use support::process::output;

pub const DOCUMENT: &str = "docs/using.md";

/// A screen stands between these; the first names the command.
const MARKS: (&str, &str, &str) =
    ("<!-- screen, made by `cargo xtask generate`: ", " -->\n", "<!-- end of screen -->\n");

const SOURCE: [&str; 4] = ["-f", "docs/screens.yaml", "--at", "2026-11-22T20:15:00Z"];

/// The document with its screens as the program prints them.
pub fn document(program: &Path) -> anyhow::Result<String> {
    let text = fs::read_to_string(root().join(DOCUMENT)).context("there is no docs/using.md")?;
    let mut parts = text.split(MARKS.0);
    let mut made = parts.next().unwrap_or_default().to_owned();
    let mut screens = 0;
    for part in parts {
        let (command, rest) = part.split_once(MARKS.1).context("a screen in docs/using.md has no command")?;
        let after = rest.split_once(MARKS.2).context("a screen in docs/using.md has no end")?.1;
        let words: Vec<&str> = command.split_whitespace().collect();
        let screen = output(Command::new(program).args(&words).args(SOURCE).current_dir(root()))?;
        let (begin, middle, end) = MARKS;
        made.push_str(&format!(
            "{begin}{command}{middle}\n```console\n$ kubectl sweeper {command}\n{screen}```\n\n{end}{after}"
        ));
        screens += 1;
    }
    anyhow::ensure!(screens > 0, "docs/using.md has lost the marks of its screens");
    Ok(made)
}
