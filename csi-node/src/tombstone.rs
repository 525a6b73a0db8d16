//! Volumes that were deleted while one of their disks was away: the copy there goes when the disk comes back. Legs of volumes that nobody
//! deleted are never touched, whatever the objects say.

use std::{collections::BTreeSet, fs, sync::Arc};

use lockstep_store::Store;
use tracing::{info, warn};

use crate::{
    legs,
    node::Node,
    state_dir::{self, StateDir, StateError},
};

/// Remembers, durably, that the volume was deleted.
pub(crate) fn write(state: &StateDir, uid: &str) -> Result<(), StateError> {
    state_dir::write_record(&state.deleted(uid), &uid)
}

impl<S: Store> Node<S> {
    /// Removes what is left of deleted volumes on disks that came back.
    pub async fn sweep(self: &Arc<Self>) {
        let node = Arc::clone(self);
        let swept = tokio::task::spawn_blocking(move || {
            let entries = fs::read_dir(node.state.deleted_dir()).into_iter().flatten().flatten();
            let deleted: BTreeSet<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
            if deleted.is_empty() {
                return;
            }
            for (uid, leg) in node.disks.ready().iter().flat_map(legs::all).filter(|(uid, _)| deleted.contains(uid)) {
                match legs::remove(&leg.dir) {
                    Ok(()) => info!(uid, disk = leg.disk, "a copy of a deleted volume was removed"),
                    Err(error) => warn!(uid, disk = leg.disk, %error, "a copy of a deleted volume is left"),
                }
                node.disks.refresh(&leg.disk);
            }
        });
        drop(swept.await);
    }
}
