//! Writes and zeroes (mirror rules 3, 5, 8, 9, 14, 16, 28, 29).

use super::{Ended, copies::Mend};
use super::{Mirror, Purpose, Report, State};
use crate::{
    fault::{Fault, classify},
    io::{Buffer, Effect, Effects, LegOp, Notice},
    range_lock::{Class, EntryId},
    units::{BlockRange, Errno, Slot, Tag},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Stage {
    /// Waits, outside the range lock, until its regions may become dirty (`room.rs`).
    Room,
    /// In the range lock.
    Queued,
    /// Waits for its dirty bits.
    Bits,
    /// Waits for the end of a drain.
    Held,
    /// On the legs.
    Issued,
    /// One leg had no space: what the other took is copied back.
    Mending,
    /// It went over bad blocks: flushed, then (with what to wait for) off the durable list.
    Unlisting(Option<u64>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Write {
    pub tag: Tag,
    pub range: BlockRange,
    /// A payload, or zeroes.
    pub payload: bool,
    pub fua: bool,
    pub stage: Stage,
    pub reports: [Report; 2],
    pub answered: bool,
    /// Answered when only the fast leg had it; this is the other one (`behind.rs`).
    pub behind: Option<Slot>,
}

impl Mirror {
    pub(super) fn submit_write(&mut self, tag: Tag, range: BlockRange, payload: bool, fua: bool, out: &mut Effects) {
        if self.read_only.is_some() {
            return Self::answer(tag, Err(Errno::EROFS), out);
        }
        let id = self.next_entry();
        let write = Write { tag, range, payload, fua, stage: Stage::Queued, reports: [Report::None; 2], answered: false, behind: None };
        self.writes.insert(id, write);
        if self.waits_for_room(range) { self.queue_for_room(id) } else { self.enter(id, range, Class::User, out) }
    }

    pub(super) fn issue_write(&mut self, id: EntryId, out: &mut Effects) {
        if self.read_only.is_some() {
            return self.finish_write(id, Err(Errno::EIO), out);
        }
        let Some(write) = self.writes.get_mut(&id) else { return };
        write.stage = Stage::Issued;
        let (range, tag, payload, fua) = (write.range, write.tag, write.payload, write.fua);
        for slot in Slot::BOTH {
            if self.legs[slot.index()].takes_writes() {
                if let Some(write) = self.writes.get_mut(&id) {
                    write.reports[slot.index()] = Report::Pending;
                }
                let op =
                    if payload { LegOp::Write { range, buffer: Buffer::Request { tag, skip: 0 }, fua } } else { LegOp::Zero { range } };
                self.issue(slot, Purpose::Write(id), op, out);
            }
        }
    }

    pub(super) fn write_done(&mut self, id: EntryId, slot: Slot, ended: Ended, out: &mut Effects) {
        let Some(write) = self.writes.get_mut(&id) else { return };
        if write.reports[slot.index()] != Report::Pending {
            return;
        }
        write.reports[slot.index()] = report(ended);
        if let (Err(errno), State::Recovering(_)) = (ended, self.legs[slot.index()].state) {
            // It does not count for the answer, and its region stays dirty until it is full.
            self.fail_leg(slot, errno, out);
        }
        self.judge_write(id, out);
    }

    /// Answers if every leg that counts has its say, and releases if every leg has reported.
    pub(super) fn judge_write(&mut self, id: EntryId, out: &mut Effects) {
        let Some(write) = self.writes.get(&id) else { return };
        if write.stage != Stage::Issued {
            return;
        }
        match write.behind {
            Some(slow) => return self.judge_behind(id, slow, out),
            None if write.answered => return self.release_write(id, out),
            None => {}
        }
        if let Some(slow) = self.may_answer_behind(write) {
            return self.answer_behind(id, slow, out);
        }
        let range = write.range;
        let leaving = self.legs.iter().any(|leg| leg.state == State::Leaving);
        let verdict = match self.verdict(write.reports) {
            // The durable record still counts the leg that failed, and after a kill it could be what is read (mirror rule 21).
            Verdict::NoSpace | Verdict::AllFailed if leaving => Verdict::Wait,
            verdict => verdict,
        };
        match verdict {
            Verdict::Wait => {}
            Verdict::Done if self.bad_blocks.overlaps(range) => self.start_unlisting(id, out),
            Verdict::Done => self.finish_write(id, Ok(()), out),
            Verdict::NoSpace => {
                let refuses = |slot: Slot| write.reports[slot.index()] == Report::NoSpace;
                // Where the legs differ already the pinned one has what readers saw, and the other one may have something older.
                let (unsynced, pin) = (self.bitmap.unsynced(range), self.record.pin);
                let refused = if refuses(pin) { pin } else { pin.other() };
                if self.in_count() < 2 {
                    self.recopy(out);
                    self.finish_write(id, Err(Errno::ENOSPC), out);
                } else if unsynced && refused != pin {
                    self.mark_unsynced(range);
                    self.finish_write(id, Err(Errno::ENOSPC), out);
                } else {
                    if let Some(write) = self.writes.get_mut(&id) {
                        write.stage = Stage::Mending;
                    }
                    self.start_mend(Mend { write: id, reversed: unsynced }, range, refused, out);
                }
            }
            Verdict::AllFailed => {
                if self.in_count() == 2 {
                    out.push(Effect::Notice(Notice::WriteFailedOnBoth { range }));
                    self.mark_unsynced(range);
                } else {
                    self.recopy(out);
                }
                self.finish_write(id, Err(Errno::EIO), out);
            }
            Verdict::Lost(slot, errno) => {
                self.fail_leg(slot, errno, out);
                // If it was the last leg after all, there is nobody to wait for but the one before it.
                if self.legs[slot.index()].state != State::Leaving && !leaving {
                    self.finish_write(id, Err(Errno::EIO), out);
                }
            }
        }
        if self.read_only.is_some() {
            self.fail_gated_write(id, out);
        }
    }

    /// What the reports of the counted legs add up to. A leg that is durably OUT has no say; one that is leaving is waited for
    /// until it is out, because the durable record still counts it (mirror rule 8).
    pub(super) fn verdict(&self, reports: [Report; 2]) -> Verdict {
        let counted = || Slot::BOTH.into_iter().filter(|slot| self.legs[slot.index()].counted()).map(|slot| (slot, reports[slot.index()]));
        if counted().any(|(_, report)| report == Report::Pending) {
            return Verdict::Wait;
        }
        let done = counted().any(|(_, report)| report == Report::Done);
        let no_space = counted().any(|(_, report)| report == Report::NoSpace);
        for (slot, report) in counted() {
            if let Report::Failed(errno) = report
                && (done || no_space)
                && self.legs[slot.index()].state == State::In
            {
                return Verdict::Lost(slot, errno);
            }
        }
        if no_space {
            return Verdict::NoSpace;
        }
        if !done {
            return Verdict::AllFailed;
        }
        if counted().all(|(_, report)| report == Report::Done) { Verdict::Done } else { Verdict::Wait }
    }

    /// Whether a leg that still counts has to report.
    pub(super) fn awaited(&self, reports: [Report; 2]) -> bool {
        Slot::BOTH.into_iter().any(|slot| reports[slot.index()] == Report::Pending && self.legs[slot.index()].takes_writes())
    }

    pub(super) fn mark_unsynced(&mut self, range: BlockRange) {
        self.bitmap.maybe_unsynced = true;
        self.void_repairs(range);
        for region in crate::bitmap::regions_of(range) {
            self.bitmap.regions[region].unsynced = true;
            self.resync_again(region);
        }
    }

    /// Answers; the payload stays in use until the last leg has reported.
    pub(super) fn finish_write(&mut self, id: EntryId, result: Result<(), Errno>, out: &mut Effects) {
        let Some(write) = self.writes.get_mut(&id) else { return };
        write.answered = true;
        write.stage = write.stage.max(Stage::Bits);
        out.push(Effect::Complete { tag: write.tag, result });
        self.release_write(id, out);
    }

    pub(super) fn release_write(&mut self, id: EntryId, out: &mut Effects) {
        let Some(write) = self.writes.get(&id) else { return };
        if write.reports.contains(&Report::Pending) || write.stage == Stage::Mending {
            return;
        }
        out.push(Effect::Release { tag: write.tag });
        self.bitmap.unhold(write.range);
        self.lock.release(id, &mut self.woken);
        self.writes.remove(&id);
        self.arm_clean();
    }

    /// The mirror gave up: what waits for durability gets EIO.
    pub(super) fn fail_gated_write(&mut self, id: EntryId, out: &mut Effects) {
        let Some(write) = self.writes.get(&id).filter(|write| !write.answered) else { return };
        if write.stage == Stage::Room {
            return self.refuse_room(id, out);
        }
        let waits_for_bits = write.stage == Stage::Bits;
        let missed = write.stage == Stage::Issued && !self.awaited(write.reports);
        if matches!(write.stage, Stage::Unlisting(Some(_))) && self.list_is_stuck() {
            return self.unlisted(id, Err(Errno::EIO), out);
        }
        if waits_for_bits || missed {
            self.finish_write(id, Err(Errno::EIO), out);
        }
    }

    /// A leg is durably OUT: nobody waits for it, and the writes that missed it are answered.
    pub(super) fn rejudge_writes(&mut self, out: &mut Effects) {
        let ids: alloc::vec::Vec<EntryId> = self.writes.keys().copied().collect();
        for id in ids {
            if let Some(write) = self.writes.get_mut(&id) {
                for slot in Slot::BOTH {
                    if self.legs[slot.index()].state == State::Out && write.reports[slot.index()] == Report::Pending {
                        write.reports[slot.index()] = Report::Abandoned;
                    }
                }
            }
            self.judge_write(id, out);
        }
    }
}

/// What the counted legs' reports add up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Someone has not reported, or a leg that is missing is not durably OUT yet.
    Wait,
    Done,
    NoSpace,
    AllFailed,
    /// This leg failed what the other did: it goes OUT first.
    Lost(Slot, Errno),
}

pub(super) fn report(ended: Ended) -> Report {
    match ended {
        Ok(_) => Report::Done,
        Err(errno) if classify(errno) == Fault::NoSpace => Report::NoSpace,
        Err(errno) => Report::Failed(errno),
    }
}
