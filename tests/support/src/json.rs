//! JSON objects of the tests: a whole one from defaults and what a test sets.

use serde_json::Value;

/// The object `base` with the fields of `over` laid over its own.
///
/// # Panics
/// When one of them is no object.
pub fn merged(mut base: Value, over: &Value) -> Value {
    let (Value::Object(fields), Value::Object(over)) = (&mut base, over) else {
        panic!("{base} and {over} must both be objects")
    };
    fields.extend(over.clone());
    base
}
