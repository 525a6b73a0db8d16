//! One simulated disk: a cache that may land in any order, what survives a power cut, one leg's metadata, and what is wrong with it.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_core::{
    format::{self, Superblock},
    membership::Record,
    units::{BlockRange, LegId},
};

use super::VOLUME;
use crate::world::Rng;

/// Bytes of `meta` that are simulated: the superblocks and the first bitmap page.
pub(super) const META: usize = 65536 + 8192;
pub(super) const BITMAP_AT: u64 = 65536;
pub(super) const LIST_AT: u64 = 32768;
/// A torn page comes through in pieces smaller than a record, so that the whole guarantee is the checksum's.
const PIECE: usize = 32;

/// What one block went through: values with the number of the write that brought them.
#[derive(Clone, Debug, Default)]
struct Cell {
    durable: (u64, u64),
    /// Newest last; each of them may be what a power cut leaves.
    cache: Vec<(u64, u64)>,
}

/// What is wrong with a disk now.
#[derive(Clone, Debug, Default)]
pub(super) struct Trouble {
    /// It is gone: everything fails.
    pub gone: bool,
    /// So many of the next operations fail, having done a part.
    pub errors: u8,
    /// The same for operations of one kind.
    pub flush_errors: u8,
    pub meta_errors: u8,
    /// So many of the next operations end with a host fault.
    pub host_faults: u8,
    /// So many of the next writes find no space.
    pub no_space: u8,
    /// Reads here fail until it is written.
    pub unreadable: BTreeSet<u64>,
    /// Writes here fail.
    pub unwritable: BTreeSet<u64>,
    /// Flushes do nothing. The next power cut leaves it blank.
    pub lies: bool,
    /// Nothing ends until it thaws.
    pub frozen: bool,
    /// Something failed, and what the mirror makes of it is not seen yet.
    pub suspect: bool,
}

impl Trouble {
    pub(super) fn is_sound(&self) -> bool {
        let failing = self.errors > 0 || self.flush_errors > 0 || self.meta_errors > 0 || self.host_faults > 0 || self.no_space > 0;
        let bad = !self.unreadable.is_empty() || !self.unwritable.is_empty();
        !(self.gone || failing || bad || self.lies || self.frozen || self.suspect)
    }
}

/// One disk.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    cells: BTreeMap<u64, Cell>,
    next: u64,
    /// Writes before this one no flush makes durable: one that failed has given them up, as the kernel does. A read finds them all the same.
    given_up: u64,
    /// The leg's metadata; all zeroes: a blank disk.
    meta: Vec<u8>,
    /// What `meta` says.
    superblock: Option<Superblock>,
    /// Counts the legs that were made here: what is still under way to an older one touches nothing.
    pub generation: u64,
    pub trouble: Trouble,
    /// The newest bitmap page's dirty regions.
    pub dirty: BTreeSet<u64>,
    /// The newest list of bad blocks.
    pub listed: BTreeSet<u64>,
}

impl Disk {
    pub(super) fn new(mut meta: Vec<u8>) -> Self {
        meta.resize(META, 0);
        let mut disk = Self {
            cells: BTreeMap::new(),
            next: 1,
            given_up: 0,
            meta,
            superblock: None,
            generation: 0,
            trouble: Trouble::default(),
            dirty: BTreeSet::new(),
            listed: BTreeSet::new(),
        };
        [0, LIST_AT, BITMAP_AT].into_iter().for_each(|at| disk.read_meta(at));
        disk
    }

    /// A new leg, or nothing, in place of what was here.
    pub(super) fn replace(&mut self, meta: Vec<u8>) {
        *self = Self { generation: self.generation + 1, ..Self::new(meta) };
    }

    pub(super) fn leg(&self) -> Option<LegId> {
        self.superblock.map(|superblock| superblock.leg)
    }

    /// The newest record that it holds.
    pub(super) fn record(&self) -> Option<Record> {
        self.superblock.map(|superblock| superblock.record)
    }

    pub(super) fn meta(&self) -> &[u8] {
        &self.meta
    }

    pub(super) fn read(&self, block: u64) -> u64 {
        self.cells.get(&block).map_or(0, |cell| cell.cache.last().unwrap_or(&cell.durable).1)
    }

    /// What a power cut would leave if nothing of the cache came through.
    pub(super) fn durable(&self, block: u64) -> u64 {
        self.cells.get(&block).map_or(0, |cell| cell.durable.1)
    }

    pub(super) fn write(&mut self, block: u64, value: u64, fua: bool) {
        self.trouble.unreadable.remove(&block);
        if value == 0 && !self.cells.contains_key(&block) {
            return; // it never held anything else
        }
        let cell = self.cells.entry(block).or_default();
        if fua {
            cell.durable = (self.next, value);
            cell.cache.clear();
        } else {
            cell.cache.push((self.next, value));
        }
        self.next += 1;
    }

    /// Names what a flush that is asked for now must cover.
    pub(super) fn flush_mark(&self) -> u64 {
        self.next
    }

    pub(super) fn flush(&mut self, mark: u64) {
        for cell in self.cells.values_mut() {
            if let Some(newest) = cell.cache.iter().rev().find(|(n, _)| (self.given_up..mark).contains(n)).copied() {
                cell.durable = newest;
                cell.cache.retain(|(n, _)| *n >= mark);
            }
        }
    }

    /// What a flush that fails was to cover, no later one does.
    pub(super) fn flush_failed(&mut self, mark: u64) {
        self.given_up = self.given_up.max(mark);
    }

    /// A process that is new knows of no flush that failed: it writes again what it finds.
    pub(super) fn opened(&mut self) {
        self.given_up = 0;
    }

    pub(super) fn power_cut(&mut self, rng: &mut Rng) {
        let keep = rng.below(4);
        for cell in self.cells.values_mut() {
            let n = match keep {
                0 => 0,
                1 => cell.cache.len(),
                _ => rng.below(cell.cache.len() as u64 + 1) as usize,
            };
            if n > 0 {
                cell.durable = cell.cache[n - 1];
            }
            cell.cache.clear();
        }
    }

    /// The first run of written blocks. What was zeroed is a hole again: that is what ZERO_RANGE makes of it.
    pub(super) fn next_data(&self, range: BlockRange) -> Option<BlockRange> {
        let mut written = self.cells.range(range.start..range.end).map(|(block, _)| *block).filter(|block| self.read(*block) != 0);
        let start = written.next()?;
        let mut end = start + 1;
        for block in written {
            if block != end {
                break;
            }
            end += 1;
        }
        Some(BlockRange::new(start, end))
    }

    /// Blocks that were ever written.
    pub(super) fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.cells.keys().copied()
    }

    /// Whether something in the range waits in the cache, but for what is listed as bad: nobody reads that before it is written again.
    pub(super) fn is_cached(&self, range: BlockRange) -> bool {
        self.cells.range(range.start..range.end).any(|(block, cell)| !cell.cache.is_empty() && !self.listed.contains(block))
    }

    pub(super) fn write_meta(&mut self, offset: u64, page: &[u8]) {
        self.meta[offset as usize..offset as usize + page.len()].copy_from_slice(page);
        self.read_meta(offset);
    }

    /// Both slots of the page that begins here go bad.
    pub(super) fn damage(&mut self, offset: u64) {
        self.meta[offset as usize..offset as usize + 8192].fill(0x5a);
        self.read_meta(offset);
    }

    pub(super) fn tear_meta(&mut self, rng: &mut Rng, offset: u64, page: &[u8]) {
        tear(rng, &mut self.meta, offset, page);
        self.read_meta(offset);
    }

    /// Checksums cost more than all else that a run does, so what `meta` says is looked up only when it changes, where it changes.
    fn read_meta(&mut self, offset: u64) {
        if offset < LIST_AT {
            self.superblock = format::superblock(&self.meta).ok().map(|(superblock, _)| superblock);
        } else if offset < BITMAP_AT {
            let runs = format::bad_blocks(&self.meta, VOLUME, u64::MAX).map_or_else(Vec::new, |page| page.runs);
            self.listed = runs.iter().flat_map(|run| run.start..run.end).collect();
        } else {
            let bits = format::bitmap_page(&self.meta, VOLUME, 0).map_or_else(Vec::new, |page| page.bits);
            let bytes = bits.iter().enumerate().filter(|(_, byte)| **byte != 0);
            let set = bytes.flat_map(|(i, byte)| (0..8).filter(move |bit| byte & (1 << bit) != 0).map(move |bit| i as u64 * 8 + bit));
            self.dirty = set.collect();
        }
    }
}

/// The witness's file.
#[derive(Clone, Debug)]
pub(super) struct Witness {
    bytes: Vec<u8>,
    record: Option<Record>,
    /// A slot is damaged, and may have been the newest.
    pub doubtful: bool,
}

impl Witness {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        let mut witness = Self { bytes, record: None, doubtful: false };
        witness.look();
        witness
    }

    fn look(&mut self) {
        self.doubtful = format::witness_is_doubtful(&self.bytes);
        self.record = format::witness(&self.bytes).ok().map(|(superblock, _)| superblock.record);
    }

    /// What it says, if it says anything.
    pub(super) fn record(&self) -> Option<Record> {
        self.record
    }

    /// `None`: it is lost.
    pub(super) fn bytes(&self) -> Option<&[u8]> {
        self.bytes.iter().any(|byte| *byte != 0).then_some(self.bytes.as_slice())
    }

    pub(super) fn write(&mut self, offset: u64, page: &[u8]) {
        self.bytes[offset as usize..offset as usize + page.len()].copy_from_slice(page);
        self.look();
    }

    pub(super) fn tear(&mut self, rng: &mut Rng, offset: u64, page: &[u8]) {
        tear(rng, &mut self.bytes, offset, page);
        self.look();
    }

    pub(super) fn lose(&mut self) {
        self.bytes.fill(0);
        self.look();
    }
}

/// Any part of the page may have come through.
fn tear(rng: &mut Rng, file: &mut [u8], offset: u64, page: &[u8]) {
    let keep = rng.below(4);
    for at in (0..page.len()).step_by(PIECE) {
        if keep == 0 || keep > 1 && rng.once_in(2) {
            file[offset as usize + at..][..PIECE].copy_from_slice(&page[at..at + PIECE]);
        }
    }
}
