//! Reads a file as `kubectl apply` would: the CLI's way to an AuditLogSweeper, with the API server's verdicts and
//! defaults.

use k8s_openapi::api::core::v1::Secret;
use serde_json::Value;

use super::{AuditLogSweeper, Sweeper, validate};

/// What a file held.
#[derive(Debug)]
pub struct Manifest {
    /// The one AuditLogSweeper.
    pub sweeper: Sweeper,
    /// The Secrets beside it.
    pub secrets: Vec<Secret>,
}

/// Why a file cannot be used. No text of the file is repeated but what the rules quote from the spec: the file may
/// hold a Secret.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("the file is not YAML{0}")]
    NotYaml(String),
    #[error("the file holds no AuditLogSweeper (apiVersion: auditlog.dev/v1alpha1)")]
    NoSweeper,
    #[error("the file holds {0} AuditLogSweepers; name one by leaving only that one in it")]
    ManySweepers(usize),
    #[error("a Secret in the file is not valid: stringData must be strings (quote numbers) and data base64")]
    Secret,
    #[error("the AuditLogSweeper is not valid:\n  {}", .0.join("\n  "))]
    Invalid(Vec<String>),
}

/// Reads the text of a file: YAML or JSON, one document or several.
///
/// # Errors
/// When the text is not YAML, does not hold exactly one AuditLogSweeper, or the API server would refuse it.
pub fn read(text: &str) -> Result<Manifest, ManifestError> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| {
        let at = error.location().map(|at| format!(" at line {}, column {}", at.line(), at.column()));
        let why = if error.to_string().contains("duplicate") { ": a key stands there for the second time" } else { "" };
        ManifestError::NotYaml(at.unwrap_or_default() + why)
    })?;
    // As `kubectl get -o yaml` prints them.
    let documents: Vec<Value> = documents.into_iter().flat_map(items).collect();
    let is = |document: &Value, version: &str, kind: &str| {
        document.get("apiVersion").and_then(Value::as_str) == Some(version)
            && document.get("kind").and_then(Value::as_str) == Some(kind)
    };
    let mut sweepers = documents.iter().filter(|d| is(d, "auditlog.dev/v1alpha1", "AuditLogSweeper"));
    let sweeper = sweepers.next().ok_or(ManifestError::NoSweeper)?;
    let others = sweepers.count();
    if others > 0 {
        return Err(ManifestError::ManySweepers(others + 1));
    }
    let secrets = documents.iter().filter(|d| is(d, "v1", "Secret")).map(secret).collect::<Result<_, _>>()?;
    Ok(Manifest { sweeper: validate(sweeper)?, secrets })
}

/// What a list holds; anything else is itself.
fn items(document: Value) -> Vec<Value> {
    match document {
        Value::Object(mut fields) if fields.get("kind").is_some_and(|kind| kind == "List") => {
            match fields.remove("items") {
                Some(Value::Array(items)) => items,
                _ => vec![],
            }
        }
        document => vec![document],
    }
}

/// A Secret with its `stringData` laid over its `data`, as the API server does.
fn secret(document: &Value) -> Result<Secret, ManifestError> {
    let mut secret: Secret = serde_json::from_value(document.clone()).map_err(|_| ManifestError::Secret)?;
    let written = secret.string_data.take().unwrap_or_default();
    let data = secret.data.get_or_insert_default();
    data.extend(written.into_iter().map(|(key, text)| (key, k8s_openapi::ByteString(text.into_bytes()))));
    Ok(secret)
}

/// The object with its defaults, or every error that the API server would name.
fn validate(object: &Value) -> Result<Sweeper, ManifestError> {
    let mut object = object.clone();
    let mut errors = Vec::new();
    if object.pointer("/metadata/name").and_then(Value::as_str).is_none_or(str::is_empty) {
        errors.push("metadata.name: Required value: name is required".into());
    }
    errors.extend(validate::judge(&mut object));
    if !errors.is_empty() {
        return Err(ManifestError::Invalid(errors));
    }
    // The status belongs to the cluster, not to the file.
    if let Some(object) = object.as_object_mut() {
        object.remove("status");
    }
    let object: AuditLogSweeper =
        serde_json::from_value(object).map_err(|error| ManifestError::Invalid(vec![error.to_string()]))?;
    Sweeper::new(object).map_err(ManifestError::Invalid)
}
