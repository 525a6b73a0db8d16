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

/// What a format of text may take for something else, as a name.
const NAMES: [&str; 14] = ["null", "true", "no", "yes", "on", "n", "123", "1e5", "0x1f", "0o17", "007", "1.5", "2026-01-01", "0.0.0.0"];
/// And as a value.
const VALUES: [&str; 45] = [
    "",
    " ",
    "null",
    "~",
    "true",
    "yes",
    "No",
    "123",
    "-1",
    "+1",
    "1e5",
    "1_000",
    "0x1f",
    "007",
    "1.5",
    ".inf",
    ".NaN",
    "2026-01-01",
    "<<",
    "=",
    "# no comment",
    "a # b",
    "a: b",
    "a:",
    ": ",
    "- a",
    "? a",
    "*a",
    "&a",
    "!a",
    "|",
    "{",
    "[]",
    "%a",
    "@a",
    "'\"\\",
    " leading",
    "trailing ",
    "---",
    "...\n",
    "\u{0}\u{1b}\u{7f}\u{85}\u{a0}\u{2028}\u{feff}",
    "\r\n\t",
    "two\n\n  lines\n",
    "\nlines\n\n",
    "🦀 ünï",
];

/// Puts an empty store through everything that the crate promises. Panics where it does not hold. `other` is a second handle on it, as
/// another process has one.
pub async fn check<K: Sample>(store: &impl Store, other: &impl Store) {
    identity_and_versions::<K>(store).await;
    generations::<K>(store).await;
    status_apart::<K>(store).await;
    finalizers::<K>(store).await;
    preconditions::<K>(store).await;
    forgeries::<K>(store).await;
    awkward_strings::<K>(store, other).await;
    changes::<K>(store, store).await;
    changes::<K>(store, other).await;
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

async fn generations<K: Sample>(store: &impl Store) {
    let created = store.create(K::sample("g", "one")).await.expect("create");
    let first = created.meta().generation;
    let mut labelled = created;
    labelled.meta_mut().annotations = Some([("test/a".to_owned(), "b".to_owned())].into());
    labelled.meta_mut().finalizers = Some(vec!["test/hold".into()]);
    let mut object = store.update(labelled).await.expect("update");
    object.set_status("fine");
    let mut object = store.update_status(object).await.expect("update_status");
    assert_eq!(object.meta().generation, first, "the spec is the same");
    object.set_spec("two");
    let object = store.update(object).await.expect("update");
    assert_eq!(object.meta().generation, first.map(|first| first + 1), "the spec is another one");
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
    let mut late = object.clone();
    let mut object = object;
    object.set_status("finer");
    store.update_status(object).await.expect("update_status");
    late.set_status("late");
    assert!(matches!(store.update_status(late).await, Err(Error::Conflict { .. })), "a status of what is out of date");
    assert_eq!(stored::<K>(store, "s").await.status(), Some("finer"));
    assert!(matches!(store.update_status(K::sample("nobody", "")).await, Err(Error::NotFound { .. })));
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

/// What only the store may say is not taken from an update. It may be refused instead.
async fn forgeries<K: Sample>(store: &impl Store) {
    let real = store.create(K::sample("u", "one")).await.expect("create");
    let mut forged = real.clone();
    forged.meta_mut().uid = Some("00000000-0000-0000-0000-000000000000".into());
    assert!(matches!(store.update(forged.clone()).await, Err(Error::Conflict { .. })), "another object's UID");
    assert!(matches!(store.update_status(forged.clone()).await, Err(Error::Conflict { .. })), "another object's UID");
    assert!(matches!(store.delete("u", Some(&forged)).await, Err(Error::Conflict { .. })), "another object's UID");
    let mut forged = real.clone();
    forged.meta_mut().deletion_timestamp = real.meta().creation_timestamp.clone();
    forged.meta_mut().generation = Some(99);
    drop(store.update(forged).await);
    let kept: K = stored(store, "u").await;
    let (kept, real) = (kept.meta(), real.meta());
    assert_eq!((&kept.uid, &kept.deletion_timestamp, kept.generation), (&real.uid, &None, real.generation));
    assert_eq!(kept.creation_timestamp, real.creation_timestamp);
}

/// What was written is read, also by others.
async fn awkward_strings<K: Sample>(store: &impl Store, other: &impl Store) {
    for name in NAMES {
        store.create(K::sample(name, name)).await.expect(name);
        assert_eq!(stored::<K>(other, name).await.spec(), name);
    }
    let long = "word ".repeat(100);
    for value in VALUES.into_iter().chain([long.as_str()]) {
        let mut object = K::sample("w", value);
        object.meta_mut().annotations = Some(NAMES.map(|name| (name.to_owned(), value.to_owned())).into());
        let created = store.create(object).await.expect(value);
        assert_eq!(created.spec(), value);
        let mut object = stored::<K>(other, "w").await;
        assert_eq!((object.spec(), &object.meta().annotations), (value, &created.meta().annotations));
        object.set_status(value);
        other.update_status(object).await.expect(value);
        let object = stored::<K>(store, "w").await;
        assert_eq!((object.spec(), object.status()), (value, Some(value)));
        store.delete("w", Some(&object)).await.expect(value);
    }
}

/// Nothing more is told. What happened just before may still have been on its way.
async fn quiet(changes: &mut impl Changes) {
    for _ in 0..20 {
        if tokio::time::timeout(Duration::from_millis(200), changes.next()).await.is_err() {
            return;
        }
    }
    panic!("changes are told although nothing changes");
}

/// Well before the slow relist: the change itself was noticed.
async fn told(changes: &mut impl Changes, what: &str) {
    tokio::time::timeout(Duration::from_secs(5), changes.next()).await.unwrap_or_else(|_| panic!("{what} is not told"));
}

/// What happens through one handle is told to who waits at the other.
async fn changes<K: Sample>(store: &impl Store, other: &impl Store) {
    let mut changes = store.changes::<K>().await.expect("changes");
    quiet(&mut changes).await;
    let mut object = other.create(K::sample("c", "one")).await.expect("create");
    told(&mut changes, "a creation").await;
    quiet(&mut changes).await;
    object.set_spec("two");
    let mut object = other.update(object).await.expect("update");
    told(&mut changes, "an update").await;
    quiet(&mut changes).await;
    object.set_status("fine");
    other.update_status(object).await.expect("update_status");
    told(&mut changes, "an update of the status").await;
    quiet(&mut changes).await;
    // Who looks changes nothing.
    other.list::<K>().await.expect("list");
    let object: K = stored(other, "c").await;
    assert!(tokio::time::timeout(Duration::from_millis(200), changes.next()).await.is_err(), "a look is told as a change");
    other.delete("c", Some(&object)).await.expect("delete");
    told(&mut changes, "a deletion").await;
}
