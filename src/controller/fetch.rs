//! First step: fetches the object as it is now, and the Secrets it names. Needs a client; decides nothing.

use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::ListParams;
use kube::{Api, Resource};

use super::Context;
use super::client::{ApiError, ApiServer, text};
use super::model::ParsedObject;
use crate::api::request::{MAX_REQUEST, REQUESTED_AT};
use crate::api::{Failure, Reason, Sweeper, cut};
use crate::credentials::{self, Credentials, CredentialsError};
use crate::database::Target;
use crate::telemetry::metrics::Operation;

/// Keeps of the metadata what is read here. The rest belongs to others, and may be most of an object in memory.
pub fn strip_unused_fields(object: &mut ParsedObject) {
    let ObjectMeta { name, namespace, uid, resource_version, generation, deletion_timestamp, annotations, .. } =
        mem::take(object.meta_mut());
    let request = annotations.and_then(|mut all| all.remove_entry(REQUESTED_AT));
    let annotations = request.map(|(key, value)| BTreeMap::from([(key, cut(&value, MAX_REQUEST).to_owned())]));
    *object.meta_mut() = ObjectMeta {
        name,
        namespace,
        uid,
        resource_version,
        generation,
        deletion_timestamp,
        annotations,
        ..ObjectMeta::default()
    };
}

/// The object as it is now, since the watch may lag behind; None: it is gone.
pub async fn object(server: &ApiServer, namespace: &str, name: &str) -> Result<Option<ParsedObject>, ApiError> {
    let api: Api<ParsedObject> = Api::namespaced(server.client.clone(), namespace);
    let mut object = server.request_required(Operation::GetObject, namespace, api.get_opt(name)).await?;
    match &mut object {
        Some(object) => strip_unused_fields(object),
        None => server.forget(namespace),
    }
    Ok(object)
}

/// The object to work on, as it is now. None: it is gone, replaced, invalid, or for others; the watch will tell.
pub async fn sweeper(context: &Context, watched: &ObjectMeta) -> Result<Option<Sweeper>, ApiError> {
    let [namespace, name] = [&watched.namespace, &watched.name].map(|part| part.as_deref().unwrap_or_default());
    let fetched = selected(context, namespace, name).await?.filter(|fetched| fetched.meta().uid == watched.uid);
    Ok(fetched.and_then(|fetched| context.cache.validate(&fetched).ok()))
}

/// Like [`object`], but also None if the label selector does not match. The API server evaluates the selector.
pub async fn selected(context: &Context, namespace: &str, name: &str) -> Result<Option<ParsedObject>, ApiError> {
    let Context { server, settings, .. } = context;
    let Some(selector) = &settings.selector else { return object(server, namespace, name).await };
    let api: Api<ParsedObject> = Api::namespaced(server.client.clone(), namespace);
    let one = ListParams::default().labels(selector).fields(&format!("metadata.name={name}"));
    let mut object = server.request(Operation::GetObject, api.list(&one)).await?.items.pop();
    object.iter_mut().for_each(strip_unused_fields);
    Ok(object)
}

/// Where the object's database is, from the Secrets as they are now, and the resourceVersions of those.
pub async fn target(
    server: &ApiServer,
    sweeper: &Sweeper,
    default_roots: &Arc<rustls::RootCertStore>,
) -> Result<(Target, Vec<String>), Failure> {
    let (database, namespace) = (&sweeper.spec.database, sweeper.namespace());
    let (mut secrets, mut versions) = (BTreeMap::new(), vec![]);
    for name in credentials::names(database) {
        let secret = secret(server, namespace, name).await?;
        versions.extend(secret.metadata.resource_version);
        secrets.insert(name.to_owned(), secret.data.unwrap_or_default());
    }
    let credentials = Credentials::read(database, namespace, &secrets, None)?;
    let mode = database.tls.as_ref().and_then(|tls| tls.mode);
    let application_name = format!("audit-log-sweeper/{namespace}/{}", sweeper.name());
    let target = Target::new(&credentials, mode, default_roots, &application_name);
    Ok((target.map_err(|error| Failure::from(&error))?, versions))
}

async fn secret(server: &ApiServer, namespace: &str, name: &str) -> Result<Secret, Failure> {
    let api: Api<Secret> = Api::namespaced(server.client.clone(), namespace);
    let failure = |reason, message: String| Failure::new(reason, message);
    match server.request(Operation::GetSecret, api.get(name)).await {
        Ok(secret) => Ok(secret),
        Err(error) => Err(match error.code() {
            Some(404) => failure(
                Reason::SecretNotFound,
                format!("there is no Secret {name} in namespace {namespace}; create it, or name another in the spec"),
            ),
            Some(403) => failure(
                Reason::SecretForbidden,
                format!(
                    "the operator may not get Secret {name} in namespace {namespace}; grant its ServiceAccount get on secrets"
                ),
            ),
            // The text of a failed request says nothing of the Secret's content.
            _ => failure(Reason::APIRequestFailed, format!("cannot get Secret {name}: {}", text(&error))),
        }),
    }
}

impl From<CredentialsError> for Failure {
    fn from(error: CredentialsError) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}
