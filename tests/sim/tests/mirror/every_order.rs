//! Cases in every order in which what is on its way may end (mirror rules 1 to 15, 28).

use std::collections::BTreeSet;

use lockstep_core::{
    io::{Buffer, LegOp, Outcome},
    status::LegState,
    units::{BLOCK_SIZE, BlockRange, Errno, Slot, Tag},
};
use lockstep_sim::{Rng, World};

use crate::{assert_equal_again, in_flight_on, on_full_disks, out_by_the_witness, power_cuts, range, run_dry, small, until_writing, warm};

/// The ranges of the writes that a leg has in flight.
fn writes_on(world: &World, slot: Slot) -> Vec<BlockRange> {
    let range = |(_, on, op): (_, Slot, LegOp)| match op {
        LegOp::Write { range, .. } if on == slot => Some(range),
        _ => None,
    };
    world.in_flight().into_iter().filter_map(range).collect()
}

/// That the writes were submitted in this order, that none is issued before all earlier ones that overlap it were answered, and none that none
/// overlaps is kept waiting.
fn assert_in_order(world: &World, writes: &[(Tag, BlockRange)]) {
    for (n, (tag, range)) in writes.iter().enumerate() {
        let earlier = || writes[..n].iter().filter(|(_, earlier)| earlier.overlaps(*range));
        let free = earlier().all(|(tag, _)| world.answers.contains_key(tag));
        let issued = Slot::BOTH.into_iter().any(|slot| writes_on(world, slot).contains(range));
        let answered = world.answers.contains_key(tag);
        assert_eq!(issued || answered, free, "{range:?}: {}", world.trace());
    }
}

#[test]
fn case_01_in_every_order_of_completion_and_after_a_crash_at_any_moment_the_legs_are_equal_and_the_last_one_wins() {
    let mut world = warm(1);
    let ranges = [range(100, 200), range(150, 200), range(160, 200)];
    let writes = ranges.map(|range| (world.write(range), range));
    let worlds = world.in_every_order(&mut |world| {
        assert_in_order(world, &writes);
        for mut after in power_cuts(world, 4) {
            after.settle();
            after.assert_identical();
        }
        if world.movable().is_empty() {
            world.assert_identical();
            assert_eq!([100, 149, 150, 159, 160, 199].map(|block| world.disks[1].read(block)), [2, 2, 3, 3, 4, 4]);
        }
    });
    assert!(worlds > 9, "{worlds}");
}

#[test]
fn case_02_touching_writes_do_not_wait_for_each_other_in_any_order() {
    let mut world = warm(1);
    let ranges = [range(0, 8), range(8, 16), range(16, 17)];
    let writes = ranges.map(|range| (world.write(range), range));
    let worlds = world.in_every_order(&mut |world| assert_in_order(world, &writes));
    assert_eq!(worlds, 64, "each of six writes has ended or has not");
}

#[test]
fn case_03_a_write_that_overlaps_two_in_flight_waits_for_both_whichever_ends_first() {
    let mut world = warm(1);
    let ranges = [range(0, 8), range(16, 24), range(4, 20)];
    let writes = ranges.map(|range| (world.write(range), range));
    world.in_every_order(&mut |world| {
        assert_in_order(world, &writes);
        if world.movable().is_empty() {
            world.assert_identical();
            assert_eq!([3, 4, 19, 20].map(|block| world.disks[0].read(block)), [2, 4, 4, 3]);
        }
    });
}

#[test]
fn case_04_a_write_that_overlaps_only_a_queued_one_goes_after_that() {
    let mut world = warm(1);
    let ranges = [range(0, 8), range(16, 24), range(4, 20), range(10, 12)];
    let writes = ranges.map(|range| (world.write(range), range));
    world.in_every_order(&mut |world| {
        assert_in_order(world, &writes);
        if world.movable().is_empty() {
            world.assert_identical();
            assert_eq!([9, 10, 11, 12].map(|block| world.disks[1].read(block)), [4, 5, 5, 4]);
        }
    });
}

#[test]
fn case_06_a_large_write_is_issued_when_the_small_ones_before_it_are_done_however_many_come_after_it() {
    for seed in 0..50 {
        let (mut world, mut rng) = (warm(seed), Rng(seed));
        let small = |world: &mut World, rng: &mut Rng| {
            let at = 100 + rng.below(60);
            world.write(range(at, at + 1 + rng.below(4)))
        };
        let before: BTreeSet<Tag> = (0..8).map(|_| small(&mut world, &mut rng)).collect();
        let large = world.write(range(100, 200));
        let mut steps = 0;
        while !writes_on(&world, Slot::A).contains(&range(100, 200)) {
            steps += 1;
            assert!(steps <= 2 * before.len(), "still not issued, after {steps} pieces of work: {}", world.trace());
            small(&mut world, &mut rng);
            assert!(world.step());
        }
        assert!(before.iter().all(|tag| world.answers.contains_key(tag)) && !world.answers.contains_key(&large));
        world.settle();
        world.assert_identical();
    }
}

/// A world in which so many more small writes come, each at any moment.
fn while_more_come(world: &World, writes: &[(Tag, BlockRange)], more: u64, ends: &mut usize) {
    world.in_every_order(&mut |world| {
        assert_in_order(world, writes);
        if more > 0 {
            let (mut world, mut writes) = (world.clone(), writes.to_vec());
            let small = range(100 + 40 * more, 104 + 40 * more);
            writes.push((world.write(small), small));
            while_more_come(&world, &writes, more - 1, ends);
        } else if world.movable().is_empty() {
            *ends += 1;
            assert!(writes.iter().all(|(tag, _)| world.answers[tag] == Ok(())));
            world.assert_identical();
            assert_eq!([100, 140, 180].map(|block| world.disks[1].read(block)), [4, 6, 5]);
        }
    });
}

#[test]
fn case_06_in_every_order_a_large_write_waits_for_the_small_ones_before_it_only_whenever_others_come() {
    let mut world = warm(1);
    let writes = [range(100, 102), range(198, 200), range(100, 200)].map(|range| (world.write(range), range));
    let mut ends = 0;
    while_more_come(&world, &writes, 2, &mut ends);
    assert!(ends > 99, "{ends}");
}

#[test]
fn case_07_the_legs_never_see_a_pair_of_overlapping_writes_in_opposite_order() {
    for second in [range(0, 9), range(4, 12), range(7, 8)] {
        for slow in Slot::BOTH {
            let mut world = warm(1);
            let first = (world.write(range(0, 8)), range(0, 8));
            // All that the fast leg has for the pair is done before the slow one does anything.
            let held = in_flight_on(&world, slow, |op| matches!(op, LegOp::Write { .. })).expect("the first one");
            world.stuck.insert(held);
            let second = (world.write(second), second);
            run_dry(&mut world);
            assert!(writes_on(&world, slow.other()).is_empty() && !world.answers.contains_key(&second.0));
            world.stuck.clear();
            world.in_every_order(&mut |world| {
                assert_in_order(world, &[first, second]);
                if world.movable().is_empty() {
                    world.assert_identical();
                    assert_eq!(world.disks[0].read(7), 3);
                }
            });
        }
    }
}

#[test]
fn case_08_both_legs_and_every_retry_are_given_the_one_copy_of_the_payload_until_the_last_has_ended() {
    for done in [0, 1, 512, 4096, 5000, 3 * 4096 + 1, 7 * 4096] {
        let mut world = warm(1);
        let tag = world.write(range(0, 8));
        let given = |world: &World, slot| {
            world.in_flight().into_iter().find_map(|(io, on, op)| match op {
                LegOp::Write { range, buffer, .. } if on == slot => Some((io, range, buffer)),
                _ => None,
            })
        };
        let (io, ..) = given(&world, Slot::A).expect("it was issued");
        world.finish(io);
        let (io, whole, buffer) = given(&world, Slot::B).expect("it was issued");
        assert_eq!((whole, buffer), (range(0, 8), Buffer::Request { tag, skip: 0 }));
        // The world asserts that nothing is released that is in use, and that the memory still holds what was submitted.
        world.end(io, Outcome::Done(done));
        let skip = done / BLOCK_SIZE;
        let (_, rest, buffer) = given(&world, Slot::B).expect("the remainder");
        assert_eq!((rest, buffer), (range(skip, 8), Buffer::Request { tag, skip }), "after {done} bytes");
    }
}

/// B fails while the first of two overlapping writes is on both legs; one more is apart from them.
fn losing_b(seed: u64) -> (World, [Tag; 3]) {
    let mut world = warm(seed);
    world.flush();
    run_dry(&mut world);
    let tags = [range(0, 4), range(2, 6), range(20, 22)].map(|range| world.write(range));
    world.disks[1].dead = true;
    (world, tags)
}

#[test]
fn case_09_and_12_in_every_order_all_that_a_lost_leg_missed_is_answered_after_its_out_is_durable_and_goes_on_without_it() {
    let (world, tags) = losing_b(1);
    let worlds = world.in_every_order(&mut |world| {
        for tag in tags {
            assert!(!world.answers.contains_key(&tag) || out_by_the_witness(world, Slot::B), "{}", world.trace());
            assert!(world.answers.get(&tag).is_none_or(Result::is_ok));
        }
        assert!(!writes_on(world, Slot::B).contains(&range(2, 6)), "the second one is A's alone");
        if world.movable().is_empty() {
            assert!(tags.iter().all(|tag| world.answers[tag] == Ok(())));
            assert_eq!([0, 2, 5, 20].map(|block| world.disks[0].read(block)), [2, 3, 3, 4]);
        }
    });
    assert!(worlds > 20, "{worlds}");
}

#[test]
fn case_10_a_crash_before_a_loss_is_durable_leaves_either_value_and_the_same_on_both_legs() {
    let (world, tags) = losing_b(1);
    let mut unanswered = 0;
    world.in_every_order(&mut |world| {
        if tags.iter().any(|tag| world.answers.contains_key(tag)) {
            return;
        }
        unanswered += 1;
        for mut after in power_cuts(world, 4) {
            run_dry(&mut after);
            let found = after.read_now(0).expect("it can be read");
            assert!([1, 2].contains(&found), "{found}");
            assert_equal_again(&mut after);
            assert_eq!(after.read_now(0), Ok(found), "an unanswered write came or went after it had been read: {}", after.trace());
        }
    });
    assert!(unanswered > 6, "{unanswered}");
}

#[test]
fn case_11_and_15_what_was_answered_or_flushed_beside_a_lost_leg_survives_a_crash_at_any_moment_with_both_disks_back() {
    let (world, tags) = losing_b(1);
    let mut killed = 0;
    world.in_every_order(&mut |world| {
        // Killed: what was answered is on A, flushed or not.
        let mut after = world.clone();
        after.disks[1].dead = false;
        after.kill([true, true]).expect("A is IN");
        run_dry(&mut after);
        for (n, (tag, block)) in tags.iter().zip([0, 2, 20]).enumerate() {
            if world.answers.contains_key(tag) {
                killed += 1;
                assert_eq!(after.mirror.status().legs[1].state, LegState::Out, "B is stale");
                assert!(after.read_now(block).is_ok_and(|found| found >= n as u64 + 2), "{}", after.trace());
            }
        }
        assert_equal_again(&mut after);
        // A flush that is asked for now, whatever it finds B to be, and then the power fails.
        let mut flushed = world.clone();
        let flush = flushed.flush();
        while !flushed.answers.contains_key(&flush) {
            assert!(flushed.step(), "it never ends");
        }
        assert_eq!(flushed.answers[&flush], Ok(()));
        for mut after in power_cuts(&flushed, 2) {
            run_dry(&mut after);
            // The oracle of a read: not older than what a flush covered.
            after.read(range(0, 24));
            assert_equal_again(&mut after);
        }
    });
    assert!(killed > 3, "{killed}");
}

#[test]
fn case_13_in_every_order_nothing_is_answered_beside_a_lost_leg_if_the_survivor_cannot_record_the_loss() {
    let (mut world, tags) = losing_b(1);
    world.disks[0].meta_fails = true;
    world.in_every_order(&mut |world| {
        for tag in tags {
            assert!(world.answers.get(&tag).is_none_or(Result::is_err), "{}", world.trace());
        }
        if world.movable().is_empty() {
            assert!(tags.iter().all(|tag| world.answers.contains_key(tag)));
        }
    });
}

#[test]
fn case_15_in_every_order_a_flush_that_b_fails_succeeds_after_b_is_durably_out() {
    let mut world = warm(1);
    world.write(range(0, 8));
    run_dry(&mut world);
    let flush = world.flush();
    world.disks[1].dead = true;
    world.in_every_order(&mut |world| {
        let answered = world.answers.contains_key(&flush);
        assert!(!answered || out_by_the_witness(world, Slot::B), "{}", world.trace());
        for mut after in power_cuts(world, 4) {
            run_dry(&mut after);
            if answered {
                assert_eq!(after.mirror.status().legs.map(|leg| leg.state), [LegState::In, LegState::Out]);
                assert_eq!(after.read_now(7), Ok(2), "all of it is on A");
            }
            assert_equal_again(&mut after);
        }
        assert!(answered || !world.movable().is_empty());
    });
}

#[test]
fn case_16_in_every_order_a_flush_that_both_fail_is_an_error_and_so_is_the_next_one() {
    let mut world = warm(1);
    world.write(range(0, 8));
    run_dry(&mut world);
    let flush = world.flush();
    world.disks.iter_mut().for_each(|disk| disk.dead = true);
    world.in_every_order(&mut |world| {
        if world.movable().is_empty() {
            assert!(world.answers[&flush].is_err());
            let mut world = world.clone();
            world.disks.iter_mut().for_each(|disk| disk.dead = false);
            let (next, write) = (world.flush(), world.write(range(0, 8)));
            world.settle();
            assert!(world.answers[&next].is_err() && world.answers[&write].is_err(), "what is lost is lost");
        }
        assert!(world.answers.get(&flush).is_none_or(Result::is_err));
    });
}

#[test]
fn case_17_a_write_that_comes_during_a_flush_is_covered_by_the_next_one_only() {
    let mut world = warm(1);
    let early = world.flush();
    let write = world.write(range(0, 8));
    let mut between = 0;
    world.in_every_order(&mut |world| {
        if !world.answers.contains_key(&write) || world.answers.contains_key(&early) {
            return;
        }
        between += 1;
        let mut world = world.clone();
        let late = world.flush();
        world.in_every_order(&mut |world| {
            if !world.answers.contains_key(&late) {
                return;
            }
            for mut after in power_cuts(world, 3) {
                run_dry(&mut after);
                assert_eq!(after.read_now(7), Ok(2), "the flush that came after its answer covers it: {}", world.trace());
            }
        });
    });
    assert!(between >= 3, "{between}");
}

#[test]
fn case_39_in_every_order_an_error_of_the_last_leg_goes_to_its_caller_alone_and_what_was_answered_survives_a_kill() {
    for landed in [false, true] {
        let mut world = warm(1);
        world.disks[1].dead = true;
        world.write(range(0, 8));
        world.settle();
        let tags = [range(0, 4), range(2, 6), range(20, 22)].map(|range| world.write(range));
        let io = in_flight_on(&world, Slot::A, |op| matches!(op, LegOp::Write { range, .. } if range.start == 0)).expect("the first one");
        if landed {
            world.disks[0].cache.extend((0..4).map(|block| (block, 3)));
        }
        world.stuck.insert(io);
        let mut ends = 0;
        world.in_every_order(&mut |world| {
            let mut world = world.clone();
            world.end(io, Outcome::Failed(Errno::EIO));
            world.in_every_order(&mut |world| {
                assert_eq!(world.mirror.status().legs.map(|leg| leg.state), [LegState::In, LegState::Out]);
                assert_eq!(world.answers.get(&tags[0]), Some(&Err(Errno::EIO)));
                assert!(tags[1..].iter().all(|tag| world.answers.get(tag).is_none_or(Result::is_ok)));
                let mut after = world.clone();
                after.disks[1].dead = false;
                after.kill([true, true]).expect("A is IN");
                run_dry(&mut after);
                let found = [0, 2, 20].map(|block| after.read_now(block).expect("reads work"));
                assert_eq!(found[0], if landed { 3 } else { 2 });
                for (n, tag) in tags.iter().enumerate().skip(1) {
                    assert!(found[n] == n as u64 + 3 || !world.answers.contains_key(tag), "{found:?}: {}", world.trace());
                }
                assert_equal_again(&mut after);
                if world.movable().is_empty() {
                    ends += 1;
                    assert!(tags.iter().all(|tag| world.answers.contains_key(tag)));
                }
            });
        });
        assert!(ends > 0);
    }
}

#[test]
fn case_41_in_every_order_what_finds_no_space_takes_nobody_out_and_each_block_is_old_or_new_on_both_legs_after_a_power_cut() {
    for full in [[true, false], [false, true], [true, true]] {
        let after_a_cut = |after: &mut World, answer: Option<_>| {
            let found = after.read_now(2).expect("both can read");
            assert!(found == 2 || found == 3 && answer.is_none(), "{found}: {}", after.trace());
            assert_equal_again(after);
            assert_eq!(after.read_now(2), Ok(found), "{}", after.trace());
        };
        on_full_disks(
            full,
            |world| world.write(range(2, 6)),
            4,
            after_a_cut,
            |world, answer| {
                assert_eq!(answer, Err(Errno::ENOSPC), "{}", world.trace());
                assert_eq!([0, 1].map(|disk| world.disks[disk].read(2)), [2; 2], "it is taken back before the answer");
            },
        );
    }
}

#[test]
fn case_47_in_every_order_a_leg_that_goes_out_costs_nothing_whatever_comes_back_after_a_crash() {
    let (world, tags) = losing_b(1);
    let (mut alone, mut refused) = (0, 0);
    world.in_every_order(&mut |world| {
        for (present, witness) in
            [([true; 2], true), ([true, false], true), ([false, true], true), ([true; 2], false), ([true, false], false)]
        {
            for power in [false, true] {
                let mut after = world.clone();
                after.disks[1].dead = false;
                if !witness {
                    after.witness.clear();
                }
                let started = if power { after.crash(present) } else { after.kill(present) };
                if let Err(refusal) = started {
                    // B alone, that is OUT or may be; or one leg and nobody who knows.
                    let may = present == [false, true] || !witness && present != [true; 2];
                    assert!(may, "{present:?}, witness {witness}: {refusal}: {}", world.trace());
                    refused += 1;
                    continue;
                }
                assert!(witness || present == [true; 2], "one leg and no witness");
                after.witness.resize(8192, 0);
                run_dry(&mut after);
                alone += usize::from(present == [false, true]);
                for (n, (tag, block)) in tags.iter().zip([0, 2, 20]).enumerate() {
                    let found = after.read_now(block).expect("it can be read");
                    let lost = !power && world.answers.contains_key(tag) && found < n as u64 + 2;
                    assert!(!lost, "{present:?}, witness {witness}: {found} at {block}: {}", after.trace());
                }
                // The oracle of a read: not older than what a flush covered.
                after.read(range(0, 24));
                after.settle();
            }
        }
    });
    assert!(alone > 0 && refused > 0, "{alone} {refused}");
}

#[test]
fn case_49_whichever_leg_fails_a_write_first_that_both_fail_nobody_goes_out_and_the_legs_end_equal_after_a_power_cut_at_every_moment() {
    // What the legs made of it before they failed.
    for (took, first) in (0..4).flat_map(|took| Slot::BOTH.map(|first| (took, first))) {
        let mut world = small(64);
        let tags = [range(2, 6), range(4, 8), range(10, 12)].map(|range| world.write(range));
        until_writing(&mut world);
        let write =
            |slot| in_flight_on(&world, slot, |op| matches!(op, LegOp::Write { range, .. } if range.start == 2)).expect("it was issued");
        let [one, two] = [first, first.other()].map(write);
        for at in (0..2).filter(|at| took >> at & 1 == 1) {
            world.disks[at].cache.extend((2..6).map(|block| (block, 2)));
        }
        world.end(one, Outcome::Failed(Errno::EIO));
        world.stuck.insert(two);
        let mut ends = 0;
        world.in_every_order(&mut |world| {
            assert!(!world.answers.contains_key(&tags[0]), "decided before both have reported");
            let mut world = world.clone();
            world.end(two, Outcome::Failed(Errno::EIO));
            world.in_every_order(&mut |world| {
                assert_eq!(world.mirror.status().legs.map(|leg| leg.state), [LegState::In; 2]);
                assert_eq!(world.answers.get(&tags[0]), Some(&Err(Errno::EIO)));
                assert!(tags[1..].iter().all(|tag| world.answers.get(tag).is_none_or(Result::is_ok)));
                for mut after in power_cuts(world, 2) {
                    run_dry(&mut after);
                    let found = [2, 4].map(|block| after.read_now(block).expect("both can read"));
                    assert!([1, 2].contains(&found[0]) && [1, 2, 3].contains(&found[1]), "{found:?}: {}", world.trace());
                    assert_equal_again(&mut after);
                    assert_eq!([2, 4].map(|block| after.read_now(block)), found.map(Ok), "{}", after.trace());
                }
                if world.movable().is_empty() {
                    ends += 1;
                    assert!(tags.iter().all(|tag| world.answers.contains_key(tag)) && world.healthy());
                    world.assert_identical();
                }
            });
        });
        assert!(ends > 3, "{ends}");
    }
}

/// Goes on with reads of one block, one after the other, between everything else; each must find nothing older than the one before.
fn read_between(world: &World, reads: u32, reading: Option<Tag>, newest: u64, ends: &mut usize) {
    if let Some(read) = reading.filter(|read| world.answers.contains_key(read)) {
        if world.answers[&read].is_err() {
            return;
        }
        let found = world.found(read).expect("it was answered");
        assert!(found >= newest, "a read found {found} after {newest}: {}", world.trace());
        return read_between(world, reads, None, found, ends);
    }
    *ends += 1;
    if reading.is_none() && reads > 0 {
        let mut next = world.clone();
        let read = next.read(range(0, 1));
        read_between(&next, reads - 1, Some(read), newest, ends);
    }
    for io in world.movable() {
        let mut next = world.clone();
        next.finish(io);
        read_between(&next, reads, reading, newest, ends);
    }
}

#[test]
fn case_32_reads_between_the_landings_of_a_write_never_find_the_new_and_then_the_old() {
    for (dead, full) in [([false, false], [false, false]), ([false, true], [false, false]), ([false, false], [true, false])] {
        let mut world = warm(1);
        world.write(range(0, 2));
        run_dry(&mut world);
        if full[0] {
            // A has no space: what B took is taken back.
            world.disks[0].full = true;
        }
        world.write(range(0, 2));
        world.disks[1].dead = dead[1];
        let mut ends = 0;
        read_between(&world, 3, None, 0, &mut ends);
        assert!(ends > 30, "{ends}");
    }
}
