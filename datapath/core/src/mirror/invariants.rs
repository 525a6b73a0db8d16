//! The invariants that are listed at the head of `mod.rs`, as assertions.

use super::{Mirror, Purpose, State, writes};
use crate::{
    format::REGION_BLOCKS,
    units::{BlockRange, Slot},
};

impl Mirror {
    /// Asserts the invariants listed at the head of `mirror/mod.rs`.
    pub fn check_invariants(&self) {
        assert!(self.in_count() > 0, "invariant 1: no leg is IN");
        self.lock.check_invariants();
        for write in self.writes.values() {
            let issued = write.stage >= writes::Stage::Issued;
            assert!(!issued || self.bitmap.is_durable(write.range), "invariant 3: {write:?}");
        }
        let (writes, blocks) = self.behind();
        assert!(
            writes <= self.limits.behind_writes && blocks <= self.limits.behind_blocks,
            "invariant 8: {writes} writes, {blocks} blocks"
        );
        for (region, state) in self.bitmap.regions.iter().enumerate() {
            let range = BlockRange::new(region as u64 * REGION_BLOCKS, (region as u64 + 1) * REGION_BLOCKS);
            let writes = self.writes.values().filter(|write| write.stage > writes::Stage::Room && write.range.overlaps(range)).count();
            let copies = self.copies.values().filter(|copy| copy.holds_lock() && copy.range.overlaps(range)).count();
            assert_eq!(state.pending as usize, writes + copies, "invariant 4: region {region}");
        }
        self.check_room();
        for io in self.ios.values() {
            if let (Some((slot, leg)), Purpose::Read(_)) = (io.leg, io.purpose) {
                let now = &self.legs[slot.index()];
                assert!(now.id != leg || !matches!(now.state, State::Recovering(_)), "invariant 5");
            }
        }
        for slot in Slot::BOTH {
            let superblocks = self.ios.values().filter(|io| {
                io.purpose == Purpose::Superblock && io.leg.is_some_and(|(s, id)| s == slot && id == self.legs[slot.index()].id)
            });
            assert!(superblocks.count() <= 1, "invariant 7");
        }
    }
}
