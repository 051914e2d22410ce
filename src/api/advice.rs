//! What to do about each reason: one sentence for people, on the screens of the CLI and in docs/operating.md alike.

use super::Reason;

/// What stands where there is nothing to do.
pub const NOTHING: &str = "nothing";

impl Reason {
    /// The reason of this name in the API; None: a newer operator wrote it.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|reason| reason.as_str() == name).copied()
    }

    /// What a person should do about it, without markup.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Pending => "wait; if it stays, no operator leads: see AuditLogSweeperNoLeader in docs/operating.md",
            Self::LimitReached => "nothing if the backlog shrinks; else raise limit or shorten period",
            Self::DeadlineReached => "raise deadline, or see why the database is slow",
            Self::Observed => "set mode: Apply when you like the count",
            Self::Suspended => "resume when it should go on",
            Self::Swept | Self::SchemaReady | Self::NotSuspended | Self::Connected | Self::WithinBound => NOTHING,
            Self::FallingBehind => {
                "raise limit or shorten period; see AuditLogSweeperBacklogNotBounded in docs/operating.md"
            }
            Self::NotObserved => "see why the attempt failed",
            Self::Retrying => "see the reason of Ready",
            Self::InvalidSpec => {
                "mend the spec as the message says, or upgrade the operator if it is older than the CRD"
            }
            Self::SecretNotFound => "create the Secret in the object's namespace",
            Self::SecretKeyMissing => "add the key to the Secret, or name another in spec.database.secretRef.key",
            Self::SecretForbidden => "grant the operator's ServiceAccount get on secrets there",
            Self::APIRequestFailed => "look at the API server",
            Self::InternalError => "report it, with the operator's log line",
            Self::InvalidConnectionURI => {
                "write it as postgresql://user:password@host:5432/dbname; percent-encode @ : / ? # % in user and password"
            }
            Self::NameResolutionFailed => "check the host, and the cluster's DNS",
            Self::ConnectTimeout => "check host, port, firewalls and NetworkPolicies",
            Self::LoginTimeout => "check that PostgreSQL listens on that port",
            Self::ResponseTimeout => "look at the server and the network",
            Self::ConnectionLost => "look at the server's log for a failover or a restart",
            Self::DatabaseUnreachable => "check host and port; wait if it restarts",
            Self::TLSFailed => "see spec.database.tls; the message names the field",
            Self::AuthenticationFailed => "check the Secret and pg_hba.conf",
            Self::DatabaseNotFound => "check the name in the URI",
            Self::TooManyConnections => "raise max_connections, or use a pooler",
            Self::NotPrimary => "connect to the primary",
            Self::ServerOutOfResources => "free what the message names on the database server",
            Self::TableNotFound => "check spec.schema, spec.table, and the database in the URI",
            Self::ColumnNotFound => "check spec.columns and spec.complete",
            Self::PermissionDenied => {
                "run the GRANT that audit-log-sweeper check prints, as the role named with it; where it may not log in: \
                 GRANT CONNECT ON DATABASE"
            }
            Self::SchemaMismatch => "see the message, or run audit-log-sweeper check",
            Self::IndexMissing => {
                "run the SQL that audit-log-sweeper check prints, as the roles named in it and not in a transaction"
            }
            Self::IndexNotPrivate => {
                "replace the index with the SQL that audit-log-sweeper check prints; sweeps go on meanwhile"
            }
            Self::IndexBloat => {
                "let autovacuum clean the table more often, with the SQL that audit-log-sweeper check prints"
            }
            Self::RowSecurity => {
                "ALTER ROLE ... BYPASSRLS, which audit-log-sweeper check prints; a policy is not enough"
            }
            Self::ServerNotSupported => "upgrade the server, or name another",
            Self::StatementTimeout => "check the index; lower batchSize",
            Self::TableLocked => "wait for the schema change; find it in pg_locks",
            Self::TransactionConflict => "nothing if it passes",
            Self::RowRefused => "see AuditLogSweeperUnsweepableRows in docs/operating.md",
            Self::DataCorrupted => "look at the server's log at once",
            Self::DatabaseError => "see the SQLSTATE in the message",
        }
    }
}
