//! Reads (mirror rules 7, 21, 23, 26).
//!
//! A read goes to one IN leg. If that fails it goes to the other; if that fails too and there is more than one block, it goes
//! block by block, so that only a block that no leg can read fails. Where the legs may differ it goes block by block at once. What one leg could
//! not read and the other could is repaired. A read that touches a bad block (`bad_blocks.rs`) asks no leg. When the leg that a resync copied
//! from is lost, what others read there may be on its way to the leg that is left: reads wait for that copy, or they would see new, old, new
//! (rule 21). For the same reason nothing is read there from the leg that is left before the record without the other one is durable, nor while it is
//! not certain which leg is pinned: after a kill the other one could be what is read again.

use alloc::vec::Vec;

use super::{Ended, Mirror, Purpose, State, copies::CopyFor};
use crate::{
    bitmap,
    io::{Buffer, Effect, Effects, LegOp, Notice},
    range_lock::{Class, EntryId},
    units::{BlockRange, Errno, Slot, Tag},
};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Read {
    pub tag: Tag,
    pub range: BlockRange,
    /// What is being read now: all, or one block.
    piece: BlockRange,
    tried: [bool; 2],
}

impl Mirror {
    pub(super) fn submit_read(&mut self, tag: Tag, range: BlockRange, out: &mut Effects) {
        let id = self.next_entry();
        self.reads.insert(id, Read { tag, range, piece: range, tried: [false; 2] });
        if self.lock.acquire(id, range, Class::Read) {
            self.issue_read(id, out);
        }
    }

    pub(super) fn issue_read(&mut self, id: EntryId, out: &mut Effects) {
        let Some(read) = self.reads.get(&id) else { return };
        let (tag, range, piece, tried) = (read.tag, read.range, read.piece, read.tried);
        if self.bad_blocks.overlaps(range) {
            // No copy holds it (mirror rule 22). Looked at each time: it may have been listed since the last leg was asked.
            return self.finish_read(id, Err(Errno::EIO), out);
        }
        let behind = self.behind_on(piece);
        let Some(slot) = self.choose_leg(piece, tried, behind) else {
            let lands = |slow: Slot| self.legs[slow.index()].state == State::In && !tried[slow.index()];
            if behind.is_some_and(lands) {
                // The slow leg may serve it when it has what was answered (mirror rule 32).
                return self.read_again(id, out);
            }
            return self.read_failed(id, out);
        };
        let unsettled = self.counts_until_out(slot.other()) || self.pins_differ();
        if self.resync_lands_on(slot, piece) || (self.bitmap.unsynced(piece) && unsettled) {
            return self.held_reads.push(id);
        }
        if let Some(read) = self.reads.get_mut(&id) {
            read.tried[slot.index()] = true;
        }
        self.last_read = slot;
        self.legs[slot.index()].read_end = piece.end;
        let buffer = Buffer::Request { tag, skip: piece.start - range.start };
        self.issue(slot, Purpose::Read(id), LegOp::Read { range: piece, buffer }, out);
    }

    /// Those that wait for a copy's write, if it has ended, or for a leg to be durably OUT.
    pub(super) fn pump_reads(&mut self, out: &mut Effects) {
        for id in core::mem::take(&mut self.held_reads) {
            self.issue_read(id, out);
        }
    }

    /// The leg that serves a read: the pinned one where the legs may differ, else the one with less to do; among equals the one whose last read
    /// ended here, else the other one than last time. Never the one that is behind there; a slow one only if the other cannot.
    fn choose_leg(&self, piece: BlockRange, tried: [bool; 2], behind: Option<Slot>) -> Option<Slot> {
        let usable = |slot: &Slot| self.legs[slot.index()].state == State::In && !tried[slot.index()] && behind != Some(*slot);
        let mut usable = Slot::BOTH.into_iter().filter(usable);
        let first = usable.next()?;
        let Some(second) = usable.next() else { return Some(first) };
        if self.bitmap.unsynced(piece) {
            return Some(self.record.pin);
        }
        if let Some(slow) = self.write_mostly.slot {
            return Some(slow.other());
        }
        let (a, b) = (&self.legs[first.index()], &self.legs[second.index()]);
        Some(match a.reads.cmp(&b.reads) {
            core::cmp::Ordering::Less => first,
            core::cmp::Ordering::Greater => second,
            core::cmp::Ordering::Equal if a.read_end == piece.start => first,
            core::cmp::Ordering::Equal if b.read_end == piece.start => second,
            core::cmp::Ordering::Equal => self.last_read.other(),
        })
    }

    pub(super) fn read_done(&mut self, id: EntryId, slot: Slot, ended: Ended, out: &mut Effects) {
        let Some(read) = self.reads.get(&id) else { return };
        let (range, piece, tried) = (read.range, read.piece, read.tried);
        if ended.is_err() {
            if piece.len() > 1 && self.in_count() > 1 && self.bitmap.unsynced(piece) {
                // Where the legs may differ the other one serves, and is put there, only in the blocks that the pinned one cannot read.
                return self.next_block(id, piece.start, out);
            }
            // Another leg, if there is one that was not asked.
            return self.issue_read(id, out);
        }
        if tried[slot.other().index()] {
            // Where the legs may differ, the pinned leg must say the same, or be durably OUT, before anybody was told (mirror rule 21).
            let pinned = self.bitmap.unsynced(piece);
            let repairs = self.start_repair(piece, slot, slot.other(), out);
            if pinned && (repairs || self.counts_until_out(slot.other())) {
                return self.read_again(id, out);
            }
        }
        if piece.end == range.end {
            return self.finish_read(id, Ok(()), out);
        }
        self.next_block(id, piece.end, out);
    }

    /// The leg that was asked is OUT and has not answered: all of it again, from another leg, into other memory.
    pub(super) fn restart_read(&mut self, id: EntryId, out: &mut Effects) {
        let Some(read) = self.reads.get_mut(&id) else { return };
        (read.piece, read.tried) = (read.range, [false; 2]);
        out.push(Effect::NewBuffer { tag: read.tag });
        self.issue_read(id, out);
    }

    /// No leg could read the piece.
    fn read_failed(&mut self, id: EntryId, out: &mut Effects) {
        let Some(read) = self.reads.get(&id) else { return };
        let piece = read.piece;
        if piece.len() > 1 && self.in_count() > 1 {
            return self.next_block(id, piece.start, out);
        }
        out.push(Effect::Notice(Notice::Unreadable { range: piece }));
        self.finish_read(id, Err(Errno::EIO), out);
    }

    fn next_block(&mut self, id: EntryId, block: u64, out: &mut Effects) {
        if let Some(read) = self.reads.get_mut(&id) {
            read.piece = BlockRange::new(block, block + 1);
            read.tried = [false; 2];
        }
        self.issue_read(id, out);
    }

    fn finish_read(&mut self, id: EntryId, result: Result<(), Errno>, out: &mut Effects) {
        if result.is_ok() && self.lock.raced(id) {
            // What was read beside a write may not last: it is read when that write is final (mirror rule 7).
            return self.read_again(id, out);
        }
        let Some(read) = self.reads.remove(&id) else { return };
        self.lock.release(id, &mut self.woken);
        Self::answer(read.tag, result, out);
    }

    /// From the beginning, after those that wait for its blocks.
    fn read_again(&mut self, id: EntryId, out: &mut Effects) {
        let Some(Read { tag, range, .. }) = self.reads.remove(&id) else { return };
        self.lock.release(id, &mut self.woken);
        let id = self.next_entry();
        self.reads.insert(id, Read { tag, range, piece: range, tried: [false; 2] });
        if self.lock.acquire(id, range, Class::ReadAgain) {
            self.issue_read(id, out);
        }
    }

    /// Puts on `bad` what `good` holds, under the range lock, and reads it back. `false`: it will not.
    fn start_repair(&mut self, range: BlockRange, good: Slot, bad: Slot, out: &mut Effects) -> bool {
        // Where a region must not become dirty now, it is left to a later read. A region whose legs may differ is dirty.
        let mut room = self.room_for_repairs();
        let fits = |part: &BlockRange| {
            let new = self.bitmap.counts_of(*part).0;
            let Some(left) = &mut room else { return new == 0 && !self.bitmap.clearing(*part) };
            let fits = new <= *left;
            *left -= if fits { new } else { 0 };
            fits
        };
        let parts: Vec<BlockRange> = bitmap::parts(range).filter(fits).collect();
        !parts.is_empty() && self.repair(parts, good, bad, out)
    }

    /// The same for ranges that lie in one region each, whether there is room for that to become dirty or not.
    pub(super) fn repair(&mut self, mut parts: Vec<BlockRange>, good: Slot, bad: Slot, out: &mut Effects) -> bool {
        if self.legs[bad.index()].state != State::In || self.read_only.is_some() {
            return false;
        }
        parts.retain(|part| !self.copies.values().any(|copy| copy.purpose == CopyFor::Repair && copy.range == *part));
        if parts.is_empty() {
            return true;
        }
        let leg = &mut self.legs[bad.index()];
        leg.repairs += 1;
        if leg.repairs > super::REPAIR_BUDGET {
            self.fail_leg(bad, Errno::EIO, out);
            return false;
        }
        for part in parts {
            self.start_locked_copy(part, good, bad, CopyFor::Repair, Class::User, out);
        }
        true
    }
}
