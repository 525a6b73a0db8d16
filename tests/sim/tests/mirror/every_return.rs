//! Who may come back after any moment of a history, in every order in which what is on its way may end (mirror rules 9 to 13, 24).

use std::collections::BTreeSet;

use lockstep_core::{
    assembly::Refusal,
    format::{self, REGION_BLOCKS},
    io::{Fill, Request},
    membership::MemberState,
    status::LegState,
    units::{Epoch, LegId, Slot},
};
use lockstep_sim::{Disk, Rng, World};

use crate::{assert_equal_again, assert_readable, done, kills, power_cuts, range, run_dry, small, through, witnessed};

/// Until the clock has something begin, which is the cleaning of regions.
fn until_cleaning(world: &mut World) {
    while world.movable().is_empty() {
        assert!(world.tick(), "nothing is to be cleaned");
    }
}

/// This disk is in B's place from this moment on: after a power cut, after a kill, or plugged in while the mirror runs.
fn with_b(world: &World, disk: &Disk) -> Vec<World> {
    let mut swapped = world.clone();
    swapped.swap(Slot::B, disk.clone());
    let mut running = world.clone();
    running.disks[1].dead = true;
    running.command(Request::Detach(Slot::B));
    running.settle();
    running.disks[1] = disk.clone();
    power_cuts(&swapped, 2).chain(kills(&swapped, 2)).chain([running]).collect()
}

/// B is lost and misses writes; it is filled again; both are written.
const LOST_AND_BACK: [fn(&mut World); 3] = [
    |world| {
        world.disks[1].dead = true;
        world.write_fua(range(2, 4));
        world.write(range(4, 6));
    },
    |world| _ = world.bring_back(Slot::B).expect("it has a place"),
    |world| _ = world.write_fua(range(3, 5)),
];

/// The process starts anew with these disks only: after power cuts and after kills, or it is refused.
fn starts(
    world: &World,
    times: u64,
    present: [bool; 2],
    prepare: impl Fn(&mut World),
) -> impl Iterator<Item = (World, Result<(), Refusal>)> {
    (0..2 * times).map(move |n| {
        let mut after = world.clone();
        after.rng = Rng(n);
        after.disks.iter_mut().for_each(|disk| disk.dead = false);
        prepare(&mut after);
        let started = if n % 2 == 0 { after.crash(present) } else { after.kill(present) };
        (after, started)
    })
}

/// Whether the witness counts this leg, and whether a slot of it is torn.
fn counted_or_torn(world: &World, slot: Slot) -> (bool, bool) {
    (witnessed(world, slot) == MemberState::In, format::witness_is_doubtful(&world.witness))
}

fn epoch_of(witness: &[u8]) -> Epoch {
    format::witness(witness).expect("a slot is whole").0.record.name.epoch
}

#[test]
fn case_29_at_any_moment_of_losing_a_leg_and_of_filling_it_again_that_leg_alone_is_refused_or_has_all_that_was_answered() {
    let (mut served, mut refused) = ([0; 3], [0; 3]);
    through(small(64), &LOST_AND_BACK, &mut |world, phase| {
        for (mut after, started) in starts(world, 2, [false, true], |_| ()) {
            let (counted, torn) = counted_or_torn(&after, Slot::B);
            match started {
                Ok(()) => {
                    served[phase] += 1;
                    assert!(counted, "{}", after.trace());
                    assert_readable(&mut after, range(0, 8));
                    assert_eq!(after.mirror.status().legs.map(|leg| leg.state), [LegState::Out, LegState::In]);
                    assert_equal_again(&mut after);
                }
                Err(refusal) => {
                    refused[phase] += 1;
                    assert!(!counted || torn, "{refusal}: {}", after.trace());
                }
            }
        }
    });
    assert!(served.iter().chain(&refused[..2]).all(|times| *times > 3) && refused[2] == 0, "{served:?} {refused:?}");
}

#[test]
fn case_29_a_stale_leg_that_is_forced_at_any_moment_serves_what_it_holds_and_the_other_one_is_stale_from_then_on_in_every_order() {
    let (mut forced, mut undone) = (0, 0);
    through(small(64), &LOST_AND_BACK[..2], &mut |world, _| {
        let both = starts(world, 1, [false, true], |_| ()).zip(starts(world, 1, [false, true], |world| world.force = Some(LegId([2; 16]))));
        for ((_, unforced), (mut alone, started)) in both.filter(|((_, unforced), _)| unforced.is_err()) {
            started.unwrap_or_else(|refusal| panic!("{refusal} and {unforced:?}: {}", world.trace()));
            forced += 1;
            alone.force = None;
            // What was not flushed may be gone.
            let held = [alone.disks[1].read(3), alone.disks[1].durable.get(&3).copied().unwrap_or(0)];
            alone.in_every_order_while(&mut |world| {
                let ready = world.mirror.status().ready;
                for (mut after, started) in starts(world, 1, [true, true], |_| ()) {
                    if let Err(refusal) = started {
                        // Each calls the other one OUT.
                        assert!(
                            matches!(refusal, Refusal::SplitBrain(..)) && format::witness_is_doubtful(&after.witness) && !ready,
                            "{refusal}: {}",
                            after.trace()
                        );
                        continue;
                    }
                    let counted = after.mirror.status().legs.map(|leg| leg.state == LegState::In);
                    let found = after.read_now(3).expect("one can read");
                    if counted == [false, true] {
                        assert!(held.contains(&found), "{found} of {held:?}: {}", after.trace());
                        run_dry(&mut after);
                        let flags = format::superblock(&after.disks[1].meta).expect("a slot is whole").0.flags;
                        assert_eq!(flags & format::FLAG_FORCED, format::FLAG_FORCED, "it is on record");
                        assert_eq!(after.mirror.readmission(&after.disks[0].meta), Some((Slot::A, Fill::Everything)));
                    } else {
                        undone += 1;
                        assert!(!ready && counted[0], "{}", after.trace());
                        assert_readable(&mut after, range(0, 8));
                    }
                    assert_equal_again(&mut after);
                    assert_eq!(after.read_now(3), Ok(found), "{}", after.trace());
                }
                !ready
            });
        }
    });
    assert!(forced > 9 && undone > 9, "{forced} {undone}");
}

/// What is on this leg's disk and in the witness at each moment of going on alone, twice, and whether its write was answered.
fn going_on_alone(world: &World, phases: &[fn(&mut World); 2], slot: Slot) -> Vec<(Disk, Vec<u8>, bool)> {
    let (mut moments, mut seen, before) = (Vec::new(), BTreeSet::new(), world.answers.len());
    let mut world = world.clone();
    world.rng = Rng(slot.index() as u64);
    through(world, phases, &mut |world, _| {
        let answered = world.answers.len() > before;
        for after in [world.clone()].into_iter().chain(power_cuts(world, 1)) {
            let disk = after.disks[slot.index()].clone();
            if seen.insert((disk.meta.clone(), disk.durable.clone(), after.witness.clone(), answered)) {
                moments.push((disk, after.witness, answered));
            }
        }
    });
    moments
}

#[test]
fn case_30_legs_that_each_went_on_alone_up_to_any_moment_are_refused_without_a_witness_or_lose_nothing_and_with_one_it_decides() {
    let fork = small(64);
    let on_a: [fn(&mut World); 2] = [
        |world| {
            world.crash([true, false]).expect("A is IN");
            world.write_fua(range(2, 4));
        },
        |world| world.crash([true, false]).expect("A is IN"),
    ];
    let on_b: [fn(&mut World); 2] = [
        |world| {
            world.crash([false, true]).expect("B is IN");
            world.write_fua(range(4, 6));
        },
        |world| world.crash([false, true]).expect("B is IN"),
    ];
    let (a, b) = (going_on_alone(&fork, &on_a, Slot::A), going_on_alone(&fork, &on_b, Slot::B));
    let changed = |disk: &Disk, slot: Slot| disk.meta[..8192] != fork.disks[slot.index()].meta[..8192];
    let [mut refused, mut assembled, mut decided] = [0; 3];
    for (on_a, witness_of_a, answered_a) in &a {
        for (on_b, witness_of_b, answered_b) in &b {
            for witness in [None, Some(Slot::A), Some(Slot::B)] {
                let mut world = fork.clone();
                world.disks = [on_a.clone(), on_b.clone()];
                world.disks.iter_mut().for_each(|disk| disk.dead = false);
                world.witness = witness.map_or_else(Vec::new, |slot| [witness_of_a, witness_of_b][slot.index()].clone());
                let torn = !world.witness.is_empty() && format::witness_is_doubtful(&world.witness);
                let apart = changed(on_a, Slot::A) && changed(on_b, Slot::B);
                let started = world.crash([true, true]);
                if let Err(refusal) = started {
                    refused += 1;
                    assert!(apart && (witness.is_none() || torn), "{witness:?}: {refusal}");
                    continue;
                }
                world.witness.resize(8192, 0);
                let lost = |world: &mut World| {
                    let found = [2, 4].map(|block| world.read_now(block).expect("one can read"));
                    [*answered_a && found[0] != 2, *answered_b && found[1] != 2]
                };
                let gone = lost(&mut world);
                match witness {
                    None => {
                        assembled += 1;
                        assert_eq!(gone, [false; 2], "{}", world.trace());
                    }
                    Some(slot) => {
                        decided += 1;
                        assert!(!gone[slot.index()], "{slot:?}: {}", world.trace());
                    }
                }
                assert_equal_again(&mut world);
                assert_eq!(lost(&mut world), gone, "{}", world.trace());
            }
        }
    }
    assert!(refused > 99 && assembled > 99 && decided > 99, "{refused} {assembled} {decided}");
}

#[test]
fn case_48_with_the_state_directory_lost_at_any_moment_both_legs_assemble_with_all_that_was_answered_and_one_alone_is_refused() {
    let phases: Vec<fn(&mut World)> = LOST_AND_BACK
        .into_iter()
        .chain([
            (|world: &mut World| _ = world.command(Request::Detach(Slot::B))) as fn(&mut World),
            |world| _ = world.replace(Slot::B),
            |world| _ = world.command(Request::Stop),
        ])
        .collect();
    let lost = |world: &mut World| world.witness.clear();
    let (mut assembled, mut again, mut unknown) = (0, 0, 0);
    through(small(64), &phases, &mut |world, phase| {
        for present in [[true, false], [false, true]] {
            for (after, started) in starts(world, 1, present, lost) {
                assert!(started.is_err(), "one leg and nobody who knows: {}", after.trace());
            }
        }
        for (n, (mut after, started)) in starts(world, 1, [true, true], lost).enumerate() {
            if let Err(refusal) = started {
                // The blank disk that no record names yet is none of its legs.
                unknown += 1;
                assert!(phase == 4 && matches!(refusal, Refusal::NoWitness(_)), "{refusal}: {}", after.trace());
                let [own, blank] = [0, 1].map(|disk| format::superblock(&after.disks[disk].meta).expect("a slot is whole").0);
                assert!(own.record.slot_of(blank.leg).is_none(), "{refusal}: {}", after.trace());
                continue;
            }
            assembled += 1;
            after.witness = vec![0; 8192];
            if n > 0 {
                assert_readable(&mut after, range(0, 8));
                assert_equal_again(&mut after);
                continue;
            }
            // A power cut, and another before it serves.
            after.in_every_order_while(&mut |world| {
                for (mut after, started) in starts(world, 1, [true, true], lost).take(1) {
                    started.unwrap_or_else(|refusal| panic!("{refusal}: {}", world.trace()));
                    again += 1;
                    after.witness = vec![0; 8192];
                    assert_readable(&mut after, range(0, 8));
                    assert_equal_again(&mut after);
                }
                !world.mirror.status().ready
            });
        }
    });
    assert!(assembled > 50 && again > 500 && unknown > 0, "{assembled} {again} {unknown}");
}

#[test]
fn case_14_at_no_moment_do_objects_that_are_behind_keep_a_volume_from_starting_or_change_who_counts() {
    let phases: Vec<fn(&mut World)> = LOST_AND_BACK
        .into_iter()
        .chain([(|world: &mut World| world.crash([true, true]).expect("both are IN")) as fn(&mut World)])
        .collect();
    let first = small(64).witness;
    let (mut epochs, mut vetoed) = (BTreeSet::new(), 0);
    through(small(64), &phases, &mut |world, _| {
        let published = world.mirror.status().epoch;
        epochs.insert(published.0);
        for present in [[true, true], [true, false], [false, true]] {
            let states = |seen: Option<Epoch>| {
                let starts = starts(world, 2, present, |world| world.seen_epoch = seen);
                starts.map(|(after, started)| started.map(|()| after.mirror.status().legs)).collect::<Vec<_>>()
            };
            let alone = states(None);
            for seen in [0, published.0] {
                assert_eq!(states(Some(Epoch(seen))), alone, "{seen} of {}: {}", published.0, world.trace());
            }
        }
        // A state directory from before is what they are for.
        let from_before = |world: &mut World| (world.witness, world.seen_epoch) = (first.clone(), Some(published));
        for (after, started) in starts(world, 1, [true, true], from_before) {
            // What was on its way to it may have come there.
            let [(known, torn), (old, _)] =
                [&after.witness, &first].map(|witness| (epoch_of(witness), format::witness_is_doubtful(witness)));
            vetoed += usize::from(started.is_err());
            assert!(torn || started.is_err() == (known < published) && known >= old, "{known:?} {published:?}: {}", world.trace());
        }
    });
    assert!(epochs.len() > 4 && vetoed > 9, "{epochs:?} {vetoed}");
}

#[test]
fn case_44_a_leg_whose_place_another_one_is_given_returns_at_any_moment_in_every_order_and_is_refused_if_it_has_lost_its_place() {
    const OTHER: u64 = REGION_BLOCKS;
    let phases: [fn(&mut World); 3] = [
        |world| _ = world.replace(Slot::B),
        until_cleaning,
        |world| {
            world.disks[1].dead = true;
            world.write(range(OTHER + 2, OTHER + 6));
        },
    ];
    let missed = |blocks| {
        let mut world = World::sized(1, blocks);
        world.write(range(0, 8));
        done(&mut world);
        world.disks[1].dead = true;
        world.write(range(2, 6));
        done(&mut world);
        world.disks[1].dead = false;
        let leg = world.disks[1].clone();
        (world, leg)
    };
    let (mut kept, mut taken) = (0, [0; 3]);
    let mut returns = |world: &World, phase: usize, old: &Disk| {
        let own = format::superblock(&old.meta).expect("it was IN").0.leg;
        for mut after in with_b(world, old) {
            run_dry(&mut after);
            let [a, b] = after.mirror.status().legs;
            assert_eq!([a.state, b.state], [LegState::In, LegState::Out], "{}", after.trace());
            let back = after.mirror.readmission(&old.meta);
            if b.id == own {
                kept += 1;
                assert_eq!((phase, back), (0, Some((Slot::B, Fill::DirtyRegions))), "it kept its place: {}", world.trace());
            } else {
                taken[phase] += 1;
                assert!(back.is_none_or(|(_, fill)| fill == Fill::Everything), "{back:?}: {}", world.trace());
                after.replace(Slot::B);
            }
            assert_equal_again(&mut after);
            assert_eq!([1, 2, 5, 6].map(|block| after.disks[1].read(block)), [1, 2, 2, 1], "{}", after.trace());
        }
    };
    // On a small volume while the place is filled, and with another region to miss after that.
    let (world, old) = missed(64);
    through(world, &phases[..1], &mut |world, _| returns(world, 0, &old));
    let (mut world, old) = missed(REGION_BLOCKS + 64);
    phases[0](&mut world);
    run_dry(&mut world);
    through(world, &phases[1..], &mut |world, phase| returns(world, 1 + phase, &old));
    assert!(kept > 0 && taken.iter().all(|times| *times > 5), "{kept} {taken:?}");
}
