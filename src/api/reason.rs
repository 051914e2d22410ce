//! Every reason, in one table: what it means, what to do, how a failure is treated, and what it tells of the database.
//! Conditions, events, the CLI and docs/operating.md take it from here.

/// How a failure is treated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Class {
    /// Goes away by itself. Retried.
    Transient,
    /// Something is missing that others may bring: a password, a table, a grant. Retried, and stalled after a while.
    Missing,
    /// The spec cannot work as it is. Retried at the pace of the schedule's backoff, and stalled at once.
    Spec,
}

/// How far an attempt came before it failed, which decides what the conditions say of the database.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stage {
    /// The database was not asked: DatabaseReachable and SchemaReady are Unknown.
    Object,
    /// The database did not answer: DatabaseReachable is False, SchemaReady is Unknown.
    Connection,
    /// The database answered, and its schema is not as a sweep needs it: SchemaReady is False.
    Schema,
    /// The database answered: SchemaReady stays as it was.
    Server,
}

/// Why something failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub reason: Reason,
    /// What is wrong, where, and what to do. No row data, no credentials.
    pub message: String,
    pub class: Class,
}

impl Failure {
    /// A failure that is treated as its reason says.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), class: reason.class() }
    }
}

/// What the advice says where there is nothing to do.
pub const NOTHING: &str = "nothing";

macro_rules! reasons {
    (
        no_failure { $($ok:ident: $ok_meaning:literal, $ok_advice:expr;)+ }
        failure { $($name:ident($class:ident, $stage:ident): $meaning:literal, $advice:expr;)+ }
    ) => {
        /// Why a condition has its status, and what kind of failure happened: a closed set.
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        pub enum Reason { $(#[doc = $ok_meaning] $ok,)+ $(#[doc = $meaning] $name,)+ }

        impl Reason {
            /// Every reason, those of no failure first.
            pub const ALL: &[Self] = &[$(Self::$ok,)+ $(Self::$name,)+];

            /// The name in the API.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$ok => stringify!($ok),)+ $(Self::$name => stringify!($name),)+ }
            }

            /// What it means, in Markdown.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$ok => $ok_meaning,)+ $(Self::$name => $meaning,)+ }
            }

            /// What to do about it, in Markdown.
            pub const fn advice_markdown(self) -> &'static str {
                match self { $(Self::$ok => $ok_advice,)+ $(Self::$name => $advice,)+ }
            }

            /// How the failure is treated, and how far the attempt came. None: it is the reason of no failure.
            pub const fn failure(self) -> Option<(Class, Stage)> {
                match self { $(Self::$ok => None,)+ $(Self::$name => Some((Class::$class, Stage::$stage)),)+ }
            }
        }
    };
}

impl Reason {
    /// The reason of this name in the API. None: a newer operator wrote it.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|reason| reason.as_str() == name).copied()
    }

    /// What to do about it, for a terminal.
    pub fn advice(self) -> String {
        self.advice_markdown().replace('`', "")
    }

    /// How a failure of this reason is treated.
    pub fn class(self) -> Class {
        self.failure().map_or(Class::Transient, |(class, _)| class)
    }

    /// Whether the server kept an attempt waiting in vain, or flooded it: each such attempt is costly, so there are few.
    pub const fn is_silence(self) -> bool {
        matches!(
            self,
            Self::NameResolutionFailed
                | Self::ConnectTimeout
                | Self::LoginTimeout
                | Self::ResponseTimeout
                | Self::ProtocolError
        )
    }

    /// How far an attempt came that failed for this reason.
    pub fn stage(self) -> Stage {
        self.failure().map_or(Stage::Server, |(_, stage)| stage)
    }
}

reasons! {
    no_failure {
        Pending: "the spec was not tried yet", "wait; if it stays, no operator leads: see AuditLogSweeperNoLeader in docs/operating.md";
        Swept: "the last sweep went well and left no stale row that it could complete", NOTHING;
        LimitReached: "it went well and stopped at `spec.limit`", "nothing if the backlog shrinks; else raise `limit` or shorten `period`";
        DeadlineReached: "it went well until `spec.deadline` ended it; what it did stays done", "raise `deadline`, or see why the database is slow";
        Observed: "`mode: Observe`: it counted and changed nothing", "set `mode: Apply` when you like the count";
        SchemaReady: "everything is as a sweep needs it; none was due yet", NOTHING;
        Suspended: "`spec.suspend` is true", "resume when it should go on";
        NotSuspended: "`spec.suspend` is false", NOTHING;
        Connected: "the database answered", NOTHING;
        WithinBound: "sweeps keep up", NOTHING;
        FallingBehind: "a stale row is older than timeout + 2 * period after a sweep", "raise `limit` or shorten `period`, unless the message says that rows are refused; see AuditLogSweeperBacklogNotBounded in docs/operating.md";
        NotObserved: "it was not looked at in the last attempt", "see why the attempt failed";
        Retrying: "the last attempt failed and is tried again", "see the reason of `Ready`";
    }
    failure {
        InvalidSpec(Spec, Object): "the object cannot be read, or breaks a rule of the CRD and was stored while a looser one was installed; nothing is done with its database", "fix the spec as the message says, or upgrade the operator if it is older than the CRD";
        SecretNotFound(Missing, Object): "the Secret of the spec does not exist", "create the Secret in the object's namespace";
        SecretKeyMissing(Missing, Object): "it lacks a key", "add the key to the Secret, or name another in `spec.database.secretRef.key`";
        SecretForbidden(Missing, Object): "the operator may not read it", "grant the operator's ServiceAccount `get` on secrets there";
        APIRequestFailed(Transient, Object): "the Kubernetes API did not answer as it should", "look at the API server";
        InternalError(Transient, Object): "a bug in the operator", "report it, with the operator's log line";
        InvalidConnectionURI(Missing, Object): "what the Secret holds is no connection URI", "write it as `postgresql://user:password@host:5432/dbname`, percent-encode `@ : / ? # %` in user and password, and check the options after the `?`";
        NameResolutionFailed(Transient, Connection): "the host has no address, or no name server answered", "check the host, and the cluster's DNS";
        ConnectTimeout(Transient, Connection): "the host did not answer", "check host, port, firewalls and NetworkPolicies";
        LoginTimeout(Transient, Connection): "something took the connection and let nobody log in", "check that PostgreSQL listens on that port";
        ResponseTimeout(Transient, Connection): "the database stopped answering in the middle", "look at the server and the network";
        ConnectionLost(Transient, Connection): "the connection broke", "look at the server's log for a failover or a restart";
        ProtocolError(Transient, Connection): "something answered that is not PostgreSQL, or sent more than any answer holds", "check that PostgreSQL listens on that port";
        TooManyOpenFiles(Transient, Object): "the operator has no file descriptor left", "raise the operator's limit of open files; if it has many, report it";
        DatabaseUnreachable(Transient, Connection): "the connection was refused, or the server starts or stops", "check host and port; wait if it restarts";
        TLSFailed(Missing, Connection): "a certificate or a CA is not right", "see `spec.database.tls`; the message names the field";
        AuthenticationFailed(Missing, Server): "user or password were refused", "check the user and password in the Secret of `spec.database.secretRef`, and `pg_hba.conf`; where the server demands it, set `spec.database.tls.mode` and `clientCertSecretRef`";
        DatabaseNotFound(Missing, Server): "the server has no such database", "check the database's name in the connection URI";
        TooManyConnections(Transient, Server): "the server has no connection left", "raise `max_connections`, or let the sweep connect through a pooler";
        NotPrimary(Transient, Server): "the server is a standby or read-only", "the sweep needs the primary: check the host in the connection URI";
        ServerOutOfResources(Transient, Server): "disk, memory or another resource is used up", "free what the message names on the database server";
        TableNotFound(Missing, Schema): "no such schema or table", "check `spec.schema` and `spec.table`, and that the URI names the right database";
        ColumnNotFound(Spec, Schema): "a column of the spec is not there", "check `spec.columns` and `spec.complete`";
        PermissionDenied(Missing, Schema): "the role lacks a right", "run the GRANT that `audit-log-sweeper check` prints, as the role named with it. The role needs USAGE on the schema, SELECT on the three columns of `spec.columns`, and UPDATE on `timeCompleted` and on the columns of `spec.complete`";
        SchemaMismatch(Spec, Schema): "the table is not of the shape that the spec says, or a value does not fit", "check `spec.columns` and `spec.complete` against the table's columns and types, or run `audit-log-sweeper check`";
        IndexMissing(Transient, Schema): "the index that a sweep reads is missing or not as it must be; sweeps go on, slowly", "run the SQL that `audit-log-sweeper check` prints, as the roles named in it and not in a transaction";
        IndexNotPrivate(Transient, Server): "a warning of `check`: the application's own statements use the sweep's index too, which slows them", "replace the index with the SQL that `audit-log-sweeper check` prints; sweeps go on meanwhile";
        IndexBloat(Transient, Server): "a warning of `check`: autovacuum comes too rarely to clean the sweep's index", "let autovacuum clean the table more often, with the SQL that `audit-log-sweeper check` prints";
        RowSecurity(Missing, Schema): "row security would hide rows", "`ALTER ROLE ... BYPASSRLS`, which `audit-log-sweeper check` prints; a policy is not enough";
        ServerNotSupported(Missing, Schema): "not PostgreSQL 13 or later", "upgrade the server, or name another";
        StatementTimeout(Transient, Server): "a statement took longer than `statementTimeout`, or no batch was done within `deadline`", "check that the index that `audit-log-sweeper check` names exists and is valid, or lower `spec.batchSize`";
        TableLocked(Transient, Server): "somebody holds a lock on the table", "wait for the session that holds a lock on the table, most likely a schema change; find it in `pg_locks`";
        TransactionConflict(Transient, Server): "other transactions kept colliding", "nothing if it passes";
        RowRefused(Transient, Server): "the database refuses to complete rows", "see AuditLogSweeperUnsweepableRows in docs/operating.md";
        DataCorrupted(Transient, Server): "the server reported damaged data or an internal error", "look at the server's log at once";
        DatabaseError(Transient, Server): "an answer that no rule covers", "see the SQLSTATE in the message";
    }
}
