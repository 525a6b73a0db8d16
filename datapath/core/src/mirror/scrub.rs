//! Scrub: the legs are compared (mirror rule 30).
//!
//! ```text
//! Seek A -> Seek B -> Lock -> Buffer -> Read A -> Read B -> Compare -> next piece, or end
//! ```
//! What was ever written on either leg is looked at, a piece at a time, under the range lock: writes of the piece wait, reads do not. It writes
//! nothing by itself. What differs is reported with its blocks, and only where the operator named the leg to believe is the other one written,
//! by a repair of its own. Where the legs may rightly differ (a region that a resync will make equal, bad blocks) nothing is judged.
//!
//! A block that one leg cannot read is a read error like any other (rule 26), and says nothing about its neighbours: a piece that
//! was not read whole is read block by block, so that no difference is taken for an error and repaired unsaid.
//!
//! It stands still while legs are made equal, and ends when a leg is lost: one copy has nothing to be compared with.

use super::{COPY_BLOCKS, Ended, Io, Mirror, Purpose, State, copies::CopyFor};
use crate::{
    bitmap::blocks_of,
    format::REGION_BLOCKS,
    io::{Buffer, Effect, Effects, LegOp, Notice, Outcome},
    range_lock::{Class, EntryId},
    status::{Scrub, ScrubState},
    units::{BlockRange, Errno, Instant, IoId, Slot, Tag},
};

/// Blocks that are compared at once: both legs' go into one buffer.
const PIECE: u64 = COPY_BLOCKS / 2;
/// So many differing ranges are reported one by one; the rest is counted.
const NOTICES: u32 = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// Between pieces.
    Idle,
    Seek(Slot),
    Lock,
    Buffer,
    Read(Slot),
    Compare,
}

/// A scrub that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Scrubbing {
    tag: Tag,
    /// The leg that the operator believes.
    believed: Option<Slot>,
    step: Step,
    /// Names what is under way: the entry in the range lock, or I/O.
    id: EntryId,
    /// Everything before it was looked at.
    pos: u64,
    /// Written data reaches from `pos` to here, on one leg at least.
    data_end: u64,
    /// What the first leg said to a search, while the second is asked.
    found: Option<BlockRange>,
    /// What is locked.
    piece: BlockRange,
    /// What is read and compared now: all of the piece, or one block of it.
    part: BlockRange,
    buffer: Option<u8>,
    failed: [bool; 2],
    reported: u32,
    pub resume_at: Option<Instant>,
}

impl Scrubbing {
    fn holds_lock(&self) -> bool {
        !matches!(self.step, Step::Idle | Step::Seek(_))
    }

    /// Where a leg's half of the buffer begins.
    fn half(&self, slot: Slot) -> Buffer {
        Buffer::Copy { index: self.buffer.unwrap_or(0), skip: PIECE * slot.index() as u64 }
    }
}

impl Mirror {
    /// Both legs count, or the second one is being filled and the scrub waits for it.
    fn may_scrub(&self) -> bool {
        self.legs.iter().all(|leg| matches!(leg.state, State::In | State::Recovering(_)))
    }

    pub(super) fn submit_scrub(&mut self, tag: Tag, believed: Option<Slot>, out: &mut Effects) {
        let refused = if self.scrubbing.is_some() {
            Some(Errno::EBUSY)
        } else if self.read_only.is_some() {
            Some(Errno::EIO)
        } else if !self.may_scrub() {
            Some(Errno::ENODEV)
        } else {
            None
        };
        if let Some(errno) = refused {
            return Self::answer(tag, Err(errno), out);
        }
        let none = BlockRange::new(0, 0);
        self.scrub = Scrub { state: ScrubState::Running, total: self.blocks, ..Scrub::NEVER };
        self.scrubbing = Some(Scrubbing {
            tag,
            believed,
            step: Step::Idle,
            id: 0,
            pos: 0,
            data_end: 0,
            found: None,
            piece: none,
            part: none,
            buffer: None,
            failed: [false; 2],
            reported: 0,
            resume_at: None,
        });
        out.push(Effect::Notice(Notice::ScrubStarted));
    }

    pub(super) fn stop_scrub(&mut self, tag: Tag, out: &mut Effects) {
        self.end_scrub(Err(Errno::ECANCELED), out);
        Self::answer(tag, Ok(()), out);
    }

    pub(super) fn pump_scrub(&mut self, out: &mut Effects) {
        if self.scrubbing.is_none() {
            return;
        }
        if self.read_only.is_some() {
            return self.end_scrub(Err(Errno::EIO), out);
        }
        if !self.may_scrub() {
            return self.end_scrub(Err(Errno::ENODEV), out);
        }
        if self.stopping.is_some() {
            return self.end_scrub(Err(Errno::ESHUTDOWN), out);
        }
        let copying = self.syncing.as_ref().is_some_and(|syncing| syncing.retry_at.is_none());
        let repairing = self.copies.values().any(|copy| !matches!(copy.purpose, CopyFor::Sync { .. }));
        // Its repairs wait for no room: so that only one region exceeds the cap, it waits until the last one is cleaned.
        let crowded = self.is_crowded();
        let both_in = self.in_count() == 2;
        let Some(scrubbing) = &mut self.scrubbing else { return };
        if scrubbing.step == Step::Buffer {
            return self.read_scrubbed(out);
        }
        if scrubbing.resume_at.is_some_and(|at| self.now < at) {
            return;
        }
        // What it waits for now is no time: the clock must not be asked again and again.
        scrubbing.resume_at = None;
        // Repairs that it asked for come first, so that there are never more than a piece has blocks.
        if scrubbing.step != Step::Idle || copying || repairing || crowded || !both_in {
            return;
        }
        self.next_scrub_piece(out);
    }

    /// Looks for the next piece, passing over regions whose legs may rightly differ.
    fn next_scrub_piece(&mut self, out: &mut Effects) {
        loop {
            let blocks = self.blocks;
            self.scrub.total = blocks;
            let Some(scrubbing) = &mut self.scrubbing else { return };
            self.scrub.done = scrubbing.pos;
            if scrubbing.pos >= blocks {
                return self.end_scrub(Ok(()), out);
            }
            let region = (scrubbing.pos / REGION_BLOCKS) as usize;
            let rest = BlockRange::new(scrubbing.pos, blocks_of(region, blocks).end);
            if self.bitmap.regions[region].unsynced {
                self.scrub.skipped += rest.len();
                (scrubbing.pos, scrubbing.data_end) = (rest.end, rest.end);
                continue;
            }
            let valid = self.bad_blocks.valid(rest);
            if valid.start > rest.start {
                // No leg holds what is listed as bad.
                self.scrub.skipped += valid.start - rest.start;
                scrubbing.pos = valid.start;
                continue;
            }
            if scrubbing.data_end > scrubbing.pos {
                return self.lock_scrub_piece(valid.end, out);
            }
            return self.scrub_io(Step::Seek(Slot::A), Slot::A, LegOp::NextData { range: rest }, out);
        }
    }

    fn scrub_io(&mut self, step: Step, slot: Slot, op: LegOp, out: &mut Effects) {
        let new = self.next_entry();
        let Some(scrubbing) = &mut self.scrubbing else { return };
        // The lock's entry keeps its name while the piece is read.
        let id = if matches!(step, Step::Seek(_)) { new } else { scrubbing.id };
        (scrubbing.id, scrubbing.step) = (id, step);
        self.issue(slot, Purpose::Scrub(id), op, out);
    }

    fn lock_scrub_piece(&mut self, end: u64, out: &mut Effects) {
        let id = self.next_entry();
        let Some(scrubbing) = &mut self.scrubbing else { return };
        let piece = BlockRange::new(scrubbing.pos, scrubbing.data_end.min(scrubbing.pos + PIECE).min(end));
        (scrubbing.piece, scrubbing.part, scrubbing.id, scrubbing.step) = (piece, piece, id, Step::Lock);
        if self.lock.acquire(id, piece, Class::Copy) {
            self.scrub_granted(id, out);
        }
    }

    /// Nothing is before the piece any more. What came of it may have been decided meanwhile.
    pub(super) fn scrub_granted(&mut self, id: EntryId, out: &mut Effects) {
        if let Some(scrubbing) = self.scrubbing.as_mut().filter(|scrubbing| scrubbing.id == id && scrubbing.step == Step::Lock) {
            scrubbing.step = Step::Buffer;
            self.read_scrubbed(out);
        }
    }

    /// Takes a buffer, if there is one, and reads.
    fn read_scrubbed(&mut self, out: &mut Effects) {
        if self.in_count() < 2 {
            // A repair took a leg out: the pump ends the scrub.
            return;
        }
        let Some(scrubbing) = &mut self.scrubbing else { return };
        if self.bitmap.unsynced(scrubbing.piece) {
            return self.pass_over(out);
        }
        if scrubbing.buffer.is_none() {
            let Some(free) = self.copy_buffers.iter().position(|used| !used) else { return };
            self.copy_buffers[free] = true;
            scrubbing.buffer = Some(free as u8);
        }
        scrubbing.failed = [false; 2];
        self.read_scrubbed_leg(Slot::A, out);
    }

    /// One leg after the other: the memory of a buffer comes to life with the first read that names it.
    fn read_scrubbed_leg(&mut self, slot: Slot, out: &mut Effects) {
        let Some(scrubbing) = &self.scrubbing else { return };
        let op = LegOp::Read { range: scrubbing.part, buffer: scrubbing.half(slot) };
        self.scrub_io(Step::Read(slot), slot, op, out);
    }

    pub(super) fn scrub_done(&mut self, id: EntryId, slot: Slot, ended: Ended, out: &mut Effects) {
        let both_in = self.in_count() == 2;
        let blocks = self.blocks;
        let Some(scrubbing) = self.scrubbing.as_mut().filter(|scrubbing| scrubbing.id == id && both_in) else { return };
        match scrubbing.step {
            Step::Seek(asked) if asked == slot => {
                let rest = BlockRange::new(scrubbing.pos, blocks_of((scrubbing.pos / REGION_BLOCKS) as usize, blocks).end);
                // Who cannot search has to read all of it.
                let data = ended.unwrap_or(Some(rest)).map(|data| data.intersection(rest)).filter(|data| !data.is_empty());
                if slot == Slot::A {
                    scrubbing.found = data;
                    return self.scrub_io(Step::Seek(Slot::B), Slot::B, LegOp::NextData { range: rest }, out);
                }
                scrubbing.step = Step::Idle;
                let first = match (scrubbing.found, data) {
                    (Some(a), Some(b)) if b.start < a.start => Some(b),
                    (Some(a), _) => Some(a),
                    (None, b) => b,
                };
                match first {
                    None => scrubbing.pos = rest.end,
                    Some(data) => (scrubbing.pos, scrubbing.data_end) = (data.start, data.end),
                }
            }
            Step::Read(asked) if asked == slot => {
                scrubbing.failed[slot.index()] = ended.is_err();
                if ended.is_err() && scrubbing.part.len() > 1 {
                    let first = scrubbing.part.start;
                    scrubbing.part = BlockRange::new(first, first + 1);
                    return self.read_scrubbed(out);
                }
                if slot == Slot::A {
                    return self.read_scrubbed_leg(Slot::B, out);
                }
                match scrubbing.failed {
                    [false, false] => self.compare(out),
                    failed => self.unreadable_block(failed, out),
                }
            }
            _ => {}
        }
    }

    /// A read error that the scrub met: what the other leg has is put there (mirror rule 26).
    fn unreadable_block(&mut self, failed: [bool; 2], out: &mut Effects) {
        let Some(range) = self.scrubbing.as_ref().map(|scrubbing| scrubbing.part) else { return };
        self.scrub.unreadable += range.len();
        match failed {
            [true, true] => out.push(Effect::Notice(Notice::Unreadable { range })),
            [a_failed, _] => {
                let bad = if a_failed { Slot::A } else { Slot::B };
                self.repair(alloc::vec![range], bad.other(), bad, out);
            }
        }
        self.next_part(out);
    }

    fn compare(&mut self, out: &mut Effects) {
        let Some(scrubbing) = &mut self.scrubbing else { return };
        scrubbing.step = Step::Compare;
        let (entry, a, b, blocks) = (scrubbing.id, scrubbing.half(Slot::A), scrubbing.half(Slot::B), scrubbing.part.len());
        let io = IoId(self.next_io);
        self.next_io += 1;
        self.ios.insert(io, Io { leg: None, purpose: Purpose::Compare(entry), op: None, reissues: 0, issued: 0 });
        out.push(Effect::Compare { io, a, b, blocks });
    }

    pub(super) fn compared(&mut self, id: EntryId, outcome: Outcome, out: &mut Effects) {
        let Some(scrubbing) = self.scrubbing.as_ref().filter(|scrubbing| scrubbing.id == id && scrubbing.step == Step::Compare) else {
            return;
        };
        let (part, believed) = (scrubbing.part, scrubbing.believed);
        if self.in_count() < 2 {
            return;
        }
        let Outcome::Differ(mask) = outcome else { return self.end_scrub(Err(Errno::EIO), out) };
        // A resync has become due meanwhile: it decides.
        if self.bitmap.unsynced(part) {
            return self.pass_over(out);
        }
        self.scrub.compared += part.len();
        for range in differing(part, mask) {
            self.scrub.mismatched += range.len();
            if let Some(scrubbing) = &mut self.scrubbing
                && scrubbing.reported < NOTICES
            {
                scrubbing.reported += 1;
                out.push(Effect::Notice(Notice::Mismatch { range }));
            }
            if let Some(good) = believed {
                self.start_locked_copy(range, good, good.other(), CopyFor::Belief, Class::User, out);
            }
        }
        self.next_part(out);
    }

    /// The next block of a piece that is read block by block, or its end.
    fn next_part(&mut self, out: &mut Effects) {
        let Some(scrubbing) = &mut self.scrubbing else { return };
        let (part, end) = (scrubbing.part, scrubbing.piece.end);
        if part.end >= end {
            return self.end_piece(out);
        }
        scrubbing.part = BlockRange::new(part.end, part.end + 1);
        self.read_scrubbed(out);
    }

    /// What is left of the piece is not judged.
    fn pass_over(&mut self, out: &mut Effects) {
        if let Some(scrubbing) = &self.scrubbing {
            self.scrub.skipped += scrubbing.piece.end - scrubbing.part.start;
        }
        self.end_piece(out);
    }

    fn end_piece(&mut self, out: &mut Effects) {
        let (rate, now) = (self.limits.scrub_blocks_per_second, self.now);
        let Some(scrubbing) = &mut self.scrubbing else { return };
        let piece = scrubbing.piece;
        scrubbing.pos = piece.end;
        self.scrub.done = piece.end;
        let pause = (piece.len() * 1_000_000_000).checked_div(rate).unwrap_or(0);
        scrubbing.resume_at = (pause > 0).then_some(Instant(now.0.saturating_add(pause)));
        self.let_piece_go(out);
    }

    fn let_piece_go(&mut self, out: &mut Effects) {
        let Some(scrubbing) = &mut self.scrubbing else { return };
        let (id, locked) = (scrubbing.id, scrubbing.holds_lock());
        scrubbing.step = Step::Idle;
        if let Some(index) = scrubbing.buffer.take() {
            self.free_buffer(index, out);
        }
        if locked {
            self.lock.release(id, &mut self.woken);
        }
        self.next_in_buffer_queue(out);
    }

    /// It is over: all was looked at, or not.
    fn end_scrub(&mut self, result: Result<(), Errno>, out: &mut Effects) {
        self.let_piece_go(out);
        let Some(scrubbing) = self.scrubbing.take() else { return };
        // What it asked for last keeps its memory, and nobody waits for it.
        for io in self.ios.values_mut().filter(|io| io.purpose == Purpose::Scrub(scrubbing.id)) {
            io.purpose = Purpose::Late;
        }
        self.scrub.state = result.map_or_else(ScrubState::Ended, |()| ScrubState::Completed);
        out.push(Effect::Notice(Notice::ScrubEnded { result }));
        Self::answer(scrubbing.tag, result, out);
    }
}

/// The runs of blocks whose bits are set.
fn differing(part: BlockRange, mask: u128) -> impl Iterator<Item = BlockRange> {
    let mut next = 0;
    core::iter::from_fn(move || {
        let rest = mask.checked_shr(next).unwrap_or(0);
        if rest == 0 {
            return None;
        }
        let first = next + rest.trailing_zeros();
        let len = (mask >> first).trailing_ones();
        next = first + len;
        let start = part.start + u64::from(first);
        Some(BlockRange::new(start, (start + u64::from(len)).min(part.end)))
    })
}
