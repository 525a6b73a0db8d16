//! The CustomResourceDefinitions of the objects, as the chart ships them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;

use crate::objects::{LocalDisk, MirrorVolume};

/// Stays when the chart is uninstalled: with its definition every object would go, and with them the knowledge of whose the legs are.
const KEEP: (&str, &str) = ("helm.sh/resource-policy", "keep");
const HEAD: &str = "# Made by `make crds` from the types in proto/src/objects.rs.\n";

/// All of them.
pub fn all() -> Vec<CustomResourceDefinition> {
    let mut all = vec![LocalDisk::crd(), MirrorVolume::crd()];
    for crd in &mut all {
        crd.metadata.annotations.get_or_insert_default().insert(KEEP.0.into(), KEEP.1.into());
        for schema in crd.spec.versions.iter_mut().filter_map(|version| version.schema.as_mut()?.open_api_v3_schema.as_mut()) {
            in_known_formats(schema);
        }
    }
    all
}

/// The chart's files: their names, and what is in them.
///
/// # Errors
/// Those of the YAML library.
pub fn files() -> Result<Vec<(String, String)>, serde_saphyr::ser::Error> {
    let file = |crd: CustomResourceDefinition| {
        let name = format!("{}.yaml", crd.spec.names.plural);
        serde_saphyr::to_string(&crd).map(|text| (name, format!("{HEAD}{}\n", text.trim_end())))
    };
    all().into_iter().map(file).collect()
}

/// Kubernetes has signed integers only: what Rust's are called it does not know, and says so to everybody who applies the definition.
fn in_known_formats(schema: &mut JSONSchemaProps) {
    match schema.format.as_deref() {
        Some("uint8" | "uint16") => schema.format = Some("int32".into()),
        Some("uint32" | "uint64") => schema.format = Some("int64".into()),
        _ => {}
    }
    let inner = schema.properties.iter_mut().flat_map(|properties| properties.values_mut());
    inner.for_each(in_known_formats);
    match &mut schema.items {
        Some(JSONSchemaPropsOrArray::Schema(items)) => in_known_formats(items),
        Some(JSONSchemaPropsOrArray::Schemas(items)) => items.iter_mut().for_each(in_known_formats),
        None => {}
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        in_known_formats(values);
    }
}
