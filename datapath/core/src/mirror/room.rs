//! The cap of dirty regions (mirror rule 17): what a crash may leave to be resynced is bounded.
//!
//! While the durable record counts both legs, at most `Limits::dirty_regions` regions count as dirty: their bit is set, or may still be on
//! a disk. A write that needs another one waits in a queue, in order of arrival, *before* it goes into the range lock; its head is admitted
//! when there is room. Room is made by *cleaning* regions, many at once:
//! ```text
//! Draining ----------------> Flushing --both flushed--> Landing --the clear is durable--> room
//! chosen: nothing new goes   no write of them is
//! there (they are `closing`) pending any more
//! ```
//! The least recently written ones are chosen, idle ones first. What is to be written to a region that is closing waits in the same queue, so
//! that a region that is always being written can be cleaned too, and nobody is overtaken for ever.
//!
//! Nobody waits in a circle: what is in the range lock has its regions and waits for nobody in the queue, so the chosen regions drain, and
//! resync, repairs and reads go on. What overlaps somebody in the queue queues behind it, so overlapping writes stay in order (rule 4).
//!
//! - A request that touches more regions than the cap is admitted when nothing else is dirty.
//! - A region that is to be resynced is cleaned after that, so a queue may wait for the resync, and the resync goes on for it even in a stop. What the
//!   resync could not make equal (a block that no leg can read) is not counted: otherwise it could take all the room for ever.
//! - A repair that would need room is left to a later read: the other leg serves. A scrub's repair is done all the same; the scrub goes on when
//!   its region is cleaned, so it exceeds the cap by one.
//! - While one leg is away nothing is cleaned and the cap does not count (rule 18): everybody is admitted. While a leg is leaving, the queue
//!   waits for its OUT. After a rebuild there may be more than the cap: they are cleaned at once.

use alloc::{collections::VecDeque, vec::Vec};

use super::{Mirror, flushes::Waiter, writes::Stage as WriteStage};
use crate::{
    io::Effects,
    range_lock::{Class, EntryId},
    units::{BlockRange, Errno},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Draining,
    Flushing,
    Landing,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Cleaning {
    number: u64,
    stage: Stage,
    regions: Vec<usize>,
}

/// Who waits for room, and what makes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Room {
    queue: VecDeque<EntryId>,
    cleaning: Option<Cleaning>,
    /// Counts the cleanings.
    number: u64,
    /// Nothing could be cleaned, and nothing has changed that.
    hopeless: bool,
}

impl Room {
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// There may be something to be cleaned now.
    pub(super) fn look_again(&mut self) {
        self.hopeless = false;
    }
}

impl Mirror {
    /// Whether the cap counts: both legs do, by the durable record.
    fn is_capped(&self) -> bool {
        self.legs.iter().all(super::Leg::counted) && self.read_only.is_none()
    }

    fn cap(&self) -> u64 {
        self.limits.dirty_regions.max(1)
    }

    /// Whether more regions are dirty than the cap allows: after a rebuild, or by a repair of a scrub.
    pub(super) fn is_crowded(&self) -> bool {
        self.is_capped() && self.bitmap.counted() > self.cap()
    }

    /// The mirror gave up, or waits for a leg to be durably OUT.
    fn no_room_will_be_made(&self) -> bool {
        self.read_only.is_some() || (self.is_capped() && self.in_count() < 2)
    }

    /// Whether the regions of a range may become dirty now, if nobody is before it.
    fn fits(&self, range: BlockRange) -> bool {
        let (new, own) = self.bitmap.counts_of(range);
        let counted = self.bitmap.counted();
        // While there are too many, a clear that is on its way is not taken back.
        let brings_none = new == 0 && (counted <= self.cap() || !self.bitmap.clearing(range));
        !self.bitmap.closing(range) && (brings_none || counted + new <= self.cap() || counted == own)
    }

    /// Whether what is to be written to this range waits. A write that overlaps one in the queue goes behind it.
    pub(super) fn waits_for_room(&self, range: BlockRange) -> bool {
        let overtakes = !self.room.queue.is_empty()
            && (self.bitmap.counts_of(range).0 > 0 || self.room.queue.iter().any(|id| self.writes[id].range.overlaps(range)));
        overtakes || (self.is_capped() && !self.fits(range))
    }

    /// How many regions repairs may make dirty now; `None`: there are too many already, and one whose clear is on its way stays clean too. A repair
    /// that makes none dirty need not queue behind a write: it brings nothing new.
    pub(super) fn room_for_repairs(&self) -> Option<u64> {
        if !self.is_capped() {
            return Some(u64::MAX);
        }
        let room = self.cap().checked_sub(self.bitmap.counted())?;
        Some(if self.room.queue.is_empty() { room } else { 0 })
    }

    pub(super) fn queue_for_room(&mut self, id: EntryId) {
        if let Some(write) = self.writes.get_mut(&id) {
            write.stage = WriteStage::Room;
        }
        self.room.queue.push_back(id);
        self.room.hopeless = false;
    }

    /// No room will be made for this write, if that is so.
    pub(super) fn refuse_room(&mut self, id: EntryId, out: &mut Effects) {
        if !self.no_room_will_be_made() {
            return;
        }
        self.room.queue.retain(|queued| *queued != id);
        if let Some(write) = self.writes.remove(&id) {
            Self::answer(write.tag, Err(Errno::EIO), out);
        }
    }

    pub(super) fn pump_room(&mut self, out: &mut Effects) {
        if self.stopped {
            return;
        }
        self.pump_cleaning(out);
        while let Some(id) = self.room.queue.front() {
            if self.is_capped() && !self.fits(self.writes[id].range) {
                break;
            }
            self.admit(out);
        }
        // A stop flushes and clears by itself what nobody waits for.
        let wanted = self.stopping.is_none() || !self.room.queue.is_empty();
        if wanted && self.room.cleaning.is_none() && !self.room.hopeless && self.may_clear() {
            self.choose_regions();
            self.pump_cleaning(out);
        }
    }

    /// The head of the queue goes into the range lock, as if it had come now.
    fn admit(&mut self, out: &mut Effects) {
        let Some(id) = self.room.queue.pop_front() else { return };
        self.room.hopeless = false;
        let Some(mut write) = self.writes.remove(&id) else { return };
        let (id, range) = (self.next_entry(), write.range);
        write.stage = WriteStage::Queued;
        self.writes.insert(id, write);
        self.enter(id, range, Class::User, out);
    }

    /// Chooses what is cleaned, if there are too many or somebody waits.
    fn choose_regions(&mut self) {
        let head = self.room.queue.front().map(|id| self.writes[id].range);
        let new = head.map_or(0, |range| self.bitmap.counts_of(range).0);
        let shortage = usize::try_from((self.bitmap.counted() + new).saturating_sub(self.cap())).unwrap_or(usize::MAX);
        if shortage == 0 {
            return;
        }
        let own = head.map_or(0..0, crate::bitmap::regions_of);
        let regions = self.bitmap.regions.iter().enumerate();
        let may = regions.filter(|(index, region)| region.set && region.durable && !region.unsynced && !own.contains(index));
        let mut chosen: Vec<(bool, u64, usize)> = may.map(|(index, region)| (region.pending > 0, region.stamp, index)).collect();
        chosen.sort_unstable();
        let batch = (self.cap() as usize / 4).max(1);
        // Nobody waits: a flush for each region that a resync is done with would be many.
        let few = head.is_none() && chosen.len() < batch.min(shortage);
        let idle = chosen.partition_point(|(pending, ..)| !pending);
        // One that is being written is only chosen for want of others.
        chosen.truncate(if idle > 0 { idle.min(batch.max(shortage)) } else { 1 });
        self.room.hopeless = few || chosen.is_empty();
        if self.room.hopeless {
            return;
        }
        let regions: Vec<usize> = chosen.into_iter().map(|(.., index)| index).collect();
        regions.iter().for_each(|index| self.bitmap.regions[*index].closing = true);
        self.room.number += 1;
        self.room.cleaning = Some(Cleaning { number: self.room.number, stage: Stage::Draining, regions });
    }

    fn pump_cleaning(&mut self, out: &mut Effects) {
        let capped = self.is_capped() && self.in_count() == 2;
        let Some(cleaning) = &mut self.room.cleaning else { return };
        let regions = || cleaning.regions.iter().map(|index| &self.bitmap.regions[*index]);
        match cleaning.stage {
            _ if !capped => self.end_cleaning(),
            Stage::Draining if regions().all(|region| region.pending == 0) => {
                cleaning.stage = Stage::Flushing;
                let regions = cleaning.regions.iter().map(|index| (*index, self.bitmap.regions[*index].writes)).collect();
                let waiter = Waiter::Room(cleaning.number, regions);
                self.submit_flush(waiter, out);
            }
            Stage::Landing if regions().all(|region| region.set || !region.on_disk) => self.end_cleaning(),
            Stage::Draining | Stage::Flushing | Stage::Landing => {}
        }
    }

    /// Both legs were flushed, or not.
    pub(super) fn room_flushed(&mut self, number: u64, regions: &[(usize, u64)], ok: bool) {
        let Some(cleaning) = self.room.cleaning.as_mut().filter(|cleaning| cleaning.number == number) else { return };
        cleaning.stage = Stage::Landing;
        if ok && self.may_clear() {
            self.clear_clean(regions);
        } else {
            self.end_cleaning();
        }
    }

    fn end_cleaning(&mut self) {
        let regions = self.room.cleaning.take().map_or(Vec::new(), |cleaning| cleaning.regions);
        regions.into_iter().for_each(|index| self.bitmap.regions[index].closing = false);
        self.room.hopeless = false;
    }

    /// Asserts what is counted, and who is in the queue.
    pub(super) fn check_room(&self) {
        let counted = self.bitmap.regions.iter().filter(|region| (region.set || region.on_disk) && !region.stuck).count();
        assert_eq!(self.bitmap.counted(), counted as u64, "invariant 6");
        let waiting = self.writes.iter().filter(|(_, write)| write.stage == WriteStage::Room).map(|(id, _)| *id);
        assert!(waiting.eq(self.room.queue.iter().copied()), "invariant 6");
    }
}
