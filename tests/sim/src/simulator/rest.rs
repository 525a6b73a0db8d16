//! Coming to rest, and what must hold then.

use std::collections::BTreeSet;

use lockstep_core::{
    status::{LegState, Sync},
    units::Slot,
};

use super::{State, disk::Disk, machine::Machine};
use crate::oracles::legs;

impl Machine {
    /// A leg hangs and the other one carries the volume: every request ends by the deadline (mirror rule 27).
    fn outlast(&mut self) {
        let hangs = |slot: &Slot| self.place[slot.index()].is_some_and(|disk| self.disks[disk].trouble.frozen);
        let Some(hung) = Slot::BOTH.into_iter().find(hangs) else { return };
        if !self.carries(hung.other()) || self.stopping {
            return;
        }
        *self.coverage.others.entry("hung legs outlasted").or_default() += 1;
        for _ in 0..400 {
            while self.step() {}
            if self.asked.is_empty() || self.broken.is_some() || self.status.read_only || !self.tick() {
                break;
            }
        }
        if let Some((tag, asked)) = self.asked.iter().next() {
            self.breaks("every request ends", format!("{hung:?} hangs, and {tag:?} waits for it: {asked:?}"));
        }
    }

    /// Runs until nothing is left to do.
    pub(super) fn settle(&mut self) {
        if self.rng.once_in(2) {
            self.outlast();
        }
        self.disks.iter_mut().for_each(|disk| disk.trouble.frozen = false);
        for _ in 0..200_000 {
            if self.broken.is_some() {
                return;
            }
            if self.step() {
                continue;
            }
            let leaving = self.counted().iter().any(|slot| self.status.legs[slot.index()].state != LegState::In);
            let busy = !self.asked.is_empty() || self.status.sync != Sync::Idle || !self.status.ready || leaving;
            let dirty = self.status.dirty_regions > 0 && self.is_healthy();
            if self.status.read_only || !(busy || dirty) || !self.tick() {
                return self.quiet();
            }
        }
        self.breaks("every request ends", format!("it never comes to rest: {:?}", self.status));
    }

    /// Nothing is under way.
    fn quiet(&mut self) {
        if let Some((tag, asked)) = self.asked.iter().next() {
            return self.breaks("every request ends", format!("{tag:?} never ended: {asked:?}"));
        }
        if self.status.behind > 0 {
            self.breaks("every request ends", "all is quiet, and writes are behind");
        }
        // A request's buffer is in use as long as the request is.
        if !self.copies.is_empty() {
            self.breaks("bounds", format!("all is quiet, and the mirror's own buffers {:?} are in use", self.copies.keys()));
        }
        self.copies_may_wait = false;
        if self.is_healthy() {
            let blocks: BTreeSet<u64> = self.disks.iter().flat_map(Disk::blocks).collect();
            match self.place {
                [Some(a), Some(b)] if self.disks[a].listed != self.disks[b].listed => {
                    let lists = format!("{:?} and {:?}", self.disks[a].listed, self.disks[b].listed);
                    self.breaks("bad blocks", format!("the legs list {lists}"));
                }
                [Some(a), Some(b)] => {
                    let blocks = BTreeSet::difference(&blocks, &self.disks[a].listed).copied().collect();
                    self.compare(a, b, &blocks);
                }
                _ => self.breaks("legs are identical", "a leg that counts is nowhere"),
            }
            if self.status.dirty_regions > 0 {
                self.breaks("bounds", "all is quiet, and regions stay dirty");
            }
            self.disks.iter_mut().for_each(|disk| disk.trouble.suspect = false);
        }
        if State::of(&self.status) != State::Resync {
            self.excused = self.status.read_only;
        }
    }

    /// Compares what two disks hold.
    pub(super) fn compare(&mut self, a: usize, b: usize, blocks: &BTreeSet<u64>) {
        let [a, b] = [&self.disks[a], &self.disks[b]];
        let first = |block| (a.read(block), 0);
        let second = |block| (b.read(block), 0);
        let legs = [legs::Leg { place: 0, holds: &first, lies: false }, legs::Leg { place: 1, holds: &second, lies: false }];
        let result = legs::identical(legs, blocks);
        self.check("legs are identical", result);
    }
}
