//! The reference of the resource, made from its CRD.

use anyhow::Context;
use serde_json::Value;

pub const API: &str = "docs/api.md";

const HEAD: &str = "\
# The resource AuditLogSweeper

Group `auditlog.dev`, version `v1alpha1`, kind `AuditLogSweeper`, short name `als`, namespaced. Made from the CRD by
`cargo xtask generate`; `kubectl explain als.spec --recursive` says the same. How the conditions, reasons and events are
to be read is in [operating.md](operating.md).
";

/// The reference, from the CRD as YAML.
pub fn reference(crd: &str) -> anyhow::Result<String> {
    let crd: Value = serde_saphyr::from_str(crd).context("the CRD")?;
    let version = &crd["spec"]["versions"][0];
    let schema = &version["schema"]["openAPIV3Schema"]["properties"];
    let mut text = HEAD.to_owned();
    for part in ["spec", "status"] {
        text.push_str(&format!("\n## `{part}`\n\n"));
        text.push_str("| Field | Type | Default | |\n|---|---|---|---|\n");
        rows(&schema[part], part, &mut text);
        let rules = rules(&schema[part]);
        if !rules.is_empty() {
            text.push_str(&format!("\nRules across fields: {}.\n", rules.join("; ")));
        }
    }
    text.push_str("\n## Columns of `kubectl get als`\n\n| Column | From | |\n|---|---|---|\n");
    for column in version["additionalPrinterColumns"].as_array().into_iter().flatten() {
        let wide = if column["priority"].as_i64().unwrap_or_default() > 0 { "with `-o wide`" } else { "" };
        let said = column["description"].as_str().unwrap_or_default();
        let about = [said, wide].iter().filter(|text| !text.is_empty()).copied().collect::<Vec<_>>().join("; ");
        let (name, path) =
            (column["name"].as_str().unwrap_or_default(), column["jsonPath"].as_str().unwrap_or_default());
        text.push_str(&format!("| {} | `{path}` | {about} |\n", name.to_uppercase()));
    }
    Ok(text)
}

/// One row for each field, parents before children.
fn rows(schema: &Value, path: &str, text: &mut String) {
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let (items, list) = if field["type"] == "array" { (&field["items"], "[]") } else { (field, "") };
        let path = format!("{path}.{name}{list}");
        let default = match &field["default"] {
            Value::Null if required.contains(&name.as_str()) => "required".to_owned(),
            Value::Null => String::new(),
            default => format!("`{default}`"),
        };
        let about = field["description"].as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
        let about: Vec<String> = [about].into_iter().filter(|about| !about.is_empty()).chain(bounds(field)).collect();
        let kind = kind(field);
        text.push_str(&format!("| `{path}` | {kind} | {default} | {} |\n", about.join(" ").replace('|', "\\|")));
        // A condition is the same everywhere.
        if name != "conditions" {
            rows(items, &path, text);
        }
    }
}

fn kind(field: &Value) -> String {
    let name = field["type"].as_str().unwrap_or("any");
    match field["format"].as_str() {
        Some("date-time") => "time".into(),
        _ if name == "array" => format!("list of {}", kind(&field["items"])),
        _ => name.into(),
    }
}

/// What a value must be.
fn bounds(field: &Value) -> Vec<String> {
    let mut bounds = vec![];
    if let Some(values) = field["enum"].as_array() {
        let values: Vec<String> = values.iter().filter_map(Value::as_str).map(|value| format!("`{value}`")).collect();
        bounds.push(format!("One of {}.", values.join(", ")));
    }
    for (key, words) in [
        ("minimum", "At least"),
        ("maximum", "At most"),
        ("minLength", "Characters, at least:"),
        ("maxLength", "Characters, at most:"),
        ("minItems", "Entries, at least:"),
        ("maxItems", "Entries, at most:"),
    ] {
        // Other bounds are those of the number's own type.
        if let Some(bound) = field[key].as_f64().filter(|bound| bound.abs() < 2_147_483_647.0) {
            bounds.push(format!("{words} {bound}."));
        }
    }
    bounds.extend(rules(field).into_iter().map(|rule| format!("It {rule}.")));
    bounds.extend(rules(&field["items"]).into_iter().map(|rule| format!("Each {rule}.")));
    bounds
}

fn rules(schema: &Value) -> Vec<String> {
    let rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    rules.filter_map(|rule| rule["message"].as_str()).map(|message| message.trim_end_matches('.').to_owned()).collect()
}
