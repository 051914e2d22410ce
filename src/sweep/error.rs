//! Judges what went wrong: a reason, what to do about it, and a message without a secret or a row's data.

use std::error::Error as StdError;
use std::time::Duration;

use crate::api::Reason;

/// What can end a sweep early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URI is not one. The driver's own text may quote part of it, so it is not here.
    #[error(
        "the connection URI cannot be read: {0}. It must be of the form postgresql://user:password@host:5432/dbname; in \
         the user and password, percent-encode the characters @ : / ? # % and blanks (@ is %40)"
    )]
    Uri(&'static str),
    /// The spec says something that the CRD's rules refuse; only an older or looser CRD lets it through.
    #[error("{0}")]
    Spec(&'static str),
    /// The CA is not PEM.
    #[error("the CA of spec.database.tls.caSecretRef cannot be read: {0}")]
    Ca(&'static str),
    /// A host's name has no address.
    #[error("the host name {host} cannot be resolved: {cause}; check the host in the connection URI")]
    Resolve { host: String, cause: String },
    /// No connection came about.
    #[error("cannot connect to {host}: {cause}")]
    Connect { host: String, cause: String },
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
}

/// What the sweep was doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    Login,
    Cutoff,
    Preflight,
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
    /// Safe to show: the server's text only for kinds that cannot quote a row, and the hint.
    pub message: String,
}

/// How an error is treated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Class {
    /// Goes away by itself; retried.
    Transient,
    /// Something is missing that others may bring: a password, a table, a grant. Retried, and stalled after a while.
    Missing,
    /// The spec cannot work as it is. Retried at the pace of the schedule's backoff, and stalled at once.
    Spec,
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
        match error.to_string().as_str() {
            "error performing TLS handshake" => Self::Tls { host, cause: tls_cause(error) },
            "authentication error" | "invalid configuration" => Self::Login { host, cause: chain(error) },
            _ => Self::Connect { host, cause: chain(error) },
        }
    }

    /// Why, for conditions and metrics.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Uri(_) => Reason::InvalidConnectionURI,
            Self::Spec(_) => Reason::InvalidSpec,
            Self::Ca(_) | Self::Tls { .. } => Reason::TLSFailed,
            Self::Resolve { .. } | Self::Connect { .. } | Self::Timer { .. } | Self::Broken { .. } => {
                Reason::DatabaseUnreachable
            }
            Self::Login { .. } => Reason::AuthenticationFailed,
            Self::Server(error) => error.reason(),
            Self::Answer(_) => Reason::DatabaseError,
            Self::KeyNotUnique { .. } => Reason::SchemaMismatch,
        }
    }

    /// How it is treated.
    pub fn class(&self) -> Class {
        match self.reason() {
            Reason::InvalidConnectionURI
            | Reason::AuthenticationFailed
            | Reason::DatabaseNotFound
            | Reason::TLSFailed
            | Reason::TableNotFound
            | Reason::PermissionDenied => Class::Missing,
            Reason::ColumnNotFound | Reason::SchemaMismatch | Reason::InvalidSpec => Class::Spec,
            _ => Class::Transient,
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
    fn new(step: Step, db: &tokio_postgres::error::DbError) -> Self {
        let sqlstate = db.code().code().to_owned();
        let mut message = if may_quote_a_row(&sqlstate, step) {
            // Names are safe; the primary text and the detail may hold the row.
            let mut text = String::from("the database refused to complete a row");
            for (what, name) in [("constraint", db.constraint()), ("column", db.column()), ("table", db.table())] {
                if let Some(name) = name {
                    text.push_str(&format!(", {what} {name}"));
                }
            }
            text
        } else {
            db.message().to_owned()
        };
        let error = Self { step, sqlstate, message: String::new() };
        if let Some(hint) = error.reason().hint() {
            message.push_str("; ");
            message.push_str(hint);
        }
        Self { message, ..error }
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
            // BEGIN ... READ WRITE on a standby.
            ("0A000", _) if self.message.contains("recovery") || self.step == Step::Batch => Reason::NotPrimary,
            ("55P03", _) => Reason::TableLocked,
            ("57014", _) => Reason::StatementTimeout,
            ("40001" | "40P01", _) => Reason::TransactionConflict,
            ("53100" | "53200" | "53400" | "54000", _) => Reason::ServerOutOfResources,
            (_, "08" | "57") | ("25P03" | "25P04", _) => Reason::DatabaseUnreachable,
            (_, "58") => Reason::ServerOutOfResources,
            (_, "42" | "0A" | "55") => Reason::SchemaMismatch,
            (_, "22") if self.step != Step::Batch => Reason::SchemaMismatch,
            (_, "XX") => Reason::DataCorrupted,
            _ if self.step == Step::Batch || self.step == Step::Commit => Reason::RowRefused,
            _ => Reason::DatabaseError,
        }
    }
}

/// Whether the server's text may hold a row's data: errors of values, of constraints, and whatever a trigger raises.
/// Logging in and EXPLAIN read no row.
fn may_quote_a_row(sqlstate: &str, step: Step) -> bool {
    let known = ["08", "0A", "25", "28", "3D", "3F", "40", "42", "53", "54", "55", "57", "58"];
    !matches!(step, Step::Login | Step::Preflight | Step::Cutoff)
        && !known.iter().any(|class| sqlstate.starts_with(class))
}

impl Reason {
    /// What to do, for errors whose own text does not say it.
    const fn hint(self) -> Option<&'static str> {
        match self {
            Self::AuthenticationFailed => Some("check the user and password in the Secret of spec.database.secretRef"),
            Self::DatabaseNotFound => Some("check the database's name in the connection URI"),
            Self::TooManyConnections => Some("raise max_connections, or let the sweep connect through a pooler"),
            Self::TableNotFound => Some("check spec.schema and spec.table, and that the URI names the right database"),
            Self::ColumnNotFound => Some("check spec.columns and spec.complete"),
            Self::PermissionDenied => Some(
                "the role needs USAGE on the schema, SELECT on the three columns of spec.columns, and UPDATE on \
                 timeCompleted and on the columns of spec.complete",
            ),
            Self::NotPrimary => Some("the sweep needs the primary: check the host in the connection URI"),
            Self::TableLocked => Some("another session holds a lock on the table, a schema change most likely"),
            Self::StatementTimeout => Some(
                "a statement took longer than spec.statementTimeout: check that the index on (timeStarted, id) WHERE \
                 timeCompleted IS NULL exists and is valid, or lower spec.batchSize",
            ),
            Self::SchemaMismatch => Some("check spec.columns and spec.complete against the table's columns and types"),
            _ => None,
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
    let hint = if cause.contains("UnknownIssuer") {
        "name the Secret with the server's CA in spec.database.tls.caSecretRef"
    } else if cause.contains("not valid for name") {
        "connect by a name that the server's certificate is for, or set spec.database.tls.mode to VerifyCA"
    } else if cause.contains("does not support TLS") {
        "set spec.database.tls.mode to Disable to do without encryption"
    } else {
        "check spec.database.tls and the server's certificate"
    };
    format!("{cause}; {hint}")
}
