//! What a read may return: linearizability block by block, and what must survive.
//!
//! Overlapping writes take effect in the order of their submission (mirror rule 4), so the writes of one block are a line of *versions*. A
//! read returns a version that is not older than its floor: the newest one that was answered, or returned by a read that had
//! ended, before the read was submitted. A write that was not answered, or answered with an error, or answered and then not flushed before a
//! power cut, may have happened or not; but once a read has returned an older version, it never happened.
//!
//! Crashes: a kill loses no answered write. A power cut loses none that a flush or FUA answered; each block is then a version that is not older.
//!
//! The one exception (mirror rule 21): while the legs may differ after an unclean stop, and the leg that reads are pinned to is lost (or a
//! block of it), what was never answered *or not flushed before a power cut* may change, once. The caller says when: `exception`. A crash of a
//! mirror that gave up is such a moment: a leg was lost and nobody could record it, so the next start may count it again, and read it.
//!
//! Write-behind (mirror rule 32), where the operator asked for it: what was answered by one leg alone, and not flushed, is lost with that leg
//! and the process together: `behind_lost`.

use std::collections::BTreeMap;

use lockstep_core::units::BlockRange;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Pending,
    Answered,
    /// It may have happened; known to be over since this moment.
    Maybe(u64),
}

#[derive(Clone, Copy, Debug)]
struct Version {
    id: u64,
    value: u64,
    state: State,
    /// A read that came after it returned something older.
    never: bool,
}

#[derive(Clone, Debug)]
struct Block {
    versions: Vec<Version>,
    /// Answered, by id.
    answered: u64,
    /// Answered and flushed.
    flushed: u64,
    /// What a read that is submitted now may return at the oldest.
    floor: u64,
    /// At this moment, what was answered went back to this version (mirror rule 32).
    back: Option<(u64, u64)>,
}

impl Block {
    fn new() -> Self {
        let first = Version { id: 0, value: 0, state: State::Answered, never: false };
        Self { versions: vec![first], answered: 0, flushed: 0, floor: 0, back: None }
    }
}

/// What a read must not be older than.
#[derive(Clone, Debug)]
pub struct Floor {
    /// By block: without and with the exception of rule 21.
    blocks: Vec<(u64, u64)>,
    moment: u64,
    exceptions: u64,
}

/// What a flush makes durable when it is answered: blocks and versions.
pub type Covered = Vec<(u64, u64)>;

/// Everything that was asked and answered.
#[derive(Clone, Debug, Default)]
pub struct History {
    blocks: BTreeMap<u64, Block>,
    versions: u64,
    moment: u64,
    exceptions: u64,
    /// A leg was missing since the last crash: what it alone held durably may be gone after a power cut.
    leg_missed: bool,
}

impl History {
    /// A write, or a zero, was submitted. Its id, which is also the content that a write brings.
    pub fn written(&mut self, range: BlockRange, zero: bool) -> u64 {
        self.versions += 1;
        let id = self.versions;
        for block in range.start..range.end {
            let value = if zero { 0 } else { id };
            self.blocks.entry(block).or_insert_with(Block::new).versions.push(Version { id, value, state: State::Pending, never: false });
        }
        id
    }

    /// A write was answered.
    pub fn answered(&mut self, id: u64, range: BlockRange, ok: bool, fua: bool) {
        self.moment += 1;
        for block in range.start..range.end {
            let Some(block) = self.blocks.get_mut(&block) else { continue };
            if let Some(version) = block.versions.iter_mut().rev().find(|version| version.id == id) {
                version.state = if ok { State::Answered } else { State::Maybe(self.moment) };
            }
            if ok {
                block.answered = block.answered.max(id);
                block.floor = block.floor.max(id);
                if fua {
                    block.flushed = block.flushed.max(id);
                }
            }
        }
    }

    /// A flush was submitted: what it covers.
    pub fn to_flush(&self) -> Covered {
        let unflushed = self.blocks.iter().filter(|(_, state)| state.answered > state.flushed);
        unflushed.map(|(block, state)| (*block, state.answered)).collect()
    }

    /// That flush was answered with success.
    pub fn flushed(&mut self, covered: &Covered) {
        for (block, id) in covered {
            if let Some(block) = self.blocks.get_mut(block) {
                block.flushed = block.flushed.max(*id);
            }
        }
    }

    /// Whether a disk that holds `value` holds the version `id` of a block, or a newer one.
    pub fn is_at_least(&self, block: u64, value: u64, id: u64) -> bool {
        self.blocks.get(&block).is_some_and(|state| state.versions.iter().any(|version| version.id >= id && version.value == value))
    }

    /// A read was submitted.
    pub fn floor(&self, range: BlockRange) -> Floor {
        let floor = |block: u64| self.blocks.get(&block).map_or((0, 0), |state| (state.floor, state.answered.max(state.flushed)));
        Floor { blocks: (range.start..range.end).map(floor).collect(), moment: self.moment, exceptions: self.exceptions }
    }

    /// It was answered with these values.
    pub fn read(&mut self, range: BlockRange, floor: &Floor, values: &[u64]) -> Result<(), String> {
        for (i, block) in (range.start..range.end).enumerate() {
            let (strict, lenient) = floor.blocks[i];
            let back = self.blocks.get(&block).and_then(|block| block.back).filter(|(moment, _)| *moment > floor.moment);
            let lenient = back.map_or(lenient, |(_, version)| lenient.min(version));
            let least = if self.exceptions == floor.exceptions { strict } else { lenient };
            let value = values.get(i).copied().unwrap_or(u64::MAX);
            let Some(state) = self.blocks.get_mut(&block) else {
                if value != 0 {
                    return Err(format!("block {block} was never written and read {value}"));
                }
                continue;
            };
            // Zeroes do not say whose they are: the oldest that it may be for the floor, the newest for what never happened.
            // What was read before an exception may be answered after what was read behind it.
            let across = self.exceptions != floor.exceptions;
            let may = |version: &&Version| version.value == value && version.id >= least && (across || !version.never);
            let Some(oldest) = state.versions.iter().find(may).map(|version| version.id) else {
                let known: Vec<_> = state.versions.iter().rev().take(6).map(|v| (v.id, v.value, v.state, v.never)).collect();
                return Err(format!("block {block} read {value}, but nothing older than version {least} may be read; newest: {known:?}"));
            };
            if across {
                continue; // it may have been read before the exception
            }
            let newest = state.versions.iter().rev().find(may).map_or(oldest, |version| version.id);
            state.floor = state.floor.max(oldest);
            for version in state.versions.iter_mut().filter(|version| version.id > newest) {
                version.never |= matches!(version.state, State::Maybe(since) if since <= floor.moment);
            }
        }
        Ok(())
    }

    /// The process is gone; the disks go on.
    pub fn killed(&mut self) {
        self.moment += 1;
        for version in self.blocks.values_mut().flat_map(|block| &mut block.versions) {
            if version.state == State::Pending {
                version.state = State::Maybe(self.moment);
            }
        }
    }

    /// The machine is gone, and what the disks had not made durable.
    pub fn power_cut(&mut self) {
        self.killed();
        for block in self.blocks.values_mut() {
            block.answered = block.flushed;
            block.floor = block.flushed;
            for version in block.versions.iter_mut().filter(|version| version.id > block.flushed) {
                version.state = State::Maybe(self.moment);
                version.never &= !self.leg_missed;
            }
        }
        self.leg_missed = false;
    }

    /// Not both legs count.
    pub fn leg_missed(&mut self) {
        self.leg_missed = true;
    }

    /// The one exception of mirror rule 21, for these blocks (`None`: all).
    pub fn exception(&mut self, range: Option<BlockRange>) {
        self.exceptions += 1;
        let range = range.unwrap_or(BlockRange::new(0, u64::MAX));
        for (_, block) in self.blocks.range_mut(range.start..range.end) {
            block.floor = block.answered.max(block.flushed);
            block.versions.iter_mut().for_each(|version| version.never = false);
        }
    }

    /// These blocks of these writes were answered by one leg, and it is lost before they came to the other one (mirror rule 32).
    pub fn behind_lost(&mut self, behind: &Covered) {
        self.moment += 1;
        for (block, id) in behind {
            let Some(block) = self.blocks.get_mut(block).filter(|block| block.answered == *id) else { continue };
            let (older, newer): (Vec<_>, Vec<_>) = block.versions.iter_mut().partition(|version| version.id < *id);
            block.answered = older.iter().filter(|version| version.state == State::Answered).map(|version| version.id).max().unwrap_or(0);
            block.back = Some((self.moment, block.answered.max(block.flushed)));
            newer
                .into_iter()
                .filter(|version| version.state == State::Answered)
                .for_each(|version| version.state = State::Maybe(self.moment));
        }
    }

    /// Every block that was ever written.
    pub fn blocks(&self) -> Vec<u64> {
        self.blocks.keys().copied().collect()
    }
}
