//! Copies from one leg to the other: resync, rebuild, repair, and taking back what only one leg had space for (mirror rules 22, 24, 26, 28).
//!
//! ```text
//! Queued -> Bits -> (Held) -> Buffer -> Seek -> Zero -> Read -> Write -> (Verify) -> next piece or (Listing) -> end
//! ```
//! Bad blocks (`bad_blocks.rs`) are passed over by every copy: no leg holds them. A buffer is taken last, so that whoever holds one only waits
//! for leg I/O.

use super::{Ended, Mirror, Purpose, Report, State, flushes::Waiter, writes::Stage};
use crate::{
    bad_blocks::Runs,
    fault::{Fault, classify, is_unreadable},
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
    /// Waits for the list of bad blocks to be durable.
    Listing(u64),
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
    /// A scrub found a difference, and the operator believes the source.
    Belief,
    Mend(Mend),
    Sync {
        generation: u64,
        fill: Option<Fill>,
    },
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
    /// Where the blocks from `pos` on end that are not listed as bad.
    end: u64,
    buffer: Option<u8>,
    /// After a read error: block by block, and this block in the other direction if both legs are IN.
    single: bool,
    swapped: bool,
    /// This block was read, and failed.
    again: bool,
    failed: bool,
    /// A write here failed on both legs after it was asked for: which of them is right is not what it was.
    void: bool,
    /// What the only good leg could not read.
    unreadable: Runs,
}

impl Copy {
    /// Whether it has an entry of the range lock and holds its regions; a mend goes under its write's.
    pub(super) fn holds_lock(&self) -> bool {
        !matches!(self.purpose, CopyFor::Mend(_))
    }

    fn ends(&self) -> (Slot, Slot) {
        if self.swapped { (self.to, self.from) } else { (self.from, self.to) }
    }
}

impl Mirror {
    fn new_copy(&mut self, range: BlockRange, from: Slot, to: Slot, purpose: CopyFor) -> EntryId {
        let id = self.next_entry();
        let (pos, piece) = (range.start, BlockRange::new(range.start, range.start));
        let copy = Copy {
            range,
            step: Step::Queued,
            purpose,
            from,
            to,
            pos,
            piece,
            end: pos,
            buffer: None,
            single: false,
            again: false,
            swapped: false,
            failed: false,
            void: false,
            unreadable: Runs::default(),
        };
        self.copies.insert(id, copy);
        id
    }

    pub(super) fn start_locked_copy(&mut self, range: BlockRange, from: Slot, to: Slot, purpose: CopyFor, class: Class, out: &mut Effects) {
        let id = self.new_copy(range, from, to, purpose);
        self.enter(id, range, class, out);
    }

    pub(super) fn start_mend(&mut self, mend: Mend, range: BlockRange, refused: Slot, out: &mut Effects) {
        let id = self.new_copy(range, refused, refused.other(), CopyFor::Mend(mend));
        self.start_copy(id, out);
    }

    pub(super) fn start_copy(&mut self, id: EntryId, out: &mut Effects) {
        let Some(copy) = self.copies.get_mut(&id) else { return };
        copy.step = Step::Buffer;
        if copy.void || (self.read_only.is_some() && !matches!(copy.purpose, CopyFor::Mend(_))) {
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

    /// Whether a resync is writing to this leg here.
    pub(super) fn resync_lands_on(&self, slot: Slot, range: BlockRange) -> bool {
        let lands = |copy: &Copy| matches!(copy.purpose, CopyFor::Sync { .. }) && matches!(copy.step, Step::Zero | Step::Write);
        self.copies.values().any(|copy| lands(copy) && copy.ends().1 == slot && copy.range.overlaps(range))
    }

    /// The legs may differ in this range from now on: what a repair that waits for its turn would put there may be older than what was read.
    pub(super) fn void_repairs(&mut self, range: BlockRange) {
        for copy in self.copies.values_mut() {
            let repair = matches!(copy.purpose, CopyFor::Repair | CopyFor::Belief);
            copy.void |= repair && copy.step == Step::Queued && copy.range.overlaps(range);
        }
    }

    /// One of its legs is not what it was: nothing more is issued for it.
    pub(super) fn copy_is_lost(&self, copy: &Copy) -> bool {
        self.legs[copy.from.index()].state != State::In || !self.legs[copy.to.index()].takes_writes()
    }

    /// Looks for the next piece of a copy, if its legs still are what they were.
    fn next_piece(&mut self, id: EntryId, out: &mut Effects) {
        let Some(lost) = self.copies.get(&id).map(|copy| self.copy_is_lost(copy)) else { return };
        let Some(copy) = self.copies.get_mut(&id) else { return };
        let rest = self.bad_blocks.valid(BlockRange::new(copy.pos, copy.range.end));
        (copy.pos, copy.end) = (rest.start, rest.end);
        if lost || rest.is_empty() {
            return self.copied(id, lost, out);
        }
        (copy.swapped, copy.again) = (false, false);
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
                let end = copy.end;
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
                // What was refused must not come back with a power cut, once the old content was read again.
                let (range, fua) = (copy.piece, matches!(copy.purpose, CopyFor::Mend(_)));
                self.issue(to, Purpose::Copy(id), LegOp::Write { range, buffer, fua }, out);
            }
            (Step::Write, Ok(_)) if matches!(copy.purpose, CopyFor::Repair | CopyFor::Belief) => {
                copy.step = Step::Verify;
                let range = copy.piece;
                self.issue(to, Purpose::Copy(id), LegOp::Read { range, buffer }, out);
            }
            (Step::Write | Step::Verify, Ok(_)) => {
                let (piece, repaired, believed) = (copy.piece, copy.step == Step::Verify, copy.purpose == CopyFor::Belief);
                copy.pos = piece.end;
                self.copied_blocks += piece.len();
                if believed {
                    self.scrub.repaired += piece.len();
                    out.push(Effect::Notice(Notice::MismatchRepaired { slot: to, range: piece }));
                } else if repaired {
                    out.push(Effect::Notice(Notice::ReadRepaired { slot: to, range: piece }));
                }
                self.next_piece(id, out);
            }
            (Step::Read, Err(errno)) => self.copy_source_failed(id, from, errno, out),
            (Step::Seek, Err(_)) => {
                copy.single = true;
                self.next_piece(id, out);
            }
            (Step::Zero | Step::Write | Step::Verify, Err(errno)) => self.copy_target_failed(id, to, errno, out),
            (Step::Queued | Step::Bits | Step::Held | Step::Buffer | Step::Listing(_), _) => {}
        }
    }

    fn after_hole(&mut self, id: EntryId, out: &mut Effects) {
        let Some(copy) = self.copies.get_mut(&id) else { return };
        copy.pos = copy.piece.start;
        if copy.piece.is_empty() { self.next_piece(id, out) } else { self.read_piece(id, out) }
    }

    fn copy_source_failed(&mut self, id: EntryId, from: Slot, errno: Errno, out: &mut Effects) {
        let both_in = self.in_count() == 2;
        let Some(copy) = self.copies.get_mut(&id) else { return };
        if !matches!(copy.purpose, CopyFor::Sync { .. }) {
            return self.end_copy(id, false, out);
        }
        if !copy.single {
            copy.single = true;
            return self.next_piece(id, out);
        }
        if both_in && !copy.swapped {
            // After an unclean stop both copies are as good: this block goes the other way.
            copy.swapped = true;
            return self.read_piece(id, out);
        }
        if !both_in && !copy.again {
            // Each block is read twice before it counts as unreadable.
            copy.again = true;
            return self.read_piece(id, out);
        }
        let (range, slot) = (copy.piece, from.other());
        copy.pos = range.end;
        if !both_in && is_unreadable(errno) {
            copy.unreadable.insert(range);
            return self.next_piece(id, out);
        }
        copy.failed = true;
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
            // Of a resync or a repair also if it is full: two legs that cannot be made equal must not both count.
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
            self.free_buffer(index, out);
        }
        if copy.holds_lock() {
            self.bitmap.unhold(copy.range);
            self.lock.release(id, &mut self.woken);
            self.arm_clean();
        }
        self.held.retain(|held| *held != id);
        match copy.purpose {
            CopyFor::Repair | CopyFor::Belief => {}
            CopyFor::Mend(mend) => self.mended(mend.write, ok, out),
            CopyFor::Sync { generation, .. } => self.sync_copy_ended(generation, ok),
        }
        self.next_in_buffer_queue(out);
    }

    /// What only one leg had space for was taken back, or could not be.
    fn mended(&mut self, id: EntryId, ok: bool, out: &mut Effects) {
        if ok {
            return self.refused(id, out);
        }
        if self.in_count() == 2 {
            // What is read there from now on must not give way to what it was put over, with a power cut.
            return self.submit_flush(Waiter::Refused(id), out);
        }
        self.kept(id, out);
    }

    /// Each leg keeps what it has of a write that found no space.
    pub(super) fn kept(&mut self, id: EntryId, out: &mut Effects) {
        let both_in = self.in_count() == 2;
        let Some(write) = self.writes.get_mut(&id) else { return };
        if both_in {
            let range = write.range;
            self.mark_unsynced(range);
            return self.refused(id, out);
        }
        // Neither leg has the whole of it any more, and one is OUT, or on its way.
        (write.stage, write.reports) = (Stage::Issued, [Report::NoSpace; 2]);
        self.judge_write(id, out);
    }

    fn refused(&mut self, id: EntryId, out: &mut Effects) {
        if let Some(write) = self.writes.get_mut(&id) {
            write.stage = Stage::Issued;
            self.finish_write(id, Err(Errno::ENOSPC), out);
        }
    }

    pub(super) fn free_buffer(&mut self, index: u8, out: &mut Effects) {
        out.push(Effect::ReleaseCopy { index });
        self.copy_buffers[index as usize] = false;
    }

    /// A buffer may be free.
    pub(super) fn next_in_buffer_queue(&mut self, out: &mut Effects) {
        if !self.buffer_queue.is_empty() && self.copy_buffers.contains(&false) {
            let next = self.buffer_queue.remove(0);
            self.start_copy(next, out);
        }
    }

    /// Everything was looked at, or a leg is not what it was. What could not be read is listed before the copy ends.
    fn copied(&mut self, id: EntryId, lost: bool, out: &mut Effects) {
        let Some(copy) = self.copies.get_mut(&id) else { return };
        // When no list will become durable any more, nobody waits for one.
        let lost = lost || self.read_only.is_some();
        if lost || copy.unreadable == Runs::default() {
            let ok = !lost && !copy.failed;
            return self.end_copy(id, ok, out);
        }
        let Some(version) = self.bad_blocks.insert(&copy.unreadable) else {
            let slot = copy.to;
            copy.unreadable.iter().for_each(|range| out.push(Effect::Notice(Notice::RebuildBlocked { slot, range })));
            return self.end_copy(id, false, out);
        };
        copy.step = Step::Listing(version);
        if let Some(index) = copy.buffer.take() {
            self.free_buffer(index, out);
        }
        self.next_in_buffer_queue(out);
    }

    /// What it could not read is durably listed.
    pub(super) fn listed(&mut self, id: EntryId, out: &mut Effects) {
        let Some(copy) = self.copies.get(&id) else { return };
        copy.unreadable.iter().for_each(|range| out.push(Effect::Notice(Notice::BlocksLost { range })));
        let ok = !copy.failed && !self.copy_is_lost(copy);
        self.end_copy(id, ok, out);
    }
}
