//! `cargo xtask e2e`: the image and the chart on the real pods of a cluster, from install to uninstall, sweeping a real table.

mod database;

use crate::image;
use anyhow::{Context, bail, ensure};
use database::{CA, Log};
use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};
use support::build::root;
use support::process::output;
use support::random_hex;
use support::tools::Tools;
use tokio::time::sleep;

const CHART: &str = "charts/audit-log-sweeper";
const CRD: &str = "auditlogsweepers.auditlog.dev";
const REPOSITORY: &str = "localhost/audit-log-sweeper";

/// How long anything may take that pods do: a pull, a start, a takeover.
const PATIENCE: Duration = Duration::from_secs(90);

/// `load_image` is a command that brings the archive, named by its last argument, to the nodes. `host` is where pods reach
/// this machine.
pub fn run(load_image: &str, host: &str, profile: &str) -> anyhow::Result<()> {
    let tools = Tools::ensure()?;
    let tag = format!("e2e-{}", &random_hex()[..10]);
    let image = image::build(root(), Some(&format!("{REPOSITORY}:{tag}")), &[], profile)?;
    println!("{} is {:.1} MB", image.name, image.built.iter().map(|part| part.bytes).sum::<u64>() as f64 / 1e6);
    output(Command::new("sh").args(["-c", &format!("{load_image} \"$1\""), "sh"]).arg(&image.path))
        .context("--load-image")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let cluster = Cluster { tools, namespace: format!("sweeper-{}", &random_hex()[..6]), tag };
        ensure!(
            !cluster.kubectl(&["get", "crd", "-o", "name"])?.contains(CRD),
            "this cluster has the CRD {CRD}, which the end would delete with every object: use another cluster"
        );
        let log = Log::start(host, &cluster.namespace).await?;
        let result = tokio::select! {
            result = play(&cluster, &log) => result,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        };
        if result.is_err() {
            cluster.explain();
        }
        let cleaned = cluster.clean_up();
        result.and(cleaned)
    })
}

async fn play(cluster: &Cluster, log: &Log) -> anyhow::Result<()> {
    let namespace = cluster.namespace.as_str();
    step("a namespace that enforces `restricted`, and the chart in it");
    cluster.kubectl(&["create", "namespace", namespace])?;
    cluster.kubectl(&["label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted"])?;
    for object in log.objects() {
        cluster.apply(&object.to_string())?;
    }
    cluster.install("1", "info")?;
    let tested = cluster.helm(&["test", "audit-log-sweeper", "-n", namespace, "--logs"])?;
    ensure!(tested.contains(concat!("audit-log-sweeper ", env!("CARGO_PKG_VERSION"))), "helm test said\n{tested}");

    step("the sample is applied, and its rows are swept");
    let mut expected = log.start_rows(250).await?;
    cluster.apply(&log.sample(namespace)?)?;
    cluster.kubectl(&["wait", "als/app", "-n", namespace, "--for=condition=Ready", "--timeout=60s"])?;
    cluster.swept(log, &expected).await?;

    step("what people see of it");
    let table = cluster.kubectl(&["get", "als", "-n", namespace])?;
    print!("{table}");
    let columns = ["NAME", "READY", "REASON", "LAST SUCCESS", "TIMED OUT", "BACKLOG", "NEXT SWEEP", "AGE"];
    ensure!(columns.iter().all(|column| table.contains(column)), "get shows\n{table}");
    let row: Vec<_> = table.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    ensure!(matches!(row[..], ["app", "True", "Swept", _, "250", "0", ..]), "get shows\n{table}");
    let events = ["events", "--for=auditlogsweeper/app", "-n", namespace];
    let swept = ["Warning", "RowsTimedOut", "completed 250 rows as timed out"];
    print!("{}", cluster.shows(&events, &swept).await?);
    let described = ["Last Sweep:", "Timed Out:", "Conditions:", "Events:", "RowsTimedOut"];
    cluster.shows(&["describe", "als", "app", "-n", namespace], &described).await?;
    cluster.shows(&["explain", "als.spec.timeout"], &["How old an open row must be", "KIND:"]).await?;

    step("people who may view a namespace see what is swept");
    let may = |verb: &str, role: &str| {
        let rule = format!("--as=system:serviceaccount:{namespace}:{role}");
        let answer = cluster.command("kubectl").args(["auth", "can-i", verb, "als", "-n", namespace, &rule]).output();
        anyhow::Ok(String::from_utf8(answer?.stdout)?.trim() == "yes")
    };
    for role in ["view", "edit"] {
        cluster.kubectl(&["create", "serviceaccount", role, "-n", namespace])?;
        let subject = format!("--serviceaccount={namespace}:{role}");
        let binding = ["create", "rolebinding", role, "-n", namespace, &format!("--clusterrole={role}"), &subject];
        cluster.kubectl(&binding)?;
    }
    let rights = [may("list", "view")?, may("create", "view")?, may("create", "edit")?, may("patch", "edit")?];
    ensure!(rights == [true, false, true, true], "view and edit may: {rights:?}");

    step("the pod is deleted: its successor sweeps on, by an edited spec, in small pieces");
    let often = r#"{"spec":{"period":"5s","limit":250,"batchSize":25}}"#;
    cluster.kubectl(&["patch", "als/app", "-n", namespace, "--type=merge", "-p", often])?;
    cluster.kubectl(&["delete", "pod", "-n", namespace, "-l", "app.kubernetes.io/name=audit-log-sweeper"])?;
    expected.extend(log.start_rows(250).await?);
    cluster.swept(log, &expected).await?;

    step("two replicas, and the leader's pod is killed");
    cluster.install("2", "info")?;
    let leader = cluster.leader(None).await?;
    cluster.kubectl(&["delete", "pod", &leader, "-n", namespace, "--grace-period=0", "--force"])?;
    let successor = cluster.leader(Some(&leader)).await?;
    println!("{leader} led, {successor} leads");
    expected.extend(log.start_rows(250).await?);
    cluster.swept(log, &expected).await?;

    step("an upgrade while it sweeps");
    expected.extend(log.start_rows(1500).await?);
    cluster.install("2", "debug")?;
    cluster.swept(log, &expected).await?;
    cluster.shows(&events, &["RowsTimedOut", "LimitReached"]).await?;

    step("uninstalled: the object and the rows stay");
    cluster.helm(&["uninstall", "audit-log-sweeper", "-n", namespace, "--wait"])?;
    let left =
        cluster.kubectl(&["get", "als", "app", "-n", namespace, "-o", "jsonpath={.status.lastSweep.outcome}"])?;
    ensure!(left == "Drained", "the object's last outcome is {left:?}");
    ensure!(log.timed_out().await? == expected, "rows have changed");
    Ok(())
}

fn step(what: &str) {
    println!("\n== {what}");
}

/// The cluster of the current kubeconfig, and what we have in it.
struct Cluster {
    tools: Tools,
    namespace: String,
    tag: String,
}

impl Cluster {
    fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(if tool == "helm" { &self.tools.helm } else { &self.tools.kubectl });
        command.current_dir(root());
        command
    }

    fn kubectl(&self, args: &[&str]) -> anyhow::Result<String> {
        output(self.command("kubectl").args(args))
    }

    fn helm(&self, args: &[&str]) -> anyhow::Result<String> {
        output(self.command("helm").args(args))
    }

    /// Waits until kubectl shows all that is wanted: events come a moment after what they tell of.
    async fn shows(&self, args: &[&str], wanted: &[&str]) -> anyhow::Result<String> {
        let started = Instant::now();
        loop {
            let shown = self.kubectl(args)?;
            if wanted.iter().all(|piece| shown.contains(piece)) {
                return Ok(shown);
            }
            ensure!(started.elapsed() < PATIENCE, "`kubectl {}` lacks some of {wanted:?}:\n{shown}", args.join(" "));
            sleep(Duration::from_millis(200)).await;
        }
    }

    fn apply(&self, objects: &str) -> anyhow::Result<()> {
        use std::io::Write;
        let mut kubectl = self.command("kubectl");
        kubectl.args(["apply", "--server-side", "-n", &self.namespace, "-f", "-"]);
        let mut kubectl = kubectl.stdin(std::process::Stdio::piped()).spawn()?;
        kubectl.stdin.take().context("it is piped")?.write_all(objects.as_bytes())?;
        ensure!(kubectl.wait()?.success(), "kubectl cannot apply it");
        Ok(())
    }

    /// Installs or upgrades the chart, and waits until its pods are ready.
    fn install(&self, replicas: &str, log_level: &str) -> anyhow::Result<()> {
        let started = Instant::now();
        let set = format!(
            "image.repository={REPOSITORY},image.tag={},replicaCount={replicas},logLevel={log_level},\
             caBundle.configMapName={CA}",
            self.tag
        );
        let place = ["-n", &self.namespace, "--set", &set, "--wait", "--timeout", "2m"];
        self.helm(&[&["upgrade", "--install", "audit-log-sweeper", CHART][..], &place].concat())?;
        println!("rolled out in {:.1} s", started.elapsed().as_secs_f64());
        Ok(())
    }

    /// Waits until exactly these rows have timed out.
    async fn swept(&self, log: &Log, expected: &BTreeSet<String>) -> anyhow::Result<()> {
        let started = Instant::now();
        loop {
            let found = log.timed_out().await?;
            if &found == expected {
                println!(
                    "{} rows timed out in all, the last after {:.1} s",
                    found.len(),
                    started.elapsed().as_secs_f64()
                );
                return log.untouched().await;
            }
            ensure!(found.is_subset(expected), "rows timed out that should not have");
            ensure!(started.elapsed() < PATIENCE, "{} of {} rows in {PATIENCE:?}", found.len(), expected.len());
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// Waits for a pod that leads, another one than before.
    async fn leader(&self, before: Option<&str>) -> anyhow::Result<String> {
        let started = Instant::now();
        loop {
            let lease =
                ["get", "lease", "audit-log-sweeper", "-n", &self.namespace, "-o", "jsonpath={.spec.holderIdentity}"];
            let holder = self.kubectl(&lease)?;
            // The pod's name, and what tells its runs apart.
            match holder.split_once('_') {
                Some((pod, _)) if Some(pod) != before => return Ok(pod.to_owned()),
                _ if started.elapsed() > PATIENCE => bail!("after {PATIENCE:?} the lease is held by {holder:?}"),
                _ => sleep(Duration::from_millis(200)).await,
            }
        }
    }

    /// All there is to find out why it failed.
    fn explain(&self) {
        let place = ["-n", &self.namespace];
        for what in [
            &["get", "pods,als,leases", "-o", "wide"][..],
            &["describe", "pods"],
            &["logs", "-l", "app.kubernetes.io/name=audit-log-sweeper", "--tail=40", "--prefix"],
        ] {
            let said = self.kubectl(&[what, &place].concat());
            eprintln!("\nkubectl {}:\n{}", what.join(" "), said.unwrap_or_else(|error| format!("{error:#}")));
        }
    }

    fn clean_up(&self) -> anyhow::Result<()> {
        drop(self.helm(&["uninstall", "audit-log-sweeper", "-n", &self.namespace, "--ignore-not-found"]));
        self.kubectl(&["delete", "crd", CRD, "--ignore-not-found"])?;
        self.kubectl(&["delete", "namespace", &self.namespace, "--ignore-not-found"])?;
        Ok(())
    }
}
