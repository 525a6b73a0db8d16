//! The mirror on simulated disks: named cases, and random histories with crashes and lost disks.
#![allow(missing_docs)]

use lockstep_core::{
    io::{LegOp, Request},
    status::LegState,
    units::{BlockRange, Errno, Slot},
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

fn writes_in_flight(world: &World) -> usize {
    world.in_flight().iter().filter(|(_, _, op)| matches!(op, LegOp::Write { .. })).count()
}

#[test]
fn case_01_overlapping_writes_end_equal_in_every_order_of_completion() {
    for seed in 0..200 {
        let mut world = warm(seed);
        world.write(range(100, 200));
        world.write(range(150, 200));
        world.write(range(160, 200));
        assert_eq!(writes_in_flight(&world), 2, "only the first is issued, to both legs");
        world.settle();
        world.assert_identical();
        assert_eq!(world.disks[0].read(199), 4, "the last one wins");
    }
}

#[test]
fn case_02_touching_writes_go_in_parallel() {
    let mut world = warm(1);
    world.write(range(0, 8));
    world.write(range(8, 16));
    assert_eq!(writes_in_flight(&world), 4);
}

#[test]
fn case_09_a_write_that_a_lost_leg_missed_is_answered_only_after_the_loss_is_durable() {
    for seed in 0..50 {
        let mut world = warm(seed);
        world.disks[1].dead = true;
        let first = world.write(range(0, 8));
        let second = world.write(range(4, 12));
        let apart = world.write(range(20, 24));
        while !(world.answers.contains_key(&first) && world.answers.contains_key(&apart)) {
            assert!(world.step(), "the write never ended");
            let answered = world.answers.contains_key(&first) || world.answers.contains_key(&apart);
            assert!(!answered || world.mirror.status().epoch.0 == 3, "the record that says OUT counts before any answer");
        }
        assert_eq!(world.answers[&first], Ok(()));
        world.settle();
        assert_eq!(world.answers[&second], Ok(()));
        assert_eq!(world.mirror.status().legs[1].state, LegState::Out);
    }
}

#[test]
fn case_11_after_a_crash_the_leg_that_missed_an_acked_write_is_stale() {
    let mut world = warm(3);
    world.disks[1].dead = true;
    world.write(range(0, 8));
    world.settle();
    world.flush();
    world.settle();
    world.disks[1].dead = false;
    world.crash([true, true]).expect("A is IN");
    world.settle();
    assert_eq!(world.mirror.status().legs[1].state, LegState::Out);
    world.read(range(0, 8));
    world.settle();
}

#[test]
fn case_15_and_16_a_flush_error_on_one_leg_is_survived_and_on_both_is_sticky() {
    let mut world = warm(4);
    world.disks[1].dead = true;
    let flush = world.flush();
    world.settle();
    assert_eq!(world.answers[&flush], Ok(()));
    world.disks[0].dead = true;
    for _ in 0..2 {
        let flush = world.flush();
        world.settle();
        assert!(world.answers[&flush].is_err());
    }
    world.disks[0].dead = false;
    let flush = world.flush();
    world.settle();
    assert!(world.answers[&flush].is_err(), "a later flush must not claim success");
}

#[test]
fn case_27_a_leg_that_missed_one_write_gets_only_that_region() {
    let mut world = warm(5);
    world.write(range(5000, 5010));
    world.flush();
    world.settle();
    world.disks[1].dead = true;
    world.write(range(5000, 5004));
    world.settle();
    let before = world.mirror.status().copied_blocks;
    world.bring_back(Slot::B);
    world.settle();
    assert!(world.healthy(), "{}", world.trace());
    assert_eq!(world.mirror.status().copied_blocks - before, 10, "what was written in that region, and nothing else");
    world.assert_identical();
}

#[test]
fn rule_12_one_leg_is_enough_if_the_witness_says_that_it_is_in() {
    let mut world = warm(9);
    world.write(range(0, 8));
    world.flush();
    world.settle();
    world.crash([true, false]).expect("the witness says that A is IN");
    world.settle();
    assert_eq!(world.mirror.status().legs.map(|leg| leg.state), [LegState::In, LegState::Out]);
    world.read(range(0, 8));
    world.settle();
}

#[test]
fn case_29_a_stale_leg_alone_is_refused() {
    let mut world = warm(6);
    world.disks[1].dead = true;
    world.write(range(0, 8));
    world.settle();
    world.disks[1].dead = false;
    assert!(world.crash([false, true]).is_err());
}

#[test]
fn case_49_a_write_that_fails_on_both_legs_takes_nobody_out() {
    let mut world = warm(7);
    let write = world.write(range(0, 8));
    world.disks.iter_mut().for_each(|disk| disk.dead = true);
    let data: Vec<_> = world.in_flight();
    for (io, ..) in data {
        world.finish(io);
    }
    world.disks.iter_mut().for_each(|disk| disk.dead = false);
    world.settle();
    assert!(world.answers[&write].is_err());
    assert!(world.healthy());
    world.assert_identical();
}

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
fn case_05_many_writes_of_one_range_land_in_order_of_arrival() {
    for seed in 0..20 {
        let mut world = warm(seed);
        for _ in 0..64 {
            world.write(range(8, 16));
        }
        assert_eq!(writes_in_flight(&world), 2, "one at a time");
        world.settle();
        world.assert_identical();
        assert_eq!(world.disks[0].read(15), 65, "the last one to come wins");
    }
}

#[test]
fn case_13_nothing_is_answered_if_the_survivor_cannot_say_who_is_out() {
    let mut world = warm(10);
    world.disks[1].dead = true;
    world.disks[0].meta_fails = true;
    let write = world.write(range(0, 8));
    world.settle();
    assert!(world.answers[&write].is_err());
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
fn case_26_a_rebuild_target_that_fails_is_not_noticed_above() {
    for seed in 0..50 {
        let mut world = warm(seed);
        world.disks[1].dead = true;
        world.write(range(0, 64));
        world.settle();
        world.bring_back(Slot::B);
        for _ in 0..seed % 20 {
            world.step();
        }
        world.disks[1].dead = true;
        let write = world.write(range(32, 40));
        world.settle();
        assert_eq!(world.answers[&write], Ok(()));
        assert_eq!(world.mirror.status().legs[0].state, LegState::In);
    }
}

#[test]
fn case_30_two_legs_that_each_went_on_alone_are_refused() {
    let mut world = warm(11);
    world.flush();
    world.settle();
    let (disks, witness) = (world.disks.clone(), world.witness.clone());
    world.crash([true, false]).expect("A is IN");
    world.write(range(0, 8));
    world.settle();
    let a = world.disks[0].clone();
    world.disks = disks;
    world.witness = witness;
    world.crash([false, true]).expect("B is IN");
    world.write(range(0, 8));
    world.settle();
    world.disks[0] = a;
    world.witness.clear();
    assert!(world.crash([true, true]).is_err());
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
fn case_33_what_one_leg_cannot_read_the_other_serves_and_it_is_repaired() {
    for seed in 0..20 {
        let mut world = warm(seed);
        world.write(range(0, 8));
        world.settle();
        for racing_write in [false, true] {
            world.disks[0].bad.insert(3);
            for _ in 0..4 {
                let read = world.read(range(0, 8));
                if racing_write {
                    world.write(range(3, 5));
                }
                world.settle();
                assert_eq!(world.answers[&read], Ok(()));
            }
            assert!(world.disks[0].bad.is_empty(), "not repaired");
        }
        assert!(world.disks[0].bad.is_empty() && world.healthy());
        world.assert_identical();
    }
}

#[test]
fn case_34_what_no_leg_can_read_fails_alone_until_it_is_written() {
    let mut world = warm(13);
    world.write(range(0, 8));
    world.settle();
    for disk in &mut world.disks {
        disk.bad.insert(3);
    }
    assert!(world.read_now(3).is_err());
    assert_eq!((world.read_now(2), world.read_now(4)), (Ok(2), Ok(2)));
    assert!(world.healthy(), "nobody goes OUT for it");
    world.write(range(3, 4));
    world.settle();
    assert_eq!(world.read_now(3), Ok(3));
}

#[test]
fn case_39_an_error_of_the_last_leg_goes_to_the_caller_and_the_mirror_goes_on() {
    let mut world = warm(14);
    world.disks[1].dead = true;
    world.write(range(0, 8));
    world.settle();
    let write = world.write(range(0, 8));
    world.disks[0].dead = true;
    for (io, ..) in world.in_flight() {
        world.finish(io);
    }
    world.disks[0].dead = false;
    world.settle();
    assert!(world.answers[&write].is_err());
    let write = world.write(range(0, 8));
    world.settle();
    assert_eq!(world.answers[&write], Ok(()));
    assert!(world.read_now(0).is_ok());
}

#[test]
fn rule_14_the_last_leg_never_goes_out() {
    let mut world = warm(17);
    let first = world.command(Request::Detach(Slot::B));
    world.settle();
    let second = world.command(Request::Detach(Slot::A));
    world.settle();
    assert_eq!((world.answers[&first], world.answers[&second]), (Ok(()), Err(Errno::EBUSY)));
    assert!(world.read_now(0).is_ok());
}

#[test]
fn case_40_a_source_that_dies_in_a_rebuild_gives_errors_and_never_stale_data() {
    for seed in 0..50 {
        let mut world = warm(seed);
        world.write(range(0, 64));
        world.flush();
        world.settle();
        world.disks[1].dead = true;
        world.write(range(0, 64));
        world.settle();
        world.bring_back(Slot::B);
        for _ in 0..seed % 16 {
            world.step();
        }
        if world.healthy() {
            continue;
        }
        world.disks[0].dead = true;
        // The oracle of every read is that it is not older than what was acked.
        let read = world.read(range(0, 64));
        while !world.answers.contains_key(&read) {
            assert!(world.step(), "the read never ended");
        }
        assert!(world.healthy() || world.answers[&read].is_err());
    }
}

#[test]
fn case_41_no_space_takes_nobody_out_and_leaves_the_legs_equal() {
    for (a, b) in [(true, false), (false, true), (true, true)] {
        for seed in 0..20 {
            let mut world = warm(seed);
            world.write(range(0, 16));
            world.settle();
            (world.disks[0].full, world.disks[1].full) = (a, b);
            let write = world.write(range(4, 12));
            while !world.answers.contains_key(&write) {
                assert!(world.step(), "the write never ended");
            }
            assert_eq!(world.answers[&write], Err(Errno::ENOSPC));
            (world.disks[0].full, world.disks[1].full) = (false, false);
            world.settle();
            assert!(world.healthy(), "{:?}", world.mirror.status());
            world.assert_identical();
        }
    }
}

#[test]
fn case_46_a_leg_that_was_away_while_the_source_discarded_reads_zeroes_there() {
    let mut world = warm(15);
    world.write(range(100, 200));
    world.flush();
    world.settle();
    world.disks[1].dead = true;
    world.zero(range(120, 180));
    world.settle();
    world.bring_back(Slot::B);
    world.settle();
    assert!(world.healthy());
    world.assert_identical();
    assert_eq!((world.disks[1].read(119), world.disks[1].read(120), world.disks[1].read(179)), (2, 0, 0));
}

#[test]
fn case_48_with_the_state_directory_lost_two_legs_assemble_and_one_is_refused() {
    let mut world = warm(16);
    world.write(range(0, 8));
    world.flush();
    world.settle();
    world.witness.clear();
    world.crash([true, true]).expect("both legs are there");
    world.witness = vec![0; 8192];
    world.settle();
    assert!(world.healthy());
    world.flush();
    world.settle();
    world.witness.clear();
    assert!(world.crash([true, false]).is_err());
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
fn rule_06_host_faults_and_short_counts_are_reissued_and_nobody_notices() {
    for seed in 0..200 {
        let mut world = warm(seed);
        world.flaky = 6;
        for n in 0..40 {
            world.write(range(n % 7 * 4, n % 7 * 4 + 9));
            world.read(range(0, 32));
            world.step();
        }
        world.flush();
        world.settle();
        assert!(world.answers.values().all(Result::is_ok), "{:?}", world.answers);
        assert!(world.healthy());
        world.assert_identical();
    }
}

/// One random history.
fn history(seed: u64) {
    let mut world = World::new(seed);
    world.flaky = [0, 0, 12][(seed % 3) as usize];
    let mut rng = Rng(seed ^ 0xfeed);
    let mut lost: Option<Slot> = None;
    for _ in 0..300 {
        let start = [0, 4090, 8190][rng.below(3) as usize] + rng.below(24);
        let piece = range(start, start + 1 + rng.below(8));
        match rng.below(20) {
            0..=5 => drop(world.write(piece)),
            6 | 7 => drop(world.read(piece)),
            8 if rng.once_in(3) => drop(world.zero(piece)),
            9 => drop(world.flush()),
            10 if lost.is_none() && world.healthy() && rng.once_in(4) => {
                let slot = Slot::BOTH[rng.below(2) as usize];
                world.disks[slot.index()].dead = true;
                lost = Some(slot);
            }
            11 if rng.once_in(3) => {
                if let Some(slot) = lost {
                    world.settle();
                    world.bring_back(slot);
                    lost = None;
                }
            }
            12 if rng.once_in(6) => {
                let present = Slot::BOTH.map(|slot| lost != Some(slot));
                world.crash(present).unwrap_or_else(|refusal| panic!("refused within the budget: {refusal}"));
            }
            _ => {
                for _ in 0..rng.below(6) {
                    world.step();
                }
            }
        }
    }
    world.settle();
    if let Some(slot) = lost {
        world.bring_back(slot);
    } else {
        for slot in Slot::BOTH {
            if world.mirror.status().legs[slot.index()].state == LegState::Out {
                world.bring_back(slot);
            }
        }
    }
    world.settle();
    world.read(range(0, 40));
    world.read(range(4080, 4140));
    world.settle();
    assert!(world.healthy(), "{:?}", world.mirror.status());
    world.assert_identical();
}

#[test]
fn random_histories_with_crashes_and_lost_disks_keep_every_promise() {
    let seeds = std::env::var("SIM_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(500);
    for seed in 0..seeds {
        if let Err(panic) = std::panic::catch_unwind(|| history(seed)) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
