//! What is made from the chart: the table of values in its README, and the manifest for those who do without Helm.

use anyhow::{Context, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use support::build::root;
use support::process::output;
use support::tools::Tools;

pub const README: &str = "charts/audit-log-sweeper/README.md";
pub const INSTALL: &str = "manifests/install.yaml";
pub const ROLES: &str = "manifests/roles.yaml";
const CHART: &str = "charts/audit-log-sweeper";

/// The table of values stands between these, whatever is around it is written by hand.
const TABLE: (&str, &str) =
    ("<!-- made by `cargo xtask generate` from values.yaml -->\n", "<!-- end of what is made -->\n");

/// Where the manifest installs to.
const NAMESPACE: &str = "audit-log-sweeper";

const INSTALL_HEAD: &str = "\
# All that the chart installs with its defaults, for `kubectl apply --server-side -f`. Made by `cargo xtask generate`.
# The image is not published yet: put the name of yours in place of `audit-log-sweeper:`.
# `kubectl delete -f` takes the CRD away too, and with it every AuditLogSweeper.
apiVersion: v1
kind: Namespace
metadata:
  name: audit-log-sweeper
  labels:
    pod-security.kubernetes.io/enforce: restricted
";

const ROLES_HEAD: &str = "\
# Beside the CRD, where teams install the operator for their own namespaces alone: lets whoever may view, edit or administer a
# namespace do the same with its AuditLogSweepers, and its administrators install the chart there. Made by `cargo xtask
# generate`; the chart and install.yaml bring the same.
";

/// The chart's README with the values as they are.
pub fn readme() -> anyhow::Result<String> {
    let text = fs::read_to_string(root().join(README)).context("the chart has no README")?;
    let parts = text.split_once(TABLE.0).and_then(|(before, rest)| Some((before, rest.split_once(TABLE.1)?.1)));
    let (before, after) = parts.with_context(|| format!("{README} has lost the marks of the table of values"))?;
    let table = table(&fs::read_to_string(root().join(CHART).join("values.yaml"))?)?;
    Ok(format!("{before}{}\n{table}\n{}{after}", TABLE.0, TABLE.1))
}

/// One row for each value: its path, its default, and the comment above it.
fn table(text: &str) -> anyhow::Result<String> {
    let values: Value = serde_saphyr::from_str(text).context("values.yaml")?;
    let comments = comments(text);
    let mut rows = String::from("| Value | Default | |\n|---|---|---|\n");
    for (path, comment) in &comments {
        let pointer = format!("/{}", path.replace('.', "/"));
        let default = values.pointer(&pointer).with_context(|| format!("values.yaml: no value is at {path}"))?;
        rows.push_str(&format!("| `{path}` | `{default}` | {} |\n", comment.replace('|', "\\|")));
    }
    let documented: Vec<&str> = comments.iter().map(|(path, _)| path.as_str()).collect();
    let bare = undocumented(&values, "", &documented);
    ensure!(bare.is_empty(), "values.yaml says nothing about {}", bare.join(", "));
    Ok(rows)
}

/// The paths that have a comment right above them, in the order of the file. Two spaces are a level.
fn comments(text: &str) -> Vec<(String, String)> {
    let (mut found, mut comment, mut path) = (vec![], vec![], vec![]);
    for line in text.lines() {
        let words = line.trim_start();
        if let Some(words) = words.strip_prefix('#') {
            comment.push(words.trim());
        } else if let Some((key, _)) = words.split_once(':').filter(|_| !words.starts_with('-')) {
            path.truncate((line.len() - words.len()) / 2);
            path.push(key);
            if !comment.is_empty() {
                found.push((path.join("."), comment.join(" ")));
            }
            comment.clear();
        } else {
            comment.clear();
        }
    }
    found
}

/// The values with no comment, neither their own nor of what they are in.
fn undocumented(value: &Value, path: &str, documented: &[&str]) -> Vec<String> {
    if documented.contains(&path) {
        return vec![];
    }
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let fields: BTreeMap<_, _> = fields.iter().collect();
            let inside = fields.into_iter().flat_map(|(name, value)| {
                undocumented(value, format!("{path}.{name}").trim_start_matches('.'), documented)
            });
            inside.collect()
        }
        _ => vec![path.to_owned()],
    }
}

/// The chart with its defaults as plain objects.
pub fn install() -> anyhow::Result<String> {
    Ok(format!("{INSTALL_HEAD}{}\n", plain(INSTALL, &["--skip-tests"])?.trim_end()))
}

/// The roles of people alone.
pub fn roles() -> anyhow::Result<String> {
    let roles = plain(ROLES, &["--show-only", "templates/aggregate.yaml"])?;
    // Names that no release has: it would take them along when it goes.
    let roles = roles.replace(&format!("audit-log-sweeper:{NAMESPACE}:"), "audit-log-sweeper:teams:");
    Ok(format!("{ROLES_HEAD}{}\n", roles.trim_end()))
}

/// What the chart renders, without what only Helm makes use of.
fn plain(file: &str, args: &[&str]) -> anyhow::Result<String> {
    let mut helm = Command::new(Tools::helm()?);
    helm.args(["template", "audit-log-sweeper", CHART, "-n", NAMESPACE]).args(args).current_dir(root());
    let rendered = output(&mut helm)?;
    let of_helm = ["helm.sh/chart:", "helm.sh/resource-policy:", "app.kubernetes.io/managed-by:", "# Source:"];
    let lines = rendered.lines().filter(|line| !of_helm.iter().any(|mark| line.trim_start().starts_with(mark)));
    // The CRD's only annotation was Helm's.
    let text = lines.collect::<Vec<_>>().join("\n").replace("  annotations:\n  labels:", "  labels:");
    ensure!(!text.contains("helm") && !text.contains("Helm"), "{file} still speaks of Helm");
    Ok(text.replace("\n\n---", "\n---").replace("---\n---", "---"))
}
