//! etcd, kube-apiserver, kubectl and Helm: built from the Go modules pinned in `tools/`, once, into the user's cache folder.

use crate::{cache, progress};
use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};
use std::env::{self, consts};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names the version of Kubernetes to run on, such as 1.34, in place of the newest.
pub const KUBERNETES: &str = "AUDIT_LOG_SWEEPER_KUBERNETES";

/// The oldest version of Kubernetes that is supported. The newest patch of it that the Go proxy has is pinned.
pub const OLDEST: &str = "1.34";

#[derive(Clone, Debug)]
pub struct Tools {
    pub etcd: PathBuf,
    pub kube_apiserver: PathBuf,
    pub kubectl: PathBuf,
    pub helm: PathBuf,
}

impl Tools {
    /// Finds the tools, or builds what is missing, which takes minutes; progress is on stderr.
    pub fn ensure() -> anyhow::Result<Tools> {
        Self::of(env::var(KUBERNETES).ok().as_deref())
    }

    /// With the API server and kubectl of this version of Kubernetes, such as 1.34. None: the newest, or what
    /// KUBEBUILDER_ASSETS has.
    pub fn of(kubernetes: Option<&str>) -> anyhow::Result<Tools> {
        let helm = Self::helm()?;
        let (etcd, kubernetes) = match (kubernetes, env::var_os("KUBEBUILDER_ASSETS")) {
            (Some(OLDEST), _) => (ETCD.build()?, OLDEST_KUBERNETES.build()?),
            (Some(other), _) => bail!("Kubernetes {other} is not pinned in tools/: {OLDEST} is, and the newest"),
            (None, Some(assets)) => (PathBuf::from(&assets), PathBuf::from(&assets)),
            (None, None) => (ETCD.build()?, NEWEST_KUBERNETES.build()?),
        };
        let tools = Tools {
            etcd: etcd.join("etcd"),
            kube_apiserver: kubernetes.join("kube-apiserver"),
            kubectl: kubernetes.join("kubectl"),
            helm,
        };
        for tool in [&tools.etcd, &tools.kube_apiserver, &tools.kubectl] {
            ensure!(tool.is_file(), "{} is missing: unset KUBEBUILDER_ASSETS, and it is built", tool.display());
        }
        Ok(tools)
    }

    /// Helm alone, for those who start no cluster.
    pub fn helm() -> anyhow::Result<PathBuf> {
        Ok(HELM.build()?.join("helm"))
    }
}

/// A folder of `tools/`, and what is built from it.
struct Module {
    name: &'static str,
    /// Its version is the version of what is built.
    path: &'static str,
    packages: &'static [&'static str],
    /// Empty when the packages give their own names.
    output: &'static str,
    /// What the linker writes into the program, which otherwise would not know its version.
    stamps: fn(version: &str) -> Vec<String>,
}

const ETCD: Module = Module {
    name: "etcd",
    path: "go.etcd.io/etcd/server/v3",
    packages: &["go.etcd.io/etcd/server/v3"],
    output: "etcd",
    stamps: |_| vec![],
};

const NEWEST_KUBERNETES: Module = Module {
    name: "kubernetes",
    path: "k8s.io/kubernetes",
    packages: &["k8s.io/kubernetes/cmd/kube-apiserver", "k8s.io/kubernetes/cmd/kubectl"],
    output: "",
    stamps: |version| {
        let mut parts = version.split('.');
        let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let of = |field, value: &str| format!("k8s.io/component-base/version.git{field}={value}");
        vec![of("Version", &format!("v{version}")), of("Major", major), of("Minor", minor)]
    },
};

const OLDEST_KUBERNETES: Module = Module { name: "kubernetes-1.34", ..NEWEST_KUBERNETES };

const HELM: Module = Module {
    name: "helm",
    path: "helm.sh/helm/v4",
    packages: &["helm.sh/helm/v4/cmd/helm"],
    output: "helm",
    stamps: |version| vec![format!("helm.sh/helm/v4/internal/version.version=v{version}")],
};

impl Module {
    /// The folder of the cache that has the programs.
    fn build(&self) -> anyhow::Result<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tools").join(self.name);
        let read = |file| {
            fs::read_to_string(folder.join(file)).with_context(|| format!("tools/{}/{file} cannot be read", self.name))
        };
        let (module, sums) = (read("go.mod")?, read("go.sum")?);
        let version = self.version(&module)?;

        let stamps = (self.stamps)(version).into_iter().map(|stamp| format!(" -X {stamp}"));
        let flags = format!("-s -w{}", stamps.collect::<String>());
        let mut arguments = vec!["build", "-trimpath", "-buildvcs=false", "-ldflags", &flags];
        arguments.extend(self.packages);
        let system = if consts::OS == "macos" { "darwin" } else { consts::OS };
        let processor = match consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };

        // Not of the path: a build is the same wherever the repository lies.
        let key = [&module, &sums, &arguments.join("\n"), system, processor].join("\0");
        let key: String = Sha256::digest(key).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        cache::get_or_make("tools", &format!("{}-{version}-{key}", self.name), |place| {
            let what =
                format!("Building {} {version} from source (all tools: about 6 min, the first time only)", self.name);
            let mut go = Command::new("go");
            // The packages come last, and the output is named after everything that is part of the key.
            go.args(&arguments[..5]).arg("-o").arg(place.join(self.output)).args(self.packages).current_dir(&folder);
            go.envs([
                ("CGO_ENABLED", "0"),
                ("GOFLAGS", "-mod=readonly"),
                ("GOWORK", "off"),
                ("GOOS", system),
                ("GOARCH", processor),
            ]);
            progress::step(&what, || self.run(&mut go, &module))
        })
    }

    fn version<'a>(&self, module: &'a str) -> anyhow::Result<&'a str> {
        let mut lines = module.lines().map(str::split_whitespace);
        let version = lines
            .find_map(|mut words| if words.next() == Some(self.path) { words.next()?.strip_prefix('v') } else { None });
        version.with_context(|| format!("tools/{}/go.mod requires no version of {}", self.name, self.path))
    }

    fn run(&self, go: &mut Command, module: &str) -> anyhow::Result<()> {
        let needed = module.lines().find_map(|line| line.strip_prefix("go ")).unwrap_or_default();
        let output = match go.output() {
            Ok(output) => output,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!(
                    "Go is not on the PATH. Install Go {needed} or later from go.dev/dl; {} is built with it",
                    self.name
                )
            }
            Err(error) => return Err(error).context("Go cannot be started"),
        };
        let said = String::from_utf8_lossy(&output.stderr);
        // Go may fetch a newer Go by itself; it says so when it may not or cannot.
        ensure!(
            !said.contains("requires go >=") && !said.contains("toolchain not available"),
            "Go is too old to build {}. Install Go {needed} or later from go.dev/dl, or unset GOTOOLCHAIN to let Go fetch it:\n{said}",
            self.name
        );
        let lines: Vec<&str> = said.lines().filter(|line| !line.starts_with("go: downloading")).collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        ensure!(output.status.success(), "{} could not be built in tools/{0}: `{go:?}` said\n{tail}", self.name);
        Ok(())
    }
}
