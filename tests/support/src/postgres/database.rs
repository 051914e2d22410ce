//! A database that a test has to itself.

use super::{PostgresServer, connect, hostile};
use crate::leaks::MARKER;
use crate::random_hex;
use std::thread;
use tokio::runtime::Builder;
use tokio_postgres::Client;

/// Dropped with the value, as far as that is possible.
pub struct Database {
    pub name: String,
    pub host: String,
    pub port: u16,
    /// Owns the database, and is no superuser.
    pub user: String,
    pub password: String,
    server: String,
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
        let server_uri = server.superuser_uri("postgres");
        Ok(Database {
            user: name.clone(),
            name,
            host: "127.0.0.1".into(),
            port: server.port(),
            password,
            server: server_uri,
        })
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

impl Drop for Database {
    /// In the background and without regret: the server's folder goes anyway, and this only saves space until then.
    fn drop(&mut self) {
        let (server, name) = (self.server.clone(), self.name.clone());
        thread::spawn(move || {
            let drop = async {
                let client = connect(&server).await?;
                client.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")).await?;
                anyhow::Ok(client.batch_execute(&format!("DROP ROLE {name}")).await?)
            };
            Builder::new_current_thread().enable_all().build()?.block_on(drop)
        });
    }
}
