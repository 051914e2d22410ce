//! An AuditLogSweeper that breaks no rule: what the controller and the commands work on.

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;

use super::request::{MAX_REQUEST, REQUESTED_AT};
use super::validate::ValidSpec;
use super::{AuditLogSweeper, AuditLogSweeperStatus, cut};

/// An object as it was read, with a spec that was validated.
#[derive(Clone, Debug)]
pub struct Sweeper {
    pub metadata: ObjectMeta,
    pub spec: ValidSpec,
    pub status: AuditLogSweeperStatus,
}

impl Sweeper {
    /// Validates an object.
    ///
    /// # Errors
    /// Everything that the API server would refuse of its spec.
    pub fn new(object: AuditLogSweeper) -> Result<Self, Vec<String>> {
        let AuditLogSweeper { metadata, spec, status } = object;
        Ok(Self { metadata, spec: ValidSpec::new(spec)?, status: status.unwrap_or_default() })
    }

    /// Its name; none in a file without one.
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// Its namespace; empty in a file that names none.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// Tells it from another of its name; empty in a file.
    pub fn uid(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }

    /// The version of its spec.
    pub fn generation(&self) -> i64 {
        self.metadata.generation.unwrap_or_default()
    }

    /// Whether it is being deleted, and only some finalizer keeps it.
    pub fn is_deleted(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }

    /// The value of the annotation that asks for a sweep now, as far as it is looked at.
    pub fn request(&self) -> Option<&str> {
        requested(&self.metadata)
    }

    /// What an event about it refers to.
    pub fn reference(&self) -> ObjectReference {
        let ObjectMeta { name, namespace, uid, .. } = self.metadata.clone();
        ObjectReference {
            api_version: Some(AuditLogSweeper::api_version(&()).into_owned()),
            kind: Some(AuditLogSweeper::kind(&()).into_owned()),
            name,
            namespace,
            uid,
            // Events that differ in it would not be counted together.
            resource_version: None,
            field_path: None,
        }
    }
}

/// The same of an object that was not validated.
pub fn requested(metadata: &ObjectMeta) -> Option<&str> {
    Some(cut(metadata.annotations.as_ref()?.get(REQUESTED_AT)?, MAX_REQUEST))
}

#[cfg(test)]
impl Sweeper {
    /// The first generation of an object with such a spec, besides a Secret.
    pub fn with(spec: serde_json::Value) -> Self {
        let whole = support::json::merged(serde_json::json!({ "database": { "secretRef": { "name": "db" } } }), &spec);
        let metadata = ObjectMeta {
            uid: Some("0f8fad5b-d9cb-469f-a165-70867728950e".into()),
            generation: Some(1),
            ..ObjectMeta::default()
        };
        let spec = ValidSpec::unjudged(serde_json::from_value(whole).unwrap());
        Self { metadata, spec, status: AuditLogSweeperStatus::default() }
    }

    /// The next generation, with an edited spec.
    pub fn edited(&self, edit: impl FnOnce(&mut super::AuditLogSweeperSpec)) -> Self {
        let mut spec = (*self.spec).clone();
        edit(&mut spec);
        let metadata = ObjectMeta { generation: Some(self.generation() + 1), ..self.metadata.clone() };
        Self { metadata, spec: ValidSpec::unjudged(spec), status: self.status.clone() }
    }

    /// The same object, asked to sweep now.
    pub fn requested(mut self, request: &str) -> Self {
        self.metadata.annotations = Some([(REQUESTED_AT.to_owned(), request.to_owned())].into());
        self
    }

    /// The same object with another status.
    pub fn with_status(&self, status: &AuditLogSweeperStatus) -> Self {
        Self { status: status.clone(), ..self.clone() }
    }
}
