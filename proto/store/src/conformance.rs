//! What every store must do: one test for all of them.

use std::time::Duration;

use crate::{Changes, Error, Object, Store};

/// How the test makes and reads objects of the kind that it is run with.
pub trait Sample: Object {
    /// An object with this name, that says this in its spec.
    fn sample(name: &str, spec: &str) -> Self;
    /// What it says in its spec.
    fn spec(&self) -> &str;
    /// Says something else in its spec.
    fn set_spec(&mut self, spec: &str);
    /// What it says in its status.
    fn status(&self) -> Option<&str>;
    /// Says something in its status.
    fn set_status(&mut self, status: &str);
}

/// Puts an empty store through everything that the crate promises. Panics where it does not hold.
pub async fn check<K: Sample>(store: &impl Store) {
    identity_and_versions::<K>(store).await;
    status_apart::<K>(store).await;
    finalizers::<K>(store).await;
    preconditions::<K>(store).await;
    changes::<K>(store).await;
}

async fn stored<K: Sample>(store: &impl Store, name: &str) -> K {
    store.get(name).await.expect("get").expect("it is there")
}

async fn identity_and_versions<K: Sample>(store: &impl Store) {
    assert!(store.get::<K>("a").await.expect("get").is_none());
    let a = store.create(K::sample("a", "one")).await.expect("create");
    assert!(a.meta().uid.is_some() && a.meta().resource_version.is_some() && a.meta().creation_timestamp.is_some());
    assert!(matches!(store.create(K::sample("a", "two")).await, Err(Error::AlreadyExists { .. })));
    let mut newer = a.clone();
    newer.set_spec("three");
    let newer = store.update(newer).await.expect("update");
    assert_ne!(newer.meta().resource_version, a.meta().resource_version);
    assert!(matches!(store.update(a).await, Err(Error::Conflict { .. })), "an update of what is out of date");
    assert_eq!(stored::<K>(store, "a").await.spec(), "three");
    store.create(K::sample("b", "four")).await.expect("create");
    let names: Vec<_> = store.list::<K>().await.expect("list").objects.iter().map(|object| object.meta().name.clone()).collect();
    assert_eq!(names, [Some("a".into()), Some("b".into())]);
    store.delete::<K>("b", None).await.expect("delete");
    assert!(matches!(store.delete::<K>("b", None).await, Err(Error::NotFound { .. })));
    assert!(matches!(store.update(K::sample("b", "five")).await, Err(Error::NotFound { .. })));
}

async fn status_apart<K: Sample>(store: &impl Store) {
    let mut object = K::sample("s", "spec");
    object.set_status("ignored");
    let mut object = store.create(object).await.expect("create");
    assert_eq!(object.status(), None, "a status is not created");
    object.set_status("fine");
    object.set_spec("not taken");
    let mut object = store.update_status(object).await.expect("update_status");
    assert_eq!((object.spec(), object.status()), ("spec", Some("fine")));
    object.set_status("not taken");
    object.set_spec("new");
    let object = store.update(object).await.expect("update");
    assert_eq!((object.spec(), object.status()), ("new", Some("fine")));
}

async fn finalizers<K: Sample>(store: &impl Store) {
    let mut object = K::sample("f", "spec");
    object.meta_mut().finalizers = Some(vec!["test/hold".into()]);
    store.create(object).await.expect("create");
    store.delete::<K>("f", None).await.expect("delete");
    let mut marked = stored::<K>(store, "f").await;
    assert!(marked.meta().deletion_timestamp.is_some());
    marked.meta_mut().finalizers = None;
    store.update(marked).await.expect("update");
    assert!(store.get::<K>("f").await.expect("get").is_none(), "it goes with its last finalizer");
}

async fn preconditions<K: Sample>(store: &impl Store) {
    let old = store.create(K::sample("p", "one")).await.expect("create");
    let mut new = old.clone();
    new.set_spec("two");
    let new = store.update(new).await.expect("update");
    assert!(matches!(store.delete("p", Some(&old)).await, Err(Error::Conflict { .. })));
    store.delete("p", Some(&new)).await.expect("delete");
    store.create(K::sample("p", "one")).await.expect("create again");
    assert!(matches!(store.update(new).await, Err(Error::Conflict { .. })), "another object of that name");
}

async fn changes<K: Sample>(store: &impl Store) {
    let mut changes = store.changes::<K>().await.expect("changes");
    store.create(K::sample("c", "one")).await.expect("create");
    // Well before the slow relist: the change itself was noticed.
    tokio::time::timeout(Duration::from_secs(5), changes.next()).await.expect("a change is told");
}
