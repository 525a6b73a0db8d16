//! I/O on the legs: issued, ended, reissued for a moment's fault of the host (mirror rule 6).

use super::{Mirror, State};
use crate::{
    fault::{Fault, classify},
    io::{Buffer, Effect, Effects, LegOp, Outcome},
    range_lock::EntryId,
    units::{BLOCK_SIZE, BlockRange, Errno, IoId, LegId, Slot},
};

/// How often a host fault is reissued without progress before it counts as the leg's (mirror rule 6). The deadline of the first
/// issue goes on meanwhile.
pub(super) const REISSUES: u8 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Purpose {
    Write(EntryId),
    Read(EntryId),
    Copy(EntryId),
    Scrub(EntryId),
    /// No leg's.
    Compare(EntryId),
    Flush,
    Page(usize),
    BadBlocks,
    Superblock,
    Witness,
    /// Nobody waits for it any more: its leg is OUT, or its scrub is over. It keeps its memory, and its leg away (mirror rules 25 and 27).
    Late,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Io {
    /// The leg, by place and name; a place may have got another leg meanwhile. `None`: the witness, or no disk at all.
    pub leg: Option<(Slot, LegId)>,
    pub purpose: Purpose,
    pub op: Option<LegOp>,
    pub reissues: u8,
    /// When it was first issued, in running time (`deadline.rs`).
    pub issued: u64,
}

/// How a piece of work ended, after reissues.
pub(crate) type Ended = Result<Option<BlockRange>, Errno>;

impl Mirror {
    pub(super) fn issue(&mut self, slot: Slot, purpose: Purpose, op: LegOp, out: &mut Effects) {
        self.watch.arm(self.now);
        let issued = self.watch.at(self.now);
        self.issue_again(slot, purpose, op, 0, issued, out);
    }

    fn issue_again(&mut self, slot: Slot, purpose: Purpose, op: LegOp, reissues: u8, issued: u64, out: &mut Effects) {
        let io = IoId(self.next_io);
        self.next_io += 1;
        let leg = &mut self.legs[slot.index()];
        leg.reads += u32::from(matches!(op, LegOp::Read { .. }));
        self.ios.insert(io, Io { leg: Some((slot, leg.id)), purpose, op: Some(op.clone()), reissues, issued });
        out.push(Effect::Leg { slot, io, op });
    }

    pub(super) fn done(&mut self, io: IoId, outcome: Outcome, out: &mut Effects) {
        let Some(entry) = self.ios.remove(&io) else { return };
        let Some((slot, leg)) = entry.leg else {
            if let Purpose::Compare(id) = entry.purpose {
                return self.compared(id, outcome, out);
            }
            return self.witness_done(matches!(outcome, Outcome::Done(_)).then_some(()).ok_or(errno_of(outcome)), out);
        };
        let current = &mut self.legs[slot.index()];
        if current.id != leg {
            return;
        }
        current.reads -= u32::from(matches!(entry.op, Some(LegOp::Read { .. })));
        let may_reissue = self.may_reissue(slot, entry.purpose);
        let ended = match (outcome, entry.op) {
            (Outcome::Extent(extent), _) => Ok(extent),
            (Outcome::Done(bytes), Some(op @ (LegOp::Read { .. } | LegOp::Write { .. }))) => match remainder(op, bytes) {
                None => Ok(None),
                Some((rest, progress)) => {
                    let reissues = if progress { 0 } else { entry.reissues + 1 };
                    if reissues <= REISSUES && may_reissue {
                        return self.issue_again(slot, entry.purpose, rest, reissues, entry.issued, out);
                    }
                    Err(Errno::EIO)
                }
            },
            (Outcome::Done(_) | Outcome::Differ(_), _) => Ok(None),
            (Outcome::Failed(errno), Some(op)) => {
                if classify(errno) == Fault::Host && entry.reissues < REISSUES && may_reissue {
                    return self.issue_again(slot, entry.purpose, op, entry.reissues + 1, entry.issued, out);
                }
                Err(errno)
            }
            (Outcome::Failed(errno), None) => Err(errno),
        };
        match entry.purpose {
            Purpose::Write(id) => self.write_done(id, slot, ended, out),
            Purpose::Read(id) => self.read_done(id, slot, ended, out),
            Purpose::Copy(id) => self.copy_done(id, ended, out),
            Purpose::Scrub(id) => self.scrub_done(id, slot, ended, out),
            Purpose::Flush => self.flush_done(slot, ended, out),
            Purpose::Page(page) => self.page_done(page, slot, ended, out),
            Purpose::BadBlocks => self.list_done(slot, ended, out),
            Purpose::Superblock => self.superblock_done(slot, ended, out),
            Purpose::Witness | Purpose::Compare(_) | Purpose::Late => {}
        }
    }

    /// Nothing is reissued to a leg that is OUT or on its way there: its range is released, or may be any time now (mirror rule 6). The
    /// first superblock of a leg that is being attached is no such thing. What nobody waits for is not reissued anywhere: the name of its buffer
    /// may be another's by now.
    fn may_reissue(&self, slot: Slot, purpose: Purpose) -> bool {
        let leg = &self.legs[slot.index()];
        let waited = purpose != Purpose::Late;
        (leg.takes_writes() && waited) || (purpose == Purpose::Superblock && leg.state == State::Out)
    }

    /// What is outstanding on a leg that does not count any more is late: nobody waits for it. A read goes to another leg, into other
    /// memory: its own belongs to the late I/O until that ends (mirror rule 27).
    pub(super) fn let_go(&mut self, slot: Slot, out: &mut Effects) {
        let leg = self.legs[slot.index()].id;
        let mut late = alloc::vec::Vec::new();
        for io in self.ios.values_mut() {
            let entered = matches!(io.purpose, Purpose::Read(_) | Purpose::Copy(_));
            if io.leg == Some((slot, leg)) && entered {
                late.push(core::mem::replace(&mut io.purpose, Purpose::Late));
            }
        }
        for purpose in late {
            match purpose {
                Purpose::Read(id) => self.restart_read(id, out),
                Purpose::Copy(id) => self.end_copy(id, false, out),
                _ => {}
            }
        }
    }
}

fn errno_of(outcome: Outcome) -> Errno {
    match outcome {
        Outcome::Failed(errno) => errno,
        _ => Errno::EIO,
    }
}

/// What is left of a read or write after a short count, and whether there was progress. `None`: nothing.
fn remainder(op: LegOp, bytes: u64) -> Option<(LegOp, bool)> {
    let blocks = bytes / BLOCK_SIZE;
    let shift = |range: BlockRange| BlockRange::new((range.start + blocks).min(range.end), range.end);
    let skip = |buffer: Buffer| match buffer {
        Buffer::Request { tag, skip } => Buffer::Request { tag, skip: skip + blocks },
        Buffer::Copy { index, skip } => Buffer::Copy { index, skip: skip + blocks },
    };
    let (range, rest) = match op {
        LegOp::Read { range, buffer } => (shift(range), LegOp::Read { range: shift(range), buffer: skip(buffer) }),
        LegOp::Write { range, buffer, fua } => (shift(range), LegOp::Write { range: shift(range), buffer: skip(buffer), fua }),
        _ => return None,
    };
    (!range.is_empty()).then_some((rest, blocks > 0))
}
