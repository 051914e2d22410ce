//! First step: fetches the object as it is now, and the Secrets it names. Needs a client; decides nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::core::DeserializeGuard;
use kube::{Api, Client, ResourceExt};
use tokio::time::timeout;

use super::outcome::Failure;
use crate::api::{AuditLogSweeper, Reason};
use crate::credentials::{self, Credentials, CredentialsError};
use crate::sweep::{Class, Target};
use crate::telemetry::metrics::{Instruments, Operation};

/// The longest that one API request may take, its retries by the client included.
pub const API_TIMEOUT: Duration = Duration::from_secs(15);

/// An API request that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("no answer within {API_TIMEOUT:?}")]
    Timeout,
    #[error("others kept writing the object at the same time")]
    Conflict,
    #[error("a bug in the operator; its log says where. Please report it")]
    Panic,
    #[error(transparent)]
    Kube(#[from] kube::Error),
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
}

/// The way to the API server.
#[derive(Clone)]
pub struct ApiServer {
    pub client: Client,
    /// Counts the requests that fail.
    pub instruments: Instruments,
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiServer")
    }
}

impl ApiServer {
    /// Waits for a request, but not for ever, and counts it if it fails.
    pub async fn within<T>(
        &self,
        operation: Operation,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ApiError> {
        let answer = timeout(API_TIMEOUT, request).await.map_err(|_| ApiError::Timeout);
        let answer = answer.and_then(|answer| answer.map_err(ApiError::from));
        if answer.as_ref().is_err_and(ApiError::is_failure) {
            self.instruments.api_request_failed(operation);
        }
        answer
    }
}

/// The object as it is now, since the watch may lag behind; None: it is gone.
pub async fn object(
    server: &ApiServer,
    namespace: &str,
    name: &str,
) -> Result<Option<DeserializeGuard<AuditLogSweeper>>, ApiError> {
    let api: Api<DeserializeGuard<AuditLogSweeper>> = Api::namespaced(server.client.clone(), namespace);
    server.within(Operation::GetObject, api.get_opt(name)).await
}

/// Where the object's database is, from the Secrets as they are now, and the resourceVersions of those.
pub async fn target(
    server: &ApiServer,
    namespace: &str,
    object: &AuditLogSweeper,
    default_roots: &std::sync::Arc<rustls::RootCertStore>,
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
                format!("cannot get Secret {name}: {}", crate::sweep::error::chain(&error)),
            ),
        }),
    }
}

impl From<CredentialsError> for Failure {
    fn from(error: CredentialsError) -> Self {
        Self { reason: error.reason(), message: error.to_string(), class: Class::Missing, reachable: None }
    }
}
