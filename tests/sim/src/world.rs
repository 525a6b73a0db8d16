//! The world: disks, witness, client, oracles.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_core::{
    Mirror,
    assembly::{Assembly, Limits, Refusal, assemble},
    format,
    io::{Buffer, Effect, Effects, Event, Fill, LegOp, Notice, Outcome, Request},
    status::{LegState, Sync},
    units::{BlockRange, Epoch, Errno, Instant, IoId, LegId, Slot, Tag, VolumeId},
};

use crate::{disk::Disk, memory::Memory, performing::tear_page};

/// Blocks of the simulated volume: two regions and a bit.
pub const BLOCKS: u64 = 2 * 4096 + 64;
/// The simulated volume.
pub const VOLUME: VolumeId = VolumeId([9; 16]);
const META: usize = 65536 + 8192;

/// splitmix64.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    /// True once in `n`.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Data {
    /// The blocks and tokens that a write brings, or that a flush found in the cache when it was issued.
    pub(crate) blocks: Vec<(u64, u64)>,
    /// What it was issued with, whatever the name of that means by now (mirror rule 27).
    pub(crate) memory: Memory,
}

#[derive(Clone, Debug)]
pub(crate) enum Work {
    Leg(Slot, LegOp, Data),
    Witness(u64, Vec<u8>),
    /// Two pieces of memory, by what they hold when they are compared.
    Compare([(Memory, Buffer); 2], u64),
}

#[derive(Clone, Debug)]
enum Asked {
    Write { range: BlockRange, token: u64, fua: bool },
    Read { range: BlockRange, floor: Vec<u64> },
    Flush { covers: BTreeMap<u64, u64> },
    Other,
}

/// Everything there is.
#[derive(Clone, Debug)]
pub struct World {
    /// The schedule.
    pub rng: Rng,
    /// By slot.
    pub disks: [Disk; 2],
    /// The witness file; empty: lost.
    pub witness: Vec<u8>,
    /// One in so many leg I/Os ends with a host fault, or does only a part of what it was asked; 0: none.
    pub flaky: u64,
    /// So many witness writes fail, from now on.
    pub witness_fails: u32,
    /// Work that never ends by itself, until it is taken from here.
    pub stuck: BTreeSet<IoId>,
    /// Assembly is told so: the operator insists on this leg, the object saw this epoch.
    pub force: Option<LegId>,
    /// See `force`.
    pub seen_epoch: Option<Epoch>,
    /// What the mirror bounds itself by, from the next assembly on.
    pub limits: Limits,
    /// The mirror under test.
    pub mirror: Mirror,
    runs: u64,
    now: Instant,
    pub(crate) work: BTreeMap<IoId, Work>,
    /// Work of a process that was killed, still on its way on a disk that hangs.
    pub(crate) zombies: Vec<Work>,
    asked: BTreeMap<Tag, Asked>,
    pub(crate) memory: BTreeMap<Memory, Vec<u64>>,
    pub(crate) next_memory: Memory,
    pub(crate) buffers: BTreeMap<Tag, Memory>,
    pub(crate) last_read: BTreeMap<Tag, u64>,
    zeroed: BTreeSet<u64>,
    pub(crate) copies: [Option<Memory>; 4],
    next_tag: u64,
    next_token: u64,
    /// By block: the newest acked write, and the newest that was acked and flushed.
    acked: BTreeMap<u64, u64>,
    flushed: BTreeMap<u64, u64>,
    /// Answers, by tag.
    pub answers: BTreeMap<Tag, Result<(), Errno>>,
    /// What the mirror had to say.
    pub notices: Vec<Notice>,
    trace: Vec<String>,
}

fn leg_id(slot: Slot) -> LegId {
    LegId([slot.index() as u8 + 1; 16])
}

impl World {
    /// A new volume, assembled.
    pub fn new(seed: u64) -> Self {
        Self::built(seed, BLOCKS, Limits::default())
    }

    /// A new volume of so many blocks, assembled.
    pub fn sized(seed: u64, blocks: u64) -> Self {
        Self::built(seed, blocks, Limits::default())
    }

    /// A new volume, assembled to bound itself like this.
    pub fn with_limits(seed: u64, limits: Limits) -> Self {
        Self::built(seed, BLOCKS, limits)
    }

    fn built(seed: u64, blocks: u64, limits: Limits) -> Self {
        let legs = [leg_id(Slot::A), leg_id(Slot::B)];
        let disk = |slot| Disk {
            durable: BTreeMap::new(),
            cache: BTreeMap::new(),
            meta: format::new_leg(VOLUME, legs, leg_id(slot), blocks)[..META].to_vec(),
            hung: false,
            dead: false,
            bad: BTreeSet::new(),
            full: false,
            meta_fails: false,
        };
        let disks = [disk(Slot::A), disk(Slot::B)];
        let witness = format::new_witness(VOLUME, legs, blocks);
        let mut rng = Rng(seed);
        let (mirror, out) = start(&disks, Some(&witness), None, None, limits, &mut rng, 0).expect("a new volume assembles");
        let mut world = Self {
            rng,
            disks,
            witness,
            flaky: 0,
            witness_fails: 0,
            force: None,
            seen_epoch: None,
            stuck: BTreeSet::new(),
            limits,
            mirror,
            runs: 0,
            now: Instant(0),
            work: BTreeMap::new(),
            zombies: Vec::new(),
            asked: BTreeMap::new(),
            memory: BTreeMap::new(),
            next_memory: 0,
            buffers: BTreeMap::new(),
            last_read: BTreeMap::new(),
            zeroed: BTreeSet::new(),
            copies: [None; 4],
            next_tag: 1,
            next_token: 1,
            acked: BTreeMap::new(),
            flushed: BTreeMap::new(),
            answers: BTreeMap::new(),
            notices: Vec::new(),
            trace: Vec::new(),
        };
        world.perform(out);
        world
    }

    /// The last events and effects.
    pub fn trace(&self) -> String {
        self.trace[self.trace.len().saturating_sub(60)..].join("\n")
    }

    fn handle(&mut self, event: Event) {
        self.trace.push(format!("> {event:?}"));
        let mut out = Effects::new();
        self.mirror.handle(self.now, event, &mut out);
        self.mirror.check_invariants();
        self.perform(out);
    }

    fn perform(&mut self, mut out: Effects) {
        for effect in out.drain() {
            match effect {
                Effect::Leg { slot, io, op } => {
                    self.trace.push(format!("  {io:?} {slot:?} {}", brief(&op)));
                    let memory = match &op {
                        LegOp::Write { buffer, .. } | LegOp::Read { buffer, .. } => self.named(*buffer),
                        _ => 0,
                    };
                    let blocks = match &op {
                        LegOp::Write { range, buffer, .. } => {
                            (range.start..range.end).zip(self.bytes(memory, *buffer, range.len())).collect()
                        }
                        LegOp::Flush => self.disks[slot.index()].cache.iter().map(|(block, token)| (*block, *token)).collect(),
                        _ => Vec::new(),
                    };
                    let data = Data { blocks, memory };
                    if let LegOp::Write { range, .. } | LegOp::Zero { range } = &op {
                        for work in self.work.values() {
                            if let Work::Leg(s, LegOp::Write { range: r, .. } | LegOp::Zero { range: r }, _) = work {
                                assert!(*s != slot || !r.overlaps(*range), "two writes of one range in flight on {slot:?}");
                            }
                        }
                    }
                    self.assert_memory_free(&op, memory);
                    self.work.insert(io, Work::Leg(slot, op, data));
                }
                Effect::WriteWitness { io, offset, page } => {
                    self.work.insert(io, Work::Witness(offset, page.to_vec()));
                }
                Effect::Compare { io, a, b, blocks } => {
                    let parts = [a, b].map(|buffer| (self.named(buffer), buffer));
                    self.work.insert(io, Work::Compare(parts, blocks));
                }
                Effect::Complete { tag, result } => self.complete(tag, result),
                Effect::Release { tag } => {
                    assert!(self.asked.remove(&tag).is_some(), "{tag:?} released twice");
                    assert!(self.answers.contains_key(&tag), "{tag:?} released before it was answered");
                    if let Some(memory) = self.buffers.remove(&tag) {
                        self.free(memory);
                    }
                }
                Effect::NewBuffer { tag } => {
                    let len = self.memory[&self.buffers[&tag]].len();
                    let memory = self.allocate(vec![u64::MAX; len]);
                    self.buffers.insert(tag, memory);
                }
                Effect::ReleaseCopy { index } => self.copies[index as usize] = None,
                Effect::Notice(notice) => {
                    self.trace.push(format!("  ! {notice:?}"));
                    self.notices.push(notice);
                }
            }
        }
    }

    fn complete(&mut self, tag: Tag, result: Result<(), Errno>) {
        self.trace.push(format!("  = {tag:?} {result:?}"));
        assert!(self.answers.insert(tag, result).is_none(), "{tag:?} answered twice");
        if result.is_err() {
            return;
        }
        match self.asked.get_mut(&tag) {
            Some(Asked::Write { range, token, fua }) => {
                for block in range.start..range.end {
                    let newest = self.acked.entry(block).or_default();
                    *newest = (*newest).max(*token);
                    if *fua {
                        let newest = self.flushed.entry(block).or_default();
                        *newest = (*newest).max(*token);
                    }
                }
            }
            Some(Asked::Read { range, floor }) => {
                let found = &self.memory[&self.buffers[&tag]];
                self.last_read.insert(tag, found[0]);
                for (i, block) in (range.start..range.end).enumerate() {
                    let got = found[i];
                    assert!(got != u64::MAX, "nothing was read into block {block}");
                    // A discard has no token: zeroes are right for ever where there was one.
                    let zero = got == 0 && self.zeroed.contains(&block);
                    assert!(zero || got >= floor[i], "block {block} read {got}, but {} was acked before", floor[i]);
                }
            }
            Some(Asked::Flush { covers }) => {
                for (block, token) in covers.iter() {
                    let newest = self.flushed.entry(*block).or_default();
                    *newest = (*newest).max(*token);
                }
            }
            Some(Asked::Other) | None => {}
        }
    }

    fn submit(&mut self, asked: Asked, buffer: Vec<u64>, request: Request) -> Tag {
        let tag = Tag(self.next_tag);
        self.next_tag += 1;
        self.asked.insert(tag, asked);
        let memory = self.allocate(buffer);
        self.buffers.insert(tag, memory);
        self.handle(Event::Submit { tag, request });
        tag
    }

    /// Submits a write of a new token, or of zeroes (whose token is not told apart from older zeroes, so only whole tokens are judged).
    pub fn write(&mut self, range: BlockRange) -> Tag {
        self.write_with(range, false)
    }

    /// Submits a write that is to be durable when it is answered.
    pub fn write_fua(&mut self, range: BlockRange) -> Tag {
        self.write_with(range, true)
    }

    fn write_with(&mut self, range: BlockRange, fua: bool) -> Tag {
        let token = self.next_token;
        self.next_token += 1;
        self.submit(Asked::Write { range, token, fua }, vec![token; range.len() as usize], Request::Write { range, fua })
    }

    /// Submits a discard.
    pub fn zero(&mut self, range: BlockRange) -> Tag {
        self.zeroed.extend(range.start..range.end);
        self.submit(Asked::Other, Vec::new(), Request::Zero(range))
    }

    /// What a read that was not released yet has found.
    pub fn read_now(&mut self, block: u64) -> Result<u64, Errno> {
        let range = BlockRange::new(block, block + 1);
        let floor = vec![0];
        let tag = self.submit(Asked::Read { range, floor }, vec![u64::MAX], Request::Read(range));
        let mut found = u64::MAX;
        while !self.answers.contains_key(&tag) {
            assert!(self.step(), "the read never ended");
            found = self.last_read.get(&tag).copied().unwrap_or(found);
        }
        self.answers[&tag].map(|()| found)
    }

    /// Submits a read.
    pub fn read(&mut self, range: BlockRange) -> Tag {
        let floor = (range.start..range.end).map(|block| self.acked.get(&block).copied().unwrap_or(0)).collect();
        self.submit(Asked::Read { range, floor }, vec![u64::MAX; range.len() as usize], Request::Read(range))
    }

    /// What an answered read found in its first block.
    pub fn found(&self, read: Tag) -> Option<u64> {
        self.last_read.get(&read).copied()
    }

    /// Submits a flush.
    pub fn flush(&mut self) -> Tag {
        let covers = self.acked.clone();
        self.submit(Asked::Flush { covers }, Vec::new(), Request::Flush)
    }

    /// Submits anything else.
    pub fn command(&mut self, request: Request) -> Tag {
        self.submit(Asked::Other, Vec::new(), request)
    }

    /// What is in flight on the legs: id, slot, operation.
    pub fn in_flight(&self) -> Vec<(IoId, Slot, LegOp)> {
        self.work
            .iter()
            .filter_map(|(io, work)| if let Work::Leg(slot, op, _) = work { Some((*io, *slot, op.clone())) } else { None })
            .collect()
    }

    /// Ends one piece of work as its disk would.
    pub fn finish(&mut self, io: IoId) {
        let Some(work) = self.work.remove(&io) else { return };
        let outcome = self.outcome(work);
        self.handle(Event::Done { io, outcome });
    }

    fn outcome(&mut self, work: Work) -> Outcome {
        match work {
            Work::Witness(..) if self.witness_fails > 0 => {
                self.witness_fails -= 1;
                Outcome::Failed(Errno::EIO)
            }
            Work::Witness(..) if self.witness.is_empty() => Outcome::Failed(Errno::EIO),
            Work::Witness(offset, page) => {
                self.witness[offset as usize..offset as usize + 4096].copy_from_slice(&page);
                Outcome::Done(0)
            }
            Work::Compare(parts, blocks) => self.compare(parts, blocks),
            Work::Leg(slot, _, _) if self.disks[slot.index()].dead => Outcome::Failed(Errno::EIO),
            Work::Leg(slot, op, data) => self.perhaps_flaky(slot, op, &data),
        }
    }

    /// Ends one piece of work like this; its disk does nothing.
    pub fn end(&mut self, io: IoId, outcome: Outcome) {
        self.work.remove(&io);
        self.handle(Event::Done { io, outcome });
    }

    /// Ends a random piece of work; `false`: there is none.
    pub fn step(&mut self) -> bool {
        let movable = self.movable();
        if movable.is_empty() {
            return false;
        }
        let n = self.rng.below(movable.len() as u64) as usize;
        self.finish(movable[n]);
        true
    }

    /// Moves the clock to where the mirror waits for it; `false`: it waits for nothing.
    pub fn tick(&mut self) -> bool {
        let Some(at) = self.mirror.next_deadline() else { return false };
        self.now = self.now.max(at);
        self.handle(Event::Tick);
        true
    }

    /// The clock.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// The process is stopped for so long. Nothing it has submitted is reported meanwhile.
    pub fn sleep(&mut self, millis: u64) {
        self.now = self.now.plus_millis(millis);
    }

    /// Runs until nothing is left to do, ticking the clock where the mirror waits for it. Panics if it never ends.
    pub fn settle(&mut self) {
        for _ in 0..200_000 {
            if self.step() {
                continue;
            }
            let status = self.mirror.status();
            match self.mirror.next_deadline() {
                Some(_) if self.unanswered() || status.dirty_regions > 0 || status.sync != Sync::Idle || !status.ready => drop(self.tick()),
                _ => {
                    assert!(status.sync == Sync::Idle, "stuck: {status:?}");
                    assert!(self.asked.is_empty(), "requests that never ended: {:?}", self.asked);
                    assert_eq!(self.copies, [None; 4], "the mirror's own buffers are not given back: {}", self.trace());
                    return;
                }
            }
        }
        panic!("it never settles: {:?}", self.mirror.status());
    }

    fn unanswered(&self) -> bool {
        self.asked.keys().any(|tag| !self.answers.contains_key(tag))
    }

    /// Whether both legs are IN and nothing is being made equal.
    pub fn healthy(&self) -> bool {
        let status = self.mirror.status();
        status.legs.iter().all(|leg| leg.state == LegState::In) && status.sync == Sync::Idle
    }

    /// Asserts that the legs hold the same, but for what no leg holds (mirror rule 22). Call it when settled and healthy.
    pub fn assert_identical(&self) {
        let mut blocks: BTreeSet<u64> = self.disks.iter().flat_map(|disk| disk.durable.keys().chain(disk.cache.keys())).copied().collect();
        let lists = [self.disks[0].bad_blocks(), self.disks[1].bad_blocks()];
        assert_eq!(lists[0], lists[1], "the lists of bad blocks differ");
        blocks.retain(|block| !lists[0].iter().any(|run| (run.start..run.end).contains(block)));
        for block in blocks {
            assert_eq!(self.disks[0].read(block), self.disks[1].read(block), "block {block} differs");
        }
    }

    /// Power cut: what was not flushed survives or not, block by block; metadata in flight may be torn. Then only the disks in `present`
    /// come back.
    pub fn crash(&mut self, present: [bool; 2]) -> Result<(), Refusal> {
        self.trace.push("> CRASH".into());
        for work in std::mem::take(&mut self.work).into_values() {
            match work {
                Work::Leg(slot, op, data) if !self.disks[slot.index()].dead => self.tear(slot, op, &data.blocks),
                Work::Leg(..) | Work::Compare(..) => {}
                Work::Witness(..) if self.witness.is_empty() => {}
                Work::Witness(offset, page) => tear_page(&mut self.rng, &mut self.witness, offset, &page),
            }
        }
        for slot in Slot::BOTH {
            let disk = &mut self.disks[slot.index()];
            for (block, token) in std::mem::take(&mut disk.cache) {
                if self.rng.once_in(2) {
                    disk.durable.insert(block, token);
                }
            }
        }
        self.acked = self.flushed.clone();
        self.zombies.clear();
        self.assemble(present)
    }

    /// The process is killed: the disks keep what they have. What is on its way ends or never came to its disk; on a disk that hangs it ends
    /// when `land_zombies` says so. Then only the disks in `present` come back: a disk that hangs cannot be fenced, and is not among them.
    pub fn kill(&mut self, present: [bool; 2]) -> Result<(), Refusal> {
        self.trace.push("> KILL".into());
        for work in std::mem::take(&mut self.work).into_values() {
            match work {
                Work::Leg(slot, ..) if self.disks[slot.index()].hung => self.zombies.push(work),
                work if self.rng.once_in(2) => drop(self.outcome(work)),
                _ => {}
            }
        }
        for slot in Slot::BOTH {
            assert!(!(present[slot.index()] && self.disks[slot.index()].hung), "a leg with I/O outstanding cannot be fenced");
        }
        self.assemble(present)
    }

    /// The disks do what a process that was killed had asked of them.
    pub fn land_zombies(&mut self) {
        for work in std::mem::take(&mut self.zombies) {
            self.outcome(work);
        }
    }

    fn assemble(&mut self, present: [bool; 2]) -> Result<(), Refusal> {
        self.stuck.clear();
        self.asked.clear();
        self.buffers.clear();
        self.copies = [None; 4];
        for slot in Slot::BOTH {
            self.disks[slot.index()].dead |= !present[slot.index()];
        }
        let witness = (!self.witness.is_empty()).then_some(self.witness.as_slice());
        self.runs += 1;
        let (mirror, out) = start(&self.disks, witness, self.force, self.seen_epoch, self.limits, &mut self.rng, self.runs)?;
        self.mirror = mirror;
        self.now = Instant(0);
        self.perform(out);
        Ok(())
    }

    /// The disk works again, with what it held; its leg comes back as the mirror says.
    pub fn bring_back(&mut self, slot: Slot) -> Option<Tag> {
        self.disks[slot.index()].dead = false;
        let (place, fill) = self.mirror.readmission(&self.disks[slot.index()].meta)?;
        assert_eq!(place, slot);
        if fill == Fill::Everything {
            return Some(self.replace(slot));
        }
        let format::Summary { leg, newest, .. } = format::peek(&self.disks[slot.index()].meta).ok()?;
        Some(self.command(Request::Attach { slot, leg, fill, newest }))
    }

    /// Another disk is in this place. What the one that was there had to do nobody hears of any more: the process ends too, or has done with it.
    pub fn swap(&mut self, slot: Slot, disk: Disk) {
        self.work.retain(|_, work| !matches!(work, Work::Leg(on, ..) if *on == slot));
        self.disks[slot.index()] = disk;
    }

    /// A blank disk in a slot whose leg is OUT: an empty leg is filled from nothing.
    pub fn replace(&mut self, slot: Slot) -> Tag {
        let (leg, blocks) = (LegId([100 + self.rng.below(100) as u8; 16]), self.mirror.status().blocks);
        let disk = &mut self.disks[slot.index()];
        disk.meta = format::spare_leg(VOLUME, leg, blocks)[..META].to_vec();
        disk.bad.clear();
        disk.durable.clear();
        disk.cache.clear();
        self.command(Request::Attach { slot, leg, fill: Fill::Everything, newest: 0 })
    }
}

fn start(
    disks: &[Disk; 2],
    witness: Option<&[u8]>,
    force: Option<LegId>,
    seen_epoch: Option<Epoch>,
    limits: Limits,
    rng: &mut Rng,
    run: u64,
) -> Result<(Mirror, Effects), Refusal> {
    let metas: Vec<&[u8]> = disks.iter().filter(|disk| !disk.dead).map(|disk| disk.meta.as_slice()).collect();
    // No two runs of one line of a history have one. Of two lines that part, each needs a schedule of its own.
    let seed = u128::from(rng.below(u64::MAX) ^ run);
    let assembly = Assembly { volume: VOLUME, metas: &metas, witness, seen_epoch, force, seed, now: Instant(0), limits };
    let mut out = Effects::new();
    let assembled = assemble(&assembly, &mut out)?;
    Ok((assembled.mirror, out))
}

fn brief(op: &LegOp) -> String {
    match op {
        LegOp::WriteMeta { offset, .. } => format!("WriteMeta {offset}"),
        other => format!("{other:?}"),
    }
}
