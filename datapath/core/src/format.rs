//! What is on disk, format version 1. Little-endian throughout; every page carries a CRC32C of itself (its own field taken as
//! zero). Whatever is written in place has two slots, so that a torn write leaves the other one (mirror rule 20).
//!
//! *Version 1 is frozen.* The images in `tests/golden` open in every later version to the same values, and their pages are written as they were
//! read. What comes later is announced by a bit of a feature mask. To a version that does not know the bit it means:
//!
//! | Mask | An unknown bit |
//! |---|---|
//! | compat | Is kept. The volume is used as ever, and legs are made that have nothing of the feature; what the pages below do not name is written as zeroes. So a compat feature keeps what it has elsewhere, with a check of its own. |
//! | ro_compat | The volume may be read, not written. Assembly writes, so it is refused. |
//! | incompat | The volume is refused. |
//!
//! `meta` of a leg (1 MiB, real zeroes at birth, so that a metadata write is an overwrite):
//! ```text
//!        0  superblock, slot 0          4 KiB
//!     4096  superblock, slot 1          4 KiB
//!    32768  bad-block list, slot 0      4 KiB
//!    36864  bad-block list, slot 1      4 KiB
//!    65536  bitmap page 0, slot 0       4 KiB
//!    69632  bitmap page 0, slot 1       4 KiB
//!    73728  bitmap page 1, slot 0 ...
//! ```
//! The witness: the same record without a leg, slots at 0 and 4096.
//!
//! A superblock or witness page:
//! ```text
//!   0 magic[8]   8 version u32   12 crc u32   16 compat u32   20 ro_compat u32   24 incompat u32   28 zero u32
//!  32 sequence u64   40 volume[16]   56 leg[16] (witness: zero)   72 blocks u64   80 region_blocks u64   88 checkpoint u64   96 flags u64
//! 104 epoch u64   112 record id[16]   128 pin u8, zero[7]
//! 136 member A: leg[16] state u8 zero[7] seen epoch u64 seen id[16]     184 member B
//! ```
//! A bitmap page: `0 crc u32, 4 zero u32, 8 sequence u64, 16 volume[16]`, then one bit a region, lowest bit first. When a leg is attached the
//! sequence goes on from `epoch << 32` at least, so that it passes what that leg holds even where the page had gone bad and began anew.
//!
//! The bad-block list (mirror rule 22): `0 crc u32, 4 count u32, 8 sequence u64, 16 volume[16]`, then `count` runs of
//! `start block u64, blocks u64`, at most 254, then zeroes. Runs are not empty, rise, do not touch, and end within the volume; what does not
//! hold to that is as damaged as what has a wrong checksum. A slot that is all zeroes was never written: it is the empty list with sequence 0,
//! so that also the first list that is torn falls back. Where both slots are damaged the list is not known, which is not the same as empty:
//! an empty list would show as data what never was.

use alloc::{boxed::Box, vec, vec::Vec};
use core::fmt;

use crate::{
    io::Page,
    membership::{Member, MemberState, Record, RecordName},
    units::{BLOCK_SIZE, BlockRange, Epoch, LegId, RecordId, Slot, VolumeId},
};

/// Bytes in a leg's `meta` file, always.
pub const META_LEN: u64 = 1 << 20;
/// Bytes in a witness file, always.
pub const WITNESS_LEN: u64 = 8192;
/// Blocks in a region, the unit of the write-intent bitmap: 16 MiB.
pub const REGION_BLOCKS: u64 = (16 << 20) / BLOCK_SIZE;
/// Regions in one bitmap page.
pub const PAGE_REGIONS: u64 = (4096 - PAGE_HEADER as u64) * 8;
/// The largest volume that a `meta` has bitmap pages for.
pub const MAX_BLOCKS: u64 = (META_LEN - BITMAP_AT) / 8192 * PAGE_REGIONS * REGION_BLOCKS;
/// The most runs that a bad-block list holds.
pub const MAX_BAD_RUNS: usize = (4096 - PAGE_HEADER) / 16;
/// Incompatible feature, reserved: per-block checksums beside `data`.
pub const INCOMPAT_CHECKSUMS: u32 = 1;
/// Flag: an operator once forced this volume to be assembled.
pub const FLAG_FORCED: u64 = 1;

const VERSION: u32 = 1;
const SUPERBLOCK_MAGIC: [u8; 8] = *b"LOCKSTEP";
const WITNESS_MAGIC: [u8; 8] = *b"LOCKWITN";
const BAD_BLOCKS_AT: u64 = 32768;
const BITMAP_AT: u64 = 65536;
/// Of a page that is no superblock.
const PAGE_HEADER: usize = 32;
static CRC: crc::Crc<u32, crc::Table<16>> = crc::Crc::<u32, crc::Table<16>>::new(&crc::CRC_32_ISCSI);

/// How many regions a volume has.
pub const fn regions(blocks: u64) -> u64 {
    blocks.div_ceil(REGION_BLOCKS)
}

/// How many bitmap pages a volume has.
pub const fn bitmap_pages(blocks: u64) -> u64 {
    regions(blocks).div_ceil(PAGE_REGIONS)
}

/// Byte offset of a bitmap page's slot in `meta`.
pub const fn bitmap_offset(page: u64, slot: u8) -> u64 {
    BITMAP_AT + page * 8192 + slot as u64 * 4096
}

/// Byte offset of the bad-block list's slot in `meta`.
pub const fn bad_blocks_offset(slot: u8) -> u64 {
    BAD_BLOCKS_AT + slot as u64 * 4096
}

/// What a page that is written at an offset of `meta` is, for a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaPage {
    /// Membership, checkpoint, pin.
    Superblock,
    /// The bad-block list.
    BadBlocks,
    /// A page of the bitmap.
    Bitmap {
        /// Which.
        page: u64,
        /// How many of its regions are dirty.
        dirty: u32,
    },
}

impl MetaPage {
    /// Of the page with this content.
    pub fn of(offset: u64, content: &Page) -> Self {
        match offset {
            ..BAD_BLOCKS_AT => Self::Superblock,
            BAD_BLOCKS_AT..BITMAP_AT => Self::BadBlocks,
            _ => {
                let dirty = content[PAGE_HEADER..].iter().map(|byte| byte.count_ones()).sum();
                Self::Bitmap { page: (offset - BITMAP_AT) / 8192, dirty }
            }
        }
    }
}

/// What a superblock or witness page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Superblock {
    /// Counts the writes of this page; the newer valid slot counts.
    pub sequence: u64,
    /// The volume.
    pub volume: VolumeId,
    /// The leg that this page belongs to; zero in a witness.
    pub leg: LegId,
    /// Size of the volume.
    pub blocks: u64,
    /// A rebuild has copied and flushed everything below this block (mirror rule 23).
    pub checkpoint: u64,
    /// `FLAG_*`.
    pub flags: u64,
    /// Features that a version which does not know them need not know. Kept as found.
    pub compat: u32,
    /// Who counts.
    pub record: Record,
}

/// Why a `meta` cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaError {
    /// No superblock slot is valid.
    Damaged,
    /// Written by a newer Lockstep.
    TooNew,
}

impl fmt::Display for MetaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Damaged => "neither superblock slot is valid: the file is damaged or not a Lockstep leg",
            Self::TooNew => "it uses a feature that this version does not know: upgrade csi-node",
        })
    }
}

impl core::error::Error for MetaError {}

struct Writer<'a>(&'a mut [u8], usize);

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.0[self.1..self.1 + bytes.len()].copy_from_slice(bytes);
        self.1 += bytes.len();
    }
    fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }
    fn u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }
    fn name(&mut self, name: RecordName) {
        self.u64(name.epoch.0);
        self.put(&name.id.0);
    }
    fn byte(&mut self, value: u8) {
        self.put(&[value, 0, 0, 0, 0, 0, 0, 0]);
    }
}

struct Reader<'a>(&'a [u8], usize);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.0[self.1..self.1 + N]);
        self.1 += N;
        out
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
    fn name(&mut self) -> RecordName {
        RecordName { epoch: Epoch(self.u64()), id: RecordId(self.take()) }
    }
    fn byte(&mut self) -> u8 {
        self.take::<8>()[0]
    }
}

fn checksum(page: &[u8], at: usize) -> u32 {
    let mut digest = CRC.digest();
    digest.update(&page[..at]);
    digest.update(&[0; 4]);
    digest.update(&page[at + 4..4096]);
    digest.finalize()
}

fn encode(magic: [u8; 8], superblock: &Superblock) -> Page {
    let mut page = Box::new([0; 4096]);
    let mut w = Writer(page.as_mut_slice(), 0);
    w.put(&magic);
    w.u32(VERSION);
    w.u32(0); // the checksum comes last
    w.u32(superblock.compat);
    w.put(&[0; 12]); // ro_compat, incompat, zero
    w.u64(superblock.sequence);
    w.put(&superblock.volume.0);
    w.put(&superblock.leg.0);
    w.u64(superblock.blocks);
    w.u64(REGION_BLOCKS);
    w.u64(superblock.checkpoint);
    w.u64(superblock.flags);
    w.name(superblock.record.name);
    w.byte(superblock.record.pin.index() as u8);
    for member in &superblock.record.members {
        w.put(&member.leg.0);
        w.byte(member.state.code());
        w.name(member.seen);
    }
    let crc = checksum(page.as_slice(), 12);
    page[12..16].copy_from_slice(&crc.to_le_bytes());
    page
}

fn decode(magic: [u8; 8], page: &[u8]) -> Result<Superblock, MetaError> {
    let mut r = Reader(page, 0);
    if r.take() != magic {
        return Err(MetaError::Damaged);
    }
    let version = r.u32();
    if r.u32() != checksum(page, 12) {
        return Err(MetaError::Damaged);
    }
    let (compat, ro_compat, incompat, _) = (r.u32(), r.u32(), r.u32(), r.u32());
    if version != VERSION || incompat != 0 || ro_compat != 0 {
        return Err(MetaError::TooNew);
    }
    let (sequence, volume, leg) = (r.u64(), VolumeId(r.take()), LegId(r.take()));
    let (blocks, region_blocks, checkpoint, flags) = (r.u64(), r.u64(), r.u64(), r.u64());
    let name = r.name();
    let pin = match r.byte() {
        0 => Slot::A,
        1 => Slot::B,
        _ => return Err(MetaError::Damaged),
    };
    let mut member = || {
        let (leg, state) = (LegId(r.take()), MemberState::from_code(r.byte()).ok_or(MetaError::Damaged)?);
        Ok(Member { leg, state, seen: r.name() })
    };
    let members = [member()?, member()?];
    if blocks == 0 || blocks > MAX_BLOCKS || region_blocks != REGION_BLOCKS {
        return Err(MetaError::Damaged);
    }
    Ok(Superblock { sequence, volume, leg, blocks, checkpoint, flags, compat, record: Record { name, pin, members } })
}

/// The newer valid one of the two slots at the head of `bytes`, and which slot it was.
fn newest(magic: [u8; 8], bytes: &[u8]) -> Result<(Superblock, u8), MetaError> {
    let slot = |n: usize| bytes.get(n * 4096..(n + 1) * 4096).map_or(Err(MetaError::Damaged), |page| decode(magic, page));
    match (slot(0), slot(1)) {
        // A slot from the future is not an old slot gone bad: the file belongs to a newer version as a whole.
        (Err(MetaError::TooNew), _) | (_, Err(MetaError::TooNew)) => Err(MetaError::TooNew),
        (Ok(a), Ok(b)) => Ok(if b.sequence > a.sequence { (b, 1) } else { (a, 0) }),
        (Ok(a), Err(_)) => Ok((a, 0)),
        (Err(_), Ok(b)) => Ok((b, 1)),
        (Err(e), Err(_)) => Err(e),
    }
}

/// A leg's superblock page.
pub fn encode_superblock(superblock: &Superblock) -> Page {
    encode(SUPERBLOCK_MAGIC, superblock)
}

/// A witness page; the leg is left out.
pub fn encode_witness(superblock: &Superblock) -> Page {
    encode(WITNESS_MAGIC, &Superblock { leg: LegId([0; 16]), ..*superblock })
}

/// The newest superblock of a `meta`, and its slot.
pub fn superblock(meta: &[u8]) -> Result<(Superblock, u8), MetaError> {
    newest(SUPERBLOCK_MAGIC, meta)
}

/// The newest record of a witness file, and its slot.
pub fn witness(bytes: &[u8]) -> Result<(Superblock, u8), MetaError> {
    newest(WITNESS_MAGIC, bytes)
}

/// Whether the slot beside the newest one of a witness file is damaged, so that it may have been the newest. A slot that was never written is not.
pub fn witness_is_doubtful(bytes: &[u8]) -> bool {
    let valid = |page: &[u8]| decode(WITNESS_MAGIC, page).is_ok();
    bytes.chunks_exact(4096).take(2).any(|page| !valid(page) && !is_blank(page))
}

fn is_blank(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

/// A page that is no superblock: `crc u32, count u32, sequence u64, volume[16]`, then what `body` puts.
fn encode_page(volume: VolumeId, sequence: u64, count: u32, body: impl FnOnce(&mut Writer<'_>)) -> Page {
    let mut page = Box::new([0; 4096]);
    let mut w = Writer(page.as_mut_slice(), 4);
    w.u32(count);
    w.u64(sequence);
    w.put(&volume.0);
    body(&mut w);
    let crc = checksum(page.as_slice(), 0);
    page[..4].copy_from_slice(&crc.to_le_bytes());
    page
}

/// Its count and sequence, and what follows them. `None`: it is damaged, or of another volume, or was never written.
fn decode_page(page: &[u8], volume: VolumeId) -> Option<(u32, u64, Reader<'_>)> {
    let mut r = Reader(page, 0);
    let (crc, count, sequence, id) = (r.u32(), r.u32(), r.u64(), VolumeId(r.take()));
    (crc == checksum(page, 0) && id == volume && sequence > 0).then_some((count, sequence, r))
}

/// The page with these bits (at most `PAGE_REGIONS / 8` bytes).
pub fn encode_bitmap(volume: VolumeId, sequence: u64, bits: &[u8]) -> Page {
    encode_page(volume, sequence, 0, |w| w.put(bits))
}

/// One valid bitmap page as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapPage {
    /// Its sequence number.
    pub sequence: u64,
    /// Which slot it was in.
    pub slot: u8,
    /// The other slot is damaged, so that it may have been the newest.
    pub doubtful: bool,
    /// Its bits.
    pub bits: Vec<u8>,
}

/// The newer valid slot of a bitmap page; `None`: neither is valid, so everything in it is dirty (mirror rule 19).
pub fn bitmap_page(meta: &[u8], volume: VolumeId, page: u64) -> Option<BitmapPage> {
    let bytes = |n: u8| {
        let at = usize::try_from(bitmap_offset(page, n)).ok()?;
        meta.get(at..at + 4096)
    };
    let slot = |n: u8| {
        let bytes = bytes(n)?;
        let (_, sequence, rest) = decode_page(bytes, volume)?;
        Some(BitmapPage { sequence, slot: n, doubtful: false, bits: bytes[rest.1..].to_vec() })
    };
    match (slot(0), slot(1)) {
        (Some(a), Some(b)) => Some(if b.sequence > a.sequence { b } else { a }),
        (Some(page), None) | (None, Some(page)) => {
            let doubtful = bytes(1 - page.slot).is_some_and(|other| !is_blank(other));
            Some(BitmapPage { doubtful, ..page })
        }
        (None, None) => None,
    }
}

/// The page with this bad-block list: `runs` as the head of this file says, at most `MAX_BAD_RUNS`.
pub fn encode_bad_blocks(volume: VolumeId, sequence: u64, runs: &[BlockRange]) -> Page {
    debug_assert!(runs.len() <= MAX_BAD_RUNS && sequence > 0);
    encode_page(volume, sequence, runs.len() as u32, |w| {
        for run in runs {
            w.u64(run.start);
            w.u64(run.len());
        }
    })
}

/// A bad-block list as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadBlockPage {
    /// Its sequence number; 0: no list was ever written.
    pub sequence: u64,
    /// Which slot it was in.
    pub slot: u8,
    /// The blocks that no copy holds valid data of: they rise and do not touch.
    pub runs: Vec<BlockRange>,
}

/// The newer valid slot of the bad-block list of a volume of `blocks` blocks; `None`: both are damaged, so it is not known.
pub fn bad_blocks(meta: &[u8], volume: VolumeId, blocks: u64) -> Option<BadBlockPage> {
    let slot = |n: u8| {
        let at = usize::try_from(bad_blocks_offset(n)).ok()?;
        let bytes = meta.get(at..at + 4096)?;
        if is_blank(bytes) {
            return Some(BadBlockPage { sequence: 0, slot: n, runs: Vec::new() });
        }
        let (sequence, runs) = decode_bad_blocks(bytes, volume, blocks)?;
        Some(BadBlockPage { sequence, slot: n, runs })
    };
    match (slot(0), slot(1)) {
        (Some(a), Some(b)) => Some(if b.sequence > a.sequence { b } else { a }),
        (a, b) => a.or(b),
    }
}

fn decode_bad_blocks(page: &[u8], volume: VolumeId, blocks: u64) -> Option<(u64, Vec<BlockRange>)> {
    let (count, sequence, mut r) = decode_page(page, volume)?;
    let count = count as usize;
    if count > MAX_BAD_RUNS {
        return None;
    }
    let mut runs: Vec<BlockRange> = Vec::with_capacity(count);
    for _ in 0..count {
        let (start, len) = (r.u64(), r.u64());
        let run = BlockRange::new(start, start.checked_add(len)?);
        let apart = runs.last().is_none_or(|last| last.end < run.start);
        if run.is_empty() || run.end > blocks || !apart {
            return None;
        }
        runs.push(run);
    }
    page[r.1..4096].iter().all(|byte| *byte == 0).then_some((sequence, runs))
}

fn meta(superblock: &Superblock) -> Vec<u8> {
    let mut bytes = vec![0; META_LEN as usize];
    bytes[..4096].copy_from_slice(encode_superblock(superblock).as_slice());
    for page in 0..bitmap_pages(superblock.blocks) {
        let at = bitmap_offset(page, 0) as usize;
        bytes[at..at + 4096].copy_from_slice(encode_bitmap(superblock.volume, 1, &[]).as_slice());
    }
    bytes
}

fn first(volume: VolumeId, legs: [LegId; 2], leg: LegId, blocks: u64) -> Superblock {
    // The first record is a function of the volume: making a leg twice gives the same one.
    let record = Record::first(legs, RecordId(volume.0));
    Superblock { sequence: 1, volume, leg, blocks, checkpoint: 0, flags: 0, compat: 0, record }
}

/// The `meta` bytes of one leg of a new volume whose two legs are `legs` (both read as zeroes).
pub fn new_leg(volume: VolumeId, legs: [LegId; 2], which: LegId, blocks: u64) -> Vec<u8> {
    meta(&first(volume, legs, which, blocks))
}

/// The witness bytes of that new volume.
pub fn new_witness(volume: VolumeId, legs: [LegId; 2], blocks: u64) -> Vec<u8> {
    let mut bytes = vec![0; WITNESS_LEN as usize];
    bytes[..4096].copy_from_slice(encode_witness(&first(volume, legs, legs[0], blocks)).as_slice());
    bytes
}

/// The `meta` bytes of an empty leg that is to be attached with `Fill::Everything`. It names itself alone and counts for nothing.
pub fn spare_leg(volume: VolumeId, leg: LegId, blocks: u64) -> Vec<u8> {
    let member = |leg| Member { leg, state: MemberState::OutUnfilled, seen: RecordName::NONE };
    let record = Record { name: RecordName::NONE, pin: Slot::A, members: [member(leg), member(LegId([0; 16]))] };
    meta(&Superblock { sequence: 1, volume, leg, blocks, checkpoint: 0, flags: 0, compat: 0, record })
}

/// Who a leg says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its volume.
    pub volume: VolumeId,
    /// Its id.
    pub leg: LegId,
    /// The volume's size.
    pub blocks: u64,
    /// Its newest record's epoch; 0 for a spare.
    pub epoch: Epoch,
    /// Which slot its newest superblock is in.
    pub newest: u8,
    /// An operator once forced this volume to be assembled.
    pub forced: bool,
}

/// Reads who a leg is.
pub fn peek(meta: &[u8]) -> Result<Summary, MetaError> {
    let (sb, newest) = superblock(meta)?;
    let forced = sb.flags & FLAG_FORCED != 0;
    Ok(Summary { volume: sb.volume, leg: sb.leg, blocks: sb.blocks, epoch: sb.record.name.epoch, newest, forced })
}

#[cfg(test)]
mod tests;
