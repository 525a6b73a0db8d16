//! What the mirror says about itself.

use crate::{
    io::Fill,
    units::{Epoch, LegId},
};

/// What a leg counts for (drawn in `membership.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LegState {
    /// Counted for reads and answers.
    In,
    /// Stale, or absent.
    Out,
    /// Being filled: gets every write, serves no read.
    Recovering,
}

/// One leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LegStatus {
    /// Its id, from the membership record.
    pub id: LegId,
    /// Its state. A leg on its way OUT is shown as OUT.
    pub state: LegState,
}

/// Work that makes the legs equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sync {
    /// None is needed.
    Idle,
    /// After an unclean stop.
    Resync,
    /// Onto a leg.
    Rebuild(Fill),
}

/// A snapshot of the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status {
    /// Size of the volume.
    pub blocks: u64,
    /// Of the current membership record.
    pub epoch: Epoch,
    /// The legs, by slot.
    pub legs: [LegStatus; 2],
    /// Regions whose legs may differ on disk.
    pub dirty_regions: u64,
    /// Blocks that no copy holds (mirror rule 22).
    pub bad_blocks: u64,
    /// What is being copied.
    pub sync: Sync,
    /// Of `sync`: blocks looked at so far.
    pub sync_done: u64,
    /// Of `sync`: blocks to look at.
    pub sync_total: u64,
    /// Blocks really copied since the mirror was assembled.
    pub copied_blocks: u64,
    /// Client requests that are not answered yet.
    pub pending: u64,
    /// No more writes are taken.
    pub read_only: bool,
    /// Requests are served (assembly is durable).
    pub ready: bool,
    /// `Stop` was answered.
    pub stopped: bool,
}
