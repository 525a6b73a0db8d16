//! The list of bad blocks on the legs, and the writes that take blocks off it (mirror rule 22; `bad_blocks.rs` says why in this order).

use alloc::vec::Vec;

use super::{Ended, Mirror, Purpose, State, copies, flushes::Waiter, writes::Stage};
use crate::{
    format::{bad_blocks_offset, encode_bad_blocks},
    io::{Effects, LegOp},
    range_lock::EntryId,
    units::{Errno, Slot},
};

impl Mirror {
    /// Writes the list, if it changed and no write of it is in flight.
    pub(super) fn pump_list(&mut self, out: &mut Effects) {
        if !self.bad_blocks.changed || self.bad_blocks.in_flight.is_some() {
            return;
        }
        self.bad_blocks.issued();
        let page = encode_bad_blocks(self.volume, self.bad_blocks.sequence, self.bad_blocks.runs());
        for slot in Slot::BOTH {
            // A leg on its way out is waited for until it is out: the durable record still counts it.
            self.bad_blocks.waiting[slot.index()] =
                matches!(self.legs[slot.index()].state, State::In | State::Leaving | State::Recovering(_));
            if self.legs[slot.index()].takes_writes() {
                let offset = bad_blocks_offset(1 - self.bad_blocks.slot[slot.index()]);
                self.issue(slot, Purpose::BadBlocks, LegOp::WriteMeta { offset, page: page.clone() }, out);
            }
        }
    }

    pub(super) fn list_done(&mut self, slot: Slot, ended: Ended, out: &mut Effects) {
        let list = &mut self.bad_blocks;
        if list.in_flight.is_none() || !list.waiting[slot.index()] {
            return;
        }
        match ended {
            Ok(_) => {
                list.slot[slot.index()] = 1 - list.slot[slot.index()];
                list.waiting[slot.index()] = false;
            }
            Err(errno) => {
                self.fail_leg(slot, errno, out);
                match self.legs[slot.index()].state {
                    State::Leaving => {} // until it is durably OUT
                    State::In => return self.fail_mirror(errno, out),
                    _ => self.bad_blocks.waiting[slot.index()] = false,
                }
            }
        }
        self.list_landed(out);
    }

    /// A leg is durably OUT: the list does not wait for it.
    pub(super) fn list_without(&mut self, slot: Slot, out: &mut Effects) {
        if core::mem::take(&mut self.bad_blocks.waiting[slot.index()]) {
            self.list_landed(out);
        }
    }

    fn list_landed(&mut self, out: &mut Effects) {
        if self.bad_blocks.waiting != [false; 2] {
            return;
        }
        self.bad_blocks.landed();
        let list = &self.bad_blocks;
        let durable = |stage| matches!(stage, Stage::Unlisting(Some(version)) if list.is_durable(version));
        let writes: Vec<EntryId> = self.writes.iter().filter(|(_, write)| durable(write.stage)).map(|(id, _)| *id).collect();
        let durable = |step| matches!(step, copies::Step::Listing(version) if list.is_durable(version));
        let copies: Vec<EntryId> = self.copies.iter().filter(|(_, copy)| durable(copy.step)).map(|(id, _)| *id).collect();
        for id in writes {
            self.unlisted(id, Ok(()), out);
        }
        for id in copies {
            self.listed(id, out);
        }
    }

    /// Whether the list will not become durable before a leg is OUT, or never.
    pub(super) fn list_is_stuck(&self) -> bool {
        let gone = |slot: Slot| self.bad_blocks.waiting[slot.index()] && !self.legs[slot.index()].takes_writes();
        self.read_only.is_some() || Slot::BOTH.into_iter().any(gone)
    }

    /// Every leg that counts has a write over bad blocks. Before the list may say so it must be there for good: otherwise a power cut could
    /// show as data what never was.
    pub(super) fn start_unlisting(&mut self, id: EntryId, out: &mut Effects) {
        if let Some(write) = self.writes.get_mut(&id) {
            write.stage = Stage::Unlisting(None);
            self.submit_flush(Waiter::Overwritten(id), out);
        }
    }

    /// It is flushed, or will not be.
    pub(super) fn overwritten(&mut self, id: EntryId, ok: bool, out: &mut Effects) {
        let Some(range) = self.writes.get(&id).map(|write| write.range) else { return };
        let version = if ok { self.bad_blocks.remove(range) } else { None };
        if version.is_none() {
            return self.unlisted(id, Err(Errno::EIO), out);
        }
        if let Some(write) = self.writes.get_mut(&id) {
            write.stage = Stage::Unlisting(version);
        }
    }

    /// The end of a write over bad blocks.
    pub(super) fn unlisted(&mut self, id: EntryId, result: Result<(), Errno>, out: &mut Effects) {
        if let Some(write) = self.writes.get_mut(&id) {
            write.stage = Stage::Issued;
            self.finish_write(id, result, out);
        }
    }
}
