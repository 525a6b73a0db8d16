//! The CSI node plugin: disks, legs, block devices, mounts.
//!
//! ```text
//! node.yaml --> disks (found, claimed, watched) --> LocalDisk objects
//!                 |
//! MirrorVolume --> allocate: two legs on two disks --> status
//!                 |
//! NodeStage ----> mirror: datapath volume, looked after --> status, conditions, rebuilds
//!                 |
//!                 file_system --> publish (bind mounts)
//! ```
//! Guarantees:
//! - a disk that is not blank is never written to unless the file system on it is ours;
//! - what will be touched is on record before it is touched: a new volume's finalizer and placement, a staged record, a format record;
//! - a copy is removed only on proof that it can never be needed: what cannot be told, or is newer than what is known, stays;
//! - one operation at a time on a volume (`ABORTED` for others); a call that is cut off goes on to its end, and can be repeated;
//! - the mirror never waits for the object store, and one stuck disk or volume does not stop the others.
//!
//! Words: a *disk* is an XFS of ours on a block device; a *leg* is one copy of a volume, a directory on a disk; *staged* means that the
//! volume has a device (and its file system is mounted); *published*, that a pod has it.

mod allocate;
pub mod capability;
pub mod config;
pub mod disks;
pub mod error;
mod file_system;
mod formatted;
mod health;
pub mod lease;
pub mod legs;
pub mod memory;
pub mod mirror;
pub mod mounts;
mod news;
pub mod node;
mod publish;
mod quarantine;
pub mod rpc;
mod stage;
pub mod staged;
pub mod state_dir;
mod tombstone;
pub mod tool;
mod usage;

use lockstep_datapath::errand::Handler;

/// What csi-node does in processes of its own, because it may wait for a volume that csi-node serves. The tools (`tool.rs`) are such processes too.
pub const ERRANDS: [Handler; 3] = [Handler::of::<mounts::Unmount>(), Handler::of::<file_system::Look>(), Handler::of::<usage::StatFs>()];
