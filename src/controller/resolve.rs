//! First step: fetches the object as it is now, and the Secrets it names. Needs a client; decides nothing.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::fetched::Fetched;
use super::outcome::Failure;
use crate::api::{AuditLogSweeper, Reason};
use crate::credentials::{self, Credentials, CredentialsError};
use crate::sweep::error::chain;
use crate::sweep::{Class, Target};
use crate::telemetry::http::Readiness;
use crate::telemetry::metrics::{Instruments, Operation};

/// The longest that one API request may take, its retries by the client included.
pub const API_TIMEOUT: Duration = Duration::from_secs(15);

/// The most requests under way at once. Each has a connection, with buffers: of very many objects that are due together,
/// those would be most of the memory, and a burst that the API server does not need.
pub const AT_ONCE: usize = 32;

/// What the API server says when a status has a field that its CRD does not know.
const UNKNOWN_FIELD: &str = "field not declared in schema";

/// An API request that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("others kept writing the object at the same time")]
    Conflict,
    #[error("a bug in the operator; its log says where. Please report it")]
    Panic,
    #[error("{}", text(.0))]
    Kube(kube::Error),
}

impl From<kube::Error> for ApiError {
    fn from(error: kube::Error) -> Self {
        Self::Kube(error)
    }
}

impl ApiError {
    /// Whether it counts as a failed request: that something is not there, or has changed, is an answer.
    pub fn is_failure(&self) -> bool {
        !matches!(self.code(), Some(404 | 409)) && !matches!(self, Self::Conflict | Self::Panic)
    }

    /// The HTTP status code of the answer, if there was one.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Kube(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        }
    }

    /// What is missing, if no object's reconcile can succeed until somebody grants or installs it.
    fn missing(&self, operation: Operation, namespace: &str) -> Option<String> {
        let Self::Kube(kube::Error::Api(status)) = self else { return None };
        match (operation, status.code) {
            (Operation::GetObject, 403) => Some(format!("the right to get auditlogsweepers in namespace {namespace}")),
            (Operation::PatchStatus, 403) => {
                Some(format!("the right to patch auditlogsweepers/status in namespace {namespace}"))
            }
            (Operation::PatchStatus, _) if status.message.contains(UNKNOWN_FIELD) => Some(
                "the CustomResourceDefinition of this version, which `audit-log-sweeper crd` prints; an older one is installed"
                    .into(),
            ),
            _ => None,
        }
    }
}

/// An error with its causes in one line. What the API server answered, without the dump of it that `kube` appends.
pub fn text(error: &(dyn Error + 'static)) -> String {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(kube::Error::Api(status)) = cause.downcast_ref() {
            return format!("{} (HTTP {})", status.message, status.code);
        }
        next = cause.source();
    }
    chain(error)
}

/// The way to the API server.
#[derive(Clone)]
pub struct ApiServer {
    pub client: Client,
    at_once: Arc<Semaphore>,
    /// Counts the requests that fail.
    pub instruments: Instruments,
    /// Is told what the operator lacks.
    readiness: Readiness,
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiServer")
    }
}

impl ApiServer {
    /// By way of this client.
    pub fn new(client: Client, instruments: Instruments, readiness: Readiness) -> Self {
        Self { client, at_once: Arc::new(Semaphore::new(AT_ONCE)), instruments, readiness }
    }

    /// Waits for a request, but not for ever once it is sent, and counts it if it fails.
    pub async fn within<T>(
        &self,
        operation: Operation,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ApiError> {
        // Nobody closes it. Whether the API server answers at all is asked without waiting for others.
        let _permit = match operation {
            Operation::Watch => None,
            _ => self.at_once.acquire().await.ok(),
        };
        let answer = timeout(API_TIMEOUT, request).await.map_err(|_| ApiError::Timeout(API_TIMEOUT));
        let answer = answer.and_then(|answer| answer.map_err(ApiError::from));
        if answer.as_ref().is_err_and(ApiError::is_failure) {
            self.instruments.api_request_failed(operation);
        }
        answer
    }

    /// The same for a request without which no object of the namespace can be worked on: as long as a right to it, or
    /// a field of the CRD, is missing, the operator is not ready.
    pub async fn essential<T>(
        &self,
        operation: Operation,
        namespace: &str,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ApiError> {
        let answer = self.within(operation, request).await;
        let part = format!("{} {namespace}", operation.as_str());
        match &answer {
            Ok(_) => self.readiness.set(&part, None),
            Err(error) => {
                if let Some(missing) = error.missing(operation, namespace) {
                    self.readiness.set(&part, Some(format!("{missing}: {error}")));
                }
            }
        }
        answer
    }

    /// Of a namespace in which an object turned out to be gone, nothing is known any more.
    fn forget(&self, namespace: &str) {
        self.readiness.set(&format!("{} {namespace}", Operation::PatchStatus.as_str()), None);
    }
}

/// Leaves out what nobody here reads, and what is most of an object in memory: who wrote which field, and the object as
/// somebody applied it.
pub fn leave_out(object: &mut Fetched) {
    object.managed_fields_mut().clear();
    object.annotations_mut().remove("kubectl.kubernetes.io/last-applied-configuration");
}

/// The object as it is now, since the watch may lag behind; None: it is gone.
pub async fn object(server: &ApiServer, namespace: &str, name: &str) -> Result<Option<Fetched>, ApiError> {
    let api: Api<Fetched> = Api::namespaced(server.client.clone(), namespace);
    let mut object = server.essential(Operation::GetObject, namespace, api.get_opt(name)).await?;
    match &mut object {
        Some(object) => leave_out(object),
        None => server.forget(namespace),
    }
    Ok(object)
}

/// The same, but None also if it is not one of those that the label selector names. The API server judges, in its own
/// words for selectors.
pub async fn selected(
    server: &ApiServer,
    namespace: &str,
    name: &str,
    selector: Option<&str>,
) -> Result<Option<Fetched>, ApiError> {
    let Some(selector) = selector else { return object(server, namespace, name).await };
    let api: Api<Fetched> = Api::namespaced(server.client.clone(), namespace);
    let one = ListParams::default().labels(selector).fields(&format!("metadata.name={name}"));
    let mut object = server.within(Operation::GetObject, api.list(&one)).await?.items.pop();
    object.iter_mut().for_each(leave_out);
    Ok(object)
}

/// Where the object's database is, from the Secrets as they are now, and the resourceVersions of those.
pub async fn target(
    server: &ApiServer,
    namespace: &str,
    object: &AuditLogSweeper,
    default_roots: &Arc<rustls::RootCertStore>,
) -> Result<(Target, Vec<String>), Failure> {
    let database = &object.spec.database;
    let (mut secrets, mut versions) = (BTreeMap::new(), vec![]);
    for name in credentials::names(database) {
        let secret = secret(server, namespace, name).await?;
        versions.extend(secret.metadata.resource_version);
        secrets.insert(name.to_owned(), secret.data.unwrap_or_default());
    }
    let credentials = Credentials::read(database, namespace, &secrets, None)?;
    let mode = database.tls.as_ref().and_then(|tls| tls.mode);
    let application_name = format!("audit-log-sweeper/{namespace}/{}", object.name_any());
    let target = Target::new(&credentials, mode, default_roots, &application_name);
    Ok((target.map_err(|error| Failure::from(&error))?, versions))
}

async fn secret(server: &ApiServer, namespace: &str, name: &str) -> Result<Secret, Failure> {
    let api: Api<Secret> = Api::namespaced(server.client.clone(), namespace);
    let failure = |reason, class, message| Failure { reason, class, message, reachable: None };
    match server.within(Operation::GetSecret, api.get(name)).await {
        Ok(secret) => Ok(secret),
        Err(error) => Err(match error.code() {
            Some(404) => failure(
                Reason::SecretNotFound,
                Class::Missing,
                format!("there is no Secret {name} in namespace {namespace}; create it, or name another in the spec"),
            ),
            Some(403) => failure(
                Reason::SecretForbidden,
                Class::Missing,
                format!(
                    "the operator may not get Secret {name} in namespace {namespace}; grant its ServiceAccount get on secrets"
                ),
            ),
            // The text of a failed request says nothing of the Secret's content.
            _ => failure(
                Reason::APIRequestFailed,
                Class::Transient,
                format!("cannot get Secret {name}: {}", text(&error)),
            ),
        }),
    }
}

impl From<CredentialsError> for Failure {
    fn from(error: CredentialsError) -> Self {
        Self { reason: error.reason(), message: error.to_string(), class: Class::Missing, reachable: None }
    }
}
