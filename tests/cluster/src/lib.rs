//! The Kubernetes API that `tests/cluster/with-api` started, and what is put into it.

pub mod chart;
pub mod proxy;

use std::{path::PathBuf, time::Duration};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client, Config, ResourceExt,
    api::{Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::wait::{await_condition, conditions},
};
use lockstep_store::Kubernetes;

/// The kubeconfig of the API that the tests run against.
pub fn kubeconfig() -> PathBuf {
    std::env::var_os("KUBECONFIG").map(PathBuf::from).expect("KUBECONFIG: run tests/cluster/with-api cargo test -p lockstep-cluster-tests")
}

/// A client of it.
pub async fn client() -> Client {
    let file = Kubeconfig::read_from(kubeconfig()).expect("a kubeconfig");
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.expect("a context");
    Client::try_from(config).expect("a client")
}

/// The store, as the binaries have it.
pub async fn store() -> Kubernetes {
    Kubernetes::with_kubeconfig(&kubeconfig()).await.expect("a store")
}

/// Makes the API know the definition, and waits until it serves the objects. What it warns of is in its answer's headers, which nobody
/// shows us: what counts is that it says neither NonStructuralSchema nor a conflict of names.
pub async fn define(client: &Client, crd: &CustomResourceDefinition) {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let name = crd.name_any();
    api.patch(&name, &PatchParams::apply("lockstep-tests").force(), &Patch::Apply(crd)).await.expect("the definition is taken");
    let established = await_condition(api.clone(), &name, conditions::is_crd_established());
    tokio::time::timeout(Duration::from_secs(30), established).await.expect("it is served in time").expect("it is served");
    let status = api.get(&name).await.expect("it is there").status.unwrap_or_default();
    for condition in status.conditions.into_iter().flatten() {
        let good = if condition.type_ == "NonStructuralSchema" { "False" } else { "True" };
        assert_eq!(condition.status, good, "{name}: {condition:?}");
    }
}
