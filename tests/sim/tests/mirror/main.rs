//! The mirror on simulated disks: named cases by group of rules, and random histories.
#![allow(missing_docs)]

mod bad_blocks;
mod behind;
mod cap;
mod changes;
mod crash;
mod deadlines;
mod errors;
mod every_behind;
mod every_copy;
mod every_crash;
mod every_hang;
mod every_moment;
mod every_order;
mod every_pass;
mod every_return;
mod histories;
mod membership;
mod order;
mod reads;
mod scrub;

use std::collections::BTreeSet;

use lockstep_core::{
    format::{self, REGION_BLOCKS},
    io::{Buffer, LegOp},
    membership::MemberState,
    status::{LegState, Sync},
    units::{BlockRange, Errno, IoId, Slot, Tag},
};
use lockstep_sim::{Rng, World};

fn range(start: u64, end: u64) -> BlockRange {
    BlockRange::new(start, end)
}

/// A world in which the region of block 0 is dirty, so that writes go to the legs at once.
fn warm(seed: u64) -> World {
    let mut world = World::new(seed);
    while world.step() {}
    world.write(range(0, 1));
    while world.step() {}
    world
}

/// Blocks 0 to 8 hold 2, durably.
fn flushed(seed: u64) -> World {
    let mut world = warm(seed);
    world.write(range(0, 8));
    run_dry(&mut world);
    world.flush();
    run_dry(&mut world);
    world
}

/// The first eight blocks of each region hold 1, 2, .. durably, and no region is dirty.
fn small(blocks: u64) -> World {
    let mut world = World::sized(1, blocks);
    for region in 0..blocks.div_ceil(REGION_BLOCKS) {
        world.write(range(region * REGION_BLOCKS, region * REGION_BLOCKS + 8));
    }
    done(&mut world);
    world
}

/// All that was asked for is done and durable.
fn done(world: &mut World) {
    world.settle();
    world.flush();
    world.settle();
}

/// Leg B fails, misses a write of the first blocks, and comes back: it is being attached.
fn miss_and_return(world: &mut World) -> Tag {
    world.disks[1].dead = true;
    world.write(range(0, 8));
    world.settle();
    world.bring_back(Slot::B).expect("it has a place")
}

/// Until it is durably RECOVERING.
fn until_recovering(world: &mut World) {
    while world.mirror.status().legs[1].state != LegState::Recovering {
        assert!(world.step());
    }
}

fn writes_in_flight(world: &World) -> usize {
    world.in_flight().iter().filter(|(_, _, op)| matches!(op, LegOp::Write { .. })).count()
}

/// Until a write is on its way to a leg.
fn until_writing(world: &mut World) {
    while writes_in_flight(world) == 0 {
        assert!(world.step(), "the write is never issued");
    }
}

/// Two writes of this block with these tokens, and a power cut: A, which is pinned, has the first one, and the second one came to B alone.
fn cut_off(world: &mut World, block: u64, tokens: [u64; 2]) {
    world.write(range(block, block + 1));
    world.settle();
    world.write(range(block, block + 1));
    until_writing(world);
    world.crash([true, true]).expect("both are IN");
    for (disk, token) in world.disks.iter_mut().zip(tokens) {
        disk.durable.insert(block, token);
    }
}

/// A write that was on its way to both legs, and a kill: it is assembled, and its region is to be resynced.
fn killed_while_writing(world: &mut World, range: BlockRange) {
    world.write(range);
    until_writing(world);
    world.kill([true, true]).expect("both are IN");
}

/// A mirror that is resynced after a kill, and a write on its way to both legs where it was copied already; others of its region are not.
fn written_behind_a_resync(seed: u64) -> (World, Tag) {
    let mut world = warm(seed);
    world.write(range(0, 8));
    world.settle();
    killed_while_writing(&mut world, range(100, 108));
    while !(world.mirror.status().sync == Sync::Resync && world.mirror.status().copied_blocks > 7) {
        assert!(world.step(), "it is never resynced");
    }
    let write = world.write(range(3, 4));
    while in_flight_on(&world, Slot::A, |op| matches!(op, LegOp::Write { range, .. } if range.start == 3)).is_none() {
        assert!(world.step(), "the write is never issued");
    }
    assert_eq!(world.mirror.status().sync, Sync::Resync, "too late");
    (world, write)
}

/// The first thing in flight on a leg that is of this kind.
fn in_flight_on(world: &World, slot: Slot, kind: impl Fn(&LegOp) -> bool) -> Option<IoId> {
    world.in_flight().into_iter().find(|(_, on, op)| *on == slot && kind(op)).map(|(io, ..)| io)
}

fn superblock_on(world: &World, slot: Slot) -> Option<IoId> {
    in_flight_on(world, slot, |op| matches!(op, LegOp::WriteMeta { offset, .. } if *offset < 8192))
}

/// Whether the data of this write is on its way to a leg.
fn on_its_way(world: &World, write: Tag, slot: Slot) -> bool {
    in_flight_on(world, slot, |op| matches!(op, LegOp::Write { buffer: Buffer::Request { tag, .. }, .. } if *tag == write)).is_some()
}

/// A page of the bitmap on its way to a leg.
fn bitmap_on(world: &World, slot: Slot) -> Option<IoId> {
    in_flight_on(world, slot, |op| matches!(op, LegOp::WriteMeta { offset, .. } if *offset >= format::bitmap_offset(0, 0)))
}

/// What the witness says of a leg.
fn witnessed(world: &World, slot: Slot) -> MemberState {
    format::witness(&world.witness).expect("a slot is whole").0.record.members[slot.index()].state
}

/// By the record that decides.
fn out_by_the_witness(world: &World, slot: Slot) -> bool {
    witnessed(world, slot) == MemberState::Out
}

/// Ends everything that ends without the clock.
fn run_dry(world: &mut World) {
    while world.step() {}
}

/// Goes on, without the clock, until they are answered.
fn answered(world: &mut World, tags: &[Tag]) {
    while !tags.iter().all(|tag| world.answers.contains_key(tag)) {
        assert!(world.step(), "a write that never ends");
    }
}

/// Power cuts at this moment, each with other survivors of what was volatile; both disks come back.
fn power_cuts(world: &World, cuts: u64) -> impl Iterator<Item = World> {
    (0..cuts).map(move |cut| {
        let mut after = world.clone();
        after.rng = Rng(cut);
        after.disks.iter_mut().for_each(|disk| disk.dead = false);
        after.crash([true, true]).unwrap_or_else(|refusal| panic!("{refusal}: {}", world.trace()));
        after
    })
}

/// Kills at this moment; what was on its way has ended or never came to its disk.
fn kills(world: &World, kills: u64) -> impl Iterator<Item = World> {
    (0..kills).map(|kill| {
        let mut after = world.clone();
        after.rng = Rng(kill);
        after.kill([true, true]).unwrap_or_else(|refusal| panic!("{refusal}: {}", world.trace()));
        after
    })
}

/// What each phase of a history asks for ends, in every order, and the next one begins where all of it has. Visits every moment, with the number of its phase.
fn through(mut world: World, phases: &[fn(&mut World)], visit: &mut dyn FnMut(&World, usize)) {
    for (n, phase) in phases.iter().enumerate() {
        phase(&mut world);
        let mut end = None;
        world.in_every_order(&mut |world| {
            visit(world, n);
            if world.movable().is_empty() {
                end = Some(world.clone());
            }
        });
        world = end.expect("it ends");
    }
}

/// On disks that are full, or not: what is asked for, in every order until it is answered, and what comes after: `after_a_cut` judges each of so many power
/// cuts at every moment, with the answer if there was one, on disks that have room again; `answered` the moment of the answer. Nobody goes OUT, and the legs end equal.
fn on_full_disks(
    full: [bool; 2],
    ask: impl FnOnce(&mut World) -> Tag,
    cuts: u64,
    after_a_cut: impl Fn(&mut World, Option<Result<(), Errno>>),
    answered: impl Fn(&World, Result<(), Errno>),
) {
    let have_room = |world: &mut World| world.disks.iter_mut().for_each(|disk| disk.full = false);
    let mut world = flushed(1);
    world.disks.iter_mut().zip(full).for_each(|(disk, full)| disk.full = full);
    let tag = ask(&mut world);
    let mut answers = 0;
    world.in_every_order_while(&mut |world| {
        let answer = world.answers.get(&tag).copied();
        assert_eq!(world.mirror.status().legs.map(|leg| leg.state), [LegState::In; 2], "{}", world.trace());
        for mut after in power_cuts(world, cuts) {
            have_room(&mut after);
            run_dry(&mut after);
            after_a_cut(&mut after, answer);
        }
        if let Some(answer) = answer {
            answers += 1;
            answered(world, answer);
            let mut after = world.clone();
            have_room(&mut after);
            assert_equal_again(&mut after);
        }
        assert!(answer.is_some() || !world.movable().is_empty(), "it never ends");
        answer.is_none()
    });
    assert!(answers > 0);
}

/// It can be read. The oracle of a read: not older than what was answered before, or after a power cut than what was durable by then.
fn assert_readable(world: &mut World, range: BlockRange) {
    let read = world.read(range);
    world.settle();
    assert_eq!(world.answers[&read], Ok(()), "{}", world.trace());
}

/// The copies are the same where both count; and then who is OUT gets what it missed.
fn assert_equal_again(world: &mut World) {
    world.settle();
    if let Some(slot) = Slot::BOTH.into_iter().find(|slot| world.mirror.status().legs[slot.index()].state == LegState::Out) {
        world.bring_back(slot);
        world.settle();
    }
    assert!(world.healthy(), "{:?}", world.mirror.status());
    world.assert_identical();
}

fn differing(world: &World) -> BTreeSet<u64> {
    let [a, b] = &world.disks;
    let blocks = a.durable.keys().chain(b.durable.keys());
    blocks.copied().filter(|block| a.read(*block) != b.read(*block)).collect()
}

/// After a power cut: where the copies differ a bit says so, what is read there does not change any more, each block is one of these, and the copies become equal.
fn assert_resynced(mut world: World, block: u64, may_be: &[u64]) {
    let dirty = world.disks[0].dirty_regions().union(&world.disks[1].dirty_regions()).copied().collect::<Vec<_>>();
    for block in differing(&world) {
        assert!(dirty.contains(&(block / REGION_BLOCKS)), "{block} differs and nothing says so: {}", world.trace());
    }
    let found = world.read_now(block).expect("both can read");
    assert!(may_be.contains(&found), "{found}: {}", world.trace());
    world.settle();
    assert!(world.healthy() && world.mirror.status().dirty_regions == 0);
    world.assert_identical();
    assert_eq!(world.read_now(block), Ok(found), "{}", world.trace());
    for block in block..block + 4 {
        assert!(may_be.contains(&world.disks[0].read(block)));
    }
}
