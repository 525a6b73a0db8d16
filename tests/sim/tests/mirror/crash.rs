//! Dirty bits, resync, rebuild (mirror rules 17 to 25).

use lockstep_core::{
    format::{self, REGION_BLOCKS},
    io::{Buffer, Fill, LegOp, Request},
    status::LegState,
    units::{Errno, LegId, Slot},
};
use lockstep_sim::{BLOCKS, Rng, VOLUME, World};

use crate::{flushed, in_flight_on, range, run_dry, warm, writes_in_flight};

#[test]
fn case_54_a_clean_stop_leaves_nothing_to_resync() {
    let mut world = warm(8);
    let stop = world.command(Request::Stop);
    world.settle();
    assert_eq!(world.answers[&stop], Ok(()));
    world.crash([true, true]).expect("both are IN");
    while world.step() {}
    assert_eq!(world.mirror.status().dirty_regions, 0);
}

#[test]
fn rule_19_a_bitmap_page_that_is_valid_on_no_leg_is_all_dirty() {
    for both in [false, true] {
        let mut world = warm(18);
        world.write(range(0, 16));
        world.flush();
        world.settle();
        let stop = world.command(Request::Stop);
        world.settle();
        assert_eq!(world.answers[&stop], Ok(()));
        // The first bitmap page's two slots; and what nothing but a resync of everything would find.
        let damaged = if both { 0..2 } else { 0..1 };
        world.disks[damaged].iter_mut().for_each(|disk| disk.meta[65536..73728].fill(0x5a));
        world.disks[1].durable.insert(7, 1);
        world.crash([true, true]).expect("both are IN");
        world.settle();
        let differs = world.disks[0].read(7) != world.disks[1].read(7);
        assert_eq!(differs, !both, "one valid page is enough to know that nothing is dirty");
    }
}

#[test]
fn rule_20_a_bitmap_that_began_anew_is_newer_than_what_a_leg_that_was_away_holds() {
    let damage = |world: &mut World| world.disks[1].meta[65536..73728].fill(0x5a);
    let lose_a = |world: &mut World| {
        world.disks[0].dead = true;
        world.write(range(0, 8));
        world.settle();
    };
    let mut healthy = 0;
    for steps in 0..120 {
        let mut world = warm(18);
        // Each time that A comes back what it is given is newer.
        for _ in 0..3 {
            lose_a(&mut world);
            world.bring_back(Slot::A);
            world.settle();
        }
        lose_a(&mut world);
        damage(&mut world);
        world.crash([false, true]).expect("B is IN");
        run_dry(&mut world);
        world.bring_back(Slot::A);
        for step in 0..steps {
            if step % 4 == 0 {
                world.write(range(0, 1));
            }
            world.step();
        }
        damage(&mut world);
        world.crash([true, true]).expect("B is IN");
        world.settle();
        if world.healthy() {
            healthy += 1;
            world.assert_identical();
        }
    }
    assert!(healthy > 60, "A came back {healthy} times only");
}

#[test]
fn case_31_a_torn_newest_metadata_slot_loses_nothing() {
    for slot in 0..2 {
        for torn in 0..2 {
            let mut world = warm(12 + slot as u64);
            world.write(range(0, 8));
            world.flush();
            world.settle();
            world.disks[slot].meta[torn * 4096 + 40..torn * 4096 + 600].fill(0xa5);
            world.crash([true, true]).expect("the other leg is whole");
            world.settle();
            assert_eq!(world.read_now(4), Ok(2));
        }
    }
}

#[test]
fn rule_17_data_waits_until_the_bit_is_durable_on_both_legs() {
    for first in Slot::BOTH {
        let mut world = World::new(1);
        run_dry(&mut world);
        world.write(range(5000, 5008));
        for slot in [first, first.other()] {
            assert_eq!(writes_in_flight(&world), 0, "data before its bit");
            let page = in_flight_on(&world, slot, |op| matches!(op, LegOp::WriteMeta { .. })).expect("the bitmap page");
            world.finish(page);
        }
        assert_eq!(writes_in_flight(&world), 2);
        assert!(world.disks.iter().all(|disk| disk.dirty_regions().contains(&1)));
    }
}

#[test]
fn case_21_no_bit_lands_clear_before_both_legs_hold_the_region_durably() {
    // The disks assert it whenever a bitmap page lands.
    for seed in 0..200 {
        let mut world = warm(seed);
        let mut rng = Rng(seed);
        for _ in 0..30 {
            if rng.once_in(3) {
                let start = rng.below(2) * 4096 + rng.below(8);
                world.write(range(start, start + 4));
            }
            for _ in 0..rng.below(9) {
                world.step();
            }
            world.tick();
        }
        world.settle();
        assert_eq!(world.mirror.status().dirty_regions, 0, "idle regions are cleaned");
        assert!(world.disks.iter().all(|disk| disk.dirty_regions().is_empty()));
    }
}

#[test]
fn rule_18_while_a_leg_is_away_no_bit_is_cleared() {
    for stop in [false, true] {
        let mut world = warm(4);
        world.settle();
        world.disks[1].dead = true;
        world.write(range(5000, 5008));
        world.settle();
        for _ in 0..10 {
            world.tick();
            run_dry(&mut world);
        }
        if stop {
            world.command(Request::Stop);
            world.settle();
            world.crash([true, false]).expect("A is IN");
            world.settle();
        }
        assert!(world.disks[0].dirty_regions().contains(&1), "what B missed is forgotten");
        world.bring_back(Slot::B);
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
        assert_eq!(world.disks[1].read(5007), 2);
    }
}

#[test]
fn case_45_a_write_to_a_region_whose_clear_is_in_flight_waits_and_the_region_is_dirty() {
    for seed in 0..50 {
        let mut world = warm(seed);
        while world.mirror.status().dirty_regions > 0 {
            assert!(world.step() || world.tick());
        }
        assert!(world.disks[0].dirty_regions().contains(&0), "the clear is in flight");
        let write = world.write(range(0, 8));
        while !world.answers.contains_key(&write) {
            let dirty = world.disks.iter().all(|disk| disk.dirty_regions().contains(&0));
            assert!(dirty || writes_in_flight(&world) == 0, "data in a region that is clean on disk");
            assert!(world.step());
        }
        world.crash([true, true]).expect("both are IN");
        assert!(world.mirror.status().dirty_regions > 0);
        world.settle();
        world.assert_identical();
    }
}

/// B was away while A was written, and is back.
fn rebuilding(seed: u64) -> World {
    let mut world = warm(seed);
    world.write(range(0, 300));
    run_dry(&mut world);
    world.flush();
    world.settle();
    world.disks[1].dead = true;
    world.write(range(100, 600));
    world.zero(range(200, 220));
    run_dry(&mut world);
    world.flush();
    world.settle();
    world.bring_back(Slot::B);
    world
}

#[test]
fn rule_22_what_a_copy_is_made_from_is_never_written() {
    for seed in 0..20 {
        for resync in [false, true] {
            let mut world = rebuilding(seed);
            if resync {
                world.settle();
                world.write(range(0, 600));
                for _ in 0..6 {
                    world.step();
                }
                world.crash([true, true]).expect("both are IN");
            }
            let before = world.mirror.status().copied_blocks;
            loop {
                let written = in_flight_on(&world, Slot::A, |op| matches!(op, LegOp::Write { .. } | LegOp::Zero { .. }));
                assert!(written.is_none(), "{}", world.trace());
                if !world.step() {
                    break;
                }
            }
            world.settle();
            assert!(world.healthy() && world.mirror.status().copied_blocks > before);
            world.assert_identical();
        }
    }
}

#[test]
fn case_24_a_write_waits_for_the_piece_that_is_being_copied_and_a_read_does_not() {
    for seed in 0..20 {
        let mut world = rebuilding(seed);
        let (io, piece) = loop {
            let copy = world.in_flight().into_iter().find_map(|(io, slot, op)| match op {
                LegOp::Write { range, .. } if slot == Slot::B => Some((io, range)),
                _ => None,
            });
            if let Some(copy) = copy {
                break copy;
            }
            assert!(world.step());
        };
        world.stuck.insert(io);
        let write = world.write(range(piece.start, piece.start + 4));
        assert!(world.read_now(piece.start).is_ok(), "served from the source at once");
        run_dry(&mut world);
        assert!(!world.answers.contains_key(&write), "it must wait for the copy");
        world.stuck.clear();
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
        assert_eq!(world.disks[1].read(piece.start), 4, "the write, not the copy");
    }
}

#[test]
fn rule_23_a_leg_comes_in_only_when_what_was_copied_is_durable_on_it() {
    for seed in 0..20 {
        let mut world = rebuilding(seed);
        while !world.healthy() {
            assert!(world.step() || world.tick());
        }
        world.crash([false, true]).expect("B is IN");
        run_dry(&mut world);
        // The oracle of a read: not older than what a flush covered.
        world.read(range(0, 600));
        world.settle();
        assert_eq!(world.mirror.status().legs.map(|leg| leg.state), [LegState::Out, LegState::In]);
    }
}

#[test]
fn rule_25_no_leg_comes_back_while_its_old_io_is_outstanding() {
    let mut world = warm(3);
    world.write(range(0, 8));
    let late = in_flight_on(&world, Slot::B, |op| matches!(op, LegOp::Write { .. })).expect("it was issued");
    world.stuck.insert(late);
    world.disks[1].dead = true;
    world.write(range(100, 108));
    run_dry(&mut world);
    assert_eq!(world.mirror.status().legs[1].state, LegState::Out);
    let early = world.bring_back(Slot::B).expect("it has a place");
    run_dry(&mut world);
    assert_eq!(world.answers.get(&early), Some(&Err(Errno::EBUSY)));
    world.stuck.clear();
    world.settle();
    let attach = world.bring_back(Slot::B).expect("it has a place");
    world.settle();
    assert_eq!(world.answers[&attach], Ok(()));
    assert!(world.healthy());
    world.assert_identical();
}

/// An empty disk takes B's place, and is to be filled.
fn replace_b(world: &mut World, leg: u8) {
    let leg = LegId([leg; 16]);
    let disk = &mut world.disks[1];
    disk.dead = false;
    disk.durable.clear();
    disk.cache.clear();
    let len = disk.meta.len();
    disk.meta = format::spare_leg(VOLUME, leg, BLOCKS);
    disk.meta.truncate(len);
    world.command(Request::Attach { slot: Slot::B, leg, fill: Fill::Everything, newest: 0 });
}

#[test]
fn rule_23_a_checkpoint_only_says_what_is_copied_and_durable_and_of_this_leg() {
    const REGIONS: u64 = 130;
    for seed in 0..6 {
        let mut world = warm(seed);
        world.command(Request::Grow { blocks: REGIONS * REGION_BLOCKS });
        run_dry(&mut world);
        for region in 0..REGIONS {
            world.write(range(region * REGION_BLOCKS + 5, region * REGION_BLOCKS + 15));
        }
        world.flush();
        world.settle();
        world.disks[1].dead = true;
        world.write(range(0, 8));
        world.settle();
        replace_b(&mut world, 77);
        let checkpoint = loop {
            assert!(world.step(), "there was no checkpoint");
            let superblock = format::superblock(&world.disks[0].meta).expect("one slot is whole").0;
            if superblock.checkpoint > 0 {
                break superblock.checkpoint;
            }
        };
        for (block, token) in world.disks[0].durable.range(..checkpoint) {
            assert_eq!(world.disks[1].durable.get(block), Some(token), "block {block} is below the checkpoint {checkpoint}");
        }
        if seed % 2 == 0 {
            world.crash([true, true]).expect("A is IN");
            world.settle();
        } else {
            world.disks[1].dead = true;
            world.write(range(0, 8));
            world.settle();
            replace_b(&mut world, 78);
            world.settle();
        }
        assert!(world.healthy());
        world.assert_identical();
    }
}

#[test]
fn rule_23_a_rebuild_that_is_resumed_copies_what_is_beyond_its_checkpoint_and_what_was_written_since_and_no_more() {
    const REGIONS: u64 = 130;
    for seed in 0..4 {
        let mut world = warm(seed);
        world.command(Request::Grow { blocks: REGIONS * REGION_BLOCKS });
        run_dry(&mut world);
        for region in 0..REGIONS {
            world.write(range(region * REGION_BLOCKS + 5, region * REGION_BLOCKS + 15));
        }
        world.flush();
        world.settle();
        assert_eq!(world.mirror.status().dirty_regions, 0);
        let (missed, far) = if seed % 2 == 0 { (1, 1) } else { (64, 128 * REGION_BLOCKS) };
        world.disks[1].dead = true;
        for region in 0..missed {
            world.write(range(region * REGION_BLOCKS + 5, region * REGION_BLOCKS + 15));
        }
        world.settle();
        replace_b(&mut world, 77);
        let of = |disk: &lockstep_sim::Disk| format::superblock(&disk.meta).map_or(0, |superblock| superblock.0.checkpoint);
        let checkpoint = |world: &World| world.disks.iter().map(of).min().unwrap();
        while checkpoint(&world) < far {
            assert!(world.step(), "there was no checkpoint");
        }
        // What is behind it is written again, on the leg that is filled, too; if that is cut off there, the bit says so.
        let write = world.write(range(7 * REGION_BLOCKS + 8, 7 * REGION_BLOCKS + 9));
        while !world.answers.contains_key(&write) {
            assert!(world.step(), "it was never answered");
        }
        for _ in 0..seed * 3 {
            world.step();
        }
        let first = checkpoint(&world) / REGION_BLOCKS;
        world.crash([true, true]).expect("A is IN");
        while !world.healthy() {
            assert!(world.step() || world.tick(), "it never ended");
            // 0: it is done.
            let now = checkpoint(&world) / REGION_BLOCKS;
            assert!(now == 0 || now >= first, "it went back from region {first} to {now}");
        }
        // What B missed, and region 7; region 0 has one block more.
        let (copied, beyond) = (world.mirror.status().copied_blocks, REGIONS - first);
        assert!((10 * beyond..=10 * (beyond + missed + 1) + 1).contains(&copied), "{copied} blocks, from region {first} on");
        world.settle();
        world.assert_identical();
    }
}

/// A world that was killed while a write over what was flushed had come to neither leg, to one, or to both.
fn killed_between_two_landings(seed: u64) -> World {
    let mut world = flushed(seed);
    world.write(range(0, 8));
    for _ in 0..seed % 3 {
        world.step();
    }
    world.kill([true, true]).expect("both are IN");
    world
}

#[test]
fn rule_21_when_the_source_of_a_resync_is_lost_reads_wait_for_what_it_has_sent() {
    let mut differed = 0;
    for seed in 0..60 {
        let mut world = killed_between_two_landings(seed);
        let copied =
            |op: &LegOp| matches!(op, LegOp::Write { buffer: Buffer::Copy { .. }, range, .. } if range.start <= 3 && 3 < range.end);
        let copy = loop {
            if let Some(copy) = in_flight_on(&world, Slot::B, copied) {
                break copy;
            }
            assert!(world.step(), "it is never copied");
        };
        world.stuck.insert(copy);
        let old = world.disks[1].read(3);
        let found = world.read_now(3).expect("A can read");
        differed += usize::from(found != old);
        world.command(Request::Detach(Slot::A));
        let read = world.read(range(3, 4));
        run_dry(&mut world);
        assert!(!world.answers.contains_key(&read), "it was answered, and the copy has not landed\n{}", world.trace());
        world.stuck.remove(&copy);
        run_dry(&mut world);
        assert_eq!((world.answers[&read], world.found(read)), (Ok(()), Some(found)));
    }
    assert!(differed > 10, "the legs were equal already: {differed}");
}
