//! A real Prometheus that scrapes what a test gives it, and its promtool, where they are installed.

use crate::process::{Process, Program, installed, output};
use crate::scratch::Scratch;
use anyhow::{Context, ensure};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn needed(program: &str) -> anyhow::Result<PathBuf> {
    installed(program).with_context(|| format!("{program} is needed (Debian and Ubuntu: `apt-get install prometheus`)"))
}

/// Runs promtool in a folder, with this input; what it says when it finds nothing wrong, and as the error when it does.
pub fn promtool(folder: &Path, args: &[&str], input: &str) -> anyhow::Result<String> {
    let mut command = Command::new(needed("promtool")?);
    command.args(args).current_dir(folder).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().context("it is piped")?.write_all(input.as_bytes())?;
    let answer = child.wait_with_output()?;
    let said = [answer.stdout, answer.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(answer.status.success(), "promtool {} found something:\n{said}", args.join(" "));
    Ok(said)
}

/// It ends with the value; the order of the fields is the order in which it does.
pub struct Prometheus {
    process: Process,
    _scratch: Scratch,
    address: String,
}

impl Prometheus {
    /// Starts it with a configuration, which may name the files beside it, and waits until it is ready.
    pub async fn start(configuration: &str, files: &[(&str, &str)]) -> anyhow::Result<Prometheus> {
        let program = needed("prometheus")?;
        let scratch = Scratch::new(None)?;
        for (name, contents) in files {
            scratch.write(name, contents, None)?;
        }
        let settings = scratch.write("prometheus.yml", configuration, None)?;
        output(Command::new(needed("promtool")?).args(["check", "config"]).arg(&settings))?;
        let program = Program::new("prometheus", program)
            .arg(format!("--config.file={}", settings.display()))
            .arg(format!("--storage.tsdb.path={}", scratch.path().join("data").display()))
            .arg("--web.listen-address=127.0.0.1:0");
        let process = program.start(&scratch)?;
        let mut prometheus = Prometheus { process, _scratch: scratch, address: String::new() };
        let end = tokio::time::Instant::now() + Duration::from_secs(30);
        while let Err(error) = prometheus.get("/-/ready").await {
            prometheus.process.check()?;
            let late = tokio::time::Instant::now() > end;
            ensure!(!late, "Prometheus is not ready: {error:#}\n{}", prometheus.process.log_tail(20));
            tokio::time::sleep(Duration::from_millis(50)).await;
            let log = prometheus.process.log_tail(usize::MAX);
            let line = log.lines().find(|line| line.contains("\"Listening on\""));
            let address = line.and_then(|line| line.rsplit_once("address=")).map(|(_, address)| address);
            prometheus.address = address.unwrap_or_default().to_owned();
        }
        Ok(prometheus)
    }

    /// The series that an expression has now.
    pub async fn query(&self, expression: &str) -> anyhow::Result<Vec<Value>> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer = self.api(&format!("query?query={encoded}")).await?;
        let result = answer["result"].as_array().cloned();
        result.with_context(|| format!("no vector: {answer}"))
    }

    /// The `data` that a path of its API answers with.
    pub async fn api(&self, path: &str) -> anyhow::Result<Value> {
        let answer: Value = serde_json::from_str(&self.get(&format!("/api/v1/{path}")).await?)?;
        ensure!(answer["status"] == "success", "{path}: {answer}");
        Ok(answer["data"].clone())
    }

    async fn get(&self, path: &str) -> anyhow::Result<String> {
        let ask = async {
            let mut stream = TcpStream::connect(&self.address).await?;
            // 1.0: the answer is neither compressed nor in chunks, and ends with the connection.
            stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            anyhow::Ok(answer)
        };
        let answer = tokio::time::timeout(Duration::from_secs(10), ask).await.context("no answer")??;
        let (head, body) = answer.split_once("\r\n\r\n").context("half an answer")?;
        ensure!(head.split(' ').nth(1) == Some("200"), "{head}\n{body}");
        Ok(body.to_owned())
    }
}
