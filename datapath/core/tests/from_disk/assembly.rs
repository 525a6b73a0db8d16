use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use lockstep_core::{
    assembly::Refusal,
    format::{REGION_BLOCKS, Superblock},
    membership::{MemberState, RecordName},
    status::LegState,
    units::Slot,
};
use proptest::prelude::*;

use crate::{
    naive,
    node::{Node, There},
};

/// What happens while a mirror runs.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64),
    Lose(Slot),
    Return(Slot),
    /// Ten seconds.
    Pass,
    /// The object's status is brought up to date.
    Publish,
}

/// From an assembly to its end: killed after so many effects, or when the steps are over.
#[derive(Clone, Debug)]
struct Run {
    disks: [bool; 2],
    witness: bool,
    force: Option<Slot>,
    fuse: u64,
    /// Killed by a power cut: the metadata that was being written is torn.
    tears: bool,
    /// Before it, the newest slot of the witness has gone bad; not where a disk is lost, too.
    rot: bool,
    steps: Vec<Step>,
}

fn slot() -> impl Strategy<Value = Slot> {
    prop::sample::select(Slot::BOTH.to_vec())
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3u64, 0..4u64).prop_map(|(region, block)| Step::Write(region * REGION_BLOCKS + block)),
        2 => slot().prop_map(Step::Lose),
        2 => slot().prop_map(Step::Return),
        1 => Just(Step::Pass),
        1 => Just(Step::Publish),
    ]
}

fn run() -> impl Strategy<Value = Run> {
    let disks = prop_oneof![4 => Just([true; 2]), 1 => Just([true, false]), 1 => Just([false, true])];
    let fuse = prop_oneof![2 => 0..40u64, 1 => 0..400u64, 2 => Just(u64::MAX)];
    let force = prop::option::weighted(0.1, slot());
    let damage = (prop::bool::weighted(0.3), prop::bool::weighted(0.05));
    (disks, prop::bool::weighted(0.85), force, fuse, damage, prop::collection::vec(step(), 0..6))
        .prop_map(|(disks, witness, force, fuse, (tears, rot), steps)| Run { disks, witness, force, fuse, tears, rot, steps })
}

/// What the slots at the head of a file say: the valid page with the higher sequence.
fn newest(file: &[u8]) -> Option<Superblock> {
    let valid = |page: &&[u8]| page[0] == b'L' && naive::is_sealed(page, naive::SUPERBLOCK_CRC);
    let pages = [&file[..4096], &file[4096..8192]].into_iter().filter(valid).map(naive::superblock);
    pages.max_by_key(|superblock| superblock.sequence)
}

/// Whether a slot at the head of a file is neither valid nor blank.
fn is_damaged(file: &[u8]) -> bool {
    let damaged = |page: &[u8]| page.iter().any(|byte| *byte != 0) && !naive::is_sealed(page, naive::SUPERBLOCK_CRC);
    damaged(&file[..4096]) || damaged(&file[4096..8192])
}

type Name = (u64, [u8; 16]);

fn key(name: RecordName) -> Name {
    (name.epoch.0, name.id.0)
}

/// By record: what the run that made it had come to know.
#[derive(Default)]
struct Knowledge {
    of: BTreeMap<Name, BTreeSet<Name>>,
    run: BTreeSet<Name>,
}

impl Knowledge {
    fn learn(&mut self, name: RecordName) {
        self.run.insert(key(name));
        self.run.extend(self.of.get(&key(name)).into_iter().flatten().copied());
    }

    fn make(&mut self, names: impl IntoIterator<Item = RecordName>) {
        for name in names {
            self.run.insert(key(name));
            self.of.entry(key(name)).or_insert_with(|| self.run.clone());
        }
    }
}

/// What the rules say of an assembly.
#[derive(Debug, PartialEq)]
enum Verdict {
    /// Refused.
    Refuse,
    /// Assembled; these count.
    Count([bool; 2]),
    /// It was known to whoever made the newest record, but a record has room for one name: refused, or as in `Count`.
    Either([bool; 2]),
    /// The witness is damaged: refused, or whoever counts has what was acknowledged.
    Safe,
}

fn verdict(node: &Node, there: There, knowledge: &Knowledge) -> Verdict {
    let legs = Slot::BOTH.map(|slot| newest(&node.disks[slot.index()].meta).filter(|_| there.disks[slot.index()]));
    let witness = newest(&node.witness).filter(|_| there.witness);
    if there.witness && is_damaged(&node.witness) {
        return Verdict::Safe;
    }
    let mut certain = true;
    let decides = match (witness, legs) {
        (Some(witness), _) => witness.record,
        (None, [Some(a), Some(b)]) => {
            let (newer, older) = if b.record.name.epoch > a.record.name.epoch { (b, a) } else { (a, b) };
            let theirs = older.record.name;
            if !knowledge.of.get(&key(newer.record.name)).is_some_and(|known| known.contains(&key(theirs))) && theirs.epoch.0 > 1 {
                return Verdict::Refuse;
            }
            // Another leg in its place is no news of the one that is meant.
            let Some(slot) = newer.record.slot_of(older.leg) else { return Verdict::Refuse };
            certain = newer.record.name == theirs || newer.record.members[slot.index()].seen == theirs;
            newer.record
        }
        (None, _) => return Verdict::Refuse,
    };
    let counts = Slot::BOTH.map(|slot| {
        let member = decides.members[slot.index()];
        let here = legs[slot.index()].is_some_and(|leg| leg.leg == member.leg);
        here && member.state == MemberState::In && node.complete(slot)
    });
    let vetoed = there.seen_epoch.is_some_and(|seen| seen > decides.name.epoch);
    match (counts, certain) {
        ([false, false], _) => Verdict::Refuse,
        _ if vetoed => Verdict::Refuse,
        (_, true) => Verdict::Count(counts),
        (_, false) => Verdict::Either(counts),
    }
}

/// The operator insists on what is on this disk. `false`: it is refused all the same, for it was never whole or is not there.
fn force(node: &mut Node, there: There, slot: Slot) -> bool {
    let found = newest(&node.disks[slot.index()].meta).expect("never damaged");
    let was_full = found.record.slot_of(found.leg).is_some_and(|at| found.record.members[at.index()].state != MemberState::OutUnfilled);
    let assembled = node.assemble(There { force: Some(found.leg), ..there });
    assert_eq!(assembled.is_ok(), was_full && there.disks[slot.index()], "{:?}", assembled.err());
    if assembled.is_ok() {
        // To its end: before that is on record, both stories could be the true one.
        assert!(node.run());
        node.believe(slot);
    }
    assembled.is_ok()
}

fn check(runs: &[Run]) {
    let mut node = Node::new();
    let mut knowledge = Knowledge::default();
    let (mut seen_epoch, mut rotten) = (None, None);
    for run in runs {
        // What was not overwritten is whole again: one thing at a time is lost.
        if let Some((slot, _)) = rotten.take().filter(|(slot, page): &(Range<usize>, Vec<u8>)| node.witness[slot.clone()] == page[..]) {
            node.witness[slot.start + 1000] ^= 4;
        }
        if run.rot
            && run.disks == [true; 2]
            && !is_damaged(&node.witness)
            && let Some(superblock) = newest(&node.witness)
        {
            let start = 4096 * usize::from(naive::superblock(&node.witness[4096..]).sequence == superblock.sequence);
            node.witness[start + 1000] ^= 4;
            rotten = Some((start..start + 4096, node.witness[start..start + 4096].to_vec()));
        }
        let there = There { disks: run.disks, witness: run.witness, seen_epoch, force: None };
        let verdict = verdict(&node, there, &knowledge);
        knowledge.run.clear();
        let files = [(&node.disks[0].meta, run.disks[0]), (&node.disks[1].meta, run.disks[1]), (&node.witness, run.witness)];
        for superblock in files.into_iter().filter(|(_, there)| *there).filter_map(|(file, _)| newest(file)) {
            knowledge.learn(superblock.record.name);
        }
        let counts = match (node.assemble(there), verdict) {
            (Err(_), Verdict::Refuse) | (Err(Refusal::SplitBrain(..)), Verdict::Either(_)) | (Err(_), Verdict::Safe) => match run.force {
                Some(slot) if force(&mut node, there, slot) => Slot::BOTH.map(|other| other == slot),
                _ => continue,
            },
            (Ok(_), Verdict::Count(counts) | Verdict::Either(counts)) => counts,
            (Ok(_), Verdict::Safe) => Slot::BOTH.map(|slot| node.states()[slot.index()] == LegState::In && node.complete(slot)),
            (result, verdict) => panic!("{verdict:?}, but {:?}", result.err()),
        };
        assert_eq!(node.states().map(|state| state == LegState::In), counts);
        (node.fuse, node.tears) = (run.fuse, run.tears);
        let mut alive = node.run();
        for step in &run.steps {
            knowledge.make(node.made.drain(..));
            if !alive {
                break;
            }
            match *step {
                Step::Write(block) => drop(node.write(block)),
                Step::Lose(slot) => node.disks[slot.index()].dead = true,
                Step::Return(slot) => {
                    node.disks[slot.index()].dead &= !run.disks[slot.index()];
                    if let Some(superblock) = newest(&node.disks[slot.index()].meta).filter(|_| !node.disks[slot.index()].dead) {
                        knowledge.learn(superblock.record.name);
                    }
                    node.attach(slot);
                }
                Step::Pass => node.pass(10_000),
                Step::Publish => seen_epoch = node.mirror.as_ref().map(|mirror| mirror.status().epoch),
            }
            alive = node.run();
            for slot in Slot::BOTH.into_iter().filter(|_| alive) {
                assert!(node.states()[slot.index()] != LegState::In || node.complete(slot), "{slot:?} counts and misses what was answered");
            }
        }
        knowledge.make(node.made.drain(..));
        node.kill();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn who_counts_after_any_history_is_who_has_what_was_acknowledged(runs in prop::collection::vec(run(), 1..8)) {
        check(&runs);
    }
}

#[test]
fn what_an_unknown_compat_bit_says_of_one_leg_every_later_record_says_too() {
    let mut node = Node::new();
    let page = &mut node.disks[1].meta[..4096];
    page[16..20].copy_from_slice(&0x8000_0001u32.to_le_bytes());
    naive::seal(page, naive::SUPERBLOCK_CRC);
    node.assemble(There { disks: [true; 2], witness: true, seen_epoch: None, force: None }).expect("it is accepted");
    node.run();
    let files = [&node.disks[0].meta, &node.disks[1].meta, &node.witness];
    assert_eq!(files.map(|file| newest(file).expect("a record").compat), [0x8000_0001; 3]);
    assert!(files.into_iter().all(|file| newest(file).is_some_and(|superblock| superblock.record.name.epoch.0 == 2)));
}
