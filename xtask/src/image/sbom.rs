//! The bill of materials beside the image, as CycloneDX 1.5: every crate in its binary, with version, licence and checksum.

use super::Commit;
use super::platform::Platform;
use anyhow::{Context, ensure};
use cyclonedx_bom::models::component::Classification;
use cyclonedx_bom::models::hash::{Hash, HashAlgorithm, HashValue, Hashes};
use cyclonedx_bom::models::license::{LicenseChoice, Licenses};
use cyclonedx_bom::prelude::*;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use support::build::{Built, cargo};
use support::process::output;

const OPERATOR: &str = "audit-log-sweeper";

/// The bill of what a build for this target linked. The same bytes for the same commit: no number and no time of its own.
///
/// # Errors
/// When a crate has no licence or no checksum, or when cargo's resolver says that other crates belong in the binary.
pub(super) fn bill(
    source: &Path,
    platform: Platform,
    built: &Built,
    sha256: &str,
    commit: &Commit,
) -> anyhow::Result<Vec<u8>> {
    let metadata = output(cargo().current_dir(source).args(["metadata", "--locked", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let lock: toml::Table = fs::read_to_string(source.join("Cargo.lock"))?.parse().context("Cargo.lock")?;
    let checksums = checksums(&lock);
    let target = platform.target();
    let linked = linked(&built.artifacts, target);

    // In the order of their names and versions, whatever order the build had.
    let (mut components, mut operator) = (BTreeMap::new(), None);
    for package in metadata["packages"].as_array().context("cargo metadata names no packages")? {
        let field = |name: &str| package[name].as_str().with_context(|| format!("cargo metadata names no {name}"));
        let (name, version) = (field("name")?, field("version")?);
        if name == OPERATOR {
            let license = field("license")?;
            operator = Some(component(Classification::Application, ("cargo", name, version), license, Some(sha256))?);
        } else if linked.contains(field("id")?) {
            let of = || format!("{name} {version}");
            let license = package["license"].as_str().with_context(|| format!("{} names no licence", of()))?;
            let checksum =
                checksums.get(&(name, version)).with_context(|| format!("Cargo.lock: no checksum of {}", of()))?;
            let purl = ("cargo", name, version);
            components.insert((name, version), component(Classification::Library, purl, license, Some(checksum))?);
        }
    }
    let found = components.keys().map(|(name, version)| format!("{name} v{version}")).collect();
    compare(&found, &resolved(source, target)?)?;

    // A static binary holds these too, which are no crates.
    let rustc = output(Command::new("rustc").arg("--version").current_dir(source))?;
    let rust = rustc.split(' ').nth(1).context("rustc names no version")?;
    let std = component(Classification::Library, ("generic", "rust-std", rust), "MIT OR Apache-2.0", None)?;
    let glibc =
        component(Classification::Library, ("generic", "glibc", &platform.glibc()?), "LGPL-2.1-or-later", None)?;

    let bom = Bom {
        serial_number: None,
        metadata: Some(Metadata {
            timestamp: Some(commit.created.clone().try_into()?),
            component: operator,
            ..Default::default()
        }),
        components: Some(Components(components.into_values().chain([std, glibc]).collect())),
        ..Default::default()
    };
    let mut bill = vec![];
    bom.output_as_json(&mut bill, SpecVersion::V1_5)?;
    // As those read it who get it.
    let read = Bom::parse_from_json(&bill[..])?;
    let verdict = read.validate_version(SpecVersion::V1_5);
    ensure!(verdict.passed(), "the bill of materials is no CycloneDX 1.5: {verdict:?}");
    let all = read.components.iter().flat_map(|components| &components.0);
    let crates = all.filter(|one| one.purl.as_ref().is_some_and(|purl| purl.to_string().starts_with("pkg:cargo/")));
    let names = crates.map(|one| format!("{} v{}", one.name, one.version.clone().unwrap_or_default()));
    compare(&names.collect(), &found)?;
    Ok(bill)
}

/// Of the type, name and version that a package URL is made of.
fn component(
    class: Classification,
    (kind, name, version): (&str, &str, &str),
    license: &str,
    sha256: Option<&str>,
) -> anyhow::Result<Component> {
    let purl = Purl::new(kind, name, version)?;
    let hash = |content: &str| Hash { alg: HashAlgorithm::SHA_256, content: HashValue(content.to_owned()) };
    Ok(Component {
        // Some crates still write MIT/Apache-2.0.
        licenses: Some(Licenses(vec![LicenseChoice::Expression(SpdxExpression::parse_lax(license.to_owned())?)])),
        hashes: sha256.map(|content| Hashes(vec![hash(content)])),
        purl: Some(purl.clone()),
        ..Component::new(class, name, version, Some(purl.to_string()))
    })
}

/// The ids of the packages whose libraries the compiler made for the target, as the build itself reported them. What runs
/// in the build, procedural macros and build scripts, was made for the host, and lies elsewhere.
fn linked<'a>(artifacts: &'a [Value], target: &str) -> BTreeSet<&'a str> {
    let place = format!("/{target}/");
    let libraries = artifacts.iter().filter(|artifact| {
        let files = artifact["filenames"].as_array().into_iter().flatten().filter_map(Value::as_str);
        files.into_iter().any(|file| file.ends_with(".rlib") && file.contains(&place))
    });
    libraries.filter_map(|artifact| artifact["package_id"].as_str()).collect()
}

/// Name and version to SHA-256, of all that come from a registry.
fn checksums(lock: &toml::Table) -> BTreeMap<(&str, &str), &str> {
    let packages = lock.get("package").and_then(toml::Value::as_array).into_iter().flatten();
    packages
        .filter_map(|package| {
            let field = |name: &str| package.get(name).and_then(toml::Value::as_str);
            Some(((field("name")?, field("version")?), field("checksum")?))
        })
        .collect()
}

/// What cargo's resolver puts into the binary: another way to the same crates, which knows nothing of the build.
fn resolved(source: &Path, target: &str) -> anyhow::Result<BTreeSet<String>> {
    let mut tree = cargo();
    tree.current_dir(source).args(["tree", "--locked", "--package", OPERATOR, "--target", target]);
    tree.args(["--edges", "normal,no-proc-macro", "--prefix", "none", "--format", "{p}"]);
    let crates = output(&mut tree)?;
    let names = crates.lines().filter_map(|line| {
        let mut words = line.split(' ');
        Some(format!("{} {}", words.next()?, words.next()?))
    });
    Ok(names.filter(|name| !name.starts_with(&format!("{OPERATOR} "))).collect())
}

fn compare(found: &BTreeSet<String>, expected: &BTreeSet<String>) -> anyhow::Result<()> {
    let more: Vec<_> = found.difference(expected).collect();
    let less: Vec<_> = expected.difference(found).collect();
    ensure!(more.is_empty() && less.is_empty(), "the bill of materials has {more:?} too much, and lacks {less:?}");
    ensure!(!found.is_empty(), "the bill of materials is empty");
    Ok(())
}
