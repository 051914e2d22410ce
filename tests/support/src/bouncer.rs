//! A real PgBouncer in transaction mode before one database, where one is installed.

use crate::free_port;
use crate::postgres::Database;
use crate::process::{Account, Process, Program};
use crate::scratch::Scratch;
use anyhow::Context;
use std::path::PathBuf;
use std::time::Duration;
use tokio_postgres::{Client, NoTls};

/// It ends with the value; the order of the fields is the order in which it does.
pub struct Bouncer {
    process: Process,
    program: Program,
    scratch: Scratch,
    uri: String,
    port: u16,
}

/// Where it is installed, if it is. Debian puts it where ordinary users do not look.
pub fn installed() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/sbin")]);
    folders.map(|folder| folder.join("pgbouncer")).find(|program| program.is_file())
}

impl Bouncer {
    /// Starts it with so many server connections for all clients: with one, whatever a client leaves behind is seen.
    pub async fn start(database: &Database, connections: u32) -> anyhow::Result<Bouncer> {
        let program = installed().context("PgBouncer is needed (Debian and Ubuntu: `apt-get install pgbouncer`)")?;
        // It refuses to run as root.
        let account = Account::unprivileged()?;
        let scratch = Scratch::new(account)?;
        let port = free_port()?;
        let Database { name, host, port: server, user, password, .. } = database;
        let users = scratch.write("users.txt", format!("\"{user}\" \"{password}\"\n"), account)?;
        let settings = format!(
            "[databases]\n{name} = host={host} port={server} dbname={name}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\npool_mode = transaction\n\
             default_pool_size = {connections}\nmax_client_conn = 50\n",
            users.display()
        );
        let settings = scratch.write("pgbouncer.ini", settings, account)?;
        let program = Program { account, ..Program::new("pgbouncer", program) }.arg(settings);
        let bouncer = Bouncer {
            process: program.clone().start(&scratch)?,
            program,
            scratch,
            uri: format!("postgresql://{user}:{password}@127.0.0.1:{port}/{name}"),
            port,
        };
        bouncer.until_ready().await?;
        Ok(bouncer)
    }

    async fn until_ready(&self) -> anyhow::Result<()> {
        let end = tokio::time::Instant::now() + Duration::from_secs(10);
        while let Err(error) = self.client().await {
            anyhow::ensure!(tokio::time::Instant::now() < end, "{error:#}\n{}", self.process.log_tail(20));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Kills it by -9 and starts it again, on the same port.
    pub async fn kill_and_start_again(&mut self) -> anyhow::Result<()> {
        self.process.signal(nix::sys::signal::Signal::SIGKILL)?;
        let end = tokio::time::Instant::now() + Duration::from_secs(10);
        while self.process.is_running() {
            anyhow::ensure!(tokio::time::Instant::now() < end, "PgBouncer does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.process = self.program.clone().start(&self.scratch)?;
        Ok(())
    }

    /// Where the database is reached through it.
    pub fn uri(&self) -> String {
        self.uri.clone()
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A client of it.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let (client, connection) = tokio_postgres::connect(&self.uri, NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }
}
