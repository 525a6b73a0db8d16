//! The machine: what is under way, and how a script moves it.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_core::{
    Mirror,
    assembly::Limits,
    format::{self, REGION_BLOCKS},
    io::{Buffer, Effects, Event, LegOp, Outcome, Request},
    membership::{MemberState, Record},
    status::{LegState, ScrubState, Status, Sync},
    units::{BlockRange, Epoch, Errno, Instant, IoId, LegId, Slot, Tag},
};

use super::{
    Broken, Coverage, End, Kind, Profile, State, VOLUME, Watch,
    disk::{Disk, Witness},
    script::{Action, Crash, Line},
};
use crate::{
    oracles::{
        bounds,
        history::{Covered, Floor, History},
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
    /// What the mirror was like then.
    pub begun_in: State,
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
    /// `listed`: its blocks that were on the list of every leg that counts.
    Read {
        range: BlockRange,
        floor: Floor,
        listed: BTreeSet<u64>,
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
    Detach {
        slot: Slot,
    },
    Invalid,
    /// Answered at once.
    Other,
    Scrub,
    Stop,
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
    pub copies: BTreeMap<u8, Memory>,
    pub next_memory: u64,
    next_tag: u64,
    pub next_leg: u64,
    pub boots: u64,
    /// That was published.
    pub blocks: u64,
    /// What it was when somebody was served last.
    pub published: u64,
    pub history: History,
    /// The legs may differ: since an unclean stop or a write that failed on both, until they are equal again.
    pub may_differ: bool,
    /// Which leg reads are pinned to where they may differ, by the witness; `None`: nobody knows.
    pub pin: Option<Slot>,
    /// Requests that were answered when the last event was over, and a leg that counts was not done with them.
    pub are_behind: BTreeMap<Tag, BlockRange>,
    /// Blocks and versions that were answered by one leg alone in this run (mirror rule 32).
    pub behind: Covered,
    /// Blocks and versions that were behind on a leg in a crash (mirror rule 32); the legs were not made equal since.
    pub was_behind: Covered,
    /// Something happened that lets requests end with errors.
    pub excused: bool,
    /// The witness was there at the start, or was written since.
    pub witnessed: bool,
    /// The last stop was clean, with both legs there.
    pub clean: bool,
    pub stopping: bool,
    pub stopped: bool,
    /// A read failed, or the legs were being made equal, since all was quiet: there may be copies in the range lock.
    pub copies_may_wait: bool,
    /// How often a copy could not read a block, since one could.
    pub unreadable: BTreeMap<u64, u8>,
    /// Requests with a lower tag came when not both legs counted: no cap held them back (mirror rule 17).
    pub capped_since: u64,
    /// When the process stood still, and for how many milliseconds.
    pub pauses: BTreeMap<Instant, u64>,
    /// Blocks that the mirror gave up, and that were not overwritten.
    pub lost: BTreeSet<u64>,
    /// Host faults and short counts so far, of what may be one operation and its reissues: disk, kind, memory, where it ends.
    pub in_a_row: BTreeMap<(usize, Kind, u64, u64), u8>,
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
            copies: BTreeMap::new(),
            next_memory: 0,
            next_tag: 1,
            next_leg: 3,
            boots: 0,
            blocks: profile.blocks,
            published: profile.blocks,
            history: History::default(),
            may_differ: false,
            pin: None,
            are_behind: BTreeMap::new(),
            behind: Covered::new(),
            was_behind: Covered::new(),
            excused: false,
            witnessed: true,
            clean: false,
            stopping: false,
            stopped: false,
            copies_may_wait: false,
            unreadable: BTreeMap::new(),
            capped_since: 0,
            pauses: BTreeMap::new(),
            lost: BTreeSet::new(),
            in_a_row: BTreeMap::new(),
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
                self.crash(Crash::plain(false));
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
            Action::Pause(seconds) => self.pause(seconds),
            Action::Invalid(range) => {
                self.make_room();
                let request =
                    [Request::Read(range), Request::Write { range, fua: false }, Request::Zero(range)][self.rng.below(3) as usize];
                self.ask("invalid", Asked::Invalid, request);
            }
            Action::Settle => self.settle(),
            Action::Fault(fault) => self.fault(fault),
            Action::Heal => self.heal(),
            Action::Attach => self.attach(),
            Action::Detach(slot) => self.detach(slot),
            Action::Scrub(believed) => {
                self.make_room();
                if self.status.scrub.state == ScrubState::Running {
                    // There is one already.
                    self.ask("stop scrub", Asked::Other, Request::StopScrub);
                } else {
                    self.ask("scrub", Asked::Scrub, Request::Scrub { believed });
                }
            }
            Action::WriteMostly(slot, behind) => {
                self.make_room();
                self.ask("write-mostly", Asked::Other, Request::WriteMostly { slot, behind });
            }
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
        if both(&before) && self.may_differ {
            self.lose(Slot::BOTH.into_iter().filter(|slot| status.legs[slot.index()].state != LegState::In));
        }
        if !both(&status) || self.counted().len() < 2 {
            self.capped_since = self.next_tag;
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
        self.witnessed |= status.ready;
        self.copies_may_wait |= status.sync != Sync::Idle || status.scrub.state == ScrubState::Running;
        // What is being stopped does not begin a resync.
        let equal = status.sync == Sync::Idle && !self.stopping;
        if status.ready && !status.read_only && (!both(&status) || equal) {
            self.may_differ = false;
            self.was_behind.clear();
        }
        if status.behind > before.behind {
            *self.coverage.others.entry("answered behind").or_default() += 1;
        }
        if status.read_only && !before.read_only && !self.excused {
            self.breaks("availability", "the mirror gave up within the budget");
        }
        // A growth that was answered with an error may have come about.
        if status.blocks != self.blocks && !status.read_only {
            self.breaks("reads are linearizable", format!("{} blocks are served, {} were published", status.blocks, self.blocks));
        }
        let regions = status.blocks.div_ceil(REGION_BLOCKS) + 2;
        self.check("bounds", bounds::status(status.pending, self.asked.len() as u64, status.dirty_regions, regions));
        self.are_behind = self.not_landed();
        let (writes, blocks) = (self.are_behind.len() as u64, self.are_behind.values().map(|range| range.len()).sum());
        self.check("bounds", bounds::behind(status.behind, (writes, blocks), self.profile.behind.unwrap_or((0, 0))));
        self.pin = self.record().map(|record| record.pin);
    }

    fn submit(&mut self, asked: Asked, buffer: Vec<u64>, request: Request) -> Tag {
        self.clean = false;
        while self.asked.len() as u64 >= self.profile.depth && self.step() {}
        let tag = Tag(self.next_tag);
        self.next_tag += 1;
        self.asked.insert(tag, asked);
        let memory = self.allocate(buffer);
        self.buffers.insert(tag, memory);
        let before = self.work.len();
        let at_once = match &self.asked[&tag] {
            Asked::Write { range, .. } => self.goes_at_once(tag, *range),
            _ => false,
        };
        self.handle(Event::Submit { tag, request });
        if at_once && self.work.len() == before {
            self.breaks("touching writes go in parallel", format!("{request:?} waits, and overlaps nothing"));
        }
        tag
    }

    /// Whether a write overlaps nothing that is under way, and its dirty bits are durable: then it goes to the legs at once (mirror rule 2).
    /// That a bit is durable is known where another write of the region is on a leg and not released. Where room for dirty regions is scarce, one
    /// that waits for it holds back all that come later (mirror rule 17); so does the change of the pin before writes may be behind (rule 32).
    fn goes_at_once(&self, tag: Tag, range: BlockRange) -> bool {
        let plain = matches!(State::of(&self.status), State::Healthy | State::Degraded) && !self.stopping && !self.copies_may_wait;
        let room = self.profile.cap >= self.blocks.div_ceil(REGION_BLOCKS) && self.profile.behind.is_none();
        let free = self.asked.iter().filter(|(other, _)| **other != tag).all(|(_, asked)| match asked {
            // A read that is read again holds later writes back.
            Asked::Write { range: other, .. } | Asked::Read { range: other, .. } => !other.overlaps(range),
            Asked::Flush { .. } | Asked::Invalid | Asked::Other => true,
            Asked::Scrub | Asked::Grow { .. } | Asked::Attach { .. } | Asked::Detach { .. } | Asked::Stop => false,
        });
        let copying = |work: &Work| matches!(work.kind, Kind::CopyRead | Kind::CopyWrite | Kind::NextData);
        let dirty = |region| {
            let region = BlockRange::new(region * REGION_BLOCKS, (region + 1) * REGION_BLOCKS);
            let written = |work: &Work| match &work.op {
                Op::Leg(LegOp::Write { range, buffer: Buffer::Request { tag, .. }, .. }) => {
                    range.overlaps(region) && self.asked.contains_key(tag)
                }
                _ => false,
            };
            self.work.values().any(written)
        };
        let regions = range.start / REGION_BLOCKS..range.end.div_ceil(REGION_BLOCKS);
        plain && room && free && !self.work.values().any(copying) && regions.into_iter().all(dirty)
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
        let listed = self.listed().range(range.start..range.end).copied().collect();
        self.submit(Asked::Read { range, floor, listed }, vec![u64::MAX; range.len() as usize], Request::Read(range));
    }

    fn flush(&mut self) {
        self.make_room();
        self.count("flush");
        // Not what was behind in a crash, until the legs are equal.
        let covered = self.history.to_flush().into_iter().filter(|covered| !self.was_behind.contains(covered)).collect();
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
        let paused: u64 = self.pauses.range(work.since..).map(|(_, millis)| millis).sum();
        let late = work.disk.is_some() && work.since.plus_millis(Limits::default().leg_deadline_millis + paused) <= self.now;
        // The deadline changes the state: what hung is counted where it was begun.
        let cell = if late { (work.begun_in, work.kind, End::Late) } else { (State::of(&self.status), work.kind, end) };
        *self.coverage.cells.entry(cell).or_default() += 1;
        if let (Op::Leg(LegOp::Read { range, .. }), Kind::CopyRead) = (&work.op, work.kind) {
            for block in range.start..range.end {
                match end {
                    End::Error | End::Gone => {
                        let times = self.unreadable.entry(block).or_default();
                        *times = times.saturating_add(1);
                    }
                    End::Done => drop(self.unreadable.remove(&block)),
                    _ => {}
                }
            }
        }
        if let (Op::Leg(LegOp::Read { range, .. }), Outcome::Failed(_)) = (&work.op, outcome) {
            self.copies_may_wait = true;
            if self.may_differ && work.disk.is_none_or(|(disk, _)| self.pin.is_none_or(|pin| self.place[pin.index()] == Some(disk))) {
                // The only copy that was read from is lost here: the other may be older.
                let lost = Some(*range);
                self.lose_blocks(lost);
            }
        }
        if let (Op::Leg(LegOp::Write { range, .. }), Kind::CopyWrite) = (&work.op, work.kind)
            && let Some((disk, _)) = work.disk
            && self.may_differ
            && self.pin.is_some_and(|pin| self.place[pin.index()] == Some(disk))
        {
            // What could not be read from the pinned leg comes from the other one: until it has landed readers had what the pinned one held.
            let lost = Some(*range);
            self.lose_blocks(lost);
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
        if let Some(next) = self.mirror.as_ref().and_then(Mirror::next_deadline).filter(|next| *next <= self.now) {
            self.breaks("bounds", format!("it was woken at {:?} and is to be woken at {next:?}", self.now));
        }
        true
    }

    /// The process stands still, and the clock goes on: a tick comes late, before what was done meanwhile is reported. The deadline of
    /// 30 s is in running time (mirror rule 27), and nothing that a disk which is not frozen was asked runs so long.
    fn pause(&mut self, seconds: u64) {
        *self.coverage.others.entry("pauses").or_default() += 1;
        // What hung for long may be late whether the process stands still or not.
        let hung = self.work.values().any(|work| work.disk.is_some() && work.since.plus_millis(10_000) <= self.now);
        *self.pauses.entry(self.now).or_default() += seconds * 1000;
        self.now = self.now.plus_millis(seconds * 1000);
        let before = self.status.legs;
        self.handle(Event::Tick);
        let frozen = self.place.iter().flatten().any(|disk| self.disks[*disk].trouble.frozen);
        if !frozen && !hung && self.status.legs != before {
            self.breaks("availability", format!("the process stood still for {seconds} s and a leg went out"));
        }
    }
}
