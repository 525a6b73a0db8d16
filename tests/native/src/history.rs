//! What was written to and read from some blocks, and whether one order of all that explains it.
//!
//! Each write puts a value of its own into a block, so the check is exact (Gibbons and Korach, "Testing shared memories", 1997): a value's
//! operations span a zone, from the first that ended to the last that began. Zones that are proper in that order may not overlap, and none that is
//! not may lie within one that is. Times are a counter's: an operation begins before it is asked for and ends after it is answered.

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Bytes of a block.
pub const BLOCK: usize = 4096;

#[derive(Clone, Copy, Debug)]
struct Zone {
    first_end: u64,
    last_begin: u64,
    /// How the write ended; `None`: it has not, or failed, so it may have happened or not.
    written: Option<u64>,
}

/// The history of some blocks, from many threads.
#[derive(Debug)]
pub struct History {
    clock: AtomicU64,
    blocks: Vec<Mutex<HashMap<u64, Zone>>>,
}

impl History {
    /// Of blocks that have these values now.
    pub fn new(values: &[u64]) -> Self {
        let initial = Zone { first_end: 0, last_begin: 0, written: Some(0) };
        Self { clock: AtomicU64::new(1), blocks: values.iter().map(|value| Mutex::new(HashMap::from([(*value, initial)]))).collect() }
    }

    /// A moment.
    pub fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn block<T>(&self, block: usize, work: impl FnOnce(&mut HashMap<u64, Zone>) -> T) -> T {
        work(&mut self.blocks[block].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A write of this value, which nothing else ever has, is about to be asked for.
    pub fn writes(&self, block: usize, value: u64, begin: u64) {
        self.block(block, |zones| zones.insert(value, Zone { first_end: u64::MAX, last_begin: begin, written: None }));
    }

    /// It was answered with success.
    pub fn wrote(&self, block: usize, value: u64, end: u64) {
        self.block(block, |zones| {
            let zone = zones.get_mut(&value).expect("it was begun");
            zone.first_end = zone.first_end.min(end);
            zone.written = Some(end);
        });
    }

    /// A read found this value.
    ///
    /// # Errors
    /// Nobody had begun to write it.
    pub fn read(&self, block: usize, value: u64, begin: u64, end: u64) -> Result<(), String> {
        self.block(block, |zones| {
            let zone = zones.get_mut(&value).ok_or_else(|| format!("block {block}: {value:#x} was read, which nobody wrote"))?;
            zone.first_end = zone.first_end.min(end);
            zone.last_begin = zone.last_begin.max(begin);
            Ok(())
        })
    }

    /// Whether one order explains everything so far.
    ///
    /// # Errors
    /// A block and the values that do not fit together.
    pub fn check(&self) -> Result<(), String> {
        (0..self.blocks.len())
            .try_for_each(|block| self.block(block, |zones| check_block(zones)).map_err(|text| format!("block {block}: {text}")))
    }

    /// Writes that were answered so far.
    pub fn answered(&self) -> u64 {
        (0..self.blocks.len())
            .map(|block| self.block(block, |zones| zones.values().filter(|zone| zone.written.is_some()).count() as u64))
            .sum()
    }
}

fn check_block(zones: &HashMap<u64, Zone>) -> Result<(), String> {
    // What failed and was never seen may not have happened.
    let happened = zones.iter().filter(|(_, zone)| zone.first_end != u64::MAX);
    let (mut forward, backward): (Vec<_>, Vec<_>) = happened.partition(|(_, zone)| zone.first_end < zone.last_begin);
    forward.sort_by_key(|(_, zone)| zone.first_end);
    for pair in forward.windows(2) {
        let [(one, first), (other, second)] = pair else { continue };
        if second.first_end < first.last_begin {
            return Err(format!("{one:#x} was seen before and after {other:#x}: {first:?}, {second:?}"));
        }
    }
    for (value, zone) in backward {
        // The last proper zone that begins before this one.
        let before = forward.partition_point(|(_, other)| other.first_end < zone.last_begin);
        if let Some((other, around)) = before.checked_sub(1).map(|index| forward[index])
            && around.last_begin > zone.first_end
        {
            return Err(format!("{value:#x} was written and over while {other:#x} was there: {zone:?}, {around:?}"));
        }
    }
    Ok(())
}

/// Fills a block with a value: every word of it depends on the value and the block's number, so that a mixture is seen.
pub fn fill(block: u64, value: u64, bytes: &mut [u8]) {
    let mut word = value;
    for (place, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&word.to_le_bytes());
        word = (value ^ block.rotate_left(32)).wrapping_add(place as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

/// The value of a block; 0: zeroes.
///
/// # Errors
/// It holds what `fill` never made of this block.
pub fn value(block: u64, bytes: &[u8]) -> Result<u64, String> {
    let value = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let mut wanted = [0; BLOCK];
    if value != 0 {
        fill(block, value, &mut wanted);
    }
    if bytes == wanted {
        return Ok(value);
    }
    let at = bytes.iter().zip(wanted).position(|(found, wanted)| *found != wanted).unwrap_or_default();
    Err(format!("block {block}: begins with {value:#x}, and from byte {at} on it is something else"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy)]
    enum Done {
        Wrote(u64),
        Failed(u64),
        Read(u64),
    }
    use Done::{Failed, Read, Wrote};

    /// Operations on one block that has 9: begin, end, what.
    fn explained(operations: &[(u64, u64, Done)]) -> bool {
        let history = History::new(&[9]);
        for (begin, _, done) in operations {
            if let Wrote(value) | Failed(value) = done {
                history.writes(0, *value, *begin);
            }
        }
        for (begin, end, done) in operations {
            match done {
                Wrote(value) => history.wrote(0, *value, *end),
                Failed(_) => {}
                Read(value) => history.read(0, *value, *begin, *end).unwrap(),
            }
        }
        history.check().is_ok()
    }

    #[test]
    fn what_one_order_explains_is_accepted() {
        assert!(explained(&[(1, 2, Wrote(1)), (3, 4, Read(1)), (5, 6, Wrote(2)), (7, 8, Read(2))]));
        // Two writes at once: either first, and a change of mind while both are under way is none.
        assert!(explained(&[(1, 10, Wrote(1)), (2, 9, Wrote(2)), (11, 12, Read(1)), (13, 14, Read(1))]));
        assert!(explained(&[(1, 20, Wrote(1)), (2, 19, Wrote(2)), (3, 4, Read(1)), (5, 6, Read(2)), (21, 22, Read(2))]));
        assert!(explained(&[(1, 10, Wrote(1)), (2, 3, Read(9)), (4, 5, Read(1))]));
        // A write that failed may have happened, or not, or later.
        assert!(explained(&[(1, 2, Failed(1)), (3, 4, Read(9)), (5, 6, Read(1))]));
        assert!(explained(&[(1, 2, Failed(1)), (3, 4, Read(9))]));
    }

    #[test]
    fn what_no_order_explains_is_refused() {
        assert!(!explained(&[(1, 2, Wrote(1)), (3, 4, Read(9))]), "a lost write");
        assert!(!explained(&[(1, 2, Wrote(1)), (3, 4, Wrote(2)), (5, 6, Read(1))]), "a write undone");
        assert!(!explained(&[(1, 20, Wrote(1)), (2, 3, Read(1)), (4, 5, Read(9))]), "new, then old");
        assert!(!explained(&[(1, 20, Wrote(1)), (2, 19, Wrote(2)), (3, 4, Read(1)), (5, 6, Read(2)), (7, 8, Read(1))]), "W1, W2, W1");
        assert!(!explained(&[(1, 2, Failed(1)), (3, 4, Wrote(2)), (5, 6, Read(2)), (7, 8, Read(1)), (9, 10, Read(2))]), "a zombie");
    }

    #[test]
    fn a_value_that_nobody_wrote_and_a_mixture_of_two_are_seen() {
        assert!(History::new(&[9]).read(0, 1, 1, 2).is_err());
        let mut block = [0; BLOCK];
        assert_eq!(value(7, &block), Ok(0));
        fill(7, 0x1234, &mut block);
        assert_eq!(value(7, &block), Ok(0x1234));
        assert!(value(8, &block).is_err(), "another block's");
        fill(7, 0x1235, &mut block[..2048]);
        assert!(value(7, &block).is_err(), "half of one, half of another");
        block[BLOCK - 1] ^= 1;
        assert!(value(7, &block).is_err());
    }
}
