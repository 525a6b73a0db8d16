//! The mirror-wide range lock (mirror rules 2, 3, 4, 7).
//!
//! One table for the whole mirror, in order of arrival. An exclusive entry (write, zero, copy) waits for every earlier exclusive entry
//! that it overlaps, in flight or queued, and is woken once, by count. A read waits only for the user writes and repairs that were
//! already issued when it came; nobody waits for a read. Dependencies point only backwards, so there is no cycle.
//!
//! A read that is under way beside a user write that came later may have seen what that write will not leave behind (it fails on the other leg,
//! it is taken back for want of space, the process dies): it is `raced` and must be read again, as an entry that waits for every earlier user write
//! and that later ones wait for.
//!
//! The table is a vector that is scanned: it is as long as the queue is deep, and a scan of 256 entries costs less than a tree's
//! rebalancing. `tests` compare it with a naive model.

use alloc::vec::Vec;

use crate::units::BlockRange;

/// Names an entry; given by the caller, rising.
pub type EntryId = u64;

/// What an entry is to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// A client's write or zero, or a repair: later reads wait for it once it is issued.
    User,
    /// A resync or rebuild copy: reads do not wait for it, they go to its source.
    Copy,
    /// A read.
    Read,
    /// A read that was raced.
    ReadAgain,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Entry {
    id: EntryId,
    range: BlockRange,
    class: Class,
    /// Entries that must go first.
    blockers: u32,
    /// When it was issued, in the order of `RangeLock::clock`; 0: not yet.
    issued: u64,
    /// When it came.
    arrived: u64,
    /// A read: an overlapping user write was issued while it was under way.
    raced: bool,
    /// A user write: it is final for readers, and its range is still taken (mirror rule 32).
    behind: bool,
}

impl Entry {
    /// Whether `self`, which came later, was counted as waiting for `earlier`.
    fn waits_for(&self, earlier: &Self) -> bool {
        if !self.range.overlaps(earlier.range) {
            return false;
        }
        match (self.class, earlier.class) {
            (Class::Read, Class::User) => earlier.issued != 0 && earlier.issued < self.arrived && !earlier.behind,
            (Class::ReadAgain, Class::User) | (Class::User, Class::ReadAgain) => true,
            (Class::User | Class::Copy, Class::User | Class::Copy) => true,
            (Class::Read | Class::ReadAgain, _) | (_, Class::Read | Class::ReadAgain) => false,
        }
    }
}

/// The table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RangeLock {
    entries: Vec<Entry>,
    clock: u64,
}

impl RangeLock {
    /// An empty table.
    pub const fn new() -> Self {
        Self { entries: Vec::new(), clock: 0 }
    }

    /// Puts an entry at the end of the table. `true`: nothing is before it; it is issued now.
    pub fn acquire(&mut self, id: EntryId, range: BlockRange, class: Class) -> bool {
        debug_assert!(!range.is_empty());
        self.clock += 1;
        let mut entry = Entry { id, range, class, blockers: 0, issued: 0, arrived: self.clock, raced: false, behind: false };
        entry.blockers = self.entries.iter().filter(|earlier| entry.waits_for(earlier)).count() as u32;
        if entry.blockers == 0 {
            self.clock += 1;
            entry.issued = self.clock;
        }
        let granted = entry.blockers == 0;
        self.entries.push(entry);
        if granted && class == Class::User {
            self.race(range);
        }
        granted
    }

    /// A user write of this range is issued.
    fn race(&mut self, range: BlockRange) {
        for read in self.entries.iter_mut().filter(|read| read.class == Class::Read && read.issued != 0) {
            read.raced |= read.range.overlaps(range);
        }
    }

    /// An issued user write is final for readers, and goes on to hold its range against writes: reads do not wait for it any more. Appends those
    /// that nothing is before now.
    pub fn let_reads_by(&mut self, id: EntryId, woken: &mut Vec<EntryId>) {
        let Some(at) = self.entries.iter().position(|entry| entry.id == id) else { return };
        let by = self.entries[at].clone();
        self.entries[at].behind = true;
        for reader in at + 1..self.entries.len() {
            let entry = &mut self.entries[reader];
            if entry.class == Class::Read && entry.blockers > 0 && entry.waits_for(&by) {
                entry.blockers -= 1;
                if entry.blockers == 0 {
                    self.clock += 1;
                    entry.issued = self.clock;
                    let range = entry.range;
                    woken.push(entry.id);
                    self.entries[reader].raced |= self.beside(range);
                }
            }
        }
    }

    /// Whether an overlapping user write was issued while this read was under way.
    pub fn raced(&self, id: EntryId) -> bool {
        self.entries.iter().any(|entry| entry.id == id && entry.raced)
    }

    /// Takes an entry away and appends those that nothing is before any more, in order of arrival; they are issued now.
    pub fn release(&mut self, id: EntryId, woken: &mut Vec<EntryId>) {
        let Some(at) = self.entries.iter().position(|entry| entry.id == id) else {
            debug_assert!(false, "released an entry that is not there");
            return;
        };
        let gone = self.entries.remove(at);
        if gone.class == Class::Read {
            return;
        }
        let before = woken.len();
        for entry in &mut self.entries[at..] {
            if entry.blockers > 0 && entry.waits_for(&gone) {
                entry.blockers -= 1;
                if entry.blockers == 0 {
                    self.clock += 1;
                    entry.issued = self.clock;
                    woken.push(entry.id);
                }
            }
        }
        for id in &woken[before..] {
            let Some(at) = self.entries.iter().position(|entry| entry.id == *id) else { continue };
            let (class, range) = (self.entries[at].class, self.entries[at].range);
            match class {
                Class::User => self.race(range),
                // What came while it waited for another write is under way beside it.
                Class::Read => self.entries[at].raced |= self.beside(range),
                Class::Copy | Class::ReadAgain => {}
            }
        }
    }

    /// Whether a user write of this range is issued and not released.
    fn beside(&self, range: BlockRange) -> bool {
        let beside = |entry: &Entry| entry.class == Class::User && entry.issued != 0 && !entry.behind;
        self.entries.iter().any(|entry| beside(entry) && entry.range.overlaps(range))
    }

    /// Asserts that no two issued exclusive entries overlap and that every count is what the table says.
    pub fn check_invariants(&self) {
        for (i, entry) in self.entries.iter().enumerate() {
            let blockers = self.entries[..i].iter().filter(|earlier| entry.waits_for(earlier)).count();
            assert_eq!(entry.blockers as usize, blockers, "range lock: {entry:?}");
            assert_eq!(entry.blockers == 0, entry.issued != 0, "range lock: {entry:?}");
        }
    }
}

#[cfg(test)]
mod tests;
