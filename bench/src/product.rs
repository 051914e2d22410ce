//! Our side of every comparison: the product's own program, from its start to its end.

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};
use support::scratch::Scratch;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

/// The binary, and a folder for what it is told.
pub struct Product {
    pub binary: PathBuf,
    scratch: Scratch,
}

/// What a sweep said, and how long the program ran.
pub struct Swept {
    pub report: Value,
    pub took: Duration,
}

impl Swept {
    pub fn number(&self, field: &str) -> f64 {
        self.report[field].as_f64().unwrap_or_default()
    }
}

impl Product {
    pub fn new(binary: PathBuf) -> anyhow::Result<Product> {
        Ok(Product { binary, scratch: Scratch::new(None)? })
    }

    /// Sweeps once.
    pub async fn sweep(&self, uri: &str, limit: i64, batch: i64) -> anyhow::Result<Swept> {
        let started = Instant::now();
        let child = self.start(uri, limit, batch)?;
        self.end(child, started).await
    }

    /// Starts a sweep.
    pub fn start(&self, uri: &str, limit: i64, batch: i64) -> anyhow::Result<Child> {
        // As the others here: without TLS, and to its end, unless something is badly wrong.
        let spec = json!({
            "limit": limit, "batchSize": batch, "timeout": "4h", "deadline": "10m",
            "database": { "secretRef": { "name": "unused" }, "tls": { "mode": "Disable" } },
        });
        let object = json!({
            "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": "bench" }, "spec": spec,
        });
        let file = self.scratch.write("bench.yaml", object.to_string(), None)?;
        let mut command = Command::new(&self.binary);
        command.args(["sweep", "--output", "json", "-f"]).arg(file).env("DATABASE_URL", uri);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).kill_on_drop(true);
        command.spawn().context("the sweeper cannot be started")
    }

    /// Waits for the end of a sweep.
    pub async fn end(&self, mut child: Child, started: Instant) -> anyhow::Result<Swept> {
        let mut said = String::new();
        child.stdout.take().context("it is piped")?.read_to_string(&mut said).await?;
        let status = child.wait().await?;
        let took = started.elapsed();
        ensure!(status.success(), "the sweep failed: {said}");
        Ok(Swept { report: serde_json::from_str(&said)?, took })
    }
}
