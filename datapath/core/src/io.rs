//! The boundary: events in, effects out. Data bytes never cross it; buffers are named by tag.

use alloc::{boxed::Box, vec::Vec};

use crate::units::{BlockRange, Errno, IoId, LegId, Slot, Tag};

/// What a client asks of the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// Fill the tag's buffer from the volume.
    Read(BlockRange),
    /// Put the tag's buffer on both legs. `fua`: durable before the answer.
    Write {
        /// Where.
        range: BlockRange,
        /// Durable before the answer (mirror rule 16).
        fua: bool,
    },
    /// Make every write answered before this durable.
    Flush,
    /// Read as zeroes from now on; discard and write-zeroes are the same thing to the mirror (mirror rule 29).
    Zero(BlockRange),
    /// Put a leg into a slot whose leg is OUT or absent, and fill it. Answered when the leg is RECOVERING (durably)
    /// or refused; the filling goes on afterwards. EBUSY: the slot's leg is still counted, or the mirror is stopping.
    Attach {
        /// The place.
        slot: Slot,
        /// The leg's id. A leg that comes back keeps its id; an empty one has a new id.
        leg: LegId,
        /// How much of the leg is to be trusted.
        fill: Fill,
        /// Which slot its newest superblock is in (`format::Summary`): the other one is written first (mirror rule 20).
        newest: u8,
    },
    /// Take a leg out: its disk is known to be gone, or is wanted elsewhere. EBUSY: it is the last leg that is IN.
    Detach(Slot),
    /// The leg files are `blocks` long now: publish that size (mirror rule 31). Never shrinks (EINVAL).
    Grow {
        /// The new size.
        blocks: u64,
    },
    /// This leg is slow: read from the other, as long as that can. With `behind`, writes are answered when the other has them, as soon as the record
    /// pins that one (`Status::write_behind`); what that may cost is said in `mirror/behind.rs` (mirror rule 32). Good until the mirror is
    /// assembled anew or another leg is attached. `None`: no leg is.
    WriteMostly {
        /// The slow leg.
        slot: Option<Slot>,
        /// Writes need not wait for it.
        behind: bool,
    },
    /// Compare the legs wherever something was ever written (mirror rule 30). Answered at its end, which `Status::scrub` tells more of: EBUSY: one
    /// is under way; ENODEV: a leg is or was lost; ECANCELED: `StopScrub`; ESHUTDOWN: `Stop`; EIO: the mirror gave up.
    Scrub {
        /// `None`: what differs is reported and left as it is. Else the operator believes this leg: what differs is put on the other one.
        believed: Option<Slot>,
    },
    /// End the scrub that is under way, if there is one.
    StopScrub,
    /// Finish what was accepted, flush, clear the dirty bits where the legs are known equal, and refuse everything
    /// from now on. Answered when the metadata says so.
    Stop,
}

/// How an attached leg is filled (mirror rule 24). `crate::assembly::readmission` decides which one a leg gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fill {
    /// The leg holds what it had when it went OUT: copy the dirty regions, zero where the source has a hole.
    DirtyRegions,
    /// The leg is a new file that reads as zeroes: copy what was ever written.
    Everything,
}

/// How one piece of work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It is done. For reads and writes: how many bytes, which may be fewer than asked for. For the rest: 0.
    Done(u64),
    /// The answer to `LegOp::NextData`: the first run of blocks in the range that was ever written, clipped to it.
    Extent(Option<BlockRange>),
    /// The answer to `Effect::Compare`: bit `i` is set if the buffers differ in block `i`.
    Differ(u128),
    /// It failed.
    Failed(Errno),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A client (or the operator) asks for something.
    Submit {
        /// Names it, and its buffer, until `Effect::Release`.
        tag: Tag,
        /// What is asked.
        request: Request,
    },
    /// Work that an effect asked for has ended.
    Done {
        /// The effect's id.
        io: IoId,
        /// How it ended.
        outcome: Outcome,
    },
    /// `Mirror::next_deadline` has come. The shell delivers every completion that has arrived before it: what a tick finds outstanding may be
    /// judged late (mirror rule 27). It may come as late as it likes: the deadlines of leg I/O count at most one step for each tick.
    Tick,
}

/// Names a buffer. The shell maps it to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Buffer {
    /// The payload of a client request, from this many blocks into it.
    Request {
        /// Whose.
        tag: Tag,
        /// Blocks to skip.
        skip: u64,
    },
    /// A buffer of the mirror's own, `COPY_BLOCKS` long, number `0..COPY_WINDOW`, from this many blocks into it. It comes to
    /// life with the first effect that names it and ends with `Effect::ReleaseCopy`.
    Copy {
        /// Which.
        index: u8,
        /// Blocks to skip.
        skip: u64,
    },
}

/// One page of metadata.
pub type Page = Box<[u8; 4096]>;

/// Work on one leg.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LegOp {
    /// Read `data` at `range` into the buffer.
    Read {
        /// Where.
        range: BlockRange,
        /// Into.
        buffer: Buffer,
    },
    /// Write the buffer to `data` at `range`; with `fua`, durable when done.
    Write {
        /// Where.
        range: BlockRange,
        /// From.
        buffer: Buffer,
        /// Durable when done.
        fua: bool,
    },
    /// Make `data` read as zeroes at `range`, keeping the space.
    Zero {
        /// Where.
        range: BlockRange,
    },
    /// Make everything that is done on this leg durable.
    Flush,
    /// Where in `range` is the first written data? Answered by `Outcome::Extent`.
    NextData {
        /// Where to look.
        range: BlockRange,
    },
    /// Overwrite one page of `meta`. Durable when done.
    WriteMeta {
        /// Byte offset in `meta`.
        offset: u64,
        /// The bytes.
        page: Page,
    },
}

/// What the shell must do, in this order. What needs earlier durability is asked for only after that durability was
/// reported, so the shell needs no barriers of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Work on a leg. Ends with `Event::Done`.
    Leg {
        /// Which leg.
        slot: Slot,
        /// Names the work.
        io: IoId,
        /// The work.
        op: LegOp,
    },
    /// Overwrite one page of the witness. Durable when done. Ends with `Event::Done`.
    WriteWitness {
        /// Names the work.
        io: IoId,
        /// Byte offset in the witness file: 0 or 4096.
        offset: u64,
        /// The bytes.
        page: Page,
    },
    /// Compare two parts of the mirror's own buffers, block by block. Ends with `Event::Done` and `Outcome::Differ`.
    Compare {
        /// Names the work.
        io: IoId,
        /// One leg's blocks.
        a: Buffer,
        /// The other's.
        b: Buffer,
        /// How many: 128 at most.
        blocks: u64,
    },
    /// Answer the client. The buffer stays in use until `Release`.
    Complete {
        /// Who.
        tag: Tag,
        /// With what.
        result: Result<(), Errno>,
    },
    /// The mirror will not name this tag or its buffer again. Comes exactly once for each tag, not before `Complete`. I/O of a leg that is OUT
    /// may still be in flight and keeps its memory until it ends (mirror rule 27).
    Release {
        /// Who.
        tag: Tag,
    },
    /// Another buffer for this tag, as large: what it had belongs to a late read until that ends, whatever becomes of the tag (mirror rule
    /// 27). Comes before the effect that names the new one.
    NewBuffer {
        /// Who.
        tag: Tag,
    },
    /// The mirror's own buffer is free: its content is not needed any more. I/O that is still in flight keeps its memory.
    ReleaseCopy {
        /// Which.
        index: u8,
    },
    /// Something that a person or an object's status wants to know.
    Notice(Notice),
}

/// Something that a person or an object's status wants to know.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Notice {
    /// Assembly is durable; requests are served from now on.
    Assembled,
    /// A leg failed and is being taken OUT.
    LegFailed {
        /// Which.
        slot: Slot,
        /// What it said.
        error: Errno,
    },
    /// A leg is durably OUT: nothing counts on it any more.
    LegOut {
        /// Which.
        slot: Slot,
    },
    /// After an unclean stop the legs are being made equal.
    ResyncStarted {
        /// How many regions may differ.
        regions: u64,
    },
    /// The legs are equal again.
    ResyncCompleted,
    /// A leg is being filled.
    RebuildStarted {
        /// Which.
        slot: Slot,
        /// What is copied.
        fill: Fill,
    },
    /// A leg is full and IN.
    RebuildCompleted {
        /// Which.
        slot: Slot,
    },
    /// The only good copy cannot be read here. No copy holds these blocks: reads of them fail until they are overwritten (mirror rule 22).
    BlocksLost {
        /// The blocks.
        range: BlockRange,
    },
    /// The only good copy cannot be read here, and that could not be put on the list of bad blocks: the rebuild is tried again later.
    RebuildBlocked {
        /// Which leg waits.
        slot: Slot,
        /// The unreadable blocks.
        range: BlockRange,
    },
    /// A read failed on one leg and was repaired from the other.
    ReadRepaired {
        /// The leg that failed.
        slot: Slot,
        /// Where.
        range: BlockRange,
    },
    /// No leg can read these blocks.
    Unreadable {
        /// Where.
        range: BlockRange,
    },
    /// A write failed on both legs; what is there is old or new until it is written again.
    WriteFailedOnBoth {
        /// Where.
        range: BlockRange,
    },
    /// The witness cannot be written: writes that need it fail.
    WitnessFailed {
        /// What it said.
        error: Errno,
    },
    /// A flush or the survivor's metadata failed: the mirror takes no more writes.
    ReadOnly {
        /// What the leg said.
        error: Errno,
    },
    /// A scrub begins.
    ScrubStarted,
    /// The legs differ here. After the first 1024 of a scrub they are only counted.
    Mismatch {
        /// Where.
        range: BlockRange,
    },
    /// What differed was put on this leg, from the one that the operator believes.
    MismatchRepaired {
        /// The leg that was written.
        slot: Slot,
        /// Where.
        range: BlockRange,
    },
    /// A scrub is over: what `Request::Scrub` is answered with.
    ScrubEnded {
        /// Whether everything was looked at.
        result: Result<(), Errno>,
    },
    /// The volume has this many blocks now.
    Grown {
        /// The new size.
        blocks: u64,
    },
}

/// Collects effects, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Effects(pub Vec<Effect>);

impl Effects {
    /// An empty list.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Appends one.
    pub fn push(&mut self, effect: Effect) {
        self.0.push(effect);
    }

    /// Takes them all, in order.
    pub fn drain(&mut self) -> impl Iterator<Item = Effect> + '_ {
        self.0.drain(..)
    }
}
