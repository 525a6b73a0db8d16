//! Copies from one leg to the other: resync, rebuild, repair, and taking back what only one leg had space for (mirror rules 22, 24, 26, 28).
//!
//! ```text
//! Queued -> Bits -> (Held) -> Buffer -> Seek -> Zero -> Read -> Write -> (Verify) -> next piece or end
//! ```
//! A buffer is taken last, so that whoever holds one only waits for leg I/O.

use super::{Ended, Mirror, Purpose, State};
use crate::{
    fault::{Fault, classify},
    io::{Buffer, Effect, Effects, Fill, LegOp, Notice},
    range_lock::{Class, EntryId},
    units::{BlockRange, Errno, Slot},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Step {
    Queued,
    Bits,
    Held,
    /// Waits for a buffer.
    Buffer,
    Seek,
    Zero,
    Read,
    Write,
    Verify,
}

/// A write that one leg had no space for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Mend {
    pub write: EntryId,
    /// The first direction met a full leg too.
    pub reversed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum CopyFor {
    Repair,
    Mend(Mend),
    Sync { generation: u64, fill: Option<Fill> },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Copy {
    pub range: BlockRange,
    pub step: Step,
    pub purpose: CopyFor,
    from: Slot,
    to: Slot,
    pos: u64,
    piece: BlockRange,
    buffer: Option<u8>,
    /// After a read error: block by block, and this block in the other direction if both legs are IN.
    single: bool,
    swapped: bool,
    failed: bool,
}

impl Copy {
    /// Whether it holds an entry of the range lock and its regions; a mend goes under its write's.
    pub(super) fn holds_lock(&self) -> bool {
        self.step > Step::Queued && !matches!(self.purpose, CopyFor::Mend(_))
    }

    fn ends(&self) -> (Slot, Slot) {
        if self.swapped { (self.to, self.from) } else { (self.from, self.to) }
    }
}

impl Mirror {
    fn new_copy(&mut self, range: BlockRange, from: Slot, to: Slot, purpose: CopyFor) -> EntryId {
        let id = self.next_entry();
        let (pos, piece) = (range.start, BlockRange::new(range.start, range.start));
        let copy =
            Copy { range, step: Step::Queued, purpose, from, to, pos, piece, buffer: None, single: false, swapped: false, failed: false };
        self.copies.insert(id, copy);
        id
    }

    pub(super) fn start_locked_copy(&mut self, range: BlockRange, from: Slot, to: Slot, purpose: CopyFor, class: Class, out: &mut Effects) {
        let id = self.new_copy(range, from, to, purpose);
        if self.lock.acquire(id, range, class) {
            self.granted(id, out);
        }
    }

    pub(super) fn start_mend(&mut self, mend: Mend, range: BlockRange, refused: Slot, out: &mut Effects) {
        let id = self.new_copy(range, refused, refused.other(), CopyFor::Mend(mend));
        self.start_copy(id, out);
    }

    pub(super) fn start_copy(&mut self, id: EntryId, out: &mut Effects) {
        let Some(copy) = self.copies.get_mut(&id) else { return };
        copy.step = Step::Buffer;
        if self.read_only.is_some() && !matches!(copy.purpose, CopyFor::Mend(_)) {
            return self.end_copy(id, false, out);
        }
        match self.copy_buffers.iter().position(|used| !used) {
            Some(index) => {
                copy.buffer = Some(index as u8);
                self.copy_buffers[index] = true;
                self.next_piece(id, out);
            }
            None => self.buffer_queue.push(id),
        }
    }

    /// One of its legs is not what it was: nothing more is issued for it.
    fn copy_is_lost(&self, copy: &Copy) -> bool {
        self.legs[copy.from.index()].state != State::In || !self.legs[copy.to.index()].takes_writes()
    }

    /// Looks for the next piece of a copy, if its legs still are what they were.
    fn next_piece(&mut self, id: EntryId, out: &mut Effects) {
        let Some(lost) = self.copies.get(&id).map(|copy| self.copy_is_lost(copy)) else { return };
        let Some(copy) = self.copies.get_mut(&id) else { return };
        if lost || copy.pos >= copy.range.end {
            let ok = !lost && !copy.failed;
            return self.end_copy(id, ok, out);
        }
        copy.swapped = false;
        let rest = BlockRange::new(copy.pos, copy.range.end);
        if matches!(copy.purpose, CopyFor::Sync { .. }) && !copy.single {
            copy.step = Step::Seek;
            let slot = copy.from;
            return self.issue(slot, Purpose::Copy(id), LegOp::NextData { range: rest }, out);
        }
        let len = if copy.single { 1 } else { super::COPY_BLOCKS };
        copy.piece = BlockRange::new(rest.start, rest.end.min(rest.start + len));
        self.read_piece(id, out);
    }

    fn read_piece(&mut self, id: EntryId, out: &mut Effects) {
        let Some(copy) = self.copies.get_mut(&id) else { return };
        copy.step = Step::Read;
        let (range, slot, buffer) = (copy.piece, copy.ends().0, Buffer::Copy { index: copy.buffer.unwrap_or(0), skip: 0 });
        self.issue(slot, Purpose::Copy(id), LegOp::Read { range, buffer }, out);
    }

    pub(super) fn copy_done(&mut self, id: EntryId, ended: Ended, out: &mut Effects) {
        if self.copies.get(&id).is_some_and(|copy| self.copy_is_lost(copy)) {
            return self.end_copy(id, false, out);
        }
        let Some(copy) = self.copies.get_mut(&id) else { return };
        let (from, to) = copy.ends();
        let buffer = Buffer::Copy { index: copy.buffer.unwrap_or(0), skip: 0 };
        // Not after a crash: it may have kept a write that its source lost.
        let fresh = self.fresh && matches!(copy.purpose, CopyFor::Sync { fill: Some(Fill::Everything), .. });
        match (copy.step, ended) {
            (Step::Seek, Ok(extent)) => {
                let end = copy.range.end;
                copy.piece = extent.map_or(BlockRange::new(end, end), |data| {
                    BlockRange::new(data.start, data.end.min(end).min(data.start + super::COPY_BLOCKS))
                });
                let hole = BlockRange::new(copy.pos, copy.piece.start);
                if hole.is_empty() || fresh {
                    return self.after_hole(id, out);
                }
                copy.step = Step::Zero;
                self.issue(to, Purpose::Copy(id), LegOp::Zero { range: hole }, out);
            }
            (Step::Zero, Ok(_)) => self.after_hole(id, out),
            (Step::Read, Ok(_)) => {
                copy.step = Step::Write;
                let range = copy.piece;
                self.issue(to, Purpose::Copy(id), LegOp::Write { range, buffer, fua: false }, out);
            }
            (Step::Write, Ok(_)) if copy.purpose == CopyFor::Repair => {
                copy.step = Step::Verify;
                let range = copy.piece;
                self.issue(to, Purpose::Copy(id), LegOp::Read { range, buffer }, out);
            }
            (Step::Write | Step::Verify, Ok(_)) => {
                let (piece, repaired) = (copy.piece, copy.step == Step::Verify);
                copy.pos = piece.end;
                self.copied_blocks += piece.len();
                if repaired {
                    out.push(Effect::Notice(Notice::ReadRepaired { slot: to, range: piece }));
                }
                self.next_piece(id, out);
            }
            (Step::Read, Err(_)) => self.copy_source_failed(id, from, out),
            (Step::Seek, Err(_)) => {
                copy.single = true;
                self.next_piece(id, out);
            }
            (Step::Zero | Step::Write | Step::Verify, Err(errno)) => self.copy_target_failed(id, to, errno, out),
            (Step::Queued | Step::Bits | Step::Held | Step::Buffer, _) => {}
        }
    }

    fn after_hole(&mut self, id: EntryId, out: &mut Effects) {
        let Some(copy) = self.copies.get_mut(&id) else { return };
        copy.pos = copy.piece.start;
        if copy.piece.is_empty() { self.next_piece(id, out) } else { self.read_piece(id, out) }
    }

    fn copy_source_failed(&mut self, id: EntryId, from: Slot, out: &mut Effects) {
        let both_in = self.in_count() == 2;
        let Some(copy) = self.copies.get_mut(&id) else { return };
        if !matches!(copy.purpose, CopyFor::Sync { .. }) {
            return self.end_copy(id, false, out);
        }
        if copy.piece.len() > 1 {
            copy.single = true;
            return self.next_piece(id, out);
        }
        if both_in && !copy.swapped {
            // After an unclean stop both copies are as good: this block goes the other way.
            copy.swapped = true;
            return self.read_piece(id, out);
        }
        let (range, slot) = (copy.piece, from.other());
        copy.failed = true;
        copy.pos = range.end;
        out.push(Effect::Notice(if both_in { Notice::Unreadable { range } } else { Notice::RebuildBlocked { slot, range } }));
        self.next_piece(id, out);
    }

    fn copy_target_failed(&mut self, id: EntryId, to: Slot, errno: Errno, out: &mut Effects) {
        let Some(copy) = self.copies.get_mut(&id) else { return };
        match &mut copy.purpose {
            CopyFor::Mend(mend) if classify(errno) == Fault::NoSpace && !mend.reversed => {
                mend.reversed = true;
                core::mem::swap(&mut copy.from, &mut copy.to);
                copy.pos = copy.range.start;
                self.next_piece(id, out);
            }
            CopyFor::Mend(_) if classify(errno) == Fault::NoSpace => self.end_copy(id, false, out),
            _ => {
                self.fail_leg(to, errno, out);
                self.end_copy(id, false, out);
            }
        }
    }

    pub(super) fn end_copy(&mut self, id: EntryId, ok: bool, out: &mut Effects) {
        let Some(copy) = self.copies.remove(&id) else { return };
        self.buffer_queue.retain(|queued| *queued != id);
        if let Some(index) = copy.buffer {
            out.push(Effect::ReleaseCopy { index });
            self.copy_buffers[index as usize] = false;
        }
        if copy.holds_lock() {
            self.bitmap.unhold(copy.range);
            self.lock.release(id, &mut self.woken);
            self.arm_clean();
        }
        self.held.retain(|held| *held != id);
        match copy.purpose {
            CopyFor::Repair => {}
            CopyFor::Mend(mend) => {
                if !ok && self.in_count() == 2 {
                    self.mark_unsynced(copy.range);
                }
                if let Some(write) = self.writes.get_mut(&mend.write) {
                    write.stage = super::writes::Stage::Issued;
                }
                self.finish_write(mend.write, Err(Errno::ENOSPC), out);
            }
            CopyFor::Sync { generation, .. } => self.sync_copy_ended(generation, ok),
        }
        if !self.buffer_queue.is_empty() && self.copy_buffers.contains(&false) {
            let next = self.buffer_queue.remove(0);
            self.start_copy(next, out);
        }
    }
}
