//! Write-mostly and write-behind (mirror rule 32): one leg is slow, and nobody waits for it more than he must.
//!
//! Reads go to the other, *fast* leg, unless that cannot. With write-behind a write is answered when the fast leg has it:
//! ```text
//! issued to both -> fast leg done -> answered, *behind* -> slow leg done -> released
//!                                       |  reads of the range go to the fast leg, and wait for the slow one if that cannot
//!                                       |  writes of the range wait; a flush waits, and so covers it on both legs
//! ```
//! What holds, rule by rule:
//! - 5, 6: the range and the payload are kept until the slow leg has reported or is durably OUT, and it is written once.
//! - 8, 21: the answer rests on the fast leg alone, so that is the leg that the durable record pins, before the first such answer: after a kill
//!   the region is dirty, everybody reads the fast leg, and the resync copies from it.
//!   Not while a record that pins another leg may be on the disks, because it was tried and its witness failed.
//! - 9, 12: the slow leg fails such a write: it goes OUT, and no later answer or flush misses it before that is durable.
//! - 14, 23: the fast leg fails: the record that says so is not written before all that is behind has landed on the slow one.
//! - 15, 16: a flush waits until nothing is behind, and nothing new comes to be behind while one waits. FUA is never behind.
//! - 28: no space on the slow leg for what was answered cannot be taken back: that leg goes OUT. (Thick volumes never meet it.)
//!
//! So what may be lost, beyond a mirror without it: a write that was answered and not flushed, if the fast leg's disk *and* the process or the node
//! die together before it has landed on the slow one (after a restart the resync does that, and a flush covers it only at the end of the resync); or if the fast leg's disk fails and the slow leg then fails that very write. In the second
//! case the mirror gives up: no flush claims success any more, and reads of those blocks get EIO, never what was there before.

use super::{Mirror, Report, State, flushes::Waiter, writes::Write};
use crate::{
    io::{Effect, Effects, Notice},
    range_lock::EntryId,
    units::{BlockRange, Errno, Slot, Tag},
};

/// What the operator says of the legs. It is of this run only, and of the leg that is in the slot now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct WriteMostly {
    /// The slow leg.
    pub slot: Option<Slot>,
    /// Writes may be behind on it.
    pub behind: bool,
    /// How far a change of the pinned leg has come.
    repin: Repin,
    /// Counts the flushes for it.
    flushes: u64,
}

/// `No -> Draining` (new writes are held) `-> Flushing(which) -> Flushed`, and the record is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Repin {
    #[default]
    No,
    Draining,
    Flushing(u64),
    Flushed,
}

impl WriteMostly {
    /// Another leg is in a slot: what was said of the legs means nothing any more.
    pub(super) fn forget(&mut self) {
        (self.slot, self.behind) = (None, false);
    }
}

impl Mirror {
    pub(super) fn set_write_mostly(&mut self, tag: Tag, slot: Option<Slot>, behind: bool, out: &mut Effects) {
        (self.write_mostly.slot, self.write_mostly.behind) = (slot, behind && slot.is_some());
        Self::answer(tag, Ok(()), out);
    }

    /// The slow leg, if writes may be behind on it now.
    pub(super) fn write_behind(&self) -> Option<Slot> {
        let slow = self.write_mostly.slot.filter(|_| self.write_mostly.behind)?;
        let pinned = self.record.pin == slow.other() && self.in_count() == 2 && self.read_only.is_none();
        (pinned && !self.is_restating()).then_some(slow)
    }

    /// Writes that are behind, and their blocks.
    pub(super) fn behind(&self) -> (u64, u64) {
        let behind = self.writes.values().filter(|write| write.behind.is_some());
        behind.fold((0, 0), |(writes, blocks), write| (writes + 1, blocks + write.range.len()))
    }

    pub(super) fn is_behind(&self) -> bool {
        self.writes.values().any(|write| write.behind.is_some())
    }

    /// The leg that a write need not wait for: the fast one has it, and there is room behind.
    pub(super) fn may_answer_behind(&self, write: &Write) -> Option<Slot> {
        let slow = self.write_behind()?;
        let reported = write.reports[slow.other().index()] == Report::Done && write.reports[slow.index()] == Report::Pending;
        // A flush that waits covers what was answered before it: nothing may come to that meanwhile.
        let plain = write.payload && !write.fua && self.flush_next.is_empty() && self.stopping.is_none() && !self.draining;
        if !reported || !plain || self.bad_blocks.overlaps(write.range) {
            return None;
        }
        let (writes, blocks) = self.behind();
        (writes < self.limits.behind_writes && blocks + write.range.len() <= self.limits.behind_blocks).then_some(slow)
    }

    pub(super) fn answer_behind(&mut self, id: EntryId, slow: Slot, out: &mut Effects) {
        let Some(write) = self.writes.get_mut(&id) else { return };
        (write.answered, write.behind) = (true, Some(slow));
        out.push(Effect::Complete { tag: write.tag, result: Ok(()) });
        self.lock.let_reads_by(id, &mut self.woken);
    }

    /// The slow leg has reported what is behind, or is OUT.
    pub(super) fn judge_behind(&mut self, id: EntryId, slow: Slot, out: &mut Effects) {
        let Some(write) = self.writes.get_mut(&id) else { return };
        let range = write.range;
        let failed = match write.reports[slow.index()] {
            Report::Pending => return,
            Report::Failed(errno) => Some(errno),
            Report::NoSpace => Some(Errno::ENOSPC),
            Report::None | Report::Done | Report::Abandoned => None,
        };
        write.behind = None;
        if let Some(errno) = failed.filter(|_| self.legs[slow.index()].state == State::In) {
            if self.legs[slow.other().index()].state == State::In {
                self.fail_leg(slow, errno, out);
            } else {
                self.lose(range, errno, out);
            }
        }
        self.release_write(id, out);
    }

    /// What was answered is on no leg that counts: nobody may be told otherwise.
    fn lose(&mut self, range: BlockRange, errno: Errno, out: &mut Effects) {
        self.bad_blocks.join(&[range]);
        out.push(Effect::Notice(Notice::BlocksLost { range }));
        self.fail_mirror(errno, out);
    }

    /// The slow leg of a write that is behind somewhere in this range: it has older data.
    pub(super) fn behind_on(&self, range: BlockRange) -> Option<Slot> {
        self.writes.values().filter(|write| write.range.overlaps(range)).find_map(|write| write.behind)
    }

    /// Whether the leg that will be the only one still has to be given what was answered.
    pub(super) fn must_land(&self) -> bool {
        let pending = |write: &Write, slow: Slot| write.reports[slow.index()] == Report::Pending;
        self.writes
            .values()
            .any(|write| write.behind.is_some_and(|slow| self.legs[slow.index()].state == State::In && pending(write, slow)))
    }

    /// Whether the record is to pin the fast leg, so that writes may be behind on the other. Not while the legs may differ: the pin decides then.
    pub(super) fn wants_to_repin(&self) -> Option<Slot> {
        let slow = self.write_mostly.slot.filter(|_| self.write_mostly.behind)?;
        let ends = self.stopping.is_some() || self.stopped || self.read_only.is_some();
        let quiet = self.ready && !ends && self.syncing.is_none() && self.attach.is_none();
        let equal = self.in_count() == 2 && !self.bitmap.maybe_unsynced;
        (quiet && equal && self.record.pin == slow).then_some(slow)
    }

    /// Drains, then flushes both legs; whether that is done. What a resync or a repair made equal may be so in their caches only: after a power cut the
    /// newly pinned leg would have what readers of the other one were told had never been written (mirror rule 21).
    pub(super) fn flush_for_repin(&mut self, out: &mut Effects) -> bool {
        self.draining = true;
        if self.write_mostly.repin == Repin::No {
            self.write_mostly.repin = Repin::Draining;
        }
        if self.write_mostly.repin == Repin::Draining && self.drained() {
            self.write_mostly.flushes += 1;
            let number = self.write_mostly.flushes;
            self.write_mostly.repin = Repin::Flushing(number);
            self.submit_flush(Waiter::Pin(number), out);
        }
        self.write_mostly.repin == Repin::Flushed
    }

    /// That flush has ended; it may be one of an earlier attempt.
    pub(super) fn pin_flushed(&mut self, number: u64, ok: bool) {
        if self.write_mostly.repin == Repin::Flushing(number) {
            self.write_mostly.repin = if ok { Repin::Flushed } else { Repin::Draining };
        }
    }

    /// New writes are held no longer than the change of the pin is wanted.
    pub(super) fn stop_repinning(&mut self, out: &mut Effects) {
        if core::mem::take(&mut self.write_mostly.repin) != Repin::No {
            self.resume(out);
        }
    }
}
