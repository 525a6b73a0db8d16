//! The mirror on simulated disks: named cases by group of rules, and random histories.
#![allow(missing_docs)]

mod bad_blocks;
mod behind;
mod cap;
mod changes;
mod crash;
mod deadlines;
mod errors;
mod every_crash;
mod every_order;
mod histories;
mod membership;
mod order;
mod reads;
mod scrub;

use lockstep_core::{
    io::LegOp,
    status::{LegState, Sync},
    units::{BlockRange, IoId, Slot, Tag},
};
use lockstep_sim::World;

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

/// A mirror that is resynced after a kill, and a write on its way to both legs where it was copied already; others of its region are not.
fn written_behind_a_resync(seed: u64) -> (World, Tag) {
    let mut world = warm(seed);
    world.write(range(0, 8));
    world.settle();
    world.write(range(100, 108));
    until_writing(&mut world);
    world.kill([true, true]).expect("both are IN");
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
