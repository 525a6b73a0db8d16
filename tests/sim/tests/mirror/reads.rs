//! Reads beside writes (mirror rule 7).

use lockstep_core::{
    format,
    io::{LegOp, Notice, Outcome, Request},
    units::{Errno, Slot},
};
use lockstep_sim::World;

use crate::{
    answered,
    behind::{pin_refused, write_on},
    cut_off, range, run_dry, warm,
};

/// A read of [4, 6) beside a write of [4, 5) that came after it and is taken back, because one leg has no space for it. What the read saw
/// must be what is there afterwards.
fn read_beside_a_write_that_is_taken_back(seed: u64, waits: bool) {
    let mut world = warm(seed);
    world.write(range(0, 16));
    world.settle();
    world.disks[(seed % 2) as usize].full = true;
    if waits {
        world.write(range(5, 7));
    }
    let read = world.read(range(4, 6));
    let write = world.write(range(4, 5));
    while !world.answers.contains_key(&read) || !world.answers.contains_key(&write) {
        assert!(world.step(), "a request never ended");
    }
    assert_eq!((world.answers[&read], world.answers[&write]), (Ok(()), Err(Errno::ENOSPC)));
    let seen = world.found(read);
    world.settle();
    assert_eq!(seen, world.read_now(4).ok(), "seed {seed}: a write that never happened was read\n{}", world.trace());
}

#[test]
fn rule_07_a_write_that_comes_while_a_read_is_under_way_is_not_read_before_it_is_final() {
    (0..100).for_each(|seed| read_beside_a_write_that_is_taken_back(seed, false));
}

#[test]
fn rule_07_a_write_that_comes_while_a_read_waits_for_another_one_is_not_read_before_it_is_final() {
    (0..100).for_each(|seed| read_beside_a_write_that_is_taken_back(seed, true));
}

/// A, which is pinned, has 2 at 4000, and B has 3; the resync does not come to it.
fn unsynced(seed: u64) -> World {
    let mut world = warm(seed);
    cut_off(&mut world, 4000, [2, 3]);
    while world.in_flight().iter().all(|(_, _, op)| !matches!(op, LegOp::NextData { .. })) {
        assert!(world.step(), "no resync");
    }
    world.stuck = world.in_flight().iter().map(|(io, ..)| *io).collect();
    world
}

#[test]
fn rule_21_where_the_legs_may_differ_nothing_is_read_from_the_one_that_is_left_before_the_other_is_durably_out() {
    for seed in 0..20 {
        let mut world = unsynced(seed);
        assert_eq!(world.read_now(4000), Ok(2));
        world.disks[0].dead = true;
        // Where the resync does not come to.
        world.write(range(3000, 3001));
        while !world.notices.iter().any(|notice| matches!(notice, Notice::LegFailed { slot: Slot::A, .. })) {
            assert!(world.step(), "it never fails");
        }
        world.stuck.clear();
        let read = world.read(range(4000, 4001));
        answered(&mut world, &[read]);
        assert!(world.notices.contains(&Notice::LegOut { slot: Slot::A }), "seed {seed}: A may be read again after a kill");
        assert_eq!((world.answers[&read], world.found(read)), (Ok(()), Some(3)));
    }
}

#[test]
fn rule_21_where_the_legs_may_differ_nothing_is_read_beside_a_leg_with_too_many_repairs_before_it_is_durably_out() {
    for seed in 0..20 {
        let mut world = unsynced(seed);
        for _ in 0..64 {
            // A is pinned: each read asks it, and repairs it.
            world.disks[0].bad.insert(4001);
            while world.disks[0].bad.contains(&4001) {
                world.read_now(4001).expect("B has it");
                world.step();
            }
        }
        assert!(world.notices.iter().all(|notice| !matches!(notice, Notice::LegFailed { .. })), "nobody has failed");
        world.disks[0].bad.insert(4000);
        assert_eq!(world.read_now(4000), Ok(3));
        assert!(world.notices.contains(&Notice::LegOut { slot: Slot::A }), "seed {seed}: A may be read again after a kill");
    }
}

#[test]
fn rule_21_where_the_legs_may_differ_a_read_in_a_stop_puts_on_the_pinned_leg_what_it_was_answered_with() {
    for seed in 0..20 {
        let mut world = unsynced(seed);
        world.disks[0].bad.insert(4000);
        let read = world.read(range(4000, 4001));
        let stop = world.command(Request::Stop);
        answered(&mut world, &[read]);
        assert_eq!((world.answers[&read], world.found(read)), (Ok(()), Some(3)));
        assert_eq!(world.disks[0].read(4000), 3, "seed {seed}: A may be read again after a kill");
        world.stuck.clear();
        answered(&mut world, &[stop]);
        assert_eq!(world.answers[&stop], Ok(()));
    }
}

/// As `pin_refused`, and what holds is being said again. `landed`: the witness has the record that it refused, and the legs have the newer one.
fn pinned_by_one_record_of_two(seed: u64, landed: bool) -> World {
    let mut world = pin_refused(seed);
    let (record, _) = format::superblock(&world.disks[0].meta).expect("it is valid");
    if landed {
        let (_, slot) = format::witness(&world.witness).expect("it is valid");
        world.witness[usize::from(1 - slot) * 4096..][..4096].copy_from_slice(format::encode_witness(&record).as_slice());
        world.witness_fails = 1;
        run_dry(&mut world);
    } else {
        world.stuck.extend(world.in_flight().into_iter().map(|(io, ..)| io));
    }
    assert_eq!((record.record.pin, landed || !world.stuck.is_empty()), (Slot::A, true));
    world
}

#[test]
fn rule_21_where_the_legs_may_differ_nothing_is_read_while_it_is_not_certain_which_leg_is_pinned() {
    for (seed, landed) in (0..20).flat_map(|seed| [(seed, false), (seed, true)]) {
        let mut world = pinned_by_one_record_of_two(seed, landed);
        let write = world.write(range(20, 21));
        for slot in Slot::BOTH {
            let io = write_on(&world, slot, range(20, 21)).expect("it is issued");
            world.end(io, Outcome::Failed(Errno::EIO));
        }
        assert_eq!(world.answers[&write], Err(Errno::EIO));
        world.disks[1].durable.insert(20, 4711);
        // The resync does not come there.
        world.stuck.extend(world.in_flight().into_iter().map(|(io, ..)| io));
        let read = world.read(range(20, 21));
        run_dry(&mut world);
        let early = world.answers.contains_key(&read);
        while !world.answers.contains_key(&read) {
            world.stuck.clear();
            assert!(world.step() || world.tick(), "the read never ended");
        }
        let found = world.found(read);
        assert_eq!(found, Some(4711));
        if early && !landed {
            world.witness = vec![0; 8192];
        }
        world.kill([true, true]).expect("both are IN");
        assert_eq!(world.read_now(20).ok(), found, "seed {seed}: it was read already");
    }
}
