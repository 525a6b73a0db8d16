//! Being written: the shell. PUBLIC SIGNATURES FIXED (extend if needed, tell the others), bodies being written.
#![allow(missing_docs)]

use std::path::{Path, PathBuf};

pub use lockstep_core as core;
use lockstep_core::{
    io::Notice,
    status::Status,
    units::{Epoch, LegId, Slot, VolumeId},
};
use tokio::sync::{broadcast, watch};

/// A failure of the datapath, with what it was doing and to what.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The core refused to assemble.
    #[error("{0}")]
    Refused(lockstep_core::assembly::Refusal),
    /// A leg's files are in use by someone else (the lock was not free by the deadline).
    #[error("leg {path} is still in use by another process", path = .0.display())]
    LegBusy(PathBuf),
    /// A system call failed.
    #[error("{action} {path}: {source}", path = path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    /// The core answered with an error number.
    #[error("the mirror refused: {0}")]
    Mirror(lockstep_core::units::Errno),
    /// The datapath thread is gone.
    #[error("the datapath thread has stopped")]
    Gone,
}

/// A leg's directory (`<volume-uid>.<leg-uuid>`, holding `data` and `meta`) and how to name its disk to a person.
#[derive(Clone, Debug)]
pub struct LegPath {
    pub dir: PathBuf,
    pub disk: String,
}

/// What to assemble and export.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    pub volume: VolumeId,
    /// Every leg directory of this volume that is there, any order.
    pub legs: Vec<LegPath>,
    /// The witness file (may be absent).
    pub witness: PathBuf,
    pub seen_epoch: Option<Epoch>,
    pub force: Option<LegId>,
    /// Directory for the FUSE mount point file (made if absent), on no leg's disk.
    pub run_dir: PathBuf,
}

/// Threads and memory of the datapath.
#[derive(Clone, Debug)]
pub struct Config {
    pub threads: usize,
    /// Bytes of the locked buffer pool of each thread.
    pub pool_bytes: usize,
}

/// The running datapath of a node. Cheap to clone.
#[derive(Clone)]
pub struct Datapath {}

impl Datapath {
    pub fn start(_config: Config) -> Result<Self, Error> {
        Err(Error::Gone)
    }
    /// Fences the legs, assembles, mounts FUSE, configures the loop device. The device works when this returns.
    /// On failure nothing is left behind.
    pub async fn open(&self, _spec: VolumeSpec) -> Result<Volume, Error> {
        Err(Error::Gone)
    }
}

/// A volume that is exported. Dropping it does not stop it; `close` does.
pub struct Volume {}

impl Volume {
    /// `/dev/loopN`.
    pub fn device(&self) -> &Path {
        Path::new("")
    }
    /// Follows the mirror's state (updated at every change of it, and at least once a second while copying).
    pub fn status(&self) -> watch::Receiver<Status> {
        watch::channel(unreachable!()).1
    }
    /// Which leg directory sits in a slot now.
    pub fn leg(&self, _slot: Slot) -> Option<LegPath> {
        None
    }
    /// Follows the notices.
    pub fn notices(&self) -> broadcast::Receiver<Notice> {
        broadcast::channel(1).1
    }
    /// Legs given to `open` that came back stale: the caller decides what becomes of them.
    pub fn returning(&self) -> Vec<(LegPath, Slot, lockstep_core::io::Fill)> {
        Vec::new()
    }
    /// How a leg that was found later may come back (reads its `meta`).
    pub async fn readmission(&self, _leg: LegPath) -> Result<Option<(Slot, lockstep_core::io::Fill)>, Error> {
        Err(Error::Gone)
    }
    /// Puts a leg into a slot (see `Request::Attach`) and returns when it is RECOVERING.
    pub async fn attach(&self, _slot: Slot, _leg: LegPath, _fill: lockstep_core::io::Fill) -> Result<(), Error> {
        Err(Error::Gone)
    }
    /// Takes a leg OUT.
    pub async fn detach(&self, _slot: Slot) -> Result<(), Error> {
        Err(Error::Gone)
    }
    /// Extends both legs' `data` (thick) and the exported device. ENOSPC and nothing changed if a leg has no room.
    pub async fn grow(&self, _bytes: u64) -> Result<(), Error> {
        Err(Error::Gone)
    }
    /// Clean stop: loop detached, mirror stopped (bits cleared), FUSE unmounted, legs unlocked. Works on a dead mirror too.
    pub async fn close(self) -> Result<(), Error> {
        Err(Error::Gone)
    }
    /// SIGTERM: stop intake, drain, flush; the bits stay dirty.
    pub async fn quiesce(&self) -> Result<(), Error> {
        Err(Error::Gone)
    }
}

/// Makes a leg's directory with `data` (thick: `fallocate`d, reads as zeroes) and `meta` (real zeroes, then `meta`'s content), fsynced. Idempotent: an existing leg
/// directory is made again from nothing. Blocking: call it off the runtime.
pub fn create_leg(_dir: &Path, _bytes: u64, _meta: &[u8]) -> Result<(), Error> {
    Err(Error::Gone)
}

/// Makes the witness file, preallocated and fsynced. Blocking.
pub fn create_witness(_path: &Path, _bytes: &[u8]) -> Result<(), Error> {
    Err(Error::Gone)
}
