//! What a run does: a list of actions, made from the seed before it starts. Every action brings its own randomness, so that those that are
//! left when others are dropped do the same as before, as far as they can.

use lockstep_core::{
    format::REGION_BLOCKS,
    units::{BlockRange, Slot},
};

use crate::world::Rng;

/// Something goes wrong. What the budget does not allow at that moment is passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The disk is gone until it is brought back.
    Gone(Slot),
    /// So many operations fail after doing a part.
    Errors(Slot, u8),
    /// One flush fails.
    FlushError(Slot),
    /// One metadata write fails.
    MetaError(Slot),
    /// So many host faults in a row: more than eight are the leg's fault.
    HostFaults(Slot, u8),
    /// Reads fail there.
    Unreadable(Slot, BlockRange),
    /// Writes fail there.
    Unwritable(Slot, BlockRange),
    /// So many writes find no space, on one leg or on both.
    NoSpace(Option<Slot>, u8),
    /// What is in flight on both legs fails.
    BusReset,
    /// A data write of the only leg that counts fails once.
    LastLeg,
    /// Reads of the only leg that counts fail there.
    LastUnreadable(BlockRange),
    /// The disk does not flush, and is blank after the next power cut.
    Lies(Slot),
    /// It answers nothing for a while.
    Freeze(Slot),
    /// So many witness writes fail.
    WitnessErrors(u8),
    /// From now on one operation in so many ends with a host fault or a short count.
    Flaky(u8),
}

/// Who is there after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crash {
    /// The caches are lost too.
    pub power: bool,
    /// Disks that are not there at first, as bits.
    pub missing: u8,
    /// The witness is lost.
    pub witness_lost: bool,
    /// This disk comes back blank.
    pub blank: Option<Slot>,
    /// Disks both of whose slots of the bitmap page have gone bad, as bits.
    pub bits_damaged: u8,
    /// Both slots of every list of bad blocks have gone bad, until they are put back.
    pub lists_damaged: bool,
}

impl Crash {
    /// Nothing else happens.
    pub(super) const fn plain(power: bool) -> Self {
        Self { power, missing: 0, witness_lost: false, blank: None, bits_damaged: 0, lists_damaged: false }
    }
}

/// One line of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A client's write.
    Write(BlockRange, bool),
    /// A client's read.
    Read(BlockRange),
    /// A client's discard.
    Zero(BlockRange),
    /// A client's flush.
    Flush,
    /// So many pieces of work go on.
    Step(u8),
    /// The clock goes to where the mirror waits for it.
    Tick,
    /// The process stands still for so many seconds.
    Pause(u64),
    /// A client asks for what no volume has.
    Invalid(BlockRange),
    /// Until all is quiet.
    Settle,
    /// Something goes wrong.
    Fault(Fault),
    /// It is over: disks are back and work.
    Heal,
    /// The operator attaches what is there.
    Attach,
    /// The operator takes a leg out.
    Detach(Slot),
    /// The operator says which leg is slow, and whether writes need not wait for it.
    WriteMostly(Option<Slot>, bool),
    /// The legs are compared; the operator believes one of them.
    Scrub(Option<Slot>),
    /// The volume grows by so many blocks.
    Grow(u64),
    /// A clean stop and a new start.
    Stop,
    /// A crash and a new start.
    Crash(Crash),
}

/// An action and its randomness.
pub type Line = (Action, u64);

/// What all of a run has in common.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    /// Of the volume at its start.
    pub blocks: u64,
    /// Requests at once.
    pub depth: u64,
    /// One operation in so many ends with a host fault or a short count; 0: none.
    pub flaky: u64,
    /// One operation in so many is done long before it is reported; 0: none.
    pub early: u64,
    /// Regions that may be dirty at once.
    pub cap: u64,
    /// The operator may call a leg slow; then so many writes may be behind on it, and so many blocks.
    pub behind: Option<(u64, u64)>,
    /// The first blocks of what is written, and how many from there.
    pub hot: [u64; 3],
    /// See `hot`.
    pub width: u64,
    /// For so many lines the client stays at one of the hot places, so that the regions of the others are clean; 0: it does not.
    pub stays: u64,
}

impl Profile {
    /// Most volumes are small and adversarial, one in sixteen has so many regions that a rebuild makes checkpoints.
    pub fn of(seed: u64) -> Self {
        let mut rng = Rng(seed ^ 0x70f1_1e00);
        let (blocks, hot) = match rng.below(16) {
            0 => (70 * 4096 + 64, [0, 33 * 4096 - 3, 68 * 4096 - 3]),
            1..=4 => (64, [0, 8, 56]),
            _ => (2 * 4096 + 64, [0, 4096 - 4, 8192 - 4]),
        };
        Self {
            blocks,
            depth: [1, 3, 8, 32][rng.below(4) as usize],
            flaky: [0, 0, 12, 50][rng.below(4) as usize],
            early: [0, 2, 4][rng.below(3) as usize],
            cap: [1, 2, 3, 256, 256, 256][rng.below(6) as usize],
            behind: [None, None, Some((2, 8)), Some((64, 2048))][rng.below(4) as usize],
            hot,
            width: [2, 6, 24][rng.below(3) as usize].min(64 - 57 + 1),
            stays: [0, 0, 0, 200][rng.below(4) as usize],
        }
    }

    fn range(&self, rng: &mut Rng) -> BlockRange {
        let start = self.hot[rng.below(3) as usize] + rng.below(self.width);
        BlockRange::new(start, (start + 1 + rng.below(self.width.min(8))).min(self.blocks))
    }
}

/// The script of a seed.
pub fn script(seed: u64, profile: &Profile) -> Vec<Line> {
    let mut rng = Rng(seed);
    let lines = 1300 + rng.below(500);
    let at = |line: u64| match line.checked_div(profile.stays) {
        Some(phase) => Profile { hot: [profile.hot[(phase % 3) as usize]; 3], ..*profile },
        None => *profile,
    };
    (0..lines).map(|line| (action(&mut rng, &at(line)), rng.below(u64::MAX))).collect()
}

fn action(rng: &mut Rng, profile: &Profile) -> Action {
    match rng.below(1000) {
        0..=259 => Action::Write(profile.range(rng), rng.once_in(8)),
        260..=409 => Action::Read(profile.range(rng)),
        410..=449 => Action::Zero(profile.range(rng)),
        450..=499 => Action::Flush,
        500..=544 => Action::Tick,
        545..=562 => Action::Settle,
        563..=574 => Action::Fault(fault(rng, profile)),
        575..=584 => Action::Heal,
        585..=604 => Action::Attach,
        605..=606 => Action::Detach(slot(rng)),
        607..=608 => Action::Grow(1 + rng.below(5000)),
        609 => Action::Stop,
        610..=614 => Action::Crash(crash(rng)),
        621..=623 => Action::Scrub(rng.once_in(2).then(|| slot(rng))),
        624..=631 if profile.behind.is_some() => {
            let slow = (rng.below(5) > 0).then(|| slot(rng));
            Action::WriteMostly(slow, rng.below(4) > 0)
        }
        615..=617 => Action::Pause(1 + rng.below(3600)),
        618..=620 => {
            let start = profile.blocks + rng.below(1 << 20);
            let empty = BlockRange::new(profile.hot[0], profile.hot[0]);
            let across = BlockRange::new(profile.blocks - 1, profile.blocks + 3 * REGION_BLOCKS);
            Action::Invalid(
                [empty, across, BlockRange::new(start + 3 * REGION_BLOCKS, start + 3 * REGION_BLOCKS + 4)][rng.below(3) as usize],
            )
        }
        _ => Action::Step(1 + rng.below(8) as u8),
    }
}

fn slot(rng: &mut Rng) -> Slot {
    Slot::BOTH[rng.below(2) as usize]
}

fn fault(rng: &mut Rng, profile: &Profile) -> Fault {
    let slot = slot(rng);
    match rng.below(17) {
        0 | 1 => Fault::Gone(slot),
        2 | 3 => Fault::Errors(slot, 1 + rng.below(3) as u8),
        4 => Fault::FlushError(slot),
        5 => Fault::MetaError(slot),
        6 => Fault::HostFaults(slot, 1 + rng.below(14) as u8),
        7 => Fault::Unreadable(slot, profile.range(rng)),
        8 => Fault::Unwritable(slot, profile.range(rng)),
        9 => Fault::NoSpace((!rng.once_in(3)).then_some(slot), 1 + rng.below(4) as u8),
        10 => Fault::BusReset,
        11 => Fault::LastLeg,
        12 => Fault::Lies(slot),
        13 => Fault::Freeze(slot),
        14 => Fault::LastUnreadable(profile.range(rng)),
        15 => Fault::WitnessErrors(1 + rng.below(9) as u8),
        _ => Fault::Flaky(4 + rng.below(20) as u8),
    }
}

fn crash(rng: &mut Rng) -> Crash {
    Crash {
        power: rng.below(3) > 0,
        missing: if rng.once_in(2) { 0 } else { rng.below(8) as u8 },
        witness_lost: rng.once_in(6),
        blank: rng.once_in(8).then(|| slot(rng)),
        bits_damaged: if rng.once_in(8) { 1 + rng.below(7) as u8 } else { 0 },
        lists_damaged: rng.once_in(16),
    }
}

/// Drops what a failure does not need. `fails` says whether a script still fails in the same way.
pub fn shrink(mut lines: Vec<Line>, mut tries: u32, fails: impl Fn(&[Line]) -> bool) -> Vec<Line> {
    let mut piece = lines.len() / 2;
    while piece > 0 && tries > 0 {
        let (mut at, mut dropped) = (0, false);
        while at < lines.len() && tries > 0 {
            let mut rest = lines.clone();
            rest.drain(at..(at + piece).min(rest.len()));
            tries -= 1;
            if fails(&rest) {
                lines = rest;
                dropped = true;
            } else {
                at += piece;
            }
        }
        if !dropped || piece > 1 {
            piece = if piece == 1 { 0 } else { piece / 2 };
        }
    }
    lines
}
