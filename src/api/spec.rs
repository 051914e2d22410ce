//! What users write. The doc comments here are their manual: `kubectl explain als.spec` prints them.

// The typed printcolumn(...) attributes are taken for repetitions of each other.
#![allow(clippy::duplicated_attributes)]

use kube::core::cel::Rule;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::duration::{Duration, at_most, between};
use super::status::AuditLogSweeperStatus;

/// Sweeps one table: completes rows that a crash left open.
///
/// Every `period`, the operator completes at most `limit` rows that started more than `timeout` ago and are still open, oldest
/// first. It never touches a complete row.
#[derive(CustomResource, KubeSchema, Clone, Debug, Deserialize, PartialEq, Serialize)]
#[kube(
    group = "auditlog.dev",
    version = "v1alpha1",
    kind = "AuditLogSweeper",
    plural = "auditlogsweepers",
    singular = "auditlogsweeper",
    shortname = "als",
    namespaced,
    status = "AuditLogSweeperStatus",
    derive = "PartialEq",
    doc = "Sweeps an audit log kept in a PostgreSQL table: every period, it completes rows that started more than timeout ago and were never completed, at most limit of them, oldest first. It never touches a row that is complete.",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "Whether the last attempt to do what the spec says went well"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        description = "Why"
    ),
    printcolumn(
        name = "Last Success",
        type_ = "date",
        json_path = ".status.lastSuccessfulTime",
        description = "How long ago a sweep last ended without an error"
    ),
    printcolumn(
        name = "Timed Out",
        type_ = "integer",
        json_path = ".status.lastSweep.timedOut",
        description = "Rows that the last sweep completed"
    ),
    printcolumn(
        name = "Backlog",
        type_ = "string",
        json_path = ".status.backlog.display",
        description = "Stale rows still open after the last sweep"
    ),
    printcolumn(
        name = "Next Sweep",
        type_ = "string",
        json_path = ".status.nextScheduleTime",
        description = "When the next sweep is due"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Period", type_ = "string", json_path = ".spec.period", priority = 1),
    printcolumn(name = "Timeout", type_ = "string", json_path = ".spec.timeout", priority = 1),
    printcolumn(name = "Limit", type_ = "integer", json_path = ".spec.limit", priority = 1),
    printcolumn(name = "Suspended", type_ = "boolean", json_path = ".spec.suspend", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    )
)]
#[x_kube(
    validation = Rule::new(at_most("statementTimeout", "deadline"))
        .message("statementTimeout (30s unless set) must not be longer than deadline (5m unless set)")
        .field_path(".statementTimeout"),
    validation = Rule::new("self.columns.id != self.columns.timeStarted && self.columns.id != self.columns.timeCompleted && self.columns.timeStarted != self.columns.timeCompleted")
        .message("id, timeStarted and timeCompleted must be three different columns")
        .field_path(".columns"),
    validation = Rule::new("self.complete.all(c, c.column != self.columns.id && c.column != self.columns.timeStarted && c.column != self.columns.timeCompleted)")
        .message("must not name the id, timeStarted or timeCompleted column: timeCompleted is always set, the others never")
        .field_path(".complete")
)]
#[serde(rename_all = "camelCase")]
pub struct AuditLogSweeperSpec {
    /// The PostgreSQL database that holds the table, and how to connect to it.
    pub database: Database,

    /// Schema of the table. Literal: exactly as in the catalog, never folded to lower case or split at dots.
    #[serde(default = "default_schema")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = identifier())]
    pub schema: String,

    /// Name of the table. Literal, as `schema`.
    #[serde(default = "default_table")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = identifier())]
    pub table: String,

    /// Names of the three columns that every sweep reads.
    #[serde(default)]
    pub columns: Columns,

    /// Columns to set besides the completion time. Each item sets one column. The default is `result_kind = 'timeout'`. An empty
    /// list sets the completion time alone.
    #[serde(default = "default_complete")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    #[x_kube(validation = Rule::new("self.all(a, self.exists_one(b, b.column == a.column))").message("must not name a column twice"))]
    pub complete: Vec<Completion>,

    /// How often to sweep: from 5s to 8760h. Each object has its own fixed grid of times, so many sweepers do not start together
    /// and a restart changes nothing. A new object is swept at once. Its next slot follows after half to one and a half periods.
    #[serde(default = "default_period")]
    #[x_kube(validation = between("5s", "8760h"))]
    pub period: Duration,

    /// How old an open row must be to be completed: from 1m to 87600h, by the database's clock. Choose it longer than the longest
    /// request. It does not bound statements: `statementTimeout` does.
    #[serde(default = "default_timeout")]
    #[x_kube(validation = between("1m", "87600h"))]
    pub timeout: Duration,

    /// The most rows that one sweep completes, including its retries. The rest waits for the next sweep.
    #[serde(default = "default_limit")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub limit: i32,

    /// The most rows completed in one transaction. A sweep of more rows takes several transactions. From the third on, they are
    /// smaller for a while, with pauses, if others write to the server.
    #[serde(default = "default_batch_size")]
    #[schemars(range(min = 1, max = 10_000))]
    pub batch_size: i32,

    /// The longest that a statement may take before the server ends it: from 100ms to 1h, at most `deadline`.
    #[serde(default = "default_statement_timeout")]
    #[x_kube(validation = between("100ms", "1h"))]
    pub statement_timeout: Duration,

    /// The longest that a whole sweep may take: from 1s to 24h, at most the operator's `--max-deadline` (1h). Rows completed by
    /// then stay completed, and the next sweep continues.
    #[serde(default = "default_deadline")]
    #[x_kube(validation = between("1s", "24h"))]
    pub deadline: Duration,

    /// Apply: complete the rows. Observe: connect, check the table, count the rows that Apply would sweep, and change nothing.
    #[serde(default)]
    pub mode: Mode,

    /// Set to true to begin no new sweep until it is false again. The condition `Suspended` acknowledges it.
    #[serde(default)]
    pub suspend: bool,

    /// How many entries `status.history` keeps: 0 to 20.
    #[serde(default = "default_history_limit")]
    #[schemars(range(min = 0, max = 20))]
    pub history_limit: i32,
}

/// Whether a sweep completes rows.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Mode {
    #[default]
    Apply,
    Observe,
}

/// The database and how to connect to it.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Database {
    /// Secret in this namespace that holds the connection URI or its parts. Read on every sweep, so rotated passwords need no
    /// restart.
    pub secret_ref: SecretKeyRef,

    /// How the connection is secured. Absent: by the URI's sslmode (allow and prefer count as require). If the URI has none,
    /// VerifyFull.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
}

/// A Secret in the namespace of the object.
#[derive(KubeSchema, Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretKeyRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = secret_name())]
    pub name: String,

    /// The key that holds the connection URI. Absent: `fqdn-uri`, or else `uri`. If neither exists, the operator
    /// builds the URI from `host`, `port`, `dbname` (or `database`), `user` (or `username`) and `password`, as in the Secrets of
    /// CloudNativePG, Crunchy Postgres and the Service Binding specification. With a client certificate, it needs no password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub key: Option<String>,
}

/// How the connection is secured.
#[derive(KubeSchema, Clone, Debug, Deserialize, PartialEq, Serialize)]
#[x_kube(validation = Rule::new("!has(self.mode) || self.mode != 'Disable' || !(has(self.caSecretRef) || has(self.clientCertSecretRef))")
    .message("must not name caSecretRef or clientCertSecretRef with mode Disable: nothing would be verified"))]
#[serde(rename_all = "camelCase")]
pub struct Tls {
    /// As libpq's sslmode, which it overrides. Disable: no encryption. Require: encrypted, but the server is not verified.
    /// VerifyCA: a trusted CA must have signed the server's certificate. VerifyFull: as VerifyCA, and the certificate must match the
    /// host name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<TlsMode>,

    /// Secret in this namespace that holds the CA to trust, as PEM. Absent: the key `certificates` of the Secret with the URI, or else
    /// the public CAs. With a CA, mode Require means VerifyCA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<CaSecretRef>,

    /// Secret in this namespace that holds the client certificate, as PEM, for servers that ask for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_cert_secret_ref: Option<ClientCertSecretRef>,
}

/// How far the server is verified; libpq's meanings.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum TlsMode {
    Disable,
    Require,
    VerifyCA,
    VerifyFull,
}

/// A Secret with the certificate of a CA.
#[derive(KubeSchema, Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CaSecretRef {
    /// Name of the Secret. Its key `ca.crt` holds one or more certificates as PEM.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = secret_name())]
    pub name: String,
}

/// A Secret with a client's certificate, as those of type kubernetes.io/tls.
#[derive(KubeSchema, Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientCertSecretRef {
    /// Name of the Secret. Its keys `tls.crt` and `tls.key` hold the certificate and its key as PEM.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = secret_name())]
    pub name: String,
}

/// Names of the columns that every sweep reads. Literal, as `schema`.
#[derive(KubeSchema, Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Columns {
    /// The key of a row: one column of type uuid, bigint, integer, smallint, text, varchar, char, citext, numeric or bytea, or
    /// of a domain over one of these.
    #[serde(default = "default_id")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = identifier())]
    pub id: String,

    /// When the request started: a column of type timestamptz or timestamp, never NULL.
    #[serde(default = "default_time_started")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = identifier())]
    pub time_started: String,

    /// When the request was completed: a column of type timestamptz or timestamp, NULL in a row that is still open.
    #[serde(default = "default_time_completed")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = identifier())]
    pub time_completed: String,

    /// Time zone of `timestamp` columns: the zone in which the application writes them. A name of the IANA time zone database, such
    /// as `Europe/Berlin`. `timestamptz` columns need none.
    #[serde(default = "default_time_zone")]
    #[schemars(length(max = 64))]
    #[x_kube(validation = Rule::new(TIME_ZONE).message(TIME_ZONE_MESSAGE))]
    pub time_zone: String,
}

/// The API server knows the zones. Of shorter names, PostgreSQL takes some for abbreviations without summer time, such as CET.
pub const TIME_ZONE: &str = "(self == 'UTC' || self.matches('^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)+$')) && timestamp('2000-01-01T00:00:00Z').getHours(self) >= 0";

/// The same without the API server.
pub fn is_time_zone(name: &str) -> bool {
    name == "UTC" || name.contains('/') && name.parse::<chrono_tz::Tz>().is_ok()
}

/// What is said of others.
pub const TIME_ZONE_MESSAGE: &str =
    "must be UTC, or the name of a time zone in the IANA database with its area, such as Europe/Berlin";

impl Default for Columns {
    fn default() -> Self {
        Self {
            id: default_id(),
            time_started: default_time_started(),
            time_completed: default_time_completed(),
            time_zone: default_time_zone(),
        }
    }
}

/// One column that a sweep sets in the rows it completes.
#[derive(KubeSchema, Clone, Debug, Deserialize, PartialEq, Serialize)]
#[x_kube(validation = Rule::new("has(self.value) ? !has(self.setNull) : has(self.setNull) && self.setNull")
    .message("must have exactly one of value (a string: quote numbers) and setNull: true"))]
#[serde(rename_all = "camelCase")]
pub struct Completion {
    /// Name of the column. Literal, as `schema`.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = identifier())]
    pub column: String,

    /// The value to set, as a string; the database converts it to the column's type. Quote numbers: `"500"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    #[x_kube(validation = Rule::new("!self.contains('\\u0000')").message("must not contain a NUL character"))]
    pub value: Option<String>,

    /// true: set the column to NULL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_null: Option<bool>,
}

/// A DNS subdomain, as names of Secrets are.
fn secret_name() -> Rule {
    Rule::new("self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')")
        .message("must be the name of a Secret: lower-case letters, digits, - and .")
}

/// PostgreSQL cuts a longer name off and would then mean another table or column.
fn identifier() -> Rule {
    Rule::new("size(bytes(self)) <= 63 && !self.contains('\\u0000')")
        .message("must be a name of at most 63 bytes, without a NUL character")
}

fn default_schema() -> String {
    "public".into()
}

fn default_table() -> String {
    "audit_log".into()
}

fn default_id() -> String {
    "id".into()
}

fn default_time_started() -> String {
    "time_started".into()
}

fn default_time_completed() -> String {
    "time_completed".into()
}

fn default_time_zone() -> String {
    "UTC".into()
}

fn default_complete() -> Vec<Completion> {
    vec![Completion { column: "result_kind".into(), value: Some("timeout".into()), set_null: None }]
}

const fn default_period() -> Duration {
    Duration::from_mins(10)
}

const fn default_timeout() -> Duration {
    Duration::from_mins(4 * 60)
}

const fn default_limit() -> i32 {
    1000
}

const fn default_history_limit() -> i32 {
    10
}

const fn default_batch_size() -> i32 {
    1000
}

const fn default_statement_timeout() -> Duration {
    Duration::from_millis(30_000)
}

const fn default_deadline() -> Duration {
    Duration::from_mins(5)
}
