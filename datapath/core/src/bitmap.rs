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
    /// The bit is durably set on every counted leg; data may be issued.
    pub durable: bool,
    /// Writes of this region that are not released yet.
    pub pending: u32,
    /// Counts the writes of this region, so that a clean pass sees that one came in between.
    pub writes: u64,
    /// `writes` at the last clean pass.
    pub seen: u64,
    /// The legs may differ here: reads are pinned until it is resynced (mirror rules 14 and 21).
    pub unsynced: bool,
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
}

/// The regions that a range touches.
pub fn regions_of(range: BlockRange) -> core::ops::Range<usize> {
    (range.start / REGION_BLOCKS) as usize..range.end.div_ceil(REGION_BLOCKS) as usize
}

/// The blocks of a region.
pub fn blocks_of(region: usize, blocks: u64) -> BlockRange {
    let start = region as u64 * REGION_BLOCKS;
    BlockRange::new(start, (start + REGION_BLOCKS).min(blocks))
}

impl Bitmap {
    /// The bitmap of a volume of `blocks` blocks, all clean.
    pub fn new(blocks: u64) -> Self {
        let mut bitmap = Self { regions: Vec::new(), pages: Vec::new(), maybe_unsynced: true };
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
                self.regions[region].set = true;
                self.pages[Self::page_of(region)].changed = true;
            }
            ready &= self.regions[region].durable;
        }
        ready
    }

    /// Whether the bits of a range are durably set on every counted leg.
    pub fn is_durable(&self, range: BlockRange) -> bool {
        self.regions[regions_of(range)].iter().all(|region| region.durable)
    }

    /// A write holds the regions of its range until it is released.
    pub fn hold(&mut self, range: BlockRange) {
        for region in &mut self.regions[regions_of(range)] {
            region.pending += 1;
            region.writes += 1;
        }
    }

    /// The counterpart of `hold`.
    pub fn unhold(&mut self, range: BlockRange) {
        for region in &mut self.regions[regions_of(range)] {
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
        self.regions[region].set = false;
        self.regions[region].durable = false;
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

    /// The write in flight is durable on every counted leg.
    pub fn landed(&mut self, page: usize) {
        let Some(bits) = self.pages[page].in_flight.take() else { return };
        let first = page * PAGE_REGIONS as usize;
        for (i, region) in self.regions[first..].iter_mut().enumerate().take(bits.len() * 8) {
            region.durable = region.set && bits[i / 8] & (1 << (i % 8)) != 0;
        }
    }

    /// Sets from a page as it was found; `None`: all of it.
    pub fn join(&mut self, page: usize, bits: Option<&[u8]>) {
        let first = page * PAGE_REGIONS as usize;
        for (i, region) in self.regions[first..].iter_mut().enumerate().take(PAGE_REGIONS as usize) {
            let set = bits.is_none_or(|bits| bits.get(i / 8).is_some_and(|byte| byte & (1 << (i % 8)) != 0));
            region.set |= set;
        }
    }

    /// How many bits are wanted set.
    pub fn dirty(&self) -> u64 {
        self.regions.iter().filter(|region| region.set).count() as u64
    }
}

#[cfg(test)]
mod tests;
