//! The mirror. SIGNATURES FIXED, bodies being written.

use crate::{
    io::{Effects, Event, Fill},
    status::Status,
    units::{Instant, Slot},
};

/// Bytes in blocks of the largest copy that the mirror makes at once (resync, rebuild, repair).
pub const COPY_BLOCKS: u64 = 256;
/// How many of its own buffers the mirror uses at once.
pub const COPY_WINDOW: u8 = 4;

/// One mirror.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mirror {}

impl Mirror {
    /// Takes what happened, says what to do. Never blocks, never fails.
    pub fn handle(&mut self, _now: Instant, _event: Event, _out: &mut Effects) {}
    /// When `Event::Tick` is wanted next.
    pub fn next_deadline(&self) -> Option<Instant> {
        None
    }
    /// Asserts the invariants listed at the file's head.
    pub fn check_invariants(&self) {}
    /// A snapshot.
    pub fn status(&self) -> Status {
        loop {}
    }
    /// How a leg of this volume that was found later may come back: its slot and how it must be filled
    /// (`Fill::Everything`: a new empty leg must be made first). `None`: no place for it (foreign, or both places are taken).
    pub fn readmission(&self, _meta: &[u8]) -> Option<(Slot, Fill)> {
        None
    }
}
