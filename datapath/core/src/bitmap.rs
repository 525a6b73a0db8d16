//! The write-intent bitmap (mirror rules 17, 18, 19).
//!
//! A region's bit is SET durably on every counted leg before data of the region is issued, and cleared only when the legs are known equal and durable there.
//! ```text
//!   Clean --want--> (set, not durable) --page durable--> Dirty --clean pass: both flushed--> Clearing --page durable--> Clean
//!                          ^                                                                   |
//!                          +------------------------ want (waits for the clear) ---------------+
//! ```
//! One write of a page is in flight at a time; what changes meanwhile goes with the next one, so that sets are committed in groups.

use alloc::{vec, vec::Vec};

use crate::{
    format::{PAGE_REGIONS, REGION_BLOCKS, bitmap_pages, regions},
    page::Page,
    units::BlockRange,
};

/// What is known of one region.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Region {
    /// What the next page write says.
    pub set: bool,
    /// Some leg's page may say that it is dirty.
    pub on_disk: bool,
    /// The bit is durably set on every counted leg; data may be issued.
    pub durable: bool,
    /// Writes of this region that are not released yet.
    pub pending: u32,
    /// Counts the writes of this region, so that a clean pass sees that one came in between.
    pub writes: u64,
    /// `writes` at the last clean pass.
    pub seen: u64,
    /// When it was written last, in the order of `Bitmap::clock`.
    pub stamp: u64,
    /// The legs may differ here: reads are pinned until it is resynced (mirror rules 14 and 21).
    pub unsynced: bool,
    /// Unsynced, and a resync found a block here that no leg can read. It is not counted: nothing but a write there can clean it.
    pub stuck: bool,
    /// It is being cleaned to make room: nothing new is written here until that is over.
    pub closing: bool,
}

impl Region {
    /// Whether it counts as dirty for the cap (mirror rule 17).
    const fn counts(&self) -> bool {
        (self.set || self.on_disk) && !self.stuck
    }
}

/// The bitmap of one mirror.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bitmap {
    /// By number.
    pub regions: Vec<Region>,
    /// By number, each with the bits that its write in flight brings.
    pub pages: Vec<Page<Vec<u8>>>,
    /// `false`: no region is unsynced. Spares every event a look at every region.
    pub maybe_unsynced: bool,
    /// How many regions count as dirty.
    counted: u64,
    clock: u64,
}

/// The regions that a range touches.
pub fn regions_of(range: BlockRange) -> core::ops::Range<usize> {
    (range.start / REGION_BLOCKS) as usize..range.end.div_ceil(REGION_BLOCKS) as usize
}

/// A range, region by region.
pub fn parts(range: BlockRange) -> impl Iterator<Item = BlockRange> {
    regions_of(range).map(move |region| blocks_of(region, u64::MAX).intersection(range))
}

/// The blocks of a region.
pub fn blocks_of(region: usize, blocks: u64) -> BlockRange {
    let start = region as u64 * REGION_BLOCKS;
    BlockRange::new(start, (start + REGION_BLOCKS).min(blocks))
}

impl Bitmap {
    /// The bitmap of a volume of `blocks` blocks, all clean.
    pub fn new(blocks: u64) -> Self {
        let mut bitmap = Self { regions: Vec::new(), pages: Vec::new(), maybe_unsynced: true, counted: 0, clock: 0 };
        bitmap.extend(blocks);
        bitmap
    }

    /// Makes room for a larger volume. New pages must be written before the size is published.
    pub fn extend(&mut self, blocks: u64) {
        self.regions.resize(regions(blocks) as usize, Region::default());
        while (self.pages.len() as u64) < bitmap_pages(blocks) {
            self.pages.push(Page { changed: true, ..Page::default() });
        }
    }

    /// The page that holds a region's bit.
    pub fn page_of(region: usize) -> usize {
        region / PAGE_REGIONS as usize
    }

    /// Wants the bits of a range set. `true`: they are, durably.
    pub fn want(&mut self, range: BlockRange) -> bool {
        let mut ready = true;
        for region in regions_of(range) {
            if !self.regions[region].set {
                self.change(region, |region| region.set = true);
                self.pages[Self::page_of(region)].changed = true;
            }
            ready &= self.regions[region].durable;
        }
        ready
    }

    /// Changes a region, and the count with it.
    fn change(&mut self, region: usize, change: impl FnOnce(&mut Region)) {
        let region = &mut self.regions[region];
        let before = u64::from(region.counts());
        change(region);
        self.counted = self.counted + u64::from(region.counts()) - before;
    }

    /// How many regions count as dirty: their bit is set, or may still be on a disk.
    pub fn counted(&self) -> u64 {
        self.counted
    }

    /// How many regions of a range would be dirty anew, and how many count already.
    pub fn counts_of(&self, range: BlockRange) -> (u64, u64) {
        let regions = &self.regions[regions_of(range)];
        let new = regions.iter().filter(|region| !region.set && !region.on_disk).count() as u64;
        (new, regions.iter().filter(|region| region.counts()).count() as u64)
    }

    /// Whether the clear of a region of this range is on its way to the disks: a bit that is wanted again makes it dirty again.
    pub fn clearing(&self, range: BlockRange) -> bool {
        self.regions[regions_of(range)].iter().any(|region| !region.set && region.on_disk)
    }

    /// Whether a region of this range is being cleaned to make room.
    pub fn closing(&self, range: BlockRange) -> bool {
        self.regions[regions_of(range)].iter().any(|region| region.closing)
    }

    /// The legs are equal in this region.
    pub fn synced(&mut self, region: usize) {
        self.change(region, |region| (region.unsynced, region.stuck) = (false, false));
    }

    /// There is nothing to differ from anywhere.
    pub fn all_synced(&mut self) {
        (0..self.regions.len()).for_each(|region| self.synced(region));
    }

    /// No leg can read a block of this region.
    pub fn cannot_be_synced(&mut self, region: usize) {
        self.change(region, |region| region.stuck = region.unsynced);
    }

    /// Whether the bits of a range are durably set on every counted leg.
    pub fn is_durable(&self, range: BlockRange) -> bool {
        self.regions[regions_of(range)].iter().all(|region| region.durable)
    }

    /// A write holds the regions of its range from the moment that it goes into the range lock until it is released.
    pub fn hold(&mut self, range: BlockRange) {
        self.clock += 1;
        for region in &mut self.regions[regions_of(range)] {
            region.stamp = self.clock;
            region.pending += 1;
            region.writes += 1;
        }
    }

    /// The counterpart of `hold`.
    pub fn unhold(&mut self, range: BlockRange) {
        self.clock += 1;
        for region in &mut self.regions[regions_of(range)] {
            region.stamp = self.clock;
            region.pending -= 1;
            region.writes += 1;
        }
    }

    /// Whether the legs may differ somewhere in a range.
    pub fn unsynced(&self, range: BlockRange) -> bool {
        self.regions[regions_of(range)].iter().any(|region| region.unsynced)
    }

    /// Takes a region's bit away with the next page write. From here on it counts as not durable: the clear may land at any time.
    pub fn clear(&mut self, region: usize) {
        self.change(region, |region| (region.set, region.durable) = (false, false));
        self.pages[Self::page_of(region)].changed = true;
    }

    /// The bits of a page as they are wanted.
    pub fn bits(&self, page: usize) -> Vec<u8> {
        let first = page * PAGE_REGIONS as usize;
        let last = (first + PAGE_REGIONS as usize).min(self.regions.len());
        let mut bits = vec![0; (last - first).div_ceil(8)];
        for (i, region) in self.regions[first..last].iter().enumerate() {
            if region.set {
                bits[i / 8] |= 1 << (i % 8);
            }
        }
        bits
    }

    /// A page is written as it is wanted now.
    pub fn issued(&mut self, page: usize) -> Vec<u8> {
        let bits = self.bits(page);
        let first = page * PAGE_REGIONS as usize;
        for region in self.regions[first..].iter_mut().take(PAGE_REGIONS as usize) {
            region.on_disk |= region.set;
        }
        self.pages[page].issued(bits.clone());
        bits
    }

    /// The write in flight is durable on every counted leg.
    pub fn landed(&mut self, page: usize) {
        let Some(bits) = self.pages[page].in_flight.take() else { return };
        let first = page * PAGE_REGIONS as usize;
        for region in first..(first + bits.len() * 8).min(self.regions.len()) {
            let bit = bits[(region - first) / 8] & (1 << ((region - first) % 8)) != 0;
            self.change(region, |region| (region.durable, region.on_disk) = (region.set && bit, bit));
        }
    }

    /// Sets from a page as it was found; `None`: all of it.
    pub fn join(&mut self, page: usize, bits: Option<&[u8]>) {
        let first = page * PAGE_REGIONS as usize;
        for i in 0..(self.regions.len() - first).min(PAGE_REGIONS as usize) {
            let set = bits.is_none_or(|bits| bits.get(i / 8).is_some_and(|byte| byte & (1 << (i % 8)) != 0));
            self.change(first + i, |region| region.set |= set);
        }
    }

    /// How many bits are wanted set.
    pub fn dirty(&self) -> u64 {
        self.regions.iter().filter(|region| region.set).count() as u64
    }
}

#[cfg(test)]
mod tests;
