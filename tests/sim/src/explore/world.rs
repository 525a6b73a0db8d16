//! One state, and what can happen to it: the mirror, the work it asked for, the disks, the client.

use lockstep_core::{
    Mirror,
    format::{self, Summary},
    io::{Effects, Event as CoreEvent, Fill, Outcome, Request},
    status::{LegState, Sync},
    units::{Errno, Instant, LegId, Slot, Tag},
};

use super::{
    Broken,
    client::{Ask, Client, Progress},
    disks::{BLOCKS, Leg, LegImage, PAGES, PageId, Pages, Token},
    scenarios::{LIMITS, Scenario},
    shell::{Memory, Op, Work},
};

/// What the mirror wants a tick for within this time is `Event::Tick`; what is later is a leg's deadline.
const SOON: u64 = 10_000_000_000;
/// Ticks of a hundredth of the deadline or more, after which a hung leg must be OUT.
const PATIENCE: u32 = 100;

/// How an operation that fails leaves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// As it was.
    Old,
    /// As it was to become.
    New,
    /// Metadata: neither.
    Torn,
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The client submits the request with this number.
    Submit(usize),
    /// The outstanding work with this number is done.
    Done(usize),
    /// It fails. The first of these is the fault; whatever else its leg has outstanding may fail then.
    Fail(usize, Left),
    /// A moment's fault of the host, not of the leg: the fault, unless the leg has failed before.
    Again(usize),
    /// The time comes that the mirror waits for.
    Tick,
    /// This leg, which is OUT, is attached again as the mirror says that it may.
    Return(Slot),
    /// What this leg has outstanding, alone, does not end before its deadline: the fault.
    Hang(Slot),
}

/// What a crash may leave, place by place.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Remains {
    /// By leg and block, after a power cut: sets of tokens.
    pub cut: [[u8; BLOCKS]; 2],
    /// The same after the process was killed and the disks went on.
    pub killed: [[u8; BLOCKS]; 2],
    /// By leg and page of its metadata: the page as it is, and what a write in flight may make of it.
    pub meta: [[Vec<PageId>; PAGES]; 2],
    /// By page of the witness.
    pub witness: [Vec<PageId>; 2],
}

/// One state.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub(super) mirror: Mirror,
    pub(super) now: u64,
    pub(super) work: Vec<Work>,
    /// By slot.
    pub legs: [Option<Leg>; 2],
    pub(super) witness: [PageId; 2],
    /// The content of the mirror's own buffers.
    pub(super) copies: [Vec<Token>; lockstep_core::COPY_WINDOW as usize],
    pub(super) memory: Vec<Memory>,
    pub(super) memories: u32,
    /// What was asked and answered.
    pub client: Client,
    faults: u8,
    /// The leg that had the fault, until it is attached again.
    failed: Option<Slot>,
    ticks: u8,
    returns: u8,
    /// Legs that were not there at the start.
    away: [Option<LegImage>; 2],
    /// Legs that failed and are not durably OUT.
    pub(super) leaving: [bool; 2],
    /// What the reads with tags of their own were answered.
    pub probed: Vec<(Tag, Vec<Token>)>,
}

const OPERATOR: Tag = Tag(PROBES * 10);
/// A new empty leg's name.
const SPARE: LegId = LegId([3; 16]);
/// Tags of requests that are not of the scenario begin here.
pub const PROBES: u64 = 100;

impl World {
    /// A world around a mirror that was just assembled, and its first effects.
    pub fn new(
        scenario: &Scenario,
        mirror: Mirror,
        legs: [Option<Leg>; 2],
        witness: [PageId; 2],
        out: Effects,
        pages: &mut Pages,
    ) -> Result<Self, Broken> {
        let mut world = Self {
            mirror,
            now: 0,
            work: Vec::new(),
            legs,
            witness,
            copies: Default::default(),
            memory: Vec::new(),
            memories: 0,
            client: Client::new(&scenario.asks),
            faults: u8::from(scenario.fail || scenario.hang || scenario.again),
            failed: None,
            ticks: scenario.ticks,
            returns: u8::from(scenario.returns),
            away: [None; 2],
            leaving: [false; 2],
            probed: Vec::new(),
        };
        world.perform(scenario, out, pages)?;
        Ok(world)
    }

    /// The mirror.
    pub fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    /// What can happen now.
    pub fn events(&self, scenario: &Scenario, events: &mut Vec<Event>) {
        events.clear();
        let asks = &scenario.asks;
        events.extend((0..asks.len()).filter(|index| self.client.may_submit(asks, *index)).map(Event::Submit));
        events.extend((0..self.work.len()).map(Event::Done));
        if self.ticks > 0 && self.mirror.next_deadline().is_some_and(|at| at.0 <= self.now + SOON) {
            events.push(Event::Tick);
        }
        if self.returns > 0 {
            let out = |slot: &Slot| self.mirror.status().legs[slot.index()].state == LegState::Out && !self.leaving[slot.index()];
            // Not while anything that was ever asked of it is outstanding (mirror rule 25).
            let free = |slot: &Slot| self.work.iter().all(|work| work.slot != Some(*slot));
            events.extend(Slot::BOTH.into_iter().filter(|slot| out(slot) && free(slot)).map(Event::Return));
        }
        let lost = self.lost();
        for (index, work) in self.work.iter().enumerate().filter(|(_, work)| work.slot.is_some()) {
            // What a lost leg is still asked for fails in one way: nothing counts on it, but nothing may be reissued to it either.
            if self.faults > 0 && scenario.again || work.slot == lost {
                events.push(Event::Again(index));
            }
            if scenario.fail && (self.faults > 0 || work.slot == self.failed && work.slot != lost) {
                events.push(Event::Fail(index, Left::Old));
            }
            match work.op {
                _ if self.faults == 0 || !scenario.fail => {}
                Op::Write { .. } | Op::Zero(_) => events.push(Event::Fail(index, Left::New)),
                Op::Page(..) => events.extend([Event::Fail(index, Left::New), Event::Fail(index, Left::Torn)]),
                _ => {}
            }
        }
        if let Some(slot) = self.alone_on().filter(|slot| scenario.hang && (self.faults > 0 || self.awaited_of(*slot))) {
            events.push(Event::Hang(slot));
        }
    }

    /// The only leg that has anything outstanding, while nothing else is.
    fn alone_on(&self) -> Option<Slot> {
        let slot = self.work.first()?.slot?;
        self.work.iter().all(|work| work.slot == Some(slot)).then_some(slot)
    }

    /// The leg that failed, if the mirror does without it.
    fn lost(&self) -> Option<Slot> {
        self.failed.filter(|slot| self.mirror.status().legs[slot.index()].state == LegState::Out)
    }

    /// Whether a leg is lost, not durably OUT, and has a superblock outstanding that may say that it counts: that has until its deadline.
    fn awaited_of(&self, slot: Slot) -> bool {
        self.leaving[slot.index()]
            && self.lost() == Some(slot)
            && self.work.iter().any(|work| work.slot == Some(slot) && matches!(work.op, Op::Page(0..2, _)))
    }

    /// What every disk that is there holds, if that is one thing.
    pub fn same(&self, block: usize) -> Option<Token> {
        let mut held = self.legs.iter().flatten().map(|leg| leg.read(block));
        let first = held.next()?;
        held.all(|other| other == first).then_some(first)
    }

    /// Whether nothing is outstanding that anybody may wait for: not what a lost leg has, which may hang for ever.
    pub fn quiet(&self) -> bool {
        let lost = self.lost();
        self.work.iter().all(|work| work.slot.is_some() && work.slot == lost) && !lost.is_some_and(|slot| self.awaited_of(slot))
    }

    /// It happens.
    pub fn happens(&mut self, scenario: &Scenario, event: Event, pages: &mut Pages) -> Result<(), Broken> {
        match event {
            Event::Submit(index) => {
                let ask = scenario.asks[index];
                self.client.submitted(&scenario.asks, index);
                self.submit(scenario, Ask::tag(index), ask, pages)
            }
            Event::Done(index) => self.done(scenario, index, pages),
            Event::Fail(index, left) => {
                self.faults = 0;
                self.failed = self.work[index].slot;
                self.fail(scenario, index, left, Errno::EIO, pages)
            }
            Event::Again(index) => {
                self.faults = 0;
                self.fail(scenario, index, Left::Old, Errno::EAGAIN, pages)
            }
            Event::Tick => {
                self.ticks -= 1;
                let at = self.mirror.next_deadline().map_or(self.now, |at| at.0);
                self.tick(scenario, at, pages)
            }
            Event::Return(slot) => {
                self.returns -= 1;
                self.failed = None;
                self.come_back(scenario, slot, pages)
            }
            Event::Hang(slot) => {
                self.faults = 0;
                self.hang(scenario, slot, pages)
            }
        }
    }

    pub(super) fn handle(&mut self, scenario: &Scenario, event: CoreEvent, pages: &mut Pages) -> Result<(), Broken> {
        let mut out = Effects::new();
        self.mirror.handle(Instant(self.now), event, &mut out);
        self.perform(scenario, out, pages)
    }

    /// A request, of the scenario or with a tag of its own.
    pub fn submit(&mut self, scenario: &Scenario, tag: Tag, ask: Ask, pages: &mut Pages) -> Result<(), Broken> {
        let request = ask.request(scenario.base);
        if matches!(ask, Ask::Read { .. }) {
            self.memories += 1;
            self.memory.push(Memory { tag, memory: self.memories, content: vec![Token::MAX] });
        }
        self.handle(scenario, CoreEvent::Submit { tag, request }, pages)
    }

    fn come_back(&mut self, scenario: &Scenario, slot: Slot, pages: &mut Pages) -> Result<(), Broken> {
        let meta = pages.meta(self.leg(slot)?.meta);
        let Some((place, fill)) = self.mirror.readmission(&meta) else {
            return Err(Broken::new("a leg returns", format!("there is no place for {slot:?}, which is OUT")));
        };
        let summary = format::peek(&meta).map_err(|error| Broken::new("a leg returns", error.to_string()))?;
        self.attach(scenario, place, &summary, fill, pages)
    }

    /// A leg is attached: the one that is there, or a new one in its place.
    pub fn attach(&mut self, scenario: &Scenario, slot: Slot, found: &Summary, fill: Fill, pages: &mut Pages) -> Result<(), Broken> {
        let (leg, newest) = match fill {
            Fill::DirtyRegions => (found.leg, found.newest),
            Fill::Everything => {
                self.legs[slot.index()] = Some(Leg::new(pages.spare(SPARE, scenario.blocks())));
                (SPARE, 0)
            }
        };
        let request = Request::Attach { slot, leg, fill, newest };
        self.handle(scenario, CoreEvent::Submit { tag: OPERATOR, request }, pages)
    }

    fn tick(&mut self, scenario: &Scenario, at: u64, pages: &mut Pages) -> Result<(), Broken> {
        self.now = self.now.max(at);
        self.handle(scenario, CoreEvent::Tick, pages)
    }

    /// Time passes until the mirror goes on without a silent leg. What is begun on the other one before that ends at once.
    fn hang(&mut self, scenario: &Scenario, slot: Slot, pages: &mut Pages) -> Result<(), Broken> {
        let known = self.lost() == Some(slot);
        self.failed = Some(slot);
        for _ in 0..PATIENCE {
            self.tick(scenario, self.now + LIMITS.leg_deadline_millis * 1_000_000 / 30 + 1, pages)?;
            let goes_on = self.alone_on().is_none();
            if self.lost().is_some() && (goes_on || !known) {
                return Ok(());
            }
            while let Some(index) = self.work.iter().position(|work| work.slot != Some(slot)) {
                self.done(scenario, index, pages)?;
            }
        }
        Err(Broken::new("no request waits for a hung leg", format!("{slot:?} is waited for long after its deadline")))
    }

    /// Does the work with this number, and reports it.
    pub fn done(&mut self, scenario: &Scenario, index: usize, pages: &mut Pages) -> Result<(), Broken> {
        let Work { io, slot, op } = self.work.remove(index);
        let outcome = match slot {
            Some(slot) => self.execute(scenario, slot, &op)?,
            None => {
                if let Op::Page(at, page) = op {
                    self.witness[at] = page;
                }
                Outcome::Done(0)
            }
        };
        self.handle(scenario, CoreEvent::Done { io, outcome }, pages)
    }

    /// The work with this number that is a read of the client's, if there is one.
    pub fn reading(&self, tag: Tag) -> Option<usize> {
        self.work.iter().position(|work| work.op.memory().is_some_and(|(theirs, _)| theirs == tag))
    }

    /// Whether nothing is outstanding.
    pub fn idle(&self) -> bool {
        self.work.is_empty()
    }

    /// What must hold when nothing is outstanding that anybody may wait for.
    pub fn check_quiet(&self, scenario: &Scenario) -> Result<(), Broken> {
        for (index, progress) in self.client.progress.iter().enumerate() {
            if !matches!(progress, Progress::Planned | Progress::Released) {
                let text = format!("nothing is under way, and {} is {progress:?}", scenario.asks[index]);
                return Err(Broken::new("every request ends", text));
            }
        }
        if let Some(slot) = Slot::BOTH.into_iter().find(|slot| self.leaving[slot.index()]) {
            return Err(Broken::new("a failed leg is durably OUT", format!("nothing is under way, and {slot:?} is not")));
        }
        let status = self.mirror.status();
        if status.pending > 0 || !status.ready || status.sync != Sync::Idle {
            return Err(Broken::new("every request ends", format!("nothing is under way, and the mirror says {status:?}")));
        }
        let all_in = status.legs.iter().all(|leg| leg.state == LegState::In);
        if scenario.returns && self.returns == 0 && self.failed.is_none() && !all_in {
            return Err(Broken::new("a leg returns", format!("nothing is under way, and the mirror says {status:?}")));
        }
        if let (true, [Some(a), Some(b)]) = (all_in, &self.legs)
            && a.content() != b.content()
        {
            let text = format!("{:?} and {:?}", a.content(), b.content());
            return Err(Broken::new("quiescent legs are identical", text));
        }
        Ok(())
    }

    /// What a crash may leave now.
    pub fn remains(&self, scenario: &Scenario, pages: &mut Pages) -> Remains {
        let mut remains = Remains {
            cut: [[1; BLOCKS]; 2],
            killed: [[1; BLOCKS]; 2],
            meta: Default::default(),
            witness: self.witness.map(|page| vec![page]),
        };
        for (slot, leg) in self.legs.iter().enumerate() {
            let Some(leg) = leg else { continue };
            remains.cut[slot] = std::array::from_fn(|block| leg.may_leave(block));
            remains.killed[slot] = leg.content().map(|token| 1 << token);
            remains.meta[slot] = leg.meta.map(|page| vec![page]);
        }
        for work in &self.work {
            let mut landing = |at: u64, token: Token| {
                if let (Some(slot), Some(block)) = (work.slot, at.checked_sub(scenario.base)) {
                    remains.cut[slot.index()][block as usize] |= 1 << token;
                    remains.killed[slot.index()][block as usize] |= 1 << token;
                }
            };
            match &work.op {
                Op::Write { range, data, .. } => (range.start..range.end).zip(data).for_each(|(at, token)| landing(at, *token)),
                Op::Zero(range) => (range.start..range.end).for_each(|at| landing(at, 0)),
                Op::Page(at, new) => {
                    let page = match work.slot {
                        Some(slot) => &mut remains.meta[slot.index()][*at],
                        None => &mut remains.witness[*at],
                    };
                    let torn = pages.torn(*new, page[0]);
                    page.extend([*new, torn]);
                    page.dedup();
                }
                Op::Read { .. } | Op::Flush | Op::NextData(_) => {}
            }
        }
        remains
    }

    /// The work with this number, in words.
    pub fn describe(&self, index: usize) -> String {
        let work = &self.work[index];
        let place = work.slot.map_or("witness".to_owned(), |slot| format!("leg {slot:?}"));
        match &work.op {
            Op::Page(at, _) if work.slot.is_none() => format!("{place}: slot {at}"),
            Op::Page(at @ 0..2, _) => format!("{place}: superblock, slot {at}"),
            Op::Page(at, _) => format!("{place}: {}, slot {}", if *at < 4 { "bad blocks" } else { "bitmap" }, at % 2),
            Op::Write { range, data, fua } => format!("{place}: write {range:?} of {data:?}{}", if *fua { " FUA" } else { "" }),
            Op::Read { range, .. } => format!("{place}: read {range:?}"),
            Op::Zero(range) => format!("{place}: zero {range:?}"),
            Op::NextData(range) => format!("{place}: seek in {range:?}"),
            Op::Flush => format!("{place}: flush"),
        }
    }
}
