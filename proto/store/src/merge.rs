//! What this version does not know of an object stays in it.
//!
//! Three states of a value meet: what is stored; the same as this version knows it (read into its types and written again); and what is
//! to be stored. What is stored and not known is kept, unless its surroundings go; what is known and no longer wanted goes.

use serde_json::{Map, Value};

/// By what an element of a list is found again; the first that it has. An element that has none is found by its place.
const KEYS: [&str; 4] = ["legId", "uid", "name", "type"];

/// `new`, with what `stored` has beyond `known`.
pub(crate) fn merged(stored: &Value, known: &Value, new: Value) -> Value {
    match (stored, new) {
        (Value::Object(stored), Value::Object(new)) => Value::Object(fields(stored, known, new)),
        (Value::Array(stored), Value::Array(new)) => Value::Array(elements(stored, known, new)),
        (_, new) => new,
    }
}

fn fields(stored: &Map<String, Value>, known: &Value, mut new: Map<String, Value>) -> Map<String, Value> {
    for (name, stored) in stored {
        match (known.get(name), new.get_mut(name)) {
            (known, Some(new)) => *new = merged(stored, known.unwrap_or(&Value::Null), new.take()),
            (Some(_), None) => {}
            // A null is how YAML says "absent".
            (None, None) if stored.is_null() => {}
            (None, None) => drop(new.insert(name.clone(), stored.clone())),
        }
    }
    new
}

fn elements(stored: &[Value], known: &Value, new: Vec<Value>) -> Vec<Value> {
    // Of another length: it is not known which is which.
    let Some(known) = known.as_array().filter(|known| known.len() == stored.len()) else { return new };
    let merged = |(place, new): (usize, Value)| match before(known, &new, place) {
        Some(place) => merged(&stored[place], &known[place], new),
        None => new,
    };
    new.into_iter().enumerate().map(merged).collect()
}

/// Where an element was before; `None`: it is new, or more than one could have been it.
fn before(known: &[Value], element: &Value, place: usize) -> Option<usize> {
    let wanted = key(element);
    if wanted.is_none() {
        return Some(place).filter(|place| known.get(*place).is_some_and(|known| key(known).is_none()));
    }
    let mut places = known.iter().enumerate().filter(|(_, known)| key(known) == wanted).map(|(place, _)| place);
    places.next().filter(|_| places.next().is_none())
}

fn key(element: &Value) -> Option<(&str, &str)> {
    KEYS.iter().find_map(|name| Some((*name, element.get(name)?.as_str()?)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_not_known_is_kept_and_what_is_known_and_gone_goes() {
        let stored = json!({"a": 1, "future": {"x": 1}, "place": {"rack": 2, "future": 3}, "map": {"k": "v"}, "none": null});
        let known = json!({"a": 1, "place": {"rack": 2}, "map": {"k": "v"}});
        let same = json!({"a": 1, "future": {"x": 1}, "place": {"rack": 2, "future": 3}, "map": {"k": "v"}});
        assert_eq!(merged(&stored, &known, known.clone()), same);
        assert_eq!(merged(&stored, &known, json!({"map": {"l": "w"}})), json!({"future": {"x": 1}, "map": {"l": "w"}}));
        assert_eq!(merged(&stored, &known, json!({"a": {"b": 1}}))["a"], json!({"b": 1}));
        assert_eq!(merged(&json!({"a": {"future": 1}}), &json!({}), json!({"a": {"b": 1}})), json!({"a": {"b": 1, "future": 1}}));
    }

    #[test]
    fn an_element_is_found_by_its_key_or_else_by_its_place() {
        let stored = json!([{"type": "A", "s": 1, "future": "a"}, {"type": "B", "s": 1, "future": "b"}]);
        let known = json!([{"type": "A", "s": 1}, {"type": "B", "s": 1}]);
        let new = json!([{"type": "B", "s": 2}, {"type": "C", "s": 3}, {"type": "A", "s": 1}]);
        let wanted = json!([{"type": "B", "s": 2, "future": "b"}, {"type": "C", "s": 3}, {"type": "A", "s": 1, "future": "a"}]);
        assert_eq!(merged(&stored, &known, new), wanted);
        // Another leg on the same disk is another element.
        let leg = |id: &str| json!([{"disk": "d", "legId": id}]);
        let stored = json!([{"disk": "d", "legId": "one", "future": 1}]);
        assert_eq!(merged(&stored, &leg("one"), leg("one")), stored);
        assert_eq!(merged(&stored, &leg("one"), leg("two")), leg("two"));
        let (stored, known) = (json!([{"s": 1, "future": 1}, {"s": 2, "future": 2}]), json!([{"s": 1}, {"s": 2}]));
        assert_eq!(merged(&stored, &known, json!([{"s": 3}])), json!([{"s": 3, "future": 1}]));
        assert_eq!(merged(&stored, &known, json!([])), json!([]));
    }

    #[test]
    fn a_list_in_which_elements_cannot_be_told_apart_is_written_as_it_is_known() {
        let twins = json!([{"name": "a", "s": 1}, {"name": "a", "s": 2}]);
        assert_eq!(merged(&json!([{"name": "a", "x": 1}, {"name": "a", "x": 2}]), &twins, twins.clone()), twins);
        assert_eq!(merged(&json!([{"s": 1, "x": 1}, 7]), &json!([{"s": 1}]), json!([{"s": 1}])), json!([{"s": 1}]));
        assert_eq!(merged(&json!(["a", "b"]), &json!(["a", "b"]), json!(["b"])), json!(["b"]));
    }
}
