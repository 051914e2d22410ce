//! What people do with a cluster: `kubectl sweeper`, on a real API server, with a real operator.

use std::fs::File;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use audit_log_sweeper::api::AuditLogSweeper;
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use nix::pty::{Winsize, openpty};
use serde_json::{Value, json};
use support::leaks;
use support::scratch::Scratch;
use support::wait::eventually;

use crate::fixtures::operator::{WAIT_TIMEOUT, allow, has};
use crate::fixtures::{AuditTable, DedicatedControlPlane, Operator};

const BINARY: &str = env!("CARGO_BIN_EXE_audit-log-sweeper");

/// A PATH with the plugin on it, as the README installs it.
fn path(scratch: &Scratch) -> String {
    let folder = scratch.path().join("plugins");
    if !folder.exists() {
        std::fs::create_dir(&folder).unwrap();
        for name in ["kubectl-sweeper", "kubectl_complete-sweeper"] {
            symlink(BINARY, folder.join(name)).unwrap();
        }
    }
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap())
}

fn ours(args: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(args).env_remove("KUBECONFIG").env_remove("DATABASE_URL");
    command
}

/// Runs it: the exit code, what it printed, and what it said beside that.
fn ran(command: &mut Command) -> (i32, String, String) {
    let output: Output = command.output().unwrap();
    leaks::keep_output(&output);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

impl Operator {
    /// `kubectl sweeper`, as the administrator, in the namespace.
    async fn sweeper(&self, args: &[&str]) -> (i32, String, String) {
        let mut kubectl = self.plane.kubectl();
        kubectl.arg("sweeper").args(args).args(["-n", &self.namespace]).env("PATH", path(&self.scratch));
        tokio::task::spawn_blocking(move || ran(&mut kubectl)).await.unwrap()
    }

    /// A kubeconfig of a user with these rights in the namespace.
    async fn user(&self, name: &str, rules: &[Value]) -> PathBuf {
        let account = serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap();
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &self.namespace);
        accounts.create(&PostParams::default(), &account).await.unwrap();
        allow(&self.client, &self.namespace, (&self.namespace, name), rules).await;
        let token = self.plane.service_account_token(&self.namespace, name).await.unwrap();
        self.plane.kubeconfig_for(&token, &format!("{}-{name}", self.namespace)).unwrap()
    }

    /// The binary as such a user, in the namespace.
    fn as_user(&self, config: &Path, args: &[&str]) -> (i32, String, String) {
        ran(ours(args).args(["-n", &self.namespace]).env("KUBECONFIG", config))
    }
}

#[tokio::test]
async fn status_shows_one_and_all_and_sweep_now_waits_for_the_end() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    let (code, out, err) = operator.sweeper(&["status"]).await;
    let none = format!("there is no AuditLogSweeper in namespace {}\n", operator.namespace);
    assert_eq!((code, out.as_str(), err.as_str()), (0, "", none.as_str()));

    operator.apply("app", json!({ "period": "8760h", "limit": 2 })).await;
    operator.until("app", "the first sweep", |s| has(s, "Ready=True/Swept")).await;
    log.start_many(3).await;
    let (code, out, err) = operator.sweeper(&["sweep-now", "als/app", "--wait"]).await;
    assert_eq!((code, log.timed_out().await), (0, vec![1, 2]), "{out}{err}");
    let swept = format!(
        "swept app in namespace {}: completed 2 rows, stopped at the limit; 1 stale row is left\n",
        operator.namespace
    );
    assert_eq!(out, swept);
    assert!(err.starts_with("asked for a sweep of app in namespace "), "{err}");

    let (code, out, err) = operator.sweeper(&["sweep-now", "app", "--wait", "--output=json"]).await;
    assert_eq!((code, log.timed_out().await), (0, vec![1, 2, 3]), "{out}{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&report["answer"], &report["lastSweep"]["timedOut"]), (&json!("Swept"), &json!(1)), "{report:#}");
    let handled = json!(operator.api().get("app").await.unwrap().status.unwrap().last_handled_request);
    assert_eq!(report["requestedAt"], handled);

    let (_, table, _) = operator.sweeper(&["status"]).await;
    let lines: Vec<&str> = table.lines().collect();
    assert!(
        lines[0].starts_with("NAME   READY   REASON   LAST SUCCESS") && lines[1].starts_with("app    True    Swept "),
        "{table}"
    );
    assert_eq!(lines.len(), 2, "{table}");
    let (_, everywhere, _) = operator.sweeper(&["status", "-A"]).await;
    let mine: Vec<&str> = everywhere.lines().filter(|line| line.starts_with(&operator.namespace)).collect();
    assert!(everywhere.starts_with("NAMESPACE ") && mine.len() == 1 && mine[0].contains(" app "), "{everywhere}");
    let (code, screen, _) = operator.sweeper(&["status", "app"]).await;
    assert_eq!(code, 0);
    for part in [
        "\nReady               True: Swept, for ",
        "\n                    1 row timed out of at most 2, in 1 batch\n",
        "\nBacklog             none\n",
        "\nTotals              3 attempts, 0 failed, 3 rows timed out\n",
        "  ·█▄  ",
    ] {
        assert!(screen.contains(part), "{part:?} in\n{screen}");
    }
    let (_, one, _) = operator.sweeper(&["status", "app", "-o", "yaml"]).await;
    let (_, all, _) = operator.sweeper(&["status", "-o", "json"]).await;
    let all: Value = serde_json::from_str(&all).unwrap();
    assert_eq!((&all["items"][0]["name"], &all["items"][0]["ready"]), (&json!("app"), &json!(true)), "{all:#}");
    assert!(one.contains("\nready: true\n") && one.contains("\n  lastSweep:\n"), "{one}");
}

#[tokio::test]
async fn suspend_and_resume_say_so_when_there_is_nothing_to_do() {
    let (log, operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "8760h" })).await;
    operator.until("app", "the first sweep", |s| has(s, "Ready=True/Swept")).await;
    let generation = async || operator.api().get("app").await.unwrap().metadata.generation.unwrap();
    let says = |what: &str| format!("app in namespace {} is {what}\n", operator.namespace);
    let (code, out, _) = operator.sweeper(&["suspend", "app"]).await;
    assert_eq!((code, out), (0, says("suspended now: no sweep begins")));
    operator.until("app", "the suspension", |s| has(s, "Suspended=True/Suspended")).await;
    let (code, out, _) = operator.sweeper(&["suspend", "app"]).await;
    assert_eq!((code, out, generation().await), (0, says("already suspended"), 2));

    // It is recorded and answered, and nothing is swept.
    log.start(1, "2 h").await;
    let (code, out, _) = operator.sweeper(&["sweep-now", "app", "--wait"]).await;
    assert_eq!((code, log.open().await), (1, vec![1]), "{out}");
    assert!(
        out.contains(" is suspended: the request is recorded and answered by an event, and no sweep runs"),
        "{out}"
    );
    let (code, out, _) = operator.sweeper(&["sweep-now", "app"]).await;
    assert!(code == 1 && out.contains(" is suspended: "), "{out}");

    let (code, out, _) = operator.sweeper(&["resume", "app", "-o", "json"]).await;
    let report: Value = serde_json::from_str(&out).unwrap();
    let expected = json!({ "namespace": operator.namespace, "name": "app", "suspend": false, "changed": true });
    assert_eq!((code, report), (0, expected));
    let (code, out, _) = operator.sweeper(&["resume", "app"]).await;
    assert_eq!((code, out, generation().await), (0, says("already resumed: it is not suspended"), 3));
}

#[tokio::test]
async fn a_request_that_fails_or_is_not_answered_exits_with_1() {
    let (log, mut operator) = (AuditTable::new().await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "8760h" })).await;
    operator.until("app", "the first sweep", |s| has(s, "Ready=True/Swept")).await;
    let secrets: Api<Secret> = Api::namespaced(operator.client.clone(), &operator.namespace);
    secrets.delete("db", &DeleteParams::default()).await.unwrap();
    let (code, out, _) = operator.sweeper(&["sweep-now", "app", "--wait"]).await;
    assert_eq!(code, 1);
    assert!(out.contains(" failed: SecretNotFound: there is no Secret db in namespace "), "{out}");
    assert!(out.ends_with("\nDo: create the Secret in the object's namespace\n"), "{out}");

    operator.terminate().await;
    let (code, out, err) = operator.sweeper(&["sweep-now", "app", "--wait", "--timeout=6s"]).await;
    assert_eq!(code, 1);
    assert!(out.starts_with("no operator answered for app in namespace ") && out.contains("kubectl get pods"), "{out}");
    assert!(err.contains("\nwaiting for the operator, 5 s of at most 6 s\n"), "{err}");
    // Nobody waits: asked for is all there is to say.
    let (code, out, _) = operator.sweeper(&["sweep-now", "app"]).await;
    assert!(code == 0 && out.starts_with("asked for a sweep of app "), "{out}");
    let (_, screen, _) = operator.sweeper(&["status", "app"]).await;
    assert!(screen.contains("\nRequest             not answered yet"), "{screen}");
}

#[tokio::test]
async fn requests_that_come_at_once_are_all_answered() {
    let (log, operator) = (AuditTable::slow(20).await, Operator::new().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({ "period": "8760h", "batchSize": 1, "limit": 6 })).await;
    operator.until("app", "the first sweep", |s| has(s, "Ready=True/LimitReached")).await;
    let ask = || operator.sweeper(&["sweep-now", "app", "--wait", "--timeout=30s"]);
    let answers = futures::future::join4(ask(), ask(), ask(), ask()).await;
    for (code, out, err) in [answers.0, answers.1, answers.2, answers.3] {
        assert!(code == 0 && out.starts_with("swept app in namespace "), "{code} {out}{err}");
    }
}

#[tokio::test]
async fn who_waits_outlives_an_api_server_and_is_told_of_a_deletion() {
    // For its own API server, which it stops; without an operator, so that there is no answer.
    let DedicatedControlPlane { mut plane, namespace, scratch, .. } = DedicatedControlPlane::new().await;
    let file = json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": "app" },
        "spec": { "database": { "secretRef": { "name": "db" } } } });
    let file = scratch.write("app.json", file.to_string(), None).unwrap().display().to_string();
    support::process::output(plane.kubectl().args(["apply", "-n", &namespace, "-f", &file])).unwrap();
    let mut kubectl = plane.kubectl();
    kubectl.args(["sweeper", "sweep-now", "app", "--wait", "--timeout=90s", "-n", &namespace]);
    kubectl.env("PATH", path(&scratch));
    let waiting = tokio::task::spawn_blocking(move || ran(&mut kubectl));
    let asked = async |plane: &support::control_plane::ControlPlane| {
        eventually("the request", WAIT_TIMEOUT, async || {
            let shown = support::process::output(plane.kubectl().args([
                "get",
                "als",
                "app",
                "-o=jsonpath={.metadata.annotations}",
                "-n",
                &namespace,
            ]));
            shown
                .map_err(|error| error.to_string())
                .and_then(|a| if a.contains("requestedAt") { Ok(()) } else { Err(a) })
        })
        .await;
    };
    asked(&plane).await;
    plane.stop_api_server();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    plane.start_api_server().await.unwrap();
    assert!(!waiting.is_finished());
    support::process::output(plane.kubectl().args(["delete", "als", "app", "-n", &namespace])).unwrap();
    let (code, out, err) = waiting.await.unwrap();
    assert!(
        code == 1
            && out.is_empty()
            && err.contains("AuditLogSweeper app in namespace ")
            && err.contains(" was deleted"),
        "{code} {out}{err}"
    );
}

#[test]
fn a_namespace_that_none_can_be_is_refused_before_anything_is_asked() {
    for bad in ["default/auditlogsweepers/app?x=", "a b", "", "..", "\u{1b}[31m"] {
        for command in ["suspend", "sweep-now", "check"] {
            let (code, out, err) = ran(&mut ours(&[command, "app", "-n", bad]));
            assert!(
                code == 2 && out.is_empty() && err.contains("must be the name of a namespace"),
                "{code} {out}{err}"
            );
        }
    }
}

#[tokio::test]
async fn the_plugin_starts_no_operator_and_an_operator_needs_a_named_cluster() {
    let operator = Operator::absent().await;
    for command in ["run", "crd", "reasons"] {
        let (code, out, err) =
            ran(operator.plane.kubectl().args(["sweeper", command]).env("PATH", path(&operator.scratch)));
        assert!(code == 2 && out.is_empty(), "{command}: {code} {out}");
        let said = format!("kubectl sweeper has no command {command}; use audit-log-sweeper {command}");
        assert!(err.contains(&said), "{command}: {err}");
    }
    let (_, help, _) = ran(operator.plane.kubectl().args(["sweeper", "--help"]).env("PATH", path(&operator.scratch)));
    assert!(help.contains("  sweep-now ") && !help.contains("  crd ") && !help.contains("  run "), "{help}");

    // The kubeconfig that kubectl finds by itself was not named.
    let home = operator.scratch.path().join("home");
    std::fs::create_dir_all(home.join(".kube")).unwrap();
    std::fs::copy(operator.plane.kubeconfig(), home.join(".kube/config")).unwrap();
    let run = ["20", BINARY, "run", "--log-format=text", "--health-address=127.0.0.1:0"];
    let (code, out, err) = ran(Command::new("timeout").args(run).env_remove("KUBECONFIG").env("HOME", &home));
    let said = format!("{out}{err}");
    assert!(code == 1 && said.contains("name a kubeconfig file with --kubeconfig or KUBECONFIG"), "{code} {said}");
}

#[test]
fn bash_completes_the_options_of_a_subcommand() {
    let script = r#". <("$0" completions bash)
        COMP_WORDS=(audit-log-sweeper "$1" "$2"); COMP_CWORD=2; _audit__log__sweeper audit-log-sweeper "$2" "$1" 2>&1
        echo "${COMPREPLY[@]}""#;
    for (command, typed, offered) in
        [("status", "--na", "--namespace"), ("sweep-now", "--wa", "--wait"), ("run", "--sel", "--selector")]
    {
        let (code, out, err) = ran(Command::new("bash").args(["-c", script, BINARY, command, typed]));
        assert_eq!((code, out.trim()), (0, offered), "{err}");
    }
}

#[test]
fn who_has_seen_enough_is_not_told_of_it() {
    let pipe = r#""$0" crd | head -1; echo "${PIPESTATUS[0]}""#;
    let (_, out, err) = ran(Command::new("bash").args(["-c", pipe, BINARY]));
    assert!(err.is_empty() && (out.ends_with("\n141\n") || out.ends_with("\n0\n")), "{out}{err}");
}

#[tokio::test]
async fn check_reads_the_object_and_its_secret_from_the_cluster() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    operator.apply("app", json!({})).await;
    let (code, out, err) = operator.sweeper(&["check", "app"]).await;
    assert_eq!((code, err.as_str()), (1, ""), "{out}");
    assert!(out.starts_with("error    connection    there is no Secret db in namespace "), "{out}");
    assert!(
        out.ends_with(
            "\n-- SecretNotFound (connection): change spec.database.secretRef, or what is in the Secret that it names\n"
        ),
        "{out}"
    );

    operator.secret_for(&log).await;
    let (code, out, err) = operator.sweeper(&["check", "app"]).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("\n-- ready: 0 errors, 0 warnings"), "{out}");

    operator.secret("db", &[("uri", "postgresql://u:hunter2leak@127.0.0.1:1/d")]).await;
    let (code, out, err) = operator.sweeper(&["check", "app", "-o", "json"]).await;
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &report["findings"][0]["reason"]), (1, &json!("DatabaseUnreachable")));
    assert!(err.starts_with("note: this was looked at from here, not from the operator's pod."), "{err}");
    let (code, out, _) = operator.sweeper(&["check", "app", "--database-url", &log.database.uri()]).await;
    assert_eq!(code, 0, "{out}");
    // What is wrong on the command line is not the object's.
    let (code, out, err) = operator.sweeper(&["check", "app", "--database-url", "mysql://x"]).await;
    assert!(code == 2 && out.is_empty() && !err.contains("secretRef"), "{code} {out}{err}");
    operator.secret("db", &[("uri", "nonsense")]).await;
    let (code, out, _) = operator.sweeper(&["check", "app"]).await;
    assert!(code == 1 && out.contains("\n-- InvalidConnectionURI (connection)"), "{out}");
    // Whether the object's own Secret is right is what was asked, whatever else is set.
    let admin = operator.plane.kubeconfig();
    let mut check = ours(&["check", "app", "-n", &operator.namespace]);
    let (code, _, _) = ran(check.env("KUBECONFIG", admin).env("DATABASE_URL", log.database.uri()));
    assert_eq!(code, 1);
    // One or the other.
    for args in [&["check"][..], &["check", "app", "-f", "x"], &["check", "-f", "x", "-n", "y"]] {
        assert_eq!(ran(&mut ours(args)).0, 2, "{args:?}");
    }
}

#[tokio::test]
async fn who_lacks_a_right_is_told_which() {
    let (log, operator) = (AuditTable::new().await, Operator::absent().await);
    operator.secret_for(&log).await;
    operator.apply("app", json!({})).await;
    let may =
        |verbs: &[&str]| json!({ "apiGroups": ["auditlog.dev"], "resources": ["auditlogsweepers"], "verbs": verbs });
    let nobody = operator.user("nobody", &[]).await;
    let viewer = operator.user("viewer", &[may(&["get", "list"])]).await;
    let editor = operator.user("editor", &[may(&["get", "patch"])]).await;
    let place = format!("in namespace {}", operator.namespace);
    let refused = |config: &Path, args: &[&str], what: &str, place: &str| {
        let (code, out, err) = operator.as_user(config, args);
        assert_eq!((code, out.as_str()), (1, ""), "{args:?} {err}");
        assert!(err.starts_with(&format!("error: you may not {what} {place}; ")), "{args:?} {err}");
    };
    refused(&nobody, &["status"], "list auditlogsweepers.auditlog.dev", &place);
    refused(&nobody, &["status", "app"], "get auditlogsweepers.auditlog.dev", &place);
    refused(&viewer, &["status", "-A"], "list auditlogsweepers.auditlog.dev", "in all namespaces");
    for command in ["sweep-now", "suspend"] {
        refused(&viewer, &[command, "app"], "patch auditlogsweepers.auditlog.dev", &place);
    }
    refused(&viewer, &["check", "app"], "get secrets", &place);
    // And these rights are enough.
    for (config, args) in [
        (&viewer, &["status"][..]),
        (&viewer, &["status", "app"]),
        (&editor, &["sweep-now", "app"]),
        (&editor, &["suspend", "app"]),
    ] {
        let (code, _, err) = operator.as_user(config, args);
        assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
    }
    // Names that one may not list are not told.
    let (code, _, err) = operator.as_user(&editor, &["status", "ap"]);
    assert!(code == 2 && err.contains("there is no AuditLogSweeper ap in namespace") && !err.contains("app"), "{err}");
    let (code, _, err) = operator.as_user(&viewer, &["status", "ap"]);
    assert!(code == 2 && err.ends_with("; is it app?\n"), "{err}");
}

#[tokio::test]
async fn what_stands_between_us_and_the_cluster_is_told() {
    let operator = Operator::absent().await;
    let home = Scratch::new(None).unwrap();
    let (code, _, err) = ran(ours(&["status"]).env("HOME", home.path()));
    assert!(code == 2 && err.starts_with("error: cannot find a cluster: ") && err.contains("--kubeconfig"), "{err}");
    let config = operator.plane.kubeconfig().to_str().unwrap();
    let (code, _, err) = ran(&mut ours(&["status", "--kubeconfig", config, "--context", "elsewhere"]));
    assert!(code == 2 && err.contains("elsewhere") && err.contains("kubectl config get-contexts"), "{err}");
    let stranger = operator.plane.kubeconfig_for("nonsense", "stranger").unwrap();
    let (code, _, err) = operator.as_user(&stranger, &["status"]);
    assert!(code == 1 && err.contains("does not know you: log in again"), "{err}");

    let text = std::fs::read_to_string(config).unwrap();
    let elsewhere = |url: &str, name: &str| home.write(name, text.replace(operator.plane.url(), url), None).unwrap();
    let gone = elsewhere("https://127.0.0.1:1", "gone");
    let (code, _, err) = operator.as_user(&gone, &["status"]);
    assert!(code == 1 && err.starts_with("error: cannot reach the API server https://127.0.0.1:1/: "), "{err}");
    // One that takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", silent.local_addr().unwrap());
    let (code, _, err) = operator.as_user(&elsewhere(&url, "silent"), &["suspend", "app"]);
    assert!(code == 1 && err.contains("did not answer within 15s"), "{err}");
    // Bad names never get to the server.
    let (code, _, err) = ran(&mut ours(&["status", "../secrets"]));
    assert!(code == 2 && err.contains("no object can have this name"), "{err}");
}

#[tokio::test]
async fn a_cluster_without_the_crd_is_told_from_one_without_the_object() {
    let own = DedicatedControlPlane::new().await;
    let run = |args: &[&str]| ran(ours(args).args(["-n", &own.namespace]).env("KUBECONFIG", own.plane.kubeconfig()));
    let (code, _, err) = run(&["sweep-now", "app"]);
    assert!(code == 2 && err.contains("there is no AuditLogSweeper app in namespace"), "{err}");
    let crds: Api<k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition> =
        Api::all(own.client.clone());
    crds.delete("auditlogsweepers.auditlog.dev", &DeleteParams::default()).await.unwrap();
    let api: Api<AuditLogSweeper> = Api::all(own.client.clone());
    eventually("the CRD to be gone", WAIT_TIMEOUT, async || match api.list(&Default::default()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    for args in [&["status"][..], &["status", "app"], &["sweep-now", "app"], &["resume", "app"], &["check", "app"]] {
        let (code, _, err) = run(args);
        assert!(code == 1 && err.contains("the CustomResourceDefinition is not installed"), "{args:?} {err}");
    }
}

#[tokio::test]
async fn kubectl_completes_commands_options_and_names() {
    let operator = Operator::absent().await;
    operator.apply("orders", json!({})).await;
    operator.apply("payments", json!({})).await;
    let complete = |words: &[&str]| {
        let mut kubectl = operator.plane.kubectl();
        kubectl.args(["__complete", "sweeper"]).args(words).env("PATH", path(&operator.scratch));
        let (code, out, err) = ran(&mut kubectl);
        assert_eq!(code, 0, "{err}");
        out.lines().map(|line| line.split('\t').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(complete(&["s"]), ["status", "sweep-now", "suspend", "sweep", ":4"]);
    assert_eq!(complete(&["status", "-n", &operator.namespace, ""]), ["orders", "payments", ":4"]);
    assert_eq!(complete(&["check", "-n", &operator.namespace, "o"]), ["orders", ":4"]);
    assert_eq!(complete(&["status", "--out"]), ["--output", ":4"]);
    // And shells on their own.
    for (shell, part) in [("bash", "complete -F"), ("zsh", "#compdef audit-log-sweeper"), ("fish", "complete -c")] {
        let (code, script, _) = ran(&mut ours(&["completions", shell]));
        assert!(code == 0 && script.contains(part) && script.contains("sweep-now"), "{shell}: {script}");
    }
    let plugin = path(&operator.scratch).split(':').next().unwrap().to_owned() + "/kubectl-sweeper";
    let (_, help, _) = ran(Command::new(plugin).arg("--help"));
    assert!(help.contains("Usage: kubectl sweeper ") && !help.contains("\n  run "), "{help}");
}

/// What a terminal of 60 columns gets.
fn on_a_terminal(command: &mut Command) -> String {
    let size = Winsize { ws_row: 24, ws_col: 60, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).unwrap();
    let mut child = command.env("TERM", "xterm").stdout(Stdio::from(pty.slave)).spawn().unwrap();
    // The command holds the other end, too.
    command.stdout(Stdio::null());
    let mut bytes = vec![];
    let mut terminal = File::from(pty.master);
    let mut buffer = [0; 4096];
    // At the end Linux says EIO.
    while let Ok(count @ 1..) = terminal.read(&mut buffer) {
        bytes.extend_from_slice(&buffer[..count]);
    }
    assert!(child.wait().unwrap().success());
    String::from_utf8(bytes).unwrap().replace("\r\n", "\n")
}

#[test]
fn colours_are_for_terminals_and_for_those_who_want_them() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/screens.yaml");
    let status = |args: &[&str]| {
        let mut command = ours(&["status", "-f", file, "--at", "2026-11-22T20:15:00Z"]);
        for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLORTERM"] {
            command.env_remove(name);
        }
        command.args(args);
        command
    };
    let (code, piped, _) = ran(&mut status(&["payments"]));
    assert!(code == 0 && !piped.contains('\u{1b}') && piped.contains("Ready               False: "), "{piped}");
    let coloured = on_a_terminal(&mut status(&["payments"]));
    assert!(coloured.contains("\u{1b}[31mFalse\u{1b}[0m: DatabaseUnreachable"), "{coloured:?}");
    let plain = on_a_terminal(status(&["payments"]).env("NO_COLOR", "1"));
    assert!(!plain.contains('\u{1b}'), "{plain:?}");
    assert!(plain.lines().all(|line| line.chars().count() <= 60), "{plain}");
    // What a file holds is asked for as in a cluster.
    assert_eq!(ran(&mut status(&["payment"])).0, 2);
    assert_eq!(ran(&mut status(&["-n", "elsewhere"])).1, "");
    let (_, json, _) = ran(&mut status(&["-o", "json"]));
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap()["items"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_kubeconfig_of_several_files_and_a_proxy_are_taken_as_kubectl_takes_them() {
    let operator = Operator::new().await;
    let config = operator
        .user(
            "reader",
            &[json!({ "apiGroups": ["auditlog.dev"], "resources": ["auditlogsweepers"], "verbs": ["list"] })],
        )
        .await;
    let status = |variables: &[(&str, &str)]| {
        let mut command = ours(&["status", "-n", &operator.namespace]);
        ran(command.env("KUBECONFIG", &config).envs(variables.iter().copied()))
    };
    let listed = format!("/nowhere/config:{}:/nowhere/else", config.display());
    let (code, _, err) = status(&[("KUBECONFIG", &listed)]);
    assert_eq!(code, 0, "{err}");

    // Nobody is there; and NO_PROXY, which excepts the cluster by its address, does not except the proxy.
    let proxy = "http://localhost:1";
    let (code, _, err) = status(&[("HTTPS_PROXY", proxy)]);
    assert!(code == 1 && err.contains("cannot reach the API server"), "{code}: {err}");
    for hosts in ["127.0.0.1,.example", "127.0.0.0/8,.local", "*"] {
        let (code, _, err) = status(&[("HTTPS_PROXY", proxy), ("NO_PROXY", hosts)]);
        assert_eq!(code, 0, "{hosts}: {err}");
    }
}
