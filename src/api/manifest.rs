//! Reads a file as `kubectl apply` would: the CLI's way to an AuditLogSweeper, with the API server's verdicts and
//! defaults. The rules come from the CRD's own schema, so there is one set of them.

use k8s_openapi::api::core::v1::Secret;
use serde_json::{Map, Value};

use super::{AuditLogSweeper, crd};

/// What a file held.
#[derive(Debug)]
pub struct Manifest {
    /// The one AuditLogSweeper.
    pub sweeper: AuditLogSweeper,
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
        ManifestError::NotYaml(at.unwrap_or_default())
    })?;
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

/// A Secret with its `stringData` laid over its `data`, as the API server does.
fn secret(document: &Value) -> Result<Secret, ManifestError> {
    let mut secret: Secret = serde_json::from_value(document.clone()).map_err(|_| ManifestError::Secret)?;
    let written = secret.string_data.take().unwrap_or_default();
    let data = secret.data.get_or_insert_default();
    data.extend(written.into_iter().map(|(key, text)| (key, k8s_openapi::ByteString(text.into_bytes()))));
    Ok(secret)
}

/// The object with its defaults, or every error that the API server would name.
fn validate(object: &Value) -> Result<AuditLogSweeper, ManifestError> {
    let schema = schema();
    let mut object = object.clone();
    let mut errors = Vec::new();
    if object.pointer("/metadata/name").and_then(Value::as_str).is_none_or(str::is_empty) {
        errors.push("metadata.name: Required value: name is required".into());
    }
    prune_nulls(&schema, &mut object);
    let mut object = kube_cel::apply_defaults(&schema, &object);
    check(&schema, &object, "", &mut errors);
    // As the API server: a rule is no use on a value of the wrong type.
    if errors.is_empty()
        && let Err(broken) = kube_cel::Validator::new().validate(&schema, &object, None)
    {
        errors.extend(broken.into_vec().iter().map(ToString::to_string));
    }
    if !errors.is_empty() {
        return Err(ManifestError::Invalid(errors));
    }
    // The status belongs to the cluster, not to the file.
    if let Some(object) = object.as_object_mut() {
        object.remove("status");
    }
    serde_json::from_value(object).map_err(|error| ManifestError::Invalid(vec![error.to_string()]))
}

/// The schema of the whole object. The metadata is the API server's own matter.
fn schema() -> Value {
    let crd = crd::json().unwrap_or_default();
    let mut schema = crd.pointer("/spec/versions/0/schema/openAPIV3Schema").cloned().unwrap_or_default();
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        let text = serde_json::json!({ "type": "string" });
        properties.insert("apiVersion".into(), text.clone());
        properties.insert("kind".into(), text);
        properties.insert(
            "metadata".into(),
            serde_json::json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true }),
        );
    }
    schema
}

/// A null counts as absent, so that its default applies.
fn prune_nulls(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, field| {
                let Some(child) = schema.get("properties").and_then(|p| p.get(name)) else { return true };
                prune_nulls(child, field);
                !field.is_null()
            });
        }
        Value::Array(items) => {
            if let Some(child) = schema.get("items") {
                items.iter_mut().for_each(|item| prune_nulls(child, item));
            }
        }
        _ => {}
    }
}

/// Checks what a structural schema can say; the CEL rules come after.
fn check(schema: &Value, value: &Value, path: &str, errors: &mut Vec<String>) {
    let number = |keyword: &str| schema.get(keyword).and_then(Value::as_f64);
    let expected = schema.get("type").and_then(Value::as_str).unwrap_or_default();
    let actual = type_of(value);
    if !expected.is_empty() && expected != actual {
        errors.push(format!("{path}: Invalid value: {actual:?}: must be of type {expected}"));
        return;
    }
    let mut refuse = |why: String| errors.push(format!("{path}: Invalid value: {value}: {why}"));
    match value {
        Value::String(text) => {
            let length = text.chars().count() as f64;
            if number("maxLength").is_some_and(|max| length > max) {
                refuse(format!("may not be more than {} characters", number("maxLength").unwrap_or_default()));
            }
            if number("minLength").is_some_and(|min| length < min) {
                refuse(format!("should be at least {} characters long", number("minLength").unwrap_or_default()));
            }
            let allowed = schema.get("enum").and_then(Value::as_array);
            if let Some(allowed) = allowed.filter(|allowed| !allowed.contains(value)) {
                let names: Vec<_> = allowed.iter().map(ToString::to_string).collect();
                refuse(format!("supported values: {}", names.join(", ")));
            }
        }
        Value::Number(given) => {
            let given = given.as_f64().unwrap_or_default();
            if let Some(min) = number("minimum").filter(|min| given < *min) {
                refuse(format!("should be greater than or equal to {min}"));
            }
            if let Some(max) = number("maximum").filter(|max| given > *max) {
                refuse(format!("should be less than or equal to {max}"));
            }
        }
        Value::Array(items) => {
            if let Some(max) = number("maxItems").filter(|max| items.len() as f64 > *max) {
                refuse(format!("must have at most {max} items"));
            }
            let none = Value::Null;
            for (index, item) in items.iter().enumerate() {
                check(schema.get("items").unwrap_or(&none), item, &format!("{path}[{index}]"), errors);
            }
        }
        Value::Object(fields) => check_fields(schema, fields, path, errors),
        Value::Null | Value::Bool(_) => {}
    }
}

fn check_fields(schema: &Value, fields: &Map<String, Value>, path: &str, errors: &mut Vec<String>) {
    if schema.get("x-kubernetes-preserve-unknown-fields").is_some() {
        return;
    }
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    for name in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
        if !fields.contains_key(name) {
            errors.push(format!("{}: Required value", below(name)));
        }
    }
    for (name, field) in fields {
        match schema.get("properties").and_then(|p| p.get(name)) {
            Some(child) => check(child, field, &below(name), errors),
            None => errors.push(format!("unknown field {:?}", below(name))),
        }
    }
}

/// The JSON type, with whole numbers as integers.
fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.as_f64().is_some_and(|n| n.fract() == 0.0) => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}
