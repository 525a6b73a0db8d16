//! Every order in which what is on its way may end.

use std::{
    collections::BTreeSet,
    hash::{DefaultHasher, Hash, Hasher},
};

use lockstep_core::units::IoId;

use crate::{World, world::Work};

impl World {
    /// What may end next.
    pub fn movable(&self) -> Vec<IoId> {
        let hangs = |work: &Work| matches!(work, Work::Leg(slot, ..) if self.disks[slot.index()].hung);
        self.work.iter().filter(|(io, work)| !self.stuck.contains(io) && !hangs(work)).map(|(io, _)| *io).collect()
    }

    /// Visits this world and everything that it becomes by what is on its way, in every order, without the clock. Worlds that differ in
    /// nothing that counts are visited once. How many there were.
    pub fn in_every_order(&self, visit: &mut dyn FnMut(&Self)) -> usize {
        self.in_every_order_while(&mut |world| {
            visit(world);
            true
        })
    }

    /// The same; what becomes of a world for which `visit` says no is not looked at.
    pub fn in_every_order_while(&self, visit: &mut dyn FnMut(&Self) -> bool) -> usize {
        let mut seen = BTreeSet::from([self.fingerprint()]);
        let mut left = vec![self.clone()];
        while let Some(world) = left.pop() {
            assert!(seen.len() < 50_000, "too many orders");
            let next = if visit(&world) { world.movable() } else { Vec::new() };
            for io in next {
                let mut next = world.clone();
                next.finish(io);
                if seen.insert(next.fingerprint()) {
                    left.push(next);
                }
            }
        }
        seen.len()
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.mirror, &self.disks, &self.witness, &self.answers, &self.last_read).hash(&mut hasher);
        // What was read and is not written yet.
        self.copies.map(|copy| copy.map(|memory| &self.memory[&memory])).hash(&mut hasher);
        for (io, work) in &self.work {
            io.hash(&mut hasher);
            if let Work::Leg(.., data) = work {
                data.blocks.hash(&mut hasher);
            }
        }
        hasher.finish()
    }
}
