//! The mirror: one deterministic state machine that owns all decisions about the data.
//!
//! A client's write goes through these stages; a read through the first and third, a repair or resync copy through all.
//! ```text
//!  submit -> range lock -> dirty bits durable -> issued to every IN and RECOVERING leg -> judged -> answered -> released
//!            (rule 3)      (rule 17)             (held while a leg changes sides)         (8, 9, 14)            (5, 6)
//! ```
//! A write that needs one dirty region too many waits before that (`room.rs`): what is in the range lock never waits for room.
//! Membership changes are *transitions* (`transition.rs`), one at a time: the record is made durable on the legs that stay, then in the
//! witness, and only then does it count (rule 9). A leg that failed is `Leaving` until then: it gets nothing new, and no answer
//! that misses it goes out.
//!
//! Invariants, asserted by `check_invariants` (`invariants.rs`):
//! 1. At least one leg is IN (mirror rule 14).
//! 2. No two issued exclusive entries of the range lock overlap (3).
//! 3. Data is issued only to regions whose bit is durably set on every leg that is IN by the durable record; the copies of a rebuild need none (17).
//! 4. A region's `pending` is the number of unreleased writes and copies in the range lock there (18).
//! 5. A RECOVERING leg serves no read (23).
//! 6. A region that counts as dirty for the cap is counted, and only what waits for room is in that queue (17).
//! 7. One metadata write in flight for each leg's superblock, for each bitmap page, for the list of bad blocks, and for the witness (10).
//! 8. What was answered and is not on the write-mostly leg is within its bounds (32).

mod admin;
mod behind;
mod copies;
mod deadline;
mod flushes;
mod invariants;
mod ios;
mod listing;
mod pages;
mod reads;
mod room;
mod scrub;
mod sync;
mod transition;
mod writes;

use alloc::{collections::BTreeMap, vec::Vec};

use crate::{
    assembly::Limits,
    bad_blocks::BadBlocks,
    bitmap::Bitmap,
    io::{Effect, Effects, Event, Fill, Notice, Request},
    membership::{Record, RecordName},
    range_lock::{Class, EntryId, RangeLock},
    status::{LegState, LegStatus, Scrub, Status, Sync},
    units::{BlockRange, Epoch, Errno, Instant, IoId, LegId, RecordId, Slot, Tag, VolumeId},
};

use self::{
    admin::{Growing, Stopping},
    behind::WriteMostly,
    copies::Copy,
    deadline::Watch,
    flushes::{Batch, Waiter},
    ios::{Ended, Io, Purpose},
    reads::Read,
    room::Room,
    scrub::Scrubbing,
    sync::Syncing,
    transition::Transition,
    writes::Write,
};

/// Blocks of the largest copy that the mirror makes at once (resync, rebuild, repair).
pub const COPY_BLOCKS: u64 = 256;
/// How many of its own buffers the mirror uses at once.
pub const COPY_WINDOW: u8 = 4;
/// Repairs that a leg may need before it is taken OUT (mirror rule 26).
const REPAIR_BUDGET: u32 = 64;

/// What a leg counts for in memory; the durable record follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum State {
    /// Counted.
    In,
    /// Failed while IN; its OUT is not durable yet.
    Leaving,
    /// Stale or absent.
    Out,
    /// Gets every write, serves nothing.
    Recovering(Fill),
    /// Failed while RECOVERING; the record still names it so.
    Dropping,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Leg {
    pub id: LegId,
    pub state: State,
    /// The newest record known to be durable on it.
    pub seen: RecordName,
    /// Which slot holds its newest superblock.
    pub superblock_slot: u8,
    /// Reads that it has not reported.
    pub reads: u32,
    /// Where its last read ended: sequential reads stay on one leg.
    pub read_end: u64,
    pub repairs: u32,
}

impl Leg {
    /// Whether it gets new writes.
    fn takes_writes(&self) -> bool {
        matches!(self.state, State::In | State::Recovering(_))
    }

    /// Whether the durable record counts it.
    fn counted(&self) -> bool {
        matches!(self.state, State::In | State::Leaving)
    }
}

/// What one leg said to one piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Report {
    /// Nothing was asked of it.
    None,
    /// It has not answered.
    Pending,
    Done,
    Failed(Errno),
    NoSpace,
    /// It was durably OUT before it answered: nobody waits for it (mirror rule 5).
    Abandoned,
}

/// One mirror.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mirror {
    pub(crate) volume: VolumeId,
    pub(crate) blocks: u64,
    pub(crate) flags: u64,
    pub(crate) compat: u32,
    pub(crate) checkpoint: u64,
    now: Instant,
    limits: Limits,
    watch: Watch,
    run: [u8; 8],
    records: u64,
    next_io: u64,
    next_entry: EntryId,
    pub(crate) legs: [Leg; 2],
    /// The durable record.
    pub(crate) record: Record,
    /// No record in existence has a higher epoch.
    pub(crate) max_epoch: Epoch,
    pub(crate) sequence: u64,
    pub(crate) witness_slot: u8,
    pub(crate) bitmap: Bitmap,
    pub(crate) bad_blocks: BadBlocks,
    pub(crate) ready: bool,
    read_only: Option<Errno>,
    lock: RangeLock,
    room: Room,
    ios: BTreeMap<IoId, Io>,
    writes: BTreeMap<EntryId, Write>,
    reads: BTreeMap<EntryId, Read>,
    copies: BTreeMap<EntryId, Copy>,
    /// Passed the lock and the bits, waiting for the end of a drain.
    held: Vec<EntryId>,
    held_reads: Vec<EntryId>,
    /// New writes are held: a leg is changing sides.
    draining: bool,
    woken: Vec<EntryId>,
    batch: Option<Batch>,
    flush_next: Vec<Waiter>,
    transition: Option<Transition>,
    restate: bool,
    syncing: Option<Syncing>,
    /// The leg that is filled from nothing still reads as zeroes where nothing was copied or written to both.
    fresh: bool,
    generation: u64,
    copy_buffers: [bool; COPY_WINDOW as usize],
    buffer_queue: Vec<EntryId>,
    attach: Option<(Tag, Slot, Fill)>,
    detaching: Vec<(Tag, Slot)>,
    growing: Option<Growing>,
    write_mostly: WriteMostly,
    scrubbing: Option<Scrubbing>,
    /// Of the newest scrub.
    scrub: Scrub,
    stopping: Option<Stopping>,
    stopped: bool,
    early: Vec<(Tag, Request)>,
    clean_at: Option<Instant>,
    last_read: Slot,
    copied_blocks: u64,
}

/// What assembly decided, from which a mirror starts.
pub(crate) struct Start {
    pub volume: VolumeId,
    pub blocks: u64,
    pub flags: u64,
    pub compat: u32,
    pub checkpoint: u64,
    pub legs: [Leg; 2],
    pub record: Record,
    pub max_epoch: Epoch,
    pub sequence: u64,
    pub witness_slot: u8,
    pub bitmap: Bitmap,
    pub bad_blocks: BadBlocks,
    pub seed: u128,
    pub now: Instant,
    pub limits: Limits,
}

impl Mirror {
    pub(crate) fn start(start: Start, out: &mut Effects) -> Self {
        let mut run = [0; 8];
        run.copy_from_slice(&start.seed.to_le_bytes()[..8]);
        let mut mirror = Self {
            volume: start.volume,
            blocks: start.blocks,
            flags: start.flags,
            compat: start.compat,
            checkpoint: start.checkpoint,
            now: start.now,
            limits: start.limits,
            watch: Watch::new(start.limits.leg_deadline_millis),
            run,
            records: 0,
            next_io: 1,
            next_entry: 1,
            legs: start.legs,
            record: start.record,
            max_epoch: start.max_epoch,
            sequence: start.sequence,
            witness_slot: start.witness_slot,
            bitmap: start.bitmap,
            bad_blocks: start.bad_blocks,
            ready: false,
            read_only: None,
            lock: RangeLock::new(),
            room: Room::default(),
            ios: BTreeMap::new(),
            writes: BTreeMap::new(),
            reads: BTreeMap::new(),
            copies: BTreeMap::new(),
            held: Vec::new(),
            held_reads: Vec::new(),
            draining: false,
            woken: Vec::new(),
            batch: None,
            flush_next: Vec::new(),
            transition: None,
            restate: false,
            syncing: None,
            fresh: false,
            generation: 0,
            copy_buffers: [false; COPY_WINDOW as usize],
            buffer_queue: Vec::new(),
            attach: None,
            detaching: Vec::new(),
            growing: None,
            write_mostly: WriteMostly::default(),
            scrubbing: None,
            scrub: Scrub::NEVER,
            stopping: None,
            stopped: false,
            early: Vec::new(),
            clean_at: None,
            last_read: Slot::A,
            copied_blocks: 0,
        };
        mirror.pump(out);
        mirror
    }

    /// Takes what happened, says what to do. Never blocks, never fails.
    pub fn handle(&mut self, now: Instant, event: Event, out: &mut Effects) {
        self.now = self.now.max(now);
        match event {
            Event::Submit { tag, request } => self.submit(tag, request, out),
            Event::Done { io, outcome } => self.done(io, outcome, out),
            Event::Tick => self.tick(out),
        }
        self.pump(out);
    }

    /// When `Event::Tick` is wanted next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let transition = self.transition.as_ref().and_then(|transition| transition.retry_at);
        let syncing = self.syncing.as_ref().and_then(|syncing| syncing.retry_at);
        let scrubbing = self.scrubbing.as_ref().and_then(|scrubbing| scrubbing.resume_at);
        [self.clean_at, transition, syncing, scrubbing, self.watch.next].into_iter().flatten().min()
    }

    fn submit(&mut self, tag: Tag, request: Request, out: &mut Effects) {
        if !self.ready && self.read_only.is_none() {
            return self.early.push((tag, request));
        }
        if !self.ready && request != Request::Stop {
            // Assembly could not be recorded: nothing is served.
            return Self::answer(tag, Err(Errno::EIO), out);
        }
        if self.stopping.is_some() || self.stopped {
            return Self::answer(tag, Err(Errno::ESHUTDOWN), out);
        }
        let in_volume = |range: BlockRange| !range.is_empty() && range.end <= self.blocks;
        match request {
            Request::Read(range) | Request::Write { range, .. } | Request::Zero(range) if !in_volume(range) => {
                Self::answer(tag, Err(Errno::EINVAL), out);
            }
            Request::Read(range) => self.submit_read(tag, range, out),
            Request::Write { range, fua } => self.submit_write(tag, range, true, fua, out),
            Request::Zero(range) => self.submit_write(tag, range, false, false, out),
            Request::Flush => self.submit_flush(Waiter::Client(tag), out),
            Request::Attach { slot, leg, fill, newest } => self.submit_attach(tag, slot, leg, fill, newest, out),
            Request::Detach(slot) => self.submit_detach(tag, slot, out),
            Request::Grow { blocks } => self.submit_grow(tag, blocks, out),
            Request::WriteMostly { slot, behind } => self.set_write_mostly(tag, slot, behind, out),
            Request::Scrub { believed } => self.submit_scrub(tag, believed, out),
            Request::StopScrub => self.stop_scrub(tag, out),
            Request::Stop => self.stopping = Some(Stopping::new(tag)),
        }
    }

    /// Answers and lets go of a tag that holds nothing.
    fn answer(tag: Tag, result: Result<(), Errno>, out: &mut Effects) {
        out.push(Effect::Complete { tag, result });
        out.push(Effect::Release { tag });
    }

    fn tick(&mut self, out: &mut Effects) {
        if self.clean_at.is_some_and(|at| at <= self.now) {
            self.clean_at = None;
            self.clean_pass(out);
        }
        if self.transition.as_ref().and_then(|transition| transition.retry_at).is_some_and(|at| at <= self.now) {
            self.write_witness(out);
        }
        self.retry_sync();
        self.judge_deadlines(out);
    }

    /// Starts whatever can be started. Runs after every event, until nothing changes.
    fn pump(&mut self, out: &mut Effects) {
        loop {
            while !self.woken.is_empty() {
                for id in core::mem::take(&mut self.woken) {
                    self.granted(id, out);
                }
            }
            let before = out.0.len();
            self.pump_reads(out);
            self.pump_pages(out);
            // A rebuild that became full and a growth whose pages are durable are taken up by the transition in the same round.
            self.pump_sync(out);
            self.pump_room(out);
            // A copy of a region that was clean wants its bit now: nothing else may happen on an idle volume.
            self.pump_pages(out);
            self.pump_growing();
            self.pump_scrub(out);
            self.pump_transition(out);
            self.pump_flush(out);
            self.pump_stop(out);
            if self.woken.is_empty() && out.0.len() == before {
                return;
            }
        }
    }

    fn next_entry(&mut self) -> EntryId {
        self.next_entry += 1;
        self.next_entry - 1
    }

    fn new_record_name(&mut self) -> RecordName {
        self.max_epoch.0 += 1;
        self.records += 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.run);
        id[8..].copy_from_slice(&self.records.to_le_bytes());
        RecordName { epoch: self.max_epoch, id: RecordId(id) }
    }

    /// A write or copy whose regions may be dirty goes into the range lock. Its bits are wanted at once, and held until it is released.
    fn enter(&mut self, id: EntryId, range: BlockRange, class: Class, out: &mut Effects) {
        self.bitmap.hold(range);
        if self.needs_bits(id) {
            self.bitmap.want(range);
        }
        if self.lock.acquire(id, range, class) {
            self.granted(id, out);
        }
    }

    /// Whether the legs that count may differ while this is under way. The copies of a rebuild go to a leg that counts only when all of them are
    /// durable; so that a rebuild which is resumed goes on at its checkpoint, the bits name nothing but what was written meanwhile.
    fn needs_bits(&self, id: EntryId) -> bool {
        !self.copies.get(&id).is_some_and(|copy| matches!(copy.purpose, copies::CopyFor::Sync { fill: Some(_), .. }))
    }

    /// An entry may go: nothing before it overlaps it.
    fn granted(&mut self, id: EntryId, out: &mut Effects) {
        if self.reads.contains_key(&id) {
            return self.issue_read(id, out);
        }
        let Some(range) = self.writes.get(&id).map(|write| write.range).or_else(|| self.copies.get(&id).map(|copy| copy.range)) else {
            return self.scrub_granted(id, out);
        };
        // When no bit will become durable any more, what comes to be issued fails there.
        if !self.needs_bits(id) || self.bitmap.want(range) || self.read_only.is_some() {
            self.ready_to_issue(id, out);
        } else if let Some(write) = self.writes.get_mut(&id) {
            write.stage = writes::Stage::Bits;
        } else if let Some(copy) = self.copies.get_mut(&id) {
            copy.step = copies::Step::Bits;
        }
    }

    /// The lock and the bits are there.
    fn ready_to_issue(&mut self, id: EntryId, out: &mut Effects) {
        if self.draining {
            if let Some(write) = self.writes.get_mut(&id) {
                write.stage = writes::Stage::Held;
            } else if let Some(copy) = self.copies.get_mut(&id) {
                copy.step = copies::Step::Held;
            }
            self.held.push(id);
        } else if self.writes.contains_key(&id) {
            self.issue_write(id, out);
        } else {
            self.start_copy(id, out);
        }
    }

    /// The drain is over.
    fn resume(&mut self, out: &mut Effects) {
        self.draining = false;
        for id in core::mem::take(&mut self.held) {
            self.ready_to_issue(id, out);
        }
    }

    /// Nothing that was issued is unreleased.
    fn drained(&self) -> bool {
        self.writes.values().all(|write| write.stage < writes::Stage::Issued)
            && self.copies.values().all(|copy| copy.step < copies::Step::Buffer)
    }

    /// A leg failed. The last IN leg never goes (mirror rule 14).
    fn fail_leg(&mut self, slot: Slot, error: Errno, out: &mut Effects) {
        let other_in = self.legs[slot.other().index()].state == State::In;
        let finishing = self.transition.as_ref().is_some_and(|transition| transition.finishes(slot));
        let leg = &mut self.legs[slot.index()];
        leg.state = match leg.state {
            State::In if other_in => State::Leaving,
            // The record that counts it may be durable already: no answer that misses it goes out.
            State::Recovering(_) if finishing => State::Leaving,
            State::Recovering(_) => State::Dropping,
            _ => return,
        };
        out.push(Effect::Notice(Notice::LegFailed { slot, error }));
        self.cancel_sync(out);
    }

    /// No more writes: the survivor cannot keep its promises.
    fn fail_mirror(&mut self, error: Errno, out: &mut Effects) {
        if self.read_only.is_none() {
            self.read_only = Some(error);
            out.push(Effect::Notice(Notice::ReadOnly { error }));
        }
        self.fail_gated(out);
        for (tag, request) in core::mem::take(&mut self.early) {
            self.submit(tag, request, out);
        }
        if let Some((tag, ..)) = self.attach.take() {
            Self::answer(tag, Err(Errno::EIO), out);
        }
        if let Some(growing) = self.growing.take() {
            Self::answer(growing.tag, Err(Errno::EIO), out);
        }
        for (tag, _) in core::mem::take(&mut self.detaching) {
            Self::answer(tag, Err(Errno::EIO), out);
        }
        self.cancel_sync(out);
        self.resume(out);
    }

    /// Everything that waits for a leg to be durably OUT, or for a bit, gets EIO: it will not be.
    fn fail_gated(&mut self, out: &mut Effects) {
        let waiting: Vec<EntryId> = self.writes.iter().filter(|(_, write)| !write.answered).map(|(id, _)| *id).collect();
        for id in waiting {
            self.fail_gated_write(id, out);
        }
        let stuck = self.list_is_stuck();
        let waits = |copy: &Copy| copy.step == copies::Step::Bits || matches!(copy.step, copies::Step::Listing(_)) && stuck;
        let copies: Vec<EntryId> = self.copies.iter().filter(|(_, copy)| waits(copy)).map(|(id, _)| *id).collect();
        for id in copies {
            self.end_copy(id, false, out);
        }
        self.fail_gated_flush(out);
        for slot in Slot::BOTH {
            if matches!(self.legs[slot.index()].state, State::Leaving | State::Dropping) {
                self.let_go(slot, out);
            }
        }
    }

    fn in_count(&self) -> usize {
        self.legs.iter().filter(|leg| leg.state == State::In).count()
    }

    /// A snapshot.
    pub fn status(&self) -> Status {
        let leg = |slot: Slot| LegStatus {
            id: self.legs[slot.index()].id,
            state: match self.legs[slot.index()].state {
                State::In => LegState::In,
                State::Recovering(_) => LegState::Recovering,
                State::Leaving | State::Out | State::Dropping => LegState::Out,
            },
        };
        let (sync, sync_done, sync_total) = self.syncing.as_ref().map_or((Sync::Idle, 0, 0), Syncing::progress);
        Status {
            blocks: self.blocks,
            epoch: self.record.name.epoch,
            legs: [leg(Slot::A), leg(Slot::B)],
            dirty_regions: self.bitmap.dirty(),
            bad_blocks: self.bad_blocks.blocks(),
            sync,
            sync_done,
            sync_total,
            copied_blocks: self.copied_blocks,
            scrub: self.scrub,
            write_mostly: self.write_mostly.slot,
            write_behind: self.write_behind().is_some(),
            behind: self.behind().0,
            pending: (self.writes.len() + self.reads.len() + self.early.len()) as u64,
            read_only: self.read_only.is_some(),
            ready: self.ready,
            stopped: self.stopped,
        }
    }

    /// How a leg of this volume that was found later may come back: its slot and how it must be filled
    /// (`Fill::Everything`: a new empty leg must be made first). `None`: no place for it (foreign, or both places are taken).
    pub fn readmission(&self, meta: &[u8]) -> Option<(Slot, Fill)> {
        let (superblock, _) = crate::format::superblock(meta).ok()?;
        let slot = self.record.slot_of(superblock.leg)?;
        let out = self.legs[slot.index()].state == State::Out && superblock.volume == self.volume;
        out.then(|| (slot, self.record.readmission(slot, superblock.record.name)))
    }
}
