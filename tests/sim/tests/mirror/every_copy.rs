//! Cases of resync, rebuild and repair on a volume so small that a region of it is copied in one piece: in every order in which what is on its
//! way may end, with a crash or a lost disk at every moment (mirror rules 5, 21 to 26).

use lockstep_core::{
    format::REGION_BLOCKS,
    io::{Buffer, LegOp, Notice, Request},
    status::{LegState, Sync},
    units::{Errno, Slot},
};
use lockstep_sim::World;

use crate::{
    assert_equal_again, bitmap_on, deadlines::run_for, done, in_flight_on, killed_while_writing, on_its_way, power_cuts, range, run_dry,
    small, until_writing,
};

/// B was away while blocks 2 to 6 were written (2) or discarded, and is being attached.
fn returning(discarded: bool) -> World {
    let mut world = small(64);
    world.disks[1].dead = true;
    let asked = if discarded { World::zero } else { World::write };
    asked(&mut world, range(2, 6));
    done(&mut world);
    world.bring_back(Slot::B).expect("it has a place");
    world
}

/// The disk of this leg is gone at this moment.
fn without(world: &World, slot: Slot) -> World {
    let mut world = world.clone();
    world.disks[slot.index()].dead = true;
    world
}

#[test]
fn case_23_a_resync_that_is_cut_off_at_any_moment_and_again_at_any_moment_goes_on_and_ends_equal() {
    let mut world = small(64);
    world.write(range(2, 6));
    until_writing(&mut world);
    let (mut cut_off, mut again) = (0, 0);
    for mut cut in power_cuts(&world, 3) {
        let read = cut.read(range(3, 4));
        cut.in_every_order(&mut |world| {
            cut_off += usize::from(world.mirror.status().sync == Sync::Resync);
            let before = world.found(read);
            for cut in power_cuts(world, 1) {
                again += cut.in_every_order(&mut |world| {
                    for mut after in power_cuts(world, 1) {
                        let found = after.read_now(3).expect("both can read");
                        assert!(
                            before.is_none_or(|before| before == found) && [1, 2].contains(&found),
                            "{before:?} {found}: {}",
                            after.trace()
                        );
                        assert_equal_again(&mut after);
                        assert_eq!(after.read_now(3), Ok(found), "{}", after.trace());
                    }
                });
            }
            let mut after = world.clone();
            assert_equal_again(&mut after);
            assert!(before.is_none_or(|before| after.read_now(3) == Ok(before)), "{}", after.trace());
        });
    }
    assert!(cut_off > 9 && again > 500, "{cut_off} {again}");
}

#[test]
fn case_26_a_target_that_fails_at_any_moment_of_a_rebuild_is_not_noticed_above_in_any_order() {
    let worlds = returning(false).in_every_order(&mut |world| {
        let mut lost = without(world, Slot::B);
        let (write, read) = (lost.write(range(4, 7)), lost.read(range(0, 4)));
        lost.in_every_order(&mut |world| {
            assert_eq!(world.mirror.status().legs[0].state, LegState::In);
            assert!([write, read].iter().all(|tag| world.answers.get(tag).is_none_or(Result::is_ok)), "{}", world.trace());
            if world.movable().is_empty() {
                assert!([write, read].iter().all(|tag| world.answers.contains_key(tag)), "it never ends: {}", world.trace());
                assert_eq!([1, 3, 4, 6].map(|block| world.disks[0].read(block)), [1, 2, 3, 3]);
            }
        });
        assert_equal_again(&mut lost);
    });
    assert!(worlds > 20, "{worlds}");
}

#[test]
fn case_27_in_every_order_a_leg_that_missed_one_write_gets_only_that_region_also_after_a_power_cut_at_every_moment() {
    let mut world = small(REGION_BLOCKS + 64);
    let of = |block| REGION_BLOCKS + block;
    world.disks[1].dead = true;
    world.write(range(of(2), of(6)));
    done(&mut world);
    world.bring_back(Slot::B).expect("it has a place");
    let mut ends = 0;
    world.in_every_order(&mut |world| {
        for mut after in power_cuts(world, 2) {
            assert_equal_again(&mut after);
            // Where the power cut tore the page of the only leg that counts, nobody knows what it said: all regions are.
            let torn = bitmap_on(world, Slot::A).is_some();
            assert!(after.mirror.status().copied_blocks <= if torn { 16 } else { 8 }, "{}", after.trace());
            assert_eq!([of(1), of(2), of(5), of(6)].map(|block| after.disks[1].read(block)), [2, 3, 3, 2]);
        }
        if world.movable().is_empty() {
            ends += 1;
            assert!(world.healthy());
            world.assert_identical();
            assert_eq!(world.mirror.status().copied_blocks, 8, "what was written in that region, and nothing else");
        }
    });
    assert!(ends > 0);
}

#[test]
fn case_28_in_every_order_a_blank_disk_gets_what_was_ever_written_also_after_a_power_cut_at_every_moment() {
    let mut world = small(64);
    world.command(Request::Detach(Slot::B));
    done(&mut world);
    assert_eq!(world.mirror.status().dirty_regions, 0);
    world.replace(Slot::B);
    let (mut ends, mut unknown) = (0, 0);
    world.in_every_order(&mut |world| {
        for mut after in power_cuts(world, 2) {
            run_dry(&mut after);
            let [_, b] = after.mirror.status().legs;
            if b.state == LegState::Out && after.mirror.readmission(&after.disks[1].meta).is_none() {
                // No durable record names it yet.
                unknown += 1;
                after.replace(Slot::B);
            }
            assert_equal_again(&mut after);
            assert_eq!([0, 7, 8].map(|block| after.disks[1].read(block)), [1, 1, 0], "{}", after.trace());
        }
        if world.movable().is_empty() {
            ends += 1;
            assert!(world.healthy());
            world.assert_identical();
            assert_eq!(world.mirror.status().copied_blocks, 8, "holes stay holes");
        }
    });
    assert!(ends > 0 && unknown > 0);
}

#[test]
fn case_33_in_every_order_what_one_leg_cannot_read_the_other_serves_and_its_repair_undoes_no_racing_write() {
    for racing in [false, true] {
        let mut world = small(64);
        world.disks[0].bad.insert(3);
        let mut reads = Vec::new();
        while in_flight_on(&world, Slot::A, |op| matches!(op, LegOp::Read { .. })).is_none() {
            reads.push(world.read(range(3, 4)));
        }
        let write = racing.then(|| world.write(range(3, 5)));
        world.in_every_order(&mut |world| {
            assert_eq!(world.mirror.status().legs.map(|leg| leg.state), [LegState::In; 2]);
            assert!(reads.iter().all(|read| world.answers.get(read).is_none_or(Result::is_ok)), "{}", world.trace());
            for mut after in power_cuts(world, 3) {
                let found = after.read_now(3).expect("one can read");
                assert!(found == 1 || found == 2 && racing, "{found}: {}", world.trace());
                assert_equal_again(&mut after);
                assert_eq!(after.read_now(3), Ok(found), "{}", after.trace());
            }
            if world.movable().is_empty() {
                assert!(reads.iter().chain(&write).all(|tag| world.answers.contains_key(tag)), "it never ends: {}", world.trace());
                assert!(world.disks[0].bad.is_empty(), "not repaired: {}", world.trace());
                world.assert_identical();
                assert_eq!(world.disks[0].read(3), 1 + u64::from(racing));
            }
        });
    }
}

#[test]
fn case_40_a_source_that_dies_at_any_moment_of_a_rebuild_gives_errors_and_never_stale_data_in_any_order() {
    let (mut errors, mut served) = (0, 0);
    returning(false).in_every_order(&mut |world| {
        let mut lost = without(world, Slot::A);
        // The oracle of every read: not older than what was answered.
        let read = lost.read(range(2, 6));
        lost.in_every_order(&mut |world| match world.answers.get(&read) {
            Some(Ok(())) => served += 1,
            Some(answer) => {
                errors += 1;
                assert_eq!(*answer, Err(Errno::EIO));
            }
            None => assert!(!world.movable().is_empty(), "it never ends: {}", world.trace()),
        });
        // The disk was only away.
        run_dry(&mut lost);
        lost.disks[0].dead = false;
        lost.kill([true, true]).unwrap_or_else(|refusal| panic!("{refusal}: {}", world.trace()));
        lost.read(range(0, 8));
        lost.settle();
        if lost.mirror.status().legs[0].state == LegState::Out {
            lost.bring_back(Slot::A).expect("it has a place");
        }
        assert_equal_again(&mut lost);
    });
    assert!(errors > 0 && served > 0, "{errors} {served}");
}

#[test]
fn case_43_a_range_is_held_until_a_recovering_leg_has_reported_too_in_every_order_and_at_every_moment_of_a_rebuild() {
    let (mut slow, mut ends) = (0, 0);
    returning(false).in_every_order(&mut |world| {
        let mut world = world.clone();
        let [first, second] = [range(1, 5), range(3, 7)].map(|range| world.write(range));
        world.in_every_order(&mut |world| {
            let [one, two] = [first, second].map(|tag| Slot::BOTH.map(|slot| on_its_way(world, tag, slot)));
            let begun = two.contains(&true) || world.answers.contains_key(&second);
            assert!(!(begun && one.contains(&true)), "the first one may still land over the second: {}", world.trace());
            for (tag, on) in [(first, one), (second, two)] {
                if world.answers.contains_key(&tag) && on[1] {
                    slow += 1;
                    assert_eq!(world.mirror.status().legs[1].state, LegState::Recovering, "who counts for the answer has it");
                }
            }
            for mut after in power_cuts(world, 1) {
                assert_equal_again(&mut after);
            }
            if world.movable().is_empty() {
                ends += 1;
                assert!(world.answers[&first] == Ok(()) && world.answers[&second] == Ok(()) && world.healthy());
                world.assert_identical();
                assert_eq!([0, 1, 2, 3, 6, 7].map(|block| world.disks[1].read(block)), [1, 3, 3, 4, 4, 1]);
            }
        });
    });
    assert!(slow > 0 && ends > 0, "{slow} {ends}");
}

#[test]
fn case_46_a_leg_that_was_away_while_the_source_discarded_reads_zeroes_there_in_every_order_also_after_a_power_cut() {
    let mut ends = 0;
    returning(true).in_every_order(&mut |world| {
        let ended = world.movable().is_empty();
        for mut after in power_cuts(world, 2).chain(ended.then(|| world.clone())) {
            assert_equal_again(&mut after);
            assert_eq!([1, 2, 5, 6].map(|block| after.disks[1].read(block)), [1, 0, 0, 1], "{}", after.trace());
        }
        if ended {
            ends += 1;
            assert!(world.healthy());
        }
    });
    assert!(ends > 0);
}

#[test]
fn case_24_in_every_order_a_write_waits_for_the_piece_that_is_being_copied_at_any_moment_and_a_read_is_served_by_its_source_at_once() {
    let resyncing = || {
        let mut world = small(64);
        killed_while_writing(&mut world, range(2, 6));
        world
    };
    let copying = |world: &World| {
        world.in_flight().iter().any(|(.., op)| {
            matches!(op, LegOp::Read { buffer: Buffer::Copy { .. }, .. } | LegOp::Write { buffer: Buffer::Copy { .. }, .. })
        })
    };
    for begun in [returning(false), resyncing()] {
        let (mut waited, mut ends) = (0, 0);
        begun.in_every_order(&mut |world| {
            let mut world = world.clone();
            let copied = copying(&world);
            let read = world.read(range(2, 6));
            let at_once =
                in_flight_on(&world, Slot::A, |op| matches!(op, LegOp::Read { buffer: Buffer::Request { tag, .. }, .. } if *tag == read));
            assert!(at_once.is_some() || !copied, "it waits: {}", world.trace());
            let write = world.write(range(4, 8));
            world.in_every_order(&mut |world| {
                let writing = Slot::BOTH.into_iter().any(|slot| on_its_way(world, write, slot));
                assert!(!(writing && copying(world)), "the copy may land over it: {}", world.trace());
                waited += usize::from(copied && copying(world));
                for mut after in power_cuts(world, 1) {
                    assert_equal_again(&mut after);
                }
                if world.movable().is_empty() {
                    ends += 1;
                    assert!([read, write].iter().all(|tag| world.answers[tag] == Ok(())) && world.healthy());
                    world.assert_identical();
                    assert_eq!([1, 4, 7].map(|block| world.disks[1].read(block)), [1, 3, 3]);
                }
            });
        });
        assert!(waited > 5 && ends > 9, "{waited} {ends}");
    }
}

#[test]
fn case_25_in_every_order_what_one_leg_cannot_read_in_a_resync_comes_from_the_other_and_what_neither_can_stays_dirty_also_after_a_power_cut()
 {
    for bad in [[true, false], [false, true], [true, true]] {
        let mut world = small(64);
        killed_while_writing(&mut world, range(2, 5));
        world.disks.iter_mut().zip(bad).for_each(|(disk, bad)| disk.bad.extend(bad.then_some(3)));
        let nowhere = bad == [true; 2];
        let mut ends = 0;
        world.in_every_order(&mut |world| {
            let told = world.notices.contains(&Notice::Unreadable { range: range(3, 4) });
            assert_eq!(world.mirror.status().legs.map(|leg| leg.state), [LegState::In; 2], "nobody goes OUT for it");
            assert!(nowhere || !told, "one leg has it");
            let ended = world.movable().is_empty();
            for mut after in power_cuts(world, 2).chain(ended.then(|| world.clone())) {
                run_dry(&mut after);
                let found = [2, 4].map(|block| after.read_now(block).expect("they can be read"));
                assert!(found.iter().all(|found| [1, 2].contains(found)), "{found:?}");
                match after.read_now(3) {
                    Ok(found) => assert!(!nowhere && [1, 2].contains(&found)),
                    Err(errno) => {
                        assert!(nowhere && errno == Errno::EIO, "{}", after.trace());
                        // Whatever else is idle has been cleaned by then.
                        run_for(&mut after, 20_000);
                        assert!(after.disks.iter().all(|disk| disk.dirty_regions().contains(&0)), "it is forgotten: {}", after.trace());
                        after.write(range(3, 4));
                    }
                }
                assert_equal_again(&mut after);
                assert_eq!([2, 4].map(|block| after.read_now(block)), found.map(Ok), "{}", after.trace());
                assert!(after.disks.iter().all(|disk| disk.bad.is_empty()));
            }
            if ended {
                ends += 1;
                assert_eq!(told, nowhere, "{}", world.trace());
            }
        });
        assert!(ends > 0);
    }
}

#[test]
fn case_25_in_every_order_what_the_only_good_leg_cannot_read_in_a_rebuild_is_never_read_as_data_also_after_a_power_cut_at_every_moment() {
    let mut world = returning(false);
    world.disks[0].bad.insert(3);
    let (mut listed, mut ends) = (0, 0);
    world.in_every_order(&mut |world| {
        let ended = world.movable().is_empty();
        listed += usize::from(world.disks.iter().all(|disk| disk.bad_blocks() == [range(3, 4)]));
        for mut after in power_cuts(world, 2).chain(ended.then(|| world.clone())) {
            run_dry(&mut after);
            assert_eq!([2, 3, 4].map(|block| after.read_now(block)), [Ok(2), Err(Errno::EIO), Ok(2)], "{}", after.trace());
            assert_equal_again(&mut after);
            // Both count, and either may be asked.
            assert_eq!([3; 2].map(|block| after.read_now(block)), [Err(Errno::EIO); 2], "{}", after.trace());
            assert_eq!([2, 4].map(|block| after.disks[1].read(block)), [2; 2]);
            after.write(range(3, 4));
            after.settle();
            assert_eq!([3; 2].map(|block| after.read_now(block)), [Ok(3); 2], "{}", after.trace());
            assert_equal_again(&mut after);
            assert!(after.disks.iter().all(|disk| disk.bad_blocks().is_empty()));
        }
        if ended {
            ends += 1;
            assert!(world.healthy() && world.notices.contains(&Notice::BlocksLost { range: range(3, 4) }));
        }
    });
    assert!(listed > 0 && ends > 0, "{listed} {ends}");
}
