//! What a preflight says: what it looked at, what it found wrong there, and what fixes it.

use std::fmt;

use crate::api::Reason;
use crate::api::status::Backlog;
use crate::database::Error;

/// What is looked at, in this order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Subject {
    /// Whether there is a connection.
    Connection,
    /// Version and role in replication.
    Server,
    /// Whether it is there, its kind, partitions, children, rules.
    Table,
    /// The columns of `spec.columns`: there, types.
    Columns,
    /// Whether a key means one row.
    Key,
    /// The columns and values of `spec.complete`.
    Complete,
    /// The index that a sweep reads.
    Index,
    /// What the role is granted.
    Rights,
    /// Row security.
    RowSecurity,
    /// Constraints that old rows may break.
    Constraints,
    /// Triggers that have a say in an update.
    Triggers,
    /// Whether the server plans the sweep's statement, and how.
    Statement,
}

impl Subject {
    /// All that a preflight looks at once it is connected.
    pub const LOOKED_AT: [Self; 11] = [
        Self::Server,
        Self::Table,
        Self::Columns,
        Self::Key,
        Self::Complete,
        Self::Index,
        Self::Rights,
        Self::RowSecurity,
        Self::Constraints,
        Self::Triggers,
        Self::Statement,
    ];
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Connection => "connection",
            Self::Server => "server",
            Self::Table => "table",
            Self::Columns => "columns",
            Self::Key => "key",
            Self::Complete => "complete",
            Self::Index => "index",
            Self::Rights => "rights",
            Self::RowSecurity => "row security",
            Self::Constraints => "constraints",
            Self::Triggers => "triggers",
            Self::Statement => "statement",
        })
    }
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Severity {
    /// A sweep does its work; what it may meet is worth knowing.
    Warning,
    /// Not ready; but a sweep does no harm and completes what it can, perhaps slowly: better than none.
    NotReady,
    /// Not ready, and a sweep could not work or could do harm.
    Blocking,
}

impl Severity {
    /// `error` or `warning`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::NotReady | Self::Blocking => "error",
        }
    }
}

/// What fixes a finding.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fix {
    /// Statements, part after part.
    Sql(Vec<Part>),
    /// The field of the AuditLogSweeper to change.
    Field(String),
}

/// What one role runs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Part {
    pub run_as: RunAs,
    /// Without semicolons. To be run one by one in one session, outside of a transaction.
    pub statements: Vec<String>,
}

/// Who may run a fix. A superuser may run any.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RunAs {
    /// This role, which owns what is changed, or any member of it.
    Owner(String),
    /// This role, which owns the schema, or any member of it.
    SchemaOwner(String),
    /// The table and its partitions belong to these: a member of all of them.
    Owners(Vec<String>),
    /// PostgreSQL lets no other.
    Superuser,
}

impl RunAs {
    /// The role, where it is a single one.
    pub fn role(&self) -> Option<&str> {
        match self {
            Self::Owner(role) | Self::SchemaOwner(role) => Some(role),
            Self::Owners(_) | Self::Superuser => None,
        }
    }
}

impl fmt::Display for RunAs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owner(role) => f.write_str(role),
            Self::SchemaOwner(role) => write!(f, "{role}, who owns the schema, or a superuser"),
            Self::Owners(roles) => {
                write!(f, "a member of {}, who own the partitions, or a superuser", roles.join(" and "))
            }
            Self::Superuser => f.write_str("a superuser"),
        }
    }
}

/// Something that is not as a sweep needs it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Finding {
    pub subject: Subject,
    pub severity: Severity,
    pub reason: Reason,
    /// What is wrong and why that matters. Names only what the catalog and the spec hold, never a row's data.
    pub message: String,
    /// None: time fixes it, or only a person can tell whether anything is to be fixed.
    pub fix: Option<Fix>,
}

impl Finding {
    /// What is wrong and what fixes it, for a condition or an event.
    pub fn in_one_line(&self) -> String {
        match &self.fix {
            Some(Fix::Sql(parts)) => {
                let parts = parts.iter().map(|part| format!("run as {}: {}", part.run_as, part.statements.join("; ")));
                format!("{}; to fix it, {}", self.message, parts.collect::<Vec<_>>().join("; then "))
            }
            Some(Fix::Field(field)) => format!("{}; check {field}", self.message),
            None => self.message.clone(),
        }
    }
}

impl From<&Error> for Finding {
    /// An error that ended the preflight early.
    fn from(error: &Error) -> Self {
        let reason = error.reason();
        let field = match reason {
            Reason::InvalidSpec => Some("spec"),
            Reason::TLSFailed => Some("spec.database.tls"),
            Reason::InvalidConnectionURI
            | Reason::AuthenticationFailed
            | Reason::DatabaseNotFound
            | Reason::NameResolutionFailed
            | Reason::ConnectTimeout
            | Reason::LoginTimeout
            | Reason::DatabaseUnreachable
            | Reason::NotPrimary => Some("spec.database.secretRef"),
            _ => None,
        };
        Self {
            subject: Subject::Connection,
            severity: Severity::Blocking,
            reason,
            message: error.to_string(),
            fix: field.map(|field| Fix::Field(field.into())),
        }
    }
}

/// The outcome of a preflight.
#[derive(Clone, Debug, Default)]
pub struct PreflightReport {
    /// The server's own text; None: it could not be asked.
    pub server_version: Option<String>,
    /// What is as it must be, and what was seen there.
    pub passed: Vec<(Subject, String)>,
    /// What is not, in the order in which it was looked at.
    pub findings: Vec<Finding>,
    /// The stale rows, up to one more than the first sweep takes. None: they were not counted.
    pub first_sweep: Option<Backlog>,
}

impl PreflightReport {
    /// Whether nothing but warnings was found.
    pub fn ready(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity == Severity::Warning)
    }

    /// The first finding for which a sweep must not begin. Without one, a sweep may go on although not all is ready.
    pub fn blocking(&self) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.severity == Severity::Blocking)
    }

    pub(super) fn pass(&mut self, subject: Subject, seen: impl Into<String>) {
        self.passed.push((subject, seen.into()));
    }

    /// Takes back that nothing was found.
    pub(super) fn unpass(&mut self, subject: Subject) {
        self.passed.retain(|(passed, _)| *passed != subject);
    }

    pub(super) fn find(
        &mut self,
        subject: Subject,
        severity: Severity,
        reason: Reason,
        message: impl Into<String>,
        fix: impl Into<Option<Fix>>,
    ) {
        self.findings.push(Finding { subject, severity, reason, message: message.into(), fix: fix.into() });
    }

    /// Whether nothing was found about a subject.
    pub(super) fn is_clean(&self, subject: Subject) -> bool {
        self.findings.iter().all(|finding| finding.subject != subject)
    }
}
