//! Cases of single requests, in every order in which what they ask of the disks may end, with a power cut or a kill at every moment.

use lockstep_core::{
    io::{Buffer, LegOp, Outcome},
    status::LegState,
    units::{BLOCK_SIZE, Errno, Slot, Tag},
};
use lockstep_sim::World;

use crate::{
    assert_equal_again, assert_resynced, differing, flushed, in_flight_on, kills, on_full_disks, power_cuts, range, small, until_writing,
    warm, writes_in_flight,
};

#[test]
fn case_05_in_every_order_and_after_a_kill_at_every_moment_many_writes_of_one_range_land_in_order_of_arrival() {
    let mut world = warm(1);
    let tags: Vec<Tag> = (0..64).map(|_| world.write(range(8, 16))).collect();
    let worlds = world.in_every_order(&mut |world| {
        let answered = tags.iter().take_while(|tag| world.answers.contains_key(tag)).count();
        assert!(tags[answered..].iter().all(|tag| !world.answers.contains_key(tag)), "one came before an earlier one: {}", world.trace());
        assert!(writes_in_flight(world) <= 2, "one at a time");
        let newest = 1 + answered as u64;
        for mut after in kills(world, 2) {
            let found = after.read_now(8).expect("both can read");
            assert!([newest, newest + 1].contains(&found) || answered == 0 && found == 0, "{found} after {newest}: {}", world.trace());
            after.settle();
            after.assert_identical();
            assert_eq!([8, 15].map(|block| after.read_now(block)), [Ok(found); 2], "{}", after.trace());
        }
        assert!(answered == 64 || !world.movable().is_empty(), "it never ends");
    });
    assert!(worlds > 64 * 2, "{worlds}");
}

#[test]
fn case_08_in_every_order_and_after_a_short_count_or_a_host_fault_at_any_moment_both_legs_get_the_one_copy_of_the_payload() {
    // The world overwrites the memory of a request when that is released, as its program does.
    let mut world = warm(1);
    let ranges = [range(0, 8), range(4, 12)];
    let writes = ranges.map(|range| world.write(range));
    let own_part = |world: &World| {
        for (.., op) in world.in_flight() {
            let LegOp::Write { range, buffer: Buffer::Request { tag, skip }, .. } = op else { continue };
            assert_eq!(skip, range.start - ranges[usize::from(tag == writes[1])].start, "{}", world.trace());
        }
    };
    let mut ends = 0;
    let worlds = world.in_every_order(&mut |world| {
        for (io, slot, op) in world.in_flight() {
            let LegOp::Write { range, buffer: Buffer::Request { tag, .. }, .. } = op else { continue };
            let token = if tag == writes[0] { 2 } else { 3 };
            for outcome in [0, 512, 4096, 5000, 7 * 4096].map(Outcome::Done).into_iter().chain([Outcome::Failed(Errno::EAGAIN)]) {
                let mut world = world.clone();
                if let Outcome::Done(bytes) = outcome {
                    world.disks[slot.index()].cache.extend((range.start..range.start + bytes / BLOCK_SIZE).map(|block| (block, token)));
                }
                world.end(io, outcome);
                world.in_every_order(&mut |world| {
                    own_part(world);
                    for mut after in kills(world, 1) {
                        let found = [0, 4, 11].map(|block| after.read_now(block).expect("both can read"));
                        assert!(found[0] == 1 || found[0] == 2, "{found:?}: {}", after.trace());
                        assert_equal_again(&mut after);
                    }
                    if world.movable().is_empty() {
                        ends += 1;
                        assert!(writes.iter().all(|tag| world.answers.get(tag) == Some(&Ok(()))), "{}", world.trace());
                        world.assert_identical();
                        assert_eq!([0, 3, 4, 11].map(|block| world.disks[0].read(block)), [2, 2, 3, 3]);
                    }
                });
            }
        }
    });
    assert!(worlds > 6 && ends > 40, "{worlds} {ends}");
}

#[test]
fn case_19_a_write_that_a_power_cut_at_any_moment_tears_on_b_only_is_found_by_its_bit_and_made_equal() {
    let mut world = flushed(1);
    // The bit is not set yet.
    world.settle();
    world.write(range(2, 6));
    let mut torn = 0;
    world.in_every_order(&mut |world| {
        let mut whole = world.clone();
        if let Some(on_a) = in_flight_on(world, Slot::A, |op| matches!(op, LegOp::Write { .. })) {
            whole.finish(on_a);
        }
        let cache = std::mem::take(&mut whole.disks[0].cache);
        whole.disks[0].durable.extend(cache);
        for after in power_cuts(&whole, 12) {
            torn += usize::from((1..4).contains(&differing(&after).len()));
            assert_resynced(after, 2, &[2, 3]);
        }
    });
    assert!(torn > 10, "{torn}");
}

#[test]
fn case_34_what_no_leg_can_read_fails_alone_in_every_order_until_it_is_written() {
    let mut world = flushed(1);
    world.settle();
    world.disks.iter_mut().for_each(|disk| disk.bad.extend([3]));
    let reads = [2, 3, 4].map(|block| world.read(range(block, block + 1)));
    let worlds = world.in_every_order(&mut |world| {
        assert_eq!(world.mirror.status().legs.map(|leg| leg.state), [LegState::In; 2], "nobody goes OUT for it");
        for (n, read) in reads.into_iter().enumerate() {
            match world.answers.get(&read) {
                Some(answer) if n == 1 => assert_eq!(*answer, Err(Errno::EIO)),
                Some(answer) => assert_eq!((*answer, world.found(read)), (Ok(()), Some(2)), "{}", world.trace()),
                None => assert!(!world.movable().is_empty(), "it never ends"),
            }
        }
        let mut world = world.clone();
        world.write(range(3, 4));
        world.settle();
        assert_eq!([2, 3, 4].map(|block| world.read_now(block)), [Ok(2), Ok(3), Ok(2)]);
        assert!(world.healthy());
        world.assert_identical();
    });
    assert!(worlds > 8, "{worlds}");
}

#[test]
fn case_38_in_every_order_a_discard_leaves_zeroes_on_both_legs_or_is_not_done_at_all_also_after_a_power_cut() {
    for full in [[false, false], [true, false], [false, true], [true, true]] {
        let refused = full[0] || full[1];
        let after_a_cut = |after: &mut World, answer: Option<Result<(), Errno>>| {
            let found = [1, 2, 3, 4, 5, 6].map(|block| after.read_now(block).expect("both can read"));
            let may = |found: u64| found == 2 || found == 0 && !(refused && answer.is_some());
            assert!(found.iter().all(|found| may(*found)) && (found[0], found[5]) == (2, 2), "{found:?}: {}", after.trace());
            assert_equal_again(after);
            assert_eq!([1, 2, 3, 4, 5, 6].map(|block| after.read_now(block)), found.map(Ok), "{}", after.trace());
        };
        on_full_disks(
            full,
            |world| world.zero(range(2, 6)),
            6,
            after_a_cut,
            |world, answer| {
                assert_eq!(answer, if refused { Err(Errno::ENOSPC) } else { Ok(()) }, "{}", world.trace());
                let kept = if refused { 2 } else { 0 };
                for disk in &world.disks {
                    assert_eq!([1, 2, 5, 6].map(|block| disk.read(block)), [2, kept, kept, 2], "{}", world.trace());
                }
            },
        );
    }
}

#[test]
fn case_52_after_a_kill_at_any_moment_of_a_write_and_another_at_any_moment_of_what_follows_reads_never_go_back() {
    let mut world = small(64);
    let write = world.write(range(2, 6));
    until_writing(&mut world);
    let before = world.read(range(3, 4));
    let (mut differed, mut resynced) = (0, 0);
    world.in_every_order(&mut |world| {
        let least = if world.answers.contains_key(&write) { 2 } else { world.found(before).unwrap_or(1) };
        for mut after in kills(world, 4) {
            let differs = after.disks[0].read(3) != after.disks[1].read(3);
            let first = after.read(range(3, 4));
            let worlds = after.in_every_order(&mut |world| {
                let least = least.max(world.found(first).unwrap_or(1));
                for mut again in kills(world, 2).chain([world.clone()]) {
                    let found = again.read_now(3).expect("both can read");
                    assert!(found >= least, "{found} after {least}: {}", again.trace());
                    again.settle();
                    assert!(again.healthy());
                    again.assert_identical();
                    assert_eq!(again.read_now(3), Ok(found), "{}", again.trace());
                }
                assert!(world.answers.contains_key(&first) || !world.movable().is_empty(), "it never ends");
            });
            differed += usize::from(differs);
            resynced = resynced.max(worlds);
        }
    });
    assert!(differed > 2 && resynced > 9, "{differed} {resynced}");
}
