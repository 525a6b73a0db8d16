//! Assembly: from what was found on the disks and in the witness to a running mirror, or a refusal (mirror rules 11, 12, 13, 19).
//! SIGNATURES FIXED, bodies being written.

use alloc::vec::Vec;
use core::fmt;

use crate::units::{Epoch, Instant, LegId, VolumeId};

/// What is to be assembled.
#[derive(Clone, Debug)]
pub struct Assembly<'a> {
    /// The volume that the caller wants.
    pub volume: VolumeId,
    /// The `meta` bytes of every leg that was found (at least `meta_len(blocks)` bytes each, or as many as could be read). Any number, any order.
    pub metas: &'a [&'a [u8]],
    /// The bytes of the witness file (8192), if it is there.
    pub witness: Option<&'a [u8]>,
    /// The epoch that the object's status last saw. It lags, so it may only veto (mirror rule 12).
    pub seen_epoch: Option<Epoch>,
    /// The operator insists: assemble from one leg without a witness, or choose this leg in a split brain. Recorded.
    pub force: Option<LegId>,
    /// 128 random bits: record ids derive from them.
    pub seed: u128,
    /// Now.
    pub now: Instant,
}

/// A running mirror and where its legs were found.
#[derive(Clone, Debug)]
pub struct Assembled {
    /// The mirror. It serves after `Notice::Assembled`; requests before that wait.
    pub mirror: crate::Mirror,
    /// By slot: the index in `Assembly::metas` of the leg that sits there; `None`: absent or stale.
    pub slots: [Option<usize>; 2],
    /// Stale legs of this volume that can come back with `Request::Attach`: index, slot, and how they must be filled. `Fill::Everything` means that the
    /// shell must make a new empty leg (new id) first.
    pub returning: Vec<(usize, crate::units::Slot, crate::io::Fill)>,
    /// Legs that no durable record names (mirror rule 13).
    pub foreign: Vec<usize>,
}

/// Why a volume is not assembled. `Display` says what was found and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No usable leg was found.
    NoLeg,
    /// Only this leg is there, and the witness (or the object) says that it is stale.
    Stale(LegId),
    /// Only this leg is there and there is no witness to ask.
    NoWitness(LegId),
    /// Each leg went on without the other.
    SplitBrain(LegId, LegId),
    /// What was found was written by a newer Lockstep.
    TooNew,
    /// A leg of another volume.
    WrongVolume(VolumeId),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Assembles. `out` gets the first effects.
pub fn assemble(_assembly: &Assembly<'_>, _out: &mut crate::io::Effects) -> Result<Assembled, Refusal> {
    Err(Refusal::NoLeg)
}
