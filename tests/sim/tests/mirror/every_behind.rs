//! Case 42 on a volume of one region: in every order in which what is on its way may end, with a kill, a power cut or a lost disk at every moment
//! (mirror rule 32). A is the fast leg, B the slow one.

use lockstep_core::{
    io::Request,
    status::{LegState, Sync},
    units::{Slot, Tag},
};
use lockstep_sim::World;

use crate::{
    assert_equal_again, assert_readable, done, killed_while_writing, kills, on_its_way, out_by_the_witness, power_cuts, range, small,
};

/// The first eight blocks hold 1, or, where A was filled from B so that the record pins that, 2; B has just been said to be slow.
fn said_to_be_slow(pinned: Slot) -> World {
    let mut world = small(64);
    if pinned == Slot::B {
        world.disks[0].dead = true;
        world.write(range(0, 8));
        world.settle();
        world.bring_back(Slot::A).expect("it has a place");
        done(&mut world);
    }
    world.command(Request::WriteMostly { slot: Some(Slot::B), behind: true });
    world
}

/// Two overlapping writes, and the worlds that they bring about, until nothing is on its way.
fn two_writes(pinned: Slot, visit: &mut dyn FnMut(&World, [Tag; 2])) -> usize {
    let mut world = said_to_be_slow(pinned);
    let writes = [range(2, 6), range(4, 8)].map(|range| world.write(range));
    world.in_every_order(&mut |world| visit(world, writes))
}

/// Whether the first write is answered and not yet on B.
fn is_behind(world: &World, write: Tag) -> bool {
    world.answers.contains_key(&write) && on_its_way(world, write, Slot::B)
}

#[test]
fn case_42_in_every_order_what_is_behind_keeps_its_order_and_reads_never_go_back_also_after_a_kill_at_any_moment() {
    for pinned in Slot::BOTH {
        let mut behind = 0;
        two_writes(pinned, &mut |world, writes| {
            let [one, two] = writes.map(|write| Slot::BOTH.map(|slot| on_its_way(world, write, slot)));
            let begun = two.contains(&true) || world.answers.contains_key(&writes[1]);
            assert!(!(begun && one.contains(&true)), "the first one may still land over the second: {}", world.trace());
            behind += writes.into_iter().filter(|write| is_behind(world, *write)).count();
            // The oracle of every read: not older than what was answered before it was asked for.
            let mut reading = world.clone();
            let read = reading.read(range(3, 8));
            reading.in_every_order_while(&mut |world| {
                assert!(world.answers.contains_key(&read) || !world.movable().is_empty(), "it never ends: {}", world.trace());
                assert!(world.answers.get(&read).is_none_or(Result::is_ok));
                !world.answers.contains_key(&read)
            });
            for mut after in kills(world, 2) {
                let read = after.read(range(3, 8));
                after.in_every_order(&mut |world| {
                    let found = world.found(read);
                    assert!(world.answers.get(&read).is_none_or(Result::is_ok), "{}", world.trace());
                    for mut again in kills(world, 1).chain([world.clone()]) {
                        let now = again.read_now(3);
                        assert!(found.is_none_or(|found| now == Ok(found)), "{found:?} {now:?}: {}", again.trace());
                        assert_readable(&mut again, range(3, 8));
                        assert_equal_again(&mut again);
                    }
                });
            }
            if world.movable().is_empty() {
                assert!(writes.iter().all(|write| world.answers[write] == Ok(())));
                world.assert_identical();
            }
        });
        assert!(behind > 1, "{behind}");
    }
}

#[test]
fn case_42_in_every_order_a_flush_that_comes_at_any_moment_covers_what_is_behind_also_after_a_power_cut() {
    for pinned in Slot::BOTH {
        let (mut covered, mut before) = (0, 0);
        two_writes(pinned, &mut |world, writes| {
            let asked = writes.map(|write| world.answers.contains_key(&write));
            let mut flushing = world.clone();
            let flush = flushing.flush();
            let first = world.disks[0].read(0) + 1;
            flushing.in_every_order(&mut |world| {
                let answered = world.answers.contains_key(&flush);
                before += usize::from(!answered && writes.into_iter().any(|write| is_behind(world, write)));
                if answered && asked[0] {
                    covered += 1;
                    let least = [first, if asked[1] { first + 1 } else { first }];
                    for disk in &world.disks {
                        assert!(disk.durable[&3] >= least[0] && disk.durable[&5] >= least[1], "not durable on both: {}", world.trace());
                    }
                }
                assert!(answered || !world.movable().is_empty(), "it never ends");
                for mut after in power_cuts(world, 2) {
                    // Not older than what a flush covered.
                    after.read(range(2, 8));
                    let found = [3, 4].map(|block| after.read_now(block).expect("both can read"));
                    assert!(found.iter().all(|found| (first - 1..first + 2).contains(found)), "{found:?}: {}", after.trace());
                    assert_equal_again(&mut after);
                    assert_eq!([3, 4].map(|block| after.read_now(block)), found.map(Ok), "{}", after.trace());
                }
            });
        });
        assert!(covered > 0 && before > 0, "{covered} {before}");
    }
}

#[test]
fn case_42_a_leg_that_goes_at_any_moment_with_writes_behind_takes_no_answered_one_with_it_in_any_order() {
    for (pinned, slot) in Slot::BOTH.into_iter().flat_map(|pinned| Slot::BOTH.map(|slot| (pinned, slot))) {
        let (mut waited, mut ends) = (0, 0);
        two_writes(pinned, &mut |world, writes| {
            let first = world.disks[0].read(0) + 1;
            for ask in [|world: &mut World| world.write(range(20, 24)), |world: &mut World| world.read(range(2, 6))] {
                let mut lost = world.clone();
                lost.disks[slot.index()].dead = true;
                let asked = [writes[0], writes[1], ask(&mut lost)];
                lost.in_every_order(&mut |world| {
                    assert!(asked.iter().all(|tag| world.answers.get(tag).is_none_or(Result::is_ok)), "{}", world.trace());
                    let out = out_by_the_witness(world, slot);
                    let ended = world.movable().is_empty();
                    let holds = |slot: Slot| {
                        let mut answered = [(writes[0], 3, first), (writes[1], 7, first + 1)]
                            .into_iter()
                            .filter(|(write, ..)| world.answers.contains_key(write));
                        answered.all(|(_, block, token)| world.disks[slot.index()].read(block) >= token)
                    };
                    assert!(!out || holds(slot.other()), "OUT, and the other one has not got all of it: {}", world.trace());
                    assert!(out || !ended || holds(slot), "it counts, and has not got all of it: {}", world.trace());
                    waited += usize::from(!out && slot == Slot::A && is_behind(world, writes[0]));
                    // The disk was only away.
                    let mut back = world.clone();
                    back.disks[slot.index()].dead = false;
                    for mut after in kills(&back, 1) {
                        assert_readable(&mut after, range(2, 8));
                        assert_comes_back(after, slot);
                    }
                    if slot == Slot::A {
                        // It dies with the process: nothing is lost but what had not landed on B.
                        let mut after = world.clone();
                        after.kill([false, true]).unwrap_or_else(|refusal| panic!("{refusal}: {}", world.trace()));
                        for block in 2..8 {
                            assert!(after.read_now(block).is_ok_and(|found| found >= world.disks[1].read(block)), "{}", after.trace());
                        }
                    }
                    if ended {
                        ends += 1;
                        assert!(asked.iter().all(|tag| world.answers.contains_key(tag)), "it never ends");
                    }
                });
                lost.settle();
                assert_comes_back(lost, slot);
            }
        });
        assert!((waited > 0 || slot == Slot::B) && ends > 0, "{waited} {ends}");
    }
}

/// A disk that was lost comes back, and the legs are equal again.
fn assert_comes_back(mut world: World, slot: Slot) {
    if world.mirror.status().legs[slot.index()].state == LegState::Out {
        world.bring_back(slot).expect("it has a place");
    }
    assert_equal_again(&mut world);
}

#[test]
fn case_42_in_every_order_nothing_is_behind_before_a_resync_from_the_slow_leg_is_over_and_no_kill_at_any_moment_loses_an_answer() {
    let mut world = small(64);
    killed_while_writing(&mut world, range(2, 6));
    world.command(Request::WriteMostly { slot: Some(Slot::A), behind: true });
    let (mut behind, mut ends) = (0, 0);
    world.in_every_order(&mut |world| {
        let mut world = world.clone();
        let write = world.write(range(4, 8));
        world.in_every_order(&mut |world| {
            if on_its_way(world, write, Slot::A) && world.answers.contains_key(&write) {
                behind += 1;
                assert_eq!(world.mirror.status().sync, Sync::Idle, "{}", world.trace());
            }
            for mut after in kills(world, 2) {
                assert_readable(&mut after, range(2, 8));
                assert_equal_again(&mut after);
            }
            if world.movable().is_empty() {
                ends += 1;
                assert!(world.answers[&write] == Ok(()) && world.mirror.status().write_behind);
                world.assert_identical();
            }
        });
    });
    assert!(behind > 0 && ends > 0, "{behind} {ends}");
}
