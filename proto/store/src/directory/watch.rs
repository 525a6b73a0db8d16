//! Who waits for changes shares one inotify instance for each kind: a user has 128 of them by default, and each call waits.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::watch::Sender;

use super::failed;
use crate::{Error, told::Told};

/// Changes that inotify did not tell of are seen after this.
const RELIST: Duration = Duration::from_secs(10);

/// What is watched, by kind.
#[derive(Clone, Debug, Default)]
pub(super) struct Watches(Arc<Mutex<BTreeMap<String, Watch>>>);

#[derive(Debug)]
struct Watch {
    sender: Sender<()>,
    /// Device and inode of the directory.
    of: (u64, u64),
    _watcher: RecommendedWatcher,
}

impl Watches {
    /// Changes in the directory of a kind, which must be there. The first one who asks starts the watch; it lasts.
    pub(super) fn changes(&self, kind: &str, dir: &Path) -> Result<Told<Self>, Error> {
        let metadata = fs::metadata(dir).map_err(|source| failed("looking at", dir, source))?;
        let of = (metadata.dev(), metadata.ino());
        let mut watches = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = watches.get(kind);
        let sender = known.map_or_else(|| Sender::new(()), |watch| watch.sender.clone());
        if known.is_none_or(|watch| watch.of != of) {
            // Another directory is in its place now. Those who wait already are told of changes in this one, too.
            let _watcher = watch(dir, sender.clone()).map_err(|error| failed("watching", dir, io::Error::other(error)))?;
            watches.insert(kind.to_owned(), Watch { sender: sender.clone(), of, _watcher });
        }
        drop(watches);
        Ok(Told { relist: RELIST, receiver: sender.subscribe(), _watches: self.clone() })
    }
}

fn watch(dir: &Path, sender: Sender<()>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // What is only read does not count, or every list would be a change.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            sender.send_replace(());
        }
    })?;
    watcher.watch(dir, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}
