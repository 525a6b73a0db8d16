//! A crash, or a disk that goes, at every moment (mirror rules 17 to 24).

use std::{
    collections::BTreeSet,
    hash::{DefaultHasher, Hash, Hasher},
};

use lockstep_core::{
    format,
    io::{Fill, LegOp, Notice, Outcome, Request},
    status::{LegState, Sync},
    units::{Errno, Slot},
};
use lockstep_sim::{Disk, VOLUME, World};

use crate::{
    assert_equal_again, assert_readable, assert_resynced, flushed, in_flight_on, miss_and_return, power_cuts, range, run_dry, small,
    through, warm,
};

#[test]
fn case_18_after_a_power_cut_before_the_flush_each_block_is_old_or_new_and_the_legs_are_equal() {
    let mut world = flushed(1);
    let write = world.write(range(2, 6));
    let mut answered = 0;
    world.in_every_order(&mut |world| {
        answered += usize::from(world.answers.contains_key(&write));
        power_cuts(world, 12).for_each(|after| assert_resynced(after, 2, &[2, 3]));
    });
    assert!(answered > 0);
}

#[test]
fn case_20_a_crash_between_the_bit_and_the_data_costs_a_resync_and_nothing_else() {
    let mut world = World::new(1);
    run_dry(&mut world);
    world.write(range(5000, 5004));
    let mut between = 0;
    world.in_every_order(&mut |world| {
        let bits = world.disks.iter().all(|disk| disk.dirty_regions().contains(&1));
        let data = world.disks.iter().any(|disk| disk.read(5000) != 0);
        between += usize::from(bits && !data);
        assert!(bits || !data, "data before its bit");
        power_cuts(world, 12).for_each(|after| assert_resynced(after, 5000, &[0, 1]));
    });
    assert!(between > 0);
}

#[test]
fn case_22_what_either_copy_of_the_bitmap_calls_dirty_is_resynced() {
    for (on_a, on_b) in [(0b001, 0b010), (0b010, 0b001), (0b011, 0b100), (0b100, 0b100)] {
        let mut world = flushed(1);
        let blocks = [3, 5000, 8195];
        for at in blocks {
            world.write(range(at, at + 1));
        }
        run_dry(&mut world);
        let stop = world.command(Request::Stop);
        world.settle();
        assert_eq!(world.answers[&stop], Ok(()));
        for (disk, bits) in world.disks.iter_mut().zip([on_a, on_b]) {
            let slots = (0..2).filter_map(|slot| {
                let mut one = disk.meta.clone();
                one[65536 + (1 - slot) * 4096..][..4096].fill(0);
                format::bitmap_page(&one, VOLUME, 0).map(|page| page.sequence)
            });
            let newest = slots.max().expect("a page");
            let page = format::encode_bitmap(VOLUME, newest + 1, &[bits]);
            disk.meta[65536..69632].copy_from_slice(page.as_slice());
        }
        // What B holds there is nothing that was ever written.
        world.disks[1].durable.extend(blocks.map(|block| (block, 1)));
        world.crash([true, true]).expect("both are IN");
        world.settle();
        for (region, block) in blocks.into_iter().enumerate() {
            let dirty = (on_a | on_b) >> region & 1 == 1;
            assert_eq!(world.disks[0].read(block) == world.disks[1].read(block), dirty, "region {region} of {on_a:b} and {on_b:b}");
        }
    }
}

/// A power cut has just come. Blocks that hold nothing which was ever written show which regions are made equal: those that either bitmap names. By leg, whether it alone names one.
fn assert_united(mut world: World) -> [bool; 2] {
    let dirty = [0, 1].map(|disk| world.disks[disk].dirty_regions());
    let planted = [9, 5009, 8200];
    for (disk, token) in world.disks.iter_mut().zip([98, 99]) {
        disk.durable.extend(planted.map(|block| (block, token)));
    }
    world.settle();
    assert!(world.healthy());
    for (region, block) in (0..).zip(planted) {
        let named = dirty.iter().any(|dirty| dirty.contains(&region));
        assert_eq!(world.disks[0].read(block) == world.disks[1].read(block), named, "region {region} of {dirty:?}: {}", world.trace());
    }
    [0, 1].map(|leg| !dirty[leg].is_subset(&dirty[1 - leg]))
}

#[test]
fn case_22_whatever_the_bitmaps_differ_by_after_a_power_cut_at_any_moment_and_another_in_the_assembly_what_either_names_is_resynced() {
    let mut world = flushed(1);
    while world.mirror.status().dirty_regions > 0 {
        assert!(world.step() || world.tick());
    }
    // The first region is being cleaned; it and two others are written.
    for at in [3, 5000, 8194] {
        world.write(range(at, at + 1));
    }
    let (mut alone, mut again) = ([0; 2], 0);
    let worlds = world.in_every_order(&mut |world| {
        for after in power_cuts(world, 4) {
            let by = assert_united(after.clone());
            alone = [0, 1].map(|leg| alone[leg] + usize::from(by[leg]));
            if by.contains(&true) {
                after.in_every_order_while(&mut |world| {
                    for after in power_cuts(world, 1) {
                        again += 1;
                        assert_united(after);
                    }
                    !world.mirror.status().ready
                });
            }
        }
    });
    assert!(worlds > 20 && alone.iter().all(|times| *times > 4) && again > 150, "{worlds} {alone:?} {again}");
}

#[test]
fn case_23_a_resync_that_is_cut_off_again_and_again_goes_on_and_ends_equal() {
    let mut cut_off = 0;
    for seed in 0..80 {
        let mut world = flushed(seed);
        for at in [0, 300, 5000, 8190] {
            world.write(range(at, at + 4));
        }
        (0..seed % 9).for_each(|_| _ = world.step());
        for cut in 0..6 {
            world.crash([true, true]).expect("both are IN");
            let found = [0, 300, 5000, 8190].map(|block| world.read_now(block));
            (0..(seed + cut) % 13).for_each(|_| _ = world.step());
            cut_off += usize::from(world.mirror.status().sync == Sync::Resync);
            for (block, found) in [0, 300, 5000, 8190].into_iter().zip(found) {
                assert_eq!(world.read_now(block), found, "a read changed: {}", world.trace());
            }
        }
        world.settle();
        assert!(world.healthy() && world.mirror.status().dirty_regions == 0);
        world.assert_identical();
    }
    assert!(cut_off > 60, "{cut_off}");
}

#[test]
fn case_31_metadata_that_a_power_cut_tears_at_any_moment_in_any_way_loses_nothing_that_was_durable() {
    let phases: [fn(&mut World); 6] = [
        |world| {
            world.write_fua(range(2, 4));
            world.write(range(0, 2));
        },
        |world| _ = world.flush(),
        |world| {
            world.disks[1].dead = true;
            world.write_fua(range(3, 6));
        },
        |world| _ = world.bring_back(Slot::B).expect("it has a place"),
        |world| _ = world.command(Request::Stop),
        |world| world.crash([true, true]).expect("both are IN"),
    ];
    let (mut parts, mut outcomes) = ([0; 6], [0; 6]);
    through(small(64), &phases, &mut |world, phase| {
        for io in world.movable() {
            let mut seen = BTreeSet::new();
            for mut after in world.torn(io) {
                parts[phase] += 1;
                after.disks.iter_mut().for_each(|disk| disk.dead = false);
                after.crash([true, true]).unwrap_or_else(|refusal| panic!("{refusal}: {}", world.trace()));
                let mut outcome = DefaultHasher::new();
                after.mirror.hash(&mut outcome);
                if seen.insert(outcome.finish()) {
                    outcomes[phase] += 1;
                    assert_readable(&mut after, range(0, 8));
                    assert_equal_again(&mut after);
                }
            }
        }
    });
    for phase in [0, 2, 3, 4, 5] {
        assert!(parts[phase] >= 8 && outcomes[phase] >= 5, "{parts:?} {outcomes:?}");
    }
}

#[test]
fn case_45_in_every_order_a_write_to_a_region_whose_clear_is_in_flight_finds_it_dirty_after_a_power_cut() {
    let mut world = flushed(1);
    while world.mirror.status().dirty_regions > 0 {
        assert!(world.step() || world.tick());
    }
    assert!(world.disks.iter().all(|disk| disk.dirty_regions().contains(&0)), "the clear is in flight");
    let write = world.write(range(2, 6));
    let (mut cleared, mut answered) = (0, 0);
    world.in_every_order(&mut |world| {
        let data = |disk: &Disk| disk.read(2) == 3;
        let dirty = world.disks.iter().all(|disk| disk.dirty_regions().contains(&0));
        assert!(dirty || !world.disks.iter().any(data), "data in a region that is clean on disk: {}", world.trace());
        cleared += usize::from(!dirty);
        answered += usize::from(world.answers.contains_key(&write));
        power_cuts(world, 8).for_each(|after| assert_resynced(after, 2, &[2, 3]));
    });
    assert!(cleared > 0 && answered > 0);
}

#[test]
fn case_54_in_every_order_a_clean_stop_that_was_answered_leaves_nothing_to_resync_and_one_that_was_cut_off_only_that() {
    let mut world = flushed(1);
    world.write(range(2, 6));
    let stop = world.command(Request::Stop);
    let mut stopped = 0;
    world.in_every_order(&mut |world| {
        let answered = world.answers.get(&stop);
        assert!(answered.is_none_or(Result::is_ok));
        stopped += usize::from(answered.is_some());
        for after in power_cuts(world, 8) {
            if answered.is_some() {
                assert_eq!(after.mirror.status().dirty_regions, 0, "{}", world.trace());
                assert_resynced(after, 2, &[3]);
            } else {
                assert_resynced(after, 2, &[2, 3]);
            }
        }
        assert!(answered.is_some() || !world.movable().is_empty(), "it never ends");
    });
    assert!(stopped > 0);
}

#[test]
fn case_25_what_one_leg_cannot_read_in_a_resync_comes_from_the_other_and_what_neither_can_stays_dirty_and_is_reported() {
    for (bad_on_a, bad_on_b) in [(true, false), (false, true), (true, true)] {
        for seed in 0..20 {
            let mut world = flushed(seed);
            world.write(range(2, 6));
            world.step();
            for (disk, bad) in world.disks.iter_mut().zip([bad_on_a, bad_on_b]) {
                disk.bad.extend(bad.then_some(4));
            }
            world.crash([true, true]).expect("both are IN");
            while world.mirror.status().sync != Sync::Idle || !world.mirror.status().ready {
                if !world.step() {
                    break;
                }
            }
            let both = bad_on_a && bad_on_b;
            assert_eq!(world.notices.contains(&Notice::Unreadable { range: range(4, 5) }), both, "{:?}", world.notices);
            assert_eq!(world.mirror.status().legs.map(|leg| leg.state), [LegState::In; 2], "nobody goes OUT for it");
            if both {
                // Whatever else is idle has been cleaned by then.
                for _ in 0..30 {
                    world.tick();
                    run_dry(&mut world);
                }
                assert!(world.disks.iter().all(|disk| disk.dirty_regions().contains(&0)), "it is forgotten");
                assert_eq!(world.read_now(4), Err(Errno::EIO));
                // Until it is overwritten.
                world.write(range(4, 5));
                run_dry(&mut world);
                assert_eq!(world.read_now(4), Ok(4));
                world.crash([true, true]).expect("both are IN");
            }
            assert!(world.read_now(3).is_ok_and(|found| [2, 3].contains(&found)));
            world.settle();
            assert!(world.healthy());
            world.assert_identical();
        }
    }
}

#[test]
fn case_44_a_leg_whose_place_was_filled_by_another_one_meanwhile_is_never_given_only_its_dirty_regions() {
    for crash in [false, true] {
        let mut world = flushed(1);
        let old = |world: &World| world.disks[1].clone();
        world.disks[1].dead = true;
        world.write(range(0, 4));
        world.settle();
        let out = old(&world);
        world.disks[1].dead = false;
        // C is filled and IN; the bits are clean; then C misses something.
        world.replace(Slot::B);
        world.settle();
        assert!(world.healthy() && world.mirror.status().dirty_regions == 0);
        let filled = old(&world);
        world.write(range(5000, 5004));
        world.settle();
        world.disks[1].dead = true;
        world.write(range(8190, 8194));
        world.settle();
        // B returns.
        world.disks[1] = out;
        world.disks[1].dead = false;
        if crash {
            world.crash([true, true]).expect("A is IN");
            run_dry(&mut world);
            assert_eq!(world.mirror.status().legs.map(|leg| leg.state), [LegState::In, LegState::Out]);
        }
        let back = world.mirror.readmission(&world.disks[1].meta);
        assert!(back.is_none_or(|(_, fill)| fill == Fill::Everything), "{back:?}");
        // C returns: it missed one region.
        world.disks[1] = filled;
        let back = world.mirror.readmission(&world.disks[1].meta);
        assert_eq!(back, Some((Slot::B, Fill::DirtyRegions)));
        world.bring_back(Slot::B);
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
    }
}

/// This disk is gone at this moment, for good or until later; everything must end, and what the other leg has is served.
fn gone(world: &World, slot: Slot) -> World {
    let mut world = world.clone();
    world.disks[slot.index()].dead = true;
    world.write(range(6, 8));
    world.read(range(0, 8));
    world.settle();
    world
}

/// It comes back, and both are equal again.
fn back(mut world: World, slot: Slot) {
    let write = world.write(range(0, 2));
    world.settle();
    assert_eq!(world.answers[&write], Ok(()), "the other one serves");
    world.bring_back(slot).unwrap_or_else(|| panic!("{slot:?} is refused: {}", world.trace()));
    world.settle();
    assert!(world.healthy(), "{:?}", world.mirror.status());
    world.read(range(0, 8));
    world.settle();
    world.assert_identical();
}

#[test]
fn case_53_a_leg_that_goes_at_any_moment_of_assembly_is_out_and_the_other_one_serves() {
    let mut world = flushed(1);
    world.write(range(2, 6));
    world.step();
    for crashed in power_cuts(&world, 2) {
        let worlds = crashed.in_every_order_while(&mut |world| {
            for slot in Slot::BOTH {
                back(gone(world, slot), slot);
            }
            !world.mirror.status().ready
        });
        assert!(worlds > 15, "{worlds}");
    }
}

#[test]
fn case_53_a_leg_that_goes_at_any_moment_of_taking_the_other_out_costs_no_answered_write() {
    let mut world = flushed(1);
    world.write(range(2, 6));
    world.disks[1].dead = true;
    world.flush();
    let worlds = world.in_every_order(&mut |world| {
        let mut lost = gone(world, Slot::A);
        lost.disks.iter_mut().for_each(|disk| disk.dead = false);
        for present in [[true, true], [true, false], [false, true]] {
            for killed in [false, true] {
                let mut after = lost.clone();
                // The oracle of a read: not older than what was answered, or after a power cut what a flush covered.
                let assembled = if killed { after.kill(present) } else { after.crash(present) };
                match assembled {
                    Ok(()) => {
                        after.read(range(0, 8));
                        after.settle();
                    }
                    Err(refusal) => assert_ne!(present, [true, true], "{refusal}: {}", lost.trace()),
                }
            }
        }
    });
    assert!(worlds > 5, "{worlds}");
}

#[test]
fn case_53_a_leg_that_goes_at_any_moment_of_its_readmission_is_out_again_and_without_its_source_nothing_stale_is_served() {
    let mut moments = 0;
    for seed in 0..5 {
        let mut world = warm(seed);
        miss_and_return(&mut world);
        while !world.healthy() && world.step() {
            moments += 1;
            back(gone(&world, Slot::B), Slot::B);
            // The source is gone: the oracle of every read is that it is not older than what was answered.
            let mut alone = gone(&world, Slot::A);
            let lost = |notice: &Notice| matches!(notice, Notice::BlocksLost { .. });
            assert!(!alone.notices.iter().any(lost), "a disk that is gone has lost no blocks: it may come back");
            if alone.mirror.status().legs[1].state == LegState::In {
                back(alone, Slot::A);
                continue;
            }
            alone.disks[0].dead = false;
            alone.kill([true, true]).unwrap_or_else(|refusal| panic!("{refusal}: {}", world.trace()));
            alone.read(range(0, 8));
            alone.settle();
            if alone.mirror.status().legs[1].state == LegState::Out {
                alone.bring_back(Slot::B).expect("it has a place");
                alone.settle();
            }
            assert!(alone.healthy());
            alone.assert_identical();
        }
    }
    assert!(moments > 60, "{moments}");
}

#[test]
fn rule_21_where_the_legs_may_differ_only_the_block_that_the_pinned_leg_cannot_read_comes_from_the_other_one() {
    let mut differed = 0;
    for seed in 0..20 {
        let mut world = flushed(seed);
        world.write(range(5000, 5004));
        run_dry(&mut world);
        world.flush();
        run_dry(&mut world);
        world.write(range(5000, 5004));
        let on_a = in_flight_on(&world, Slot::A, |op| matches!(op, LegOp::Write { .. })).expect("it was issued");
        world.finish(on_a);
        world.kill([true, true]).expect("both are IN");
        // The resync of the first region does not come to an end.
        loop {
            let copies = world.in_flight().into_iter().filter(|(.., op)| !matches!(op, LegOp::WriteMeta { .. }));
            world.stuck.extend(copies.map(|(io, ..)| io));
            if !world.step() {
                break;
            }
        }
        assert_eq!(world.mirror.status().sync, Sync::Resync);
        differed += usize::from(world.disks[1].read(5001) != world.disks[0].read(5001));
        assert_eq!(world.read_now(5001), Ok(4));
        world.disks[0].bad.insert(5002);
        let both = world.read(range(5001, 5003));
        run_dry(&mut world);
        assert_eq!((world.answers[&both], world.found(both)), (Ok(()), Some(4)), "{}", world.trace());
        assert_eq!(world.read_now(5001), Ok(4));
        assert!(world.disks[0].bad.is_empty(), "it is repaired");
        world.stuck.clear();
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
        assert_eq!(world.disks[1].read(5001), 4);
    }
    assert!(differed > 4, "{differed}");
}

#[test]
fn rule_21_a_repair_that_was_asked_for_before_a_write_there_failed_on_both_legs_is_not_made() {
    let mut world = flushed(1);
    world.disks[0].bad.insert(3);
    let on_a = loop {
        let block = range(3, 5);
        world.read(block);
        if let Some(io) = in_flight_on(&world, Slot::A, |op| matches!(op, LegOp::Read { .. })) {
            break io;
        }
        run_dry(&mut world);
    };
    // Two writes come beside that read; the repair of what it could not read waits for both.
    world.write(range(3, 4));
    world.write(range(4, 5));
    let writes = world.in_flight().into_iter().filter(|(.., op)| matches!(op, LegOp::Write { .. }));
    let writes: Vec<_> = writes.map(|(io, slot, op)| (io, slot, matches!(op, LegOp::Write { range, .. } if range.start == 3))).collect();
    world.stuck.extend(writes.iter().map(|(io, ..)| *io));
    world.finish(on_a);
    run_dry(&mut world);
    // The first one lands on A, and both say that it failed.
    world.disks[0].cache.insert(3, 3);
    world.disks[0].bad.clear();
    for (io, ..) in writes.iter().filter(|(.., first)| *first) {
        world.end(*io, Outcome::Failed(Errno::EIO));
    }
    assert_eq!(world.read_now(3), Ok(3), "A is pinned");
    world.stuck.clear();
    run_dry(&mut world);
    assert_eq!(world.read_now(3), Ok(3), "what was read went back: {}", world.trace());
    world.settle();
    assert!(world.healthy());
    world.assert_identical();
    assert_eq!(world.disks[1].read(3), 3);
}
