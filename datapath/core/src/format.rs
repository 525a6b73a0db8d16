//! What is on disk (format version 1). SIGNATURES FIXED, bodies being written.

use alloc::vec::Vec;

use crate::units::{Epoch, LegId, VolumeId};

/// Bytes in a leg's `meta` file, always.
pub const META_LEN: u64 = 1 << 20;
/// Bytes in a witness file, always.
pub const WITNESS_LEN: u64 = 8192;

/// The `meta` bytes of one leg of a new volume whose two legs are `legs` (both read as zeroes).
pub fn new_leg(_volume: VolumeId, _legs: [LegId; 2], _which: LegId, _blocks: u64) -> Vec<u8> {
    Vec::new()
}

/// The witness bytes of that new volume.
pub fn new_witness(_volume: VolumeId, _legs: [LegId; 2]) -> Vec<u8> {
    Vec::new()
}

/// The `meta` bytes of an empty leg that is to be attached with `Fill::Everything`.
pub fn spare_leg(_volume: VolumeId, _leg: LegId, _blocks: u64) -> Vec<u8> {
    Vec::new()
}

/// Who a leg says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its volume.
    pub volume: VolumeId,
    /// Its id.
    pub leg: LegId,
    /// The volume's size.
    pub blocks: u64,
    /// Its newest record's epoch; 0 for a spare.
    pub epoch: Epoch,
}

/// Why a `meta` cannot be read. `Display` says it in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaError {
    /// No superblock slot is valid.
    Damaged,
    /// Written by a newer Lockstep.
    TooNew,
}

impl core::fmt::Display for MetaError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Reads who a leg is.
pub fn peek(_meta: &[u8]) -> Result<Summary, MetaError> {
    Err(MetaError::Damaged)
}
