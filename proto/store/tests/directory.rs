//! The directory against the conformance test, and what only files can do.
#![allow(missing_docs)]

use std::{fs, time::Duration};

use kube::CustomResource;
use lockstep_store::{Changes, Directory, Error, Store, conformance};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(CustomResource, Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[kube(group = "test.lockstep.io", version = "v1", kind = "Note", status = "NoteStatus")]
struct NoteSpec {
    text: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    place: Option<Place>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    lines: Vec<Line>,
}

#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
struct Place {
    shelf: String,
}

#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
struct Line {
    name: String,
    length: u64,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
struct NoteStatus {
    text: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    lines: Vec<Line>,
}

impl conformance::Sample for Note {
    fn sample(name: &str, spec: &str) -> Self {
        Note::new(name, NoteSpec { text: spec.into(), place: None, lines: Vec::new() })
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

fn note(name: &str) -> Note {
    conformance::Sample::sample(name, "x")
}

#[tokio::test]
async fn a_directory_keeps_the_promises_of_a_store() {
    let dir = tempfile::tempdir().unwrap();
    conformance::check::<Note>(&Directory::open(dir.path()).unwrap(), &Directory::open(dir.path()).unwrap()).await;
}

#[tokio::test]
async fn an_unreadable_file_is_named_and_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let store = Directory::open(dir.path()).unwrap();
    store.create(note("good")).await.unwrap();
    let bad = dir.path().join("notes/bad.yaml");
    fs::write(&bad, "spec: [unclosed").unwrap();
    let listing = store.list::<Note>().await.unwrap();
    assert_eq!(listing.objects.len(), 1);
    assert!(listing.unreadable[0].to_string().contains("bad.yaml"), "{}", listing.unreadable[0]);
    assert!(matches!(store.get::<Note>("bad").await, Err(Error::Unreadable { .. })));
    assert!(matches!(store.create(note("bad")).await, Err(Error::Unreadable { .. })));
    assert!(matches!(store.delete::<Note>("bad", None).await, Err(Error::Unreadable { .. })));
    assert_eq!(fs::read_to_string(bad).unwrap(), "spec: [unclosed");
}

#[tokio::test]
async fn only_what_is_in_a_file_makes_it_unreadable() {
    let dir = tempfile::tempdir().unwrap();
    let store = Directory::open(dir.path()).unwrap();
    store.create(note("good")).await.unwrap();
    let path = dir.path().join("notes/n.yaml");
    let other = fs::read_to_string(dir.path().join("notes/good.yaml")).unwrap();
    for content in [&b"\xff\xfe"[..], b"spec: [unclosed", b"spec: {text: 1}", b"", other.as_bytes()] {
        fs::write(&path, content).unwrap();
        assert!(matches!(store.get::<Note>("n").await, Err(Error::Unreadable { .. })), "{content:?}");
        assert_eq!(store.list::<Note>().await.unwrap().unreadable.len(), 1);
    }
    fs::remove_file(&path).unwrap();
    // What the system says of a file is not about its content.
    std::os::unix::fs::symlink(&path, &path).unwrap();
    assert!(matches!(store.get::<Note>("n").await, Err(Error::Io { .. })));
    assert!(matches!(store.create(note("n")).await, Err(Error::Io { .. })));
    assert!(matches!(store.list::<Note>().await, Err(Error::Io { .. })));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(store.delete::<Note>("n", None).await, Err(Error::Io { .. })));
    assert!(matches!(store.list::<Note>().await, Err(Error::Io { .. })));
}

/// What each operation says of a directory that is not there.
async fn all_fail(store: &Directory, stored: &Note) {
    let io = |error: &Error| assert!(matches!(error, Error::Io { .. }), "{error}");
    io(&store.get::<Note>("n").await.unwrap_err());
    io(&store.list::<Note>().await.unwrap_err());
    io(&store.delete::<Note>("n", None).await.unwrap_err());
    io(&store.delete("n", Some(stored)).await.unwrap_err());
    io(&store.create(note("m")).await.unwrap_err());
    io(&store.update(stored.clone()).await.unwrap_err());
    io(&store.update_status(stored.clone()).await.unwrap_err());
    io(&store.changes::<Note>().await.err().unwrap());
}

#[tokio::test]
async fn a_directory_that_is_moved_away_is_not_taken_for_an_empty_one() {
    let dir = tempfile::tempdir().unwrap();
    let (path, away) = (dir.path().join("made/on/the/way"), dir.path().join("away"));
    let store = Directory::open(&path).unwrap();
    assert!(store.get::<Note>("n").await.unwrap().is_none());
    assert!(store.list::<Note>().await.unwrap().objects.is_empty());
    let stored = store.create(note("n")).await.unwrap();
    fs::rename(&path, &away).unwrap();
    all_fail(&store, &stored).await;
    assert!(!path.exists(), "it is not made again");
    fs::create_dir(&path).unwrap();
    all_fail(&store, &stored).await;
    assert_eq!(fs::read_dir(&path).unwrap().count(), 0, "nothing is made in what is in its place");
    // Another directory of objects, as one that was made before a file system was mounted over it.
    let other = Directory::open(&path).unwrap();
    all_fail(&store, &stored).await;
    let twin = other.create(note("n")).await.unwrap();
    all_fail(&store, &twin).await;
    fs::remove_dir_all(&path).unwrap();
    fs::rename(&away, &path).unwrap();
    store.delete("n", Some(&stored)).await.unwrap();
    assert!(store.get::<Note>("n").await.unwrap().is_none());
}

fn inotify_instances() -> usize {
    let handles = fs::read_dir("/proc/self/fd").unwrap().flatten();
    handles.filter(|handle| fs::read_link(handle.path()).is_ok_and(|file| file.to_string_lossy().contains("inotify"))).count()
}

/// Before the slow relist.
async fn told(changes: &mut impl Changes) {
    tokio::time::timeout(Duration::from_secs(5), changes.next()).await.unwrap();
}

#[tokio::test]
async fn any_number_of_calls_can_wait_at_once_and_each_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let store = Directory::open(dir.path()).unwrap();
    let mut waiting = Vec::new();
    for _ in 0..500 {
        waiting.push(store.changes::<Note>().await.unwrap());
    }
    // The other tests of this process have a few.
    assert!(inotify_instances() < 50, "{}", inotify_instances());
    store.create(note("n")).await.unwrap();
    for changes in &mut waiting {
        told(changes).await;
    }
}

#[tokio::test]
async fn a_directory_of_a_kind_that_was_replaced_is_watched_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Directory::open(dir.path()).unwrap();
    let mut old = store.changes::<Note>().await.unwrap();
    fs::rename(dir.path().join("notes"), dir.path().join("away")).unwrap();
    let mut new = store.changes::<Note>().await.unwrap();
    // What was told of the move itself does not count.
    while tokio::time::timeout(Duration::from_millis(300), old.next()).await.is_ok() {}
    while tokio::time::timeout(Duration::from_millis(1), new.next()).await.is_ok() {}
    store.create(note("n")).await.unwrap();
    told(&mut new).await;
    told(&mut old).await;
}

/// As a later version may have written it.
const LATER: &str = r#"
apiVersion: test.lockstep.io/v1
kind: Note
later: [1, {deep: 2}]
metadata: {name: n, uid: u, resourceVersion: "7", generation: 3, later: m}
spec:
  text: x
  later: {deep: 2}
  place: {shelf: top, later: p}
  lines: [{name: a, length: 1, later: sa}, {name: b, length: 2, later: sb}]
status:
  text: fine
  later: {deep: [{}]}
  lines: [{name: a, length: 1, later: ta}, {name: b, length: 2, later: tb}]
"#;

/// A store whose object `n` a later version wrote, and the file as it is now.
fn later() -> (tempfile::TempDir, Directory, impl Fn() -> Value) {
    let dir = tempfile::tempdir().unwrap();
    let store = Directory::open(dir.path()).unwrap();
    let path = dir.path().join("notes/n.yaml");
    fs::create_dir(dir.path().join("notes")).unwrap();
    fs::write(&path, LATER).unwrap();
    let options = || serde_saphyr::options! { strict_booleans: true };
    (dir, store, move || serde_saphyr::from_str_with_options(&fs::read_to_string(&path).unwrap(), options()).unwrap())
}

#[tokio::test]
async fn an_update_keeps_the_fields_that_this_version_does_not_know_and_the_status_as_it_is() {
    let (_dir, store, file) = later();
    let mut wanted = file();
    let mut object = store.get::<Note>("n").await.unwrap().unwrap();
    object.spec.text = "changed".into();
    object.spec.lines.swap(0, 1);
    object.spec.lines.push(Line { name: "c".into(), length: 3 });
    object.status = None;
    store.update(object).await.unwrap();
    wanted["metadata"]["resourceVersion"] = "8".into();
    wanted["metadata"]["generation"] = 4.into();
    wanted["spec"]["text"] = "changed".into();
    wanted["spec"]["lines"] = json!([
        {"name": "b", "length": 2, "later": "sb"}, {"name": "a", "length": 1, "later": "sa"}, {"name": "c", "length": 3}
    ]);
    assert_eq!(file(), wanted);
}

#[tokio::test]
async fn a_field_that_is_taken_away_goes_with_all_that_is_in_it() {
    let (_dir, store, file) = later();
    let mut object = store.get::<Note>("n").await.unwrap().unwrap();
    object.spec.place = None;
    object.spec.lines.remove(0);
    let mut object = store.update(object).await.unwrap();
    assert_eq!(file()["spec"], json!({"text": "x", "later": {"deep": 2}, "lines": [{"name": "b", "length": 2, "later": "sb"}]}));
    object.status = None;
    store.update_status(object).await.unwrap();
    assert_eq!(file().get("status"), None);
}

#[tokio::test]
async fn an_update_of_the_status_and_a_deletion_keep_all_else_as_it_is() {
    let (_dir, store, file) = later();
    let mut wanted = file();
    let mut object = store.get::<Note>("n").await.unwrap().unwrap();
    object.spec.lines.clear();
    object.spec.place = None;
    object.status.as_mut().unwrap().lines[1].length = 9;
    let mut object = store.update_status(object).await.unwrap();
    wanted["metadata"]["resourceVersion"] = "8".into();
    wanted["status"]["lines"][1]["length"] = 9.into();
    assert_eq!(file(), wanted);
    object.metadata.finalizers = Some(vec!["test/hold".into()]);
    let object = store.update(object).await.unwrap();
    store.delete("n", Some(&object)).await.unwrap();
    wanted["metadata"]["resourceVersion"] = "10".into();
    wanted["metadata"]["finalizers"] = json!(["test/hold"]);
    wanted["metadata"]["deletionTimestamp"] = file()["metadata"]["deletionTimestamp"].clone();
    assert!(wanted["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(file(), wanted);
}

#[tokio::test]
async fn what_killed_writers_left_is_removed_and_what_others_put_there_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = Directory::open(dir.path()).unwrap();
    store.create(note("n")).await.unwrap();
    let names = || {
        let mut names: Vec<_> = fs::read_dir(dir.path().join("notes")).unwrap().map(|file| file.unwrap().file_name()).collect();
        names.sort();
        names
    };
    for file in [".writing-abc123", ".n.yaml.swp", "readme"] {
        fs::write(dir.path().join("notes").join(file), "x").unwrap();
    }
    Directory::open(dir.path()).unwrap();
    assert_eq!(names(), [".n.yaml.swp", "n.yaml", "readme"]);
    assert_eq!(store.list::<Note>().await.unwrap().objects.len(), 1);
}

#[tokio::test]
async fn a_name_cannot_leave_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let store = Directory::open(dir.path()).unwrap();
    for name in ["", "../x", "a/b", ".hidden", "UPPER", "a..b", "-a", &"a".repeat(254)] {
        assert!(matches!(store.create(note(name)).await, Err(Error::Name { .. })), "{name:?}");
    }
}

#[tokio::test]
async fn writers_at_once_lose_no_update() {
    let dir = tempfile::tempdir().unwrap();
    Directory::open(dir.path()).unwrap().create(note("n")).await.unwrap();
    let add = |_| {
        let store = Directory::open(dir.path()).unwrap();
        tokio::spawn(async move {
            loop {
                let mut object = store.get::<Note>("n").await.unwrap().unwrap();
                object.spec.text.push('x');
                match store.update(object).await {
                    Ok(_) => return,
                    Err(Error::Conflict { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        })
    };
    for task in (0..16).map(add).collect::<Vec<_>>() {
        task.await.unwrap();
    }
    assert_eq!(Directory::open(dir.path()).unwrap().get::<Note>("n").await.unwrap().unwrap().spec.text.len(), 17);
}
