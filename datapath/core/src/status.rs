//! What the mirror says about itself.

use crate::{
    io::Fill,
    units::{Epoch, Errno, LegId, Slot},
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

/// How far a scrub is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScrubState {
    /// None was asked for since the mirror was assembled.
    Never,
    /// It compares, or waits for the end of a resync or rebuild.
    Running,
    /// Everything was looked at.
    Completed,
    /// It ended before that: ENODEV: a leg was lost; ECANCELED: it was told to; ESHUTDOWN: the mirror was stopped; EIO: the mirror gave up.
    Ended(Errno),
}

/// The newest scrub (mirror rule 30). All figures are blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scrub {
    /// How far it is.
    pub state: ScrubState,
    /// Everything before this block was looked at,
    pub done: u64,
    /// of so many.
    pub total: u64,
    /// Written blocks that were compared.
    pub compared: u64,
    /// Of these, blocks that differ.
    pub mismatched: u64,
    /// Blocks that were written anew from the leg that the operator believes.
    pub repaired: u64,
    /// Blocks that a leg could not read: repaired from the other, if that could.
    pub unreadable: u64,
    /// Blocks that were not judged: a resync is due there, or they are listed as bad.
    pub skipped: u64,
}

impl Scrub {
    /// There was none.
    pub const NEVER: Self =
        Self { state: ScrubState::Never, done: 0, total: 0, compared: 0, mismatched: 0, repaired: 0, unreadable: 0, skipped: 0 };

    /// Blocks that differed and are as they were.
    pub const fn differing(&self) -> u64 {
        self.mismatched.saturating_sub(self.repaired)
    }
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
    /// The newest scrub.
    pub scrub: Scrub,
    /// The leg that is slow, as the operator says.
    pub write_mostly: Option<Slot>,
    /// Writes may be behind on it: it was asked for, and the durable record pins the other leg.
    pub write_behind: bool,
    /// Writes that were answered and are still on their way to it.
    pub behind: u64,
    /// Client requests that are not answered yet.
    pub pending: u64,
    /// No more writes are taken.
    pub read_only: bool,
    /// Requests are served (assembly is durable).
    pub ready: bool,
    /// `Stop` was answered.
    pub stopped: bool,
}
