//! The chart with the real Helm on a real API server: its life from install to uninstall, and who owns the CRD.

mod rights;
mod values;

use std::fs;
use std::path::Path;

use serde_json::Value;
use support::control_plane::ControlPlane;
use support::process::output;
use support::scratch::Scratch;
use support::tools::Tools;
use support::wait::eventually;

use crate::fixtures::operator::{RELEASE, WAIT_TIMEOUT, chart, install};

const CRD: &str = "auditlogsweepers.auditlog.dev";

/// A control plane that the test has to itself: it changes the CRD.
struct Cluster(ControlPlane);

impl Cluster {
    async fn start() -> Self {
        let tools = tokio::task::spawn_blocking(Tools::ensure).await.unwrap().unwrap();
        Self(ControlPlane::start(&tools).await.unwrap())
    }

    fn helm(&self, args: &[&str]) -> String {
        output(self.0.helm().args(args)).unwrap()
    }

    fn kubectl(&self, args: &[&str]) -> String {
        output(self.0.kubectl().args(args)).unwrap()
    }

    /// What tells the object from another one of its name.
    fn uid(&self) -> String {
        self.kubectl(&["get", "als", "app", "-o", "jsonpath={.metadata.uid}"])
    }

    /// The namespace and name of the release that owns the CRD.
    fn owner(&self) -> (String, String) {
        let crd: Value = serde_json::from_str(&self.kubectl(&["get", "crd", CRD, "-o", "json"])).unwrap();
        let of = |key: &str| crd["metadata"]["annotations"][key].as_str().unwrap_or_default().to_owned();
        (of("meta.helm.sh/release-namespace"), of("meta.helm.sh/release-name"))
    }

    /// Sets `spec.note`, a field of a later version, and waits until it is kept (true) or dropped (false).
    async fn knows_note(&self, known: bool) {
        let what = if known { "the new field to be kept" } else { "the new field to be dropped" };
        eventually(what, WAIT_TIMEOUT, async || {
            self.kubectl(&["patch", "als", "app", "--type=merge", "-p", r#"{"spec":{"note":"kept"}}"#]);
            let note = self.kubectl(&["get", "als", "app", "-o", "jsonpath={.spec.note}"]);
            if (note == "kept") == known { Ok(()) } else { Err(note) }
        })
        .await;
    }
}

/// The chart of a later version, whose CRD has the fields `spec.note` and `spec.complete[].later`.
fn later_chart(scratch: &Scratch) -> String {
    let place = scratch.path().join("later");
    copy(&chart(), &place);
    let edit = |file: &str, from: &str, to: &str| {
        let text = fs::read_to_string(place.join(file)).unwrap();
        assert_eq!(text.matches(from).count(), 1, "{from:?} in {file}");
        fs::write(place.join(file), text.replace(from, to)).unwrap();
    };
    edit("Chart.yaml", "\nversion: 0.1.0", "\nversion: 0.2.0");
    let first = "            properties:\n              batchSize:";
    let note = "            properties:\n              note:\n                type: string\n              batchSize:";
    edit("files/crd.yaml", first, note);
    let column = "                  properties:\n                    column:";
    let later = "                  properties:\n                    later:\n                      type: string\n                    column:";
    edit("files/crd.yaml", column, later);
    place.display().to_string()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[tokio::test]
async fn installs_upgrades_rolls_back_and_uninstalls_without_losing_objects() {
    let (cluster, scratch) = (Cluster::start().await, Scratch::new(None).unwrap());
    let chart = chart().display().to_string();
    install(&cluster.0).await;
    cluster.kubectl(&["apply", "-f", concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/sample.yaml")]);
    let uid = cluster.uid();
    cluster.knows_note(false).await;

    let later = later_chart(&scratch);
    cluster.helm(&["upgrade", RELEASE.1, &later, "-n", RELEASE.0, "--set", "logLevel=debug"]);
    cluster.knows_note(true).await;
    let deployment = ["get", "deployment", RELEASE.1, "-n", RELEASE.0, "-o", "jsonpath={.spec.template.spec}"];
    assert!(cluster.kubectl(&deployment).contains("--log-level=debug"));

    // An older CRD would drop the new fields from the objects without a word.
    let older = ["upgrade", RELEASE.1, &chart, "-n", RELEASE.0];
    let refused = output(cluster.0.helm().args(older)).unwrap_err().to_string();
    assert!(refused.contains("does not know spec.complete[].later, spec.note. The"), "{refused}");
    cluster.knows_note(true).await;
    cluster.helm(&[&older[..], &["--set", "crds.downgrade=true"]].concat());
    cluster.knows_note(false).await;
    cluster.helm(&["upgrade", RELEASE.1, &later, "-n", RELEASE.0, "--set", "logLevel=debug"]);
    cluster.knows_note(true).await;

    cluster.helm(&["rollback", RELEASE.1, "1", "-n", RELEASE.0]);
    cluster.knows_note(false).await;
    assert!(cluster.kubectl(&deployment).contains("--log-level=info"));
    assert_eq!(cluster.uid(), uid);

    let everything = ["get", "clusterroles,clusterrolebindings,roles,rolebindings,deployments,sa", "-A", "-o", "name"];
    assert!(cluster.kubectl(&everything).contains("audit-log-sweeper"));
    cluster.helm(&["uninstall", RELEASE.1, "-n", RELEASE.0]);
    assert_eq!(cluster.uid(), uid);
    let left = cluster.kubectl(&everything);
    assert!(!left.contains("audit-log-sweeper"), "{left}");

    // The same release takes the CRD as its own again.
    cluster.helm(&["install", RELEASE.1, &chart, "-n", RELEASE.0]);
    assert_eq!(cluster.uid(), uid);

    // Whoever does not want to keep it says so.
    cluster.helm(&["upgrade", RELEASE.1, &chart, "-n", RELEASE.0, "--set", "crds.keep=false"]);
    cluster.helm(&["uninstall", RELEASE.1, "-n", RELEASE.0]);
    eventually("the CRD to go", WAIT_TIMEOUT, async || {
        let left = cluster.kubectl(&["get", "crd", "-o", "name"]);
        if left.contains(CRD) { Err(left) } else { Ok(()) }
    })
    .await;
}

#[tokio::test]
async fn the_crd_has_one_owner_and_another_release_can_take_it_over() {
    let (cluster, scratch) = (Cluster::start().await, Scratch::new(None).unwrap());
    let chart = chart().display().to_string();
    install(&cluster.0).await;
    cluster.kubectl(&["apply", "-f", concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/sample.yaml")]);
    let uid = cluster.uid();

    // A second one beside the first, for a shard.
    let shard = ["install", "shard-b", &chart, "-n", "shard-b", "--create-namespace", "--set", "selector=shard=b"];
    let refused = output(cluster.0.helm().args(shard)).unwrap_err().to_string();
    assert!(refused.contains("invalid ownership metadata") && refused.contains(CRD), "{refused}");
    let notes = cluster.helm(&[&shard[..], &["--set", "crds.enabled=false"]].concat());
    assert!(notes.contains("AuditLogSweepers labelled shard=b of every namespace"), "{notes}");
    assert!(notes.contains("leaves the CRD"), "{notes}");
    let args = |namespace: &str, name: &str| {
        let args = "jsonpath={.spec.template.spec.containers[0].args}";
        cluster.kubectl(&["get", "deployment", name, "-n", namespace, "-o", args])
    };
    let (first, second) = (args(RELEASE.0, RELEASE.1), args("shard-b", "shard-b-audit-log-sweeper"));
    assert!(second.contains(r#""--selector=shard=b""#) && !first.contains("--selector"), "{first} {second}");
    cluster.helm(&["uninstall", "shard-b", "-n", "shard-b"]);
    assert_eq!((cluster.uid(), cluster.owner()), (uid.clone(), owner(RELEASE.0, RELEASE.1)));

    // In another namespace after the first is gone; by the command of the notes.
    let notes = cluster.helm(&["get", "notes", RELEASE.1, "-n", RELEASE.0]);
    let notes = notes.replace("\\\n", "");
    let take_over = notes.lines().find(|line| line.starts_with("helm ")).expect("a command in the notes");
    let take_over = |namespace: &str| {
        let line = take_over.replace("RELEASE", "other").replace("CHART", &chart).replace("NAMESPACE", namespace);
        cluster.helm(&line.split_whitespace().skip(1).chain(["--create-namespace"]).collect::<Vec<_>>());
    };
    cluster.helm(&["uninstall", RELEASE.1, "-n", RELEASE.0]);
    let elsewhere = ["install", "other", &chart, "-n", "elsewhere", "--create-namespace"];
    output(cluster.0.helm().args(elsewhere)).unwrap_err();
    take_over("elsewhere");
    assert_eq!((cluster.uid(), cluster.owner()), (uid.clone(), owner("elsewhere", "other")));

    // From a release that is still there, which then leaves it alone, gone or not.
    cluster.helm(&[
        "install",
        "other",
        &chart,
        "-n",
        "third",
        "--create-namespace",
        "--set",
        "selector=shard=c,crds.enabled=false",
    ]);
    take_over("third");
    let disown = ["upgrade", "other", &chart, "-n", "elsewhere", "--set", "crds.enabled=false"];
    assert_eq!(cluster.owner(), owner("third", "other"));
    assert!(args("third", "other-audit-log-sweeper").contains("--selector=shard=c"), "what it was told before stands");
    // Nobody lost a right to the other of the same name.
    let may = |namespace: &str| {
        let user = format!("--as=system:serviceaccount:{namespace}:other-audit-log-sweeper");
        let answer = cluster.0.kubectl().args(["auth", "can-i", "watch", "als", "-A", &user]).output().unwrap();
        String::from_utf8_lossy(&answer.stdout).trim() == "yes"
    };
    assert!(may("elsewhere") && may("third"));
    cluster.helm(&disown);
    assert!(may("elsewhere") && may("third"));
    cluster.helm(&["uninstall", "other", "-n", "elsewhere"]);
    assert!(!may("elsewhere") && may("third"));
    assert_eq!((cluster.uid(), cluster.owner()), (uid, owner("third", "other")));
    cluster.helm(&["uninstall", "other", "-n", "third"]);

    // From kubectl, and of another version: the two want different things of one field.
    cluster.kubectl(&["delete", "crd", CRD]);
    let crd =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/crds/auditlogsweepers.auditlog.dev.yaml")).unwrap();
    let earlier = scratch.write("crd.yaml", crd.replace("description: Why", "description: Why not"), None).unwrap();
    let earlier = earlier.display().to_string();
    for apply in [&["apply", "-f", &earlier][..], &["apply", "--server-side", "--force-conflicts", "-f", &earlier]] {
        cluster.kubectl(apply);
        take_over("fourth");
        assert_eq!(cluster.owner(), owner("fourth", "other"));
        assert!(!cluster.kubectl(&["get", "crd", CRD, "-o", "yaml"]).contains("description: Why not"));
    }
}

#[tokio::test]
async fn installs_without_helm_and_helm_can_take_it_over() {
    let cluster = Cluster::start().await;
    let install = concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/install.yaml");
    // As it stands, and again as for an upgrade.
    for _ in 0..2 {
        let answer = cluster.0.kubectl().args(["apply", "--server-side", "-f", install]).output().unwrap();
        let said = String::from_utf8_lossy(&answer.stderr);
        assert!(answer.status.success() && said.is_empty(), "{said}");
    }
    cluster.kubectl(&["wait", "--for=condition=Established", "--timeout=20s", &format!("crd/{CRD}")]);
    let image =
        ["get", "deployment", RELEASE.1, "-n", RELEASE.1, "-o", "jsonpath={.spec.template.spec.containers[0].image}"];
    assert!(cluster.kubectl(&image).starts_with("audit-log-sweeper:"));

    cluster.kubectl(&["apply", "-f", concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/sample.yaml")]);
    let user = format!("--as=system:serviceaccount:{0}:{0}", RELEASE.1);
    assert_eq!(cluster.kubectl(&["auth", "can-i", "watch", "als", "-A", &user]).trim(), "yes");
    let uid = cluster.uid();
    let chart = chart().display().to_string();
    let take_over =
        ["upgrade", "--install", RELEASE.1, &chart, "-n", RELEASE.1, "--take-ownership", "--force-conflicts"];
    cluster.helm(&take_over);
    assert_eq!((cluster.uid(), cluster.owner()), (uid, owner(RELEASE.1, RELEASE.1)));
}

fn owner(namespace: &str, name: &str) -> (String, String) {
    (namespace.to_owned(), name.to_owned())
}
