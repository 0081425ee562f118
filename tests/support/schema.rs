//! Whether JSON that is printed is what a schema in docs/ describes.

use serde_json::Value;

/// An object's fields are those that the schema names, all of them, and there may
/// be no others.
pub(crate) fn has_the_fields(object: &Value, schema: &Value) {
    assert_eq!(schema["additionalProperties"], false, "{schema:#}");
    assert_eq!(names(object), names(&schema["properties"]));
    for required in schema["required"].as_array().expect("a list") {
        assert!(object.get(required.as_str().expect("a name")).is_some());
    }
}

fn names(object: &Value) -> Vec<&String> {
    let mut names: Vec<&String> = object.as_object().expect("an object").keys().collect();
    names.sort();
    names
}
