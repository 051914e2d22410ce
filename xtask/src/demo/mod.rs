//! `cargo xtask demo`: the operator at work on a real API server and PostgreSQL, shown step by step, and every step checked.

mod screen;
mod table;

use crate::generate;
use crate::image::platform::Platform;
use anyhow::{Context, bail, ensure};
use screen::{Rows, Screen};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use support::build::{build_operator, root};
use support::control_plane::ControlPlane;
use support::postgres::{Binaries, PostgresOptions, PostgresServer};
use support::process::{Process, Program, output};
use support::scratch::Scratch;
use support::tools::Tools;
use support::{progress, random_hex};
use table::Table;
use tokio::time::sleep;

/// What the sample asks for: of 2,500 stale rows, at most 1,000 in a sweep.
const SAMPLE: &str = "\
apiVersion: auditlog.dev/v1alpha1
kind: AuditLogSweeper
metadata:
  name: app
spec:
  period: 5s
  timeout: 4h
  limit: 1000
  database:
    secretRef: {name: app-db, key: uri}
    tls:
      mode: VerifyFull
      caSecretRef: {name: app-db-ca}
";
const SWEEPS: [i64; 4] = [1000, 1000, 500, 0];

/// Rows that are swept by hand.
const BY_HAND: i64 = 3;

/// A sweep is due every 5 s; this is how long one may be late.
const PATIENCE: Duration = Duration::from_secs(20);

/// `platform`: the operator is built for that, and runs in an emulator where it is not this machine's.
pub fn run(keep: bool, platform: Option<Platform>) -> anyhow::Result<()> {
    for file in generate::CRD {
        ensure!(root().join(file).is_file(), "{file} is missing: run `cargo xtask generate`");
    }
    let tools = Tools::ensure()?;
    let binaries = Binaries::ensure()?;
    let operator = match platform {
        None => vec![build_operator("dev")?],
        Some(platform) => platform.program()?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        tokio::select! {
            // Ctrl-C is how a demo that is kept ends well: it has to notice first.
            biased;
            result = demo(&tools, binaries, &operator, keep) => result,
            _ = tokio::signal::ctrl_c() => bail!("interrupted; everything is stopped"),
        }
    })
}

async fn demo(tools: &Tools, binaries: Binaries, operator: &[PathBuf], keep: bool) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut screen = Screen::new();
    screen.heading("A Kubernetes control plane and a PostgreSQL server");
    let options = PostgresOptions { binaries: Some(binaries), ..Default::default() };
    let (control_plane, postgres) = tokio::try_join!(ControlPlane::start(tools), PostgresServer::start(options))?;
    screen.say(
        &output(control_plane.kubectl().arg("version"))?
            .lines()
            .last()
            .unwrap_or_default()
            .replace("Server Version:", "Kubernetes"),
    );
    screen.say(&format!("PostgreSQL {} at 127.0.0.1:{}", postgres.version(), postgres.port()));

    // Dropped first: the operator ends before what it talks to.
    let scratch = Scratch::new(None)?;
    let mut demo = Demo { control_plane: &control_plane, postgres: &postgres, scratch: &scratch, operator: None };
    if let Err(error) = demo.play(&mut screen, operator).await {
        demo.explain();
        return Err(error);
    }
    println!("\nDemo passed in {} s", started.elapsed().as_secs());
    if keep {
        demo.keep(tools).await?;
    }
    Ok(())
}

struct Demo<'parts> {
    control_plane: &'parts ControlPlane,
    postgres: &'parts PostgresServer,
    scratch: &'parts Scratch,
    operator: Option<Process>,
}

impl Demo<'_> {
    async fn play(&mut self, screen: &mut Screen, operator: &[PathBuf]) -> anyhow::Result<()> {
        screen.heading("An audit log, and a login that may do nothing but sweep it");
        let password = random_hex();
        let table = Table::make(screen, self.postgres, &password).await?;
        let before = table.untouched().await?;

        screen.heading("The operator");
        self.install(screen).await?;
        self.start(screen, operator).await?;

        screen.heading("What it should sweep");
        self.apply(screen, &password)?;

        screen.heading("Sweeps: at most 1000 rows each, every 5 s, the oldest first");
        screen.command("kubectl get als -n demo");
        let (mut last, mut rows) = (String::new(), Rows::default());
        for (number, expected) in SWEEPS.into_iter().enumerate() {
            let sweep = self.next_sweep(&last).await?;
            last = sweep["startTime"].as_str().unwrap_or_default().to_owned();
            let shown = output(self.control_plane.kubectl().args(["get", "als", "-n", "demo"]))?;
            screen.say(&rows.add(&shown));
            ensure!(sweep["timedOut"] == expected, "sweep {}: expected {expected} rows, found {sweep:#}", number + 1);
            // With the rights of role.sql; a statement that was refused would be tried with ever fewer rows.
            ensure!(sweep["batches"] == 1, "sweep {}: expected one batch, found {sweep:#}", number + 1);
        }
        screen.say(&format!("ok  rows that timed out in each: {SWEEPS:?}"));

        screen.heading("The table afterwards");
        table.check(screen, &before).await?;
        let shown = screen.run(&mut self.control_plane.kubectl(), &["get", "als", "-n", "demo"])?;
        screen.say(&shown);
        self.by_hand(screen, operator, &table, &password).await
    }

    /// The same program as a command: a check, and one sweep.
    async fn by_hand(
        &self,
        screen: &mut Screen,
        operator: &[PathBuf],
        table: &Table<'_>,
        password: &str,
    ) -> anyhow::Result<()> {
        screen.heading("By hand, while the operator is suspended");
        let suspend = |suspend| format!("{{\"spec\":{{\"suspend\":{suspend}}}}}");
        let patch = ["patch", "als", "app", "-n", "demo", "--type=merge", "-p"];
        screen.run(&mut self.control_plane.kubectl(), &[&patch[..], &[&suspend(true)]].concat())?;
        let suspended = ["wait", "als/app", "-n", "demo", "--for=condition=Suspended", "--timeout=20s"];
        output(self.control_plane.kubectl().args(suspended))?;
        table.crash(screen, BY_HAND).await?;

        let secret = |name: &str, key: &str, value: String| json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": name }, "stringData": { key: value } });
        let secrets =
            [secret("app-db", "uri", self.uri(password)), secret("app-db-ca", "ca.crt", self.postgres.ca_pem())];
        let file =
            self.scratch.write("by-hand.yaml", format!("{SAMPLE}---\n{}\n---\n{}", secrets[0], secrets[1]), None)?;
        let run = |command: &str, more: &[&str]| {
            let (first, rest) = operator.split_first().context("a program has a name")?;
            screen.command(format!("audit-log-sweeper {command} -f by-hand.yaml {}", more.join(" ")).trim_end());
            output(Command::new(first).args(rest).args([command, "-f"]).arg(&file).args(more))
        };
        screen.say("by-hand.yaml holds the object and its Secrets.");
        screen.say(&run("check", &[])?);
        let swept: Value = serde_json::from_str(&run("sweep", &["--output", "json"])?)?;
        ensure!(swept["timedOut"] == BY_HAND, "expected {BY_HAND} rows, found {swept:#}");
        table.check_late(screen, BY_HAND).await?;
        screen.run(&mut self.control_plane.kubectl(), &[&patch[..], &[&suspend(false)]].concat())?;
        Ok(())
    }

    fn uri(&self, password: &str) -> String {
        format!("postgresql://app_sweeper:{password}@127.0.0.1:{}/app", self.postgres.port())
    }

    async fn install(&self, screen: &Screen) -> anyhow::Result<()> {
        let mut helm = self.control_plane.helm();
        let chart = "charts/audit-log-sweeper";
        let install = ["install", "audit-log-sweeper", chart, "-n", "sweeper", "--create-namespace"];
        let said = screen.run(helm.current_dir(root()), &install)?;
        screen.say(said.lines().find(|line| line.starts_with("STATUS")).unwrap_or_default());
        let crd = "crd/auditlogsweepers.auditlog.dev";
        output(self.control_plane.kubectl().args(["wait", "--for=condition=Established", "--timeout=20s", crd]))?;
        Ok(())
    }

    async fn start(&mut self, screen: &Screen, operator: &[PathBuf]) -> anyhow::Result<()> {
        screen.say(
            "This cluster has no nodes, so the chart's pod never runs. Its program is started here instead, as the",
        );
        screen.say("chart's service account, with the rights that the chart gives it:");
        let token = self.control_plane.service_account_token("sweeper", "audit-log-sweeper").await?;
        let kubeconfig = self.control_plane.kubeconfig_for(&token, "audit-log-sweeper")?;
        screen.run(&mut self.control_plane.kubectl(), &["create", "namespace", "demo"])?;
        screen.command("audit-log-sweeper run --lease-namespace sweeper");
        let program = ["run", "--lease-namespace", "sweeper", "--health-address", "127.0.0.1:0"];
        let (first, rest) = operator.split_first().context("a program has a name")?;
        let program = rest.iter().map(OsStr::new).chain(program.map(OsStr::new));
        let program = program.fold(Program::new("operator", first), Program::arg);
        self.operator = Some(program.env("KUBECONFIG", kubeconfig).start(self.scratch)?);
        Ok(())
    }

    fn apply(&self, screen: &Screen, password: &str) -> anyhow::Result<()> {
        let uri = |password: &str| format!("uri={}", self.uri(password));
        let create = ["create", "secret", "generic", "-n", "demo"];
        screen.command(&format!("kubectl {} app-db --from-literal='{}'", create.join(" "), uri("...")));
        output(
            self.control_plane.kubectl().args(create).arg("app-db").arg(format!("--from-literal={}", uri(password))),
        )?;

        let ca = self.scratch.write("ca.crt", self.postgres.ca_pem(), None)?;
        screen.command(&format!("kubectl {} app-db-ca --from-file=ca.crt", create.join(" ")));
        output(
            self.control_plane.kubectl().args(create).arg("app-db-ca").arg(format!("--from-file={}", ca.display())),
        )?;

        let sample = self.scratch.write("app.yaml", SAMPLE, None)?;
        screen.command("cat app.yaml");
        screen.say(SAMPLE);
        screen.command("kubectl apply -n demo -f app.yaml");
        output(self.control_plane.kubectl().args(["apply", "-n", "demo", "-f"]).arg(sample))?;
        Ok(())
    }

    /// Waits for a sweep that started at another time than the last one.
    async fn next_sweep(&mut self, last: &str) -> anyhow::Result<Value> {
        let end = Instant::now() + PATIENCE;
        loop {
            let object = output(self.control_plane.kubectl().args(["get", "als", "app", "-n", "demo", "-o", "json"]))?;
            let mut object: Value = serde_json::from_str(&object)?;
            let sweep = object["status"]["lastSweep"].take();
            if !sweep.is_null() && sweep["startTime"] != last {
                return Ok(sweep);
            }
            self.operator.as_mut().context("the operator was not started")?.check()?;
            ensure!(Instant::now() < end, "no sweep in {PATIENCE:?}");
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// All there is to find out why it failed.
    fn explain(&self) {
        if let Some(operator) = &self.operator {
            eprintln!("\nThe operator's log ends with:\n{}", operator.log_tail(30));
            let object = output(self.control_plane.kubectl().args(["get", "als", "-n", "demo", "-o", "yaml"]));
            eprintln!("\nThe object:\n{}", object.unwrap_or_else(|error| format!("{error:#}")));
        }
    }

    async fn keep(&self, tools: &Tools) -> anyhow::Result<()> {
        let bin = tools.kubectl.parent().unwrap_or(Path::new("/usr/bin"));
        println!("\nEverything runs on. In another terminal:\n");
        println!("export KUBECONFIG={} PATH={}:$PATH", self.control_plane.kubeconfig().display(), bin.display());
        println!("kubectl get als -n demo -w");
        println!("kubectl patch als app -n demo --type=merge -p '{{\"spec\":{{\"suspend\":true}}}}'");
        println!("tail -f {}", self.scratch.path().join("operator.log").display());
        println!("psql {}", self.postgres.superuser_uri("app"));
        progress::note("\nCtrl-C stops and removes all of it.");
        tokio::signal::ctrl_c().await?;
        Ok(())
    }
}
