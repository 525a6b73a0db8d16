//! One simulated disk: a volatile cache over what survives, and the leg's metadata.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_core::{
    format,
    units::{BlockRange, Errno},
};

use crate::world::VOLUME;

/// What a host says that is short of something for a moment (mirror rule 6).
pub(crate) const HOST_ERRNOS: [Errno; 5] = [Errno::EAGAIN, Errno::EINTR, Errno::ENOMEM, Errno::ECANCELED, Errno::EBUSY];
/// What a file system says that is full, or where a quota is (mirror rule 28).
pub(crate) const FULL_ERRNOS: [Errno; 2] = [Errno::ENOSPC, Errno::EDQUOT];

/// What one disk holds for the volume.
#[derive(Clone, Debug, Hash)]
pub struct Disk {
    /// What survives a crash; a missing block was never written.
    pub durable: BTreeMap<u64, u64>,
    /// Written, not flushed.
    pub cache: BTreeMap<u64, u64>,
    /// The leg's metadata.
    pub meta: Vec<u8>,
    /// What it was given does not end; it is late when this is over.
    pub hung: bool,
    /// Every I/O fails.
    pub dead: bool,
    /// Reads of these blocks fail until they are written.
    pub bad: BTreeSet<u64>,
    /// Writes and zeroes find no space.
    pub full: bool,
    /// Metadata writes fail.
    pub meta_fails: bool,
}

impl Disk {
    /// What a read returns now.
    pub fn read(&self, block: u64) -> u64 {
        self.cache.get(&block).or_else(|| self.durable.get(&block)).copied().unwrap_or(0)
    }

    /// A block's new content; with `fua`, durable at once.
    pub(crate) fn write(&mut self, block: u64, token: u64, fua: bool) {
        if fua {
            self.cache.remove(&block);
            self.durable.insert(block, token);
        } else {
            self.cache.insert(block, token);
        }
    }

    /// What was in the cache when a flush was issued is durable when it ends; what came later is not.
    pub(crate) fn flush(&mut self, found: &[(u64, u64)]) {
        for &(block, token) in found {
            if self.cache.get(&block) == Some(&token) {
                self.cache.remove(&block);
                self.durable.insert(block, token);
            } else if self.cache.contains_key(&block) {
                self.durable.insert(block, token);
            }
        }
    }

    /// The first run of written blocks. What was zeroed is a hole again: that is what ZERO_RANGE makes of it on the real file system.
    pub(crate) fn next_data(&self, range: BlockRange) -> Option<BlockRange> {
        let known = self.durable.range(range.start..range.end).chain(self.cache.range(range.start..range.end));
        let written: BTreeSet<u64> = known.map(|(block, _)| *block).filter(|block| self.read(*block) != 0).collect();
        let first = *written.first()?;
        Some(BlockRange::new(first, (first..range.end).find(|block| !written.contains(block)).unwrap_or(range.end)))
    }

    /// The list of bad blocks on this disk.
    pub fn bad_blocks(&self) -> Vec<BlockRange> {
        format::bad_blocks(&self.meta, VOLUME, u64::MAX).map_or_else(Vec::new, |page| page.runs)
    }

    /// The regions that the newest bitmap page on this disk calls dirty.
    pub fn dirty_regions(&self) -> BTreeSet<u64> {
        let bits = format::bitmap_page(&self.meta, VOLUME, 0).map_or_else(Vec::new, |page| page.bits);
        let words = bits.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
        let some = (0..).step_by(64).zip(words).filter(|(_, word)| *word != 0);
        some.flat_map(|(first, word)| (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_core::fault::{Fault, classify};

    #[test]
    fn a_simulated_host_and_a_full_disk_say_all_that_the_table_has_for_them_and_nothing_else() {
        let numbers = |fault| (0..4096).map(Errno).filter(move |errno| classify(*errno) == fault);
        for (said, fault) in [(&HOST_ERRNOS[..], Fault::Host), (&FULL_ERRNOS, Fault::NoSpace)] {
            assert!(said.iter().all(|errno| classify(*errno) == fault), "{said:?}");
            assert_eq!(said.len(), numbers(fault).count(), "{said:?}");
        }
    }
}
