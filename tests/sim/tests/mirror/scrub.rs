//! Scrub (mirror rule 30): what differs is found, named, and left to the operator.

use lockstep_core::{
    assembly::Limits,
    io::{Fill, LegOp, Notice, Request},
    status::{LegState, Scrub, ScrubState, Sync},
    units::{BlockRange, Errno, LegId, Slot, Tag},
};
use lockstep_sim::{Rng, World};

use crate::{in_flight_on, miss_and_return, range, run_dry, until_recovering, warm};

/// Bit rot: the disk holds another content, and nobody wrote it.
pub(crate) fn rot(world: &mut World, slot: Slot, block: u64) {
    world.disks[slot.index()].durable.insert(block, 666);
    world.disks[slot.index()].cache.remove(&block);
}

/// A settled volume with these ranges written, by the tokens 2, 3 and so on.
fn written(seed: u64, ranges: &[BlockRange]) -> World {
    let mut world = warm(seed);
    for range in ranges {
        world.write(*range);
        run_dry(&mut world);
    }
    world.flush();
    world.settle();
    world
}

pub(crate) fn scrub(world: &mut World, believed: Option<Slot>) -> Tag {
    world.command(Request::Scrub { believed })
}

fn report(world: &World) -> Scrub {
    world.mirror.status().scrub
}

pub(crate) fn mismatches(world: &World) -> Vec<BlockRange> {
    world.notices.iter().filter_map(|notice| if let Notice::Mismatch { range } = notice { Some(*range) } else { None }).collect()
}

#[test]
fn case_35_scrub_names_the_blocks_that_rotted_and_repairs_nothing_by_itself() {
    for seed in 0..20 {
        let mut world = written(seed, &[range(0, 300), range(4090, 4100), range(8255, 8256)]);
        for block in [17, 18, 200, 299, 8255] {
            rot(&mut world, Slot::A, block);
        }
        // What one leg alone holds was written there too.
        rot(&mut world, Slot::B, 5000);
        world.flaky = 5 * (seed % 2);
        let asked = scrub(&mut world, None);
        world.settle();
        assert_eq!(world.answers[&asked], Ok(()));
        let found = [range(17, 19), range(200, 201), range(299, 300), range(5000, 5001), range(8255, 8256)];
        assert_eq!(mismatches(&world), found);
        let said = report(&world);
        assert_eq!((said.state, said.mismatched, said.repaired, said.skipped), (ScrubState::Completed, 6, 0, 0));
        assert_eq!((said.done, said.total, said.compared), (lockstep_sim::BLOCKS, lockstep_sim::BLOCKS, 312));
        assert_eq!(world.disks.each_ref().map(|disk| disk.read(17)), [666, 2], "something was written");
        assert!(world.healthy());
    }
}

#[test]
fn case_35_what_differs_is_taken_from_the_leg_that_the_operator_believes_and_from_no_other() {
    for (seed, believed) in (0..20).flat_map(|seed| Slot::BOTH.map(|slot| (seed, slot))) {
        let mut world = written(seed, &[range(0, 300), range(5000, 5001)]);
        rot(&mut world, Slot::A, 17);
        rot(&mut world, Slot::B, 140);
        rot(&mut world, Slot::B, 5000);
        world.flaky = 5 * (seed % 2);
        let asked = scrub(&mut world, Some(believed));
        world.settle();
        assert_eq!(world.answers[&asked], Ok(()));
        assert_eq!((report(&world).mismatched, report(&world).repaired), (3, 3));
        let wanted = if believed == Slot::A { [666, 2, 3] } else { [2, 666, 666] };
        for disk in &world.disks {
            assert_eq!([17, 140, 5000].map(|block| disk.read(block)), wanted);
        }
        let repaired = world.notices.iter().filter(|n| matches!(n, Notice::MismatchRepaired { slot, .. } if *slot == believed.other()));
        assert_eq!(repaired.count(), 3);
        world.assert_identical();
        // What was put there survives: its region was dirty until both legs were flushed.
        world.crash([true, true]).expect("both are IN");
        world.settle();
        world.assert_identical();
        assert_eq!(world.disks[0].read(17), wanted[0]);
    }
}

#[test]
fn rule_30_writes_wait_for_the_piece_that_is_compared_and_reads_do_not() {
    let mut world = written(3, &[range(0, 300)]);
    let asked = scrub(&mut world, None);
    while in_flight_on(&world, Slot::B, |op| matches!(op, LegOp::Read { .. })).is_none() {
        assert!(world.step(), "it never read");
    }
    let inside = world.write(range(100, 140));
    let touching = world.write(range(128, 129));
    assert_eq!(world.read_now(5), Ok(2), "a read waits");
    // Its half of the buffer is full, the compare is not done: still nothing is written there.
    while !world.answers.contains_key(&asked) {
        let writes = world.in_flight().into_iter().any(|(_, _, op)| matches!(op, LegOp::Write { range, .. } if range.start < 128));
        let reads =
            world.in_flight().into_iter().any(|(_, _, op)| matches!(op, LegOp::Read { range, .. } if range.start < 128 && range.len() > 1));
        assert!(!(writes && reads), "{}", world.trace());
        assert!(world.step() || world.tick(), "it never ended");
    }
    world.settle();
    assert_eq!([world.answers[&inside], world.answers[&touching]], [Ok(()); 2]);
    assert!(mismatches(&world).is_empty());
}

#[test]
fn rule_30_scrub_never_takes_a_write_that_races_it_for_a_difference() {
    for seed in 0..200 {
        let mut world = written(seed, &[range(0, 300), range(4090, 4100)]);
        world.flaky = 9 * (seed % 2);
        let mut rng = Rng(seed);
        let asked = scrub(&mut world, None);
        while !world.answers.contains_key(&asked) {
            let start = [0, 4090][rng.below(2) as usize] + rng.below(300);
            match rng.below(8) {
                0 => drop(world.write(range(start, start + 1 + rng.below(9)))),
                1 if rng.once_in(3) => drop(world.zero(range(start, start + 2))),
                2 if rng.once_in(3) => drop(world.flush()),
                3 if rng.once_in(2) => drop(world.tick()),
                _ => drop(world.step()),
            }
        }
        world.settle();
        assert_eq!(world.answers[&asked], Ok(()));
        assert_eq!(mismatches(&world), [], "seed {seed}: {}", world.trace());
    }
}

#[test]
fn rule_26_a_block_that_scrub_cannot_read_on_one_leg_is_repaired_and_its_neighbours_that_differ_are_not() {
    for (seed, bad) in (0..20).flat_map(|seed| Slot::BOTH.map(|slot| (seed, slot))) {
        let mut world = written(seed, &[range(0, 40)]);
        world.disks[bad.index()].bad.insert(7);
        rot(&mut world, bad, 9);
        let asked = scrub(&mut world, None);
        world.settle();
        assert_eq!(world.answers[&asked], Ok(()));
        assert!(world.disks[bad.index()].bad.is_empty(), "not repaired");
        assert_eq!(mismatches(&world), [range(9, 10)]);
        assert_eq!(world.disks[bad.index()].read(9), 666, "it was repaired unsaid");
        assert_eq!((report(&world).unreadable, report(&world).compared), (1, 39));
        assert!(world.healthy());
    }
}

#[test]
fn rule_26_what_neither_leg_can_read_is_named_by_scrub_and_takes_nobody_out() {
    let mut world = written(1, &[range(0, 40)]);
    world.disks.iter_mut().for_each(|disk| disk.bad.extend([7]));
    let asked = scrub(&mut world, Some(Slot::B));
    world.settle();
    assert_eq!(world.answers[&asked], Ok(()));
    assert!(world.notices.contains(&Notice::Unreadable { range: range(7, 8) }));
    assert_eq!((report(&world).unreadable, report(&world).compared), (1, 39));
    assert!(world.healthy());
}

#[test]
fn rule_30_where_the_legs_may_rightly_differ_nothing_is_judged() {
    for seed in 0..20 {
        // A torn write leaves the legs different until the resync; what no leg can read keeps the resync from its end.
        let mut world = written(seed, &[range(0, 40), range(5000, 5020)]);
        let writes = [world.write(range(10, 30)), world.write(range(9, 11))];
        world.step();
        world.crash([true, true]).expect("both are IN");
        assert!(writes.iter().all(|write| !world.answers.contains_key(write)));
        world.disks[0].cache.insert(20, 777);
        world.disks.iter_mut().for_each(|disk| disk.bad.extend([35]));
        rot(&mut world, Slot::B, 5005);
        run_dry(&mut world);
        let asked = scrub(&mut world, None);
        while !world.answers.contains_key(&asked) {
            assert!(world.step() || world.tick(), "it never ended");
        }
        assert_eq!(world.answers[&asked], Ok(()));
        assert_eq!(mismatches(&world), [range(5005, 5006)], "seed {seed}: {:?}", report(&world));
        assert_eq!(report(&world).skipped, 4096);
    }
}

#[test]
fn rule_30_bad_blocks_are_passed_over() {
    let mut world = written(2, &[range(0, 40)]);
    world.disks[1].dead = true;
    world.write(range(20, 30));
    world.settle();
    world.disks[0].bad.extend([3, 4, 39]);
    world.disks[1].dead = false;
    world.disks[1].meta =
        lockstep_core::format::spare_leg(lockstep_sim::VOLUME, LegId([77; 16]), lockstep_sim::BLOCKS)[..65536 + 8192].to_vec();
    (world.disks[1].durable, world.disks[1].cache) = Default::default();
    world.command(Request::Attach { slot: Slot::B, leg: LegId([77; 16]), fill: Fill::Everything, newest: 0 });
    world.settle();
    assert_eq!(world.mirror.status().bad_blocks, 3);
    // A reads them again, by itself: they are as bad as before.
    world.disks[0].bad.clear();
    rot(&mut world, Slot::A, 5);
    let asked = scrub(&mut world, Some(Slot::B));
    world.settle();
    assert_eq!((world.answers[&asked], mismatches(&world)), (Ok(()), vec![range(5, 6)]));
    assert_eq!((report(&world).skipped, report(&world).compared, world.mirror.status().bad_blocks), (3, 37, 3));
    assert_eq!([3, 4, 39].map(|block| world.disks[1].read(block)), [0; 3], "what nobody vouches for was copied");
}

#[test]
fn rule_30_a_write_that_failed_on_both_legs_is_no_mismatch() {
    for seed in 0..40 {
        let mut world = written(seed, &[range(0, 40)]);
        let write = world.write(range(4, 12));
        let asked = scrub(&mut world, None);
        run_until_written(&mut world, write);
        world.settle();
        assert_eq!(world.answers[&asked], Ok(()));
        assert_eq!(mismatches(&world), []);
        world.assert_identical();
    }
}

/// Fails the write on both legs, after it landed on one.
fn run_until_written(world: &mut World, write: Tag) {
    use lockstep_core::io::Outcome;
    while !world.answers.contains_key(&write) {
        let on = |slot| in_flight_on(world, slot, |op| matches!(op, LegOp::Write { .. }));
        match (on(Slot::A), on(Slot::B)) {
            (Some(a), Some(b)) => {
                world.disks[0].cache.extend((4..12).map(|block| (block, 3)));
                world.end(a, Outcome::Failed(Errno::EIO));
                world.end(b, Outcome::Failed(Errno::EIO));
            }
            _ => assert!(world.step(), "the write never ended"),
        }
    }
    assert_eq!(world.answers[&write], Err(Errno::EIO));
}

#[test]
fn rule_30_a_scrub_ends_with_an_error_when_a_leg_is_lost_at_any_moment_and_nobody_waits_for_it() {
    for steps in 0..60 {
        for slot in Slot::BOTH {
            let mut world = written(steps, &[range(0, 300)]);
            rot(&mut world, Slot::A, 3);
            let asked = scrub(&mut world, Some(Slot::B));
            for _ in 0..steps {
                world.step();
            }
            if world.answers.contains_key(&asked) {
                return;
            }
            world.disks[slot.index()].dead = true;
            let write = world.write(range(2, 299));
            world.settle();
            assert_eq!(world.answers[&write], Ok(()));
            assert_eq!(world.answers[&asked], Err(Errno::ENODEV));
            assert_eq!(report(&world).state, ScrubState::Ended(Errno::ENODEV));
            let refused = scrub(&mut world, None);
            assert_eq!(world.answers[&refused], Err(Errno::ENODEV));
            world.bring_back(slot);
            world.settle();
            let again = scrub(&mut world, None);
            world.settle();
            assert_eq!((world.answers[&again], report(&world).mismatched), (Ok(()), 0));
            world.assert_identical();
        }
    }
}

#[test]
fn rule_27_a_leg_that_hangs_in_a_scrub_goes_out_by_its_deadline_and_the_others_memory_is_not_used_again() {
    for steps in 0..20 {
        let mut world = written(steps, &[range(0, 300)]);
        let asked = scrub(&mut world, None);
        for _ in 0..steps {
            world.step();
        }
        world.disks[0].hung = true;
        let late = world.write(range(0, 290));
        while !world.answers.contains_key(&asked) || !world.answers.contains_key(&late) {
            assert!(world.step() || world.tick(), "it never ended");
        }
        if world.answers[&asked] == Ok(()) {
            continue;
        }
        assert_eq!(world.mirror.status().legs[0].state, LegState::Out);
        assert_eq!((world.answers[&asked], world.answers[&late]), (Err(Errno::ENODEV), Ok(())));
        world.disks[0].hung = false;
        run_dry(&mut world);
        world.bring_back(Slot::A);
        world.settle();
        world.assert_identical();
    }
}

#[test]
fn rule_30_scrub_stands_still_while_a_leg_is_filled_and_goes_on_when_it_is_full() {
    let mut world = written(4, &[range(0, 300)]);
    miss_and_return(&mut world);
    until_recovering(&mut world);
    let asked = scrub(&mut world, None);
    let busy = scrub(&mut world, None);
    assert_eq!(world.answers[&busy], Err(Errno::EBUSY));
    while world.mirror.status().legs[1].state != LegState::In {
        assert_eq!((report(&world).state, report(&world).compared), (ScrubState::Running, 0));
        assert!(world.step() || world.tick(), "{}", world.trace());
    }
    world.settle();
    assert_eq!((world.answers[&asked], report(&world).compared), (Ok(()), 300));
}

#[test]
fn rule_30_a_scrub_that_waits_for_a_resync_does_not_ask_the_clock_again_and_again() {
    let limits = Limits { scrub_blocks_per_second: 100, ..Limits::default() };
    let mut world = World::with_limits(1, limits);
    world.settle();
    world.write(range(0, 250));
    world.settle();
    let asked = scrub(&mut world, None);
    run_dry(&mut world);
    assert_eq!(report(&world).compared, 128, "it rests after the first piece");
    // The legs come to differ, and are made equal.
    world.write(range(0, 8));
    run_dry(&mut world);
    world.write(range(0, 8));
    world.disks.iter_mut().for_each(|disk| disk.dead = true);
    for (io, ..) in world.in_flight() {
        world.finish(io);
    }
    world.disks.iter_mut().for_each(|disk| disk.dead = false);
    let mut ticks = 0;
    while world.mirror.status().sync == Sync::Resync {
        world.sleep(2000);
        world.tick();
        assert!(world.mirror.next_deadline().is_none_or(|at| at > world.now()), "it wants to be woken at once, and again");
        ticks += 1;
        world.step();
    }
    assert!(ticks > 3, "it was never held up");
    world.settle();
    assert_eq!((world.answers[&asked], report(&world).compared), (Ok(()), 250));
}

#[test]
fn rule_30_a_scrub_that_is_stopped_or_whose_mirror_is_ends_at_once_at_any_moment() {
    for (steps, stop) in (0..60).flat_map(|steps| [(steps, Request::StopScrub), (steps, Request::Stop)]) {
        let mut world = written(steps, &[range(0, 300)]);
        rot(&mut world, Slot::A, 3);
        world.flaky = 2;
        let asked = scrub(&mut world, Some(Slot::B));
        for _ in 0..steps {
            world.step();
        }
        if world.answers.contains_key(&asked) {
            continue;
        }
        let stopped = world.command(stop);
        let write = world.write(range(0, 300));
        let errno = if stop == Request::Stop { Errno::ESHUTDOWN } else { Errno::ECANCELED };
        assert_eq!(world.answers[&asked], Err(errno), "it does not end at once");
        world.settle();
        assert_eq!((world.answers[&stopped], world.answers[&write].is_ok()), (Ok(()), stop == Request::StopScrub));
    }
}

#[test]
fn rule_30_scrub_is_no_faster_than_it_is_allowed_to_be() {
    let limits = Limits { scrub_blocks_per_second: 100, ..Limits::default() };
    let mut world = World::with_limits(1, limits);
    world.settle();
    for start in (0..3000).step_by(250) {
        world.write(range(start, start + 250));
        world.settle();
    }
    let before = world.now();
    let asked = scrub(&mut world, None);
    run_dry(&mut world);
    assert_eq!(report(&world).compared, 128, "a piece at a time");
    world.settle();
    assert_eq!(world.answers[&asked], Ok(()));
    assert!(world.now().0 - before.0 >= 28_000_000_000, "{:?} {:?}", before, world.now());
}
