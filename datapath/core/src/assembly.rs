//! Assembly: from what was found on the disks and in the witness to a running mirror, or a refusal (mirror rules 11, 12, 13, 19).

use alloc::vec::Vec;
use core::fmt;

use crate::{
    bad_blocks::BadBlocks,
    bitmap::Bitmap,
    format::{self, FLAG_FORCED, Superblock},
    io::{Effects, Fill},
    membership::{MemberState, Record, RecordName},
    mirror::{Leg, Mirror, Start, State},
    units::{Epoch, Instant, LegId, Slot, VolumeId},
};

/// What is to be assembled.
#[derive(Clone, Debug)]
pub struct Assembly<'a> {
    /// The volume that the caller wants.
    pub volume: VolumeId,
    /// The `meta` bytes of every leg that was found. Any number, any order.
    pub metas: &'a [&'a [u8]],
    /// The bytes of the witness file, if it is there.
    pub witness: Option<&'a [u8]>,
    /// The epoch that the object's status last saw. It lags, so it may only veto (mirror rule 12).
    pub seen_epoch: Option<Epoch>,
    /// The operator insists on this leg where assembly would be refused. Recorded.
    pub force: Option<LegId>,
    /// 128 random bits: record ids derive from them.
    pub seed: u128,
    /// Now.
    pub now: Instant,
    /// What the mirror bounds itself by.
    pub limits: Limits,
}

/// What a mirror bounds itself by. The defaults are for production; tests make them small.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// A leg that has not reported an I/O for so long, while the loop ran, goes OUT (mirror rule 27).
    pub leg_deadline_millis: u64,
    /// Blocks of the volume that a scrub compares in a second, each on both legs; 0: as fast as the disks are.
    pub scrub_blocks_per_second: u64,
    /// So many regions may be dirty while both legs are IN, or those of one single request if it touches more, and one that a scrub repairs (mirror rule 17). With 256
    /// regions of 16 MiB the worst resync after an unclean stop reads 4 GiB.
    pub dirty_regions: u64,
    /// Writes that may be answered and not yet on a write-mostly leg (mirror rule 32),
    pub behind_writes: u64,
    /// and their blocks in all.
    pub behind_blocks: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { leg_deadline_millis: 30_000, scrub_blocks_per_second: 50_000, dirty_regions: 256, behind_writes: 64, behind_blocks: 2048 }
    }
}

/// A running mirror and where its legs were found.
#[derive(Clone, Debug)]
pub struct Assembled {
    /// The mirror. It serves after `Notice::Assembled`; requests before that wait.
    pub mirror: Mirror,
    /// By slot: the index in `Assembly::metas` of the leg that sits there; `None`: absent or stale.
    pub slots: [Option<usize>; 2],
    /// Stale legs that can come back with `Request::Attach`: index, slot, and how they must be filled. `Fill::Everything`: a new
    /// empty leg (new id) must be made first.
    pub returning: Vec<(usize, Slot, Fill)>,
    /// Legs that no durable record names (mirror rule 13).
    pub foreign: Vec<usize>,
}

/// Why a volume is not assembled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No usable leg was found.
    NoLeg,
    /// The legs that are there are stale, or the newest slot of their `meta` has gone bad, which looks the same.
    Stale(LegId),
    /// Only this leg is there and there is no witness to ask.
    NoWitness(LegId),
    /// Each leg went on without the other.
    SplitBrain(LegId, LegId),
    /// Both copies of this leg's list of bad blocks are damaged, and no other leg that counts has one (mirror rule 22).
    BadBlocksUnknown(LegId),
    /// What was found was written by a newer version.
    TooNew,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoLeg => write!(f, "no readable leg of this volume was found: bring one of its disks back"),
            Self::Stale(leg) => {
                write!(
                    f,
                    "leg {leg} is stale, it missed writes, or its `meta` is damaged: bring the other leg's disk back, or force this one and lose \
                     them"
                )
            }
            Self::NoWitness(leg) => {
                write!(f, "only leg {leg} is there and the witness is lost: bring the other disk back, or force this one")
            }
            Self::SplitBrain(a, b) => write!(f, "legs {a} and {b} each went on without the other: force the one to keep"),
            Self::BadBlocksUnknown(leg) => write!(
                f,
                "leg {leg} does not say any more which blocks are lost: bring the other leg's disk back, or force this one and read there \
                 what it holds"
            ),
            Self::TooNew => write!(f, "a leg was written by a newer version of Lockstep: upgrade csi-node"),
        }
    }
}

impl core::error::Error for Refusal {}

struct Found {
    index: usize,
    superblock: Superblock,
    slot: u8,
}

/// Assembles. `out` gets the first effects.
pub fn assemble(assembly: &Assembly<'_>, out: &mut Effects) -> Result<Assembled, Refusal> {
    let mut found = Vec::new();
    let mut foreign = Vec::new();
    for (index, meta) in assembly.metas.iter().enumerate() {
        match format::superblock(meta) {
            Ok((superblock, slot)) if superblock.volume == assembly.volume => found.push(Found { index, superblock, slot }),
            Err(format::MetaError::TooNew) => return Err(Refusal::TooNew),
            Ok(_) | Err(format::MetaError::Damaged) => foreign.push(index),
        }
    }
    let witness = match assembly.witness.map(format::witness) {
        Some(Ok((witness, slot))) if witness.volume == assembly.volume => Some((witness, slot)),
        Some(Err(format::MetaError::TooNew)) => return Err(Refusal::TooNew),
        _ => None,
    };
    let doubtful = assembly.witness.is_some_and(format::witness_is_doubtful);
    let decided = decide(&found, witness.map(|(witness, _)| (witness.record, doubtful)), assembly.seen_epoch);
    let (record, flags) = match (decided, assembly.force) {
        (Ok(record), _) => (record, 0),
        (Err(refusal), None) => return Err(refusal),
        (Err(refusal), Some(leg)) => (forced(&found, leg).ok_or(refusal)?, FLAG_FORCED),
    };

    let at = |leg: LegId| found.iter().find(|found| found.superblock.leg == leg);
    let mut slots = [None; 2];
    let mut returning = Vec::new();
    let mut legs = Vec::new();
    for slot in Slot::BOTH {
        let member = record.members[slot.index()];
        let here = at(member.leg);
        let state = match (member.state, here) {
            (MemberState::In, Some(here)) if is_current(&record, here, flags) => State::In,
            (MemberState::Recovering(fill), Some(_)) => State::Recovering(fill),
            (MemberState::In, _) => State::Leaving,
            (MemberState::Recovering(_), None) => State::Dropping,
            (MemberState::Out | MemberState::OutUnfilled, _) => State::Out,
        };
        if let Some(here) = here {
            if matches!(state, State::In | State::Recovering(_)) {
                slots[slot.index()] = Some(here.index);
            } else {
                let fill = if state == State::Out { record.readmission(slot, here.superblock.record.name) } else { Fill::Everything };
                returning.push((here.index, slot, fill));
            }
        }
        legs.push(Leg {
            id: member.leg,
            state,
            seen: here.map_or(record.name, |here| here.superblock.record.name),
            superblock_slot: here.map_or(0, |here| here.slot),
            reads: 0,
            read_end: 0,
            repairs: 0,
        });
    }
    foreign.extend(found.iter().filter(|found| record.slot_of(found.superblock.leg).is_none()).map(|found| found.index));
    let [a, b]: [Leg; 2] = legs.try_into().unwrap_or_else(|_| unreachable!("one leg a slot"));
    let legs = [a, b];

    let counted = || Slot::BOTH.into_iter().filter(|slot| legs[slot.index()].state == State::In);
    let superblocks: Vec<&Superblock> = counted().filter_map(|slot| at(legs[slot.index()].id)).map(|found| &found.superblock).collect();
    // A size that only one leg knows was never published (mirror rule 31).
    let blocks = superblocks.iter().map(|superblock| superblock.blocks).min().ok_or(Refusal::NoLeg)?;
    let metas: Vec<(Slot, &[u8])> = Slot::BOTH.into_iter().filter_map(|slot| Some((slot, assembly.metas[slots[slot.index()]?]))).collect();
    let bitmap = bitmap(assembly.volume, blocks, &metas, &legs);
    let (bad_blocks, flags) = match bad_blocks(assembly.volume, blocks, &metas, &legs) {
        (bad_blocks, true) => (bad_blocks, flags),
        (bad_blocks, false) => {
            let counted = counted().map(|slot| legs[slot.index()].id).next().ok_or(Refusal::NoLeg)?;
            if assembly.force.is_none_or(|leg| legs.iter().all(|other| other.id != leg)) {
                return Err(Refusal::BadBlocksUnknown(counted));
            }
            (bad_blocks, FLAG_FORCED)
        }
    };

    let everyone = || found.iter().map(|found| &found.superblock).chain(witness.as_ref().map(|(witness, _)| witness));
    let start = Start {
        volume: assembly.volume,
        blocks,
        flags: flags | superblocks.iter().fold(0, |flags, superblock| flags | superblock.flags),
        compat: superblocks.iter().fold(0, |compat, superblock| compat | superblock.compat),
        checkpoint: superblocks.iter().map(|superblock| superblock.checkpoint).min().unwrap_or(0),
        max_epoch: everyone().map(|superblock| superblock.record.name.epoch).max().unwrap_or_default(),
        sequence: everyone().map(|superblock| superblock.sequence).max().unwrap_or_default(),
        witness_slot: witness.map_or(0, |(_, slot)| slot),
        legs,
        record,
        bitmap,
        bad_blocks,
        seed: assembly.seed,
        now: assembly.now,
        limits: assembly.limits,
    };
    Ok(Assembled { mirror: Mirror::start(start, out), slots, returning, foreign })
}

/// A leg that the record counts must hold it, or something newer that has acked nothing. An older one is a copy from the past.
fn is_current(record: &Record, found: &Found, flags: u64) -> bool {
    let theirs = found.superblock.record.name;
    theirs == record.name || theirs.epoch > record.name.epoch || flags & FLAG_FORCED != 0
}

/// The record that says who counts (mirror rules 11 and 12).
fn decide(found: &[Found], witness: Option<(Record, bool)>, seen_epoch: Option<Epoch>) -> Result<Record, Refusal> {
    let newest = found.iter().max_by_key(|found| found.superblock.record.name.epoch).ok_or(Refusal::NoLeg)?;
    let record = match witness {
        Some((record, false)) => record,
        Some((record, true)) => beside_damage(found, newest, record)?,
        None => without_witness(found, newest)?,
    };
    let present = |slot: Slot| {
        let member = record.members[slot.index()];
        member.state == MemberState::In && found.iter().any(|found| found.superblock.leg == member.leg && is_current(&record, found, 0))
    };
    let vetoed = seen_epoch.is_some_and(|seen| seen > record.name.epoch);
    if vetoed || !Slot::BOTH.into_iter().any(present) {
        return Err(Refusal::Stale(newest.superblock.leg));
    }
    Ok(record)
}

/// One slot of the witness is damaged, the other says `record`. If the damaged one was torn, what it said has acked nothing; if it has gone bad
/// since, it may be what decides. A record comes to the legs that it counts before it comes to the witness: so if it was newer than
/// `record`, such a leg has it or a newer one, and is asked. Nobody is asked who may be left behind by a leg that is not there.
fn beside_damage(found: &[Found], newest: &Found, record: Record) -> Result<Record, Refusal> {
    let at = |leg: LegId| found.iter().find(|found| found.superblock.leg == leg);
    if newest.superblock.record.name.epoch <= record.name.epoch {
        let all = record.members.iter().all(|member| member.state != MemberState::In || at(member.leg).is_some());
        return if all { Ok(record) } else { Err(Refusal::NoWitness(newest.superblock.leg)) };
    }
    let counts = |record: &Record, leg: LegId| record.members.iter().any(|member| member.leg == leg && member.state == MemberState::In);
    match without_witness(found, newest) {
        Err(Refusal::NoWitness(leg)) if counts(&record, leg) => Ok(newest.superblock.record),
        // Whoever made the later of two records that do not know of each other did so without the other leg, or would have known of its
        // record, and that one had not come to the witness. If neither leaves the other out, both are of starts that came to nothing.
        Err(Refusal::SplitBrain(a, b)) => {
            let leaves_out = |leg: LegId, other: LegId| {
                at(leg).map(|found| found.superblock.record).filter(|theirs| counts(theirs, leg) && !counts(theirs, other))
            };
            match (leaves_out(a, b), leaves_out(b, a)) {
                (Some(_), Some(_)) => Err(Refusal::SplitBrain(a, b)),
                (Some(theirs), None) | (None, Some(theirs)) => Ok(theirs),
                (None, None) => Ok(record),
            }
        }
        decided => decided,
    }
}

fn without_witness(found: &[Found], newest: &Found) -> Result<Record, Refusal> {
    let record = newest.superblock.record;
    let own = record.slot_of(newest.superblock.leg).ok_or(Refusal::NoLeg)?;
    let other = record.members[own.other().index()].leg;
    let Some(other) = found.iter().find(|found| found.superblock.leg == other) else {
        return Err(Refusal::NoWitness(newest.superblock.leg));
    };
    let theirs = other.superblock.record.name;
    // A leg that is not IN by its own word has not gone on alone: an empty one that is being attached knows of no record.
    let counted = other.superblock.record.members.iter().any(|m| m.leg == other.superblock.leg && m.state == MemberState::In);
    let apart = theirs.epoch == record.name.epoch && theirs != record.name || !record.follows(own.other(), theirs);
    if counted && apart {
        return Err(Refusal::SplitBrain(newest.superblock.leg, other.superblock.leg));
    }
    // Both are there, so nobody can know more. An older leg that the newer record counts has missed nothing that was acked: the
    // record went to the legs before it counted. It is made current by the record that assembly writes.
    let mut record = record;
    for member in &mut record.members {
        if member.leg == other.superblock.leg && member.state == MemberState::In && theirs != record.name {
            record.name = RecordName { ..theirs };
        }
    }
    Ok(record)
}

/// The operator's choice: that leg alone is IN, the other one must be filled from nothing.
fn forced(found: &[Found], leg: LegId) -> Option<Record> {
    let chosen = found.iter().find(|found| found.superblock.leg == leg)?;
    let mut record = chosen.superblock.record;
    let slot = record.slot_of(leg)?;
    if record.members[slot.index()].state == MemberState::OutUnfilled {
        return None;
    }
    record.members[slot.index()].state = MemberState::In;
    record.members[slot.other().index()].state = MemberState::OutUnfilled;
    record.pin = slot;
    Some(record)
}

/// The union of the valid copies of the legs that are IN; a page that is valid on none is all dirty (mirror rule 19). What a leg that
/// counts alone has beside a damaged slot may lack the newest bits, and nobody else has them: it is all dirty, too.
fn bitmap(volume: VolumeId, blocks: u64, metas: &[(Slot, &[u8])], legs: &[Leg; 2]) -> Bitmap {
    let mut bitmap = Bitmap::new(blocks);
    let alone = legs.iter().filter(|leg| leg.state == State::In).count() == 1;
    for page in 0..bitmap.pages.len() {
        let mut valid = false;
        for (slot, meta) in metas {
            let Some(copy) = format::bitmap_page(meta, volume, page as u64) else { continue };
            let state = &mut bitmap.pages[page];
            state.slot[slot.index()] = copy.slot;
            state.sequence = state.sequence.max(copy.sequence);
            if legs[slot.index()].state == State::In {
                bitmap.join(page, Some(&copy.bits));
                valid |= !(alone && copy.doubtful);
            }
        }
        if !valid {
            bitmap.join(page, None);
        }
        // Written once more, so that every leg says the same.
        bitmap.pages[page].changed = true;
    }
    let both = legs.iter().all(|leg| leg.state == State::In);
    for region in &mut bitmap.regions {
        region.unsynced = region.set && both;
    }
    bitmap
}

/// The union of the valid lists of the legs that are IN (mirror rule 22), and whether there is one.
fn bad_blocks(volume: VolumeId, blocks: u64, metas: &[(Slot, &[u8])], legs: &[Leg; 2]) -> (BadBlocks, bool) {
    let mut list = BadBlocks::default();
    let mut found = Vec::new();
    for (slot, meta) in metas {
        let page = format::bad_blocks(meta, volume, blocks);
        if let Some(page) = &page {
            list.page.slot[slot.index()] = page.slot;
            list.page.sequence = list.page.sequence.max(page.sequence);
        }
        if legs[slot.index()].state == State::In {
            page.iter().for_each(|page| list.join(&page.runs));
            found.push(page);
        }
    }
    // Written once more where a leg says something else.
    list.page.changed = found.iter().any(|page| page.as_ref().is_none_or(|page| page.runs != list.runs()));
    (list, found.iter().any(Option::is_some))
}
