//! `LocalDisk` objects follow what the node found.

use std::collections::BTreeMap;

use lockstep_proto::objects::{DiskPhase, LocalDisk, LocalDiskSpec, LocalDiskStatus};
use lockstep_store::{Error, Store};
use sha2::{Digest, Sha256};

use super::Disks;
use crate::{legs::OVERHEAD, news};

impl Disks {
    /// What the objects should say, by name. Disks that are ours are named by their file system; what is refused has none, and is named
    /// by its node and place.
    fn wanted(&self, node: &str) -> BTreeMap<String, LocalDiskStatus> {
        let ours = self.all().into_iter().map(|disk| {
            let status = LocalDiskStatus {
                identity: Some(disk.identity),
                // What is said to be free, one volume can have.
                capacity_bytes: disk.capacity.saturating_sub(OVERHEAD),
                allocated_bytes: disk.allocated,
                phase: disk.phase,
                message: disk.message,
                conditions: Vec::new(),
            };
            (disk.name, status)
        });
        let refused = self.refused().into_iter().map(|refused| {
            let hash = Sha256::digest(format!("{node}\n{}", refused.path.display()));
            let name = hash.iter().take(8).fold("refused-".to_owned(), |name, byte| format!("{name}{byte:02x}"));
            let status = LocalDiskStatus {
                identity: Some(refused.identity),
                phase: DiskPhase::Refused,
                message: format!("{}: {}", refused.path.display(), refused.message),
                ..LocalDiskStatus::default()
            };
            (name, status)
        });
        ours.chain(refused).collect()
    }

    /// Makes the node's objects say what was found: what is new is created, what changed is written, what is no disk of ours and not
    /// there any more is deleted; what is ours and missing is said to be missing.
    ///
    /// # Errors
    /// The store's first one: what one object meets does not keep the others from being written. Called again, it goes on.
    pub async fn publish<S: Store>(&self, store: &S, node: &str) -> Result<(), Error> {
        // One at a time, or the older look might have the last word.
        let mut published = self.publishing.lock().await;
        let mut wanted = self.wanted(node);
        let all = wanted.clone();
        *published = None;
        let mut result = Ok(());
        // All, or those that are said to be this node's.
        for object in store.list::<LocalDisk>().await?.objects {
            let name = object.metadata.name.clone().unwrap_or_default();
            let said = match wanted.remove(&name) {
                Some(status) => write(store, object, node, status).await,
                None if object.spec.node != node => Ok(()),
                None if object.status.as_ref().is_none_or(|status| matches!(status.phase, DiskPhase::Refused | DiskPhase::Pending)) => {
                    ignore_race(store.delete(&name, Some(&object)).await)
                }
                None => {
                    let mut status = object.status.clone().unwrap_or_default();
                    status.phase = DiskPhase::Failed;
                    status.message = "it is not in this node, or not selected any more: plug it in again, or replace it".into();
                    write(store, object, node, status).await
                }
            };
            result = result.and(go_on(said)?);
        }
        for (name, status) in wanted {
            result = result.and(go_on(write_new(store, &name, node, status).await)?);
        }
        result?;
        *published = Some(all);
        Ok(())
    }

    /// Whether `publish` has nothing new to say. Others may have changed the objects meanwhile.
    pub async fn is_published(&self, node: &str) -> bool {
        self.publishing.lock().await.as_ref() == Some(&self.wanted(node))
    }
}

async fn write_new<S: Store>(store: &S, name: &str, node: &str, status: LocalDiskStatus) -> Result<(), Error> {
    // It may be another node's by now: that one's disk was moved here.
    let object = match store.get(name).await? {
        Some(object) => object,
        None => store.create(LocalDisk::new(name, LocalDiskSpec { node: node.to_owned() })).await?,
    };
    write(store, object, node, status).await
}

async fn write<S: Store>(store: &S, mut object: LocalDisk, node: &str, status: LocalDiskStatus) -> Result<(), Error> {
    // A disk that was moved here from another node.
    if object.spec.node != node {
        object.spec.node = node.to_owned();
        object = store.update(object).await?;
    }
    if object.status.as_ref() != Some(&status) {
        let before = object.status.take().unwrap_or_default().phase;
        object.status = Some(status);
        match store.update_status(object).await {
            Ok(written) => news::tell_of_disk(store, &written, before).await,
            Err(error) => ignore_race(Err(error))?,
        }
    }
    Ok(())
}

/// What is not one object's own keeps the others from being written, too.
fn go_on(said: Result<(), Error>) -> Result<Result<(), Error>, Error> {
    match said {
        Err(error) if error.is_unreachable() => Err(error),
        said => Ok(said),
    }
}

/// Somebody else wrote it: the next round looks again.
fn ignore_race(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::Conflict { .. } | Error::NotFound { .. }) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, sync::Arc};

    use super::*;
    use crate::{disks::Refused, state_dir::StateDir};

    #[tokio::test]
    async fn objects_come_change_and_go_with_what_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let store = lockstep_store::Directory::open(dir.path().join("objects")).unwrap();
        let disks = Disks::new(Arc::new(StateDir::open(dir.path(), false).unwrap()), Vec::new());
        let refuse = |message: &str| {
            let path = PathBuf::from("/dev/sdx");
            let refused = Refused { path: path.clone(), identity: Default::default(), message: message.into() };
            disks.refused.write().unwrap().insert(path, refused);
        };
        refuse("it has ext4");
        disks.publish(&store, "n1").await.unwrap();
        refuse("it has xfs");
        disks.publish(&store, "n1").await.unwrap();
        let [object] = &store.list::<LocalDisk>().await.unwrap().objects[..] else { panic!("one object") };
        let status = object.status.as_ref().unwrap();
        assert_eq!((status.phase, status.message.as_str()), (DiskPhase::Refused, "/dev/sdx: it has xfs"));
        disks.refused.write().unwrap().clear();
        disks.publish(&store, "n2").await.unwrap();
        assert_eq!(store.list::<LocalDisk>().await.unwrap().objects.len(), 1, "another node's is left alone");
        disks.publish(&store, "n1").await.unwrap();
        assert!(store.list::<LocalDisk>().await.unwrap().objects.is_empty());
    }

    #[tokio::test]
    async fn an_object_that_cannot_be_written_keeps_no_other_from_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = lockstep_store::Directory::open(dir.path().join("objects")).unwrap();
        let disks = Disks::new(Arc::new(StateDir::open(dir.path(), false).unwrap()), Vec::new());
        for path in ["/dev/sdx", "/dev/sdy", "/dev/sdz"].map(PathBuf::from) {
            let refused = Refused { path: path.clone(), identity: Default::default(), message: "it has ext4".into() };
            disks.refused.write().unwrap().insert(path, refused);
        }
        let mut names: Vec<String> = disks.wanted("n1").into_keys().collect();
        let broken = names.remove(0);
        std::fs::create_dir_all(dir.path().join("objects/localdisks")).unwrap();
        std::fs::write(dir.path().join(format!("objects/localdisks/{broken}.yaml")), "no object").unwrap();
        disks.publish(&store, "n1").await.unwrap_err();
        let there = store.list::<LocalDisk>().await.unwrap().objects;
        assert_eq!(there.into_iter().filter_map(|object| object.metadata.name).collect::<Vec<_>>(), names);
        assert!(!disks.is_published("n1").await, "it is tried again");
    }
}
