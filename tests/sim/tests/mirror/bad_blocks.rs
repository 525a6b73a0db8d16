//! What no copy holds (mirror rule 22, the second half of case 25).
//!
//! That a stale or empty block is never read in place of a lost one is the world's own oracle of every read.

use std::collections::BTreeSet;

use lockstep_core::{
    assembly::Refusal,
    format::{self, MAX_BAD_RUNS},
    io::{LegOp, Notice, Outcome, Request},
    membership::MemberState,
    status::{LegState, Sync},
    units::{Errno, LegId, Slot},
};
use lockstep_sim::World;

use crate::{in_flight_on, miss_and_return, range, run_dry, warm, witnessed, writes_in_flight};

/// B is away, and A cannot read block 3, which was written meanwhile. B comes back: as it was, or blank.
fn rebuilding(seed: u64, blank: bool) -> World {
    let mut world = warm(seed);
    world.write(range(0, 8));
    world.flush();
    world.settle();
    world.disks[1].dead = true;
    world.write(range(0, 8));
    world.settle();
    world.flush();
    world.settle();
    world.disks[0].bad.insert(3);
    if blank {
        world.disks[1].meta.fill(0);
        world.disks[1].dead = false;
        world.replace(Slot::B);
    } else {
        world.bring_back(Slot::B);
    }
    world
}

/// After that rebuild.
fn lost(seed: u64) -> World {
    let mut world = rebuilding(seed, seed.is_multiple_of(2));
    world.settle();
    assert!(world.healthy(), "the rebuild has stopped");
    world
}

fn come_back(world: &mut World) {
    world.settle();
    if world.mirror.status().legs[1].state == LegState::Out {
        if world.bring_back(Slot::B).is_none() {
            world.replace(Slot::B);
        }
        world.settle();
    }
}

#[test]
fn case_25_an_unreadable_block_on_the_only_good_leg_does_not_stop_the_rebuild_and_reads_of_it_fail_until_it_is_overwritten() {
    for seed in 0..20 {
        let mut world = lost(seed);
        assert!(world.notices.contains(&Notice::BlocksLost { range: range(3, 4) }), "nobody was told");
        assert!(!world.notices.iter().any(|notice| matches!(notice, Notice::RebuildBlocked { .. })));
        assert_eq!(world.mirror.status().bad_blocks, 1);
        // That A can read it again by itself is no reason: it was EIO.
        if seed % 4 < 2 {
            world.disks[0].bad.clear();
        }
        for _ in 0..4 {
            assert_eq!(world.read_now(3), Err(Errno::EIO));
            let more = world.read(range(0, 8));
            world.settle();
            assert_eq!(world.answers[&more], Err(Errno::EIO), "a read that touches it");
            assert_eq!((world.read_now(2), world.read_now(4)), (Ok(3), Ok(3)), "its neighbours");
        }
        world.settle();
        world.assert_identical();
        let write = world.write(range(3, 4));
        world.settle();
        assert_eq!(world.answers[&write], Ok(()));
        for _ in 0..4 {
            assert_eq!(world.read_now(3), Ok(4));
        }
        assert!(world.disks.iter().all(|disk| disk.bad_blocks().is_empty()));
        assert_eq!(world.mirror.status().bad_blocks, 0);
        assert!(world.healthy());
        world.assert_identical();
    }
}

#[test]
fn rule_22_a_leg_is_in_only_when_the_list_is_durable_on_both_and_no_crash_before_shows_a_lost_block_as_data() {
    for seed in 0..200 {
        let mut world = rebuilding(seed, seed.is_multiple_of(2));
        for _ in 0..seed / 2 {
            if !world.step() {
                world.tick();
            }
            let record = format::witness(&world.witness).expect("a witness").0.record;
            if record.members.iter().all(|member| member.state == MemberState::In) {
                assert!(world.disks.iter().all(|disk| disk.bad_blocks() == [range(3, 4)]), "IN without the list");
            }
        }
        let present = [[true, true], [true, false], [false, true]][seed as usize % 3];
        let both = witnessed(&world, Slot::B) == MemberState::In;
        let started = world.crash(present);
        assert_eq!(started.is_ok(), present[0] || both);
        if started.is_err() {
            continue;
        }
        world.settle();
        // From A alone it may still be a read error, and nothing else: the write of it was flushed.
        assert!(world.read_now(3).is_err());
        assert_eq!(world.read_now(2), Ok(3));
        if present == [true, true] {
            come_back(&mut world);
            assert!(world.healthy());
            assert_eq!(world.disks[1].bad_blocks(), [range(3, 4)]);
            world.disks[0].dead = true;
            run_dry(&mut world);
            assert!(world.read_now(3).is_err());
        }
    }
}

#[test]
fn rule_22_a_write_over_a_lost_block_is_answered_when_the_data_and_then_the_list_without_it_are_durable_on_both_legs() {
    for seed in 0..300 {
        let mut world = lost(seed);
        let token = [4, 4, 0][seed as usize % 3];
        let write = match seed % 3 {
            0 => world.write(range(2, 5)),
            1 => world.write_fua(range(3, 4)),
            _ => world.zero(range(0, 8)),
        };
        for _ in 0..seed / 6 {
            world.step();
            for disk in &world.disks {
                let listed = disk.bad_blocks() == [range(3, 4)];
                assert!(listed || world.disks.iter().all(|disk| disk.durable.get(&3) == Some(&token)), "off the list, and not durable");
                assert!(!world.answers.contains_key(&write) || !listed, "answered, and still on a list");
            }
        }
        let answered = world.answers.contains_key(&write);
        world.crash([[true, true], [true, false], [false, true]][seed as usize / 3 % 3]).expect("both were IN");
        world.settle();
        let found = world.read_now(3);
        assert!(found == Ok(token) || !answered && found.is_err(), "{found:?}, answered: {answered}");
        world.settle();
        if world.healthy() {
            world.assert_identical();
        }
    }
}

#[test]
fn rule_22_a_write_over_a_lost_block_that_one_leg_misses_takes_it_off_the_list_and_both_legs_fail_leaves_it_there() {
    for seed in 0..40 {
        let mut world = lost(seed);
        let victims = [[false, true], [true, false], [true, true]][seed as usize % 3];
        let write = world.write(range(0, 8));
        while writes_in_flight(&world) < 2 {
            assert!(world.step());
        }
        for slot in Slot::BOTH.into_iter().filter(|slot| victims[slot.index()]) {
            while let Some(io) = in_flight_on(&world, slot, |op| matches!(op, LegOp::Write { .. })) {
                world.end(io, Outcome::Failed(Errno::EIO));
            }
        }
        world.settle();
        if victims == [true, true] {
            assert_eq!(world.answers[&write], Err(Errno::EIO));
            assert!(world.healthy());
            assert_eq!(world.read_now(3), Err(Errno::EIO));
            continue;
        }
        assert_eq!(world.answers[&write], Ok(()));
        assert_eq!(world.read_now(3), Ok(4));
        // The leg that missed it has the old list; it is of no account.
        let slot = if victims[0] { Slot::A } else { Slot::B };
        assert_eq!(world.disks[slot.index()].bad_blocks(), [range(3, 4)]);
        world.bring_back(slot);
        for _ in 0..seed / 3 {
            world.step();
        }
        if seed % 2 == 0 {
            world.flush();
            world.crash([true, true]).expect("both are there");
            world.settle();
            assert_eq!(world.read_now(3), Ok(4), "the list of a leg that is being filled counts");
            if world.mirror.status().legs[slot.index()].state == LegState::Out {
                world.bring_back(slot);
            }
        }
        world.settle();
        assert!(world.healthy() && world.disks[slot.index()].bad_blocks().is_empty());
        world.assert_identical();
        world.disks[slot.other().index()].dead = true;
        assert_eq!(world.read_now(3), Ok(4));
    }
}

#[test]
fn rule_22_no_copy_takes_a_lost_block_for_a_valid_one() {
    // Resync: both legs cannot read it, which would stop it. Rebuild the other way: B holds anything there. Mending: what is full refuses.
    for seed in 0..30 {
        let mut world = lost(seed);
        world.write(range(0, 2));
        run_dry(&mut world);
        world.disks.iter_mut().for_each(|disk| disk.bad.extend([3]));
        world.crash([true, true]).expect("both are IN");
        world.settle();
        assert!(world.healthy());
        assert_eq!(world.read_now(3), Err(Errno::EIO));
        world.disks[0].full = true;
        let write = world.write(range(0, 8));
        world.settle();
        world.disks[0].full = false;
        world.settle();
        assert_eq!(world.answers[&write], Err(Errno::ENOSPC));
        assert!(world.healthy(), "{:?}", world.mirror.status());
        assert_eq!(world.read_now(3), Err(Errno::EIO));
        world.settle();
        world.assert_identical();

        world.disks.iter_mut().for_each(|disk| disk.bad.clear());
        world.disks[0].dead = true;
        world.write(range(0, 2));
        world.settle();
        world.disks[0].dead = false;
        world.replace(Slot::A);
        world.settle();
        assert!(world.healthy());
        assert_eq!((world.disks[0].bad_blocks(), world.disks[0].read(3)), (vec![range(3, 4)], 0), "what B had there was copied");
        world.disks[1].dead = true;
        run_dry(&mut world);
        assert!(world.read_now(3).is_err());
    }
}

#[test]
fn rule_22_a_read_that_was_on_its_way_when_its_block_was_listed_does_not_end_on_the_leg_that_was_filled() {
    for (stopping, leaving) in [(false, false), (true, false), (false, true)] {
        let mut world = rebuilding(1, true);
        let read = world.read(range(0, 8));
        let io = in_flight_on(&world, Slot::A, |op| matches!(op, LegOp::Read { .. })).expect("the read");
        world.stuck.insert(io);
        while !world.healthy() {
            assert!(world.step());
        }
        if stopping {
            world.command(Request::Stop);
        }
        if leaving {
            // Nothing is repaired there any more, and so nothing is read again after that.
            world.disks[0].dead = true;
            world.write(range(20, 21));
            while world.mirror.status().legs[0].state == LegState::In {
                assert!(world.step());
            }
        }
        world.end(io, Outcome::Failed(Errno::EIO));
        run_dry(&mut world);
        assert_eq!(world.answers[&read], Err(Errno::EIO));
    }
}

#[test]
fn rule_22_one_read_error_or_one_that_says_nothing_of_the_medium_makes_no_block_bad() {
    for (errors, errno) in [(1, Errno::EIO), (1000, Errno::ENODEV), (1000, Errno::ETIMEDOUT)] {
        let mut world = warm(3);
        world.disks[1].dead = true;
        world.write(range(3, 4));
        world.zero(range(0, 3));
        world.settle();
        world.bring_back(Slot::B);
        let mut left = errors;
        while !world.healthy() && world.mirror.next_deadline().is_some() {
            let failing = in_flight_on(&world, Slot::A, |op| matches!(op, LegOp::Read { range, .. } if range.start <= 3 && range.end > 3));
            if let Some(io) = failing.filter(|_| left > 0) {
                left -= 1;
                world.end(io, Outcome::Failed(errno));
            } else if !world.step() && world.notices.iter().any(|notice| matches!(notice, Notice::RebuildBlocked { .. })) {
                break;
            }
        }
        assert_eq!(world.mirror.status().bad_blocks, 0);
        assert_eq!(world.healthy(), errors == 1);
        for _ in 0..200 {
            world.tick();
            run_dry(&mut world);
        }
        assert!(world.healthy(), "tried again");
        assert_eq!(world.read_now(3), Ok(2));
    }
}

#[test]
fn rule_22_each_block_is_read_twice_before_it_counts_as_unreadable() {
    let mut world = warm(3);
    world.write(range(0, 8));
    world.settle();
    miss_and_return(&mut world);
    // The search for data and the first read of every block fail.
    let mut failed = BTreeSet::new();
    while !world.healthy() {
        let source = in_flight_on(&world, Slot::A, |op| match op {
            LegOp::NextData { .. } => true,
            LegOp::Read { range, .. } => !failed.contains(&range.start),
            _ => false,
        });
        match source {
            Some(io) => {
                if let Some((_, _, LegOp::Read { range, .. })) = world.in_flight().into_iter().find(|(other, ..)| *other == io) {
                    failed.extend(range.start..range.end);
                }
                world.end(io, Outcome::Failed(Errno::EIO));
            }
            None => assert!(world.step(), "the rebuild has stopped"),
        }
    }
    assert!((0..8).all(|block| failed.contains(&block)));
    assert_eq!(world.mirror.status().bad_blocks, 0);
    world.settle();
    world.assert_identical();
}

#[test]
fn rule_22_a_list_that_is_full_stops_the_rebuild_until_there_is_room() {
    let mut world = rebuilding(5, true);
    world.disks[1].dead = true;
    world.settle();
    world.write(range(0, 2000));
    world.settle();
    world.disks[0].bad = (0..2 * MAX_BAD_RUNS as u64 + 2).filter(|block| block % 2 == 0).collect();
    world.disks[1].dead = false;
    world.replace(Slot::B);
    for _ in 0..100 {
        run_dry(&mut world);
        world.tick();
    }
    assert_eq!(world.mirror.status().sync, Sync::Rebuild(lockstep_core::io::Fill::Everything), "it goes on trying");
    assert!(world.notices.iter().any(|notice| matches!(notice, Notice::RebuildBlocked { .. })));
    let listed = world.mirror.status().bad_blocks;
    assert!(listed > 100 && listed <= MAX_BAD_RUNS as u64, "{listed}");
    let write = world.write(range(0, 512));
    world.settle();
    assert_eq!(world.answers[&write], Ok(()));
    assert!(world.healthy());
    world.assert_identical();
}

#[test]
fn rule_22_what_is_written_into_a_full_list_is_not_acknowledged_before_there_is_room() {
    let mut world = rebuilding(5, true);
    world.disks[1].dead = true;
    world.settle();
    world.write(range(0, 2000));
    world.settle();
    // Runs of three with gaps of one: as many as there is room for.
    world.disks[0].bad = (0..4 * MAX_BAD_RUNS as u64).filter(|block| block % 4 != 3).collect();
    world.disks[1].dead = false;
    world.replace(Slot::B);
    world.settle();
    assert!(world.healthy());
    let split = world.write(range(1, 2));
    world.settle();
    assert_eq!((world.answers[&split], world.read_now(1)), (Err(Errno::EIO), Err(Errno::EIO)));
    let end = world.write(range(2, 3));
    let whole = world.write(range(4, 7));
    world.settle();
    assert_eq!((world.answers[&end], world.answers[&whole]), (Ok(()), Ok(())));
    let split = world.write(range(9, 10));
    world.settle();
    assert_eq!(world.answers[&split], Ok(()));
    assert!(world.read_now(9).is_ok() && world.read_now(8).is_err() && world.read_now(10).is_err());
}

#[test]
fn rule_22_at_assembly_the_union_of_the_valid_lists_counts_and_no_list_at_all_is_not_an_empty_one() {
    let damage = |world: &mut World, slot: Slot| world.disks[slot.index()].meta[32768 + 5..40960].fill(0xa5);
    for (a, b) in [(true, false), (false, true), (true, true)] {
        let mut world = lost(2);
        world.flush();
        world.settle();
        for (slot, _) in [(Slot::A, a), (Slot::B, b)].into_iter().filter(|(_, damaged)| *damaged) {
            damage(&mut world, slot);
        }
        let started = world.crash([true, true]);
        if a && b {
            assert_eq!(started, Err(Refusal::BadBlocksUnknown(LegId([1; 16]))));
            world.force = Some(LegId([1; 16]));
            world.crash([true, true]).expect("the operator insists");
            world.settle();
            assert!(world.mirror.status().bad_blocks == 0 && world.healthy());
            continue;
        }
        started.expect("the other leg's list is as good");
        world.settle();
        assert_eq!(world.read_now(3), Err(Errno::EIO));
        assert!(world.disks.iter().all(|disk| disk.bad_blocks() == [range(3, 4)]), "the damaged one is not written anew");
        world.disks[usize::from(!a)].dead = true;
        run_dry(&mut world);
        assert!(world.read_now(3).is_err());
    }
    // One leg alone, and its list is damaged.
    let mut world = lost(2);
    damage(&mut world, Slot::A);
    assert_eq!(world.crash([true, false]), Err(Refusal::BadBlocksUnknown(LegId([1; 16]))));
    // A list that only one leg has: the block was being overwritten, and that was not answered.
    let mut world = lost(2);
    let write = world.write(range(3, 4));
    while world.disks.iter().all(|disk| !disk.bad_blocks().is_empty()) {
        assert!(world.step());
    }
    assert!(!world.answers.contains_key(&write));
    world.kill([true, true]).expect("both are IN");
    world.settle();
    assert!(world.read_now(3).is_err() || world.disks.iter().all(|disk| disk.bad_blocks().is_empty()));
}

#[test]
fn rule_22_the_list_outlives_a_stop_and_a_growth() {
    let mut world = lost(4);
    let grow = world.command(Request::Grow { blocks: lockstep_sim::BLOCKS + 5000 });
    world.settle();
    let stop = world.command(Request::Stop);
    world.settle();
    assert_eq!((world.answers[&grow], world.answers[&stop]), (Ok(()), Ok(())));
    world.disks[0].bad.clear();
    world.crash([true, true]).expect("it was stopped");
    world.settle();
    assert_eq!(world.read_now(3), Err(Errno::EIO));
    let stop = world.command(Request::Stop);
    world.settle();
    assert_eq!(world.answers[&stop], Ok(()));
}

#[test]
fn rule_22_a_stop_waits_for_the_list_and_a_leg_that_hangs_takes_no_write_with_it() {
    for seed in 0..20 {
        let mut world = lost(seed);
        let write = world.write(range(3, 4));
        let stop = world.command(Request::Stop);
        if seed % 2 == 0 {
            while in_flight_on(&world, Slot::B, |op| matches!(op, LegOp::WriteMeta { offset, .. } if (32768..40960).contains(offset)))
                .is_none()
            {
                assert!(world.step(), "the list was never written");
            }
            world.disks[1].hung = true;
        }
        world.settle();
        assert_eq!((world.answers[&write], world.answers[&stop]), (Ok(()), Ok(())));
        assert!(world.disks[0].bad_blocks().is_empty());
    }
}

#[test]
fn rule_22_no_leg_becomes_in_while_the_list_is_on_its_way_to_either() {
    for seed in 0..40 {
        let mut world = rebuilding(seed, seed % 4 < 2);
        let slot = Slot::BOTH[seed as usize % 2];
        let list = |op: &LegOp| matches!(op, LegOp::WriteMeta { offset, .. } if (32768..40960).contains(offset));
        while world.step() {
            if let Some(io) = in_flight_on(&world, slot, list) {
                world.stuck.insert(io);
            }
        }
        assert!(!world.stuck.is_empty() && !world.healthy(), "IN without the list");
        world.stuck.clear();
        world.settle();
        assert!(world.healthy());
    }
}
