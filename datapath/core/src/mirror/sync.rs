//! Making the legs equal: resync after an unclean stop, rebuild onto a leg (mirror rules 21 to 24).
//!
//! One region at a time, a few copies of it in flight. The last step of a rebuild drains the writes, flushes, writes the bitmap to the new
//! leg, and hands over to a transition.

use alloc::collections::VecDeque;

use super::{Mirror, State, copies::CopyFor, flushes::Waiter};
use crate::{
    bitmap::blocks_of,
    format::REGION_BLOCKS,
    io::{Effect, Effects, Fill, Notice},
    range_lock::Class,
    status::Sync,
    units::{BlockRange, Instant, Slot},
};

/// Copies in flight; one buffer of the mirror's is left for repairs.
const WINDOW: u64 = super::COPY_WINDOW as u64 - 1;
/// A rebuild remembers how far it came after so many regions (1 GiB).
const CHECKPOINT_REGIONS: u64 = 64;
/// A rebuild that met an unreadable block tries again after this long.
const RETRY_MILLIS: u64 = 30_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    Copying,
    Draining,
    Flushing,
    Pages,
    /// A transition may make the leg IN.
    Full,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Syncing {
    /// The leg that is filled; `None`: resync.
    pub target: Option<(Slot, Fill)>,
    pub stage: Stage,
    generation: u64,
    todo: VecDeque<usize>,
    region: Option<usize>,
    pos: BlockRange,
    in_flight: u64,
    region_failed: bool,
    /// Its legs came to differ again while it was copied.
    again: bool,
    failed: bool,
    done: u64,
    total: u64,
    pub retry_at: Option<Instant>,
    pub checkpoint: Option<u64>,
}

impl Syncing {
    pub(super) fn progress(&self) -> (Sync, u64, u64) {
        let sync = self.target.map_or(Sync::Resync, |(_, fill)| Sync::Rebuild(fill));
        (sync, self.done * REGION_BLOCKS, self.total * REGION_BLOCKS)
    }
}

impl Mirror {
    fn begin_sync(&mut self, target: Option<(Slot, Fill)>, todo: VecDeque<usize>) {
        self.generation += 1;
        let total = todo.len() as u64;
        self.syncing = Some(Syncing {
            target,
            stage: Stage::Copying,
            generation: self.generation,
            todo,
            region: None,
            pos: BlockRange::new(0, 0),
            in_flight: 0,
            region_failed: false,
            again: false,
            failed: false,
            done: 0,
            total,
            retry_at: None,
            checkpoint: None,
        });
    }

    /// Starts what the legs' states ask for, if nothing runs.
    fn choose_sync(&mut self, out: &mut Effects) {
        debug_assert!(self.bitmap.maybe_unsynced || self.bitmap.regions.iter().all(|region| !region.unsynced));
        let regions = self.bitmap.regions.iter().enumerate();
        let recovering = Slot::BOTH.into_iter().find_map(|slot| match self.legs[slot.index()].state {
            State::Recovering(fill) => Some((slot, fill)),
            _ => None,
        });
        if let Some((slot, fill)) = recovering {
            let first = (self.checkpoint / REGION_BLOCKS) as usize;
            let wanted = regions.filter(|(i, region)| region.set || (fill == Fill::Everything && *i >= first)).map(|(i, _)| i).collect();
            self.begin_sync(Some((slot, fill)), wanted);
            out.push(Effect::Notice(Notice::RebuildStarted { slot, fill }));
        } else if self.in_count() == 2 && self.bitmap.maybe_unsynced {
            let wanted: VecDeque<usize> = regions.filter(|(_, region)| region.unsynced).map(|(i, _)| i).collect();
            self.bitmap.maybe_unsynced = !wanted.is_empty();
            if !wanted.is_empty() {
                out.push(Effect::Notice(Notice::ResyncStarted { regions: wanted.len() as u64 }));
                self.begin_sync(None, wanted);
            }
        }
    }

    pub(super) fn cancel_sync(&mut self, out: &mut Effects) {
        if let Some(syncing) = self.syncing.take()
            && syncing.stage != Stage::Copying
        {
            self.resume(out);
        }
    }

    /// A leg that is being filled took a write that the only leg that counts did not: what is there is copied (again).
    pub(super) fn recopy(&mut self, out: &mut Effects) {
        if self.legs.iter().any(|leg| matches!(leg.state, State::Recovering(_))) {
            self.fresh = false;
            self.cancel_sync(out);
        }
    }

    /// A region that is being resynced differs again: it is not done with the end of this pass.
    pub(super) fn resync_again(&mut self, region: usize) {
        if let Some(syncing) = &mut self.syncing {
            syncing.again |= syncing.region == Some(region);
        }
    }

    pub(super) fn retry_sync(&mut self) {
        if self.syncing.as_ref().and_then(|syncing| syncing.retry_at).is_some_and(|at| at <= self.now) {
            self.syncing = None;
        }
    }

    pub(super) fn pump_sync(&mut self, out: &mut Effects) {
        let idle = !self.ready || self.read_only.is_some() || self.stopped;
        if idle || self.attach.is_some() {
            return;
        }
        // Who waits for room may wait for a region to be synced, so that it can be cleaned, also in a stop.
        let stopping = self.stopping.is_some() && self.room.is_empty();
        if self.syncing.is_none() && !stopping {
            self.choose_sync(out);
        }
        loop {
            let pages_idle = self.pages_idle();
            let Some(syncing) = &mut self.syncing else { return };
            match syncing.stage {
                Stage::Copying if syncing.retry_at.is_some() || stopping => return,
                Stage::Copying => {}
                Stage::Draining => {
                    let generation = syncing.generation;
                    if self.drained() && self.growing.is_none() {
                        self.set_sync_stage(Stage::Flushing);
                        self.submit_flush(Waiter::Rebuilt(generation), out);
                    }
                    return;
                }
                Stage::Pages if pages_idle => return self.set_sync_stage(Stage::Full),
                Stage::Flushing | Stage::Pages | Stage::Full => return,
            }
            if syncing.in_flight < WINDOW && !syncing.pos.is_empty() {
                let range = BlockRange::new(syncing.pos.start, syncing.pos.end.min(syncing.pos.start + super::COPY_BLOCKS));
                syncing.pos.start = range.end;
                syncing.in_flight += 1;
                let (generation, target) = (syncing.generation, syncing.target);
                let to = target.map_or(self.record.pin.other(), |(slot, _)| slot);
                let purpose = CopyFor::Sync { generation, fill: target.map(|(_, fill)| fill) };
                self.start_locked_copy(range, to.other(), to, purpose, Class::Copy, out);
                continue;
            }
            if syncing.in_flight > 0 {
                return;
            }
            self.next_region(out);
        }
    }

    fn set_sync_stage(&mut self, stage: Stage) {
        if let Some(syncing) = &mut self.syncing {
            syncing.stage = stage;
        }
    }

    /// The region is done; the next one, or the end.
    fn next_region(&mut self, out: &mut Effects) {
        let Some(syncing) = &mut self.syncing else { return };
        if let Some(region) = syncing.region.take() {
            syncing.done += 1;
            syncing.failed |= syncing.region_failed;
            if syncing.target.is_none() && syncing.region_failed {
                self.bitmap.cannot_be_synced(region);
            } else if syncing.target.is_none() && !syncing.again {
                self.bitmap.synced(region);
            }
            self.room.look_again();
            let everything = matches!(syncing.target, Some((_, Fill::Everything)));
            let block = (region as u64 + 1) * REGION_BLOCKS;
            // It does not go back when a rebuild that is resumed copies what was written behind it.
            let further = block > self.checkpoint && syncing.done.is_multiple_of(CHECKPOINT_REGIONS);
            if everything && !syncing.failed && further {
                let waiter = Waiter::Checkpoint(syncing.generation, block);
                return self.submit_flush(waiter, out);
            }
        }
        let Some(syncing) = &mut self.syncing else { return };
        if let Some(region) = syncing.todo.pop_front() {
            syncing.region = Some(region);
            (syncing.region_failed, syncing.again) = (false, false);
            syncing.pos = blocks_of(region, self.blocks);
        } else if syncing.target.is_none() {
            if syncing.failed {
                // What neither leg can read stays dirty and pinned; it is tried again later.
                syncing.retry_at = Some(self.now.plus_millis(RETRY_MILLIS));
            } else {
                self.syncing = None;
                out.push(Effect::Notice(Notice::ResyncCompleted));
                self.arm_clean();
            }
        } else if syncing.failed {
            syncing.retry_at = Some(self.now.plus_millis(RETRY_MILLIS));
        } else {
            syncing.stage = Stage::Draining;
            self.draining = true;
        }
    }

    pub(super) fn sync_copy_ended(&mut self, generation: u64, ok: bool) {
        if let Some(syncing) = &mut self.syncing
            && syncing.generation == generation
        {
            syncing.in_flight -= 1;
            syncing.region_failed |= !ok;
        }
    }

    /// Both legs hold everything durably; the new leg gets the bitmap too, and the list of bad blocks in place of the one that it may have.
    pub(super) fn rebuilt_flushed(&mut self, generation: u64, ok: bool) {
        if let Some(syncing) = &mut self.syncing
            && syncing.generation == generation
            && ok
        {
            syncing.stage = Stage::Pages;
            for page in &mut self.bitmap.pages {
                page.changed = true;
            }
            self.bad_blocks.page.changed = true;
        }
    }

    pub(super) fn checkpoint_flushed(&mut self, generation: u64, block: u64) {
        if let Some(syncing) = &mut self.syncing
            && syncing.generation == generation
        {
            syncing.checkpoint = Some(block);
        }
    }
}
