//! Every command of the documents is typed, in order, as a reader would: on a real API server, Helm and PostgreSQL, with a
//! home folder of its own. What cannot be run here says why, in a comment before it, and is counted.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use audit_log_sweeper::api::AuditLogSweeper;
use kube::Api;
use support::control_plane::ControlPlane;
use support::leaks;
use support::postgres::{PostgresOptions, PostgresServer};
use support::process::{Process, Program, output};
use support::scratch::Scratch;
use support::tools::Tools;
use support::wait::eventually;
use tokio::process::Command;

use super::blocks::{Block, blocks, commands};
use crate::fixtures::id;
use crate::fixtures::operator::{RELEASE, WAIT_TIMEOUT};

/// A command may wait for a sweep.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Commands that are about something that is wrong: what takes it away before, how they exit, and what brings it back.
const BROKEN: [(&str, &str, i32, &str); 1] = [(
    "audit-log-sweeper check ",
    "DROP INDEX audit_log_open_by_time_started; \
     REVOKE UPDATE (result_kind) ON audit_log FROM audit_log_sweeper",
    1,
    "CREATE INDEX audit_log_open_by_time_started ON audit_log (time_started, id) WHERE num_nulls(time_completed) = 1; \
     GRANT UPDATE (result_kind) ON audit_log TO audit_log_sweeper",
)];

/// What a reader has to begin with: a cluster, a database with an audit log, the repository, and the tools.
struct Desk {
    operator: Option<Process>,
    plane: ControlPlane,
    postgres: PostgresServer,
    /// The folder that commands are typed in.
    folder: PathBuf,
    scratch: Scratch,
    /// Words of the documents, and what they stand for here.
    words: Vec<(&'static str, String)>,
}

impl Desk {
    async fn new() -> Self {
        let tools = tokio::task::spawn_blocking(Tools::ensure).await.unwrap().unwrap();
        let postgres = PostgresServer::start(PostgresOptions::default()).await.unwrap();
        let scratch = Scratch::new(None).unwrap();
        let folder = scratch.path().join("repository");
        let bin = scratch.path().join("bin");
        for place in [&folder, &bin, &scratch.path().join("home")] {
            fs::create_dir(place).unwrap();
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for name in ["audit-log-sweeper", "kubectl-sweeper"] {
            symlink(env!("CARGO_BIN_EXE_audit-log-sweeper"), bin.join(name)).unwrap();
        }
        symlink(&tools.kubectl, bin.join("kubectl")).unwrap();
        symlink(&tools.helm, bin.join("helm")).unwrap();
        for part in ["charts", "crds"] {
            symlink(root.join(part), folder.join(part)).unwrap();
        }
        // The samples lead to a database of their reader.
        let manifests = folder.join("manifests");
        fs::create_dir(&manifests).unwrap();
        for part in ["sql", "roles.yaml"] {
            symlink(root.join("manifests").join(part), manifests.join(part)).unwrap();
        }
        let sample = fs::read_to_string(root.join("manifests/sample.yaml")).unwrap();
        let here = format!("localhost:{}/app", postgres.port());
        let sample = sample.replace("app-postgres.default.svc:5432/app", &here);
        assert!(sample.contains(&here));
        for file in ["manifests/sample.yaml", "app.yaml"] {
            fs::write(folder.join(file), &sample).unwrap();
        }
        scratch.write("ca.crt", postgres.ca_pem(), None).unwrap();

        let plane = ControlPlane::start(&tools).await.unwrap();
        let words = vec![
            ("OPERATOR_NAMESPACE", RELEASE.0.to_owned()),
            ("NAMESPACE", "default".to_owned()),
            ("NAME", "app".to_owned()),
            ("REGISTRY", "registry.example".to_owned()),
            ("localhost/app", here),
            ("$1", format!("'{}'", id(9))),
        ];
        let desk = Self { operator: None, plane, postgres, folder, scratch, words };
        desk.postgres.create_database("app").await.unwrap();
        let table = fs::read_to_string(root.join("manifests/sql/table.sql")).unwrap();
        let row = |number, age| {
            format!(
                "INSERT INTO audit_log (id, time_started, request_id, request_uri, operation_id, source_ip, actor_kind) \
                 VALUES ('{}', now() - interval '{age}', 'r', '/', 'o', '::1', 'unauthenticated');",
                id(number)
            )
        };
        let rows = row(1, "1 day") + &row(9, "1 min");
        desk.sql(&format!("CREATE ROLE app_owner; {table}; ALTER TABLE audit_log OWNER TO app_owner; {rows}")).await;
        desk
    }

    async fn sql(&self, sql: &str) {
        self.postgres.connect("app").await.unwrap().batch_execute(sql).await.unwrap();
    }

    /// A script, typed.
    async fn bash(&self, script: &str) -> Output {
        let script = self.words.iter().fold(script.to_owned(), |script, (word, here)| replace(&script, word, here));
        let path = std::env::var("PATH").unwrap();
        let mut bash = Command::new("bash");
        bash.args(["-euo", "pipefail", "-c", &script]).current_dir(&self.folder).env_clear().kill_on_drop(true);
        bash.env("PATH", format!("{}:{path}", self.scratch.path().join("bin").display()));
        bash.env("HOME", self.scratch.path().join("home")).env("KUBECONFIG", self.plane.kubeconfig());
        bash.env("SSL_CERT_FILE", self.scratch.path().join("ca.crt"));
        bash.env("ADMIN_URL", self.postgres.superuser_uri("app"));
        let output = tokio::time::timeout(TIMEOUT, bash.output()).await;
        let output = output.unwrap_or_else(|_| panic!("after {TIMEOUT:?} still running: {script}")).unwrap();
        leaks::keep_output(&output);
        output
    }

    /// Runs a block; how many commands it has.
    async fn run(&mut self, block: &Block) -> usize {
        let (place, text) = (&block.place, &block.text);
        let commands = match block.language.as_str() {
            "console" => commands(text),
            "sh" => vec![(text.clone(), vec![])],
            "sql" => vec![(format!("psql -v ON_ERROR_STOP=1 \"$ADMIN_URL\" <<'EOF'\n{text}EOF"), vec![])],
            "yaml" => vec![(format!("kubectl apply --dry-run=server -f - <<'EOF'\n{text}EOF"), vec![])],
            "text" | "mermaid" => vec![],
            other => panic!("{place}: what is to be done with {other:?}? Or say <!-- not run: REASON -->"),
        };
        for (command, shown) in &commands {
            let broken = BROKEN.iter().find(|(begin, ..)| command.starts_with(begin));
            if let Some((_, sql, ..)) = broken {
                self.sql(sql).await;
            }
            let output = self.bash(command).await;
            if let Some((.., sql)) = broken {
                self.sql(sql).await;
            }
            let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            let exit = broken.map_or(0, |(_, _, exit, _)| *exit);
            assert_eq!(output.status.code(), Some(exit), "{place}: {command}\n{said}{error}");
            // What is shown is what it says, but for what is left out.
            for line in shown.iter().filter(|line| !line.contains("...")) {
                assert!(said.lines().any(|said| said == line), "{place}: {command} does not say\n{line}\nbut\n{said}");
            }
            if command.starts_with("helm install audit-log-sweeper ") && self.operator.is_none() {
                self.start_operator().await;
            }
        }
        commands.len()
    }

    /// There are no nodes, so the chart's pod never runs: its program does, as its service account.
    async fn start_operator(&mut self) {
        let client = self.plane.client().await.unwrap();
        eventually("the CRD to be served", WAIT_TIMEOUT, async || {
            let api: Api<AuditLogSweeper> = Api::all(client.clone());
            api.list(&Default::default()).await.map(drop).map_err(|error| error.to_string())
        })
        .await;
        let token = self.plane.service_account_token(RELEASE.0, RELEASE.1).await.unwrap();
        let program = Program::ours("operator", env!("CARGO_BIN_EXE_audit-log-sweeper"))
            .arg("run")
            .arg(format!("--lease-namespace={}", RELEASE.0))
            .arg("--health-address=127.0.0.1:0")
            .env("KUBECONFIG", self.plane.kubeconfig_for(&token, "operator").unwrap())
            .env("SSL_CERT_FILE", self.scratch.path().join("ca.crt"));
        self.operator = Some(program.start(&self.scratch).unwrap());
    }
}

/// Replaces a word where it is whole.
fn replace(text: &str, word: &str, here: &str) -> String {
    let is_part = |letter: Option<char>| letter.is_some_and(|letter| letter.is_ascii_alphanumeric() || letter == '_');
    let (mut replaced, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once(word) {
        replaced.push_str(before);
        let whole = !is_part(replaced.chars().last()) && !is_part(after.chars().next());
        replaced.push_str(if whole { here } else { word });
        rest = after;
    }
    replaced + rest
}

/// Runs documents, one after the other.
async fn run(desk: &mut Desk, files: &[&str]) {
    let (mut run, mut left_out) = (0, vec![]);
    for file in files {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
        for block in blocks(file, &text) {
            match &block.not_run {
                Some(reason) => left_out.push(format!("{}: {reason}", block.place)),
                None => run += desk.run(&block).await,
            }
        }
    }
    assert!(run > 0);
    println!("{run} commands of {} were run; not run:\n{}", files.join(", "), left_out.join("\n"));
}

#[tokio::test]
async fn every_command_of_the_documents_runs() {
    let mut desk = Desk::new().await;
    let documents = [
        "README.md",
        "docs/using.md",
        "docs/operating.md",
        "docs/sql-contract.md",
        "docs/design.md",
        "docs/compare.md",
        "docs/api.md",
    ];
    run(&mut desk, &documents).await;
}

#[tokio::test]
async fn every_command_of_the_charts_readme_runs() {
    let mut desk = Desk::new().await;
    // The namespace that it speaks of as there.
    output(desk.plane.kubectl().args(["create", "namespace", "team-a"])).unwrap();
    run(&mut desk, &["charts/audit-log-sweeper/README.md"]).await;
}
