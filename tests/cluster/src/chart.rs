//! The chart, as helm renders it.

use std::{
    fmt::Debug,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use k8s_openapi::api::{
    authentication::v1::TokenRequest,
    core::v1::{Namespace, ServiceAccount},
};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams, ValidationDirective},
    discovery::{self, Scope},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

/// The release.
pub const RELEASE: &str = "lockstep";
/// Its namespace.
pub const NAMESPACE: &str = "lockstep-system";

/// Makes the release's namespace, if it is not there, and what a controller manager would make in it: the account of pods that name none,
/// without which the API takes no pod.
pub async fn make_namespace(client: &Client) {
    make(&Api::<Namespace>::all(client.clone()), json!({"metadata": {"name": NAMESPACE}})).await;
    make(&Api::<ServiceAccount>::namespaced(client.clone(), NAMESPACE), json!({"metadata": {"name": "default"}})).await;
}

async fn make<K: Clone + Debug + Serialize + DeserializeOwned>(api: &Api<K>, object: Value) {
    match api.create(&PostParams::default(), &serde_json::from_value(object).expect("an object")).await {
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
        made => drop(made.expect("it is made")),
    }
}

/// What helm makes of the chart with these `--set` arguments; or what it has against them.
///
/// # Errors
/// What helm says.
pub fn rendered(settings: &[&str]) -> Result<Vec<Value>, String> {
    let helm = std::env::var_os("HELM").expect("HELM: run tests/cluster/run, or set it to what tests/helm/build prints");
    let mut command = Command::new(helm);
    command.args(["template", RELEASE, "--namespace", NAMESPACE, concat!(env!("CARGO_MANIFEST_DIR"), "/../../charts/lockstep")]);
    let output = command.args(settings.iter().flat_map(|setting| ["--set", setting])).output().expect("helm starts");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8(output.stdout).expect("text");
    let documents = text.split("\n---\n").map(|document| serde_saphyr::from_str::<Value>(document).expect("YAML"));
    Ok(documents.filter(|document| !document.is_null()).collect())
}

/// Writes a kubeconfig of one of the chart's service accounts, whose rights the API must have, into `dir`. Its path.
pub async fn kubeconfig_of(client: &Client, account: &str, dir: &Path) -> PathBuf {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
    let request = accounts.create_token_request(account, &PostParams::default(), &TokenRequest::default()).await.expect("a token");
    let mut config: Value = serde_saphyr::from_str(&fs::read_to_string(crate::kubeconfig()).expect("a kubeconfig")).expect("YAML");
    config["users"][0]["user"] = json!({"token": request.status.expect("it is granted").token});
    config["contexts"][0]["context"]["namespace"] = NAMESPACE.into();
    let path = dir.join(format!("{account}.kubeconfig"));
    fs::write(&path, serde_saphyr::to_string(&config).expect("YAML")).expect("a kubeconfig");
    path
}

/// Gives an object to the API, which takes no field that it does not know.
///
/// # Errors
/// What the API says.
pub async fn apply(client: &Client, object: &Value, dry_run: bool) -> kube::Result<DynamicObject> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let (group, version) = version.split_once('/').unwrap_or(("", &version));
    let (resource, capabilities): (ApiResource, _) = discovery::pinned_kind(client, &GroupVersionKind::gvk(group, version, &kind)).await?;
    let api: Api<DynamicObject> = match (&object["metadata"]["namespace"], capabilities.scope) {
        (Value::String(namespace), Scope::Namespaced) => Api::namespaced_with(client.clone(), namespace, &resource),
        (Value::Null, Scope::Cluster) => Api::all_with(client.clone(), &resource),
        (namespace, scope) => panic!("{kind} has namespace {namespace}, and its scope is {scope:?}"),
    };
    let params =
        PatchParams { dry_run, force: true, field_manager: Some("helm".into()), field_validation: Some(ValidationDirective::Strict) };
    api.patch(&text(&object["metadata"]["name"]), &params, &Patch::Apply(object)).await
}
