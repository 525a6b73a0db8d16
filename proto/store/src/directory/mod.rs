//! Objects as YAML files: `<root>/<plural>/<name>.yaml`.
//!
//! A lock file serializes writers, of all processes, and tells whether the directory is the one that was opened (`root`). A file is
//! replaced by rename after an fsync, so that a reader sees the old one or the new one, also after a power cut. Fields that this version
//! does not know are kept (`merge`); the part of an object that is not written does not go through this version's types at all.

mod root;
mod watch;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use k8s_openapi::{api::core::v1::ObjectReference, apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use serde_json::Value;

use self::{root::Root, watch::Watches};
use crate::{Changes, Error, Listing, News, Object, Store, is_name, merge};

/// A directory of objects.
#[derive(Clone, Debug)]
pub struct Directory {
    root: Root,
    watches: Watches,
}

impl Directory {
    /// Opens it; makes it if it is not there. If it is not there later on, or another one is in its place, that is an error of each call.
    ///
    /// # Errors
    /// `Error::Io`.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, Error> {
        Ok(Self { root: Root::open(root.into())?, watches: Watches::default() })
    }

    fn kind_dir<K: Object>(&self) -> PathBuf {
        self.root.kind(&K::plural(&()))
    }

    fn path<K: Object>(&self, name: &str) -> PathBuf {
        self.kind_dir::<K>().join(format!("{name}.yaml"))
    }

    /// Changes one object under the lock. `change` gets what is stored and says what is to be stored; `None`: nothing is left.
    async fn change<K: Object>(
        &self,
        name: String,
        change: impl FnOnce(Option<Stored<K>>) -> Result<Option<Value>, Error> + Send + 'static,
    ) -> Result<Option<K>, Error> {
        let store = self.clone();
        blocking(move || {
            check_name(&name)?;
            let path = store.path::<K>(&name);
            let lock = store.root.lock()?;
            let stored = read::<K>(&path)?;
            let existed = stored.is_some();
            let Some(mut changed) = change(stored)? else {
                if existed {
                    fs::remove_file(&path)
                        .and_then(|()| root::sync(&store.kind_dir::<K>()))
                        .map_err(|source| failed("removing", &path, source))?;
                }
                return Ok(None);
            };
            let version = changed["metadata"]["resourceVersion"].as_str().and_then(|version| version.parse::<u64>().ok()).unwrap_or(0);
            changed["metadata"]["resourceVersion"] = (version + 1).to_string().into();
            let object = decode(changed.clone())?;
            if !existed {
                store.root.make_kind(&K::plural(&()), &lock)?;
            }
            write(&path, &changed)?;
            Ok(Some(object))
        })
        .await
    }
}

/// An object of a file: as this version knows it, and all of it.
struct Stored<K> {
    object: K,
    all: Value,
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Io { what: "working on the object directory".into(), source: io::Error::other(error) }),
    }
}

fn failed(doing: &str, path: &Path, source: io::Error) -> Error {
    Error::Io { what: format!("{doing} {}", path.display()), source }
}

/// Also what keeps a name inside the directory.
fn check_name(name: &str) -> Result<(), Error> {
    if is_name(name) { Ok(()) } else { Err(Error::Name { name: name.into() }) }
}

fn read<K: Object>(path: &Path) -> Result<Option<Stored<K>>, Error> {
    let unreadable = |reason: String| Error::Unreadable { path: path.to_owned(), reason };
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // Not UTF-8. All else may pass (no file handle, an I/O error), and no repair of the file would help.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(unreadable(error.to_string())),
        Err(source) => return Err(failed("reading", path, source)),
    };
    // `name: n` is a name, and no boolean of YAML 1.1.
    let options = serde_saphyr::options! { strict_booleans: true };
    let all: Value = serde_saphyr::from_str_with_options(&text, options).map_err(|error| unreadable(error.to_string()))?;
    let object: K = serde_json::from_value(all.clone()).map_err(|error| unreadable(error.to_string()))?;
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    if object.meta().name != name {
        return Err(unreadable(format!("metadata.name is {:?}, but the file is another's", object.meta().name)));
    }
    Ok(Some(Stored { object, all }))
}

fn write(path: &Path, object: &Value) -> Result<(), Error> {
    let invalid = |reason: String| failed("encoding", path, io::Error::new(io::ErrorKind::InvalidData, reason));
    let text = serde_saphyr::to_string(object).map_err(|error| invalid(error.to_string()))?;
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(root::TEMPORARY).tempfile_in(dir).map_err(|source| failed("writing in", dir, source))?;
    file.write_all(text.as_bytes()).and_then(|()| file.as_file().sync_all()).map_err(|source| failed("writing", path, source))?;
    file.persist(path).map_err(|error| failed("writing", path, error.error))?;
    root::sync(dir).map_err(|source| failed("syncing", dir, source))
}

fn kind_and_name<K: Object>(name: &str) -> (String, String) {
    (K::kind(&()).into_owned(), name.to_owned())
}

fn name_of<K: Object>(object: &K) -> String {
    object.meta().name.clone().unwrap_or_default()
}

/// What is stored, if `object` was made from it.
fn current<K: Object>(stored: Option<Stored<K>>, object: &K) -> Result<Stored<K>, Error> {
    let (kind, name) = kind_and_name::<K>(&name_of(object));
    let Some(stored) = stored else { return Err(Error::NotFound { kind, name }) };
    let (is, was) = (stored.object.meta(), object.meta());
    if is.uid == was.uid && is.resource_version == was.resource_version { Ok(stored) } else { Err(Error::Conflict { kind, name }) }
}

fn encode<K: Object>(object: &K) -> Result<Value, Error> {
    serde_json::to_value(object).map_err(|error| Error::Io { what: format!("encoding {}", K::kind(&())), source: error.into() })
}

fn decode<K: Object>(value: Value) -> Result<K, Error> {
    serde_json::from_value(value).map_err(|error| Error::Io { what: format!("encoding {}", K::kind(&())), source: error.into() })
}

/// Makes a field what it is in `from`: also absent.
fn take_over(value: &mut Value, field: &str, from: &Value) {
    if let Value::Object(fields) = value {
        match from.get(field) {
            Some(from) => drop(fields.insert(field.to_owned(), from.clone())),
            None => drop(fields.remove(field)),
        }
    }
}

/// Whether two objects ask for the same: all that is neither metadata nor status.
fn same_spec(one: &Value, other: &Value) -> bool {
    let spec = |object: &Value| {
        let mut spec = object.clone();
        for field in ["metadata", "status"] {
            take_over(&mut spec, field, &Value::Null);
        }
        spec
    };
    spec(one) == spec(other)
}

fn gone<K: Object>(object: &K) -> bool {
    let meta = object.meta();
    meta.deletion_timestamp.is_some() && meta.finalizers.as_ref().is_none_or(Vec::is_empty)
}

impl Store for Directory {
    async fn get<K: Object>(&self, name: &str) -> Result<Option<K>, Error> {
        let (store, name) = (self.clone(), name.to_owned());
        blocking(move || {
            check_name(&name)?;
            let stored = read(&store.path::<K>(&name))?;
            store.root.check()?;
            Ok(stored.map(|stored| stored.object))
        })
        .await
    }

    async fn get_in<K: Object>(&self, _: &str, name: &str) -> Result<Option<K>, Error> {
        self.get(name).await
    }

    async fn list<K: Object>(&self) -> Result<Listing<K>, Error> {
        let store = self.clone();
        blocking(move || {
            let dir = store.kind_dir::<K>();
            let entries = match fs::read_dir(&dir).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
                // There was no object of this kind yet.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
                entries => entries.map_err(|source| failed("reading", &dir, source))?,
            };
            let mut paths: Vec<PathBuf> = entries.iter().map(|entry| entry.path()).collect();
            let hidden = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            paths.retain(|path| path.extension().is_some_and(|extension| extension == "yaml") && !hidden(path));
            paths.sort();
            let mut listing = Listing { objects: Vec::new(), unreadable: Vec::new() };
            for path in paths {
                match read(&path) {
                    Ok(Some(stored)) => listing.objects.push(stored.object),
                    // It was deleted in between.
                    Ok(None) => {}
                    Err(error @ Error::Unreadable { .. }) => listing.unreadable.push(error),
                    Err(error) => return Err(error),
                }
            }
            store.root.check()?;
            Ok(listing)
        })
        .await
    }

    async fn create<K: Object>(&self, object: K) -> Result<K, Error> {
        let name = name_of(&object);
        let (kind, wanted) = kind_and_name::<K>(&name);
        let created = self.change(name, move |stored: Option<Stored<K>>| {
            if stored.is_some() {
                return Err(Error::AlreadyExists { kind, name: wanted });
            }
            let mut bare = object;
            let meta = bare.meta_mut();
            meta.uid = Some(uuid::Uuid::new_v4().to_string());
            meta.resource_version = None;
            meta.generation = Some(1);
            meta.creation_timestamp = Some(Time(Timestamp::now()));
            meta.deletion_timestamp = None;
            let mut all = encode(&bare)?;
            take_over(&mut all, "status", &Value::Null);
            Ok(Some(all))
        });
        created.await.map(|object| object.expect("an object was stored"))
    }

    async fn update<K: Object>(&self, object: K) -> Result<K, Error> {
        let returned = object.clone();
        let updated = self.change(name_of(&object), move |stored| {
            let Stored { object: stored, all } = current(stored, &object)?;
            let (known, new) = (encode(&stored)?, encode(&object)?);
            let changed = !same_spec(&known, &new);
            let mut new = merge::merged(&all, &known, new);
            take_over(&mut new, "status", &all);
            for field in ["uid", "resourceVersion", "creationTimestamp", "deletionTimestamp", "generation"] {
                take_over(&mut new["metadata"], field, &all["metadata"]);
            }
            if let (true, Some(generation)) = (changed, stored.meta().generation) {
                new["metadata"]["generation"] = (generation + 1).into();
            }
            Ok((!gone(&decode::<K>(new.clone())?)).then_some(new))
        });
        Ok(updated.await?.unwrap_or(returned))
    }

    async fn update_status<K: Object>(&self, object: K) -> Result<K, Error> {
        let updated = self.change(name_of(&object), move |stored| {
            let Stored { object: stored, mut all } = current(stored, &object)?;
            let (known, new) = (encode(&stored)?, encode(&object)?);
            // Of all that is merged only the status is taken.
            let merged = merge::merged(&all, &known, new);
            take_over(&mut all, "status", &merged);
            Ok(Some(all))
        });
        updated.await.map(|object| object.expect("an object was stored"))
    }

    async fn delete<K: Object>(&self, name: &str, unchanged: Option<&K>) -> Result<(), Error> {
        let unchanged = unchanged.cloned();
        let (kind, wanted) = kind_and_name::<K>(name);
        let deleted = self.change(name.to_owned(), move |stored: Option<Stored<K>>| {
            let Stored { object: mut stored, mut all } = match unchanged {
                Some(object) => current(stored, &object)?,
                None => stored.ok_or(Error::NotFound { kind, name: wanted })?,
            };
            stored.meta_mut().deletion_timestamp.get_or_insert_with(|| Time(Timestamp::now()));
            take_over(&mut all["metadata"], "deletionTimestamp", &encode(&stored)?["metadata"]);
            Ok((!gone(&stored)).then_some(all))
        });
        deleted.await.map(drop)
    }

    /// Nobody reads events in a directory: the log has them.
    async fn tell(&self, _: &ObjectReference, _: &News) -> Result<(), Error> {
        Ok(())
    }

    async fn changes<K: Object>(&self) -> Result<impl Changes, Error> {
        let store = self.clone();
        blocking(move || {
            let dir = store.kind_dir::<K>();
            store.root.make_kind(&K::plural(&()), &store.root.lock()?)?;
            store.watches.changes(&K::plural(&()), &dir)
        })
        .await
    }
}
