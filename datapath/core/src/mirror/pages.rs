//! Writes of bitmap pages, and the clean pass that clears bits (mirror rules 17 and 18).

use alloc::vec::Vec;

use super::{Ended, Mirror, Purpose, State, copies, flushes::Waiter, writes};
use crate::{
    bitmap::Bitmap,
    format::{bitmap_offset, encode_bitmap},
    io::{Effects, LegOp},
    range_lock::EntryId,
    units::Slot,
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
            if !self.bitmap.pages[page].changed || self.bitmap.pages[page].in_flight.is_some() {
                continue;
            }
            let bits = self.bitmap.bits(page);
            let state = &mut self.bitmap.pages[page];
            state.changed = false;
            state.sequence += 1;
            let bytes = encode_bitmap(self.volume, state.sequence, &bits);
            state.in_flight = Some(bits);
            for slot in Slot::BOTH {
                let state = &mut self.bitmap.pages[page];
                // A leg on its way out is waited for until it is out: the bit must be on every leg that the durable record counts.
                state.waiting[slot.index()] = matches!(self.legs[slot.index()].state, State::In | State::Leaving | State::Recovering(_));
                if self.legs[slot.index()].takes_writes() {
                    let offset = bitmap_offset(page as u64, 1 - state.slot[slot.index()]);
                    self.issue(slot, Purpose::Page(page), LegOp::WriteMeta { offset, page: bytes.clone() }, out);
                }
            }
        }
        self.pump_list(out);
    }

    pub(super) fn page_done(&mut self, page: usize, slot: Slot, ended: Ended, out: &mut Effects) {
        let state = &mut self.bitmap.pages[page];
        if state.in_flight.is_none() || !state.waiting[slot.index()] {
            return;
        }
        match ended {
            Ok(_) => {
                state.slot[slot.index()] = 1 - state.slot[slot.index()];
                state.waiting[slot.index()] = false;
            }
            Err(errno) => {
                self.fail_leg(slot, errno, out);
                match self.legs[slot.index()].state {
                    State::Leaving => {} // until it is durably OUT
                    State::In => return self.fail_mirror(errno, out),
                    _ => self.bitmap.pages[page].waiting[slot.index()] = false,
                }
            }
        }
        self.page_landed(page, out);
    }

    /// A leg is durably OUT: no page waits for it.
    pub(super) fn pages_without(&mut self, slot: Slot, out: &mut Effects) {
        for page in 0..self.bitmap.pages.len() {
            if self.bitmap.pages[page].waiting[slot.index()] {
                self.bitmap.pages[page].waiting[slot.index()] = false;
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
        self.bitmap.pages.iter().all(|page| page.in_flight.is_none() && !page.changed) && self.bad_blocks.is_idle()
    }

    pub(super) fn arm_clean(&mut self) {
        if self.clean_at.is_none() {
            self.clean_at = Some(self.now.plus_millis(CLEAN_MILLIS));
        }
    }

    /// Both legs are IN by the durable record of legs and witness, and no change of it is under way.
    fn may_clear(&self) -> bool {
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
