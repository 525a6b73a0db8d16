//! Errors, repair, life (mirror rules 26 to 34).

use lockstep_core::{
    io::{LegOp, Notice, Outcome, Request},
    status::LegState,
    units::{Errno, Slot},
};
use lockstep_sim::World;

use crate::{answered, cut_off, in_flight_on, range, run_dry, warm, written_behind_a_resync};

#[test]
fn case_41_no_space_takes_nobody_out_and_leaves_the_legs_equal() {
    for (a, b) in [(true, false), (false, true), (true, true)] {
        for seed in 0..20 {
            let mut world = warm(seed);
            world.write(range(0, 16));
            world.settle();
            (world.disks[0].full, world.disks[1].full) = (a, b);
            let write = world.write(range(4, 12));
            answered(&mut world, &[write]);
            assert_eq!(world.answers[&write], Err(Errno::ENOSPC));
            (world.disks[0].full, world.disks[1].full) = (false, false);
            world.settle();
            assert!(world.healthy(), "{:?}", world.mirror.status());
            world.assert_identical();
        }
    }
}

#[test]
fn rule_28_what_was_refused_does_not_come_back_with_a_power_cut() {
    for full in 0..2 {
        let mut world = warm(17);
        world.write(range(0, 16));
        world.settle();
        world.disks[full].full = true;
        let write = world.write(range(4, 12));
        answered(&mut world, &[write]);
        assert_eq!(world.answers[&write], Err(Errno::ENOSPC));
        let took = &world.disks[1 - full];
        assert!((4..12).all(|block| took.read(block) == 2 && !took.cache.contains_key(&block)), "{took:?}");
    }
}

#[test]
fn rule_28_what_could_not_be_taken_back_is_durable_as_it_is_before_the_answer() {
    for seed in 0..20 {
        let mut world = warm(seed);
        let before = world.write(range(0, 16));
        answered(&mut world, &[before]);
        world.disks.iter_mut().for_each(|disk| disk.full = true);
        let write = world.write(range(4, 12));
        answered(&mut world, &[write]);
        assert_eq!(world.answers[&write], Err(Errno::ENOSPC));
        for disk in &world.disks {
            assert!((4..12).all(|block| !disk.cache.contains_key(&block)), "seed {seed}: {disk:?}");
        }
    }
}

#[test]
fn rule_28_where_the_legs_differ_already_nothing_is_taken_back_from_the_one_that_is_not_pinned() {
    for (seed, full) in (0..20).flat_map(|seed| [(seed, 0), (seed, 1)]) {
        // Where the resync does not come to.
        let mut world = warm(seed);
        cut_off(&mut world, 4000, [2, 3]);
        assert_eq!(world.read_now(4000), Ok(2));
        while world.in_flight().iter().all(|(_, _, op)| !matches!(op, LegOp::NextData { .. })) {
            assert!(world.step(), "no resync");
        }
        world.stuck = world.in_flight().iter().map(|(io, ..)| *io).collect();
        world.disks[full].full = true;
        let write = world.write(range(4000, 4001));
        answered(&mut world, &[write]);
        assert_eq!(world.answers[&write], Err(Errno::ENOSPC));
        if full == 0 {
            assert_eq!(world.disks[1].read(4000), 2, "it is taken back before the answer");
        }
        world.disks[full].full = false;
        world.stuck.clear();
        let found = world.read_now(4000);
        assert_eq!(found, Ok([2, 4][full]), "what A has");
        world.settle();
        assert!(world.healthy() && world.read_now(4000) == found, "seed {seed}");
        world.assert_identical();
    }
}

#[test]
fn rule_28_where_a_leg_refuses_what_was_resynced_already_it_is_resynced_again() {
    for seed in 0..30 {
        let (mut world, write) = written_behind_a_resync(seed);
        let refused = in_flight_on(&world, Slot::B, |op| matches!(op, LegOp::Write { range, .. } if range.start == 3)).expect("a write");
        world.end(refused, Outcome::Failed(Errno::ENOSPC));
        answered(&mut world, &[write]);
        assert_eq!(world.answers[&write], Err(Errno::ENOSPC));
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
    }
}

#[test]
fn rule_28_a_resync_that_finds_no_space_takes_its_target_out() {
    // With a hole before it, which is zeroed first, and without.
    for (seed, block) in (0..20).flat_map(|seed| [(seed, 4000), (seed, 0)]) {
        let mut world = warm(seed);
        cut_off(&mut world, block, [2, 3]);
        world.disks[1].full = true;
        world.settle();
        let legs = world.mirror.status().legs.map(|leg| leg.state);
        assert_eq!(legs, [LegState::In, LegState::Out], "seed {seed}: they cannot be made equal, and both count");
        assert_eq!(world.read_now(block), Ok(2), "seed {seed}");
        world.disks[1].full = false;
        world.bring_back(Slot::B);
        world.settle();
        assert!(world.healthy(), "seed {seed}");
        world.assert_identical();
    }
}

#[test]
fn rule_28_what_one_leg_refused_is_answered_when_a_leg_that_fails_meanwhile_is_durably_out() {
    // Either leg fails, before the answer is known or while what the other one took is taken back.
    for (seed, way) in (0..20).flat_map(|seed| (0..8).map(move |way| (seed, way))) {
        let (full, fails, mending) = (Slot::BOTH[way & 1], Slot::BOTH[way >> 1 & 1], way & 4 != 0);
        let mut world = warm(seed);
        world.write(range(0, 32));
        world.settle();
        world.write(range(20, 21));
        let failing = loop {
            match in_flight_on(&world, fails, |op| matches!(op, LegOp::Write { .. })) {
                Some(io) => break io,
                None => assert!(world.step(), "never issued"),
            }
        };
        world.stuck = [failing].into();
        run_dry(&mut world);
        world.disks[full.index()].full = true;
        let write = world.write(range(4, 12));
        let taken_back = |world: &World| in_flight_on(world, full.other(), |op| matches!(op, LegOp::Write { fua: true, .. })).is_some();
        while mending && !taken_back(&world) {
            assert!(world.step(), "never taken back");
        }
        world.end(failing, Outcome::Failed(Errno::EIO));
        answered(&mut world, &[write]);
        assert!(world.notices.contains(&Notice::LegOut { slot: fails }), "seed {seed}: {full:?} is full, {fails:?} fails");
        let whole = (4..12).all(|block| world.disks[fails.other().index()].read(block) != 2);
        let answer = world.answers[&write];
        assert!(answer == Err(Errno::ENOSPC) || answer == Ok(()) && whole, "seed {seed}: {answer:?}");
        world.disks[full.index()].full = false;
        world.settle();
        world.bring_back(fails);
        world.settle();
        assert!(world.healthy(), "seed {seed}");
        world.assert_identical();
    }
}

#[test]
fn rule_14_what_fails_on_the_last_leg_is_answered_when_the_other_one_is_durably_out() {
    for (seed, way) in (0..20).flat_map(|seed| (0..4).map(move |way| (seed, way))) {
        let (fails, everywhere) = (Slot::BOTH[way & 1], way & 2 != 0);
        let mut world = warm(seed);
        world.write(range(0, 32));
        world.settle();
        let write = world.write(range(4, 12));
        world.write(range(20, 21));
        let writes = |world: &World| world.in_flight().into_iter().filter(|(.., op)| matches!(op, LegOp::Write { .. })).collect::<Vec<_>>();
        while writes(&world).len() < 4 {
            world.stuck = writes(&world).iter().map(|(io, ..)| *io).collect();
            assert!(world.step(), "never issued");
        }
        // The other write first: its leg is on its way out when this one fails.
        let mut ios = writes(&world);
        ios.sort_by_key(|(_, slot, op)| (matches!(op, LegOp::Write { range, .. } if range.start == 4), *slot == fails));
        for (io, slot, op) in ios {
            let last = matches!(op, LegOp::Write { range, .. } if range.start == 4) && (slot != fails || everywhere);
            let out = matches!(op, LegOp::Write { range, .. } if range.start == 20) && slot == fails;
            if last || out { world.end(io, Outcome::Failed(Errno::EIO)) } else { world.finish(io) }
        }
        world.stuck.clear();
        answered(&mut world, &[write]);
        assert_eq!(world.answers[&write], Err(Errno::EIO));
        assert!(world.notices.contains(&Notice::LegOut { slot: fails }), "seed {seed}: {fails:?} is not out yet");
    }
}

#[test]
fn rule_31_a_volume_that_grew_keeps_its_size_and_its_new_space() {
    for seed in 0..20 {
        let mut world = warm(seed);
        let blocks = lockstep_sim::BLOCKS + 5000;
        let beyond = range(blocks - 8, blocks);
        let early = world.write(beyond);
        world.settle();
        assert_eq!(world.answers[&early], Err(Errno::EINVAL));
        let grow = world.command(Request::Grow { blocks });
        for _ in 0..seed {
            world.step();
        }
        if seed % 2 == 0 {
            world.settle();
            assert_eq!(world.answers[&grow], Ok(()));
            world.write(beyond);
            world.flush();
            world.settle();
        }
        world.crash([true, true]).expect("both are IN");
        world.settle();
        let size = world.mirror.status().blocks;
        assert!(size == blocks || size == lockstep_sim::BLOCKS && seed % 2 == 1, "{size}");
        if seed % 2 == 0 {
            assert!(world.read_now(blocks - 1).is_ok_and(|found| found > 0));
        }
        assert!(world.healthy());
        world.assert_identical();
    }
}

#[test]
fn rule_26_a_leg_that_needs_too_many_repairs_goes_out() {
    let mut world = warm(1);
    for repairs in 0..200 {
        world.disks[0].bad.insert(0);
        while !world.disks[0].bad.is_empty() && world.mirror.status().legs[0].state == LegState::In {
            assert!(world.read_now(0).is_ok());
            world.settle();
        }
        if world.mirror.status().legs[0].state == LegState::Out {
            assert!(repairs >= 16, "a few bad blocks are no reason");
            return;
        }
    }
    panic!("repaired for ever");
}

#[test]
fn rule_26_a_repair_that_fails_takes_the_leg_out() {
    let mut world = warm(1);
    world.write(range(0, 8));
    run_dry(&mut world);
    world.disks[0].dead = true;
    for _ in 0..4 {
        assert_eq!(world.read_now(3), Ok(2));
        run_dry(&mut world);
    }
    assert!(world.notices.contains(&Notice::LegOut { slot: Slot::A }));
}
