//! Judges what went wrong: a reason, what to do about it, and a message without a secret or a row's data.

use std::error::Error as StdError;
use std::time::Duration;

use tokio_postgres::error::{DbError, Severity};

use super::bounded::Excess;
use crate::api::{Class, Failure, Reason};

/// What can end a sweep early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URI is not one. The driver's own text may quote part of it, so it is not here.
    #[error(
        "the connection URI cannot be read: {0}. It must be of the form postgresql://user:password@host:5432/dbname; in \
         the user and password, percent-encode the characters @ : / ? # % and blanks (@ is %40)"
    )]
    Uri(&'static str),
    /// The CA is not PEM.
    #[error("the CA of spec.database.tls.caSecretRef cannot be read: {0}")]
    Ca(&'static str),
    /// The client certificate cannot be used. What was read is not quoted: it is a key.
    #[error("the client certificate of spec.database.tls.clientCertSecretRef cannot be used: {0}")]
    ClientCertificate(&'static str),
    /// The spec names what to verify the server by, and the URI says that nothing is.
    #[error(
        "spec.database.tls or the Secret has a CA or a client certificate, and the connection URI says sslmode=disable: set \
         spec.database.tls.mode, which wins over the URI"
    )]
    NamedForNothing,
    /// Nobody answers.
    #[error("{}", unanswered(.host, *.phase, *.after))]
    Unanswered { host: String, phase: ConnectPhase, after: Duration },
    /// A server that takes no writes, where one that does was asked for.
    #[error("{host} takes no writes: it is a standby or read-only; name the primary in the connection URI")]
    ReadOnly { host: String },
    /// A host's name has no address.
    #[error("the host name {host} cannot be resolved: {cause}; check the host in the connection URI")]
    Resolve { host: String, cause: String },
    /// This process has no file descriptor left for a connection.
    #[error("cannot connect to {host}: {cause}; raise the operator's limit of open files (ulimit -n)")]
    OpenFiles { host: String, cause: String },
    /// No connection came about.
    #[error("cannot connect to {host}: {cause}; check the host and port in the connection URI")]
    Connect { host: String, cause: String },
    /// It sent what PostgreSQL would not.
    #[error("{host} sent {excess}; check that PostgreSQL listens on the port in the connection URI")]
    Protocol { host: String, excess: Excess },
    /// Something took longer than it may.
    #[error("{what} did not end within {after:?}")]
    Timer { what: &'static str, after: Duration },
    /// Encryption, or the proof of who the server is.
    #[error("TLS to {host} failed: {cause}")]
    Tls { host: String, cause: String },
    /// The server wants to be shown something else than a password, or none was given.
    #[error("cannot log in to {host}: {cause}; check the user and password in the Secret of spec.database.secretRef")]
    Login { host: String, cause: String },
    /// The server's own error.
    #[error("{0}")]
    Server(ServerError),
    /// The connection ended.
    #[error("the connection broke while {during}: {cause}")]
    Broken { during: &'static str, cause: String },
    /// An answer that the statement cannot have.
    #[error("the answer to {0} cannot be read")]
    Answer(&'static str),
    /// A batch changed more rows than it chose.
    #[error(
        "rows of the table share one key: a batch chose {selected} rows and would have completed {completed}; it was \
         rolled back. The columns of spec.columns id and timeStarted together must be unique"
    )]
    KeyNotUnique { selected: i64, completed: i64 },
    /// A row has no key.
    #[error(
        "a stale row has no key that can be read: in the column of spec.columns id it has NULL, which must not be, or a text that is not UTF-8"
    )]
    NullKey,
    /// The deadline came before the first batch was done.
    #[error(
        "not one batch of {rows} rows was done within spec.deadline ({deadline:?}); lower spec.batchSize, raise \
         spec.deadline, or check that the index on (timeStarted, id) WHERE timeCompleted IS NULL exists"
    )]
    NothingDone { rows: i64, deadline: Duration },
    /// The server refuses row after row for one cause.
    #[error("{rows} rows in a row were refused for one cause, so the sweep stopped and goes on behind them: {cause}")]
    AllRefused { rows: i64, cause: Box<Error> },
    /// The server refused as many rows as one sweep steps over.
    #[error("{rows} rows were refused in one sweep; the next one goes on behind them. The last: {cause}")]
    ManyRefused { rows: i64, cause: Box<Error> },
}

/// How far a connection has come: what a silent server leaves unanswered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ConnectPhase {
    Name,
    Tcp,
    Handshake,
    /// The login is over.
    Statement,
}

/// What the sweep was doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    Login,
    Cutoff,
    Preflight,
    /// Choosing a row, or reading where one is: no row is changed.
    Select,
    Batch,
    Commit,
    Backlog,
    Lookup,
}

impl Step {
    const fn text(self) -> &'static str {
        match self {
            Self::Login => "logging in",
            Self::Cutoff => "reading the database's clock",
            Self::Preflight => "checking the table",
            Self::Select => "choosing a row",
            Self::Batch => "completing rows",
            Self::Commit => "committing",
            Self::Backlog => "counting the backlog",
            Self::Lookup => "looking up a lost commit",
        }
    }
}

/// An error that the server reported.
#[derive(Debug, thiserror::Error)]
#[error("{message} (SQLSTATE {sqlstate}, while {})", .step.text())]
pub struct ServerError {
    /// What the sweep was doing.
    pub step: Step,
    /// The five characters by which PostgreSQL names the kind of error.
    pub sqlstate: String,
    /// The server ended the connection with it.
    pub fatal: bool,
    /// The server is a standby.
    pub standby: bool,
    /// The constraint that was broken, if one was.
    pub constraint: Option<String>,
    /// Safe to show: the server's text only for kinds that cannot quote a row, and the hint.
    pub message: String,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self { class: error.class(), ..Self::new(error.reason(), error.to_string()) }
    }
}

impl Error {
    /// The error of a statement.
    pub(super) fn statement(step: Step, error: &tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(db) => Self::Server(ServerError::new(step, db)),
            None => Self::Broken { during: step.text(), cause: chain(error) },
        }
    }

    /// The error of a handshake with `host`.
    pub(super) fn handshake(host: &str, error: &tokio_postgres::Error) -> Self {
        let host = host.to_owned();
        if let Some(db) = error.as_db_error() {
            return Self::Server(ServerError::new(Step::Login, db));
        }
        // A server that refuses our certificate says so when the handshake is over for us.
        let alert = chain(error).contains("received fatal alert");
        match error.to_string().as_str() {
            _ if alert => Self::Tls { host, cause: tls_cause(error) },
            "error performing TLS handshake" => Self::Tls { host, cause: tls_cause(error) },
            "authentication error" | "invalid configuration" => Self::Login { host, cause: chain(error) },
            _ => Self::Connect { host, cause: chain(error) },
        }
    }

    /// Why, for conditions and metrics.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Uri(_) => Reason::InvalidConnectionURI,
            Self::Ca(_) | Self::ClientCertificate(_) | Self::NamedForNothing | Self::Tls { .. } => Reason::TLSFailed,
            Self::Resolve { .. } | Self::Unanswered { phase: ConnectPhase::Name, .. } => Reason::NameResolutionFailed,
            Self::Connect { .. } => Reason::DatabaseUnreachable,
            Self::OpenFiles { .. } => Reason::TooManyOpenFiles,
            Self::Unanswered { phase: ConnectPhase::Tcp, .. } => Reason::ConnectTimeout,
            Self::Unanswered { phase: ConnectPhase::Handshake, .. } => Reason::LoginTimeout,
            Self::Protocol { .. } => Reason::ProtocolError,
            Self::Timer { .. } | Self::Unanswered { phase: ConnectPhase::Statement, .. } => Reason::ResponseTimeout,
            Self::Broken { .. } => Reason::ConnectionLost,
            Self::ReadOnly { .. } => Reason::NotPrimary,
            Self::Login { .. } => Reason::AuthenticationFailed,
            Self::Server(error) => error.reason(),
            Self::Answer(_) => Reason::DatabaseError,
            Self::KeyNotUnique { .. } | Self::NullKey => Reason::SchemaMismatch,
            Self::NothingDone { .. } => Reason::StatementTimeout,
            Self::AllRefused { .. } | Self::ManyRefused { .. } => Reason::RowRefused,
        }
    }

    /// How it is treated.
    pub fn class(&self) -> Class {
        if matches!(self, Self::AllRefused { .. }) {
            return Class::Spec;
        }
        self.reason().class()
    }

    /// What makes two refusals alike: SQLSTATE and constraint.
    pub fn kind(&self) -> String {
        match self {
            Self::Server(error) => format!("{} {}", error.sqlstate, error.constraint.as_deref().unwrap_or_default()),
            _ => String::new(),
        }
    }

    /// The SQLSTATE, if the server reported the error.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Server(error) => Some(&error.sqlstate),
            _ => None,
        }
    }
}

impl ServerError {
    fn new(step: Step, db: &DbError) -> Self {
        let sqlstate = db.code().code().to_owned();
        let constraint = db.constraint().map(str::to_owned);
        let fatal = db.parsed_severity().is_some_and(|severity| matches!(severity, Severity::Fatal | Severity::Panic));
        // BEGIN ... READ WRITE on a standby: a setting that is refused, with a code that says "not supported".
        let standby = sqlstate == "0A000" && db.file() == Some("guc.c");
        let error = Self { step, sqlstate, fatal, standby, constraint, message: String::new() };
        let reason = error.reason();
        let mut message = if error.may_quote_the_uri() || !fatal && error.may_quote_a_row(db) {
            let mut text = reason.meaning().replace('`', "");
            // Where the server checks by itself, the names are the catalog's; a trigger may make names up.
            let checked = ["execMain.c", "execIndexing.c", "nbtinsert.c", "ri_triggers.c"];
            if db.file().is_some_and(|file| checked.contains(&file)) {
                for (what, name) in [("constraint", db.constraint()), ("column", db.column()), ("table", db.table())] {
                    if let Some(name) = name {
                        text.push_str(&format!(", {what} {name}"));
                    }
                }
            }
            text
        } else {
            db.message().to_owned()
        };
        let hint = match step {
            Step::Login if reason == Reason::PermissionDenied => Some(NO_CONNECT.to_owned()),
            _ => hint(reason),
        };
        if let Some(hint) = hint {
            message.push_str("; ");
            message.push_str(&hint);
        }
        Self { message, ..error }
    }

    /// Whether the server's text may hold the user, the database or an option of the connection URI: of one that is
    /// badly written, a piece of the password may be taken for these. Not where the server itself is the matter.
    fn may_quote_the_uri(&self) -> bool {
        self.step == Step::Login && !self.sqlstate.starts_with("57") && !self.sqlstate.starts_with("53")
    }

    /// Whether the server's text may hold a row's data. Where rows are read, a cast may quote them, and where they are
    /// changed, triggers may raise any text under any SQLSTATE; only the check of rights, which names a relation,
    /// cannot be theirs.
    fn may_quote_a_row(&self, db: &DbError) -> bool {
        !matches!(self.step, Step::Login | Step::Cutoff | Step::Preflight) && db.file() != Some("aclchk.c")
    }

    fn reason(&self) -> Reason {
        let (class, _) = self.sqlstate.split_at_checked(2).unwrap_or_default();
        match (self.sqlstate.as_str(), class) {
            ("28P01" | "28000", _) | (_, "28") => Reason::AuthenticationFailed,
            ("3D000", _) => Reason::DatabaseNotFound,
            ("53300", _) => Reason::TooManyConnections,
            ("42P01" | "3F000", _) => Reason::TableNotFound,
            ("42703", _) => Reason::ColumnNotFound,
            ("42501", _) => Reason::PermissionDenied,
            ("25006", _) => Reason::NotPrimary,
            _ if self.standby => Reason::NotPrimary,
            ("55P03", _) => Reason::TableLocked,
            ("57014", _) => Reason::StatementTimeout,
            ("40001" | "40P01", _) => Reason::TransactionConflict,
            ("53100" | "53200" | "53400" | "54000", _) => Reason::ServerOutOfResources,
            (_, "08" | "57") | ("25P03" | "25P04", _) => Reason::DatabaseUnreachable,
            (_, "58") => Reason::ServerOutOfResources,
            // Of an option in the URI: nothing else is asked then.
            (_, "42" | "0A" | "55" | "22") if self.step == Step::Login => Reason::InvalidConnectionURI,
            (_, "42" | "0A" | "55") => Reason::SchemaMismatch,
            (_, "22") if self.step != Step::Batch => Reason::SchemaMismatch,
            (_, "XX") => Reason::DataCorrupted,
            _ if self.step == Step::Batch || self.step == Step::Commit => Reason::RowRefused,
            _ => Reason::DatabaseError,
        }
    }
}

/// What to do where the role may not even log in. Names could be a piece of a password: see `may_quote_the_uri`.
const NO_CONNECT: &str = "run, as the database's owner or a superuser, GRANT CONNECT ON DATABASE ... TO ..., with the \
    database and the user of the connection URI; if its options after the ? set something that the role may not, take them out";

/// What to do, for errors whose own text does not say it.
fn hint(reason: Reason) -> Option<String> {
    let is_hinted = matches!(
        reason,
        Reason::AuthenticationFailed
            | Reason::DatabaseNotFound
            | Reason::TooManyConnections
            | Reason::TableNotFound
            | Reason::ColumnNotFound
            | Reason::PermissionDenied
            | Reason::InvalidConnectionURI
            | Reason::NotPrimary
            | Reason::TableLocked
            | Reason::StatementTimeout
            | Reason::SchemaMismatch
    );
    is_hinted.then(|| reason.advice())
}

/// What was waited for in vain, and what to check.
fn unanswered(host: &str, phase: ConnectPhase, after: Duration) -> String {
    match phase {
        ConnectPhase::Name => format!(
            "no name server answered for {host} within {after:?}; check the cluster's DNS and the host in the connection URI"
        ),
        ConnectPhase::Tcp => format!(
            "{host} did not answer within {after:?}; check the host and port in the connection URI, and that no firewall \
             or NetworkPolicy drops the connection"
        ),
        ConnectPhase::Handshake => format!(
            "{host} took the connection and did not let us log in within {after:?}; check that PostgreSQL listens on the \
             port in the connection URI"
        ),
        ConnectPhase::Statement => {
            format!(
                "{host} let us log in and answered no statement within {after:?}; look at the server and the network"
            )
        }
    }
}

/// The whole chain of causes in one line.
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// What rustls found wrong, and the field to look at.
fn tls_cause(error: &tokio_postgres::Error) -> String {
    let cause = error.source().map_or_else(String::new, chain);
    let hint = if cause.contains("alert: ProtocolVersion") {
        "the server must offer TLS 1.2 or later: check its ssl_max_protocol_version"
    } else if cause.contains("alert: HandshakeFailure") {
        "there is no cipher or kind of key that both know: give the server a certificate with an RSA, ECDSA P-256 or P-384, or \
         Ed25519 key"
    } else if cause.contains("received fatal alert") {
        "the server refuses our side: check spec.database.tls.clientCertSecretRef"
    } else if cause.contains("UnsupportedCertVersion") {
        "a certificate is X.509 v1: issue it anew as v3, with extensions"
    } else if cause.contains("CaUsedAsEndEntity") {
        "the server shows the certificate of a CA: issue one for the server (basicConstraints CA:FALSE)"
    } else if cause.contains("Expired") || cause.contains("expired") {
        "renew the server's certificate; until then, spec.database.tls.mode Require without caSecretRef does not verify it"
    } else if cause.contains("UnknownIssuer") || cause.contains("BadSignature") {
        "no CA that is trusted here signed the server's certificate: put the one that did into a Secret, under ca.crt, and name \
         that in spec.database.tls.caSecretRef"
    } else if cause.contains("not valid for name") {
        "connect by a name that the server's certificate is for, or set spec.database.tls.mode to VerifyCA"
    } else if cause.contains("does not support TLS") {
        "set spec.database.tls.mode to Disable to do without encryption"
    } else {
        "check spec.database.tls and the server's certificate"
    };
    format!("{cause}; {hint}")
}
