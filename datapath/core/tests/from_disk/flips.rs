//! One flipped bit in each byte of each metadata page: what becomes of it in the codec, and what becomes of the volume.
//!
//! | Where | Codec | Volume |
//! |---|---|---|
//! | a slot that is not the newest | nothing | nothing |
//! | a leg's newest superblock slot | the older slot | that leg is stale: the other serves; refused if the other is not there or stale |
//! | both superblock slots of a leg | damaged | that leg is foreign: as above |
//! | one slot of the witness | the other slot | a leg with a newer record decides; without one, a leg alone is refused |
//! | both witness slots | damaged | as if the witness were lost |
//! | the newest slot of a bitmap page | the older slot | the other leg's copy has the bits; with one leg that counts, all dirty |
//! | both slots of a bitmap page | not valid | the other leg's copy has the bits; valid on none, all dirty |
//! | the newest slot of a list of bad blocks | the older slot | the other leg's list has the blocks; with one leg that counts, the older list |
//! | both slots of a list of bad blocks | not known | the other leg's list has the blocks; known on none, refused |
//! | bytes that no page covers | nothing | nothing |
//!
//! A torn page looks the same as one that has gone bad. What was torn never counted, what has gone bad may have: so whoever could tell is
//! asked, and where nobody can, the safe thing is done.

use std::ops::Range;

use lockstep_core::{
    assembly::Refusal,
    format::{self, MetaError, PAGE_REGIONS, REGION_BLOCKS, bad_blocks_offset, bitmap_offset},
    status::LegState::{self, In, Out},
    units::{BlockRange, Slot},
};

use crate::node::{BLOCKS, META, Node, There, VOLUME};

const ALL: There = There { disks: [true; 2], witness: true, seen_epoch: None, force: None };
const A_ALONE: There = There { disks: [true, false], ..ALL };
const B_ALONE: There = There { disks: [false, true], ..ALL };
const REGIONS: u64 = 4;

/// Both legs are IN, region 0 is dirty. The newest superblocks and witness are in slot 1, the newest bitmap pages in slot 0.
fn healthy() -> Node {
    let mut node = Node::new();
    node.assemble(ALL).expect("a new volume");
    node.run();
    node.write(7);
    node.run();
    assert_eq!(node.acked.len(), 1);
    node
}

/// As `healthy`; then B is lost, region 1 is written, and B is back. A's newest superblock and the newest witness are in slot 0, A's newest
/// bitmap page is in slot 1.
fn degraded() -> Node {
    let mut node = healthy();
    node.disks[1].dead = true;
    node.write(REGION_BLOCKS + 7);
    node.run();
    assert_eq!((node.acked.len(), node.states()), (2, [In, Out]));
    node
}

#[derive(Clone, Copy, Debug)]
enum File {
    Meta(usize),
    Witness,
}

fn file(node: &mut Node, which: File) -> &mut Vec<u8> {
    match which {
        File::Meta(at) => &mut node.disks[at].meta,
        File::Witness => &mut node.witness,
    }
}

/// What became of the volume: what its legs count for, and how many regions are dirty.
type Volume = Result<([LegState; 2], u64), Refusal>;

fn volume(node: &mut Node, there: There) -> Volume {
    node.kill();
    node.assemble(there)?;
    let (states, dirty) = (node.states(), node.mirror.as_ref().expect("it is assembled").status().dirty_regions);
    for slot in Slot::BOTH {
        assert!(states[slot.index()] != In || node.complete(slot), "{slot:?} counts and misses what was acknowledged");
    }
    Ok((states, dirty))
}

/// Flips one bit in each byte of all these pages at once, byte by byte, and says what must become of the volume.
#[track_caller]
fn flipped(node: &Node, there: There, pages: &[(File, u64)], expected: &Volume) {
    flipped_at(0..4096, node, there, pages, expected);
}

/// The same, of these bytes.
#[track_caller]
fn flipped_at(bytes: impl IntoIterator<Item = usize>, node: &Node, there: There, pages: &[(File, u64)], expected: &Volume) {
    let mut node = node.clone();
    for byte in bytes {
        let flip = |node: &mut Node| {
            for &(which, at) in pages {
                file(node, which)[at as usize + byte] ^= 1 << (byte % 8);
            }
        };
        flip(&mut node);
        assert_eq!(&volume(&mut node, there), expected, "{pages:?} byte {byte}");
        flip(&mut node);
    }
}

const A: File = File::Meta(0);
const B: File = File::Meta(1);
const W: File = File::Witness;

#[test]
fn a_flipped_bit_of_a_superblock_takes_at_most_its_own_leg() {
    let node = healthy();
    let [one, two] = [node.disks[0].clone(), node.disks[1].clone()].map(|disk| format::superblock(&disk.meta).expect("valid").0.leg);
    flipped(&node, ALL, &[(A, 0)], &Ok(([In, In], 1)));
    flipped(&node, ALL, &[(A, 4096)], &Ok(([Out, In], 1)));
    flipped(&node, ALL, &[(A, 0), (A, 4096)], &Ok(([Out, In], 1)));
    flipped(&node, A_ALONE, &[(A, 4096)], &Err(Refusal::Stale(one)));
    flipped(&node, A_ALONE, &[(A, 0), (A, 4096)], &Err(Refusal::NoLeg));
    flipped(&node, ALL, &[(A, 4096), (B, 4096)], &Err(Refusal::Stale(two)));
    flipped(&node, ALL, &[(A, 0), (A, 4096), (B, 0), (B, 4096)], &Err(Refusal::NoLeg));
    let node = degraded();
    flipped(&node, ALL, &[(A, 4096)], &Ok(([In, Out], 2)));
    flipped(&node, ALL, &[(A, 0)], &Err(Refusal::Stale(two)));
    flipped(&node, ALL, &[(B, 0), (B, 4096)], &Ok(([In, Out], 2)));
}

#[test]
fn a_flipped_bit_of_the_witness_lets_no_stale_leg_in() {
    let node = healthy();
    let [one, two] = [node.disks[0].clone(), node.disks[1].clone()].map(|disk| format::superblock(&disk.meta).expect("valid").0.leg);
    for pages in [&[(W, 0)][..], &[(W, 4096)], &[(W, 0), (W, 4096)]] {
        flipped(&node, ALL, pages, &Ok(([In, In], 1)));
    }
    flipped(&node, A_ALONE, &[(W, 4096)], &Ok(([In, Out], 1)));
    flipped(&node, A_ALONE, &[(W, 0)], &Err(Refusal::NoWitness(one)));
    flipped(&node, A_ALONE, &[(W, 0), (W, 4096)], &Err(Refusal::NoWitness(one)));
    let node = degraded();
    for pages in [&[(W, 0)][..], &[(W, 4096)], &[(W, 0), (W, 4096)]] {
        flipped(&node, ALL, pages, &Ok(([In, Out], 2)));
    }
    flipped(&node, A_ALONE, &[(W, 0)], &Ok(([In, Out], 2)));
    flipped(&node, A_ALONE, &[(W, 4096)], &Ok(([In, Out], 2)));
    flipped(&node, B_ALONE, &[(W, 0)], &Err(Refusal::NoWitness(two)));
    flipped(&node, B_ALONE, &[(W, 4096)], &Err(Refusal::NoWitness(two)));
}

#[test]
fn a_flipped_bit_of_a_bitmap_page_hides_no_dirty_region() {
    let (first, second) = (bitmap_offset(0, 0), bitmap_offset(0, 1));
    let node = healthy();
    flipped(&node, ALL, &[(A, first)], &Ok(([In, In], 1)));
    flipped(&node, ALL, &[(A, second)], &Ok(([In, In], 1)));
    flipped(&node, ALL, &[(A, first), (A, second)], &Ok(([In, In], 1)));
    flipped(&node, ALL, &[(A, first), (A, second), (B, first), (B, second)], &Ok(([In, In], REGIONS)));
    let node = degraded();
    flipped(&node, ALL, &[(A, second)], &Ok(([In, Out], REGIONS)));
    flipped(&node, ALL, &[(A, first), (A, second)], &Ok(([In, Out], REGIONS)));
    flipped(&node, ALL, &[(B, first), (B, second)], &Ok(([In, Out], 2)));
}

#[test]
fn a_flipped_bit_of_a_second_bitmap_page_hides_no_dirty_region_and_costs_only_that_page() {
    // The last region of the first page, and the first and the last one of the second, which has four.
    let mut node = Node::sized((PAGE_REGIONS + 3) * REGION_BLOCKS + 5);
    node.assemble(ALL).expect("a new volume");
    node.run();
    for region in [PAGE_REGIONS - 1, PAGE_REGIONS, PAGE_REGIONS + 3] {
        node.write(region * REGION_BLOCKS + 4);
        node.run();
    }
    assert_eq!(node.acked.len(), 3);
    // The newest copy of either page is in slot 1. A volume of so many regions takes its time: the header, the bits, and some of the rest.
    let bytes = || (0..40).chain((40..4096).step_by(97));
    let (first, second) = (bitmap_offset(1, 0), bitmap_offset(1, 1));
    flipped_at(bytes(), &node, ALL, &[(A, second)], &Ok(([In, In], 3)));
    flipped_at(bytes(), &node, ALL, &[(A, first), (A, second)], &Ok(([In, In], 3)));
    flipped_at(bytes(), &node, A_ALONE, &[(A, second)], &Ok(([In, Out], 1 + 4)));
    flipped_at(bytes(), &node, ALL, &[(A, first), (A, second), (B, first), (B, second)], &Ok(([In, In], 1 + 4)));
    let (first, second) = (bitmap_offset(0, 0), bitmap_offset(0, 1));
    flipped_at(bytes(), &node, ALL, &[(A, first), (A, second)], &Ok(([In, In], 3)));
    flipped_at(bytes(), &node, ALL, &[(A, first), (A, second), (B, first), (B, second)], &Ok(([In, In], PAGE_REGIONS + 2)));
}

/// The legs list block 7, and in the newer slot 9 and 10, too.
fn listed(mut node: Node, legs: &[usize]) -> Node {
    for at in legs {
        for (slot, runs) in [(0, &[BlockRange::new(7, 8)][..]), (1, &[BlockRange::new(7, 8), BlockRange::new(9, 11)])] {
            let page = format::encode_bad_blocks(VOLUME, u64::from(slot) + 1, runs);
            node.disks[*at].meta[bad_blocks_offset(slot) as usize..][..4096].copy_from_slice(page.as_slice());
        }
    }
    node
}

/// As `flipped`; and how many blocks are lost.
#[track_caller]
fn flipped_list(node: &Node, there: There, pages: &[(File, u64)], expected: &Result<([LegState; 2], u64), Refusal>) {
    let mut node = node.clone();
    for byte in 0..4096 {
        let flip = |node: &mut Node| pages.iter().for_each(|&(which, at)| file(node, which)[at as usize + byte] ^= 1 << (byte % 8));
        flip(&mut node);
        let found =
            volume(&mut node, there).map(|(states, _)| (states, node.mirror.as_ref().expect("it is assembled").status().bad_blocks));
        assert_eq!(&found, expected, "{pages:?} byte {byte}");
        flip(&mut node);
    }
}

#[test]
fn a_flipped_bit_of_a_list_of_bad_blocks_never_makes_an_empty_list() {
    let (first, second) = (bad_blocks_offset(0), bad_blocks_offset(1));
    let node = listed(healthy(), &[0, 1]);
    let one = format::superblock(&node.disks[0].meta).expect("valid").0.leg;
    for pages in [&[(A, first)][..], &[(A, second)], &[(A, first), (A, second)], &[(B, first), (B, second)]] {
        flipped_list(&node, ALL, pages, &Ok(([In, In], 3)));
    }
    flipped_list(&node, A_ALONE, &[(A, first)], &Ok(([In, Out], 3)));
    flipped_list(&node, A_ALONE, &[(A, second)], &Ok(([In, Out], 1)));
    flipped_list(&node, A_ALONE, &[(A, first), (A, second)], &Err(Refusal::BadBlocksUnknown(one)));
    flipped_list(&node, ALL, &[(A, first), (A, second), (B, first), (B, second)], &Err(Refusal::BadBlocksUnknown(one)));
    // B is OUT: what it lists means nothing, also where A's list is damaged.
    let node = listed(degraded(), &[0]);
    flipped_list(&node, ALL, &[(B, first), (B, second)], &Ok(([In, Out], 3)));
    flipped_list(&listed(node, &[1]), ALL, &[(A, first), (A, second)], &Err(Refusal::BadBlocksUnknown(one)));
}

#[test]
fn bytes_that_no_page_covers_mean_nothing() {
    let mut node = degraded();
    let unused: [Range<usize>; 2] =
        [8192..bad_blocks_offset(0) as usize, bad_blocks_offset(1) as usize + 4096..bitmap_offset(0, 0) as usize];
    for byte in unused.into_iter().flatten().step_by(97) {
        node.disks[0].meta[byte] ^= 0xff;
    }
    assert_eq!(volume(&mut node, ALL), Ok(([In, Out], 2)));
}

/// Every bit, not one a byte.
#[test]
fn every_flipped_bit_of_a_page_is_damage_and_never_a_newer_version() {
    let node = degraded();
    let mut meta = node.disks[0].meta[..META].to_vec();
    let mut witness = node.witness.clone();
    let bad = format::encode_bad_blocks(VOLUME, 1, &[BlockRange::new(3, 5)]);
    meta[32768..36864].copy_from_slice(bad.as_slice());
    meta[36864..40960].fill(0xaa);
    // Only the page in question is valid, so that there is nothing to fall back to.
    meta[4096..8192].fill(0);
    witness[4096..].fill(0);
    meta[bitmap_offset(0, 0) as usize..][..4096].fill(0);
    let second = bitmap_offset(1, 1) as usize;
    meta.resize(second, 0);
    meta.extend_from_slice(format::encode_bitmap(VOLUME, 1, &[0x5a; 9]).as_slice());
    meta[bitmap_offset(1, 0) as usize..second].fill(0);
    assert!(format::superblock(&meta).is_ok() && format::witness(&witness).is_ok());
    assert!(
        format::bad_blocks(&meta, VOLUME, BLOCKS).is_some()
            && [0, 1].into_iter().all(|page| format::bitmap_page(&meta, VOLUME, page).is_some())
    );
    for bit in 0..4096 * 8 {
        let (byte, mask) = (bit / 8, 1 << (bit % 8));
        let at = bitmap_offset(0, 1) as usize;
        for byte in [byte, 32768 + byte, at + byte, second + byte] {
            meta[byte] ^= mask;
        }
        witness[byte] ^= mask;
        assert_eq!(format::superblock(&meta), Err(MetaError::Damaged), "bit {bit}");
        assert_eq!(format::witness(&witness), Err(MetaError::Damaged), "bit {bit}");
        assert_eq!([0, 1].map(|page| format::bitmap_page(&meta, VOLUME, page)), [None, None], "bit {bit}");
        assert_eq!(format::bad_blocks(&meta, VOLUME, BLOCKS), None, "bit {bit}");
        for byte in [byte, 32768 + byte, at + byte, second + byte] {
            meta[byte] ^= mask;
        }
        witness[byte] ^= mask;
    }
}
