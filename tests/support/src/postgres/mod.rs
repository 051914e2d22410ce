//! Real PostgreSQL servers: each in a folder of its own, on a free port of loopback, with TLS, never as root.

mod binaries;
mod database;
pub mod hostile;

pub use binaries::Binaries;
pub use database::Database;

use crate::certificates::Authority;
use crate::leaks::MARKER;
use crate::process::{Account, Process, Program, output};
use crate::scratch::Scratch;
use crate::{free_port, random_hex, start_once};
use anyhow::{Context, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tokio::sync::OnceCell;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, Config, NoTls};

/// The one that the tests of this process share. It cannot be stopped: who wants that starts one of its own.
pub fn shared() -> &'static PostgresServer {
    static SHARED: OnceLock<Result<PostgresServer, String>> = OnceLock::new();
    start_once(&SHARED, || PostgresServer::start(PostgresOptions::default()))
}

#[derive(Clone, Debug, Default)]
pub struct PostgresOptions {
    /// Absent: what is installed, else downloaded.
    pub binaries: Option<Binaries>,
    /// Lines of postgresql.conf, which win over ours, such as `("statement_timeout", "'5s'")`.
    pub settings: Vec<(String, String)>,
    /// Lines of pg_hba.conf before ours, which asks everyone for a password, with TLS or without.
    pub access: Vec<String>,
    /// For what crashes with the whole machine; a server that is killed loses nothing without.
    pub fsync: bool,
    /// What else its certificate is for.
    pub names: Vec<String>,
    /// Its certificate is no longer valid.
    pub expired: bool,
}

/// How a server stops: as for a restart (open transactions are rolled back), or as in a crash.
#[derive(Clone, Copy, Debug)]
pub enum Shutdown {
    Fast,
    Immediate,
}

/// Everything ends with it; the order of the fields is the order in which it does.
pub struct PostgresServer {
    process: Option<Process>,
    scratch: Scratch,
    /// How it was started, to start it again.
    program: Program,
    version: String,
    port: u16,
    password: String,
    authority: Authority,
    stranger: Authority,
    hostile: OnceCell<()>,
}

impl PostgresServer {
    /// Makes a cluster, starts it and waits until it answers, about 2 s.
    pub async fn start(options: PostgresOptions) -> anyhow::Result<PostgresServer> {
        let mut tries = 1;
        loop {
            match Self::try_start(&options).await {
                // A free port may be taken by another before we have it.
                Err(error) if tries < 3 && format!("{error:#}").contains("Address already in use") => tries += 1,
                result => return result,
            }
        }
    }

    async fn try_start(options: &PostgresOptions) -> anyhow::Result<PostgresServer> {
        let binaries = options.binaries.clone().map_or_else(Binaries::ensure, Ok)?;
        let account = Account::unprivileged()?;
        let scratch = Scratch::new(account)?;
        let (password, port) = (format!("{MARKER}{}", random_hex()), free_port()?);
        let bin = binaries.reachable_by(account, &scratch)?;
        let data = scratch.path().join("data");

        let mut initdb = Command::new(bin.join("initdb"));
        initdb.args(["--username=postgres", "--auth=scram-sha-256", "--locale=C", "--encoding=UTF8", "--no-sync"]);
        initdb.arg("--pwfile").arg(scratch.write("password", &password, account)?).arg("--pgdata").arg(&data);
        initdb.current_dir(scratch.path());
        if let Some(account) = account {
            account.apply(&mut initdb);
        }
        output(&mut initdb).context("no PostgreSQL cluster can be made")?;

        let (authority, stranger) =
            (Authority::new(&format!("{MARKER} PostgreSQL"))?, Authority::new(&format!("{MARKER} stranger"))?);
        let names = ["localhost", "127.0.0.1"].into_iter().chain(options.names.iter().map(String::as_str));
        let names: Vec<&str> = names.collect();
        let identity = if options.expired { authority.expired_server(&names)? } else { authority.server(&names)? };
        let access = options.access.join("\n") + "\nhost all all 127.0.0.1/32 scram-sha-256\n";
        let files = [
            ("ssl_cert_file", "server.crt", identity.certificate_pem),
            ("ssl_key_file", "server.key", identity.key_pem),
            ("ssl_ca_file", "ca.crt", authority.pem()),
            ("hba_file", "pg_hba.conf", access),
        ];
        let mut settings: Vec<(String, String)> = vec![
            ("listen_addresses".into(), "'127.0.0.1'".into()),
            ("port".into(), port.to_string()),
            // The path of a socket may have about 100 bytes, and temporary folders can be longer.
            ("unix_socket_directories".into(), "''".into()),
            ("max_connections".into(), "200".into()),
            ("shared_buffers".into(), "'256MB'".into()),
            // Each of hundreds of databases would be visited every minute.
            ("autovacuum_naptime".into(), "'1h'".into()),
            ("fsync".into(), options.fsync.to_string()),
            ("ssl".into(), "on".into()),
        ];
        for (setting, name, contents) in files {
            let path = scratch.write(name, contents, account)?;
            settings.push((setting.into(), format!("'{}'", path.display())));
        }
        settings.extend(options.settings.clone());
        let lines: String = settings.iter().map(|(setting, value)| format!("{setting} = {value}\n")).collect();
        // The last line for a setting wins, and initdb's own come first.
        let file = data.join("postgresql.conf");
        let initial = std::fs::read_to_string(&file)?;
        scratch.write("data/postgresql.conf", initial + &lines, account)?;

        let program =
            Program { account, stop_signal: Signal::SIGINT, ..Program::new("postgres", bin.join("postgres")) };
        let program = program.arg("-D").arg(data);
        let version = binaries.version;
        let hostile = OnceCell::new();
        let mut server =
            PostgresServer { process: None, scratch, program, version, port, password, authority, stranger, hostile };
        server.start_again().await?;
        Ok(server)
    }

    /// Starts it on the same port after a stop and waits until it answers.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        ensure!(self.process.is_none(), "PostgreSQL runs already");
        let mut process = self.program.start(&self.scratch)?;
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let error = match timeout(Duration::from_secs(5), self.connect("postgres")).await {
                Ok(Ok(_)) => break,
                Ok(Err(error)) => format!("{error:#}"),
                Err(_) => "no answer".to_owned(),
            };
            process.check()?;
            if Instant::now() > end {
                bail!("PostgreSQL does not answer after a minute: {error}; its log:\n{}", process.log_tail(20));
            }
            sleep(Duration::from_millis(30)).await;
        }
        hostile::keep_log(process.log())?;
        self.process = Some(process);
        Ok(())
    }

    pub fn stop(&mut self, how: Shutdown) -> anyhow::Result<()> {
        let process = self.process.take().context("PostgreSQL does not run")?;
        match how {
            Shutdown::Fast => process.stop_with(Signal::SIGINT),
            Shutdown::Immediate => process.stop_with(Signal::SIGQUIT),
        }
    }

    pub async fn restart(&mut self, how: Shutdown) -> anyhow::Result<()> {
        self.stop(how)?;
        self.start_again().await
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Such as 15.14.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Of the postmaster, while it runs.
    pub fn pid(&self) -> Option<Pid> {
        self.process.as_ref().map(Process::pid)
    }

    pub fn log_tail(&self, lines: usize) -> String {
        self.process.as_ref().map(|process| process.log_tail(lines)).unwrap_or_default()
    }

    /// The authority that signed its certificate, which is for `localhost` and `127.0.0.1`; it trusts clients signed by it.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    pub fn ca_pem(&self) -> String {
        self.authority.pem()
    }

    /// An authority that signed nothing here.
    pub fn stranger_ca_pem(&self) -> String {
        self.stranger.pem()
    }

    pub fn superuser_uri(&self, database: &str) -> String {
        format!("postgresql://postgres:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// Connects as the superuser, without TLS.
    pub async fn connect(&self, database: &str) -> anyhow::Result<Client> {
        connect(&self.superuser_uri(database)).await
    }

    pub async fn create_database(&self, name: &str) -> anyhow::Result<()> {
        let client = self.connect("postgres").await?;
        let created = client.batch_execute(&format!("CREATE DATABASE \"{name}\" TEMPLATE template0")).await;
        created.with_context(|| format!("database {name} cannot be created"))
    }

    /// An empty database for one test, with a login of its own that owns it.
    pub async fn database(&self) -> anyhow::Result<Database> {
        Database::create(self).await
    }
}

/// Connects without TLS, with PostgreSQL's own `search_path`; the connection runs in the background until the client is dropped.
pub(crate) async fn connect(uri: &str) -> anyhow::Result<Client> {
    let client = connect_as_is(uri).await?;
    if hostile::folder().is_some() {
        client.batch_execute("SET search_path = \"$user\", public").await?;
    }
    Ok(client)
}

/// The same, with the `search_path` of the database.
async fn connect_as_is(uri: &str) -> anyhow::Result<Client> {
    let mut config: Config = uri.parse()?;
    config.connect_timeout(Duration::from_secs(10));
    let (client, connection) = config.connect(NoTls).await?;
    // Its end is an error of the client's next statement, where it is seen.
    tokio::spawn(connection);
    Ok(client)
}
