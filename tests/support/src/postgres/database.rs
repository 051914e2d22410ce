//! A database that a test has to itself.

use super::{PostgresServer, connect, hostile};
use crate::leaks::MARKER;
use crate::random_hex;
use tokio_postgres::Client;

/// It goes with its server. DROP DATABASE would flush all that every other test has written (a checkpoint).
pub struct Database {
    pub name: String,
    pub host: String,
    pub port: u16,
    /// Owns the database, and is no superuser.
    pub user: String,
    pub password: String,
}

impl Database {
    pub(super) async fn create(server: &PostgresServer) -> anyhow::Result<Database> {
        let (name, password) = (format!("test_{}", &random_hex()[..12]), format!("{MARKER}{}", random_hex()));
        let client = server.connect("postgres").await?;
        client.batch_execute(&format!("CREATE ROLE {name} LOGIN PASSWORD '{password}'")).await?;
        // Nobody is connected to either template, so that many can be copied at once.
        let template = match hostile::folder() {
            Some(_) => {
                server.hostile.get_or_try_init(|| hostile::create_template(server)).await?;
                hostile::TEMPLATE
            }
            None => "template0",
        };
        client.batch_execute(&format!("CREATE DATABASE {name} OWNER {name} TEMPLATE {template}")).await?;
        if hostile::folder().is_some() {
            client.batch_execute(&format!("ALTER DATABASE {name} SET search_path = evil, pg_catalog, public")).await?;
        }
        Ok(Database { user: name.clone(), name, host: "127.0.0.1".into(), port: server.port(), password })
    }

    pub fn uri(&self) -> String {
        let Database { name, host, port, user, password, .. } = self;
        format!("postgresql://{user}:{password}@{host}:{port}/{name}")
    }

    /// Connects as the owner, without TLS.
    pub async fn client(&self) -> anyhow::Result<Client> {
        connect(&self.uri()).await
    }
}
