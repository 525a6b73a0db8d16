//! A page of metadata that every leg that counts holds, written in place, in turn to two slots (mirror rule 20).
//!
//! One write of it is in flight at a time; what changes meanwhile goes with the next one.

use crate::units::{Epoch, Slot};

/// What is known of one page. `T`: what the write in flight brings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Page<T> {
    /// Of its newest write.
    pub sequence: u64,
    /// By leg: which slot its newest valid copy is in; the next write goes to the other.
    pub slot: [u8; 2],
    /// The write in flight.
    pub in_flight: Option<T>,
    /// By leg: whether the write in flight is still to be reported.
    pub waiting: [bool; 2],
    /// Something changed since the last write was issued.
    pub changed: bool,
}

impl<T> Page<T> {
    /// Whether it is to be written now.
    pub fn is_due(&self) -> bool {
        self.changed && self.in_flight.is_none()
    }

    /// Whether nothing is under way or to be written.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_none() && !self.changed
    }

    /// Its write is issued.
    pub fn issued(&mut self, content: T) {
        self.changed = false;
        self.sequence += 1;
        self.in_flight = Some(content);
    }

    /// Whether this leg is still to report the write in flight.
    pub fn awaits(&self, slot: Slot) -> bool {
        self.in_flight.is_some() && self.waiting[slot.index()]
    }

    /// This leg has it.
    pub fn written(&mut self, slot: Slot) {
        self.slot[slot.index()] = 1 - self.slot[slot.index()];
        self.waiting[slot.index()] = false;
    }

    /// A leg that was empty, or away, holds none of it: what it is given is newer than anything that it may hold. It was given nothing in this
    /// epoch; how far the sequence had come in an earlier one, nobody knows where the page went bad since. (2^32 writes of one page in one epoch
    /// are more than days of nothing else.)
    pub fn forget(&mut self, slot: Slot, epoch: Epoch) {
        self.sequence = (self.sequence + 1000).max(epoch.0 << 32);
        self.slot[slot.index()] = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_write_is_in_flight_and_each_leg_reports_it_once() {
        let mut page = Page { changed: true, ..Page::default() };
        assert!(page.is_due() && !page.is_idle() && !page.awaits(Slot::A));
        page.issued(7);
        page.waiting = [true, false];
        assert!(page.awaits(Slot::A) && !page.awaits(Slot::B));
        assert!(!page.is_due() && !page.is_idle());
        page.changed = true;
        assert!(!page.is_due(), "what changes meanwhile goes with the next one");
        page.written(Slot::A);
        assert!((page.sequence, page.slot, page.awaits(Slot::A)) == (1, [1, 0], false));
        page.in_flight = None;
        assert!(page.is_due());
        page.waiting = [true; 2];
        page.changed = false;
        assert!(page.is_idle() && !page.awaits(Slot::A));
    }

    #[test]
    fn a_leg_that_was_away_is_given_what_is_newer_than_anything_that_it_may_hold() {
        let mut page: Page<()> = Page { sequence: 7, slot: [1, 1], ..Page::default() };
        page.forget(Slot::B, Epoch(0));
        assert_eq!((page.sequence, page.slot), (1007, [1, 0]));
        // It went bad, and began anew.
        let before = page.sequence;
        page = Page::default();
        page.forget(Slot::B, Epoch(3));
        assert!(page.sequence > before + 1_000_000);
    }
}
