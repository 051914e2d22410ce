//! The database of the end-to-end run: PostgreSQL on this machine, which pods reach by the name of a Service.

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use support::build::root;
use support::postgres::{PostgresOptions, PostgresServer};
use support::random_hex;

/// The ConfigMap that has the CA of the server.
pub const CA: &str = "app-postgres-ca";

/// An audit log with rows that must stay as they are: some that are complete, some that started a moment ago.
pub struct Log {
    server: PostgresServer,
    /// Where pods reach it.
    host: String,
    password: String,
    before: String,
}

impl Log {
    /// For the pods of this namespace.
    pub async fn start(host: &str, namespace: &str) -> anyhow::Result<Self> {
        let options = PostgresOptions {
            settings: vec![("listen_addresses".into(), format!("'127.0.0.1,{host}'"))],
            names: vec![format!("app-postgres.{namespace}.svc")],
            // From the pods: with TLS and a password, or not at all.
            access: vec!["hostssl app app_sweeper all scram-sha-256".into()],
            ..Default::default()
        };
        let server = PostgresServer::start(options).await.context("PostgreSQL, on --database-host too")?;
        let password = random_hex();
        server.create_database("app").await?;
        let client = server.connect("app").await?;
        for file in ["table", "index", "role"] {
            client.batch_execute(&fs::read_to_string(root().join(format!("manifests/sql/{file}.sql")))?).await?;
        }
        let login = format!("CREATE ROLE app_sweeper LOGIN PASSWORD '{password}' IN ROLE audit_log_sweeper");
        client.batch_execute(&login).await?;
        let mut log = Self { server, host: host.to_owned(), password, before: String::new() };
        log.insert("complete", "interval '9 h'", "now(), 200, 'success'", 1000).await?;
        log.insert("fresh", "interval '1 s'", "NULL, NULL, NULL", 10).await?;
        log.before = log.others().await?;
        Ok(log)
    }

    async fn insert(&self, kind: &str, age: &str, end: &str, count: u32) -> anyhow::Result<BTreeSet<String>> {
        let sql = format!(
            "INSERT INTO audit_log (id, time_started, request_id, request_uri, operation_id, source_ip, actor_kind,
                time_completed, http_status_code, result_kind)
             SELECT gen_random_uuid(), now() - {age} - n * interval '1 s', '{kind}', '/v1', 'op', '192.0.2.7',
                'unauthenticated', {end} FROM generate_series(1, {count}) AS n RETURNING id::text"
        );
        let rows = self.server.connect("app").await?.query(&sql, &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// So many requests started hours ago and never ended. Their keys.
    pub async fn start_rows(&self, count: u32) -> anyhow::Result<BTreeSet<String>> {
        self.insert("stale", "interval '6 h'", "NULL, NULL, NULL", count).await
    }

    /// The keys of the rows that a sweep completed.
    pub async fn timed_out(&self) -> anyhow::Result<BTreeSet<String>> {
        let sql = "SELECT id::text FROM audit_log WHERE result_kind = 'timeout' AND time_completed IS NOT NULL";
        let rows = self.server.connect("app").await?.query(sql, &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    async fn others(&self) -> anyhow::Result<String> {
        let sql = "SELECT count(*) || ' ' || sum(hashtextextended(t::text, 0)) FROM audit_log AS t WHERE request_id <> 'stale'";
        Ok(self.server.connect("app").await?.query_one(sql, &[]).await?.get(0))
    }

    /// Fails if a row has changed that was complete or fresh.
    pub async fn untouched(&self) -> anyhow::Result<()> {
        let now = self.others().await?;
        ensure!(now == self.before, "rows that no sweep may touch were {} and are {now}", self.before);
        Ok(())
    }

    /// What leads pods here by the name and the port that the sample has, and the CA that they trust.
    pub fn objects(&self) -> [Value; 3] {
        let port = self.server.port();
        let family = if self.host.contains(':') { "IPv6" } else { "IPv4" };
        [
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": { "name": "app-postgres" },
                "spec": { "ports": [{ "name": "postgres", "port": 5432, "targetPort": port }] },
            }),
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": { "name": "app-postgres", "labels": { "kubernetes.io/service-name": "app-postgres" } },
                "ports": [{ "name": "postgres", "port": port }],
                "endpoints": [{ "addresses": [self.host], "conditions": { "ready": true } }],
            }),
            json!({
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": CA },
                "data": { "ca.crt": self.server.ca_pem() },
            }),
        ]
    }

    /// The sample that users start from, but for the password and the namespace of the server.
    pub fn sample(&self, namespace: &str) -> anyhow::Result<String> {
        let mut sample = fs::read_to_string(root().join("manifests/sample.yaml"))?;
        for (from, to) in [("change-me", self.password.as_str()), (".default.svc", &format!(".{namespace}.svc"))] {
            ensure!(sample.contains(from), "manifests/sample.yaml has no {from}");
            sample = sample.replace(from, to);
        }
        Ok(sample)
    }
}
