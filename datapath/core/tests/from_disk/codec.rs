use lockstep_core::{
    format::{
        self, BadBlockPage, MAX_BAD_RUNS, MAX_BLOCKS, META_LEN, MetaError, PAGE_REGIONS, REGION_BLOCKS, Superblock, bad_blocks,
        bitmap_offset, bitmap_page, bitmap_pages, encode_bad_blocks, encode_bitmap, encode_superblock, encode_witness, regions,
    },
    units::{BlockRange, LegId, VolumeId},
};
use proptest::prelude::*;

use crate::{
    naive::{self, BAD_BLOCKS_CRC, BITMAP_CRC, SUPERBLOCK_CRC, crc32c, seal, u32_at, u64_at},
    strategies::superblock,
};

/// A file that begins with these two slots.
fn slots(a: &[u8], b: &[u8]) -> Vec<u8> {
    [a, b].concat()
}

fn sealed(superblock: &Superblock, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut page = encode_superblock(superblock).to_vec();
    change(&mut page);
    seal(&mut page, SUPERBLOCK_CRC);
    page
}

fn put_u32(page: &mut [u8], at: usize, value: u32) {
    page[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

proptest! {
    #[test]
    fn a_superblock_is_on_disk_what_the_drawing_says_and_comes_back(sb in superblock()) {
        let page = encode_superblock(&sb);
        prop_assert_eq!(&page[..8], b"LOCKSTEP");
        prop_assert_eq!((u32_at(page.as_slice(), 8), u64_at(page.as_slice(), 80)), (1, 4096));
        prop_assert_eq!(naive::superblock(page.as_slice()), sb);
        let mut again = page.clone();
        seal(again.as_mut_slice(), SUPERBLOCK_CRC);
        prop_assert_eq!(&again, &page, "the checksum is a CRC32C of the page");
        let named = [0..16, 16..20, 32..129, 136..153, 160..201, 208..232];
        let unnamed = (0..4096).filter(|at| !named.iter().any(|range| range.contains(at)));
        prop_assert!(unnamed.into_iter().all(|at| page[at] == 0), "what has no name is zero");
        prop_assert_eq!(format::superblock(&slots(page.as_slice(), &[0; 4096])), Ok((sb, 0)));
        prop_assert_eq!(format::superblock(&slots(&[0; 4096], page.as_slice())), Ok((sb, 1)));
    }

    #[test]
    fn a_witness_is_a_superblock_without_a_leg_and_neither_is_taken_for_the_other(sb in superblock()) {
        let page = encode_witness(&sb);
        let without = Superblock { leg: LegId([0; 16]), ..sb };
        prop_assert_eq!(&page[..8], b"LOCKWITN");
        prop_assert_eq!(naive::superblock(page.as_slice()), without);
        prop_assert_eq!(format::witness(&slots(page.as_slice(), &[0; 4096])), Ok((without, 0)));
        prop_assert_eq!(format::superblock(&slots(page.as_slice(), &[0; 4096])), Err(MetaError::Damaged));
        prop_assert_eq!(format::witness(&slots(encode_superblock(&sb).as_slice(), &[0; 4096])), Err(MetaError::Damaged));
    }

    #[test]
    fn the_valid_slot_with_the_higher_sequence_counts_and_the_first_of_equals(
        a in superblock(), b in superblock(), near in prop::option::of(-1i64..=1), a_ok: bool, b_ok: bool,
    ) {
        let b = near.map_or(b, |near| Superblock { sequence: a.sequence.saturating_add_signed(near), ..b });
        let mut pages = [encode_superblock(&a).to_vec(), encode_superblock(&b).to_vec()];
        for (page, ok) in pages.iter_mut().zip([a_ok, b_ok]) {
            if !ok {
                page[1000] ^= 1;
            }
        }
        let mut valid: Vec<_> = [(a, 0, a_ok), (b, 1, b_ok)].into_iter().filter(|(.., ok)| *ok).map(|(sb, slot, _)| (sb, slot)).collect();
        valid.sort_by_key(|(sb, slot)| (core::cmp::Reverse(sb.sequence), *slot));
        prop_assert_eq!(format::superblock(&slots(&pages[0], &pages[1])), valid.first().copied().ok_or(MetaError::Damaged));
    }

    #[test]
    fn an_unknown_incompat_or_ro_compat_bit_or_version_is_refused_and_not_taken_for_damage(
        sb in superblock(), at in prop::sample::select(vec![8, 20, 24]), bit in 0..32u32, second: bool,
    ) {
        let future = sealed(&sb, |page| { let old = u32_at(page, at); put_u32(page, at, old ^ 1 << bit) });
        let present = encode_superblock(&Superblock { sequence: u64::MAX, ..sb });
        let file = if second { slots(present.as_slice(), &future) } else { slots(&future, present.as_slice()) };
        prop_assert_eq!(format::superblock(&file), Err(MetaError::TooNew));
    }

    #[test]
    fn an_unknown_compat_bit_is_accepted_and_written_again(sb in superblock(), bit in 0..32u32) {
        let page = sealed(&sb, |page| put_u32(page, 16, 1 << bit));
        let (read, _) = format::superblock(&slots(&page, &[0; 4096])).expect("it is accepted");
        prop_assert_eq!(read, Superblock { compat: 1 << bit, ..sb });
        prop_assert_eq!(encode_superblock(&read).to_vec(), page);
    }

    #[test]
    fn a_page_that_says_what_cannot_be_is_damaged(sb in superblock(), wrong in 0..7usize, value in 5u8..) {
        let page = sealed(&sb, |page| match wrong {
            0 => page[72..80].fill(0),
            1 => page[72..80].copy_from_slice(&(MAX_BLOCKS + u64::from(value)).to_le_bytes()),
            2 => page[80..88].copy_from_slice(&u64::from(value).to_le_bytes()),
            3 => page[128] = value,
            4 => page[152] = value,
            5 => page[200] = value,
            _ => page[7] ^= value,
        });
        prop_assert_eq!(format::superblock(&slots(&page, &[0; 4096])), Err(MetaError::Damaged));
    }

    #[test]
    fn arbitrary_bytes_are_damaged_not_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
        prop_assert_eq!(format::superblock(&bytes), Err(MetaError::Damaged));
        prop_assert_eq!(format::witness(&bytes), Err(MetaError::Damaged));
        prop_assert_eq!(bitmap_page(&bytes, VolumeId([0; 16]), 0), None);
    }

    #[test]
    fn a_bitmap_page_comes_back_with_its_bits_and_then_zeroes(
        volume: [u8; 16], sequence in 1u64.., page in 0..120u64, slot in 0..2u8,
        bits in prop::collection::vec(any::<u8>(), 0..=(PAGE_REGIONS / 8) as usize),
    ) {
        let volume = VolumeId(volume);
        let encoded = encode_bitmap(volume, sequence, &bits);
        let mut again = encoded.clone();
        seal(again.as_mut_slice(), BITMAP_CRC);
        prop_assert_eq!(&again, &encoded);
        prop_assert_eq!((u32_at(encoded.as_slice(), 4), u64_at(encoded.as_slice(), 8)), (0, sequence));
        prop_assert_eq!((&encoded[16..32], &encoded[32..32 + bits.len()]), (&volume.0[..], &bits[..]));
        let mut meta = vec![0; META_LEN as usize];
        let at = (65536 + page * 8192 + u64::from(slot) * 4096) as usize;
        meta[at..at + 4096].copy_from_slice(encoded.as_slice());
        let found = bitmap_page(&meta, volume, page).expect("it is valid");
        prop_assert_eq!((found.sequence, found.slot, found.bits.len() as u64 * 8), (sequence, slot, PAGE_REGIONS));
        prop_assert!(found.bits.iter().copied().eq(bits.iter().copied().chain(core::iter::repeat(0)).take(found.bits.len())));
        prop_assert_eq!(bitmap_page(&meta, VolumeId([volume.0[0] ^ 1; 16]), page), None, "of another volume");
        prop_assert_eq!(bitmap_page(&meta[..at + 4095], volume, page), None, "cut off");
    }

    #[test]
    fn the_valid_bitmap_slot_with_the_higher_sequence_counts(a in 0..4u64, b in 0..4u64, a_ok: bool, b_ok: bool) {
        let volume = VolumeId([5; 16]);
        let mut meta = vec![0; META_LEN as usize];
        for (slot, sequence, ok) in [(0u8, a, a_ok), (1, b, b_ok)] {
            let at = bitmap_offset(0, slot) as usize;
            meta[at..at + 4096].copy_from_slice(encode_bitmap(volume, sequence, &[slot + 1]).as_slice());
            meta[at + 4095] ^= u8::from(!ok);
        }
        let mut valid: Vec<_> = [(a, 0u8, a_ok), (b, 1, b_ok)].into_iter().filter(|(sequence, _, ok)| *ok && *sequence > 0).collect();
        valid.sort_by_key(|(sequence, slot, _)| (core::cmp::Reverse(*sequence), *slot));
        let found = bitmap_page(&meta, volume, 0).map(|page| (page.sequence, page.slot, page.bits[0]));
        prop_assert_eq!(found, valid.first().map(|(sequence, slot, _)| (*sequence, *slot, slot + 1)));
    }

    #[test]
    fn a_bad_block_list_comes_back_and_only_what_keeps_its_rules_is_one(
        gaps in prop_oneof![
            prop::collection::vec((0..3u64, 0..3u64), 0..6),
            prop::collection::vec((1..3u64, 1..3u64), 0..=MAX_BAD_RUNS),
        ],
        blocks in prop_oneof![1..20u64, 1..1000u64, Just(1000)], sequence in 1u64.., slot in 0..2u8,
    ) {
        let volume = VolumeId([5; 16]);
        let mut at = 0;
        let runs: Vec<BlockRange> = gaps.iter().map(|(gap, len)| { let start = at + gap; at = start + len; BlockRange::new(start, at) }).collect();
        let page = encode_bad_blocks(volume, sequence, &runs);
        let mut again = page.clone();
        seal(again.as_mut_slice(), BAD_BLOCKS_CRC);
        prop_assert_eq!(&again, &page);
        prop_assert_eq!((u32_at(page.as_slice(), 4) as usize, u64_at(page.as_slice(), 8), &page[16..32]), (runs.len(), sequence, &volume.0[..]));
        for (i, run) in runs.iter().enumerate() {
            prop_assert_eq!((u64_at(page.as_slice(), 32 + i * 16), u64_at(page.as_slice(), 40 + i * 16)), (run.start, run.len()));
        }
        // The other slot is damaged, so that nothing is fallen back to.
        let mut meta = vec![1; META_LEN as usize];
        let at = 32768 + usize::from(slot) * 4096;
        meta[at..at + 4096].copy_from_slice(page.as_slice());
        let rising = runs.windows(2).all(|pair| pair[0].end < pair[1].start);
        let keeps = rising && runs.iter().all(|run| run.start < run.end && run.end <= blocks);
        prop_assert_eq!(bad_blocks(&meta, volume, blocks), keeps.then_some(BadBlockPage { sequence, slot, runs }));
        prop_assert_eq!(bad_blocks(&meta, VolumeId([6; 16]), blocks), None, "of another volume");
    }

    #[test]
    fn a_volume_has_as_many_regions_and_pages_as_cover_it(blocks in 1..=MAX_BLOCKS) {
        let (regions, pages) = (regions(blocks), bitmap_pages(blocks));
        prop_assert!((regions - 1) * REGION_BLOCKS < blocks && blocks <= regions * REGION_BLOCKS);
        prop_assert!((pages - 1) * PAGE_REGIONS < regions && regions <= pages * PAGE_REGIONS);
        prop_assert!(bitmap_offset(pages - 1, 1) + 4096 <= META_LEN);
    }
}

#[test]
fn the_largest_volume_fills_meta_with_bitmap_pages() {
    assert_eq!(bitmap_offset(bitmap_pages(MAX_BLOCKS), 0), META_LEN);
    assert_eq!(bitmap_offset(3, 1), 65536 + 3 * 8192 + 4096);
    assert_eq!((REGION_BLOCKS, PAGE_REGIONS), (4096, 32512));
    assert_eq!(crc32c(b"123456789"), 0xe306_9283, "the check value of CRC32C");
}

#[test]
fn a_sequence_of_zero_was_never_written() {
    let mut meta = vec![0; META_LEN as usize];
    meta[65536..69632].copy_from_slice(encode_bitmap(VolumeId([5; 16]), 0, &[]).as_slice());
    assert_eq!(bitmap_page(&meta, VolumeId([5; 16]), 0), None);
}

#[test]
fn new_legs_a_spare_and_the_witness_say_what_they_must() {
    let (volume, legs) = (VolumeId([7; 16]), [LegId([1; 16]), LegId([2; 16])]);
    for blocks in [1, REGION_BLOCKS, PAGE_REGIONS * REGION_BLOCKS + 1] {
        let witness = format::new_witness(volume, legs, blocks);
        let (record, _) = format::witness(&witness).expect("it is valid");
        for leg in legs {
            let meta = format::new_leg(volume, legs, leg, blocks);
            let (superblock, slot) = format::superblock(&meta).expect("it is valid");
            assert_eq!((superblock, slot), (Superblock { leg, ..record }, 0));
            let summary = format::peek(&meta).expect("it is valid");
            assert_eq!((summary.volume, summary.leg, summary.blocks, summary.epoch.0), (volume, leg, blocks, 1));
            assert_eq!(meta.len() as u64, META_LEN);
            for page in 0..bitmap_pages(blocks) {
                assert!(bitmap_page(&meta, volume, page).is_some_and(|page| page.bits.iter().all(|byte| *byte == 0)));
            }
            assert_eq!(bitmap_page(&meta, volume, bitmap_pages(blocks)), None);
        }
        let spare = format::peek(&format::spare_leg(volume, legs[1], blocks)).expect("it is valid");
        assert_eq!((spare.leg, spare.epoch.0), (legs[1], 0));
    }
}
