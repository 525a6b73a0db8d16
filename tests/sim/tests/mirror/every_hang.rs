//! Cases of a leg that hangs, on a volume of one region: it hangs from any moment on, its deadline passes or the process is killed at any moment, and what
//! it was asked for ends late in every order (mirror rules 25 and 27).

use lockstep_core::{
    io::LegOp,
    status::LegState,
    units::{Errno, Slot},
};
use lockstep_sim::{Rng, World};

use crate::{assert_equal_again, assert_readable, deadlines::run_for, in_flight_on, out_by_the_witness, range, run_dry, small};

const BOTH_IN: [LegState; 2] = [LegState::In; 2];

fn states(world: &World) -> [LegState; 2] {
    world.mirror.status().legs.map(|leg| leg.state)
}

fn is_asked(world: &World, slot: Slot) -> bool {
    in_flight_on(world, slot, |_| true).is_some()
}

/// B hangs from this moment on.
fn hanging(world: &World) -> World {
    let mut world = world.clone();
    world.disks[1].hung = true;
    world
}

/// The same, and all else has ended. `None`: B was asked for nothing.
fn waiting_for_b(world: &World) -> Option<World> {
    let mut world = hanging(world);
    run_dry(&mut world);
    is_asked(&world, Slot::B).then_some(world)
}

/// The clock moves on, and nothing ends meanwhile.
fn pass(world: &mut World, millis: u64) {
    let end = world.now().plus_millis(millis);
    while world.mirror.next_deadline().is_some_and(|at| at <= end) {
        world.tick();
    }
}

/// All that it was asked for has ended: it may come back.
fn assert_back(mut world: World, blocks: [u64; 4], found: [u64; 4]) {
    world.disks[1].hung = false;
    assert_equal_again(&mut world);
    assert_eq!(blocks.map(|block| world.disks[1].read(block)), found, "{}", world.trace());
}

#[test]
fn case_36_in_every_order_a_leg_that_hangs_from_any_moment_on_goes_out_by_its_deadline_and_what_it_does_late_at_any_moment_is_harmless() {
    let mut world = small(64);
    let read_from_b = |world: &World| in_flight_on(world, Slot::B, |op| matches!(op, LegOp::Read { .. })).is_some();
    world.read(range(3, 5));
    if !read_from_b(&world) {
        world.read(range(3, 5));
    }
    assert!(read_from_b(&world), "one of two is B's");
    let early = world.write(range(2, 6));
    let (mut late, mut ends) = (0, 0);
    world.in_every_order(&mut |world| {
        let Some(mut world) = waiting_for_b(world) else { return };
        run_for(&mut world, 28_500);
        assert_eq!(states(&world), BOTH_IN, "before its deadline");
        for (of, reads) in [(range(4, 8), true), (range(8, 12), false)] {
            let mut world = world.clone();
            let write = world.write(of);
            let read = reads.then(|| world.read(range(2, 4)));
            world.in_every_order(&mut |world| {
                let mut world = world.clone();
                pass(&mut world, 2_500);
                assert_eq!(states(&world), [LegState::In, LegState::Out], "{}", world.trace());
                world.disks[1].hung = false;
                world.in_every_order(&mut |world| {
                    assert!(world.answers.values().all(Result::is_ok), "{}", world.trace());
                    for (write, block, token) in [(early, 3, 2), (write, of.end - 1, 3)] {
                        let there = Slot::BOTH.map(|slot| world.disks[slot.index()].read(block) == token);
                        let counts = [true, !out_by_the_witness(world, Slot::B)];
                        let missed = there.into_iter().zip(counts).any(|(there, counts)| counts && !there);
                        assert!(!missed || !world.answers.contains_key(&write), "{}", world.trace());
                    }
                    if is_asked(world, Slot::B) {
                        late += 1;
                        let mut world = hanging(world);
                        run_dry(&mut world);
                        assert!(
                            [early, write].iter().chain(&read).all(|tag| world.answers.contains_key(tag)),
                            "it waits for B: {}",
                            world.trace()
                        );
                        let back = world.bring_back(Slot::B).expect("it has a place");
                        run_dry(&mut world);
                        assert_eq!(world.answers[&back], Err(Errno::EBUSY), "it has I/O outstanding");
                    }
                    if world.movable().is_empty() {
                        ends += 1;
                        assert_back(world.clone(), [1, 3, of.start, of.end - 1], [1, 2, 3, 3]);
                    }
                });
            });
        }
    });
    assert!(late > 999 && ends > 50, "{late} {ends}");
}

#[test]
fn case_36_if_the_other_leg_hangs_too_from_any_moment_on_nobody_goes_out() {
    let mut world = small(64);
    let tags = [world.write(range(2, 6)), world.read(range(6, 8)), world.read(range(6, 8))];
    let mut both = 0;
    world.in_every_order(&mut |world| {
        let Some(mut world) = waiting_for_b(world) else { return };
        run_for(&mut world, 10_000);
        let write = world.write(range(8, 12));
        world.in_every_order(&mut |world| {
            if !is_asked(world, Slot::A) {
                return;
            }
            both += 1;
            let mut world = world.clone();
            pass(&mut world, 90_000);
            assert_eq!(states(&world), BOTH_IN, "{}", world.trace());
            world.disks[1].hung = false;
            world.settle();
            assert!(tags.iter().chain([&write]).all(|tag| world.answers[tag] == Ok(())));
            assert_equal_again(&mut world);
        });
    });
    assert!(both > 9, "{both}");
}

#[test]
fn case_50_in_every_order_after_a_kill_at_any_moment_while_b_hangs_a_serves_and_what_b_does_late_is_made_good() {
    let mut world = small(64);
    world.write(range(2, 6));
    world.write(range(4, 8));
    let (mut moments, mut ends) = (0, 0);
    world.in_every_order(&mut |world| {
        hanging(world).in_every_order(&mut |world| {
            for kill in 0..2 {
                let mut after = world.clone();
                after.rng = Rng(kill);
                after.kill([true, false]).expect("the witness says that A is IN");
                let tags = [after.read(range(2, 8)), after.write(range(3, 5)), after.read(range(2, 8))];
                after.in_every_order(&mut |world| {
                    moments += 1;
                    assert!(tags.iter().all(|tag| world.answers.get(tag).is_none_or(Result::is_ok)));
                    let found = world.found(tags[0]);
                    // Its old I/O is over when the process is killed once more.
                    let mut again = world.clone();
                    again.land_zombies();
                    again.disks.iter_mut().for_each(|disk| (disk.hung, disk.dead) = (false, false));
                    let mut killed = again.clone();
                    killed.kill([true, true]).expect("A is IN");
                    assert_readable(&mut killed, range(2, 8));
                    let now = killed.read_now(2);
                    assert!(found.is_none_or(|found| now == Ok(found)), "{found:?} {now:?}: {}", killed.trace());
                    assert_equal_again(&mut killed);
                    if world.movable().is_empty() {
                        ends += 1;
                        assert!(tags.iter().all(|tag| world.answers.contains_key(tag)), "it waits for B: {}", world.trace());
                        assert_equal_again(&mut again);
                        assert_eq!([3, 4].map(|block| again.disks[1].read(block)), [4; 2]);
                    }
                });
            }
        });
    });
    assert!(moments > 500 && ends > 30, "{moments} {ends}");
}
