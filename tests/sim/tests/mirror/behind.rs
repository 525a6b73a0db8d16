//! Write-mostly and write-behind (mirror rule 32). A is the fast leg, B the slow one.

use lockstep_core::{
    assembly::Limits,
    format,
    io::{LegOp, Notice, Outcome, Request},
    status::{LegState, Sync},
    units::{BlockRange, Errno, IoId, LegId, Slot, Tag},
};
use lockstep_sim::{Rng, World};

use crate::{cut_off, in_flight_on, range, run_dry};

const MOSTLY_B: Request = Request::WriteMostly { slot: Some(Slot::B), behind: true };

/// B is write-mostly, writes may be behind on it, and the region of block 0 is dirty.
fn behind_with(seed: u64, limits: Limits) -> World {
    let mut world = World::with_limits(seed, limits);
    world.settle();
    world.command(MOSTLY_B);
    run_dry(&mut world);
    assert!(world.mirror.status().write_behind);
    world.write(range(0, 1));
    run_dry(&mut world);
    world
}

fn behind(seed: u64) -> World {
    behind_with(seed, Limits::default())
}

pub(crate) fn write_on(world: &World, slot: Slot, of: BlockRange) -> Option<IoId> {
    in_flight_on(world, slot, |op| matches!(op, LegOp::Write { range, .. } if *range == of))
}

/// A write that is answered and stuck on its way to B.
fn stuck(world: &mut World, of: BlockRange) -> (Tag, IoId) {
    let write = world.write(of);
    let slow = write_on(world, Slot::B, of).expect("it is issued");
    world.stuck.insert(slow);
    run_dry(world);
    assert_eq!(world.answers.get(&write), Some(&Ok(())), "it waits for the slow leg");
    (write, slow)
}

fn holds(world: &World, slot: Slot, blocks: BlockRange, token: u64) -> bool {
    (blocks.start..blocks.end).all(|block| world.disks[slot.index()].read(block) == token)
}

#[test]
fn case_42_a_write_is_answered_when_the_fast_leg_has_it_and_an_overlapping_one_waits_until_the_slow_leg_has_it_too() {
    for seed in 0..20 {
        let mut world = behind(seed);
        let (_, slow) = stuck(&mut world, range(0, 8));
        assert_eq!(world.mirror.status().behind, 1);
        let second = world.write(range(4, 12));
        let apart = world.write(range(8, 16));
        run_dry(&mut world);
        assert!(!world.answers.contains_key(&second) && write_on(&world, Slot::A, range(4, 12)).is_none(), "it overtook");
        assert!(!world.answers.contains_key(&apart), "FIFO");
        // Reads of the range come from the fast leg and wait for nobody.
        for _ in 0..4 {
            assert_eq!(world.read_now(2), Ok(2));
        }
        world.stuck.remove(&slow);
        world.settle();
        assert_eq!((world.answers[&second], world.mirror.status().behind), (Ok(()), 0));
        assert!(holds(&world, Slot::B, range(0, 4), 2) && holds(&world, Slot::B, range(8, 16), 4));
        world.assert_identical();
    }
}

#[test]
fn rule_32_a_read_that_waited_for_the_fast_leg_does_not_wait_for_the_slow_one() {
    let mut world = behind(1);
    let write = world.write(range(0, 8));
    let slow = write_on(&world, Slot::B, range(0, 8)).unwrap();
    world.stuck.insert(slow);
    let read = world.read(range(0, 8));
    run_dry(&mut world);
    assert_eq!([world.answers[&write], world.answers[&read]], [Ok(()); 2]);
}

#[test]
fn rule_32_reads_avoid_the_write_mostly_leg_unless_the_other_cannot() {
    for behind in [false, true] {
        let mut world = World::new(3);
        world.settle();
        world.command(Request::WriteMostly { slot: Some(Slot::B), behind });
        world.write(range(0, 64));
        world.settle();
        let reads: Vec<Tag> = (0..32).map(|block| world.read(range(block, block + 1))).collect();
        assert!(in_flight_on(&world, Slot::B, |op| matches!(op, LegOp::Read { .. })).is_none());
        world.settle();
        assert!(reads.iter().all(|read| world.answers[read] == Ok(())));
        world.disks[0].bad.insert(7);
        assert_eq!(world.read_now(7), Ok(1));
        world.settle();
        assert!(world.healthy() && world.disks[0].bad.is_empty());
    }
}

#[test]
fn rule_32_behind_is_bounded_in_number_and_in_blocks_and_what_comes_beyond_waits_as_usual() {
    for limits in [Limits { behind_writes: 3, ..Limits::default() }, Limits { behind_blocks: 12, ..Limits::default() }] {
        let mut world = behind_with(1, limits);
        let mut slow: Vec<IoId> = (0..3).map(|i| stuck(&mut world, range(4 * i, 4 * i + 4)).1).collect();
        let fourth = world.write(range(12, 16));
        slow.push(write_on(&world, Slot::B, range(12, 16)).unwrap());
        world.stuck.insert(slow[3]);
        run_dry(&mut world);
        assert!(!world.answers.contains_key(&fourth));
        world.stuck.remove(&slow[3]);
        run_dry(&mut world);
        assert_eq!(world.answers[&fourth], Ok(()));
        world.stuck.clear();
        world.settle();
        world.assert_identical();
    }
}

#[test]
fn case_42_a_flush_is_answered_when_all_that_was_answered_before_it_is_durable_on_both_legs() {
    for seed in 0..20 {
        let mut world = behind(seed);
        let (_, slow) = stuck(&mut world, range(0, 8));
        let flush = world.flush();
        run_dry(&mut world);
        assert!(!world.answers.contains_key(&flush), "it does not wait");
        // While it waits nothing new comes to be behind: it would wait for ever.
        let late = world.write(range(20, 24));
        let late_slow = write_on(&world, Slot::B, range(20, 24)).unwrap();
        world.stuck.insert(late_slow);
        run_dry(&mut world);
        assert!(!world.answers.contains_key(&late));
        world.stuck.remove(&slow);
        run_dry(&mut world);
        assert_eq!(world.answers[&flush], Ok(()));
        for disk in &world.disks {
            assert!((0..8).all(|block| disk.durable.get(&block) == Some(&2)), "not durable on both");
        }
        world.stuck.clear();
        world.settle();
    }
}

#[test]
fn rule_16_fua_is_never_behind() {
    let mut world = behind(1);
    let fua = world.write_fua(range(0, 8));
    let slow = write_on(&world, Slot::B, range(0, 8)).unwrap();
    world.stuck.insert(slow);
    run_dry(&mut world);
    assert!(!world.answers.contains_key(&fua));
    world.stuck.clear();
    world.settle();
    assert_eq!(world.answers[&fua], Ok(()));
}

#[test]
fn case_42_after_a_kill_or_a_power_cut_with_writes_behind_the_fast_leg_decides() {
    for seed in 0..100 {
        let mut world = behind(seed);
        let mut rng = Rng(seed);
        for start in [0, 8, 16] {
            stuck(&mut world, range(start, start + 8));
        }
        let flushed = seed % 3 == 0;
        if flushed {
            world.stuck.clear();
            world.flush();
            run_dry(&mut world);
            stuck(&mut world, range(4, 20));
        }
        for _ in 0..rng.below(6) {
            world.write(range(30 + rng.below(4), 40));
            world.step();
        }
        // Killed: reads may not be older than what was answered; cut off: than what was flushed. The world checks each.
        if seed % 2 == 0 {
            world.kill([true, true]).expect("both are IN");
        } else {
            world.crash([true, true]).expect("both are IN");
        }
        for _ in 0..rng.below(20) {
            world.step();
        }
        world.read(range(0, 40));
        world.settle();
        world.read(range(0, 40));
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
    }
}

/// A world whose A was filled from B, so that the record pins B.
fn pinned_to_b(seed: u64, missed: BlockRange) -> World {
    let mut world = World::new(seed);
    world.settle();
    world.disks[0].dead = true;
    world.write(missed);
    world.settle();
    world.bring_back(Slot::A);
    world.settle();
    world
}

#[test]
fn case_42_the_fast_leg_is_pinned_durably_before_anything_is_answered_by_it_alone() {
    for steps in 0..80 {
        let mut world = pinned_to_b(steps, range(0, 8));
        assert!(world.healthy());
        world.command(MOSTLY_B);
        for _ in 0..steps {
            let write = world.write(range(steps % 30, steps % 30 + 4));
            if let Some(slow) = write_on(&world, Slot::B, range(steps % 30, steps % 30 + 4)) {
                world.stuck.insert(slow);
            }
            world.step();
            if world.answers.contains_key(&write) && world.mirror.status().behind > 0 {
                break;
            }
        }
        let answered = world.mirror.status().behind > 0;
        world.kill([true, true]).expect("both are IN");
        world.read(range(0, 40));
        world.settle();
        world.assert_identical();
        assert!(answered || steps < 60, "nothing was ever behind");
    }
}

/// A world whose record pins B, the leg that will be said to be slow, and whose resync does not come to its end.
fn pinned_to_the_slow_leg(seed: u64) -> World {
    let mut world = pinned_to_b(seed, range(5000, 5008));
    world.write(range(0, 1));
    world.write(range(5000, 5001));
    run_dry(&mut world);
    world.kill([true, true]).expect("both are IN");
    world.disks.iter_mut().for_each(|disk| disk.bad.extend([5001]));
    run_dry(&mut world);
    assert_ne!(world.mirror.status().sync, Sync::Idle);
    world
}

#[test]
fn case_42_nothing_is_behind_while_the_record_pins_the_slow_leg() {
    for seed in 0..20 {
        let mut world = pinned_to_the_slow_leg(seed);
        world.command(MOSTLY_B);
        run_dry(&mut world);
        let write = world.write(range(0, 8));
        world.stuck.insert(write_on(&world, Slot::B, range(0, 8)).expect("it is issued"));
        run_dry(&mut world);
        let answered = world.answers.contains_key(&write);
        world.kill([true, true]).expect("both are IN");
        world.disks.iter_mut().for_each(|disk| disk.bad.clear());
        world.read(range(0, 8));
        world.settle();
        world.assert_identical();
        assert!(!answered);
    }
}

/// B is pinned. The legs say that A is, the witness would not: nobody knows which of the two would hold, and it is about to be said again.
pub(crate) fn pin_refused(seed: u64) -> World {
    let mut world = pinned_to_b(seed, range(0, 8));
    world.write(range(0, 1));
    run_dry(&mut world);
    world.witness_fails = 6;
    world.command(MOSTLY_B);
    while world.witness_fails > 0 {
        assert!(world.step() || world.tick(), "it never ended");
    }
    world
}

#[test]
fn case_42_nothing_is_behind_while_two_records_may_hold_that_pin_different_legs() {
    for seed in 0..8 {
        let mut world = pin_refused(seed);
        world.stuck.extend(world.in_flight().into_iter().map(|(io, ..)| io));
        assert!(!world.stuck.is_empty(), "it does not say again what holds");
        world.command(Request::WriteMostly { slot: Some(Slot::A), behind: true });
        let write = world.write(range(0, 8));
        world.stuck.insert(write_on(&world, Slot::A, range(0, 8)).expect("it is issued"));
        run_dry(&mut world);
        let answered = world.answers.contains_key(&write) || world.mirror.status().write_behind;
        if seed % 2 == 0 {
            world.witness = vec![0; 8192];
            world.kill([true, true]).expect("both are IN");
            world.read(range(0, 8));
        }
        world.stuck.clear();
        world.settle();
        world.assert_identical();
        assert!(!answered);
        if seed % 2 == 1 {
            assert!(world.mirror.status().write_behind, "it is not behind again when that is settled");
        }
    }
}

#[test]
fn rule_32_the_pin_does_not_change_while_writes_are_under_way_and_new_ones_wait_for_it() {
    for seed in 0..20 {
        let mut world = behind(seed);
        let epoch = world.mirror.status().epoch;
        let first = world.write(range(0, 8));
        for slot in Slot::BOTH {
            world.stuck.insert(write_on(&world, slot, range(0, 8)).unwrap());
        }
        // A is pinned: with A as the slow leg that has to change.
        world.command(Request::WriteMostly { slot: Some(Slot::A), behind: true });
        let second = world.write(range(20, 24));
        run_dry(&mut world);
        assert!(world.mirror.status().epoch == epoch && !world.mirror.status().write_behind);
        assert!(write_on(&world, Slot::A, range(20, 24)).is_none(), "it would be waited for too");
        world.stuck.clear();
        run_dry(&mut world);
        assert!(world.mirror.status().epoch > epoch && world.mirror.status().write_behind);
        assert_eq!([world.answers[&first], world.answers[&second]], [Ok(()); 2]);
    }
}

#[test]
fn rule_32_held_writes_go_on_when_the_pin_does_not_come_about() {
    for (seed, slot) in (0..60).flat_map(|seed| Slot::BOTH.map(|slot| (seed, slot))) {
        let mut world = behind(seed);
        let mut writes = vec![world.write(range(0, 8))];
        world.stuck.insert(write_on(&world, slot, range(0, 8)).unwrap());
        world.command(Request::WriteMostly { slot: Some(Slot::A), behind: true });
        writes.push(world.write(range(4, 12)));
        writes.push(world.write(range(30, 34)));
        for _ in 0..seed % 14 {
            world.step();
        }
        match seed % 4 {
            0 => world.disks[slot.index()].dead = true,
            1 => world.witness_fails = 7,
            2 => drop(world.command(Request::WriteMostly { slot: None, behind: false })),
            _ => drop(world.command(Request::Detach(slot))),
        }
        writes.push(world.write(range(20, 24)));
        if seed % 4 == 2 {
            run_dry(&mut world);
            assert_eq!(world.answers.get(&writes[2]), Some(&Ok(())), "it is held for nothing");
        }
        world.stuck.clear();
        world.settle();
        assert!(writes.iter().all(|write| world.answers[write] == Ok(())), "seed {seed}: {}", world.trace());
    }
}

#[test]
fn case_42_what_was_answered_lands_on_the_slow_leg_before_the_fast_one_is_out_and_before_anybody_reads_it_there() {
    for seed in 0..40 {
        let mut world = behind(seed);
        let (_, slow) = stuck(&mut world, range(0, 8));
        world.disks[0].dead = true;
        let other = world.write(range(20, 24));
        let reads = [world.read(range(2, 3)), world.read(range(0, 30))];
        run_dry(&mut world);
        assert_eq!(world.mirror.status().legs[0].state, LegState::Out, "it is on its way out");
        assert!(!world.notices.contains(&Notice::LegOut { slot: Slot::A }), "OUT is durable, and what was answered is only in memory");
        assert!(reads.iter().all(|read| !world.answers.contains_key(read)) && !world.answers.contains_key(&other));
        if seed % 4 == 0 {
            // Both die now: that is what may be lost, and nothing else happens.
            world.crash([false, true]).expect("B counts");
            world.settle();
            assert!([Ok(0), Ok(1), Ok(2)].contains(&world.read_now(2)));
            continue;
        }
        world.stuck.remove(&slow);
        run_dry(&mut world);
        assert!(world.notices.contains(&Notice::LegOut { slot: Slot::A }));
        assert_eq!([world.answers[&reads[0]], world.answers[&reads[1]], world.answers[&other]], [Ok(()); 3]);
        assert!(holds(&world, Slot::B, range(0, 8), 2));
        if seed % 4 == 1 {
            world.kill([false, true]).expect("B counts");
            run_dry(&mut world);
        }
        assert_eq!(world.read_now(2), Ok(2));
        world.bring_back(Slot::A);
        world.settle();
        world.assert_identical();
    }
}

#[test]
fn case_42_a_block_that_the_fast_leg_cannot_read_is_read_from_the_slow_one_when_it_is_there_and_repaired() {
    for seed in 0..20 {
        let mut world = behind(seed);
        let (_, slow) = stuck(&mut world, range(0, 8));
        world.disks[0].bad.insert(3);
        let read = world.read(range(0, 8));
        run_dry(&mut world);
        assert!(!world.answers.contains_key(&read));
        world.stuck.remove(&slow);
        world.settle();
        assert_eq!((world.answers[&read], world.read_now(3)), (Ok(()), Ok(2)));
        world.settle();
        assert!(world.healthy() && world.disks[0].bad.is_empty());
        world.assert_identical();
    }
}

#[test]
fn case_42_a_slow_leg_that_fails_what_was_answered_goes_out_whatever_it_says() {
    for (seed, errno) in (0..20).flat_map(|seed| [Errno::EIO, Errno::ENOSPC].map(|errno| (seed, errno))) {
        let mut world = behind(seed);
        let (_, slow) = stuck(&mut world, range(0, 8));
        world.stuck.remove(&slow);
        world.end(slow, Outcome::Failed(errno));
        let second = world.write(range(4, 12));
        for _ in 0..seed {
            world.step();
            let out = world.notices.contains(&Notice::LegOut { slot: Slot::B });
            assert!(out || !world.answers.contains_key(&second), "answered before OUT is durable");
        }
        assert!(world.notices.contains(&Notice::LegFailed { slot: Slot::B, error: errno }));
        assert_eq!(world.read_now(2), Ok(2));
        world.settle();
        assert!(world.answers[&second] == Ok(()) && holds(&world, Slot::A, range(0, 4), 2));
        assert!(world.notices.contains(&Notice::LegOut { slot: Slot::B }));
        world.kill([true, true]).expect("A counts");
        run_dry(&mut world);
        assert_eq!((world.read_now(2), world.read_now(5)), (Ok(2), Ok(3)));
        world.bring_back(Slot::B);
        world.settle();
        world.assert_identical();
    }
}

#[test]
fn rule_27_a_slow_leg_that_hangs_with_writes_behind_goes_out_by_its_deadline() {
    let mut world = behind(2);
    world.disks[1].hung = true;
    let writes: Vec<Tag> = (0..4).map(|i| world.write(range(4 * i, 4 * i + 4))).collect();
    let flush = world.flush();
    while !world.answers.contains_key(&flush) {
        assert!(world.step() || world.tick(), "it never ended");
    }
    assert!(writes.iter().all(|write| world.answers[write] == Ok(())));
    assert_eq!(world.answers[&flush], Ok(()));
    assert!(world.notices.contains(&Notice::LegOut { slot: Slot::B }));
}

#[test]
fn case_42_when_both_legs_fail_what_was_answered_nobody_is_told_otherwise() {
    for seed in 0..20 {
        let mut world = behind(seed);
        let (_, slow) = stuck(&mut world, range(0, 8));
        world.disks[0].dead = true;
        // In half of them the mirror has given up by then: B cannot say that A is OUT.
        world.disks[1].meta_fails = seed % 2 == 1;
        let other = world.write(range(20, 24));
        let read = world.read(range(0, 8));
        for _ in 0..seed {
            world.step();
        }
        let flush = world.flush();
        run_dry(&mut world);
        world.stuck.remove(&slow);
        world.end(slow, Outcome::Failed(Errno::EIO));
        world.settle();
        assert!(world.notices.contains(&Notice::BlocksLost { range: range(0, 8) }));
        assert_eq!([world.answers[&read], world.answers[&flush], world.answers[&other]], [Err(Errno::EIO); 3]);
        assert_eq!((world.read_now(2), world.read_now(9)), (Err(Errno::EIO), Ok(0)));
        let again = world.flush();
        assert_eq!(world.answers[&again], Err(Errno::EIO), "it is sticky");
    }
}

#[test]
fn rule_32_what_was_said_of_the_legs_is_forgotten_when_another_leg_comes() {
    let mut world = behind(1);
    world.disks[1].dead = true;
    world.write(range(0, 8));
    world.settle();
    world.disks[1].dead = false;
    world.disks[1].meta = format::spare_leg(lockstep_sim::VOLUME, LegId([77; 16]), lockstep_sim::BLOCKS)[..65536 + 8192].to_vec();
    (world.disks[1].durable, world.disks[1].cache) = Default::default();
    world.command(Request::Attach { slot: Slot::B, leg: LegId([77; 16]), fill: lockstep_core::io::Fill::Everything, newest: 0 });
    world.settle();
    let status = world.mirror.status();
    assert!(world.healthy() && status.write_mostly.is_none() && !status.write_behind);
    world.assert_identical();
}

#[test]
fn rule_25_a_mirror_that_is_stopped_does_not_change_its_pin() {
    for steps in 0..30 {
        let mut world = World::new(steps);
        world.settle();
        world.write(range(0, 8));
        world.write(range(0, 8));
        for _ in 0..steps {
            world.step();
        }
        world.command(Request::WriteMostly { slot: Some(Slot::A), behind: true });
        let stop = world.command(Request::Stop);
        while !world.answers.contains_key(&stop) {
            assert!(world.step() || world.tick(), "it is never stopped: {}", world.trace());
        }
        assert!(world.in_flight().is_empty(), "{:?} after the stop: {}", world.in_flight(), world.trace());
    }
}

#[test]
fn rule_21_the_pin_does_not_change_before_what_was_made_equal_is_durable() {
    for seed in 0..200 {
        let mut world = World::new(seed);
        world.settle();
        cut_off(&mut world, 5, [1, 2]);
        assert_eq!(world.read_now(5), Ok(1));
        world.command(Request::WriteMostly { slot: Some(Slot::A), behind: true });
        for _ in 0..seed % 40 {
            world.step();
        }
        world.crash([true, true]).unwrap();
        assert_eq!(world.read_now(5), Ok(1), "seed {seed}: it never was, and comes back");
        world.settle();
        world.assert_identical();
    }
}

/// A is to be the slow leg, and the flush for that is stuck on a leg, with a write held meanwhile.
fn stuck_flush(world: &mut World, slot: Slot) -> Tag {
    world.command(Request::WriteMostly { slot: Some(Slot::A), behind: true });
    while in_flight_on(world, slot, |op| *op == LegOp::Flush).is_none() {
        assert!(world.step(), "no flush");
    }
    world.stuck.extend(in_flight_on(world, slot, |op| *op == LegOp::Flush));
    let held = world.write(range(20, 24));
    run_dry(world);
    assert!(!world.answers.contains_key(&held), "it is not held");
    held
}

#[test]
fn rule_32_held_writes_go_on_when_the_flush_before_the_pin_fails_or_is_not_wanted_any_more() {
    for (seed, slot) in (0..40).flat_map(|seed| Slot::BOTH.map(|slot| (seed, slot))) {
        let mut world = behind(seed);
        world.settle();
        let held = stuck_flush(&mut world, slot);
        match seed % 4 {
            0 => world.disks[slot.index()].dead = true,
            1 => drop(world.command(Request::Detach(slot))),
            2 => drop(world.command(Request::WriteMostly { slot: None, behind: false })),
            _ => {}
        }
        if seed % 4 == 2 {
            run_dry(&mut world);
            assert_eq!(world.answers.get(&held), Some(&Ok(())), "it is held for nothing");
        }
        world.stuck.clear();
        run_dry(&mut world);
        assert_eq!(world.answers.get(&held), Some(&Ok(())), "seed {seed}");
        assert_eq!(world.mirror.status().write_behind, seed % 4 == 3, "seed {seed}");
    }
}

#[test]
fn rule_21_a_flush_for_an_earlier_attempt_does_not_let_the_pin_change() {
    let mut world = behind(1);
    world.settle();
    let held = stuck_flush(&mut world, Slot::B);
    let epoch = world.mirror.status().epoch;
    world.command(Request::WriteMostly { slot: None, behind: false });
    run_dry(&mut world);
    assert_eq!(world.answers.get(&held), Some(&Ok(())), "it is held for nothing");
    // What was written since is not in the flush that is stuck.
    world.command(Request::WriteMostly { slot: Some(Slot::A), behind: true });
    run_dry(&mut world);
    let first = std::mem::take(&mut world.stuck);
    world.finish(*first.first().expect("the flush"));
    world.stuck = world.in_flight().iter().filter(|(_, _, op)| *op == LegOp::Flush).map(|(io, ..)| *io).collect();
    assert!(!world.stuck.is_empty(), "no flush of its own");
    run_dry(&mut world);
    assert_eq!(world.mirror.status().epoch, epoch);
    world.stuck.clear();
    run_dry(&mut world);
    assert!(world.mirror.status().epoch > epoch && world.mirror.status().write_behind);
}
