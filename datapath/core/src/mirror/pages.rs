//! Writes of bitmap pages, and the clean pass that clears bits (mirror rules 17 and 18).

use alloc::vec::Vec;

use super::{Ended, Mirror, Purpose, State, copies, flushes::Waiter, writes};
use crate::{
    bitmap::Bitmap,
    format::{bitmap_offset, encode_bitmap},
    io::{self, Effects, LegOp},
    page::Page,
    range_lock::EntryId,
    units::{Errno, Slot},
};

/// A region is cleaned when it was not written for this long, up to twice that.
pub(crate) const CLEAN_MILLIS: u64 = 5_000;

impl Mirror {
    /// Writes every changed page that has no write in flight.
    pub(super) fn pump_pages(&mut self, out: &mut Effects) {
        if self.read_only.is_some() {
            return;
        }
        for page in 0..self.bitmap.pages.len() {
            if !self.bitmap.pages[page].is_due() {
                continue;
            }
            let bits = self.bitmap.issued(page);
            let state = &self.bitmap.pages[page];
            let (bytes, slots) = (encode_bitmap(self.volume, state.sequence, &bits), state.slot);
            let offset = |slot: Slot| bitmap_offset(page as u64, 1 - slots[slot.index()]);
            self.bitmap.pages[page].waiting = self.write_page(Purpose::Page(page), offset, &bytes, out);
        }
        self.pump_list(out);
    }

    /// Writes a page to the legs, to each at its offset; which of them have to report it.
    pub(super) fn write_page(&mut self, purpose: Purpose, offset: impl Fn(Slot) -> u64, page: &io::Page, out: &mut Effects) -> [bool; 2] {
        Slot::BOTH.map(|slot| {
            if self.legs[slot.index()].takes_writes() {
                self.issue(slot, purpose, LegOp::WriteMeta { offset: offset(slot), page: page.clone() }, out);
            }
            // A leg on its way out is waited for until it is out: the page must be on every leg that the durable record counts.
            matches!(self.legs[slot.index()].state, State::In | State::Leaving | State::Recovering(_))
        })
    }

    /// A page could not be written to a leg. Whether that leg is still to report it, by being durably OUT; `None`: the mirror gave up.
    pub(super) fn page_failed(&mut self, slot: Slot, errno: Errno, out: &mut Effects) -> Option<bool> {
        self.fail_leg(slot, errno, out);
        match self.legs[slot.index()].state {
            State::Leaving => Some(true),
            State::In => {
                self.fail_mirror(errno, out);
                None
            }
            _ => Some(false),
        }
    }

    pub(super) fn page_done(&mut self, page: usize, slot: Slot, ended: Ended, out: &mut Effects) {
        if !self.bitmap.pages[page].awaits(slot) {
            return;
        }
        match ended {
            Ok(_) => self.bitmap.pages[page].written(slot),
            Err(errno) => {
                let Some(waits) = self.page_failed(slot, errno, out) else { return };
                self.bitmap.pages[page].waiting[slot.index()] = waits;
            }
        }
        self.page_landed(page, out);
    }

    /// A leg is durably OUT: no page waits for it.
    pub(super) fn pages_without(&mut self, slot: Slot, out: &mut Effects) {
        for page in 0..self.bitmap.pages.len() {
            if core::mem::take(&mut self.bitmap.pages[page].waiting[slot.index()]) {
                self.page_landed(page, out);
            }
        }
        self.list_without(slot, out);
    }

    fn page_landed(&mut self, page: usize, out: &mut Effects) {
        if self.bitmap.pages[page].waiting != [false; 2] {
            return;
        }
        self.bitmap.landed(page);
        self.room.look_again();
        let ready = |bitmap: &Bitmap, range| bitmap.is_durable(range);
        let mut ids: Vec<EntryId> =
            self.writes.iter().filter(|(_, w)| w.stage == writes::Stage::Bits && ready(&self.bitmap, w.range)).map(|(id, _)| *id).collect();
        ids.extend(self.copies.iter().filter(|(_, c)| c.step == copies::Step::Bits && ready(&self.bitmap, c.range)).map(|(id, _)| *id));
        ids.sort_unstable();
        for id in ids {
            self.ready_to_issue(id, out);
        }
    }

    pub(super) fn pages_idle(&self) -> bool {
        self.bitmap.pages.iter().all(Page::is_idle) && self.bad_blocks.page.is_idle()
    }

    pub(super) fn arm_clean(&mut self) {
        if self.clean_at.is_none() {
            self.clean_at = Some(self.now.plus_millis(CLEAN_MILLIS));
        }
    }

    /// Both legs are IN by the durable record of legs and witness, and no change of it is under way.
    pub(super) fn may_clear(&self) -> bool {
        self.in_count() == 2 && self.transition.is_none() && self.ready && self.read_only.is_none()
    }

    /// Asks for a flush that lets the idle regions be cleared.
    pub(super) fn clean_pass(&mut self, out: &mut Effects) {
        if !self.may_clear() || self.stopping.is_some() {
            // Armed again by the next write; a leg that comes IN arms it too.
            return;
        }
        let mut idle = Vec::new();
        let mut more = false;
        for (index, region) in self.bitmap.regions.iter_mut().enumerate() {
            if !region.set {
                continue;
            }
            more = true;
            if region.durable && region.pending == 0 && !region.unsynced && region.writes == region.seen {
                idle.push((index, region.writes));
            }
            region.seen = region.writes;
        }
        if more {
            self.arm_clean();
        }
        if !idle.is_empty() {
            self.submit_flush(Waiter::Clean(idle), out);
        }
    }

    /// Both legs were flushed after the last write of these regions, unless one came since.
    pub(super) fn clear_clean(&mut self, regions: &[(usize, u64)]) {
        if !self.may_clear() {
            return self.arm_clean();
        }
        for &(index, writes) in regions {
            let region = &self.bitmap.regions[index];
            if region.writes == writes && region.pending == 0 && !region.unsynced && region.set {
                self.bitmap.clear(index);
            }
        }
    }
}
