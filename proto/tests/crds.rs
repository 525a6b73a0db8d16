//! The chart's CustomResourceDefinitions are those of the types.
#![allow(missing_docs)]

use std::{collections::BTreeMap, fs, path::Path};

use lockstep_proto::crds;

#[test]
fn the_charts_definitions_are_what_the_types_say() {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/lockstep/templates/crds");
    let files = fs::read_dir(&chart).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(&path).unwrap())
    });
    let (there, wanted): (BTreeMap<_, _>, BTreeMap<_, _>) = (files.collect(), crds::files().unwrap().into_iter().collect());
    assert_eq!(there.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "run `make crds`");
    for (name, wanted) in &wanted {
        let differs = wanted.lines().zip(there[name].lines()).position(|(wanted, there)| wanted != there);
        assert!(&there[name] == wanted, "{name} is not what the types say, from line {differs:?} (counted from 0): run `make crds`");
        assert!(!wanted.contains("{{"), "{name} would be a template");
    }
}

#[test]
fn a_definition_has_what_kubectl_shows_and_selects() {
    for crd in crds::all() {
        let version = &crd.spec.versions[0];
        let columns: Vec<_> = version.additional_printer_columns.iter().flatten().map(|column| column.name.as_str()).collect();
        assert!(columns.contains(&"Node") && columns.contains(&"Age"), "{columns:?}");
        let selectable: Vec<_> = version.selectable_fields.iter().flatten().map(|field| field.json_path.as_str()).collect();
        assert_eq!(selectable, [".spec.node"]);
        assert_eq!(crd.metadata.annotations.as_ref().unwrap()["helm.sh/resource-policy"], "keep");
        let text = serde_json::to_string(&crd).unwrap();
        assert!(!text.contains("\"uint"), "a format that Kubernetes does not know");
    }
}
