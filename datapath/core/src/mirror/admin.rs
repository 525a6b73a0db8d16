//! What the operator asks: attach and detach a leg, grow, stop (mirror rules 23, 24, 31).

use super::{Mirror, State, flushes::Waiter};
use crate::{
    format::MAX_BLOCKS,
    io::{Effect, Effects, Fill, Notice},
    units::{Errno, LegId, Slot, Tag},
};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Growing {
    pub tag: Tag,
    pub blocks: u64,
    /// The new bitmap pages are durable.
    pub pages_written: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum StopStage {
    Draining,
    Flushing,
    Clearing,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stopping {
    tag: Tag,
    stage: StopStage,
}

impl Stopping {
    pub(super) const fn new(tag: Tag) -> Self {
        Self { tag, stage: StopStage::Draining }
    }
}

impl Mirror {
    pub(super) fn submit_attach(&mut self, tag: Tag, slot: Slot, id: LegId, fill: Fill, newest: u8, out: &mut Effects) {
        // No leg comes back while any I/O ever submitted to it is outstanding (mirror rule 25), also if its place had another leg since.
        let zombie = self.ios.values().any(|io| io.leg.is_some_and(|(_, old)| old == id));
        let leg = &mut self.legs[slot.index()];
        if leg.state != State::Out || zombie || self.attach.is_some() || self.read_only.is_some() {
            return Self::answer(tag, Err(Errno::EBUSY), out);
        }
        if leg.id != id {
            (leg.id, leg.reads) = (id, 0);
            self.write_mostly.forget();
        }
        (leg.repairs, leg.superblock_slot) = (0, newest);
        // Newer than anything that an absent leg may have been given.
        self.sequence += 1000;
        let epoch = self.record.name.epoch;
        self.bitmap.pages.iter_mut().for_each(|page| page.forget(slot, epoch));
        self.bad_blocks.page.forget(slot, epoch);
        self.attach = Some((tag, slot, fill));
        self.draining = true;
    }

    pub(super) fn submit_detach(&mut self, tag: Tag, slot: Slot, out: &mut Effects) {
        self.fail_leg(slot, Errno::ENODEV, out);
        match self.legs[slot.index()].state {
            State::Out => Self::answer(tag, Ok(()), out),
            // No record will say so any more.
            State::Leaving | State::Dropping if self.read_only.is_some() => Self::answer(tag, Err(Errno::EIO), out),
            State::Leaving | State::Dropping => self.detaching.push((tag, slot)),
            State::In | State::Recovering(_) => Self::answer(tag, Err(Errno::EBUSY), out),
        }
    }

    pub(super) fn detached(&mut self, slot: Slot, out: &mut Effects) {
        for (tag, wanted) in core::mem::take(&mut self.detaching) {
            if wanted == slot { Self::answer(tag, Ok(()), out) } else { self.detaching.push((tag, wanted)) }
        }
    }

    pub(super) fn submit_grow(&mut self, tag: Tag, blocks: u64, out: &mut Effects) {
        if blocks < self.blocks || blocks > MAX_BLOCKS || self.growing.is_some() {
            let errno = if self.growing.is_some() { Errno::EBUSY } else { Errno::EINVAL };
            return Self::answer(tag, Err(errno), out);
        }
        if self.read_only.is_some() {
            return Self::answer(tag, Err(Errno::EROFS), out);
        }
        self.bitmap.extend(blocks);
        self.growing = Some(Growing { tag, blocks, pages_written: false });
    }

    pub(super) fn pump_growing(&mut self) {
        if self.pages_idle()
            && let Some(growing) = &mut self.growing
        {
            growing.pages_written = true;
        }
    }

    pub(super) fn grown(&mut self, blocks: u64, out: &mut Effects) {
        self.blocks = blocks;
        if let Some(growing) = self.growing.take() {
            out.push(Effect::Notice(Notice::Grown { blocks }));
            Self::answer(growing.tag, Ok(()), out);
        }
    }

    pub(super) fn pump_stop(&mut self, out: &mut Effects) {
        let busy = !self.writes.is_empty()
            || !self.reads.is_empty()
            || !self.copies.is_empty()
            || self.batch.is_some()
            || self.transition.is_some();
        // A leg that fails in the last flush is durably OUT before the stop is answered.
        let cleared = self.pages_idle() && self.transition.is_none() || self.read_only.is_some();
        let Some(stopping) = &mut self.stopping else { return };
        match stopping.stage {
            StopStage::Draining if !busy && self.attach.is_none() && self.growing.is_none() => {
                stopping.stage = StopStage::Flushing;
                self.submit_flush(Waiter::Stop, out);
                // A mirror that takes no more writes has nothing to flush: it is answered at once.
                self.pump_stop(out);
            }
            StopStage::Clearing if cleared => {
                let tag = stopping.tag;
                self.stopping = None;
                self.stopped = true;
                self.clean_at = None;
                self.syncing = None;
                Self::answer(tag, Ok(()), out);
            }
            StopStage::Draining | StopStage::Flushing | StopStage::Clearing => {}
        }
    }

    /// Everything is durable; where the legs are known equal, the bits say so.
    pub(super) fn stop_flushed(&mut self, ok: bool) {
        if ok && self.in_count() == 2 && self.transition.is_none() {
            for region in 0..self.bitmap.regions.len() {
                if self.bitmap.regions[region].set && !self.bitmap.regions[region].unsynced {
                    self.bitmap.clear(region);
                }
            }
        }
        if let Some(stopping) = &mut self.stopping {
            stopping.stage = StopStage::Clearing;
        }
    }
}
