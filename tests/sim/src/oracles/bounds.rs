//! How much may be under way (mirror rule 32), and that nothing is done for a request after its end (rules 5 and 6).

use std::collections::BTreeSet;

use lockstep_core::{
    COPY_WINDOW,
    io::{Buffer, LegOp},
    units::BlockRange,
};

/// What one leg has in flight.
#[derive(Clone, Copy, Debug, Default)]
pub struct InFlight {
    /// Reads, writes, zeroes and searches for data.
    pub data: u64,
    /// Flushes.
    pub flushes: u64,
    /// Superblocks.
    pub superblocks: u64,
    /// Lists of bad blocks.
    pub lists: u64,
    /// Bitmap pages.
    pub pages: u64,
}

/// One request has one piece of work on a leg, a copy one on one leg; flushes, superblocks, lists and each bitmap page go one at a time.
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

/// What is behind on a slow leg, in writes and blocks (mirror rule 32). `called`: how many writes the mirror says.
pub fn behind(called: u64, (writes, blocks): (u64, u64), (most_writes, most_blocks): (u64, u64)) -> Result<(), String> {
    if called.max(writes) <= most_writes && blocks <= most_blocks {
        return Ok(());
    }
    Err(format!("{writes} writes of {blocks} blocks are behind, {called} are called so"))
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

/// A part of a memory that I/O uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which blocks of it.
    pub blocks: BlockRange,
    /// The I/O fills it.
    pub filled: bool,
}

/// What an operation does with its memory.
pub fn memory(op: &LegOp) -> Option<Part> {
    let (range, buffer, filled) = match op {
        LegOp::Read { range, buffer } => (range, buffer, true),
        LegOp::Write { range, buffer, .. } => (range, buffer, false),
        _ => return None,
    };
    let (Buffer::Request { skip, .. } | Buffer::Copy { skip, .. }) = *buffer;
    Some(Part { blocks: BlockRange::new(skip, skip + range.len()), filled })
}

/// What one I/O fills, late or not, belongs to it until it ends (mirror rule 27).
pub fn unshared(new: Part, others: impl Iterator<Item = Part>) -> Result<(), String> {
    for other in others {
        if other.blocks.overlaps(new.blocks) && (other.filled || new.filled) {
            return Err(format!("memory that is in use as {other:?} is given to {new:?}"));
        }
    }
    Ok(())
}
