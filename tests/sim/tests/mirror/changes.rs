//! What fails in the middle of a change of who counts, or beside a copy. Each case is one that random histories found first.

use lockstep_core::{
    format,
    io::{Fill, LegOp, Notice, Outcome, Request},
    membership::MemberState,
    status::LegState,
    units::{Errno, IoId, Slot, Tag},
};
use lockstep_sim::World;

use crate::{in_flight_on, range, run_dry, superblock_on, warm, witnessed, written_behind_a_resync};

/// B was away while [0, 8) was written, and is being filled.
fn rebuilding(seed: u64) -> World {
    let mut world = warm(seed);
    world.write(range(0, 8));
    world.settle();
    world.disks[1].dead = true;
    world.write(range(0, 8));
    world.settle();
    let attach = world.bring_back(Slot::B).expect("it may come back");
    while !world.answers.contains_key(&attach) {
        assert!(world.step() || world.tick(), "it is never attached");
    }
    world
}

/// The rebuild ended, and B's first superblock that says that it is IN is in flight.
fn coming_in(seed: u64) -> (World, IoId) {
    let mut world = rebuilding(seed);
    loop {
        if let Some(io) = superblock_on(&world, Slot::B) {
            return (world, io);
        }
        assert!(world.step() || world.tick(), "it never comes in");
    }
}

/// What A's newest superblock says of B.
fn recorded(world: &World) -> MemberState {
    format::superblock(&world.disks[0].meta).expect("one slot is whole").0.record.members[1].state
}

/// An answer that misses B may not be given while a durable record counts B.
fn assert_not_missed(world: &mut World, write: Tag, block: u64) {
    while !world.answers.contains_key(&write) {
        assert!(world.step() || world.tick(), "the write never ended");
    }
    let equal = world.disks[0].read(block) == world.disks[1].read(block);
    assert!(equal || recorded(world) != MemberState::In, "answered without B, which A calls IN: {}", world.trace());
}

#[test]
fn rule_23_a_leg_that_fails_while_it_comes_in_counts_until_it_is_durably_out() {
    for seed in 0..60 {
        let (mut world, io) = coming_in(seed);
        for _ in 0..seed % 3 {
            // A says already, or not yet, that B is IN.
            if let Some(other) = superblock_on(&world, Slot::A) {
                world.finish(other);
            }
        }
        world.disks[1].dead = true;
        world.end(io, Outcome::Failed(Errno::EIO));
        let write = world.write(range(3, 4));
        assert_not_missed(&mut world, write, 3);
        world.settle();
        assert_eq!(recorded(&world), MemberState::Out);
    }
}

#[test]
fn rule_23_a_record_that_was_reported_as_failed_may_have_landed_all_the_same() {
    for seed in 0..60 {
        let (mut world, _) = coming_in(seed);
        world.witness_fails = u32::MAX;
        while !world.notices.iter().any(|notice| matches!(notice, Notice::WitnessFailed { .. })) {
            assert!(world.step() || world.tick(), "the witness is never given up");
        }
        world.witness_fails = 0;
        assert_eq!(recorded(&world), MemberState::In);
        let write = world.write(range(3, 4));
        assert_not_missed(&mut world, write, 3);
        world.settle();
    }
}

#[test]
fn rule_23_a_leg_that_is_taken_out_while_it_comes_in_is_out() {
    for seed in 0..20 {
        let (mut world, _) = coming_in(seed);
        while world.in_flight().iter().any(|(_, _, op)| matches!(op, LegOp::WriteMeta { .. })) {
            let (io, ..) = world.in_flight()[0];
            world.finish(io);
        }
        let detach = world.command(Request::Detach(Slot::B));
        world.settle();
        assert_eq!(world.answers[&detach], Ok(()));
        assert_eq!((recorded(&world), world.mirror.status().legs[1].state), (MemberState::Out, LegState::Out));
    }
}

#[test]
fn rule_15_who_asked_for_a_leg_is_answered_once_if_the_mirror_gives_up_meanwhile() {
    for seed in 0..40 {
        let mut world = warm(seed);
        world.disks[1].dead = true;
        world.write(range(0, 8));
        world.settle();
        let attach = world.bring_back(Slot::B).expect("it may come back");
        let flush = world.flush();
        for _ in 0..seed % 5 {
            world.step();
        }
        let Some(io) = in_flight_on(&world, Slot::A, |op| *op == LegOp::Flush) else { continue };
        // The world asserts that nobody is answered twice.
        world.end(io, Outcome::Failed(Errno::EIO));
        run_dry(&mut world);
        assert_eq!(world.answers[&flush], Err(Errno::EIO));
        assert!(world.answers.contains_key(&attach));
    }
}

fn assert_out_when_stopped(world: &mut World, stop: Tag) {
    while !world.answers.contains_key(&stop) {
        assert!(world.step() || world.tick(), "it is never stopped");
    }
    assert_eq!((recorded(world), witnessed(world, Slot::B)), (MemberState::Out, MemberState::Out));
    assert!(world.in_flight().is_empty());
}

#[test]
fn rule_25_a_stop_is_answered_when_a_leg_that_failed_in_its_last_flush_is_durably_out() {
    for seed in 0..20 {
        let mut world = warm(seed);
        world.write(range(0, 8));
        run_dry(&mut world);
        let stop = world.command(Request::Stop);
        let flush = in_flight_on(&world, Slot::B, |op| *op == LegOp::Flush).expect("the last flush");
        world.end(flush, Outcome::Failed(Errno::EIO));
        assert_out_when_stopped(&mut world, stop);
    }
}

#[test]
fn rule_25_a_stop_is_answered_when_a_leg_that_failed_while_it_was_filled_is_durably_out() {
    for seed in 0..20 {
        let mut world = rebuilding(seed);
        let stop = world.command(Request::Stop);
        let flush = loop {
            if let Some(flush) = in_flight_on(&world, Slot::B, |op| *op == LegOp::Flush) {
                break flush;
            }
            assert!(world.step(), "there is no last flush");
        };
        // It is the last that ends: who waits for the flush waits for nothing but the record.
        while let Some(other) = in_flight_on(&world, Slot::A, |op| *op == LegOp::Flush) {
            world.finish(other);
        }
        world.end(flush, Outcome::Failed(Errno::EIO));
        assert_out_when_stopped(&mut world, stop);
    }
}

/// Nothing is asked for any more, and the clock goes on: the clean passes have their way.
fn wait_until_clean(world: &mut World) {
    for _ in 0..40 {
        run_dry(world);
        world.tick();
    }
    assert_eq!(world.mirror.status().dirty_regions, 0, "dirty for ever: {}", world.trace());
}

#[test]
fn rule_18_a_region_that_only_a_copy_wrote_is_cleaned_too() {
    let mut world = warm(3);
    world.write(range(0, 8));
    run_dry(&mut world);
    // Until no clean pass is asked for that would come after the copy.
    while world.tick() {
        run_dry(&mut world);
    }
    world.disks[0].bad.insert(3);
    while !world.notices.iter().any(|notice| matches!(notice, Notice::ReadRepaired { .. })) {
        world.read(range(3, 4));
        run_dry(&mut world);
    }
    wait_until_clean(&mut world);
}

#[test]
fn rule_18_a_clean_pass_that_comes_in_the_middle_of_a_change_is_made_up_for() {
    let mut world = warm(3);
    world.write(range(0, 8));
    run_dry(&mut world);
    let grow = world.command(Request::Grow { blocks: world.mirror.status().blocks + 1 });
    while superblock_on(&world, Slot::A).is_none() {
        assert!(world.step(), "it never grows");
    }
    // Whatever the clock is asked for, the change is not over.
    let late: Vec<IoId> = world.in_flight().iter().map(|(io, ..)| *io).collect();
    world.stuck.extend(&late);
    for _ in 0..12 {
        world.tick();
    }
    world.stuck.clear();
    run_dry(&mut world);
    assert_eq!(world.answers[&grow], Ok(()));
    wait_until_clean(&mut world);
}

#[test]
fn rule_21_what_the_pinned_leg_cannot_read_is_repaired_before_it_is_answered() {
    let mut differed = 0;
    for seed in 0..60 {
        let mut world = warm(seed);
        world.write(range(0, 8));
        world.settle();
        world.write(range(0, 8));
        for _ in 0..seed % 3 {
            world.step();
        }
        world.kill([true, true]).expect("both are IN");
        differed += usize::from(world.disks[0].read(3) != world.disks[1].read(3));
        world.disks[0].bad.insert(3);
        let found = world.read_now(3).expect("one can read");
        assert_eq!(world.disks[0].read(3), found, "another read may find something else: {}", world.trace());
        world.settle();
        world.assert_identical();
    }
    assert!(differed > 5, "the legs were equal already: {differed}");
}

/// A write of [3, 4) reaches a leg and is reported as failed.
fn fail_after_all(world: &mut World, slot: Slot, token: u64) {
    let io = in_flight_on(world, slot, |op| matches!(op, LegOp::Write { range, .. } if range.start == 3)).expect("a write");
    world.disks[slot.index()].cache.insert(3, token);
    world.end(io, Outcome::Failed(Errno::EIO));
}

#[test]
fn rule_23_what_a_leg_that_is_filled_took_and_its_source_did_not_is_copied_again() {
    for seed in 0..30 {
        let mut world = rebuilding(seed);
        // What is copied is there already, and the rebuild goes on elsewhere.
        while world.disks[1].read(3) != world.disks[0].read(3) {
            assert!(world.step() || world.tick(), "the rebuild has stopped");
        }
        let write = world.write(range(3, 4));
        for _ in 0..200 {
            if in_flight_on(&world, Slot::A, |op| matches!(op, LegOp::Write { range, .. } if range.start == 3)).is_some() {
                break;
            }
            world.step();
        }
        let io = in_flight_on(&world, Slot::A, |op| matches!(op, LegOp::Write { range, .. } if range.start == 3)).expect("a write");
        world.end(io, Outcome::Failed(Errno::EIO));
        world.settle();
        assert_eq!(world.answers[&write], Err(Errno::EIO));
        assert!(world.healthy());
        world.assert_identical();
    }
}

#[test]
fn rule_14_legs_that_come_to_differ_while_they_are_resynced_are_resynced_again() {
    for seed in 0..30 {
        let (mut world, write) = written_behind_a_resync(seed);
        fail_after_all(&mut world, Slot::A, 1000);
        fail_after_all(&mut world, Slot::B, 2000);
        assert_eq!(world.answers[&write], Err(Errno::EIO));
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
    }
}

#[test]
fn rule_24_after_a_crash_a_leg_that_is_filled_from_nothing_is_not_taken_for_zeroes() {
    for seed in 0..20 {
        let mut world = warm(seed);
        world.write(range(0, 8));
        world.settle();
        world.command(Request::Detach(Slot::B));
        world.settle();
        world.disks[1].meta.fill(0);
        let attach = world.replace(Slot::B);
        while !world.answers.contains_key(&attach) {
            assert!(world.step() || world.tick(), "it is never attached");
        }
        // A write that A loses in the crash, and B keeps.
        world.disks[1].durable.insert(200, 77);
        world.crash([true, true]).expect("A is IN");
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
    }
}

#[test]
fn rule_11_a_power_cut_while_an_empty_leg_is_attached_is_no_split_brain() {
    let mut torn = 0;
    for seed in 0..60 {
        let mut world = warm(seed);
        world.write(range(0, 8));
        world.settle();
        world.command(Request::Detach(Slot::B));
        world.settle();
        world.disks[1].meta.fill(0);
        world.replace(Slot::B);
        // A names the empty leg, and the witness is being told.
        while recorded(&world) != MemberState::Recovering(Fill::Everything) {
            assert!(world.step() || world.tick(), "it is never attached");
        }
        if seed % 2 == 1 {
            world.witness = vec![0; 8192];
        }
        torn += usize::from(format::superblock(&world.disks[1].meta).is_ok_and(|(superblock, _)| superblock.record.name.epoch.0 == 0));
        world.crash([true, true]).unwrap_or_else(|refusal| panic!("seed {seed}: {refusal}"));
        while !world.mirror.status().ready {
            assert!(world.step(), "it is never assembled");
        }
        if world.mirror.status().legs[1].state == LegState::Out {
            world.replace(Slot::B);
        }
        world.settle();
        assert!(world.healthy());
        world.assert_identical();
    }
    assert!(torn > 20, "the empty leg knew already: {torn}");
}
