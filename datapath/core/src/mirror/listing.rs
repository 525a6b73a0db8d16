//! The list of bad blocks on the legs, and the writes that take blocks off it (mirror rule 22; `bad_blocks.rs` says why in this order).

use alloc::vec::Vec;

use super::{Ended, Mirror, Purpose, copies, flushes::Waiter, writes::Stage};
use crate::{
    format::{bad_blocks_offset, encode_bad_blocks},
    io::Effects,
    range_lock::EntryId,
    units::{Errno, Slot},
};

impl Mirror {
    /// Writes the list, if it changed and no write of it is in flight.
    pub(super) fn pump_list(&mut self, out: &mut Effects) {
        if !self.bad_blocks.page.is_due() {
            return;
        }
        self.bad_blocks.issued();
        let bytes = encode_bad_blocks(self.volume, self.bad_blocks.page.sequence, self.bad_blocks.runs());
        let slots = self.bad_blocks.page.slot;
        let offset = |slot: Slot| bad_blocks_offset(1 - slots[slot.index()]);
        self.bad_blocks.page.waiting = self.write_page(Purpose::BadBlocks, offset, &bytes, out);
    }

    pub(super) fn list_done(&mut self, slot: Slot, ended: Ended, out: &mut Effects) {
        if !self.bad_blocks.page.awaits(slot) {
            return;
        }
        match ended {
            Ok(_) => self.bad_blocks.page.written(slot),
            Err(errno) => {
                let Some(waits) = self.page_failed(slot, errno, out) else { return };
                self.bad_blocks.page.waiting[slot.index()] = waits;
            }
        }
        self.list_landed(out);
    }

    /// A leg is durably OUT: the list does not wait for it.
    pub(super) fn list_without(&mut self, slot: Slot, out: &mut Effects) {
        if core::mem::take(&mut self.bad_blocks.page.waiting[slot.index()]) {
            self.list_landed(out);
        }
    }

    fn list_landed(&mut self, out: &mut Effects) {
        if self.bad_blocks.page.waiting != [false; 2] {
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
        let gone = |slot: Slot| self.bad_blocks.page.waiting[slot.index()] && !self.legs[slot.index()].takes_writes();
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
