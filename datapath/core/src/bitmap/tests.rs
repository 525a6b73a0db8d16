use super::*;
use alloc::collections::BTreeSet;
use proptest::prelude::*;

const ONE: BlockRange = BlockRange::new(0, 1);

fn land(bitmap: &mut Bitmap) {
    bitmap.issued(0);
    bitmap.landed(0);
}

#[test]
fn a_region_counts_from_the_moment_that_its_bit_is_wanted_until_its_clear_has_landed() {
    let mut bitmap = Bitmap::new(4 * REGION_BLOCKS);
    assert_eq!(bitmap.counts_of(BlockRange::new(0, 3 * REGION_BLOCKS)), (3, 0));
    bitmap.want(BlockRange::new(0, 2 * REGION_BLOCKS));
    assert_eq!((bitmap.counted(), bitmap.counts_of(BlockRange::new(0, 3 * REGION_BLOCKS))), (2, (1, 2)));
    // Taken back before it was ever written: it never was on a disk.
    bitmap.clear(1);
    assert_eq!(bitmap.counted(), 1);
    land(&mut bitmap);
    bitmap.clear(0);
    assert_eq!((bitmap.counted(), bitmap.dirty()), (1, 0), "it is on the disks as long as its clear has not landed");
    bitmap.issued(0);
    bitmap.want(ONE);
    bitmap.landed(0);
    assert_eq!(bitmap.counted(), 1, "wanted again meanwhile");
    land(&mut bitmap);
    bitmap.clear(0);
    land(&mut bitmap);
    assert_eq!(bitmap.counted(), 0);
    bitmap.join(0, None);
    bitmap.regions[2].unsynced = true;
    bitmap.cannot_be_synced(2);
    assert_eq!(bitmap.counted(), 3);
    bitmap.synced(2);
    assert_eq!(bitmap.counted(), 4);
}

#[test]
fn a_set_is_durable_only_after_the_page_that_holds_it_has_landed() {
    let mut bitmap = Bitmap::new(3 * REGION_BLOCKS);
    assert!(!bitmap.want(ONE));
    land(&mut bitmap);
    assert!(bitmap.want(ONE));
    assert!(!bitmap.is_durable(BlockRange::new(REGION_BLOCKS - 1, REGION_BLOCKS + 1)));
}

#[test]
fn a_write_to_a_region_whose_clear_is_in_flight_waits_and_sets_it_again() {
    let mut bitmap = Bitmap::new(REGION_BLOCKS);
    assert!(!bitmap.clearing(ONE), "it was never set");
    bitmap.want(ONE);
    land(&mut bitmap);
    assert!(!bitmap.clearing(ONE), "it is set");
    bitmap.clear(0);
    bitmap.issued(0);
    assert!(bitmap.clearing(ONE));
    assert!(!bitmap.want(ONE), "the clear may land at any time");
    assert!(bitmap.pages[0].changed, "the set goes with the next write");
    bitmap.landed(0);
    assert!(!bitmap.is_durable(ONE), "what landed was the clear");
    land(&mut bitmap);
    assert!(bitmap.is_durable(ONE));
}

#[test]
fn a_page_that_is_valid_nowhere_is_all_dirty_and_copies_are_joined() {
    let mut bitmap = Bitmap::new(20 * REGION_BLOCKS);
    bitmap.join(0, Some(&[0b1, 0]));
    bitmap.join(0, Some(&[0, 0b10]));
    assert_eq!(bitmap.dirty(), 2);
    assert!(bitmap.regions[0].set && bitmap.regions[9].set);
    bitmap.join(0, None);
    assert_eq!(bitmap.dirty(), 20);
}

#[test]
fn a_range_touches_the_regions_of_its_first_and_last_block_and_no_other() {
    assert_eq!(regions_of(BlockRange::new(0, REGION_BLOCKS)), 0..1);
    assert_eq!(regions_of(BlockRange::new(REGION_BLOCKS - 1, REGION_BLOCKS + 1)), 0..2);
    assert_eq!(blocks_of(1, REGION_BLOCKS + 5), BlockRange::new(REGION_BLOCKS, REGION_BLOCKS + 5));
}

#[test]
fn a_range_is_cut_at_the_ends_of_its_regions() {
    let cut = |start, end| parts(BlockRange::new(start, end)).collect::<Vec<_>>();
    let (one, two) = (REGION_BLOCKS, 2 * REGION_BLOCKS);
    assert_eq!(cut(one - 1, two + 3), [BlockRange::new(one - 1, one), BlockRange::new(one, two), BlockRange::new(two, two + 3)]);
    assert_eq!(cut(one + 5, one + 9), [BlockRange::new(one + 5, one + 9)]);
}

#[test]
fn the_region_that_was_written_last_has_the_highest_stamp_also_when_that_write_ends() {
    let mut bitmap = Bitmap::new(2 * REGION_BLOCKS);
    let (first, second) = (ONE, BlockRange::new(REGION_BLOCKS, REGION_BLOCKS + 1));
    bitmap.hold(first);
    bitmap.hold(second);
    assert!(bitmap.regions[0].stamp < bitmap.regions[1].stamp);
    bitmap.unhold(first);
    assert!(bitmap.regions[0].stamp > bitmap.regions[1].stamp);
}

#[test]
fn a_range_is_closing_if_a_region_of_it_is_and_what_is_synced_is_not_stuck() {
    let mut bitmap = Bitmap::new(3 * REGION_BLOCKS);
    bitmap.regions[1].closing = true;
    assert!(!bitmap.closing(ONE) && bitmap.closing(BlockRange::new(0, REGION_BLOCKS + 1)));
    bitmap.join(0, None);
    for region in 0..3 {
        bitmap.regions[region].unsynced = true;
        bitmap.cannot_be_synced(region);
    }
    assert_eq!(bitmap.counted(), 0);
    bitmap.all_synced();
    assert_eq!(bitmap.counted(), 3);
    assert!(bitmap.regions.iter().all(|region| !region.unsynced && !region.stuck));
}

/// Sets of region numbers, and what is on its way to the disk.
#[derive(Default)]
struct Naive {
    set: BTreeSet<usize>,
    durable: BTreeSet<usize>,
    /// Some leg's page may say that these are dirty.
    on_disk: BTreeSet<usize>,
    flying: Vec<Option<BTreeSet<usize>>>,
    changed: BTreeSet<usize>,
    holds: Vec<BlockRange>,
    touched: Vec<u64>,
}

/// Block by block, where it is not the inside of a region.
fn touched(range: BlockRange) -> BTreeSet<usize> {
    let ends = (range.start..range.end).step_by(REGION_BLOCKS as usize).chain([range.end - 1]);
    ends.map(|block| (block / REGION_BLOCKS) as usize).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Want(u64, u64),
    Hold(u64, u64),
    Unhold(usize),
    Clear(usize),
    /// A page's write is issued, if none is in flight; else it lands.
    Write(usize),
    Join(usize, Option<Vec<u8>>),
    Extend(u64),
}

const REGIONS: usize = PAGE_REGIONS as usize + 9;

fn step() -> impl Strategy<Value = Step> {
    // Around the ends of the first page and of the volume, where one page's bits meet another's.
    let first = prop_oneof![0..12u64, PAGE_REGIONS - 6..PAGE_REGIONS + 12];
    let range = (first, 0..REGION_BLOCKS, prop_oneof![1..10u64, 1..3 * REGION_BLOCKS])
        .prop_map(|(region, at, len)| (region * REGION_BLOCKS + at, len));
    let region = prop_oneof![0..12usize, REGIONS - 15..REGIONS];
    let bits = prop::option::weighted(0.9, prop::collection::vec(any::<u8>(), 0..4));
    prop_oneof![
        4 => range.clone().prop_map(|(start, len)| Step::Want(start, len)),
        2 => range.prop_map(|(start, len)| Step::Hold(start, len)),
        2 => any::<usize>().prop_map(Step::Unhold),
        3 => region.prop_map(Step::Clear),
        4 => (0..2usize).prop_map(Step::Write),
        1 => (0..2usize, bits).prop_map(|(page, bits)| Step::Join(page, bits)),
        1 => (0..100 * REGION_BLOCKS).prop_map(Step::Extend),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn it_agrees_with_sets_of_regions_on_any_history(steps in prop::collection::vec(step(), 1..60)) {
        let mut blocks = REGIONS as u64 * REGION_BLOCKS - 100;
        let mut bitmap = Bitmap::new(blocks);
        let mut naive = Naive { flying: vec![None; 2], changed: [0, 1].into(), touched: vec![0; REGIONS + 100], ..Naive::default() };
        prop_assert_eq!((bitmap.regions.len(), bitmap.pages.len(), bitmap.dirty()), (REGIONS, 2, 0));
        for step in steps {
            let page_of = |region: usize| usize::from(region >= PAGE_REGIONS as usize);
            let clip = |start: u64, len: u64| BlockRange::new(start.min(blocks - 1), (start + len).min(blocks));
            match step {
                Step::Want(start, len) => {
                    let range = clip(start, len);
                    let regions = touched(range);
                    prop_assert_eq!(&regions_of(range).collect::<BTreeSet<_>>(), &regions);
                    let before = bitmap.is_durable(range);
                    prop_assert_eq!(bitmap.want(range), regions.is_subset(&naive.durable));
                    prop_assert_eq!(before, regions.is_subset(&naive.durable));
                    naive.changed.extend(regions.difference(&naive.set).map(|region| page_of(*region)));
                    naive.set.extend(regions);
                }
                Step::Hold(start, len) => {
                    let range = clip(start, len);
                    bitmap.hold(range);
                    touched(range).into_iter().for_each(|region| naive.touched[region] += 1);
                    naive.holds.push(range);
                }
                Step::Unhold(n) if !naive.holds.is_empty() => {
                    let range = naive.holds.remove(n % naive.holds.len());
                    bitmap.unhold(range);
                    touched(range).into_iter().for_each(|region| naive.touched[region] += 1);
                }
                Step::Unhold(_) => {}
                Step::Clear(region) => {
                    bitmap.clear(region);
                    naive.set.remove(&region);
                    naive.durable.remove(&region);
                    naive.changed.insert(page_of(region));
                }
                Step::Write(page) => {
                    let here = |regions: &BTreeSet<usize>| regions.iter().copied().filter(|r| page_of(*r) == page).collect::<BTreeSet<_>>();
                    if let Some(landed) = naive.flying[page].take() {
                        bitmap.landed(page);
                        let durable: BTreeSet<usize> = here(&naive.set).intersection(&landed).copied().collect();
                        naive.durable.retain(|region| page_of(*region) != page);
                        naive.durable.extend(durable);
                        naive.on_disk.retain(|region| page_of(*region) != page);
                        naive.on_disk.extend(landed);
                    } else {
                        let bits = bitmap.issued(page);
                        let first = page * PAGE_REGIONS as usize;
                        let said: BTreeSet<usize> = (0..bits.len() * 8).filter(|i| bits[i / 8] >> (i % 8) & 1 == 1).map(|i| first + i).collect();
                        prop_assert_eq!(&said, &here(&naive.set));
                        prop_assert_eq!(bits.len(), (bitmap.regions.len() - first).min(PAGE_REGIONS as usize).div_ceil(8));
                        naive.changed.remove(&page);
                        naive.on_disk.extend(&said);
                        naive.flying[page] = Some(said);
                    }
                }
                Step::Join(page, bits) => {
                    let first = page * PAGE_REGIONS as usize;
                    let last = if page == 0 { first + PAGE_REGIONS as usize } else { bitmap.regions.len() };
                    let found = (first..last).filter(|region| match &bits {
                        Some(bits) => bits.get((region - first) / 8).is_some_and(|byte| byte >> ((region - first) % 8) & 1 == 1),
                        None => true,
                    });
                    naive.set.extend(found);
                    bitmap.join(page, bits.as_deref());
                }
                Step::Extend(more) => {
                    blocks = blocks.max((REGIONS as u64 - 1) * REGION_BLOCKS + 1 + more);
                    bitmap.extend(blocks);
                    prop_assert_eq!(bitmap.regions.len() as u64, blocks.div_ceil(REGION_BLOCKS));
                }
            }
            prop_assert_eq!(bitmap.dirty() as usize, naive.set.len());
            prop_assert_eq!(bitmap.counted() as usize, naive.set.union(&naive.on_disk).count());
            prop_assert!(naive.durable.is_subset(&naive.set));
            for page in 0..2 {
                prop_assert_eq!(bitmap.pages[page].changed, naive.changed.contains(&page));
            }
            for (i, region) in bitmap.regions.iter().enumerate().filter(|(i, _)| *i < 16 || *i > REGIONS - 20) {
                let pending = naive.holds.iter().filter(|range| touched(**range).contains(&i)).count();
                prop_assert_eq!((region.set, region.durable), (naive.set.contains(&i), naive.durable.contains(&i)));
                prop_assert_eq!((region.pending as usize, region.writes), (pending, naive.touched[i]));
            }
        }
    }

    #[test]
    fn a_range_is_unsynced_if_a_region_of_it_is(marked in prop::collection::btree_set(0..20usize, 0..6), start in 0..20u64, len in 1..3u64) {
        let mut bitmap = Bitmap::new(24 * REGION_BLOCKS);
        marked.iter().for_each(|region| bitmap.regions[*region].unsynced = true);
        let range = BlockRange::new(start * REGION_BLOCKS + 5, (start + len) * REGION_BLOCKS);
        prop_assert_eq!(bitmap.unsynced(range), (start..start + len).any(|region| marked.contains(&(region as usize))));
    }
}

#[test]
fn a_volume_that_grows_gets_a_new_page_only_when_its_regions_do_not_fit_and_that_is_to_be_written() {
    let mut bitmap = Bitmap::new(1);
    bitmap.pages[0].changed = false;
    bitmap.extend(PAGE_REGIONS * REGION_BLOCKS);
    assert_eq!((bitmap.pages.len(), bitmap.pages[0].changed), (1, false));
    bitmap.extend(PAGE_REGIONS * REGION_BLOCKS + 1);
    assert_eq!((bitmap.pages.len(), bitmap.pages[0].changed, bitmap.pages[1].changed), (2, false, true));
}
