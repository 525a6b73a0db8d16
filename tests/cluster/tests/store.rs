//! The Kubernetes API against the conformance test of all stores, and what only it can do.
#![allow(missing_docs)]

use std::collections::BTreeMap;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{CustomResource, CustomResourceExt};
use lockstep_cluster_tests::{client, define, store};
use lockstep_store::{Error, Store, conformance};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(CustomResource, Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[kube(group = "test.lockstep.io", version = "v1", kind = "Note", status = "NoteStatus")]
struct NoteSpec {
    text: String,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
struct NoteStatus {
    text: String,
}

impl conformance::Sample for Note {
    fn sample(name: &str, spec: &str) -> Self {
        Note::new(name, NoteSpec { text: spec.into() })
    }
    fn spec(&self) -> &str {
        &self.spec.text
    }
    fn set_spec(&mut self, spec: &str) {
        self.spec.text = spec.into();
    }
    fn status(&self) -> Option<&str> {
        self.status.as_ref().map(|status| status.text.as_str())
    }
    fn set_status(&mut self, status: &str) {
        self.status.get_or_insert_default().text = status.into();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubernetes_api_keeps_the_promises_of_a_store() {
    define(&client().await, &Note::crd()).await;
    conformance::check::<Note>(&store().await, &store().await).await;
}

/// The same kind as two versions know it; that of the newer one is what the API has.
mod newer {
    use super::*;

    #[derive(CustomResource, Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[kube(group = "test.lockstep.io", version = "v1", kind = "Page", status = "PageStatus")]
    pub struct PageSpec {
        pub text: String,
        pub colour: String,
        #[serde(default)]
        pub margins: BTreeMap<String, u64>,
    }

    #[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
    pub struct PageStatus {
        pub text: String,
        #[serde(default)]
        pub readers: u64,
    }
}

mod older {
    use super::*;

    #[derive(CustomResource, Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[kube(group = "test.lockstep.io", version = "v1", kind = "Page", status = "PageStatus")]
    pub struct PageSpec {
        pub text: String,
        pub colour: Colour,
    }

    #[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema)]
    pub enum Colour {
        White,
    }

    #[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
    pub struct PageStatus {
        pub text: String,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_older_version_does_not_know_is_kept_and_what_it_cannot_read_is_named() {
    define(&client().await, &newer::Page::crd()).await;
    let store = store().await;
    let spec = |colour: &str| newer::PageSpec { text: "one".into(), colour: colour.into(), margins: [("left".to_owned(), 3)].into() };
    let mut page = store.create(newer::Page::new("white", spec("White"))).await.unwrap();
    page.status = Some(newer::PageStatus { text: "new".into(), readers: 7 });
    store.update_status(page).await.unwrap();

    let mut page: older::Page = store.get("white").await.unwrap().unwrap();
    page.spec.text = "two".into();
    let mut page = store.update(page).await.unwrap();
    page.status.as_mut().unwrap().text = "read".into();
    store.update_status(page).await.unwrap();
    let page: newer::Page = store.get("white").await.unwrap().unwrap();
    assert_eq!((page.spec.text.as_str(), page.spec.margins["left"]), ("two", 3));
    assert_eq!(page.status, Some(newer::PageStatus { text: "read".into(), readers: 7 }));

    store.create(newer::Page::new("black", spec("Black"))).await.unwrap();
    let listing = store.list::<older::Page>().await.unwrap();
    assert_eq!(listing.objects.len(), 1);
    let [error @ Error::Unreadable { path, .. }] = &listing.unreadable[..] else { panic!("{:?}", listing.unreadable) };
    assert_eq!(path.to_str(), Some("/apis/test.lockstep.io/v1/pages/black"));
    assert!(error.to_string().contains("Black"), "{error}");
    assert!(matches!(store.get::<older::Page>("black").await, Err(Error::Unreadable { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_in_the_namespace_of_the_kubeconfig_and_another_namespace_can_be_asked() {
    let store = store().await;
    let metadata = ObjectMeta { name: Some("a-node".into()), ..ObjectMeta::default() };
    let spec = |holder: &str| Some(LeaseSpec { holder_identity: Some(holder.into()), ..LeaseSpec::default() });
    let mut lease = store.create(Lease { metadata, spec: spec("one") }).await.unwrap();
    assert_eq!(lease.metadata.namespace.as_deref(), Some("default"));
    lease.spec = spec("two");
    store.update(lease).await.unwrap();
    let lease: Lease = store.get("a-node").await.unwrap().unwrap();
    assert_eq!(lease.spec.and_then(|spec| spec.holder_identity).as_deref(), Some("two"));
    assert_eq!(store.list::<Lease>().await.unwrap().objects.len(), 1);
    assert!(store.get_in::<Lease>("default", "a-node").await.unwrap().is_some());
    assert!(store.get_in::<Lease>("kube-system", "a-node").await.unwrap().is_none());
    store.delete::<Lease>("a-node", None).await.unwrap();
}

/// Absent is only what the API says is absent: without the definition nobody knows.
#[tokio::test(flavor = "multi_thread")]
async fn a_kind_that_the_api_does_not_know_is_an_error_and_no_absent_object() {
    #[derive(CustomResource, Clone, Debug, Deserialize, Serialize, JsonSchema)]
    #[kube(group = "test.lockstep.io", version = "v1", kind = "Stranger")]
    struct StrangerSpec {}

    let store = store().await;
    let error = store.get::<Stranger>("a").await.unwrap_err();
    assert!(matches!(error, Error::Api { .. }) && error.to_string().contains("Stranger"), "{error}");
    assert!(matches!(store.list::<Stranger>().await, Err(Error::Api { .. })));
    assert!(matches!(store.delete::<Stranger>("a", None).await, Err(Error::Api { .. })));
}
