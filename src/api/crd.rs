//! The CustomResourceDefinition made from the types; `audit-log-sweeper crd` prints it and `crds/` holds it.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Map, Value, json};

use super::AuditLogSweeper;

/// The CRD as it is installed.
///
/// # Errors
/// Never, in a build that passed its tests.
pub fn crd() -> serde_json::Result<CustomResourceDefinition> {
    serde_json::from_value(json()?)
}

/// The CRD as JSON.
///
/// # Errors
/// Never, in a build that passed its tests.
pub fn json() -> serde_json::Result<Value> {
    let mut crd = serde_json::to_value(AuditLogSweeper::crd())?;
    if let Some(schema) = crd.pointer_mut("/spec/versions/0/schema/openAPIV3Schema") {
        tidy(schema);
        // Without this, tools take an object that no operator has looked at for done.
        if let Some(status) = schema.pointer_mut("/properties/status").and_then(Value::as_object_mut) {
            status.insert("default".into(), json!({ "observedGeneration": -1 }));
        }
    }
    Ok(crd)
}

/// Takes out `nullable` and null from enums, so that the API server drops a null as if the field were not there: a null
/// must never pass for a value. Writes bounds as the whole numbers they are, and paragraphs as one line each.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            let fields: &mut Map<String, Value> = fields;
            fields.remove("nullable");
            if let Some(Value::Array(names)) = fields.get_mut("enum") {
                names.retain(|name| !name.is_null());
            }
            // The line breaks of the source are not the reader's.
            if let Some(Value::String(text)) = fields.get_mut("description") {
                let paragraphs: Vec<_> = text.split("\n\n").map(|paragraph| paragraph.replace('\n', " ")).collect();
                *text = paragraphs.join("\n\n");
            }
            fields.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        Value::Number(number) => {
            if let Some(whole) = number.as_f64().filter(|n| n.fract() == 0.0 && n.abs() < 1e15) {
                *value = json!(whole as i64);
            }
        }
        _ => {}
    }
}
