//! `cargo xtask image`: the image as an OCI archive, without a daemon: one static binary, and what the Dockerfile says of it.

mod check;
pub mod platform;
mod sbom;

use anyhow::{Context, bail, ensure};
use flate2::Compression;
use flate2::write::GzEncoder;
use platform::Platform;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use support::build::root;
use support::process::output;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// For each platform: it is pulled on every node that the operator moves to.
const MOST_BYTES: u64 = 8_000_000;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An image archive that can be pushed or loaded.
pub struct Image {
    pub path: PathBuf,
    /// As a registry or a node knows it, tag included.
    pub name: String,
    /// Of the manifest, or of the index where there are several.
    pub digest: String,
    pub built: Vec<ForPlatform>,
}

/// An image's part for one platform.
pub struct ForPlatform {
    pub platform: Platform,
    /// What a node pulls.
    pub bytes: u64,
    /// The bill of materials, beside the archive.
    bill: PathBuf,
    binary: PathBuf,
    manifest: Value,
    blobs: Vec<Vec<u8>>,
}

pub fn run(name: Option<&str>, platforms: &[Platform], profile: &str, check: bool) -> anyhow::Result<()> {
    let image = build(root(), name, platforms, profile)?;
    println!("name    {}", image.name);
    println!("digest  {}", image.digest);
    println!("path    {}", image.path.display());
    for part in &image.built {
        let (bill, megabytes) = (part.bill.display(), part.bytes as f64 / 1e6);
        println!("built   linux/{}, {megabytes:.1} MB; SBOM {bill}", part.platform.architecture());
    }
    if check { check::run(&image, profile) } else { Ok(()) }
}

/// All that could differ between two builds of one commit is taken from the commit.
struct Commit {
    revision: String,
    /// Since 1970.
    seconds: u64,
    /// The same as RFC 3339 has it.
    created: String,
}

impl Commit {
    fn of(source: &Path) -> anyhow::Result<Self> {
        let git = |args: &[&str]| output(Command::new("git").args(args).current_dir(source));
        let commit = git(&["show", "-s", "--format=%H %ct %cI"])?;
        let mut words = commit.split_whitespace();
        let (Some(revision), Some(seconds), Some(created)) = (words.next(), words.next(), words.next()) else {
            bail!("git does not say which commit this is");
        };
        let dirty = if git(&["status", "--porcelain"])?.is_empty() { "" } else { "-dirty" };
        let revision = format!("{revision}{dirty}");
        Ok(Self { revision, seconds: seconds.parse()?, created: created.to_owned() })
    }
}

/// Builds the binary of this checkout for each platform, and packs them. Without a platform: for that of this machine.
pub fn build(source: &Path, name: Option<&str>, platforms: &[Platform], profile: &str) -> anyhow::Result<Image> {
    let name = name.map_or_else(|| format!("audit-log-sweeper:{VERSION}"), str::to_owned);
    let (_, tag) = name.rsplit_once(':').with_context(|| format!("{name} has no tag: write NAME:TAG"))?;
    let commit = Commit::of(source)?;
    // In one order, whatever order they are named in.
    let mut platforms = platforms.to_vec();
    if platforms.is_empty() {
        platforms.push(Platform::host());
    }
    platforms.sort();
    platforms.dedup();
    fs::create_dir_all(source.join("target/image"))?;
    let built = platforms.iter().map(|platform| for_platform(source, *platform, profile, &commit));
    let built = built.collect::<anyhow::Result<Vec<_>>>()?;

    let manifests: Vec<&Value> = built.iter().map(|part| &part.manifest).collect();
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests }).to_string().into_bytes();
    let mut blobs: Vec<&Vec<u8>> = built.iter().flat_map(|part| &part.blobs).collect();
    // One platform needs no index of its own.
    let mut entry = match manifests.as_slice() {
        [one] => (*one).clone(),
        _ => {
            blobs.push(&index);
            descriptor(INDEX, &index)
        }
    };
    let digest = entry["digest"].as_str().context("a descriptor has a digest")?.to_owned();
    // The first is the standard's, the second what containerd names the image after.
    entry["annotations"] =
        json!({ "org.opencontainers.image.ref.name": tag, "io.containerd.image.name": qualified(&name) });
    let layout = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [entry] });

    let path = source.join(format!("target/image/audit-log-sweeper-{VERSION}.tar"));
    let mut archive = tar::Builder::new(File::create(&path)?);
    append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644, 0)?;
    append(&mut archive, "index.json", layout.to_string().as_bytes(), 0o644, 0)?;
    for blob in blobs {
        append(&mut archive, &format!("blobs/{}", self::digest(blob).replace(':', "/")), blob, 0o644, 0)?;
    }
    archive.into_inner()?.sync_all()?;
    Ok(Image { path, name, digest, built })
}

fn for_platform(source: &Path, platform: Platform, profile: &str, commit: &Commit) -> anyhow::Result<ForPlatform> {
    let built = platform.static_binary(source, profile, &commit.revision)?;
    let binary = fs::read(&built.binary)?;
    ensure!(!has_interpreter(&binary), "the binary is not static: it asks for a dynamic loader");
    let bill = sbom::bill(source, platform, &built, &sha256(&binary), commit)?;

    let layer = layer(&binary, commit.seconds)?;
    let packed = gzip(&layer)?;
    let dockerfile = fs::read_to_string(source.join("Dockerfile")).context("Dockerfile")?;
    let (mut config, architecture) = (config(&dockerfile, &commit.revision)?, platform.architecture());
    config["architecture"] = json!(architecture);
    config["created"] = json!(commit.created);
    config["rootfs"] = json!({ "type": "layers", "diff_ids": [digest(&layer)] });
    config["history"] = json!([{ "created": commit.created, "created_by": "cargo xtask image" }]);
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &packed)],
    });
    let manifest = manifest.to_string().into_bytes();
    let mut entry = descriptor(MANIFEST, &manifest);
    entry["platform"] = json!({ "architecture": architecture, "os": "linux" });

    let beside = source.join(format!("target/image/audit-log-sweeper-{VERSION}-linux-{architecture}.cdx.json"));
    fs::write(&beside, bill)?;
    let blobs = vec![packed, config, manifest];
    let bytes = blobs.iter().map(|blob| blob.len() as u64).sum();
    ensure!(bytes < MOST_BYTES, "the image for {architecture} has {bytes} bytes; at most {MOST_BYTES} are wanted");
    Ok(ForPlatform { platform, bytes, bill: beside, binary: built.binary, manifest: entry, blobs })
}

/// Whether an ELF binary (64 bits, little endian) names a dynamic loader.
fn has_interpreter(elf: &[u8]) -> bool {
    const PT_INTERP: u64 = 3;
    let number = |at: usize, size: usize| elf[at..at + size].iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte));
    let (table, size, count) = (number(0x20, 8) as usize, number(0x36, 2) as usize, number(0x38, 2) as usize);
    (0..count).any(|index| number(table + index * size, 4) == PT_INTERP)
}

/// The image's configuration, from the last stage of the Dockerfile.
fn config(dockerfile: &str, revision: &str) -> anyhow::Result<Value> {
    let (_, stage) =
        dockerfile.rsplit_once("\nFROM scratch\n").context("the Dockerfile's last stage is not scratch")?;
    let stage = stage.replace("${VERSION}", VERSION).replace("${REVISION}", revision);
    let (mut config, mut labels) = (json!({}), Map::new());
    for line in stage.lines().filter(|line| !line.starts_with('#')) {
        let Some((instruction, rest)) = line.split_once(' ') else { continue };
        match instruction {
            "LABEL" => {
                let (key, value) = rest.split_once('=').with_context(|| format!("Dockerfile: {line}"))?;
                labels.insert(key.to_owned(), json!(value.trim_matches('"')));
            }
            "USER" => config["User"] = json!(rest),
            "EXPOSE" => config["ExposedPorts"] = json!({ format!("{rest}/tcp"): {} }),
            "ENTRYPOINT" => config["Entrypoint"] = serde_json::from_str(rest)?,
            "CMD" => config["Cmd"] = serde_json::from_str(rest)?,
            "ARG" | "COPY" => {}
            _ => bail!("Dockerfile: `cargo xtask image` does not know {instruction}"),
        }
    }
    config["Labels"] = labels.into();
    Ok(json!({ "os": "linux", "config": config }))
}

fn layer(binary: &[u8], seconds: u64) -> anyhow::Result<Vec<u8>> {
    let mut layer = tar::Builder::new(vec![]);
    append(&mut layer, "audit-log-sweeper", binary, 0o755, seconds)?;
    Ok(layer.into_inner()?)
}

/// Root's, and of a time that is the same every time.
fn append<W: std::io::Write>(
    archive: &mut tar::Builder<W>,
    path: &str,
    contents: &[u8],
    mode: u32,
    seconds: u64,
) -> anyhow::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_mtime(seconds);
    header.set_size(contents.len() as u64);
    Ok(archive.append_data(&mut header, path, contents)?)
}

fn gzip(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(vec![], Compression::best());
    std::io::Write::write_all(&mut encoder, bytes)?;
    Ok(encoder.finish()?)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", sha256(bytes))
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(blob), "size": blob.len() })
}

/// With the registry that a name without one stands for.
fn qualified(name: &str) -> String {
    match name.split_once('/') {
        Some((registry, _)) if registry.contains(['.', ':']) || registry == "localhost" => name.to_owned(),
        Some(_) => format!("docker.io/{name}"),
        None => format!("docker.io/library/{name}"),
    }
}
