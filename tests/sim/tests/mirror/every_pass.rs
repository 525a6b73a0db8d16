//! Cases of what the mirror does by itself on a volume of one region, the clean pass and the scrub, in every order in which what is on its way may end, with a
//! power cut at every moment (mirror rules 18 and 30).

use lockstep_core::units::Slot;
use lockstep_sim::{Disk, World};

use crate::{
    bitmap_on, differing, power_cuts, range,
    scrub::{mismatches, rot, scrub},
    small,
};

/// Everything that this world becomes, in every order, when so many times, at any moment, five seconds pass.
fn while_time_passes(world: &World, times: u32, visit: &mut dyn FnMut(&World)) {
    world.in_every_order(&mut |world| {
        visit(world);
        if times > 0 {
            let mut later = world.clone();
            later.sleep(5_000);
            later.tick();
            while_time_passes(&later, times - 1, visit);
        }
    });
}

#[test]
fn case_21_in_every_order_and_whenever_the_clean_pass_and_another_write_come_no_bit_is_clear_before_both_legs_hold_the_region_durably() {
    let clear = |disk: &Disk| !disk.dirty_regions().contains(&0);
    let judge = |world: &World| {
        let cleared = world.disks.iter().any(clear);
        assert!(!cleared || world.disks.iter().all(|disk| disk.cache.is_empty()), "{}", world.trace());
        for after in power_cuts(world, 2) {
            let told = !after.disks.iter().all(clear);
            assert!(told || differing(&after).is_empty(), "they differ and nothing says so: {}", after.trace());
        }
        cleared
    };
    let clearing =
        |world: &World| world.mirror.status().dirty_regions == 0 && Slot::BOTH.into_iter().any(|slot| bitmap_on(world, slot).is_some());
    let mut world = small(64);
    let first = world.write(range(2, 6));
    let (mut cleared, mut met) = (0, 0);
    while_time_passes(&world, 3, &mut |world| {
        cleared += usize::from(judge(world) && world.answers.contains_key(&first));
        met += usize::from(clearing(world));
        let mut world = world.clone();
        let write = world.write(range(4, 8));
        world.in_every_order(&mut |world| {
            judge(world);
            assert!(world.answers.contains_key(&write) || !world.movable().is_empty(), "it never ends: {}", world.trace());
        });
    });
    assert!(cleared > 9 && met > 9, "{cleared} {met}");
}

#[test]
fn case_35_in_every_order_a_scrub_names_what_rotted_and_nothing_else_and_only_the_operators_belief_changes_it() {
    let racing = [None, Some(range(5, 8)), Some(range(2, 6))];
    for (believed, racing) in [None, Some(Slot::A), Some(Slot::B)].into_iter().flat_map(|believed| racing.map(|racing| (believed, racing)))
    {
        let mut world = small(64);
        rot(&mut world, Slot::A, 3);
        let asked = scrub(&mut world, believed);
        let write = racing.map(|range| world.write(range));
        let over = racing.is_some_and(|range| range.start == 2);
        let mut ends = 0;
        world.in_every_order(&mut |world| {
            let told = mismatches(world);
            assert!(told.iter().all(|told| *told == range(3, 4)), "{told:?}");
            let holds = |world: &World| Slot::BOTH.map(|slot| world.disks[slot.index()].read(3));
            for ((held, slot), own) in holds(world).into_iter().zip(Slot::BOTH).zip([666, 1]) {
                let repaired = held == 667 - own && believed == Some(slot.other()) && !told.is_empty();
                assert!(held == own || repaired || held == 2 && over, "{held} on {slot:?}: {}", world.trace());
            }
            for mut after in power_cuts(world, 2) {
                after.settle();
                let held = holds(&after);
                // What came near it is resynced.
                let resynced = held[0] == held[1] && ([666, 1].contains(&held[0]) || over && held[0] == 2);
                let untouched = believed.is_none() && racing.is_none();
                assert!(held == [666, 1] || !untouched && resynced, "{held:?}: {}", after.trace());
                assert_eq!([1, 4, 7].map(|block| after.disks[0].read(block)), [1, 4, 7].map(|block| after.disks[1].read(block)));
            }
            if world.movable().is_empty() {
                ends += 1;
                let mut world = world.clone();
                world.settle();
                assert!(world.answers[&asked] == Ok(()) && write.is_none_or(|write| world.answers[&write] == Ok(())));
                assert!(over || mismatches(&world) == [range(3, 4)], "{}", world.trace());
                let wanted = [(Slot::A, 666), (Slot::B, 1)]
                    .map(|(slot, own)| believed.map_or(own, |_| if believed == Some(slot) { own } else { 667 - own }));
                assert_eq!(holds(&world), if over { [2; 2] } else { wanted }, "{}", world.trace());
            }
        });
        assert!(ends > 0);
    }
}
