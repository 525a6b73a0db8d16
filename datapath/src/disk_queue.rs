//! How much of a disk's queue the datapath threads fill themselves.
//!
//! The kernel has a bounded number of requests for each disk. Who submits one more waits for one to end, in the system call, whatever it was told
//! about waiting (direct I/O on XFS, Linux 6.18). A disk that hangs would so stop its datapath threads, with every volume that they carry and with
//! the clock by which its legs go OUT. So a thread submits no more than half of what the disk has room for (the other half is for the file system's
//! own, and for others): what goes beyond that is left to the kernel's workers, which may wait. A file system that has no disk of its own (FUSE, NFS)
//! may wait in any call, on a lock that a request in flight holds: all of its I/O is theirs.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::fs::{major, minor};

/// Of a device whose disks do not say.
const ROOM: usize = 32;
/// Longer I/O is more than one request: disks take 128 KiB and more at once.
const PIECE: usize = 256 << 10;

/// By device number.
static QUEUES: Mutex<BTreeMap<u64, Weak<DiskQueue>>> = Mutex::new(BTreeMap::new());

/// The queue of one disk, which all datapath threads share.
#[derive(Debug)]
pub(crate) struct DiskQueue {
    filled: AtomicUsize,
    room: usize,
}

/// An I/O that is in the queue, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    queue: Arc<DiskQueue>,
    requests: usize,
    /// Submitting it may wait.
    pub(crate) beyond: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.queue.filled.fetch_sub(self.requests, Ordering::Relaxed);
    }
}

impl DiskQueue {
    /// Of the disk that a file system with this device number lies on.
    pub(crate) fn of(device: u64) -> Arc<Self> {
        let mut queues = QUEUES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = queues.get(&device).and_then(Weak::upgrade) {
            return queue;
        }
        let room = match fs::canonicalize(format!("/sys/dev/block/{}:{}", major(device), minor(device))) {
            Ok(own) => requests(&own).map_or(ROOM, |requests| (requests / 2).max(1)),
            Err(_) => 0,
        };
        let queue = Arc::new(Self { filled: AtomicUsize::new(0), room });
        queues.retain(|_, queue| queue.strong_count() > 0);
        queues.insert(device, Arc::downgrade(&queue));
        queue
    }

    /// One I/O of this many bytes more.
    pub(crate) fn enter(self: &Arc<Self>, bytes: usize) -> Place {
        let requests = bytes.div_ceil(PIECE).max(1);
        let before = self.filled.fetch_add(requests, Ordering::Relaxed);
        Place { queue: Arc::clone(self), requests, beyond: before + requests > self.room }
    }
}

/// Requests that a device has, by its directory in sysfs: the fewest of the disks that it lies on.
fn requests(own: &Path) -> Option<usize> {
    let whole = if own.join("partition").exists() { own.parent()? } else { own };
    let below = fs::read_dir(whole.join("slaves")).into_iter().flatten().flatten();
    let below = below.filter_map(|slave| requests(&slave.path().canonicalize().ok()?)).min();
    below.or_else(|| fs::read_to_string(whole.join("queue/nr_requests")).ok()?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_room_of_a_disk_is_known_and_forgotten_when_it_ends() {
        let queue = Arc::new(DiskQueue { filled: AtomicUsize::new(0), room: 4 });
        let (small, large) = (queue.enter(4096), queue.enter(3 * PIECE));
        assert!(!small.beyond && !large.beyond);
        let beyond = queue.enter(1);
        assert!(beyond.beyond && queue.enter(1).beyond);
        drop((beyond, large));
        assert!(!queue.enter(2 * PIECE).beyond);
        drop(small);
        assert_eq!(queue.filled.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_file_system_without_a_disk_has_no_room() {
        use std::os::unix::fs::MetadataExt;
        let about = fs::metadata("/proc").unwrap();
        assert!(DiskQueue::of(about.dev()).enter(1).beyond);
    }

    #[test]
    fn a_partition_and_a_mapped_device_have_the_room_of_the_disks_below() {
        let dir = tempfile::tempdir().unwrap();
        let disk = |name: &str, requests: &str| {
            fs::create_dir_all(dir.path().join(name).join("queue")).unwrap();
            fs::write(dir.path().join(name).join("queue/nr_requests"), requests).unwrap();
        };
        disk("sda", "64\n");
        disk("sdb", "32\n");
        disk("dm-0", "128\n");
        fs::create_dir_all(dir.path().join("sda/sda1")).unwrap();
        fs::write(dir.path().join("sda/sda1/partition"), "1").unwrap();
        fs::create_dir_all(dir.path().join("dm-0/slaves")).unwrap();
        assert_eq!(requests(&dir.path().join("dm-0")), Some(128));
        for below in ["sda/sda1", "sdb"] {
            let link = dir.path().join("dm-0/slaves").join(below.rsplit('/').next().unwrap());
            std::os::unix::fs::symlink(dir.path().join(below), link).unwrap();
        }
        assert_eq!(requests(&dir.path().join("sda/sda1")), Some(64));
        assert_eq!(requests(&dir.path().join("dm-0")), Some(32));
        assert_eq!(requests(&dir.path().join("none")), None);
    }
}
