//! `cargo xtask generate`: writes the files that are made from others, so that they never say anything else.

mod api;
mod chart;
mod performance;
mod plots;
mod reasons;
mod screens;

use anyhow::{Context, bail};
use similar::TextDiff;
use std::fs;
use std::process::Command;
use support::build::{build_operator, root};
use support::process::output;

/// What `kubectl apply` takes, and what the chart reads.
pub const CRD: [&str; 2] = ["crds/auditlogsweepers.auditlog.dev.yaml", "charts/audit-log-sweeper/files/crd.yaml"];

pub fn run(check: bool) -> anyhow::Result<()> {
    let program = build_operator("dev")?;
    let crd = output(Command::new(&program).arg("crd"))?;
    let mut stale = false;
    for file in CRD {
        stale |= settle(file, &crd, check)?;
    }
    stale |= settle(api::API, &api::reference(&crd)?, check)?;
    stale |= settle(chart::README, &chart::readme()?, check)?;
    // Of the chart as it is now written, its CRD included.
    stale |= settle(chart::INSTALL, &chart::install()?, check)?;
    stale |= settle(chart::ROLES, &chart::roles()?, check)?;
    stale |= settle(screens::DOCUMENT, &screens::document(&program)?, check)?;
    stale |= settle(reasons::DOCUMENT, &reasons::document(&program)?, check)?;
    if let Some(document) = performance::document()? {
        stale |= settle(performance::DOCUMENT, &document, check)?;
    }
    for (file, plot) in plots::files()? {
        stale |= settle(file, &plot, check)?;
    }
    if stale {
        bail!("files differ from what they are made from: run `cargo xtask generate`");
    }
    Ok(())
}

/// Writes the file, or shows how it differs. Whether it is stale.
fn settle(file: &str, wanted: &str, check: bool) -> anyhow::Result<bool> {
    let path = root().join(file);
    let found = fs::read_to_string(&path).unwrap_or_default();
    if found == wanted {
        println!("{file} is up to date");
    } else if check {
        let diff = TextDiff::from_lines(found.as_str(), wanted);
        print!("{}", diff.unified_diff().context_radius(2).header(file, "as it should be"));
        return Ok(true);
    } else {
        let folder = path.parent().expect("every file is in a folder");
        let written = fs::create_dir_all(folder).and_then(|()| fs::write(&path, wanted));
        written.with_context(|| format!("{file} cannot be written"))?;
        println!("{file} written");
    }
    Ok(false)
}
