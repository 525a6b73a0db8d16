//! Reads beside writes (mirror rule 7).

use lockstep_core::units::Errno;

use crate::{range, warm};

/// A read of [4, 6) beside a write of [4, 5) that came after it and is taken back, because one leg has no space for it. What the read saw
/// must be what is there afterwards.
fn read_beside_a_write_that_is_taken_back(seed: u64, waits: bool) {
    let mut world = warm(seed);
    world.write(range(0, 16));
    world.settle();
    world.disks[(seed % 2) as usize].full = true;
    if waits {
        world.write(range(5, 7));
    }
    let read = world.read(range(4, 6));
    let write = world.write(range(4, 5));
    while !world.answers.contains_key(&read) || !world.answers.contains_key(&write) {
        assert!(world.step(), "a request never ended");
    }
    assert_eq!((world.answers[&read], world.answers[&write]), (Ok(()), Err(Errno::ENOSPC)));
    let seen = world.found(read);
    world.settle();
    assert_eq!(seen, world.read_now(4).ok(), "seed {seed}: a write that never happened was read\n{}", world.trace());
}

#[test]
fn rule_07_a_write_that_comes_while_a_read_is_under_way_is_not_read_before_it_is_final() {
    (0..100).for_each(|seed| read_beside_a_write_that_is_taken_back(seed, false));
}

#[test]
fn rule_07_a_write_that_comes_while_a_read_waits_for_another_one_is_not_read_before_it_is_final() {
    (0..100).for_each(|seed| read_beside_a_write_that_is_taken_back(seed, true));
}
