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
    /// The HTTP status code of the answer, if there was one.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Kube(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        }
    }
}

/// Waits for an API request, but not for ever.
pub async fn within<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, ApiError> {
    timeout(API_TIMEOUT, request).await.map_err(|_| ApiError::Timeout)?.map_err(ApiError::from)
}

/// The object as it is now, since the watch may lag behind; None: it is gone.
pub async fn object(
    client: &Client,
    namespace: &str,
    name: &str,
) -> Result<Option<DeserializeGuard<AuditLogSweeper>>, ApiError> {
    let api: Api<DeserializeGuard<AuditLogSweeper>> = Api::namespaced(client.clone(), namespace);
    within(api.get_opt(name)).await
}

/// Where the object's database is, from the Secrets as they are now, and the resourceVersions of those.
pub async fn target(
    client: &Client,
    namespace: &str,
    object: &AuditLogSweeper,
    default_roots: &std::sync::Arc<rustls::RootCertStore>,
) -> Result<(Target, Vec<String>), Failure> {
    let database = &object.spec.database;
    let (mut secrets, mut versions) = (BTreeMap::new(), vec![]);
    for name in credentials::names(database) {
        let secret = secret(client, namespace, name).await?;
        versions.extend(secret.metadata.resource_version);
        secrets.insert(name.to_owned(), secret.data.unwrap_or_default());
    }
    let credentials = Credentials::read(database, namespace, &secrets, None)?;
    let mode = database.tls.as_ref().and_then(|tls| tls.mode);
    let application_name = format!("audit-log-sweeper/{namespace}/{}", object.name_any());
    let target = Target::new(&credentials, mode, default_roots, &application_name);
    Ok((target.map_err(|error| Failure::from(&error))?, versions))
}

async fn secret(client: &Client, namespace: &str, name: &str) -> Result<Secret, Failure> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let failure = |reason, class, message| Failure { reason, class, message, reachable: None };
    match within(api.get(name)).await {
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
