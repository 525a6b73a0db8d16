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
mod file_system;
mod publish;
mod scan;

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, RwLock},
};

use lockstep_proto::objects::{DiskIdentity, DiskPhase};
use tokio::sync::watch;
use tracing::warn;

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
    /// Bytes of legs that are being made, by disk.
    reserved: Mutex<BTreeMap<String, u64>>,
    /// Devices that are being looked at: one that hangs is looked at once.
    busy: Mutex<HashSet<PathBuf>>,
    changed: watch::Sender<u64>,
}

/// Space that nobody else is given.
#[derive(Debug)]
pub struct Reservation {
    disks: Arc<Disks>,
    name: String,
    bytes: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.disks.refresh(&self.name);
        let mut reserved = self.disks.reserved.lock().expect("no holder panics");
        if let Some(bytes) = reserved.get_mut(&self.name) {
            *bytes = bytes.saturating_sub(self.bytes);
        }
    }
}

impl Disks {
    /// No disk is known yet: `scan` finds them.
    pub fn new(state: Arc<StateDir>, selectors: Vec<DiskSelector>) -> Self {
        Self {
            state,
            selectors,
            known: RwLock::default(),
            refused: RwLock::default(),
            reserved: Mutex::default(),
            busy: Mutex::default(),
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

    /// What is neither taken nor promised of a disk.
    pub fn free(&self, disk: &Disk) -> u64 {
        let reserved = self.reserved.lock().expect("no holder panics").get(&disk.name).copied().unwrap_or(0);
        disk.capacity.saturating_sub(disk.allocated).saturating_sub(reserved)
    }

    /// Reserves `bytes` on each of `count` distinct physical disks: those with the most room, none that `avoid` forbids. `None`: there
    /// are not so many.
    pub fn reserve(self: &Arc<Self>, count: usize, bytes: u64, avoid: impl Fn(&Disk) -> bool) -> Option<Vec<Reservation>> {
        let mut candidates: Vec<Disk> = self.ready().into_iter().filter(|disk| !avoid(disk)).collect();
        let mut reserved = self.reserved.lock().expect("no holder panics");
        let free = |reserved: &BTreeMap<String, u64>, disk: &Disk| {
            let taken = disk.allocated + reserved.get(&disk.name).copied().unwrap_or(0);
            disk.capacity.saturating_sub(taken)
        };
        candidates.retain(|disk| free(&reserved, disk) >= bytes);
        candidates.sort_by_key(|disk| std::cmp::Reverse(free(&reserved, disk)));
        let mut physical = HashSet::new();
        candidates.retain(|disk| physical.insert(disk.identity.physical.clone()));
        candidates.truncate(count);
        if candidates.len() < count {
            return None;
        }
        let take = |disk: Disk| {
            *reserved.entry(disk.name.clone()).or_default() += bytes;
            Reservation { disks: Arc::clone(self), name: disk.name, bytes }
        };
        Some(candidates.into_iter().map(take).collect())
    }

    /// Reserves `bytes` on this disk. `None`: it has no room, or is not ready.
    pub fn reserve_on(self: &Arc<Self>, name: &str, bytes: u64) -> Option<Reservation> {
        self.reserve(1, bytes, |disk| disk.name != name)?.pop()
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

    /// Counts what is on the disk again. Blocks.
    pub(crate) fn refresh(&self, name: &str) {
        let Some(disk) = self.get(name).filter(|disk| disk.phase == DiskPhase::Ready) else { return };
        if let Ok((capacity, allocated)) = crate::legs::space(&disk.mount) {
            let mut known = self.known.write().expect("no holder panics");
            if let Some(disk) = known.get_mut(name).filter(|disk| (disk.capacity, disk.allocated) != (capacity, allocated)) {
                (disk.capacity, disk.allocated) = (capacity, allocated);
                drop(known);
                self.change();
            }
        }
    }
}

impl Reservation {
    /// The disk's name.
    pub fn disk_name(&self) -> &str {
        &self.name
    }

    /// The disk.
    pub fn disk(&self) -> Option<Disk> {
        self.disks.get(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(of: &[(&str, &str, u64)]) -> (tempfile::TempDir, Arc<Disks>) {
        let dir = tempfile::tempdir().unwrap();
        let disks = Disks::new(Arc::new(StateDir::open(dir.path()).unwrap()), Vec::new());
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
            };
            disks.known.write().unwrap().insert((*name).into(), disk);
        }
        (dir, Arc::new(disks))
    }

    fn names(reservations: Option<Vec<Reservation>>) -> Option<Vec<String>> {
        reservations.map(|all| all.iter().map(|one| one.name.clone()).collect())
    }

    #[test]
    fn a_pair_is_two_physical_disks_with_the_most_room() {
        let (_dir, disks) = disks(&[("a", "1", 10), ("b", "1", 30), ("c", "2", 20), ("d", "3", 5)]);
        assert_eq!(names(disks.reserve(2, 6, |_| false)).unwrap(), ["b", "c"]);
        assert_eq!(names(disks.reserve(2, 25, |_| false)), None, "only one disk has so much");
        assert_eq!(names(disks.reserve(1, 1, |disk| disk.identity.physical == "1")).unwrap(), ["c"]);
    }

    #[test]
    fn what_is_reserved_is_not_given_out_twice_until_it_is_let_go() {
        let (_dir, disks) = disks(&[("a", "1", 10), ("b", "2", 10)]);
        let first = disks.reserve(2, 6, |_| false).unwrap();
        assert!(disks.reserve(2, 6, |_| false).is_none());
        assert!(disks.reserve_on("a", 5).is_none());
        drop(first);
        assert!(disks.reserve(2, 10, |_| false).is_some());
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
