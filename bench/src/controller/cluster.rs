//! What the operator works on: the chart, the objects and their Secrets, the databases; and what the servers saw of it.

use super::{OURS, pause};
use crate::steps::Steps;
use crate::table;
use anyhow::{Context, ensure};
use chrono::{DateTime, Utc};
use futures::{StreamExt, TryStreamExt, stream};
use kube::Api;
use kube::api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::build::root;
use support::control_plane::ControlPlane;
use support::postgres::PostgresServer;
use support::process::output;
use support::wait::eventually;
use tokio::task::JoinHandle;

/// Where the chart is installed, and where the objects are.
const RELEASE: &str = "sweeper";
const NAMESPACE: &str = "bench";

/// So many requests to the API server are under way while objects are made.
const AT_ONCE: usize = 16;

/// So many objects are told of in one line, and listed at once.
const PAGE: u32 = 500;

pub struct Cluster<'a> {
    plane: &'a ControlPlane,
    postgres: &'a PostgresServer,
}

impl<'a> Cluster<'a> {
    pub fn new(plane: &'a ControlPlane, postgres: &'a PostgresServer) -> Self {
        Cluster { plane, postgres }
    }

    /// Brings the CRD, and the operator's account and rights.
    pub fn install(&self) -> anyhow::Result<()> {
        let mut helm = self.plane.helm();
        helm.current_dir(root()).args([
            "install",
            OURS,
            "charts/audit-log-sweeper",
            "-n",
            RELEASE,
            "--create-namespace",
        ]);
        output(&mut helm)?;
        let crd = "crd/auditlogsweepers.auditlog.dev";
        output(self.plane.kubectl().args(["wait", "--for=condition=Established", "--timeout=20s", crd]))?;
        output(self.plane.kubectl().args(["create", "namespace", NAMESPACE]))?;
        Ok(())
    }

    pub async fn kubeconfig(&self) -> anyhow::Result<PathBuf> {
        let token = self.plane.service_account_token(RELEASE, OURS).await?;
        self.plane.kubeconfig_for(&token, OURS)
    }

    /// Each with a table that has nothing to be swept, and with a Secret.
    pub async fn databases(&self, count: u32) -> anyhow::Result<()> {
        for number in 0..count {
            let client = table::empty(self.postgres, &format!("app_{number}")).await?;
            table::completed(&client, "a table", 1000).await?;
            client.batch_execute("VACUUM (ANALYZE) audit_log").await?;
            let uri = self.postgres.superuser_uri(&format!("app_{number}"));
            let (name, uri) = (format!("db-{number}"), format!("--from-literal=uri={uri}"));
            output(self.plane.kubectl().args(["create", "secret", "generic", "-n", NAMESPACE, &name, &uri]))?;
        }
        Ok(())
    }

    async fn api(&self) -> anyhow::Result<Api<DynamicObject>> {
        let kind = ApiResource {
            group: "auditlog.dev".into(),
            version: "v1alpha1".into(),
            api_version: "auditlog.dev/v1alpha1".into(),
            kind: "AuditLogSweeper".into(),
            plural: "auditlogsweepers".into(),
        };
        Ok(Api::namespaced_with(self.plane.client().await?, NAMESPACE, &kind))
    }

    pub async fn objects(&self, numbers: Range<u32>, databases: u32, period: Duration) -> anyhow::Result<()> {
        let api = self.api().await?;
        // The type is served a moment after it is established.
        eventually("the type to be served", Duration::from_secs(20), async || {
            api.list(&ListParams::default().limit(1)).await.map_err(|error| error.to_string())
        })
        .await;
        self.each("making objects", numbers, async |number| {
            let object = serde_json::from_value(json!({
                "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper",
                "metadata": { "name": name(number) },
                "spec": { "period": format!("{}s", period.as_secs()), "timeout": "4h", "database": {
                    "secretRef": { "name": format!("db-{}", number % databases), "key": "uri" }, "tls": { "mode": "Disable" },
                } },
            }))?;
            api.create(&PostParams::default(), &object).await?;
            Ok(())
        })
        .await
    }

    /// As if the operator had been away for long.
    pub async fn make_due(&self, time: DateTime<Utc>) -> anyhow::Result<()> {
        let api = self.api().await?;
        let count = u32::try_from(self.list(|_| 1).await?.len())?;
        let status = json!({ "status": { "nextScheduleTime": time.format("%Y-%m-%dT%H:%M:%SZ").to_string() } });
        self.each("making objects due", 0..count, async |number| {
            api.patch_status(&name(number), &PatchParams::default(), &Patch::Merge(&status)).await?;
            Ok(())
        })
        .await
    }

    async fn each(
        &self,
        what: &str,
        numbers: Range<u32>,
        one: impl AsyncFn(u32) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let pages = numbers.clone().len().div_ceil(PAGE as usize);
        let mut steps = Steps::new(what, pages);
        for start in numbers.clone().step_by(PAGE as usize) {
            if pages > 1 {
                steps.next("");
            }
            let page = start..numbers.end.min(start + PAGE);
            stream::iter(page).map(|number| one(number)).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        }
        Ok(())
    }

    /// How many sweeps there were, by the statuses of all objects.
    pub async fn sweeps(&self) -> anyhow::Result<i64> {
        let sweeps = |object: &DynamicObject| object.data["status"]["totals"]["sweeps"].as_i64().unwrap_or_default();
        Ok(self.list(sweeps).await?.iter().sum())
    }

    async fn list(&self, value: impl Fn(&DynamicObject) -> i64) -> anyhow::Result<Vec<i64>> {
        let (api, mut params, mut values) = (self.api().await?, ListParams::default().limit(PAGE), vec![]);
        loop {
            let page = api.list(&params).await?;
            values.extend(page.items.iter().map(&value));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(values),
            }
        }
    }

    /// Requests from now on.
    pub fn audit(&self) -> anyhow::Result<Audit> {
        let path = self.plane.audit_log().to_owned();
        let offset = path.metadata().context("the audit log")?.len();
        Ok(Audit { path, offset })
    }

    /// Watches how many sweeps the database server has to do with at once.
    pub fn watch_sweeps(&self) -> AtOnce {
        let (uri, stop) = (self.postgres.superuser_uri("postgres"), Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let (client, connection) = tokio_postgres::connect(&uri, tokio_postgres::NoTls).await?;
            // It ends with the client.
            tokio::spawn(connection);
            // A backend whose client has gone may be seen for a moment longer: it is idle then.
            let sql = "SELECT count(*), count(*) FILTER (WHERE state <> 'idle') FROM pg_stat_activity
                WHERE application_name LIKE 'audit-log-sweeper/%'";
            let (mut connections, mut sweeps) = (0, 0);
            while !stopped.load(Ordering::SeqCst) {
                let row = client.query_one(sql, &[]).await?;
                connections = row.get::<_, i64>(0).max(connections);
                sweeps = row.get::<_, i64>(1).max(sweeps);
                pause().await;
            }
            anyhow::Ok((connections as f64, sweeps as f64))
        });
        AtOnce { stop, task }
    }
}

fn name(number: u32) -> String {
    format!("app-{number}")
}

/// A watch that goes on.
pub struct AtOnce {
    stop: Arc<AtomicBool>,
    task: JoinHandle<anyhow::Result<(f64, f64)>>,
}

impl AtOnce {
    /// The most connections, and the most of them that were busy.
    pub async fn end(self) -> anyhow::Result<(f64, f64)> {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await?
    }
}

/// The API server's log of requests, from a place in it on.
#[derive(Clone, Debug)]
pub struct Audit {
    path: PathBuf,
    offset: u64,
}

/// A request of the operator.
#[derive(Clone, Debug, PartialEq)]
pub struct Counted {
    /// Such as `patch auditlogsweepers/status`.
    pub what: String,
    /// Of the object.
    pub name: String,
    pub at: DateTime<Utc>,
    /// Not refused, as a write is on top of another.
    pub taken: bool,
}

impl Counted {
    pub fn is_status_write(&self) -> bool {
        self.taken && self.what == "patch auditlogsweepers/status"
    }
}

impl Audit {
    /// The operator's requests since it was read last. Those for the Lease are not in it.
    pub fn read(&mut self) -> anyhow::Result<Vec<Counted>> {
        let mut file = BufReader::new(File::open(&self.path).context("the audit log")?);
        ensure!(file.get_ref().metadata()?.len() >= self.offset, "the audit log was cut");
        file.seek(SeekFrom::Start(self.offset))?;
        let (mut requests, mut line) = (vec![], String::new());
        loop {
            line.clear();
            let length = file.read_line(&mut line)?;
            // The last line may be half written.
            if !line.ends_with('\n') {
                return Ok(requests);
            }
            self.offset += length as u64;
            requests.extend(counted(&serde_json::from_str(&line)?));
        }
    }
}

/// None: somebody else's.
fn counted(event: &Value) -> Option<Counted> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    if event["user"]["username"] != json!(format!("system:serviceaccount:{RELEASE}:{OURS}")) {
        return None;
    }
    let object = &event["objectRef"];
    let subresource = object["subresource"].as_str().map_or_else(String::new, |name| format!("/{name}"));
    Some(Counted {
        what: format!("{} {}{subresource}", text(&event["verb"]), text(&object["resource"])),
        name: text(&object["name"]),
        at: event["requestReceivedTimestamp"].as_str()?.parse().ok()?,
        taken: event["responseStatus"]["code"].as_i64().is_some_and(|code| code < 400),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operators_own_requests_are_counted() {
        let event = |user: &str, code: u16| {
            json!({
                "responseStatus": { "code": code },
                "verb": "patch", "user": { "username": user }, "requestReceivedTimestamp": "2026-01-02T03:04:05.678901Z",
                "objectRef": { "resource": "auditlogsweepers", "subresource": "status", "name": "app-1" },
            })
        };
        let ours = "system:serviceaccount:sweeper:audit-log-sweeper";
        let found = counted(&event(ours, 200)).unwrap();
        assert!(found.is_status_write() && found.name == "app-1", "{found:?}");
        assert!(!counted(&event(ours, 409)).unwrap().is_status_write());
        assert_eq!(counted(&event("admin", 200)), None);
    }
}
