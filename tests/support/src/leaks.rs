//! What must never be shown: a marker that the fixtures plant in passwords, rows and certificates, and where all output of
//! the suite is kept, so that `cargo xtask test` can search it for the marker.

use std::fs;
use std::path::PathBuf;
use std::process::Output;

/// Part of every password, of texts in every row, and of the names in certificates.
pub const MARKER: &str = "hunter2leak";

/// The folder for output, if it is kept.
pub const FOLDER: &str = "AUDIT_LOG_SWEEPER_OUTPUT";

/// Where output goes that is to be searched.
pub fn folder() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

/// Keeps a text.
pub fn keep(text: &str) {
    if let Some(folder) = folder() {
        fs::write(folder.join(format!("text-{}", crate::random_hex())), text).expect("the folder can be written to");
    }
}

/// Keeps what a command said.
pub fn keep_output(output: &Output) {
    keep(&String::from_utf8_lossy(&output.stdout));
    keep(&String::from_utf8_lossy(&output.stderr));
}

/// The files in which the marker or a piece of PEM is found, and how many bytes were searched in how many files.
pub fn search(folder: &std::path::Path) -> anyhow::Result<(Vec<String>, usize, u64)> {
    let (mut found, mut files, mut bytes) = (vec![], 0, 0);
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if !path.is_file() {
            continue;
        }
        let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        (files, bytes) = (files + 1, bytes + text.len() as u64);
        for line in text.lines().filter(|line| line.contains(MARKER) || line.contains("-----BEGIN")) {
            found.push(format!("{}: {}", path.display(), line.chars().take(600).collect::<String>()));
        }
    }
    Ok((found, files, bytes))
}
