//! Judges an AuditLogSweeper by the CRD's own schema and rules, as the API server does: a file before it is used, and
//! an object that an older or looser CRD let in.

use std::ops::Deref;
use std::sync::{Arc, LazyLock};

use kube_cel::CompiledSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{AuditLogSweeper, AuditLogSweeperSpec, AuditLogSweeperStatus, crd, spec};

/// Compiled once.
static RULES: LazyLock<Rules> = LazyLock::new(|| {
    let schema = schema();
    let mut without_zones = schema.clone();
    remove_rule(&mut without_zones, spec::TIME_ZONE);
    let compiled = kube_cel::compile_schema(&without_zones);
    Rules { schema, compiled }
});

struct Rules {
    /// Of the whole object.
    schema: Value,
    /// The CEL rules in it.
    compiled: CompiledSchema,
}

/// Lays the defaults over an object, nulls counting as absent, and says everything that the API server would refuse.
pub fn judge(object: &mut Value) -> Vec<String> {
    let Rules { schema, compiled } = &*RULES;
    prune_nulls(schema, object);
    *object = kube_cel::apply_defaults(schema, object);
    let mut faults = vec![];
    check(schema, object, "", &mut faults);
    let mut errors: Vec<String> = faults.into_iter().map(String::from).collect();
    // As the API server: a rule is no use on a value of the wrong type.
    if errors.is_empty()
        && let Err(broken) = kube_cel::validate_compiled(compiled, object, None)
    {
        errors.extend(broken.into_vec().iter().map(ToString::to_string));
    }
    errors
}

/// A spec that breaks no rule of the CRD. Only such a spec becomes a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidSpec(Arc<AuditLogSweeperSpec>);

impl ValidSpec {
    /// Judges a spec, which takes longer than all else of a reconcile.
    ///
    /// # Errors
    /// Everything that the API server would refuse of it.
    pub fn new(spec: AuditLogSweeperSpec) -> Result<Self, Vec<String>> {
        let broken = judge(&mut json!({ "spec": spec }));
        if broken.is_empty() { Ok(Self(Arc::new(spec))) } else { Err(broken) }
    }

    /// For tests that make thousands of them.
    #[cfg(test)]
    pub fn unjudged(spec: AuditLogSweeperSpec) -> Self {
        Self(Arc::new(spec))
    }
}

impl Deref for ValidSpec {
    type Target = AuditLogSweeperSpec;

    fn deref(&self) -> &AuditLogSweeperSpec {
        &self.0
    }
}

/// Reads an object of the cluster. A spec field that this version does not know may narrow what is swept, so such an object
/// is refused.
///
/// # Errors
/// What is wrong with the object: its unknown spec fields, or the first field that cannot be read.
pub fn parse(object: &Value) -> Result<AuditLogSweeper, String> {
    let mut faults = vec![];
    if let (Some(schema), Some(spec)) = (RULES.schema.pointer("/properties/spec"), object.get("spec")) {
        // Before it is read: a list would pass for the object whose fields it holds in order.
        check(schema, spec, "spec", &mut faults);
    }
    let unknown = |fault: &Fault| if let Fault::Unknown(path) = fault { Some(path.clone()) } else { None };
    let unknown: Vec<String> = faults.iter().filter_map(unknown).collect();
    if !unknown.is_empty() {
        return Err(format!(
            "this operator (version {}) does not know {}",
            env!("CARGO_PKG_VERSION"),
            unknown.join(", ")
        ));
    }
    if !faults.is_empty() {
        return Err(faults.into_iter().map(String::from).collect::<Vec<_>>().join("; "));
    }
    AuditLogSweeper::deserialize(object).or_else(|error| {
        // The spec decides whether the object is valid; of its status, what can be read will do.
        let mut object = object.clone();
        let status = object.get_mut("status").map(Value::take).unwrap_or_default();
        let mut object = AuditLogSweeper::deserialize(&object).map_err(|_| error.to_string())?;
        object.status = Some(readable_status(&status));
        Ok(object)
    })
}

/// A status without the fields, and without the items of lists, that cannot be read: an edit or a restored backup may have
/// brought them.
pub fn readable_status(status: &Value) -> AuditLogSweeperStatus {
    let is_readable = |name: &str, value: &Value| AuditLogSweeperStatus::deserialize(&json!({ name: value })).is_ok();
    let mut status = status.clone();
    if let Value::Object(fields) = &mut status {
        for (name, field) in fields.iter_mut() {
            if let Value::Array(items) = field {
                items.retain(|item| is_readable(name, &json!([item])));
            }
        }
        fields.retain(|name, field| is_readable(name, field));
    }
    AuditLogSweeperStatus::deserialize(&status).unwrap_or_default()
}

/// What a structural schema has against a value.
enum Fault {
    /// A field that the schema does not name, by its path.
    Unknown(String),
    /// Anything else, in words.
    Invalid(String),
}

impl From<Fault> for String {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Unknown(path) => format!("unknown field {path:?}"),
            Fault::Invalid(words) => words,
        }
    }
}

/// The schema of the whole object. The metadata is the API server's own matter.
fn schema() -> Value {
    let crd = crd::json().unwrap_or_default();
    let mut schema = crd.pointer("/spec/versions/0/schema/openAPIV3Schema").cloned().unwrap_or_default();
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        let text = json!({ "type": "string" });
        properties.insert("apiVersion".into(), text.clone());
        properties.insert("kind".into(), text);
        properties.insert("metadata".into(), json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true }));
    }
    schema
}

/// Takes a rule out of a schema: one that the CEL of `kube_cel` cannot evaluate, which knows no time zones.
fn remove_rule(schema: &mut Value, rule: &str) {
    match schema {
        Value::Object(fields) => {
            if let Some(Value::Array(rules)) = fields.get_mut("x-kubernetes-validations") {
                rules.retain(|item| item["rule"] != rule);
            }
            fields.values_mut().for_each(|field| remove_rule(field, rule));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| remove_rule(item, rule)),
        _ => {}
    }
}

/// Whether a schema has a rule.
fn has_rule(schema: &Value, rule: &str) -> bool {
    let rules = schema.get("x-kubernetes-validations").and_then(Value::as_array);
    rules.is_some_and(|rules| rules.iter().any(|item| item["rule"] == rule))
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
fn check(schema: &Value, value: &Value, path: &str, faults: &mut Vec<Fault>) {
    let number = |keyword: &str| schema.get(keyword).and_then(Value::as_f64);
    let expected = schema.get("type").and_then(Value::as_str).unwrap_or_default();
    let actual = type_of(value);
    if !expected.is_empty() && expected != actual {
        faults.push(Fault::Invalid(format!("{path}: Invalid value: {actual:?}: must be of type {expected}")));
        return;
    }
    let mut refuse = |why: String| faults.push(Fault::Invalid(format!("{path}: Invalid value: {value}: {why}")));
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
            if has_rule(schema, spec::TIME_ZONE) && !spec::is_time_zone(text) {
                refuse(spec::TIME_ZONE_MESSAGE.to_owned());
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
                check(schema.get("items").unwrap_or(&none), item, &format!("{path}[{index}]"), faults);
            }
        }
        Value::Object(fields) => check_fields(schema, fields, path, faults),
        Value::Null | Value::Bool(_) => {}
    }
}

fn check_fields(schema: &Value, fields: &Map<String, Value>, path: &str, faults: &mut Vec<Fault>) {
    if schema.get("x-kubernetes-preserve-unknown-fields").is_some() {
        return;
    }
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    for name in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
        if !fields.contains_key(name) {
            faults.push(Fault::Invalid(format!("{}: Required value", below(name))));
        }
    }
    for (name, field) in fields {
        match schema.get("properties").and_then(|p| p.get(name)) {
            Some(child) => check(child, field, &below(name), faults),
            None => faults.push(Fault::Unknown(below(name))),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_without_what_cannot_be_read() {
        let condition = |time: &str| json!({ "type": "Foreign", "status": "True", "reason": "R", "message": "", "lastTransitionTime": time });
        let status = readable_status(&json!({
            "totals": { "sweeps": 3, "failures": 1, "timedOut": 7 },
            "lastSuccessfulTime": "2026-11-27T10:00:00+99:99",
            "nextScheduleTime": 5,
            "conditions": [condition("2026-11-27T10:00:00Z"), condition("never")],
        }));
        let totals = status.totals.unwrap();
        assert_eq!((totals.sweeps, totals.failures, totals.timed_out), (3, 1, 7));
        assert_eq!((status.last_successful_time, status.next_schedule_time, status.conditions.len()), (None, None, 1));
    }

    #[test]
    fn an_unreadable_status_does_not_make_the_object_invalid() {
        let object = |timeout: &str| {
            json!({
                "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": { "name": "app" },
                "spec": { "database": { "secretRef": { "name": "db" } }, "timeout": timeout },
                "status": { "lastSuccessfulTime": "yesterday", "consecutiveFailures": 4 },
            })
        };
        assert_eq!(parse(&object("4h")).unwrap().status.unwrap().consecutive_failures, 4);
        assert!(parse(&object("soon")).is_err());
    }

    #[test]
    fn a_spec_is_judged_as_it_is_stored_and_not_as_it_could_be_read() {
        let parsed = |spec: Value| {
            parse(
                &json!({ "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper", "metadata": {}, "spec": spec }),
            )
        };
        let database = json!({ "secretRef": { "name": "db" } });
        assert!(parsed(json!({ "database": database })).is_ok());
        for (spec, field) in [
            (json!([[["db"]], "s", "t"]), "spec"),
            (json!({ "database": [["db"]] }), "spec.database"),
            (json!({ "database": { "secretRef": ["db", "uri"] } }), "spec.database.secretRef"),
            (json!({ "database": database, "columns": ["k"] }), "spec.columns"),
            (json!({ "database": database, "complete": [["a", "b"]] }), "spec.complete[0]"),
            (json!({ "database": database, "timeout": null }), "spec.timeout"),
        ] {
            let error = parsed(spec.clone()).unwrap_err();
            assert!(error.starts_with(&format!("{field}: Invalid value: ")), "{spec}: {error}");
        }
    }

    fn judged(rest: Value) -> Vec<String> {
        let spec = support::json::merged(json!({ "database": { "secretRef": { "name": "db" } } }), &rest);
        ValidSpec::new(serde_json::from_value(spec).unwrap()).err().unwrap_or_default()
    }

    #[test]
    fn a_spec_that_was_read_is_judged_as_the_api_server_judges_a_file() {
        for well in [
            json!({}),
            json!({ "period": "8760h", "timeout": "90m", "statementTimeout": "100ms", "deadline": "1000ms" }),
            json!({ "complete": [{ "column": "a", "value": "" }, { "column": "b", "setNull": true }] }),
            json!({ "database": { "secretRef": { "name": "db" }, "tls": { "mode": "Require" } }, "suspend": true }),
        ] {
            assert_eq!(judged(well.clone()), [""; 0], "{well}");
        }
        for (broken, said) in [
            (json!({ "timeout": "0s" }), "spec.timeout: must be a duration such as 4h or 1h30m, from 1m"),
            (json!({ "timeout": "59s" }), "spec.timeout: must be a duration such as 4h or 1h30m, from 1m"),
            (json!({ "period": "0s" }), "spec.period: must be a duration such as 4h or 1h30m, from 5s"),
            (json!({ "limit": -5 }), "spec.limit: Invalid value: -5: should be greater than or equal to 1"),
            (json!({ "batchSize": 0 }), "spec.batchSize: Invalid value: 0: should be greater than or equal to 1"),
            (json!({ "deadline": "999ms", "statementTimeout": "100ms" }), "spec.deadline: must be a duration such as"),
            (json!({ "statementTimeout": "0s" }), "spec.statementTimeout: must be a duration such as"),
            (json!({ "historyLimit": 21 }), "spec.historyLimit: Invalid value: 21: should be less than or equal to 20"),
            (json!({ "table": "" }), "spec.table: Invalid value: \"\": should be at least 1"),
            (json!({ "complete": [{ "column": "a" }] }), "spec.complete[0]: must have exactly one of value"),
            (json!({ "columns": { "id": "time_started" } }), "spec.columns: id, timeStarted and timeCompleted must be"),
            (
                json!({ "statementTimeout": "1h" }),
                "spec.statementTimeout: statementTimeout (30s unless set) must not be longer",
            ),
        ] {
            let errors = judged(broken.clone());
            assert!(errors.len() == 1 && errors[0].starts_with(said), "{broken}: {errors:?}");
        }
    }
}
