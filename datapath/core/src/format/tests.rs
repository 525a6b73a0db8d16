use super::*;

const VOLUME: VolumeId = VolumeId([7; 16]);
const LEGS: [LegId; 2] = [LegId([1; 16]), LegId([2; 16])];

#[test]
fn a_superblock_comes_back_as_it_was_written() {
    let sb = first(VOLUME, LEGS, LEGS[1], 1234);
    assert_eq!(decode(SUPERBLOCK_MAGIC, encode_superblock(&sb).as_slice()), Ok(sb));
}

#[test]
fn every_flipped_byte_of_a_superblock_slot_falls_back_to_the_other_slot() {
    let old = first(VOLUME, LEGS, LEGS[0], 1234);
    let new = Superblock { sequence: 2, blocks: 2000, ..old };
    let mut meta = vec![0; 8192];
    meta[..4096].copy_from_slice(encode_superblock(&old).as_slice());
    meta[4096..].copy_from_slice(encode_superblock(&new).as_slice());
    assert_eq!(superblock(&meta).unwrap(), (new, 1));
    for byte in 4096..8192 {
        meta[byte] ^= 0x40;
        assert_eq!(superblock(&meta).unwrap(), (old, 0), "byte {byte}");
        meta[byte] ^= 0x40;
    }
}

#[test]
fn every_flipped_byte_of_both_bitmap_slots_makes_the_page_invalid() {
    let mut bytes = meta(&first(VOLUME, LEGS, LEGS[0], 1234));
    let page = bitmap_page(&bytes, VOLUME, 0).unwrap();
    assert_eq!((page.sequence, page.slot), (1, 0));
    for byte in 65536..65536 + 4096 {
        bytes[byte] ^= 1;
        assert_eq!(bitmap_page(&bytes, VOLUME, 0), None, "byte {byte}");
        bytes[byte] ^= 1;
    }
}

const RUNS: [BlockRange; 3] = [BlockRange::new(0, 1), BlockRange::new(7, 9), BlockRange::new(1230, 1234)];

fn bad(page: &[u8], slot: u8, bytes: &mut [u8]) {
    let at = bad_blocks_offset(slot) as usize;
    bytes[at..at + 4096].copy_from_slice(page);
}

/// What a page with these runs and this size decodes to, its checksum being right.
fn decoded(edit: impl FnOnce(&mut [u8]), blocks: u64) -> Option<Vec<BlockRange>> {
    let mut page = encode_bad_blocks(VOLUME, 3, &RUNS);
    edit(page.as_mut_slice());
    let crc = checksum(page.as_slice(), 0);
    page[..4].copy_from_slice(&crc.to_le_bytes());
    decode_bad_blocks(page.as_slice(), VOLUME, blocks).map(|(_, runs)| runs)
}

#[test]
fn a_bad_block_list_comes_back_as_it_was_written_also_a_full_one() {
    assert_eq!(decoded(|_| {}, 1234), Some(RUNS.to_vec()));
    assert_eq!(MAX_BAD_RUNS, 254);
    let full: Vec<BlockRange> = (0..254).map(|i| BlockRange::new(2 * i, 2 * i + 1)).collect();
    let page = encode_bad_blocks(VOLUME, 9, &full);
    assert_eq!(decode_bad_blocks(page.as_slice(), VOLUME, 1234), Some((9, full)));
}

#[test]
fn a_meta_in_which_no_bad_block_list_was_ever_written_has_the_empty_one() {
    let bytes = meta(&first(VOLUME, LEGS, LEGS[0], 1234));
    assert_eq!(bad_blocks(&bytes, VOLUME, 1234), Some(BadBlockPage { sequence: 0, slot: 0, runs: vec![] }));
}

#[test]
fn every_flipped_byte_of_the_newest_bad_block_list_falls_back_to_the_other_slot_and_of_both_makes_it_unknown() {
    let mut bytes = meta(&first(VOLUME, LEGS, LEGS[0], 1234));
    let at = bad_blocks_offset(1) as usize;
    bad(encode_bad_blocks(VOLUME, 1, &RUNS).as_slice(), 1, &mut bytes);
    assert_eq!(bad_blocks(&bytes, VOLUME, 1234), Some(BadBlockPage { sequence: 1, slot: 1, runs: RUNS.to_vec() }));
    for byte in at..at + 4096 {
        bytes[byte] ^= 0x40;
        // The other one was never written: that is the empty list.
        assert_eq!(bad_blocks(&bytes, VOLUME, 1234).unwrap().runs, [], "byte {byte}");
        bytes[byte] ^= 0x40;
    }
    bad(encode_bad_blocks(VOLUME, 2, &RUNS[..1]).as_slice(), 0, &mut bytes);
    assert_eq!(bad_blocks(&bytes, VOLUME, 1234).unwrap().runs, RUNS[..1]);
    bytes[bad_blocks_offset(0) as usize + 77] ^= 1;
    assert_eq!(bad_blocks(&bytes, VOLUME, 1234).unwrap().runs, RUNS);
    for byte in at..at + 4096 {
        bytes[byte] ^= 1;
        assert_eq!(bad_blocks(&bytes, VOLUME, 1234), None, "byte {byte}");
        bytes[byte] ^= 1;
    }
}

#[test]
fn a_bad_block_list_that_breaks_its_own_rules_is_damaged_though_its_checksum_is_right() {
    let put = |at: usize, value: u64| move |page: &mut [u8]| page[at..at + 8].copy_from_slice(&value.to_le_bytes());
    assert_eq!(decoded(|_| {}, 1233), None, "it ends behind the volume");
    assert_eq!(decoded(put(40, 0), 1234), None, "an empty run");
    assert_eq!(decoded(put(40, 7), 1234), None, "two runs touch");
    assert_eq!(decoded(put(48, 0), 1234), None, "two runs overlap");
    assert_eq!(decoded(put(64, 3), 1234), None, "the runs do not rise");
    assert_eq!(decoded(put(72, u64::MAX), 1234), None, "a run's end is no number");
    assert_eq!(decoded(put(80, 1), 1234), None, "something behind the last run");
    assert_eq!(decoded(put(8, 0), 1234), None, "a list that nobody wrote");
    assert_eq!(decoded(put(16, 8), 1234), None, "another volume's");
    assert_eq!(decoded(|page| page[4] = 2, 1234), None, "a run more than it counts");
    assert_eq!(decoded(|page| page[4] = 4, 1234), None, "a run less than it counts");
    let one_more = |page: &mut [u8]| {
        let full: Vec<BlockRange> = (0..254).map(|i| BlockRange::new(2 * i, 2 * i + 1)).collect();
        page.copy_from_slice(encode_bad_blocks(VOLUME, 3, &full).as_slice());
        page[4..8].copy_from_slice(&255u32.to_le_bytes());
    };
    assert_eq!(decoded(one_more, 1234), None, "more runs than fit");
}

#[test]
fn a_feature_from_the_future_is_not_taken_for_damage() {
    let mut page = encode_superblock(&first(VOLUME, LEGS, LEGS[0], 1234));
    page[24] = 2;
    let crc = checksum(page.as_slice(), 12);
    page[12..16].copy_from_slice(&crc.to_le_bytes());
    let mut meta = page.to_vec();
    meta.extend_from_slice(encode_superblock(&first(VOLUME, LEGS, LEGS[0], 1234)).as_slice());
    assert_eq!(superblock(&meta), Err(MetaError::TooNew));
}

#[test]
fn a_volume_has_at_least_one_block_and_at_most_as_many_as_there_are_bits_for() {
    let decoded =
        |blocks| decode(SUPERBLOCK_MAGIC, encode_superblock(&first(VOLUME, LEGS, LEGS[0], blocks)).as_slice()).map(|sb| sb.blocks);
    assert_eq!([1, MAX_BLOCKS].map(decoded), [Ok(1), Ok(MAX_BLOCKS)]);
    assert_eq!([0, MAX_BLOCKS + 1].map(decoded), [Err(MetaError::Damaged); 2]);
}

#[test]
fn what_is_beside_a_damaged_slot_is_doubtful_and_what_is_beside_a_blank_one_is_not() {
    for slot in [0, 1] {
        let mut meta = vec![0; bitmap_offset(2, 0) as usize];
        meta[bitmap_offset(0, slot) as usize..][..4096].copy_from_slice(encode_bitmap(VOLUME, 4, &[3]).as_slice());
        let doubtful = |meta: &[u8]| bitmap_page(meta, VOLUME, 0).map(|page| (page.sequence, page.slot, page.doubtful));
        assert_eq!(doubtful(&meta), Some((4, slot, false)));
        meta[bitmap_offset(0, 1 - slot) as usize + 100] = 1;
        assert_eq!(doubtful(&meta), Some((4, slot, true)));
        let mut witness = vec![0; 8192];
        let page = encode_witness(&first(VOLUME, LEGS, LEGS[0], 1234));
        witness[usize::from(slot) * 4096..][..4096].copy_from_slice(page.as_slice());
        assert!(!witness_is_doubtful(&witness));
        witness[usize::from(1 - slot) * 4096 + 100] = 1;
        assert!(witness_is_doubtful(&witness));
    }
}

#[test]
fn a_short_or_empty_meta_is_damaged_not_a_panic() {
    for len in [0, 1, 4095, 4096, 8191] {
        assert_eq!(superblock(&vec![0; len]), Err(MetaError::Damaged));
        assert_eq!(bitmap_page(&vec![0; len], VOLUME, 0), None);
        assert_eq!(bad_blocks(&vec![0; len], VOLUME, 1), None);
    }
}

#[test]
fn a_page_that_is_written_is_named_by_its_place() {
    let blank = || Box::new([0; 4096]);
    let page = encode_bitmap(VOLUME, 1, &[0b101, 0, 0xf0]);
    for slot in 0..2 {
        assert_eq!(MetaPage::of(u64::from(slot) * 4096, &blank()), MetaPage::Superblock);
        assert_eq!(MetaPage::of(bad_blocks_offset(slot), &blank()), MetaPage::BadBlocks);
        for number in [0, 1, 2, 7] {
            assert_eq!(MetaPage::of(bitmap_offset(number, slot), &page), MetaPage::Bitmap { page: number, dirty: 6 });
        }
    }
}

#[test]
fn who_a_leg_is_says_whether_its_volume_was_forced_and_takes_no_other_flag_for_that() {
    for (flags, forced) in [(0, false), (FLAG_FORCED, true), (!FLAG_FORCED & 0xff, false), (0xff, true)] {
        let bytes = meta(&Superblock { flags, ..first(VOLUME, LEGS, LEGS[1], 1234) });
        let summary = peek(&bytes);
        assert_eq!(summary.map(|summary| summary.forced), Ok(forced), "{flags:#x}");
    }
}
