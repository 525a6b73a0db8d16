//! How much may be under way (mirror rule 32), and that nothing is done for a request after its end (rules 5 and 6).

use std::collections::BTreeSet;

use lockstep_core::{COPY_WINDOW, units::BlockRange};

/// What one leg has in flight.
#[derive(Clone, Copy, Debug, Default)]
pub struct InFlight {
    /// Reads, writes, zeroes and searches for data.
    pub data: u64,
    /// Flushes.
    pub flushes: u64,
    /// Superblocks.
    pub superblocks: u64,
    /// Bitmap pages.
    pub pages: u64,
    /// Lists of bad blocks.
    pub lists: u64,
}

/// One request has one piece of work on a leg, a copy one on one leg; flushes, superblocks and each bitmap page go one at a time.
pub fn in_flight(leg: InFlight, requests: u64, pages: u64) -> Result<(), String> {
    let within =
        leg.data <= requests + u64::from(COPY_WINDOW) && leg.flushes <= 1 && leg.superblocks <= 1 && leg.lists <= 1 && leg.pages <= pages;
    if within { Ok(()) } else { Err(format!("{leg:?} on one leg for {requests} requests")) }
}

/// What the mirror says of itself, against what it was asked.
pub fn status(pending: u64, requests: u64, dirty: u64, regions: u64) -> Result<(), String> {
    if pending > requests {
        return Err(format!("{pending} requests are called pending, of {requests}"));
    }
    if dirty > regions { Err(format!("{dirty} of {regions} regions are called dirty")) } else { Ok(()) }
}

/// While both legs count, a bitmap page makes no region dirty beyond the cap (mirror rule 17), or beyond one request that touches more.
pub fn capped(before: &BTreeSet<u64>, page: &BTreeSet<u64>, cap: u64) -> Result<(), String> {
    let after: BTreeSet<u64> = before.union(page).copied().collect();
    let within = after.len() == before.len() || after.len() as u64 <= cap;
    if within { Ok(()) } else { Err(format!("{before:?} are dirty, {page:?} are to be, and the cap is {cap}")) }
}

/// Two writes of one block are never under way to one leg at once (mirror rules 3 and 6).
pub fn exclusive(new: BlockRange, in_flight: impl Iterator<Item = BlockRange>) -> Result<(), String> {
    for other in in_flight {
        if other.overlaps(new) {
            return Err(format!("{new:?} is written while {other:?} is under way to the same leg"));
        }
    }
    Ok(())
}
