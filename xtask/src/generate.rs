//! `cargo xtask generate`: writes the files that are made from the code, so that they never say anything else.

use crate::{build_operator, root};
use anyhow::{Context, bail};
use similar::TextDiff;
use std::fs;
use std::process::Command;
use support::process::output;

/// What `kubectl apply` takes, and what the chart reads.
pub const FILES: [&str; 2] = ["crds/auditlogsweepers.auditlog.dev.yaml", "charts/audit-log-sweeper/files/crd.yaml"];

pub fn run(check: bool) -> anyhow::Result<()> {
    let crd = output(Command::new(build_operator("dev")?).arg("crd"))?;
    let mut stale = false;
    for file in FILES {
        let path = root().join(file);
        let found = fs::read_to_string(&path).unwrap_or_default();
        if found == crd {
            println!("{file} is up to date");
        } else if check {
            stale = true;
            let diff = TextDiff::from_lines(&found, &crd);
            print!("{}", diff.unified_diff().context_radius(2).header(file, "from the code"));
        } else {
            let folder = path.parent().expect("every file is in a folder");
            let written = fs::create_dir_all(folder).and_then(|()| fs::write(&path, &crd));
            written.with_context(|| format!("{file} cannot be written"))?;
            println!("{file} written");
        }
    }
    if stale {
        bail!("files differ from what the code makes: run `cargo xtask generate`");
    }
    Ok(())
}
