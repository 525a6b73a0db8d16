//! Order (mirror rules 1 to 7).

use lockstep_core::{
    io::{LegOp, Outcome},
    status::LegState,
    units::{Errno, Slot},
};
use lockstep_sim::BLOCKS;

use crate::{in_flight_on, miss_and_return, range, run_dry, warm, writes_in_flight};

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

#[test]
fn rule_02_a_request_without_length_or_beyond_the_end_is_an_error() {
    let mut world = warm(1);
    for wrong in [range(5, 5), range(9, 5), range(BLOCKS - 1, BLOCKS + 1), range(BLOCKS, BLOCKS + 8), range(u64::MAX - 1, u64::MAX)] {
        for tag in [world.write(wrong), world.read(wrong), world.zero(wrong)] {
            assert_eq!(world.answers.get(&tag), Some(&Err(Errno::EINVAL)), "{wrong:?}");
        }
    }
    assert!(world.in_flight().is_empty());
    let last = world.write(range(BLOCKS - 1, BLOCKS));
    world.settle();
    assert_eq!(world.answers[&last], Ok(()));
}

#[test]
fn rule_06_nothing_is_issued_to_a_leg_for_a_range_after_its_release() {
    for late in [Outcome::Failed(Errno::EAGAIN), Outcome::Done(512)] {
        let mut world = warm(2);
        let slow = world.write(range(0, 8));
        let io = in_flight_on(&world, Slot::B, |op| matches!(op, LegOp::Write { .. })).expect("it was issued");
        world.stuck.insert(io);
        world.disks[1].dead = true;
        let other = world.write(range(100, 108));
        run_dry(&mut world);
        assert_eq!((world.answers[&slow], world.answers[&other]), (Ok(()), Ok(())), "B is OUT: nobody waits for it");
        world.end(io, late);
        assert!(world.in_flight().is_empty(), "reissued after its release");
    }
}

#[test]
fn rule_06_a_leg_fault_is_not_reissued() {
    let mut world = warm(3);
    world.write(range(0, 8));
    let io = in_flight_on(&world, Slot::B, |op| matches!(op, LegOp::Write { .. })).expect("it was issued");
    world.end(io, Outcome::Failed(Errno::EREMOTEIO));
    assert!(in_flight_on(&world, Slot::B, |_| true).is_none());
    world.settle();
    assert_eq!(world.mirror.status().legs[1].state, LegState::Out);
}

#[test]
fn rule_06_a_leg_that_is_being_attached_may_meet_a_host_fault() {
    let mut world = warm(4);
    let attach = miss_and_return(&mut world);
    let superblock = loop {
        if let Some(io) = in_flight_on(&world, Slot::B, |_| true) {
            break io;
        }
        assert!(world.step());
    };
    world.end(superblock, Outcome::Failed(Errno::EAGAIN));
    world.settle();
    assert_eq!(world.answers[&attach], Ok(()));
    assert!(world.healthy());
}

/// Ends whatever a leg does with this, again and again; how often.
fn insist(world: &mut lockstep_sim::World, slots: &[Slot], outcome: Outcome) -> usize {
    let mut ended = 0;
    loop {
        let data = |op: &LegOp| matches!(op, LegOp::Write { .. } | LegOp::Read { .. });
        let Some(io) = slots.iter().find_map(|slot| in_flight_on(world, *slot, data)) else { return ended };
        ended += 1;
        assert!(ended < 1000, "reissued without bound");
        world.end(io, outcome);
    }
}

#[test]
fn rule_06_a_host_fault_that_stays_is_reissued_a_few_times_and_then_it_is_the_legs() {
    for outcome in [Outcome::Failed(Errno::EAGAIN), Outcome::Failed(Errno::ENOMEM), Outcome::Done(0), Outcome::Done(4095)] {
        let mut world = warm(3);
        let write = world.write(range(0, 8));
        let ended = insist(&mut world, &[Slot::B], outcome);
        assert!((2..20).contains(&ended), "{ended} times");
        world.settle();
        assert_eq!(world.answers[&write], Ok(()));
        assert_eq!(world.mirror.status().legs[1].state, LegState::Out, "{outcome:?}");
    }
}

#[test]
fn rule_06_a_host_that_stays_short_of_something_takes_nobody_out() {
    let mut world = warm(3);
    let write = world.write(range(0, 8));
    insist(&mut world, &Slot::BOTH, Outcome::Failed(Errno::ENOMEM));
    world.settle();
    assert_eq!(world.answers[&write], Err(Errno::EIO));
    assert!(world.healthy(), "it failed on both legs");
    world.assert_identical();
}

#[test]
fn rule_06_the_deadline_goes_on_while_a_host_fault_is_reissued() {
    let mut world = warm(3);
    world.write(range(0, 8));
    let theirs = |world: &lockstep_sim::World| in_flight_on(world, Slot::B, |op| matches!(op, LegOp::Write { .. }));
    world.stuck.extend(theirs(&world));
    run_dry(&mut world);
    for _ in 0..40 {
        for _ in 0..8 {
            world.tick();
            run_dry(&mut world);
        }
        if world.mirror.status().legs[1].state == LegState::Out {
            break;
        }
        // It makes progress each time, but does not come to an end.
        let io = theirs(&world).expect("it is outstanding");
        world.end(io, Outcome::Done(4096));
        world.stuck.extend(theirs(&world));
    }
    assert!(world.now().0 < 45_000_000_000, "out only after {:?}", world.now());
    assert_eq!(world.mirror.status().legs[1].state, LegState::Out);
}
