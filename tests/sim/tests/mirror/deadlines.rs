//! Legs that hang, processes that stand still (mirror rules 25 and 27).

use lockstep_core::{
    io::{LegOp, Notice, Outcome, Request},
    status::LegState,
    units::{Errno, LegId, Slot, Tag},
};
use lockstep_sim::{Rng, World};

use crate::{in_flight_on, miss_and_return, range, run_dry, small, warm};

/// Ticks until the clock has moved by so much. Everything that can end does.
pub(crate) fn run_for(world: &mut World, millis: u64) {
    let end = world.now().plus_millis(millis);
    while world.mirror.next_deadline().is_some_and(|at| at <= end) {
        world.tick();
        run_dry(world);
    }
}

fn out(world: &World, slot: Slot) -> bool {
    world.mirror.status().legs[slot.index()].state == LegState::Out
}

#[test]
fn case_36_a_leg_that_hangs_goes_out_by_its_deadline_and_what_it_does_late_is_harmless() {
    for seed in 0..20 {
        let mut world = warm(seed);
        world.write(range(0, 8));
        world.write(range(100, 101));
        world.flush();
        world.settle();
        // Both legs get reads.
        world.disks[1].hung = true;
        let reads: Vec<Tag> = (0..6).map(|_| world.read(range(0, 8))).collect();
        let late_read = in_flight_on(&world, Slot::B, |op| matches!(op, LegOp::Read { .. })).expect("B was asked too");
        let write = world.write(range(20, 28));
        run_dry(&mut world);
        run_for(&mut world, 28_000);
        assert!(!out(&world, Slot::B) && !world.answers.contains_key(&write), "before its deadline");
        run_for(&mut world, 5_000);
        assert!(out(&world, Slot::B) && world.notices.contains(&Notice::LegFailed { slot: Slot::B, error: Errno::ETIMEDOUT }));
        for tag in reads.iter().chain([&write]) {
            assert_eq!(world.answers.get(tag), Some(&Ok(())), "A serves it");
        }
        // The simulated kernel checks that what a late I/O uses has the content it was issued with; and what is read now lands elsewhere.
        world.write(range(0, 8));
        world.write(range(20, 28));
        let newer = world.read(range(0, 8));
        world.finish(late_read);
        let early = world.bring_back(Slot::B).expect("it has a place");
        run_dry(&mut world);
        assert_eq!(world.answers[&early], Err(Errno::EBUSY), "it has I/O outstanding");
        world.disks[1].hung = false;
        world.settle();
        assert_eq!(world.answers[&newer], Ok(()));
        world.bring_back(Slot::B);
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
    }
}

#[test]
fn case_36_a_late_read_does_not_land_in_memory_that_the_request_goes_on_with() {
    let mut world = warm(1);
    world.write(range(0, 8));
    world.settle();
    world.disks[1].hung = true;
    let reads: Vec<Tag> = (0..4).map(|_| world.read(range(0, 8))).collect();
    let late: Vec<_> = world.in_flight().into_iter().filter(|(_, slot, _)| *slot == Slot::B).map(|(io, ..)| io).collect();
    while !world.notices.contains(&Notice::LegOut { slot: Slot::B }) {
        assert!(world.step() || world.tick());
    }
    // The reads are on A now, and what B had of old arrives, as garbage.
    world.disks[1].cache.extend((0..8).map(|block| (block, 1)));
    late.into_iter().for_each(|io| world.finish(io));
    world.settle();
    assert!(reads.iter().all(|tag| world.answers[tag] == Ok(())));
}

#[test]
fn rule_27_if_both_legs_are_late_nobody_goes_out() {
    for skew in [0, 1_000, 10_000] {
        let mut world = warm(1);
        world.disks[0].hung = true;
        let first = world.read(range(0, 1));
        let second = world.read(range(0, 1));
        run_for(&mut world, skew);
        world.disks[1].hung = true;
        let write = world.write(range(0, 8));
        run_for(&mut world, 300_000);
        assert!(!out(&world, Slot::A) && !out(&world, Slot::B), "skew {skew}");
        world.disks.iter_mut().for_each(|disk| disk.hung = false);
        world.settle();
        assert!(world.healthy());
        assert_eq!([first, second, write].map(|tag| world.answers[&tag]), [Ok(()); 3]);
        world.assert_identical();
    }
}

#[test]
fn rule_27_a_leg_that_hangs_goes_out_though_the_other_one_is_slow() {
    let mut world = warm(1);
    world.disks[1].hung = true;
    let write = world.write(range(0, 8));
    run_dry(&mut world);
    // From now on A has always something that is older than half a deadline.
    let mut slow = Vec::new();
    for _ in 0..6 {
        let new = loop {
            world.read(range(100, 101));
            let mut reads = world.in_flight().into_iter().filter(|(_, slot, op)| *slot == Slot::A && matches!(op, LegOp::Read { .. }));
            if let Some((io, ..)) = reads.next_back().filter(|(io, ..)| !slow.contains(io)) {
                break io;
            }
        };
        slow.push(new);
        world.stuck.extend(slow.last().copied());
        run_for(&mut world, 9_000);
        if slow.len() > 2 {
            world.stuck.remove(&slow[0]);
            world.finish(slow.remove(0));
        }
    }
    assert!(out(&world, Slot::B) && world.answers.contains_key(&write));
}

#[test]
fn case_51_a_process_that_was_stopped_takes_nobody_out() {
    for hung in [None, Some(Slot::A), Some(Slot::B)] {
        let mut world = warm(4);
        if let Some(slot) = hung {
            world.disks[slot.index()].hung = true;
        }
        let write = world.write(range(0, 8));
        // The other one's completion has come, and is delivered before the tick.
        run_dry(&mut world);
        for _ in 0..20 {
            world.sleep(60_000);
            world.tick();
        }
        assert!(!out(&world, Slot::A) && !out(&world, Slot::B), "it has not run for half a minute");
        world.disks.iter_mut().for_each(|disk| disk.hung = false);
        world.settle();
        assert_eq!(world.answers[&write], Ok(()));
        assert!(world.healthy());
    }
}

/// Stopped for longer than the deadline; meanwhile the disks have done nothing.
fn stopped(world: &World) -> World {
    let mut world = world.clone();
    world.sleep(60_000);
    world.tick();
    world
}

fn assert_nobody_failed(world: &World) {
    let failed = |notice: &Notice| matches!(notice, Notice::LegFailed { .. } | Notice::LegOut { .. });
    assert!(!world.notices.iter().any(failed), "{}", world.trace());
}

#[test]
fn case_51_a_process_that_is_stopped_at_any_two_moments_or_again_and_again_at_one_takes_nobody_out_in_any_order() {
    let mut requests = warm(4);
    requests.write(range(0, 8));
    requests.write(range(4, 12));
    requests.read(range(20, 21));
    let mut crashed = small(64);
    crashed.write(range(2, 6));
    run_dry(&mut crashed);
    crashed.crash([true, true]).expect("both are IN");
    let mut returning = small(64);
    miss_and_return(&mut returning);
    returning.notices.clear();
    for world in [requests, crashed, returning] {
        let mut twice = 0;
        let once = world.in_every_order(&mut |world| {
            let mut long = stopped(world);
            twice += long.in_every_order(&mut |world| assert_nobody_failed(&stopped(world)));
            for _ in 0..25 {
                long = stopped(&long);
            }
            assert_nobody_failed(&long);
            long.settle();
            assert_nobody_failed(&long);
            assert!(long.healthy() && long.answers.values().all(Result::is_ok), "{}", long.trace());
            long.assert_identical();
        });
        assert!(once > 13 && twice > 70, "{once} {twice}");
    }
}

#[test]
fn rule_27_an_idle_hour_counts_for_nobodys_deadline() {
    let mut world = warm(4);
    world.settle();
    world.sleep(3_600_000);
    world.disks[1].hung = true;
    world.write(range(0, 8));
    world.tick();
    world.tick();
    assert!(!out(&world, Slot::B));
}

#[test]
fn rule_27_the_last_leg_is_waited_for() {
    let mut world = warm(4);
    world.command(Request::Detach(Slot::B));
    world.settle();
    world.disks[0].hung = true;
    let write = world.write(range(0, 8));
    let grow = world.command(Request::Grow { blocks: lockstep_sim::BLOCKS + 8 });
    run_for(&mut world, 200_000);
    assert!(!world.answers.contains_key(&write) && !world.answers.contains_key(&grow));
    world.disks[0].hung = false;
    world.settle();
    assert_eq!([write, grow].map(|tag| world.answers[&tag]), [Ok(()); 2]);
}

/// Everything that a mirror does, with a leg that stops answering at some point of it.
fn hanging_history(seed: u64) {
    let mut world = World::new(seed);
    let mut rng = Rng(seed ^ 0xfade);
    let slot = if seed.is_multiple_of(4) { Slot::A } else { Slot::B };
    let rebuilding = seed.is_multiple_of(3) && slot == Slot::B;
    if rebuilding {
        run_dry(&mut world);
        world.write(range(0, 600));
        world.settle();
        world.disks[1].dead = true;
        world.write(range(100, 400));
        world.write(range(5000, 5600));
        world.settle();
        world.bring_back(Slot::B);
    }
    let hang_at = rng.below(40);
    for n in 0..50 {
        let start = [0, 4090, 8150][rng.below(3) as usize] + rng.below(24);
        let piece = range(start, start + 1 + rng.below(8));
        match rng.below(12) {
            0..=3 => drop(world.write(piece)),
            4 => drop(world.write_fua(piece)),
            5 | 6 => drop(world.read(piece)),
            7 => drop(world.zero(piece)),
            8 => drop(world.flush()),
            9 => drop(world.tick()),
            _ => {}
        }
        if n == hang_at {
            world.disks[slot.index()].hung = true;
        }
        for _ in 0..rng.below(6) {
            world.step();
        }
    }
    // It asserts that every request has ended.
    world.settle();
    assert!(world.answers.values().filter(|answer| answer.is_err()).all(|answer| rebuilding && *answer == Err(Errno::EIO)));
    assert!(!out(&world, slot.other()));
    if seed.is_multiple_of(2) {
        world.disks[slot.index()].hung = false;
        run_dry(&mut world);
    } else {
        let present = Slot::BOTH.map(|present| present != slot);
        world.kill(present).expect("the other one is IN");
        run_dry(&mut world);
        world.write(range(0, 30));
        world.read(range(0, 40));
        world.settle();
        world.land_zombies();
        world.disks[slot.index()].hung = false;
    }
    if out(&world, slot) {
        world.bring_back(slot);
    }
    world.settle();
    world.read(range(0, 600));
    world.settle();
    assert!(world.healthy(), "{:?}", world.mirror.status());
    world.assert_identical();
}

#[test]
fn rule_27_whatever_a_leg_hangs_in_every_request_ends_and_it_comes_back_equal() {
    for seed in 0..400 {
        if let Err(panic) = std::panic::catch_unwind(|| hanging_history(seed)) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn rule_27_a_mirror_that_cannot_say_that_a_hung_leg_is_out_answers_everything() {
    for witness in [false, true] {
        let mut world = warm(2);
        world.disks[1].hung = true;
        let tags = [world.write(range(0, 8)), world.read(range(100, 101)), world.read(range(100, 101)), world.flush()];
        if witness {
            world.witness_fails = u32::MAX
        } else {
            world.disks[0].meta_fails = true
        }
        run_for(&mut world, 60_000);
        assert!(tags.iter().all(|tag| world.answers.contains_key(tag)), "{:?}", world.answers);
        assert!(world.answers[&tags[0]].is_err() && world.answers[&tags[3]].is_err());
        assert_eq!([tags[1], tags[2]].map(|tag| world.answers[&tag]), [Ok(()); 2], "A can read");
    }
}

#[test]
fn case_50_after_a_kill_while_b_hangs_a_serves_and_what_b_does_late_is_made_good() {
    for seed in 0..100 {
        let mut world = warm(seed);
        world.write(range(0, 8));
        run_dry(&mut world);
        world.disks[1].hung = true;
        world.write(range(0, 8));
        world.write(range(5000, 5008));
        for _ in 0..seed % 7 {
            world.step();
        }
        world.kill([true, false]).expect("the witness says that A is IN");
        let (write, read) = (world.write(range(2, 6)), world.read(range(0, 8)));
        world.settle();
        assert_eq!([write, read].map(|tag| world.answers[&tag]), [Ok(()); 2]);
        world.land_zombies();
        world.disks[1].hung = false;
        world.bring_back(Slot::B);
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
    }
}

#[test]
fn rule_25_a_leg_whose_place_was_taken_has_its_old_io_still() {
    let mut world = warm(3);
    world.settle();
    for _ in 0..2 {
        world.read(range(0, 1));
    }
    let late = in_flight_on(&world, Slot::B, |op| matches!(op, LegOp::Read { .. })).expect("B was asked too");
    world.stuck.insert(late);
    let detach = world.command(Request::Detach(Slot::B));
    run_dry(&mut world);
    assert_eq!(world.answers[&detach], Ok(()));
    let attach = |world: &mut World, leg: u8| {
        let tag =
            world.command(Request::Attach { slot: Slot::B, leg: LegId([leg; 16]), fill: lockstep_core::io::Fill::Everything, newest: 0 });
        run_dry(world);
        world.answers[&tag]
    };
    assert_eq!(attach(&mut world, 77), Ok(()));
    world.command(Request::Detach(Slot::B));
    run_dry(&mut world);
    assert_eq!(attach(&mut world, 2), Err(Errno::EBUSY), "its old read is still on its way");
    world.end(late, Outcome::Failed(Errno::EIO));
    assert_eq!(attach(&mut world, 2), Ok(()));
}
