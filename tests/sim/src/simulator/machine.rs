//! The machine: what is under way, and how a script moves it.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_core::{
    Mirror,
    fault::is_unreadable,
    format::{self, REGION_BLOCKS},
    io::{Effects, Event, LegOp, Outcome, Request},
    membership::{MemberState, Record},
    status::{LegState, Status, Sync},
    units::{BlockRange, Epoch, Errno, Instant, IoId, LegId, Slot, Tag},
};

use super::{
    Broken, Coverage, End, Kind, Profile, State, VOLUME, Watch,
    disk::{Disk, Witness},
    script::{Action, Line},
};
use crate::{
    oracles::{
        bounds,
        history::{Covered, Floor, History},
        legs,
    },
    world::Rng,
};

/// A buffer: its name, which nothing else ever has, and what is in it.
pub(super) type Memory = (u64, Vec<u64>);

/// What a leg or the witness was asked.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Leg(LegOp),
    Witness(u64, Vec<u8>),
    /// Of two buffers; done when it is asked for.
    Compare,
}

/// Something under way.
#[derive(Clone, Debug)]
pub(super) struct Work {
    /// The disk, and which of the legs that were made there; `None`: the witness.
    pub disk: Option<(usize, u64)>,
    pub op: Op,
    pub kind: Kind,
    /// What a write brings.
    pub data: Vec<u64>,
    /// The memory that a read fills, whatever its name means by then.
    pub memory: u64,
    /// What a flush must cover.
    pub mark: u64,
    pub since: Instant,
    /// It was done, and is not reported.
    pub ended: Option<(Outcome, End)>,
}

/// A request that is not released.
#[derive(Clone, Debug)]
pub(super) enum Asked {
    Write {
        range: BlockRange,
        id: u64,
        zero: bool,
        fua: bool,
    },
    /// `lost`: it may read as an error, by what was lost when it was submitted.
    Read {
        range: BlockRange,
        floor: Floor,
        lost: bool,
    },
    Flush {
        covered: Covered,
    },
    Grow {
        blocks: u64,
    },
    Attach {
        slot: Slot,
    },
    Stop,
    Other,
}

pub(super) struct Machine {
    pub profile: Profile,
    pub rng: Rng,
    pub disks: Vec<Disk>,
    /// By slot: which disk is there.
    pub place: [Option<usize>; 2],
    pub witness: Witness,
    pub witness_errors: u8,
    pub mirror: Option<Mirror>,
    pub status: Status,
    /// What the object last saw.
    pub object: Option<Epoch>,
    pub now: Instant,
    pub work: BTreeMap<IoId, Work>,
    pub asked: BTreeMap<Tag, Asked>,
    pub answers: BTreeMap<Tag, Result<(), Errno>>,
    pub buffers: BTreeMap<Tag, Memory>,
    pub copies: Vec<Memory>,
    pub next_memory: u64,
    next_tag: u64,
    pub next_leg: u64,
    pub boots: u64,
    /// That was published.
    pub blocks: u64,
    pub history: History,
    /// The legs may differ: since an unclean stop or a write that failed on both, until they are equal again.
    pub may_differ: bool,
    /// What the only good leg could not read when it was to be copied: it may read as an error until it is overwritten.
    pub lost: BTreeSet<u64>,
    /// Something happened that lets requests end with errors.
    pub excused: bool,
    /// The last stop was clean, with both legs there.
    pub clean: bool,
    pub stopping: bool,
    pub stopped: bool,
    pub coverage: Coverage,
    pub broken: Option<Broken>,
    watch: Watch,
    tell: bool,
    pub told: Vec<String>,
}

impl Machine {
    pub(super) fn new(seed: u64, profile: Profile, watch: Watch, tell: bool) -> Self {
        let ids = [LegId([1; 16]), LegId([2; 16])];
        let meta = |id| format::new_leg(VOLUME, ids, id, profile.blocks);
        let mut machine = Self {
            profile,
            rng: Rng(seed),
            disks: vec![Disk::new(meta(ids[0])), Disk::new(meta(ids[1])), Disk::new(Vec::new())],
            place: [None; 2],
            witness: Witness::new(format::new_witness(VOLUME, ids, profile.blocks)),
            witness_errors: 0,
            mirror: None,
            status: super::boot::NOT_YET,
            object: None,
            now: Instant(0),
            work: BTreeMap::new(),
            asked: BTreeMap::new(),
            answers: BTreeMap::new(),
            buffers: BTreeMap::new(),
            copies: Vec::new(),
            next_memory: 0,
            next_tag: 1,
            next_leg: 3,
            boots: 0,
            blocks: profile.blocks,
            history: History::default(),
            may_differ: false,
            lost: BTreeSet::new(),
            excused: false,
            clean: false,
            stopping: false,
            stopped: false,
            coverage: Coverage::default(),
            broken: None,
            watch,
            tell,
            told: Vec::new(),
        };
        if let Err(refusal) = machine.boot(&BTreeSet::from([0, 1, 2])) {
            machine.breaks("availability", format!("a new volume is refused: {refusal}"));
        }
        machine
    }

    pub(super) fn tell(&mut self, text: impl FnOnce() -> String) {
        if self.tell {
            let text = text();
            self.told.push(text);
        }
    }

    pub(super) fn check(&mut self, oracle: &'static str, result: Result<(), String>) {
        if let (Err(text), None) = (result, &self.broken) {
            self.broken = Some(Broken::new(oracle, text));
        }
    }

    pub(super) fn breaks(&mut self, oracle: &'static str, text: impl Into<String>) {
        self.check(oracle, Err(text.into()));
    }

    /// Plays a script, then lets everything heal and looks at what is left.
    pub(super) fn play(&mut self, lines: &[Line]) {
        for (action, salt) in lines {
            if self.broken.is_some() {
                return;
            }
            self.rng = Rng(*salt);
            self.tell(|| format!("# {action:?}"));
            self.act(*action);
        }
        self.rng = Rng(1);
        self.finish();
    }

    fn finish(&mut self) {
        self.tell(|| "# the end".into());
        self.heal();
        self.settle();
        // A mirror that gave up stays so until it is started anew.
        for _ in 0..4 {
            if self.broken.is_some() {
                return;
            }
            if self.status.read_only {
                self.crash(super::Crash { power: false, missing: 0, witness_lost: false, blank: None });
            }
            self.heal();
            self.attach();
            self.settle();
            // A witness that failed is tried again after a second.
            if !self.is_healthy() && self.tick() {
                self.settle();
            }
        }
        if !self.is_healthy() {
            return self.breaks("availability", format!("with all disks back it does not heal: {:?}", self.status));
        }
        for block in self.history.blocks() {
            self.read(BlockRange::new(block, block + 1));
            if self.asked.len() > 8 {
                self.settle();
            }
        }
        self.settle();
        self.stop();
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Write(range, fua) => self.write(range, fua),
            Action::Read(range) => self.read(range),
            Action::Zero(range) => self.zero(range),
            Action::Flush => self.flush(),
            Action::Step(n) => {
                for _ in 0..n {
                    self.step();
                }
            }
            Action::Tick => {
                for _ in 0..1 + self.rng.below(8) {
                    self.tick();
                }
            }
            Action::Settle => self.settle(),
            Action::Fault(fault) => self.fault(fault),
            Action::Heal => self.heal(),
            Action::Attach => self.attach(),
            Action::Detach(slot) => self.detach(slot),
            Action::Grow(blocks) => self.grow(blocks),
            Action::Stop => self.stop(),
            Action::Crash(crash) => self.crash(crash),
        }
    }

    pub(super) fn is_healthy(&self) -> bool {
        State::of(&self.status) == State::Healthy
    }

    /// The record that decides who counts, as it would be found now.
    pub(super) fn record(&self) -> Option<Record> {
        self.witness.record()
    }

    /// The slots whose legs the durable record counts.
    pub(super) fn counted(&self) -> Vec<Slot> {
        let Some(record) = self.record() else { return Vec::new() };
        Slot::BOTH.into_iter().filter(|slot| record.members[slot.index()].state == MemberState::In).collect()
    }

    pub(super) fn handle(&mut self, event: Event) {
        let Some(mirror) = &mut self.mirror else { return };
        if self.tell {
            self.told.push(format!("> {event:?}"));
        }
        self.coverage.events += 1;
        let mut out = Effects::new();
        mirror.handle(self.now, event, &mut out);
        if self.watch == Watch::Invariants {
            mirror.check_invariants();
        }
        self.perform(out);
        self.look();
    }

    /// After every event: what the mirror says of itself.
    pub(super) fn look(&mut self) {
        let Some(mirror) = &self.mirror else { return };
        let before = self.status;
        self.status = mirror.status();
        let status = self.status;
        let both = |status: &Status| status.legs.iter().all(|leg| leg.state == LegState::In);
        if both(&before) && !both(&status) && self.may_differ {
            self.tell(|| "  (the exception of rule 21)".into());
            self.history.exception(None);
        }
        if !both(&status) {
            self.history.leg_missed();
        }
        for slot in Slot::BOTH {
            let (was, is) = (before.legs[slot.index()].state, status.legs[slot.index()].state);
            if let (LegState::Recovering, LegState::In, Some(disk)) = (was, is, self.place[slot.index()]) {
                self.disks[disk].trouble.suspect = false;
            }
        }
        if status.ready && (!both(&status) || status.sync == Sync::Idle) {
            self.may_differ = false;
        }
        if status.read_only && !before.read_only && !self.excused {
            self.breaks("availability", "the mirror gave up within the budget");
        }
        let regions = status.blocks.div_ceil(REGION_BLOCKS) + 2;
        self.check("bounds", bounds::status(status.pending, self.asked.len() as u64, status.dirty_regions, regions));
    }

    fn submit(&mut self, asked: Asked, buffer: Vec<u64>, request: Request) -> Tag {
        self.clean = false;
        while self.asked.len() as u64 >= self.profile.depth && self.step() {}
        let tag = Tag(self.next_tag);
        self.next_tag += 1;
        self.asked.insert(tag, asked);
        let memory = self.allocate(buffer);
        self.buffers.insert(tag, memory);
        self.handle(Event::Submit { tag, request });
        tag
    }

    pub(super) fn allocate(&mut self, content: Vec<u64>) -> Memory {
        self.next_memory += 1;
        (self.next_memory, content)
    }

    fn count(&mut self, name: &'static str) {
        *self.coverage.operations.entry(name).or_default() += 1;
    }

    fn write(&mut self, range: BlockRange, fua: bool) {
        self.make_room();
        self.count(if fua { "write fua" } else { "write" });
        let id = self.history.written(range, false);
        self.submit(Asked::Write { range, id, zero: false, fua }, vec![id; range.len() as usize], Request::Write { range, fua });
    }

    fn zero(&mut self, range: BlockRange) {
        self.make_room();
        self.count("zero");
        let id = self.history.written(range, true);
        self.submit(Asked::Write { range, id, zero: true, fua: false }, Vec::new(), Request::Zero(range));
    }

    fn read(&mut self, range: BlockRange) {
        self.make_room();
        self.count("read");
        let floor = self.history.floor(range);
        let lost = self.is_lost(range);
        self.submit(Asked::Read { range, floor, lost }, vec![u64::MAX; range.len() as usize], Request::Read(range));
    }

    fn flush(&mut self) {
        self.make_room();
        self.count("flush");
        let covered = self.history.to_flush();
        self.submit(Asked::Flush { covered }, Vec::new(), Request::Flush);
    }

    /// Before a request is drawn up, because what it expects depends on what was answered by then.
    pub(super) fn make_room(&mut self) {
        while self.asked.len() as u64 >= self.profile.depth && self.step() {}
    }

    pub(super) fn ask(&mut self, name: &'static str, asked: Asked, request: Request) -> Tag {
        self.count(name);
        self.submit(asked, Vec::new(), request)
    }

    fn grow(&mut self, more: u64) {
        let blocks = (self.blocks + more).min(self.profile.blocks + 2 * REGION_BLOCKS);
        if self.asked.values().any(|asked| matches!(asked, Asked::Grow { .. })) {
            return;
        }
        self.ask("grow", Asked::Grow { blocks }, Request::Grow { blocks });
    }

    /// Moves one piece of work on: it is done, or reported, or both. `false`: nothing moves.
    pub(super) fn step(&mut self) -> bool {
        if self.broken.is_some() {
            return false;
        }
        let thawed = |work: &Work| work.disk.is_none_or(|(disk, _)| !self.disks[disk].trouble.frozen);
        let movable: Vec<IoId> = self.work.iter().filter(|(_, work)| thawed(work)).map(|(io, _)| *io).collect();
        if movable.is_empty() {
            return false;
        }
        let io = movable[self.rng.below(movable.len() as u64) as usize];
        self.advance(io);
        true
    }

    fn advance(&mut self, io: IoId) {
        let done = self.work.get(&io).is_some_and(|work| work.ended.is_some());
        if !done {
            self.execute(io);
            if self.profile.early > 0 && self.rng.once_in(self.profile.early) {
                return;
            }
        }
        let Some(work) = self.work.remove(&io) else { return };
        let Some((outcome, end)) = work.ended else { return };
        *self.coverage.cells.entry((State::of(&self.status), work.kind, end)).or_default() += 1;
        if let (Op::Leg(LegOp::Read { range, .. }), Outcome::Failed(_)) = (&work.op, outcome)
            && self.may_differ
        {
            // The only copy that was read from is lost here: the other may be older.
            self.history.exception(Some(*range));
        }
        let alone = self.status.legs.iter().filter(|leg| leg.state == LegState::In).count() == 1;
        if let (Op::Leg(LegOp::Read { range, .. }), Kind::CopyRead, Outcome::Failed(errno)) = (&work.op, work.kind, outcome)
            && alone
            && range.len() == 1
            && is_unreadable(errno)
        {
            self.lost.insert(range.start);
        }
        self.handle(Event::Done { io, outcome });
    }

    /// Moves the clock to where the mirror waits for it; `false`: it waits for nothing.
    pub(super) fn tick(&mut self) -> bool {
        let Some(at) = self.mirror.as_ref().and_then(Mirror::next_deadline) else { return false };
        // A disk that is not frozen answers within ten seconds.
        let slow = at.0.saturating_sub(10_000_000_000);
        let late = |work: &Work| work.since.0 < slow && work.disk.is_none_or(|(disk, _)| !self.disks[disk].trouble.frozen);
        let late: Vec<IoId> = self.work.iter().filter(|(_, work)| late(work)).map(|(io, _)| *io).collect();
        late.into_iter().for_each(|io| self.advance(io));
        self.now = self.now.max(at);
        self.handle(Event::Tick);
        true
    }

    /// Runs until nothing is left to do.
    pub(super) fn settle(&mut self) {
        self.disks.iter_mut().for_each(|disk| disk.trouble.frozen = false);
        for _ in 0..200_000 {
            if self.broken.is_some() {
                return;
            }
            if self.step() {
                continue;
            }
            let leaving = self.counted().iter().any(|slot| self.status.legs[slot.index()].state != LegState::In);
            let busy = !self.asked.is_empty() || self.status.sync != Sync::Idle || !self.status.ready || leaving;
            let dirty = self.status.dirty_regions > 0 && self.is_healthy();
            if self.status.read_only || !(busy || dirty) || !self.tick() {
                return self.quiet();
            }
        }
        self.breaks("every request ends", format!("it never comes to rest: {:?}", self.status));
    }

    /// Nothing is under way.
    fn quiet(&mut self) {
        if let Some((tag, asked)) = self.asked.iter().next() {
            return self.breaks("every request ends", format!("{tag:?} never ended: {asked:?}"));
        }
        if self.is_healthy() {
            let blocks = self.disks.iter().flat_map(Disk::blocks).collect();
            match self.place {
                [Some(a), Some(b)] => self.compare(a, b, &blocks),
                _ => self.breaks("legs are identical", "a leg that counts is nowhere"),
            }
            if self.status.dirty_regions > 0 {
                self.breaks("bounds", "all is quiet, and regions stay dirty");
            }
            self.disks.iter_mut().for_each(|disk| disk.trouble.suspect = false);
        }
        if State::of(&self.status) != State::Resync {
            self.excused = self.status.read_only;
        }
    }

    /// Compares what two disks hold.
    pub(super) fn compare(&mut self, a: usize, b: usize, blocks: &BTreeSet<u64>) {
        let [a, b] = [&self.disks[a], &self.disks[b]];
        // What no leg holds is anything (mirror rule 22).
        let bad = |block: &u64| a.bad.iter().chain(&b.bad).any(|run| (run.start..run.end).contains(block));
        let blocks = &blocks.iter().copied().filter(|block| !bad(block)).collect();
        let first = |block| (a.read(block), 0);
        let second = |block| (b.read(block), 0);
        let legs = [legs::Leg { place: 0, holds: &first, lies: false }, legs::Leg { place: 1, holds: &second, lies: false }];
        let result = legs::identical(legs, blocks);
        self.check("legs are identical", result);
    }
}
