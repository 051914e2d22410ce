//! What an image runs on, and the static binary for it: compiled here, also for another processor.

use anyhow::{Context, ensure};
use clap::ValueEnum;
use std::env::consts::ARCH;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::build::{Built, cargo, compile, root};
use support::process::{installed, output};
use support::progress;

/// A platform, by the name that registries and `docker build --platform` have for it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, ValueEnum)]
pub enum Platform {
    #[value(name = "linux/amd64")]
    Amd64,
    #[value(name = "linux/arm64")]
    Arm64,
}

impl Platform {
    /// The one of this machine.
    pub fn host() -> Self {
        if ARCH == "aarch64" { Self::Arm64 } else { Self::Amd64 }
    }

    /// As OCI writes it.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// As Rust writes it.
    pub fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// The C compiler, which links.
    fn compiler(self) -> &'static str {
        match self {
            _ if self == Self::host() => "cc",
            Self::Amd64 => "x86_64-linux-gnu-gcc",
            Self::Arm64 => "aarch64-linux-gnu-gcc",
        }
    }

    /// The version of the C library that a static binary gets.
    pub fn glibc(self) -> anyhow::Result<String> {
        let mut macros = Command::new(self.compiler());
        macros.args(["-E", "-dM", "-include", "features.h", "-x", "c", "/dev/null"]);
        let macros = output(&mut macros).with_context(|| self.missing())?;
        let value = |name: &str| macros.lines().find_map(|line| line.strip_prefix(&format!("#define {name} ")));
        let version = value("__GLIBC__").zip(value("__GLIBC_MINOR__"));
        let (major, minor) = version.with_context(|| self.missing())?;
        Ok(format!("{major}.{minor}"))
    }

    /// What to install, where it is not there.
    fn missing(self) -> String {
        let packages = match self {
            _ if self == Self::host() => "gcc libc6-dev",
            Self::Amd64 => "gcc-x86-64-linux-gnu libc6-dev-amd64-cross",
            Self::Arm64 => "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
        };
        format!("there is no {} with glibc (Debian and Ubuntu: `apt-get install {packages}`)", self.compiler())
    }

    /// How to run a static binary for it, which is built here: the words of the command line.
    pub fn program(self) -> anyhow::Result<Vec<PathBuf>> {
        let emulator = match self {
            _ if self == Self::host() => None,
            Self::Amd64 => Some("qemu-x86_64-static"),
            Self::Arm64 => Some("qemu-aarch64-static"),
        };
        let emulator = emulator.map(|name| {
            let missing = format!("{name} is needed (Debian and Ubuntu: `apt-get install qemu-user-static`)");
            installed(name).context(missing)
        });
        let emulator = emulator.transpose()?;
        let binary = self.static_binary(root(), "dev", "")?.binary;
        Ok(emulator.into_iter().chain([binary]).collect())
    }

    /// Builds the operator without any library that it would have to find in the image.
    pub fn static_binary(self, source: &Path, profile: &str, revision: &str) -> anyhow::Result<Built> {
        // Before that, looking up a name loads libraries, which an empty image does not have.
        let libc = self.glibc()?;
        let minor = libc.strip_prefix("2.").and_then(|minor| minor.parse::<u32>().ok());
        ensure!(
            minor >= Some(34),
            "glibc 2.34 or newer is needed, whose static binaries look names up; this is {libc}"
        );
        let target = self.target();
        let libraries = output(Command::new("rustc").args(["--print", "target-libdir", "--target", target]))?;
        ensure!(
            Path::new(libraries.trim()).is_dir(),
            "Rust's libraries for {target} are missing: `rustup target add {target}`"
        );

        progress::note(&format!("Building the static binary for linux/{} ({profile})", self.architecture()));
        let mut build = cargo();
        build.current_dir(source).args(["build", "--locked", "--bin", "audit-log-sweeper", "--profile", profile]);
        build.args(["--target", target]);
        if self != Self::host() {
            let name = target.replace('-', "_");
            build.env(format!("CARGO_TARGET_{}_LINKER", name.to_uppercase()), self.compiler());
            build.env(format!("CC_{name}"), self.compiler());
        }
        if source != root() {
            // Whatever the environment says, or nothing would be built again.
            build.env("CARGO_TARGET_DIR", source.join("target"));
        }
        // No place of this machine in the binary: two checkouts make the same.
        let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
        let home = home.or_else(|| Some(std::env::home_dir()?.join(".cargo"))).context("there is no home folder")?;
        let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
        let flags = ["-Ctarget-feature=+crt-static".into(), remap(source, "/src"), remap(&home, "/cargo")];
        build.env("AUDIT_LOG_SWEEPER_REVISION", revision);
        build.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
        compile(build)
    }
}
