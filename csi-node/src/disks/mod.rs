//! The node's disks: found, claimed if blank, mounted, watched.
//!
//! ```text
//! selector -> device --+-- blank -----> mkfs.xfs -+-> mounted: Ready --- an error ---> Failed (until it is plugged in again
//!                      +-- ours ------------------+                                          or csi-node starts again)
//!                      +-- anything else: Refused, left alone
//! ```
//! What a disk is is known by the UUID of its file system; its node in /dev means nothing. `LocalDisk` objects follow what is found
//! here; nothing here waits for them.

mod device;
mod error;
mod file_system;
mod ledger;
pub(crate) mod probe;
mod publish;
mod scan;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, RwLock},
};

use lockstep_proto::objects::{DiskIdentity, DiskPhase, LocalDiskStatus};
use tokio::sync::{Notify, watch};
use tracing::warn;

use self::ledger::Ledger;
pub use self::ledger::Reservation;
use crate::{config::DiskSelector, state_dir::StateDir};

/// A disk that is or was ours.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The UUID of its file system: the name of its `LocalDisk`.
    pub name: String,
    /// What stays the same.
    pub identity: DiskIdentity,
    /// How a person knows it.
    pub label: String,
    /// Its node, when it was last seen.
    device: PathBuf,
    /// Where it is mounted.
    pub mount: PathBuf,
    /// `Ready` or `Failed`.
    pub phase: DiskPhase,
    /// Why it failed, and what to do.
    pub message: String,
    /// Bytes that legs can have.
    pub capacity: u64,
    /// Bytes that legs have.
    pub allocated: u64,
    /// Failed, and not seen since: if it comes back it was plugged in again.
    absent: bool,
    /// A selector matches it.
    selected: bool,
}

/// A device that is left alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The selector's match.
    pub path: PathBuf,
    /// What is known of it.
    pub identity: DiskIdentity,
    /// Why, and what to do.
    pub message: String,
}

/// All disks of the node.
#[derive(Debug)]
pub struct Disks {
    state: Arc<StateDir>,
    selectors: Vec<DiskSelector>,
    known: RwLock<BTreeMap<String, Disk>>,
    refused: RwLock<BTreeMap<PathBuf, Refused>>,
    /// Selectors that matched nothing at the last look.
    idle: Mutex<BTreeSet<String>>,
    /// Bytes of legs that are being made. Locked before `known`, where both are.
    ledger: Mutex<Ledger>,
    /// Reservations were let go.
    unsettled: Notify,
    /// What is being looked at: what hangs is looked at once.
    busy: Mutex<HashSet<String>>,
    /// What the objects were last made to say; `None`: that may have been cut off.
    publishing: tokio::sync::Mutex<Option<BTreeMap<String, LocalDiskStatus>>>,
    changed: watch::Sender<u64>,
}

impl Disks {
    /// No disk is known yet: `scan` finds them.
    pub fn new(state: Arc<StateDir>, selectors: Vec<DiskSelector>) -> Self {
        file_system::tidy(&state);
        Self {
            state,
            selectors,
            known: RwLock::default(),
            refused: RwLock::default(),
            idle: Mutex::default(),
            ledger: Mutex::default(),
            unsettled: Notify::default(),
            busy: Mutex::default(),
            publishing: tokio::sync::Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }

    /// Tells when anything changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn change(&self) {
        self.changed.send_modify(|generation| *generation += 1);
    }

    /// All that are or were ours.
    pub fn all(&self) -> Vec<Disk> {
        self.known.read().expect("no holder panics").values().cloned().collect()
    }

    /// Those that are left alone.
    pub fn refused(&self) -> Vec<Refused> {
        self.refused.read().expect("no holder panics").values().cloned().collect()
    }

    /// One, by the name of its `LocalDisk`.
    pub fn get(&self, name: &str) -> Option<Disk> {
        self.known.read().expect("no holder panics").get(name).cloned()
    }

    /// Those that can be used.
    pub fn ready(&self) -> Vec<Disk> {
        self.all().into_iter().filter(|disk| disk.phase == DiskPhase::Ready).collect()
    }

    /// A leg on the disk failed with `error`: nothing new is put there.
    pub fn fail(&self, name: &str, error: &str) {
        let mut known = self.known.write().expect("no holder panics");
        let Some(disk) = known.get_mut(name).filter(|disk| disk.phase != DiskPhase::Failed) else { return };
        disk.phase = DiskPhase::Failed;
        disk.message = format!(
            "{} failed: {error}. Its volumes go on without it. Replace it; or, if it is good, plug it in again or restart csi-node",
            disk.label
        );
        disk.absent = false;
        warn!(reason = "DiskFailed", disk = name, "{}", disk.message);
        drop(known);
        self.change();
    }
}

impl Disk {
    /// Whether it has platters, or lies on a disk that has; what cannot be told has none.
    pub fn rotates(&self) -> bool {
        device::rotates(&self.device)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn disks(of: &[(&str, &str, u64)]) -> (tempfile::TempDir, Arc<Disks>) {
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks::new(Arc::new(StateDir::open(dir.path(), false).unwrap()), Vec::new());
        for (name, physical, capacity) in of {
            let identity = DiskIdentity { physical: (*physical).into(), ..DiskIdentity::default() };
            let disk = Disk {
                name: (*name).into(),
                identity,
                label: (*name).into(),
                device: "/nonexistent".into(),
                mount: "/nonexistent".into(),
                phase: DiskPhase::Ready,
                message: String::new(),
                capacity: *capacity,
                allocated: 0,
                absent: false,
                selected: true,
            };
            disks.known.write().unwrap().insert((*name).into(), disk);
        }
        (dir, Arc::new(disks))
    }

    #[test]
    fn a_failed_disk_is_not_given_out() {
        let (_dir, disks) = disks(&[("a", "1", 10), ("b", "2", 10)]);
        let mut changes = disks.changes();
        disks.fail("a", "EIO");
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        disks.fail("a", "EIO");
        assert!(!changes.has_changed().unwrap(), "it is said once");
        assert!(disks.reserve(2, 1, |_| false).is_none());
        assert!(disks.get("a").unwrap().message.contains("EIO"));
    }
}
