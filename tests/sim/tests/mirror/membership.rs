//! Answers, membership, assembly (mirror rules 8 to 16).

use lockstep_core::{
    format,
    io::{Fill, LegOp, Outcome, Request},
    membership::MemberState,
    status::LegState,
    units::{Epoch, Errno, LegId, Slot},
};
use lockstep_sim::{BLOCKS, Rng, VOLUME, World};

use crate::{in_flight_on, out_by_the_witness, range, run_dry, warm, witnessed};

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
fn case_13_nothing_is_answered_if_the_survivor_cannot_say_who_is_out() {
    let mut world = warm(10);
    world.disks[1].dead = true;
    world.disks[0].meta_fails = true;
    let write = world.write(range(0, 8));
    world.settle();
    assert!(world.answers[&write].is_err());
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
fn rule_08_an_answer_means_that_every_leg_that_is_in_has_the_data() {
    for seed in 0..50 {
        let mut world = warm(seed);
        let write = world.write(range(0, 8));
        while !world.answers.contains_key(&write) {
            assert!(world.step());
        }
        world.assert_identical();
        assert_eq!(world.disks[0].read(7), 2);
    }
}

#[test]
fn rule_10_no_answer_misses_a_leg_before_the_witness_says_that_it_is_out() {
    for fails in [0, 1, 4] {
        let mut world = warm(u64::from(fails));
        world.witness_fails = fails;
        world.disks[1].dead = true;
        let write = world.write(range(0, 8));
        while !world.answers.contains_key(&write) {
            assert!(world.step() || world.tick(), "the write never ended");
            assert!(!world.answers.contains_key(&write) || out_by_the_witness(&world, Slot::B));
        }
        assert_eq!(world.answers[&write], Ok(()), "a witness that fails for a moment is tried again");
    }
}

#[test]
fn rule_10_a_witness_that_stays_broken_gives_errors_until_it_works_again() {
    let mut world = warm(1);
    world.witness_fails = u32::MAX;
    world.disks[1].dead = true;
    let write = world.write(range(0, 8));
    while !world.answers.contains_key(&write) {
        assert!(world.step() || world.tick(), "the write never ended");
    }
    assert_eq!(world.answers[&write], Err(Errno::EIO));
    world.witness_fails = 0;
    world.settle();
    let write = world.write(range(0, 8));
    world.settle();
    assert_eq!((world.answers[&write], witnessed(&world, Slot::B)), (Ok(()), MemberState::Out));
}

#[test]
fn case_47_a_crash_while_a_leg_goes_out_loses_nothing_whatever_comes_back() {
    for seed in 0..60 {
        for steps in 0..14 {
            let mut before = warm(seed);
            before.disks[1].dead = true;
            before.write(range(0, 8));
            before.flush();
            for _ in 0..steps {
                before.step();
            }
            // A flush that is asked for now covers what was answered by now.
            before.flush();
            for _ in 0..steps {
                before.step();
            }
            before.disks[1].dead = false;
            for (present, witness) in
                [([true; 2], true), ([true, false], true), ([false, true], true), ([true; 2], false), ([true, false], false)]
            {
                let mut world = before.clone();
                if !witness {
                    world.witness.clear();
                }
                match world.crash(present) {
                    Ok(()) => assert!(witness || present == [true; 2], "one leg and no witness"),
                    Err(refusal) => {
                        let may = !witness && present != [true; 2] || present == [false, true];
                        assert!(may, "present {present:?}, witness {witness}: {refusal}");
                        continue;
                    }
                }
                world.witness.resize(8192, 0);
                world.settle();
                // The oracle of a read: not older than what a flush covered.
                world.read(range(0, 8));
                world.settle();
            }
        }
    }
}

#[test]
fn case_29_forced_a_stale_leg_is_served_and_the_other_one_is_filled_from_nothing() {
    let mut world = warm(6);
    world.disks[1].dead = true;
    world.write(range(0, 8));
    world.settle();
    world.disks[1].dead = false;
    world.force = Some(LegId([2; 16]));
    world.crash([false, true]).expect("the operator insists");
    world.settle();
    let flags = format::superblock(&world.disks[1].meta).expect("whole").0.flags;
    assert_eq!(flags, format::FLAG_FORCED, "it is on record");
    assert_eq!(world.mirror.readmission(&world.disks[0].meta), Some((Slot::A, Fill::Everything)));
}

#[test]
fn rule_12_the_objects_epoch_may_only_veto() {
    let mut world = warm(9);
    world.settle();
    let epoch = world.mirror.status().epoch.0;
    for (seen, allowed) in [(1, true), (epoch, true), (epoch + 1, false)] {
        let mut world = world.clone();
        world.seen_epoch = Some(Epoch(seen));
        assert_eq!(world.crash([true, true]).is_ok(), allowed, "seen {seen}, the witness says {epoch}");
    }
}

#[test]
fn rule_13_a_leg_that_no_record_names_is_never_merged() {
    let mut world = warm(7);
    world.write(range(0, 8));
    world.flush();
    world.settle();
    // It claims to be of this volume, and its record is newer than any.
    let other = [LegId([51; 16]), LegId([52; 16])];
    let mut meta = format::new_leg(VOLUME, other, other[1], BLOCKS);
    let mut superblock = format::superblock(&meta).expect("new").0;
    superblock.record.name.epoch = Epoch(99);
    meta[..4096].copy_from_slice(format::encode_superblock(&superblock).as_slice());
    meta.truncate(world.disks[1].meta.len());
    assert_eq!(world.mirror.readmission(&meta), None);
    world.disks[1].meta.clone_from(&meta);
    world.disks[1].durable = (0..8).map(|block| (block, 1 << 40)).collect();
    world.crash([true, true]).expect("A is IN");
    world.settle();
    assert_eq!(world.mirror.status().legs.map(|leg| leg.state), [LegState::In, LegState::Out]);
    world.write(range(2, 4));
    world.settle();
    for block in [0, 3, 7] {
        assert_eq!(world.read_now(block), Ok(if block == 3 { 3 } else { 2 }));
        assert_eq!(world.disks[1].read(block), 1 << 40, "it was written to");
    }
    assert_eq!(world.disks[1].meta, meta, "it was written to");
}

#[test]
fn rule_15_a_mirror_that_gave_up_answers_everything() {
    for seed in 0..300 {
        let mut world = warm(seed);
        let mut rng = Rng(seed);
        for n in 0..40 {
            let start = [0, 4090, 8190][rng.below(3) as usize] + rng.below(16);
            match rng.below(8) {
                0..=3 => drop(world.write(range(start, start + 1 + rng.below(8)))),
                4 => drop(world.read(range(start, start + 2))),
                5 => drop(world.zero(range(start, start + 2))),
                6 => drop(world.flush()),
                _ => drop((0..rng.below(8)).map(|_| world.step()).count()),
            }
            if n == 20 {
                match seed % 3 {
                    0 => world.disks.iter_mut().for_each(|disk| disk.dead = true),
                    1 => world.disks.iter_mut().for_each(|disk| disk.meta_fails = true),
                    _ => (world.disks[1].dead, world.disks[0].meta_fails) = (true, true),
                }
            }
            if n == 30 && seed % 2 == 0 {
                world.disks.iter_mut().for_each(|disk| (disk.dead, disk.meta_fails) = (false, false));
            }
        }
        // It also asserts that every request has ended.
        world.settle();
        let detach = world.command(Request::Detach(Slot::B));
        world.settle();
        assert!(world.answers.contains_key(&detach));
        let stop = world.command(Request::Stop);
        world.settle();
        assert!(world.answers.contains_key(&stop), "{}", world.trace());
    }
}

/// Its legs are somebody else's from then on.
#[test]
fn rule_25_after_a_stop_is_answered_nothing_is_asked_of_a_leg() {
    for seed in 0..100 {
        let mut world = warm(seed);
        let detach = world.command(Request::Detach(Slot::B));
        world.settle();
        assert_eq!(world.answers[&detach], Ok(()));
        for start in [0, 4096, 8192] {
            world.write(range(start, start + 8));
        }
        world.settle();
        world.bring_back(Slot::B);
        for _ in 0..Rng(seed).below(30) {
            world.step();
        }
        let stop = world.command(Request::Stop);
        while !world.answers.contains_key(&stop) {
            assert!(world.step() || world.tick(), "it is never stopped: {}", world.trace());
        }
        for _ in 0..20 {
            assert!(world.in_flight().is_empty(), "{:?} after the stop: {}", world.in_flight(), world.trace());
            world.tick();
        }
    }
}

#[test]
fn rule_15_a_mirror_whose_assembly_cannot_be_recorded_answers_everything() {
    let mut world = World::new(1);
    world.disks.iter_mut().for_each(|disk| disk.meta_fails = true);
    let early = [world.write(range(0, 8)), world.read(range(0, 8)), world.flush()];
    run_dry(&mut world);
    let late = [world.write(range(0, 8)), world.read(range(0, 8)), world.flush()];
    for tag in early.into_iter().chain(late) {
        assert!(world.answers[&tag].is_err(), "nothing is served");
    }
    let stop = world.command(Request::Stop);
    run_dry(&mut world);
    assert!(world.answers.contains_key(&stop));
}

#[test]
fn rule_16_a_fua_write_that_was_answered_survives_a_power_cut() {
    for seed in 0..60 {
        let mut world = warm(seed);
        world.flaky = [0, 2][(seed % 2) as usize];
        let write = world.write_fua(range(0, 8));
        while !world.answers.contains_key(&write) {
            assert!(world.step());
        }
        assert_eq!(world.answers[&write], Ok(()));
        world.flaky = 0;
        let one = [[true, true], [true, false], [false, true]][(seed % 3) as usize];
        world.crash(one).expect("both are IN");
        run_dry(&mut world);
        world.read(range(0, 8));
        world.settle();
    }
}

#[test]
fn case_12_a_write_in_flight_when_a_leg_fails_waits_for_its_out_too() {
    for seed in 0..50 {
        let mut world = warm(seed);
        let first = world.write(range(0, 8));
        let second = world.write(range(100, 108));
        let on_b = |world: &World, start| {
            let theirs = |op: &LegOp| matches!(op, LegOp::Write { range, .. } if range.start == start);
            in_flight_on(world, Slot::B, theirs).expect("it was issued")
        };
        // B takes neither of them. It fails the first one; the second one it has in flight until B is OUT, or fails it too, as it comes.
        let (fails, hangs) = (on_b(&world, 0), on_b(&world, 100));
        world.end(fails, Outcome::Failed(Errno::EIO));
        if seed % 2 == 0 {
            world.stuck.insert(hangs);
        } else {
            world.end(hangs, Outcome::Failed(Errno::EIO));
        }
        while !(world.answers.contains_key(&first) && world.answers.contains_key(&second)) {
            let answered = [first, second].iter().any(|tag| world.answers.contains_key(tag));
            assert!(!answered || out_by_the_witness(&world, Slot::B), "answered before B is durably OUT");
            assert!(world.step(), "a write never ended");
        }
        // Whatever comes back now, both are there: the oracle of a read is that it is not older than what a flush covered.
        world.flush();
        run_dry(&mut world);
        world.crash([true, true]).expect("A is IN");
        world.settle();
        assert_eq!((world.read_now(0), world.read_now(100)), (Ok(2), Ok(3)));
    }
}

#[test]
fn rule_20_the_first_superblock_of_a_leg_that_returns_goes_to_its_older_slot() {
    // An even and an odd number of superblocks before; whether the mirror was assembled without it meanwhile.
    for (restarts, absent) in [(0, false), (1, false), (0, true), (1, true)] {
        let mut world = warm(60);
        for _ in 0..restarts {
            world.settle();
            world.crash([true, true]).expect("both are there");
            run_dry(&mut world);
        }
        world.disks[1].dead = true;
        world.write(range(0, 8));
        world.settle();
        let newest = format::superblock(&world.disks[1].meta).expect("whole").1;
        if absent {
            world.crash([true, false]).expect("the leg that counts is there");
            run_dry(&mut world);
        }
        world.bring_back(Slot::B).expect("it has a place");
        let offset = loop {
            let superblock = world.in_flight().into_iter().find_map(|(_, slot, op)| match op {
                LegOp::WriteMeta { offset, .. } if slot == Slot::B && offset < 8192 => Some(offset),
                _ => None,
            });
            if let Some(offset) = superblock {
                break offset;
            }
            assert!(world.step(), "no superblock is written to the leg");
        };
        // If it is torn, what is left is the record that the others say was seen there.
        assert_eq!(offset, 4096 * u64::from(1 - newest), "after {restarts} restarts, absent: {absent}");
    }
}

#[test]
fn rule_31_no_size_is_published_before_both_legs_have_it_whichever_of_them_comes_back() {
    let blocks = BLOCKS + 5000;
    let mut world = warm(1);
    let grow = world.command(Request::Grow { blocks });
    let mut grown = 0;
    world.in_every_order(&mut |world| {
        let size = world.mirror.status().blocks;
        let answered = world.answers.contains_key(&grow);
        assert_eq!(size, if answered { blocks } else { BLOCKS });
        grown += usize::from(answered);
        for present in [[true, true], [true, false], [false, true]] {
            let mut after = world.clone();
            after.crash(present).expect("both are IN");
            assert!(after.mirror.status().blocks >= size, "{present:?}: {}", world.trace());
        }
        assert!(answered || !world.movable().is_empty(), "it never grows");
    });
    assert!(grown > 0);
}
