//! Stores that break a promise: the conformance test must notice each.
#![allow(missing_docs)]

use std::{future, time::Duration};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::CustomResource;
use lockstep_store::{Changes, Directory, Error, Listing, News, Object, Store, conformance};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(CustomResource, Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[kube(group = "test.lockstep.io", version = "v1", kind = "Slip", status = "SlipStatus")]
struct SlipSpec {
    text: String,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
struct SlipStatus {
    text: String,
}

impl conformance::Sample for Slip {
    fn sample(name: &str, spec: &str) -> Self {
        Slip::new(name, SlipSpec { text: spec.into() })
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
        self.status = Some(SlipStatus { text: status.into() });
    }
}

/// What it does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Breaks {
    Nothing,
    /// `next` ends at once, always.
    Hasty,
    /// `next` ends only with the slow relist.
    Deaf,
    /// The last status wins.
    StatusWins,
    /// A status makes the object that it is for.
    StatusCreates,
    /// The last update wins.
    UpdateWins,
    /// A UID in an update is not compared.
    AnyUid,
    /// Each write makes the generation grow.
    Growing,
    /// Values lose the blanks around them.
    Trims,
}

struct Broken {
    store: Directory,
    breaks: Breaks,
}

enum BrokenChanges<C> {
    Whole(C),
    Hasty,
    Deaf,
}

impl<C: Changes> Changes for BrokenChanges<C> {
    async fn next(&mut self) {
        match self {
            Self::Whole(changes) => changes.next().await,
            Self::Hasty => tokio::task::yield_now().await,
            Self::Deaf => future::pending().await,
        }
    }
}

impl Broken {
    /// With what is stored in the place of what an update was made from.
    async fn latest<K: Object>(&self, mut object: K) -> K {
        if let Ok(Some(stored)) = self.store.get::<K>(object.meta().name.as_deref().unwrap()).await {
            object.meta_mut().resource_version = stored.meta().resource_version.clone();
            object.meta_mut().uid = stored.meta().uid.clone();
        }
        object
    }

    /// What is told of an object.
    fn told<K: Object>(&self, mut object: K) -> K {
        if self.breaks == Breaks::Growing {
            let version = object.meta().resource_version.as_ref().and_then(|version| version.parse().ok());
            object.meta_mut().generation = version;
        }
        if self.breaks == Breaks::Trims {
            let mut value = serde_json::to_value(&object).unwrap();
            if let Some(text) = value["spec"]["text"].as_str() {
                value["spec"]["text"] = text.trim().into();
            }
            object = serde_json::from_value(value).unwrap();
        }
        object
    }
}

impl Store for Broken {
    async fn get<K: Object>(&self, name: &str) -> Result<Option<K>, Error> {
        Ok(self.store.get(name).await?.map(|object| self.told(object)))
    }
    async fn get_in<K: Object>(&self, namespace: &str, name: &str) -> Result<Option<K>, Error> {
        self.store.get_in(namespace, name).await
    }
    async fn list<K: Object>(&self) -> Result<Listing<K>, Error> {
        self.store.list().await
    }
    async fn create<K: Object>(&self, object: K) -> Result<K, Error> {
        Ok(self.told(self.store.create(object).await?))
    }
    async fn update<K: Object>(&self, object: K) -> Result<K, Error> {
        let stored = self.store.get::<K>(object.meta().name.as_deref().unwrap()).await?;
        let known = stored.is_some_and(|stored| stored.meta().resource_version == object.meta().resource_version);
        let wins = self.breaks == Breaks::UpdateWins || (self.breaks == Breaks::AnyUid && known);
        let object = if wins { self.latest(object).await } else { object };
        Ok(self.told(self.store.update(object).await?))
    }
    async fn update_status<K: Object>(&self, object: K) -> Result<K, Error> {
        let object = if self.breaks == Breaks::StatusWins { self.latest(object).await } else { object };
        match self.store.update_status(object.clone()).await {
            Err(Error::NotFound { .. }) if self.breaks == Breaks::StatusCreates => self.store.create(object).await,
            updated => Ok(self.told(updated?)),
        }
    }
    async fn delete<K: Object>(&self, name: &str, unchanged: Option<&K>) -> Result<(), Error> {
        self.store.delete(name, unchanged).await
    }
    async fn tell(&self, about: &ObjectReference, news: &News) -> Result<(), Error> {
        self.store.tell(about, news).await
    }
    async fn changes<K: Object>(&self) -> Result<impl Changes, Error> {
        Ok(match self.breaks {
            Breaks::Hasty => BrokenChanges::Hasty,
            Breaks::Deaf => BrokenChanges::Deaf,
            _ => BrokenChanges::Whole(self.store.changes::<K>().await?),
        })
    }
}

/// Whether a store that does this wrong passes.
async fn passes(breaks: Breaks) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let handle = || Broken { store: Directory::open(dir.path()).unwrap(), breaks };
    let (store, other) = (handle(), handle());
    let checked = tokio::spawn(async move { conformance::check::<Slip>(&store, &other).await });
    tokio::time::timeout(Duration::from_secs(120), checked).await.unwrap().is_ok()
}

#[tokio::test]
async fn the_conformance_test_notices_each_broken_promise() {
    assert!(passes(Breaks::Nothing).await);
    for breaks in [
        Breaks::Hasty,
        Breaks::Deaf,
        Breaks::StatusWins,
        Breaks::StatusCreates,
        Breaks::UpdateWins,
        Breaks::AnyUid,
        Breaks::Growing,
        Breaks::Trims,
    ] {
        assert!(!passes(breaks).await, "{breaks:?} is not noticed");
    }
}
