//! What the disks and the witness hold, as small as it can be said.

use std::collections::HashMap;

use lockstep_core::{
    format::{self, META_LEN, REGION_BLOCKS, encode_bitmap},
    io::Page,
    units::{BlockRange, LegId, VolumeId},
};

/// Blocks that are ever written.
pub const BLOCKS: usize = 2;
/// The volume's name.
pub const VOLUME: VolumeId = VolumeId([9; 16]);
/// The legs' names, by slot.
pub const LEGS: [LegId; 2] = [LegId([1; 16]), LegId([2; 16])];
/// Pages of a leg's metadata.
pub const PAGES: usize = 6;
/// Their offsets in the `meta` of a volume of one bitmap page: two slots each of superblock, bad-block list, bitmap.
pub const META: [u64; PAGES] = [0, 4096, 32768, 36864, 65536, 69632];

/// A block's content: the number of the write that put it there; 0: never written, or zeroed.
pub type Token = u8;
/// Tokens are smaller.
pub const TOKENS: u8 = 8;
/// What one leg holds after an unclean stop and the other does not.
pub const BEFORE: Token = TOKENS - 1;
/// A set of tokens, one bit each.
pub type TokenSet = u8;
/// A page of metadata, by its number in `Pages`.
pub type PageId = u16;

/// The tokens of a set.
pub fn tokens(set: TokenSet) -> impl Iterator<Item = Token> + Clone {
    (0..TOKENS).filter(move |token| set & 1 << token != 0)
}

/// Every page of metadata that was ever seen, each once.
#[derive(Debug, Default)]
pub struct Pages {
    bytes: Vec<Page>,
    /// By their first bytes, which have a checksum: the numbers of those that begin so.
    ids: HashMap<[u8; TORN_AT], Vec<PageId>>,
}

/// A torn page keeps its first bytes; a bitmap's header ends here, and a superblock's checksum and sequence are before.
const TORN_AT: usize = 32;

impl Pages {
    /// The number of a page.
    pub fn id(&mut self, page: &Page) -> PageId {
        let mut beginning = [0; TORN_AT];
        beginning.copy_from_slice(&page[..TORN_AT]);
        let alike = self.ids.entry(beginning).or_default();
        if let Some(id) = alike.iter().find(|id| self.bytes[**id as usize] == *page) {
            return *id;
        }
        let id = PageId::try_from(self.bytes.len()).expect("fewer pages than numbers");
        self.bytes.push(page.clone());
        alike.push(id);
        id
    }

    fn id_of(&mut self, bytes: &[u8]) -> PageId {
        self.id(&Box::new(bytes.try_into().expect("a page")))
    }

    /// What is left when `new` was being written over `old`.
    pub fn torn(&mut self, new: PageId, old: PageId) -> PageId {
        let mut page = self.bytes[old as usize].clone();
        page[..TORN_AT].copy_from_slice(&self.bytes[new as usize][..TORN_AT]);
        self.id(&page)
    }

    /// The bytes of the two pages of a witness.
    pub fn witness(&self, slots: [PageId; 2]) -> Vec<u8> {
        slots.iter().flat_map(|id| self.bytes[*id as usize].iter().copied()).collect()
    }

    /// The slots of a witness that has nothing.
    pub fn no_witness(&mut self) -> [PageId; 2] {
        [self.id_of(&[0; 4096]); 2]
    }

    /// As much of a `meta` as is ever looked at.
    pub fn meta(&self, slots: [PageId; PAGES]) -> Vec<u8> {
        let mut bytes = vec![0; META[PAGES - 1] as usize + 4096];
        for (at, id) in META.into_iter().zip(slots) {
            bytes[at as usize..at as usize + 4096].copy_from_slice(self.bytes[id as usize].as_slice());
        }
        bytes
    }

    /// The two legs and the witness of a new volume.
    pub fn new_volume(&mut self, blocks: u64) -> ([LegImage; 2], [PageId; 2]) {
        let legs = LEGS.map(|leg| {
            let meta = format::new_leg(VOLUME, LEGS, leg, blocks);
            debug_assert_eq!(meta.len() as u64, META_LEN);
            LegImage { blocks: [0; BLOCKS], meta: META.map(|at| self.id_of(&meta[at as usize..at as usize + 4096])) }
        });
        let witness = format::new_witness(VOLUME, LEGS, blocks);
        (legs, [0, 4096].map(|at| self.id_of(&witness[at..at + 4096])))
    }

    /// Makes the legs of a new volume differ in every block, as an unclean stop may: the bits say so.
    pub fn not_equal(&mut self, legs: &mut [LegImage; 2], base: u64) {
        let regions = base / REGION_BLOCKS..(base + BLOCKS as u64).div_ceil(REGION_BLOCKS);
        let bits = encode_bitmap(VOLUME, 2, &[regions.fold(0, |bits, region| bits | 1 << region)]);
        let page = self.id(&bits);
        legs.iter_mut().for_each(|leg| leg.meta[PAGES - 1] = page);
        (legs[0].blocks, legs[1].blocks) =
            (std::array::from_fn(|block| BEFORE * (block as Token & 1)), std::array::from_fn(|block| BEFORE * (block as Token & 1 ^ 1)));
    }

    /// An empty leg that was made to be filled.
    pub fn spare(&mut self, leg: LegId, blocks: u64) -> LegImage {
        let meta = format::spare_leg(VOLUME, leg, blocks);
        LegImage { blocks: [0; BLOCKS], meta: META.map(|at| self.id_of(&meta[at as usize..at as usize + 4096])) }
    }
}

/// What a crash left of a leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LegImage {
    /// The content of each block.
    pub blocks: [Token; BLOCKS],
    /// The metadata, as in `META`.
    pub meta: [PageId; PAGES],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Block {
    /// What a read returns.
    now: Token,
    /// What a power cut may leave: what is durable, and whatever landed since.
    may: TokenSet,
    /// The same, once the flush in flight has ended: what it found, and whatever landed since. 0: none is in flight.
    flushing: TokenSet,
}

/// One leg's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Leg {
    blocks: [Block; BLOCKS],
    /// The metadata, which is durable when its write has ended.
    pub meta: [PageId; PAGES],
}

impl Leg {
    /// A leg after a start: all that it holds is durable.
    pub fn new(image: LegImage) -> Self {
        Self { blocks: image.blocks.map(|now| Block { now, may: 1 << now, flushing: 0 }), meta: image.meta }
    }

    /// What a read of a block returns.
    pub fn read(&self, block: usize) -> Token {
        self.blocks[block].now
    }

    /// What a read of each block returns.
    pub fn content(&self) -> [Token; BLOCKS] {
        self.blocks.map(|block| block.now)
    }

    /// What a power cut may leave of a block.
    pub fn may_leave(&self, block: usize) -> TokenSet {
        self.blocks[block].may
    }

    /// A write of a block lands.
    pub fn write(&mut self, block: usize, token: Token, fua: bool) {
        let block = &mut self.blocks[block];
        block.now = token;
        let keep = if fua { 0 } else { TokenSet::MAX };
        block.may = block.may & keep | 1 << token;
        if block.flushing != 0 {
            block.flushing = block.flushing & keep | 1 << token;
        }
    }

    /// A write of a block fails and is not seen; it may be there after a power cut all the same.
    pub fn write_failed(&mut self, block: usize, token: Token) {
        let block = &mut self.blocks[block];
        block.may |= 1 << token;
        if block.flushing != 0 {
            block.flushing |= 1 << token;
        }
    }

    /// A flush is issued: it covers what it finds. `false`: another one is in flight.
    pub fn flush_issued(&mut self) -> bool {
        let alone = self.blocks.iter().all(|block| block.flushing == 0);
        self.blocks.iter_mut().for_each(|block| block.flushing = 1 << block.now);
        alone
    }

    /// That flush ends.
    pub fn flush_ended(&mut self, ok: bool) {
        for block in &mut self.blocks {
            if ok {
                block.may = block.flushing;
            }
            block.flushing = 0;
        }
    }

    /// The first run of written blocks in a range of the disk whose first block is `base`.
    pub fn next_data(&self, range: BlockRange, base: u64) -> Option<BlockRange> {
        let written = |at: &u64| *at >= base && at - base < BLOCKS as u64 && self.read((at - base) as usize) != 0;
        let start = (range.start.max(base)..range.end.min(base + BLOCKS as u64)).find(written)?;
        let end = (start..range.end).find(|at| !written(at)).unwrap_or(range.end);
        Some(BlockRange::new(start, end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leg() -> Leg {
        Leg::new(LegImage { blocks: [0; BLOCKS], meta: [0; PAGES] })
    }

    fn may(leg: &Leg) -> Vec<Token> {
        tokens(leg.may_leave(0)).collect()
    }

    #[test]
    fn a_flush_makes_durable_what_it_found_and_not_what_landed_beside_it() {
        let mut leg = leg();
        leg.write(0, 1, false);
        leg.write(0, 2, false);
        assert_eq!(may(&leg), [0, 1, 2]);
        assert!(leg.flush_issued());
        assert!(!leg.flush_issued());
        leg.write(0, 3, false);
        leg.flush_ended(true);
        assert_eq!((may(&leg), leg.read(0)), (vec![2, 3], 3));
        leg.flush_issued();
        leg.flush_ended(false);
        assert_eq!(may(&leg), [2, 3]);
        leg.write(0, 4, true);
        assert_eq!(may(&leg), [4]);
    }

    #[test]
    fn a_failed_write_is_not_read_and_may_be_there_after_a_power_cut() {
        let mut leg = leg();
        leg.write_failed(0, 1);
        assert_eq!((may(&leg), leg.read(0)), (vec![0, 1], 0));
    }

    #[test]
    fn data_is_found_where_it_was_written_and_nowhere_else() {
        let mut leg = leg();
        leg.write(1, 5, false);
        assert_eq!(leg.next_data(BlockRange::new(0, 4097), 4095), Some(BlockRange::new(4096, 4097)));
        assert_eq!(leg.next_data(BlockRange::new(0, 4096), 4095), None);
    }
}
