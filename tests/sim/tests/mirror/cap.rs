//! The cap of dirty regions (the second half of mirror rule 17). That a bit lands clear only when both disks hold the region durably is
//! asserted by the disks.

use std::collections::BTreeSet;

use lockstep_core::{
    assembly::Limits,
    format::{self, REGION_BLOCKS},
    io::{LegOp, Notice, Outcome, Request},
    membership::MemberState,
    status::LegState,
    units::{BlockRange, Errno, IoId, Slot, Tag},
};
use lockstep_sim::{BLOCKS, Rng, World};

use crate::{answered, in_flight_on, range, run_dry, superblock_on, until_writing};

/// A block in a region.
fn block(region: u64) -> BlockRange {
    range(region * REGION_BLOCKS + 5, region * REGION_BLOCKS + 6)
}

/// A volume of so many regions, of which so many may be dirty. A scrub never pauses.
fn capped(seed: u64, regions: u64, cap: u64) -> World {
    let mut world = World::with_limits(seed, Limits { dirty_regions: cap, scrub_blocks_per_second: 0, ..Limits::default() });
    world.command(Request::Grow { blocks: (regions * REGION_BLOCKS).max(BLOCKS) });
    world.settle();
    assert_eq!(world.mirror.status().dirty_regions, 0);
    world
}

fn both_in(world: &World) -> bool {
    let record = format::witness(&world.witness).expect("a witness").0.record;
    record.members.iter().all(|member| member.state == MemberState::In)
}

/// What a crash would leave to be resynced.
fn dirty(world: &World) -> BTreeSet<u64> {
    world.disks[0].dirty_regions().union(&world.disks[1].dirty_regions()).copied().collect()
}

fn step_within(world: &mut World, cap: u64) -> bool {
    let moved = world.step();
    assert!(!both_in(world) || dirty(world).len() as u64 <= cap, "{:?} are dirty, and both legs count", dirty(world));
    moved
}

#[test]
fn rule_17_no_crash_leaves_more_dirty_regions_than_the_cap_and_every_write_ends() {
    for seed in 0..30 {
        let cap = 1 + seed % 4;
        let (mut world, mut rng) = (capped(seed, 12, cap), Rng(seed));
        let mut asked = Vec::new();
        for _ in 0..80 {
            let region = rng.below(12);
            match rng.below(16) {
                0 => drop(world.flush()),
                1 => drop(world.read(block(region))),
                2 if region > 0 && cap > 1 => asked.push(world.write(range(region * REGION_BLOCKS - 1, region * REGION_BLOCKS + 1))),
                _ => asked.push(world.write(block(region))),
            }
            for _ in 0..rng.below(4) {
                step_within(&mut world, cap);
            }
        }
        if seed % 3 == 0 {
            while step_within(&mut world, cap) {}
            assert!(asked.iter().all(|tag| world.answers[tag] == Ok(())), "a write needs the clock to end");
        }
        world.crash([true, true]).expect("both are IN");
        while step_within(&mut world, cap) {}
        let resynced = |notice: &Notice| matches!(notice, Notice::ResyncStarted { regions } if *regions > cap);
        assert!(!world.notices.iter().any(resynced), "{:?}", world.notices);
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
    }
}

/// Where the writes beyond the first two regions begin, in the order in which they go to a leg, until these are answered.
fn order_of_issue(world: &mut World, cap: u64, waiting: &[Tag]) -> Vec<u64> {
    let mut seen = Vec::new();
    while !waiting.iter().all(|tag| world.answers.contains_key(tag)) {
        for (_, _, op) in world.in_flight() {
            if let LegOp::Write { range, .. } = op
                && range.start >= 2 * REGION_BLOCKS
                && !seen.contains(&range.start)
            {
                seen.push(range.start);
            }
        }
        assert!(step_within(world, cap));
    }
    seen
}

#[test]
fn rule_17_who_needs_little_room_does_not_overtake_who_needs_more() {
    for seed in 0..40 {
        let mut world = capped(seed, 12, 3);
        let first = [world.write(block(0)), world.write(block(1))];
        answered(&mut world, &first);
        run_dry(&mut world);
        // There is room for one more region, and the first of them needs two.
        let across = range(4 * REGION_BLOCKS - 1, 4 * REGION_BLOCKS + 1);
        let waiting = [world.write(across), world.write(block(6)), world.write(block(5))];
        assert_eq!(order_of_issue(&mut world, 3, &waiting), [across.start, block(6).start, block(5).start]);
    }
}

#[test]
fn rule_17_who_waits_for_room_is_admitted_in_order_of_arrival_whatever_others_write() {
    for seed in 0..40 {
        let (mut world, mut rng) = (capped(seed, 12, 2), Rng(seed));
        let (first, second) = (world.write(block(0)), world.write(block(1)));
        answered(&mut world, &[first, second]);
        let waiting: Vec<Tag> = (2..10).map(|region| world.write(block(region))).collect();
        // Others go on in the regions that are dirty already.
        world.write(block(rng.below(2)));
        let seen = order_of_issue(&mut world, 2, &waiting);
        assert_eq!(seen.len(), 8);
        assert!(seen.is_sorted(), "{seen:?}");
    }
}

#[test]
fn rule_17_regions_that_are_always_being_written_are_cleaned_too_when_there_are_no_others() {
    for seed in 0..40 {
        let mut world = capped(seed, 12, 2);
        // There is always a write of each of them under way.
        let mut busy = [0, 1].map(|region| [world.write(block(region)), world.write(block(region))]);
        until_writing(&mut world);
        let wanted = world.write(block(7));
        for _ in 0..3000 {
            if world.answers.contains_key(&wanted) {
                break;
            }
            assert!(step_within(&mut world, 2));
            for (region, tags) in busy.iter_mut().enumerate() {
                for tag in tags {
                    if world.answers.contains_key(tag) {
                        *tag = world.write(block(region as u64));
                    }
                }
            }
        }
        assert_eq!(world.answers.get(&wanted), Some(&Ok(())), "starved");
        world.settle();
        assert!(world.healthy());
    }
}

#[test]
fn rule_17_the_least_recently_written_region_is_cleaned_first() {
    for seed in 0..20 {
        let mut world = capped(seed, 12, 4);
        for region in [3, 0, 2, 1, 3] {
            let write = world.write(block(region));
            answered(&mut world, &[write]);
            run_dry(&mut world);
        }
        let write = world.write(block(9));
        answered(&mut world, &[write]);
        run_dry(&mut world);
        assert_eq!(dirty(&world), BTreeSet::from([1, 2, 3, 9]));
    }
}

#[test]
fn rule_17_a_workload_that_hops_over_more_regions_than_the_cap_cleans_many_at_once() {
    let mut world = capped(1, 300, 64);
    let (mut flushes, mut pages, mut writes) = (BTreeSet::<IoId>::new(), BTreeSet::<IoId>::new(), Vec::new());
    for round in 0..2 {
        for region in 0..300 {
            let write = world.write(block(region));
            writes.push(write);
            while !world.answers.contains_key(&write) {
                flushes.extend(world.in_flight().iter().filter(|(_, _, op)| *op == LegOp::Flush).map(|(io, ..)| *io));
                pages.extend(world.in_flight().iter().filter(|(_, _, op)| matches!(op, LegOp::WriteMeta { .. })).map(|(io, ..)| *io));
                assert!(step_within(&mut world, 64), "round {round}");
            }
        }
    }
    // On each leg: one flush for 16 regions that are cleaned.
    assert!(flushes.len() <= 2 * 600 / 16 + 2, "{} flushes for 600 writes", flushes.len());
    assert!(pages.len() <= 2 * (600 + 600 / 16 + 2), "{} pages", pages.len());
}

#[test]
fn rule_17_the_cap_does_not_count_while_a_leg_is_away_and_too_many_regions_are_cleaned_when_it_is_back() {
    for seed in 0..40 {
        let mut world = capped(seed, 12, 2);
        let mut writes: Vec<Tag> = (0..4).map(|region| world.write(block(region))).collect();
        for _ in 0..seed {
            world.step();
        }
        // Who waits for room when the leg goes does not wait for it to come back.
        if seed % 2 == 0 {
            world.disks[1].dead = true;
        } else {
            world.command(Request::Detach(Slot::B));
        }
        writes.extend((4..12).map(|region| world.write(block(region))));
        world.flush();
        answered(&mut world, &writes);
        assert!(writes.iter().all(|tag| world.answers[tag] == Ok(())));
        run_dry(&mut world);
        assert_eq!(world.mirror.status().legs[1].state, LegState::Out);
        assert!(world.disks[0].dirty_regions().len() >= 8, "nothing is cleaned meanwhile");
        world.bring_back(Slot::B);
        run_dry(&mut world);
        assert!(world.healthy());
        assert!(dirty(&world).len() <= 2, "without waiting for the clean pass: {:?}", dirty(&world));
        let write = world.write(block(11));
        answered(&mut world, &[write]);
        world.settle();
        world.assert_identical();
    }
}

#[test]
fn rule_17_where_too_many_regions_are_dirty_after_a_rebuild_none_is_made_dirty_again() {
    for seed in 0..200 {
        let mut world = capped(seed, 12, 2);
        world.command(Request::Detach(Slot::B));
        let _: Vec<Tag> = (0..8).map(|region| world.write(block(region))).collect();
        run_dry(&mut world);
        world.bring_back(Slot::B);
        // A repair whose block is unreadable again before it is read back takes the leg out: each region once.
        let (mut rng, mut bad) = (Rng(seed), BTreeSet::new());
        while world.mirror.status().legs[1].state != LegState::In {
            assert!(world.step(), "the rebuild never ended");
        }
        let (mut most, mut tags) = (dirty(&world).len(), Vec::new());
        for _ in 0..400 {
            let region = rng.below(8);
            match rng.below(8) {
                0 => tags.push(world.write(block(region))),
                1 if bad.insert(region) => {
                    world.disks[0].bad.insert(block(region).start);
                    tags.push(world.read(block(region)));
                }
                2 => drop(world.tick()),
                _ => drop(world.step()),
            }
            assert!(both_in(&world), "seed {seed}");
            let now = dirty(&world).len();
            assert!(now <= most.max(2), "seed {seed}: {now} are dirty, and there were {most}");
            most = now;
        }
        answered(&mut world, &tags);
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
    }
}

#[test]
fn rule_17_a_write_does_not_take_back_a_clear_while_too_many_regions_are_dirty() {
    for seed in 0..20 {
        let mut world = capped(seed, 4, 1);
        world.command(Request::Detach(Slot::B));
        let _: Vec<Tag> = (0..3).map(|region| world.write(block(region))).collect();
        run_dry(&mut world);
        world.bring_back(Slot::B);
        // What comes while the rebuild is finished is issued when it is: two regions stay in use then, so that room cannot be made there, and the
        // third one is cleaned because nobody writes to it.
        while world.mirror.status().legs[1].state != LegState::Recovering || superblock_on(&world, Slot::A).is_none() {
            assert!(world.step(), "never rebuilt");
        }
        let (busy, idle) = ([1, 2].map(|region| world.write(block(region))), world.write(block(0)));
        while !world.answers.contains_key(&idle) {
            let of_busy = |op: &LegOp| matches!(op, LegOp::Write { range, .. } if range.start > REGION_BLOCKS);
            world.stuck = world.in_flight().into_iter().filter(|(.., op)| of_busy(op)).map(|(io, ..)| io).collect();
            assert!(world.step(), "the write never ended");
        }
        let cleared = format::MetaPage::Bitmap { page: 0, dirty: 2 };
        let clears = |world: &World| {
            in_flight_on(
                world,
                Slot::A,
                |op| matches!(op, LegOp::WriteMeta { offset, page } if format::MetaPage::of(*offset, page) == cleared),
            )
        };
        while clears(&world).is_none() {
            assert!(world.step() || world.tick(), "never cleaned: {:?}", dirty(&world));
        }
        let again = world.write(block(0));
        let mut most = dirty(&world).len();
        while world.step() {
            let now = dirty(&world).len();
            assert!(now <= most, "seed {seed}: {now} are dirty, and there were {most}");
            most = now;
        }
        world.stuck.clear();
        answered(&mut world, &[busy[0], busy[1], again]);
        world.settle();
        world.assert_identical();
    }
}

#[test]
fn rule_17_the_cap_counts_until_a_leg_that_leaves_is_durably_out() {
    for seed in 0..20 {
        let mut world = capped(seed, 12, 2);
        let first = [world.write(block(0)), world.write(block(1))];
        answered(&mut world, &first);
        run_dry(&mut world);
        world.disks[1].dead = true;
        let mut writes = vec![world.write(block(0))];
        while superblock_on(&world, Slot::A).is_none() {
            assert!(step_within(&mut world, 2), "B never leaves");
        }
        world.stuck.extend(superblock_on(&world, Slot::A));
        writes.push(world.write(block(2)));
        while step_within(&mut world, 2) {}
        assert!(writes.iter().all(|tag| !world.answers.contains_key(tag)), "B counts");
        world.stuck.clear();
        answered(&mut world, &writes);
        assert!(writes.iter().all(|tag| world.answers[tag] == Ok(())));
    }
}

#[test]
fn rule_17_a_leg_that_hangs_while_room_is_made_delays_the_writes_no_longer_than_its_deadline() {
    for seed in 0..30 {
        let mut world = capped(seed, 12, 2);
        let first = [world.write(block(0)), world.write(block(1))];
        answered(&mut world, &first);
        run_dry(&mut world);
        let writes = [world.write(block(2)), world.write(block(0)), world.write(block(3))];
        for _ in 0..seed {
            world.step();
        }
        world.disks[1].hung = true;
        for _ in 0..80 {
            run_dry(&mut world);
            world.tick();
        }
        run_dry(&mut world);
        assert!(writes.iter().all(|tag| world.answers.get(tag) == Some(&Ok(()))), "{:?}", world.mirror.status());
    }
}

#[test]
fn rule_17_a_write_that_waits_for_room_gets_an_error_when_none_will_be_made() {
    for given_up in [false, true] {
        let mut world = capped(3, 12, 2);
        let first = [world.write(block(0)), world.write(block(1))];
        answered(&mut world, &first);
        run_dry(&mut world);
        let write = world.write(block(2));
        // The cleaning's flush finds B gone, and nobody can record that; or it fails on both legs.
        while let Some(io) = in_flight_on(&world, Slot::A, |op| *op == LegOp::Flush).filter(|_| given_up) {
            world.end(io, Outcome::Failed(Errno::EIO));
        }
        world.disks[1].dead = true;
        world.witness_fails = u32::MAX;
        for _ in 0..40 {
            run_dry(&mut world);
            world.tick();
        }
        assert_eq!(world.answers.get(&write), Some(&Err(Errno::EIO)), "given up: {given_up}");
        assert_eq!(world.mirror.status().read_only, given_up);
        if !given_up {
            world.witness_fails = 0;
            world.settle();
            let write = world.write(block(2));
            answered(&mut world, &[write]);
            assert_eq!(world.answers[&write], Ok(()));
        }
    }
}

#[test]
fn rule_17_who_waits_for_room_waits_for_the_resync_that_makes_it_also_in_a_stop() {
    for seed in 0..40 {
        let mut world = capped(seed, 12, 2);
        let first = [world.write(block(0)), world.write(block(1))];
        answered(&mut world, &first);
        world.crash([true, true]).expect("both are IN");
        let writes: Vec<Tag> = (2..6).map(|region| world.write(block(region))).collect();
        for _ in 0..seed / 2 {
            world.step();
        }
        let stop = world.command(Request::Stop);
        for _ in 0..10 {
            while step_within(&mut world, 2) {}
            world.tick();
        }
        assert!(world.answers.contains_key(&stop), "the stop never ends");
        assert!(writes.iter().all(|tag| matches!(world.answers[tag], Ok(()) | Err(Errno::ESHUTDOWN))));
        assert!(dirty(&world).len() <= 2);
    }
}

#[test]
fn rule_17_one_request_that_touches_more_regions_than_the_cap_is_done_when_nothing_else_is_dirty() {
    for seed in 0..20 {
        let mut world = capped(seed, 12, 2);
        let first = [world.write(block(9)), world.write(block(10))];
        answered(&mut world, &first);
        let large = world.zero(range(0, 5 * REGION_BLOCKS));
        let after = world.write(block(7));
        let mut most = BTreeSet::new();
        while !(world.answers.contains_key(&large) && world.answers.contains_key(&after)) {
            assert!(world.step());
            if dirty(&world).len() > most.len() {
                most = dirty(&world);
            }
        }
        assert_eq!(most, (0..5).collect());
        run_dry(&mut world);
        assert!(dirty(&world).len() <= 2, "too many are cleaned at once");
        world.settle();
        world.assert_identical();
    }
}

#[test]
fn rule_17_a_write_that_waits_for_room_does_not_block_the_resync_that_makes_it_nor_is_it_overtaken_by_what_overlaps_it() {
    for seed in 0..20 {
        let mut world = capped(seed, 12, 2);
        let first = [world.write(block(0)), world.write(block(3))];
        answered(&mut world, &first);
        world.crash([true, true]).expect("both are IN");
        let across = |region: u64| range(region * REGION_BLOCKS - 3, region * REGION_BLOCKS + 3);
        world.read(across(1));
        // The last one lies in a region that is dirty, and behind the first.
        let last = range(REGION_BLOCKS - 2, REGION_BLOCKS - 1);
        let writes = [world.write(across(1)), world.write(across(3)), world.write(across(4)), world.write(last)];
        let token = 6;
        while !writes.iter().all(|tag| world.answers.contains_key(tag)) {
            assert!(step_within(&mut world, 2), "a resync waits for a write that waits for it");
        }
        assert!(writes.iter().all(|tag| world.answers[tag] == Ok(())));
        assert_eq!(world.read_now(last.start), Ok(token), "overtaken");
        world.settle();
        world.assert_identical();
    }
}

#[test]
fn rule_17_regions_that_no_resync_can_make_equal_do_not_take_the_room_of_others() {
    let mut world = capped(2, 12, 1);
    let bad = block(0);
    let write = world.write(bad);
    answered(&mut world, &[write]);
    let write = world.write(bad);
    until_writing(&mut world);
    for slot in Slot::BOTH {
        world.disks[slot.index()].bad.insert(bad.start);
        let io = in_flight_on(&world, slot, |op| matches!(op, LegOp::Write { .. })).expect("the write");
        world.end(io, Outcome::Failed(Errno::EIO));
    }
    assert_eq!(world.answers[&write], Err(Errno::EIO));
    for region in 1..6 {
        let write = world.write(block(region));
        answered(&mut world, &[write]);
    }
    run_dry(&mut world);
    assert_eq!(dirty(&world).len(), 2, "the one that no leg can read, and one more");
    // It is written again, and counts again.
    let write = world.write(bad);
    answered(&mut world, &[write]);
    world.settle();
    assert!(world.healthy() && dirty(&world).is_empty());
    world.assert_identical();
}

#[test]
fn rule_17_a_repair_makes_no_region_dirty_beyond_the_cap_and_is_made_when_there_is_room() {
    for seed in 0..20 {
        let mut world = capped(seed, 12, 2);
        world.write(block(5));
        world.settle();
        let first = [world.write(block(0)), world.write(block(1))];
        answered(&mut world, &first);
        run_dry(&mut world);
        world.disks[0].bad.insert(block(5).start);
        let reads: Vec<Tag> = (0..4).map(|_| world.read(block(5))).collect();
        while step_within(&mut world, 2) {}
        assert!(reads.iter().all(|tag| world.answers[tag] == Ok(())), "the other leg serves");
        assert!(!world.disks[0].bad.is_empty());
        world.settle();
        for _ in 0..4 {
            assert_eq!(world.read_now(block(5).start), Ok(1));
        }
        world.settle();
        assert!(world.disks[0].bad.is_empty() && world.healthy(), "not repaired");
        world.assert_identical();
    }
}

#[test]
fn rule_17_what_a_scrub_repairs_makes_one_region_dirty_beyond_the_cap_and_no_second_one() {
    for seed in 0..20 {
        let mut world = capped(seed, 12, 2);
        for region in 2..9 {
            world.write(block(region));
        }
        world.settle();
        let first = [world.write(block(0)), world.write(block(1))];
        answered(&mut world, &first);
        run_dry(&mut world);
        world.disks[0].bad.extend([2, 4].map(|region| block(region).start));
        for region in [3, 5, 6, 7] {
            world.disks[1].durable.insert(block(region).start, 99);
        }
        let scrub = world.command(Request::Scrub { believed: Some(Slot::A) });
        let mut most = 0;
        for _ in 0..100_000 {
            if world.answers.contains_key(&scrub) {
                break;
            }
            // A flush takes longer than anything else: nothing is cleaned before the scrub has to wait for it.
            world.stuck = world.in_flight().iter().filter(|(_, _, op)| *op == LegOp::Flush).map(|(io, ..)| *io).collect();
            if !step_within(&mut world, 3) {
                world.stuck.clear();
                if !step_within(&mut world, 3) {
                    world.tick();
                }
            }
            most = most.max(dirty(&world).len());
        }
        assert_eq!((world.answers.get(&scrub), most), (Some(&Ok(())), 3));
        world.stuck.clear();
        world.settle();
        assert!(world.disks[0].bad.is_empty() && world.healthy(), "not repaired");
        world.assert_identical();
    }
}

#[test]
fn rule_17_a_stop_that_comes_in_a_rebuild_cleans_what_is_too_much_before_it_is_answered() {
    for seed in 0..300 {
        let mut world = capped(seed, 12, 1);
        world.command(Request::Detach(Slot::B));
        world.settle();
        for region in 0..4 {
            world.write(block(region));
        }
        run_dry(&mut world);
        world.bring_back(Slot::B);
        for _ in 0..seed {
            world.step();
        }
        let stop = world.command(Request::Stop);
        while !world.answers.contains_key(&stop) {
            assert!(world.step(), "the stop never ends");
        }
        assert_eq!(world.in_flight(), [], "after the stop was answered");
    }
}
