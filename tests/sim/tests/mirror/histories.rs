//! Random histories with crashes and lost disks.

use lockstep_core::{
    io::{Notice, Request},
    status::LegState,
    units::Slot,
};
use lockstep_sim::{Rng, World};

use crate::range;

/// One random history; `beside` does what else there is to be done between two steps.
fn history(seed: u64, mut beside: impl FnMut(&mut World)) {
    let mut world = World::new(seed);
    world.flaky = [0, 0, 12][(seed % 3) as usize];
    let mut rng = Rng(seed ^ 0xfeed);
    let mut lost: Option<Slot> = None;
    for _ in 0..300 {
        beside(&mut world);
        let start = [0, 4090, 8190][rng.below(3) as usize] + rng.below(24);
        let piece = range(start, start + 1 + rng.below(8));
        match rng.below(20) {
            0..=4 => drop(world.write(piece)),
            5 => drop(world.write_fua(piece)),
            6 | 7 => drop(world.read(piece)),
            8 if rng.once_in(3) => drop(world.zero(piece)),
            9 => drop(world.flush()),
            10 if lost.is_none() && world.healthy() && rng.once_in(4) => {
                let slot = Slot::BOTH[rng.below(2) as usize];
                world.disks[slot.index()].dead = true;
                lost = Some(slot);
            }
            11 if rng.once_in(3) => {
                if let Some(slot) = lost {
                    world.settle();
                    world.bring_back(slot);
                    lost = None;
                }
            }
            12 if rng.once_in(6) => {
                let present = Slot::BOTH.map(|slot| lost != Some(slot));
                world.crash(present).unwrap_or_else(|refusal| panic!("refused within the budget: {refusal}"));
            }
            _ => {
                for _ in 0..rng.below(6) {
                    world.step();
                }
            }
        }
    }
    world.settle();
    if let Some(slot) = lost {
        world.bring_back(slot);
    } else {
        for slot in Slot::BOTH {
            if world.mirror.status().legs[slot.index()].state == LegState::Out {
                world.bring_back(slot);
            }
        }
    }
    world.settle();
    world.read(range(0, 40));
    world.read(range(4080, 4140));
    world.settle();
    assert!(world.healthy(), "{:?}", world.mirror.status());
    world.assert_identical();
}

fn histories(seeds: u64, mut one: impl FnMut(u64)) {
    for seed in 0..seeds {
        if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| one(seed))) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn random_histories_with_crashes_and_lost_disks_keep_every_promise() {
    histories(500, |seed| history(seed, |_| {}));
}

#[test]
fn random_histories_beside_scrubs_keep_every_promise_and_no_scrub_finds_a_difference() {
    histories(150, |seed| {
        let mut rng = Rng(seed ^ 0x5c2b);
        history(seed, |world| {
            match rng.below(30) {
                0 | 1 => drop(world.command(Request::Scrub { believed: [None, Some(Slot::A), Some(Slot::B)][rng.below(3) as usize] })),
                2 if rng.once_in(4) => drop(world.command(Request::StopScrub)),
                3 | 4 => drop(world.tick()),
                _ => {}
            }
            let mismatch = world.notices.iter().find(|notice| matches!(notice, Notice::Mismatch { .. }));
            assert!(mismatch.is_none(), "{mismatch:?}: {}", world.trace());
        });
    });
}

#[test]
fn random_histories_with_writes_behind_keep_every_promise() {
    let answered_early = std::cell::Cell::new(0);
    histories(250, |seed| {
        let mut rng = Rng(seed ^ 0xbe41);
        history(seed, |world| {
            let status = world.mirror.status();
            answered_early.set(answered_early.get() + status.behind);
            match rng.below(12) {
                0 | 1 if status.write_mostly.is_none() => drop(world.command(Request::WriteMostly { slot: Some(Slot::B), behind: true })),
                2 if rng.once_in(20) => drop(world.command(Request::WriteMostly { slot: Some(Slot::A), behind: true })),
                3 if rng.once_in(20) => drop(world.command(Request::WriteMostly { slot: Some(Slot::B), behind: false })),
                4 => drop(world.tick()),
                _ => {}
            }
        });
    });
    assert!(answered_early.get() > 0, "nothing was ever behind");
}
