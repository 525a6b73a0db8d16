//! The list of bad blocks: what no copy holds valid data of (mirror rule 22).
//!
//! It belongs to the mirror, not to a leg. A block comes on it when the only good leg cannot read it while the other one is filled, and
//! leaves it when it is overwritten:
//! ```text
//! unreadable in a rebuild --> listed: EIO at once --> durable on source and target --> the piece counts as copied
//! a write or zero over it --> done on every leg --> all flushed --> list without it durable on every counted leg --> answered
//! ```
//! - While it is listed, every read that touches it fails as a whole, from whichever leg, and no copy (resync, rebuild, repair, mending) reads
//!   or writes it: what a leg holds there is anything. That the leg might be able to read it again later changes nothing: a
//!   reader that once got an error would get data that nobody vouches for.
//! - A leg becomes IN only with a list that is complete: the copies that listed something ended before, and the last step of a rebuild
//!   writes the list once more with the bitmap. So one valid list of an IN leg is enough at assembly, and the union of them is right: a
//!   block that only one of them names was being overwritten, and that write was not answered.
//! - If no IN leg has a valid one, the volume is refused: the list is not known, and an empty one could show as data what never was. The
//!   operator may force that leg; then the list is empty.
//! - The list of a leg that is OUT or RECOVERING means nothing; it is written anew before that leg is IN.
//! - A list that is full stops the rebuild (`RebuildBlocked`, tried again), and a write that would split a run of it fails with EIO: its
//!   block stays listed.
//!
//! The entries of the range lock keep order: a block is listed and taken off under an entry that covers it.

use alloc::vec::Vec;

use crate::{format::MAX_BAD_RUNS, page::Page, units::BlockRange};

/// Blocks as runs that rise and do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Runs(Vec<BlockRange>);

impl Runs {
    /// Adds the blocks of a range.
    pub fn insert(&mut self, range: BlockRange) {
        if range.is_empty() {
            return;
        }
        let first = self.0.partition_point(|run| run.end < range.start);
        let last = self.0.partition_point(|run| run.start <= range.end);
        let joined = self.0[first..last].iter().fold(range, |a, b| BlockRange::new(a.start.min(b.start), a.end.max(b.end)));
        self.0.splice(first..last, [joined]);
    }

    /// Takes away the blocks of a range.
    pub fn remove(&mut self, range: BlockRange) {
        let rest = |run: &BlockRange| {
            let (before, after) =
                (BlockRange::new(run.start, run.end.min(range.start)), BlockRange::new(run.start.max(range.end), run.end));
            if run.overlaps(range) && !range.is_empty() { [before, after] } else { [*run, BlockRange::new(0, 0)] }
        };
        self.0 = self.0.iter().flat_map(rest).filter(|run| !run.is_empty()).collect();
    }

    /// The first run that ends behind this block.
    fn next(&self, block: u64) -> Option<BlockRange> {
        self.0.get(self.0.partition_point(|run| run.end <= block)).copied()
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = BlockRange> + '_ {
        self.0.iter().copied()
    }
}

/// The list and what is under way of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct BadBlocks {
    runs: Runs,
    /// Counts the changes.
    version: u64,
    /// The newest change that is durable on every leg that had to have it.
    durable: u64,
    /// Where it is on disk; the write in flight brings this version.
    pub page: Page<u64>,
}

impl BadBlocks {
    /// Adds what was found on a leg at assembly.
    pub fn join(&mut self, runs: &[BlockRange]) {
        runs.iter().for_each(|run| self.runs.insert(*run));
    }

    /// Lists these blocks; what to wait for. `None`: there is no room, nothing is listed.
    pub fn insert(&mut self, blocks: &Runs) -> Option<u64> {
        let mut runs = self.runs.clone();
        blocks.iter().for_each(|run| runs.insert(run));
        self.become_runs(runs)
    }

    /// Takes the blocks of a range off; what to wait for. `None`: there is no room for the rest, nothing is taken off.
    pub fn remove(&mut self, range: BlockRange) -> Option<u64> {
        let mut runs = self.runs.clone();
        runs.remove(range);
        self.become_runs(runs)
    }

    fn become_runs(&mut self, runs: Runs) -> Option<u64> {
        if runs.0.len() > MAX_BAD_RUNS {
            return None;
        }
        self.runs = runs;
        self.version += 1;
        self.page.changed = true;
        Some(self.version)
    }

    /// Whether a block of this range is listed.
    pub fn overlaps(&self, range: BlockRange) -> bool {
        self.runs.next(range.start).is_some_and(|run| run.overlaps(range))
    }

    /// The first blocks of a range that are not listed, up to the next one that is; empty: there are none.
    pub fn valid(&self, range: BlockRange) -> BlockRange {
        let start = self.runs.next(range.start).map_or(range.start, |run| if run.start <= range.start { run.end } else { range.start });
        let end = self.runs.next(start).map_or(range.end, |run| run.start);
        BlockRange::new(start.min(range.end), end.min(range.end))
    }

    /// The list.
    pub fn runs(&self) -> &[BlockRange] {
        &self.runs.0
    }

    /// How many blocks are listed.
    pub fn blocks(&self) -> u64 {
        self.runs.iter().map(BlockRange::len).sum()
    }

    /// Its page is written now.
    pub fn issued(&mut self) {
        self.page.issued(self.version);
    }

    /// The write in flight is durable wherever it must be.
    pub fn landed(&mut self) {
        self.durable = self.page.in_flight.take().unwrap_or(self.durable);
    }

    /// Whether this change, or a later one, is durable.
    pub fn is_durable(&self, version: u64) -> bool {
        self.durable >= version
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{collections::BTreeSet, vec};

    fn range(start: u64, end: u64) -> BlockRange {
        BlockRange::new(start, end)
    }

    #[test]
    fn runs_are_what_a_set_of_blocks_is_and_never_touch() {
        let (mut bad, mut model, mut state) = (BadBlocks::default(), BTreeSet::new(), 1u64);
        for _ in 0..4000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (start, len) = ((state >> 33) % 40, (state >> 40) % 6);
            let piece = range(start, start + len);
            if (state >> 50) % 2 == 0 {
                let mut blocks = Runs::default();
                blocks.insert(piece);
                bad.insert(&blocks).unwrap();
                model.extend(start..start + len);
            } else {
                bad.remove(piece).unwrap();
                model.retain(|block| !(start..start + len).contains(block));
            }
            assert!(bad.runs().windows(2).all(|pair| pair[0].end < pair[1].start) && bad.runs().iter().all(|run| !run.is_empty()));
            assert_eq!(bad.runs.iter().flat_map(|run| run.start..run.end).collect::<BTreeSet<_>>(), model);
            assert_eq!(bad.blocks(), model.len() as u64);
            for from in 0..46 {
                let look = range(from, 46);
                assert_eq!(bad.overlaps(range(from, from + 3)), (from..from + 3).any(|block| model.contains(&block)));
                let first = (from..46).find(|block| !model.contains(block)).unwrap_or(46);
                let end = (first..46).find(|block| model.contains(block)).unwrap_or(46);
                assert_eq!(bad.valid(look), range(first, end));
            }
        }
    }

    #[test]
    fn a_full_list_takes_no_run_more_and_gives_none_that_would_split_one() {
        let mut bad = BadBlocks::default();
        bad.join(&(0..MAX_BAD_RUNS as u64).map(|i| range(10 * i, 10 * i + 3)).collect::<Vec<_>>());
        let mut more = Runs::default();
        more.insert(range(9005, 9006));
        assert_eq!((bad.insert(&more), bad.remove(range(1, 2))), (None, None));
        assert!(!bad.overlaps(range(9005, 9006)) && bad.overlaps(range(1, 2)) && bad.page.is_idle());
        assert!(bad.remove(range(0, 1)).is_some() && bad.remove(range(11, 20)).is_some() && bad.remove(range(20, 30)).is_some());
        assert!(bad.insert(&more).is_some());
        assert_eq!(bad.runs().len(), MAX_BAD_RUNS);
    }

    #[test]
    fn a_change_is_durable_only_when_a_page_that_was_written_after_it_has_landed() {
        let mut bad = BadBlocks::default();
        let mut blocks = Runs::default();
        blocks.insert(range(3, 4));
        let first = bad.insert(&blocks).unwrap();
        bad.issued();
        let second = bad.remove(range(3, 4)).unwrap();
        bad.landed();
        assert_eq!(vec![bad.is_durable(first), bad.is_durable(second), bad.page.is_idle()], [true, false, false]);
        bad.issued();
        bad.landed();
        assert!(bad.is_durable(second) && bad.page.is_idle());
    }
}
