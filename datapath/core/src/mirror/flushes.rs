//! Flushes (mirror rule 15). Those that come while one is under way share the next one.

use alloc::vec::Vec;

use super::{Ended, Mirror, Purpose, Report, State, writes};
use crate::{
    io::{Effects, LegOp},
    range_lock::EntryId,
    units::{Errno, Slot, Tag},
};

/// Who wants everything so far to be durable.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Waiter {
    Client(Tag),
    /// The clean pass: these regions, each with its count of writes when the flush was asked for.
    Clean(Vec<(usize, u64)>),
    /// Room is made for other regions: the same, and which cleaning it is.
    Room(u64, Vec<(usize, u64)>),
    /// A write over bad blocks is done.
    Overwritten(EntryId),
    /// No leg had space for a write, and it could not be taken back.
    Refused(EntryId),
    /// A rebuild wants to be finished.
    Rebuilt(u64),
    /// A rebuild wants to remember how far it came.
    Checkpoint(u64, u64),
    /// The pinned leg is to change.
    Pin(u64),
    Stop,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Batch {
    waiters: Vec<Waiter>,
    reports: [Report; 2],
}

impl Mirror {
    pub(super) fn submit_flush(&mut self, waiter: Waiter, out: &mut Effects) {
        self.flush_next.push(waiter);
        self.pump_flush(out);
    }

    pub(super) fn pump_flush(&mut self, out: &mut Effects) {
        if self.batch.is_some() || self.flush_next.is_empty() {
            return;
        }
        // It covers what was answered: that has to be on both legs first (mirror rule 32).
        if self.is_behind() && self.read_only.is_none() {
            return;
        }
        let waiters = core::mem::take(&mut self.flush_next);
        if self.read_only.is_some() {
            return self.finish_flush(waiters, Err(Errno::EIO), out);
        }
        self.batch = Some(Batch { waiters, reports: [Report::None; 2] });
        for slot in Slot::BOTH {
            if self.legs[slot.index()].takes_writes() {
                if let Some(batch) = &mut self.batch {
                    batch.reports[slot.index()] = Report::Pending;
                }
                self.issue(slot, Purpose::Flush, LegOp::Flush, out);
            }
        }
    }

    pub(super) fn flush_done(&mut self, slot: Slot, ended: Ended, out: &mut Effects) {
        let Some(batch) = &mut self.batch else { return };
        if batch.reports[slot.index()] != Report::Pending {
            return;
        }
        batch.reports[slot.index()] = match ended {
            Ok(_) => Report::Done,
            Err(errno) => Report::Failed(errno),
        };
        if let (Err(errno), State::Recovering(_)) = (ended, self.legs[slot.index()].state) {
            self.fail_leg(slot, errno, out);
        }
        self.judge_flush(out);
    }

    pub(super) fn judge_flush(&mut self, out: &mut Effects) {
        let Some(batch) = &mut self.batch else { return };
        for slot in Slot::BOTH {
            if self.legs[slot.index()].state == State::Out && batch.reports[slot.index()] == Report::Pending {
                batch.reports[slot.index()] = Report::Abandoned;
            }
        }
        let reports = batch.reports;
        // A RECOVERING leg must have reported too before the next flush starts: a rebuild ends on it.
        if reports.contains(&Report::Pending) {
            if self.read_only.is_some() {
                self.fail_gated_flush(out);
            }
            return;
        }
        match self.verdict(reports) {
            writes::Verdict::Wait => {}
            writes::Verdict::Done => self.end_batch(Ok(()), out),
            writes::Verdict::Lost(slot, errno) => {
                self.fail_leg(slot, errno, out);
                if self.legs[slot.index()].state != State::Leaving {
                    self.flush_failed(errno, out);
                }
            }
            writes::Verdict::AllFailed | writes::Verdict::NoSpace => self.flush_failed(Errno::EIO, out),
        }
        if self.read_only.is_some() {
            self.fail_gated_flush(out);
        }
    }

    /// What was answered may be lost, and no later flush may claim otherwise: nothing is accepted any more.
    fn flush_failed(&mut self, errno: Errno, out: &mut Effects) {
        self.end_batch(Err(Errno::EIO), out);
        self.fail_mirror(errno, out);
    }

    pub(super) fn fail_gated_flush(&mut self, out: &mut Effects) {
        if let Some(batch) = &self.batch
            && !self.awaited(batch.reports)
        {
            self.end_batch(Err(Errno::EIO), out);
        }
    }

    fn end_batch(&mut self, result: Result<(), Errno>, out: &mut Effects) {
        if let Some(batch) = self.batch.take() {
            self.finish_flush(batch.waiters, result, out);
        }
    }

    fn finish_flush(&mut self, waiters: Vec<Waiter>, result: Result<(), Errno>, out: &mut Effects) {
        for waiter in waiters {
            match waiter {
                Waiter::Client(tag) => Self::answer(tag, result, out),
                Waiter::Clean(regions) if result.is_ok() => self.clear_clean(&regions),
                Waiter::Clean(_) => self.arm_clean(),
                Waiter::Room(number, regions) => self.room_flushed(number, &regions, result.is_ok()),
                Waiter::Overwritten(id) => self.overwritten(id, result.is_ok(), out),
                Waiter::Refused(id) => self.kept(id, out),
                Waiter::Rebuilt(generation) => self.rebuilt_flushed(generation, result.is_ok()),
                Waiter::Checkpoint(generation, block) if result.is_ok() => self.checkpoint_flushed(generation, block),
                Waiter::Checkpoint(..) => {}
                Waiter::Pin(number) => self.pin_flushed(number, result.is_ok()),
                Waiter::Stop => self.stop_flushed(result.is_ok()),
            }
        }
    }
}
