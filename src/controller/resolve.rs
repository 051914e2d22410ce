//! First step: fetches the object as it is now, and the Secrets it names. Needs a client; decides nothing.

use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::core::DeserializeGuard;
use kube::{Api, Client, ResourceExt};
use tokio::time::timeout;

use super::outcome::{Failure, Subject};
use crate::api::{AuditLogSweeper, Reason};
use crate::credentials::{self, CredentialsError, SecretData};
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

/// Where the object's database is, from the Secrets as they are now.
pub async fn target(
    client: &Client,
    namespace: &str,
    object: &AuditLogSweeper,
    default_roots: &std::sync::Arc<rustls::RootCertStore>,
) -> Result<Target, Failure> {
    let database = &Subject::new(object).spec.database;
    let secret_ref = &database.secret_ref;
    let data = secret(client, namespace, &secret_ref.name).await?;
    let uri = credentials::uri(&data, namespace, &secret_ref.name, secret_ref.key.as_deref())?;
    let tls = database.tls.as_ref();
    let ca = match tls.and_then(|tls| tls.ca_secret_ref.as_ref()) {
        Some(ca) => Some(credentials::ca(&secret(client, namespace, &ca.name).await?, &ca.name)?),
        None => None,
    };
    let application_name = format!("audit-log-sweeper/{namespace}/{}", object.name_any());
    Target::new(&uri, tls.and_then(|tls| tls.mode), ca.as_deref(), default_roots, &application_name)
        .map_err(|error| Failure::from(&error))
}

/// The data of a Secret.
async fn secret(client: &Client, namespace: &str, name: &str) -> Result<SecretData, Failure> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let failure = |reason, class, message| Failure { reason, class, message, reachable: None };
    match within(api.get(name)).await {
        Ok(secret) => Ok(secret.data.unwrap_or_default()),
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
