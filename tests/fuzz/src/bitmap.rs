//! The decoders of bitmap pages and of the list of bad blocks.

use lockstep_core::{
    format::{self, BadBlockPage, BitmapPage, MAX_BAD_RUNS, PAGE_REGIONS, bad_blocks_offset, bitmap_offset},
    units::VolumeId,
};

use crate::input::{page, parts, seal};

const VOLUME: VolumeId = VolumeId([9; 16]);

/// Two slots of each, made of `data`, as they are or (by the first byte's bits) of the right volume and with a right checksum.
pub fn bitmap(data: &[u8]) {
    let (flags, said) = parts::<4>(data);
    let mut meta = vec![0; 65536 + 8192];
    let places = [bitmap_offset(0, 0), bitmap_offset(0, 1), bad_blocks_offset(0), bad_blocks_offset(1)];
    for (i, (beginning, at)) in said.into_iter().zip(places).enumerate() {
        let mut slot = page(beginning);
        if flags >> (i * 2) & 1 != 0 {
            slot[16..32].copy_from_slice(&VOLUME.0);
            slot[6..8].fill(0);
        }
        if flags >> (i * 2) & 2 != 0 {
            seal(&mut slot, 0);
        }
        meta[at as usize..][..4096].copy_from_slice(&slot);
    }
    if let Some(found) = format::bitmap_page(&meta, VOLUME, 0) {
        assert!(found.slot < 2 && found.sequence > 0 && found.bits.len() as u64 * 8 == PAGE_REGIONS);
        let again = format::encode_bitmap(VOLUME, found.sequence, &found.bits);
        meta[65536..65536 + 4096].copy_from_slice(again.as_slice());
        meta[65536 + 4096..].fill(0);
        assert_eq!(format::bitmap_page(&meta, VOLUME, 0), Some(BitmapPage { slot: 0, doubtful: false, ..found }));
    }
    // The size says where the last run may end.
    let blocks = 1 + data.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    for blocks in [blocks, u64::MAX] {
        let Some(found) = format::bad_blocks(&meta, VOLUME, blocks) else { continue };
        assert!(found.slot < 2 && found.runs.len() <= MAX_BAD_RUNS);
        assert!(found.runs.iter().all(|run| !run.is_empty() && run.end <= blocks));
        assert!(found.runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        if found.sequence > 0 {
            let again = format::encode_bad_blocks(VOLUME, found.sequence, &found.runs);
            let mut meta = vec![0xff; meta.len()];
            meta[bad_blocks_offset(1) as usize..][..4096].copy_from_slice(again.as_slice());
            assert_eq!(format::bad_blocks(&meta, VOLUME, blocks), Some(BadBlockPage { slot: 1, ..found }));
        }
    }
}
