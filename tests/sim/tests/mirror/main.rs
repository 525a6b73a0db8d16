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
    status::LegState,
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
