//! What the disks must hold when something is answered or cleared, and when all is quiet.

use std::collections::BTreeSet;

/// One leg as an oracle sees it.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations)]
pub struct Leg<'a> {
    /// The place, for the message.
    pub place: usize,
    /// What a read of a block returns now, and what a power cut would leave at worst.
    pub holds: &'a dyn Fn(u64) -> (u64, u64),
    /// It says that it flushed, and did not.
    pub lies: bool,
}

/// A write was answered: every leg that the durable record counts has it, and has it durably if it is FUA (mirror rules 8, 16).
pub fn write_answered(legs: &[Leg<'_>], blocks: std::ops::Range<u64>, value: u64, fua: bool) -> Result<(), String> {
    for leg in legs {
        for block in blocks.clone() {
            let (now, durable) = (leg.holds)(block);
            if now != value {
                return Err(format!("block {block} of leg {} holds {now} when the write of {value} is answered", leg.place));
            }
            if fua && durable != value && !leg.lies {
                return Err(format!("block {block} of leg {} is not durable when the FUA write of {value} is answered", leg.place));
            }
        }
    }
    Ok(())
}

/// A flush was answered: every leg that the durable record counts holds durably what it covers (mirror rule 15).
pub fn flush_answered(legs: &[Leg<'_>], covered: &[(u64, u64)], at_least: impl Fn(u64, u64, u64) -> bool) -> Result<(), String> {
    for leg in legs.iter().filter(|leg| !leg.lies) {
        for &(block, id) in covered {
            let (_, durable) = (leg.holds)(block);
            if !at_least(block, durable, id) {
                return Err(format!("block {block} of leg {} durably holds {durable}, but version {id} is flushed", leg.place));
            }
        }
    }
    Ok(())
}

/// All is quiet, or a region is called clean: the legs are identical there.
pub fn identical(legs: [Leg<'_>; 2], blocks: &BTreeSet<u64>) -> Result<(), String> {
    for &block in blocks {
        let [(a, _), (b, _)] = legs.map(|leg| (leg.holds)(block));
        if a != b {
            return Err(format!("block {block} holds {a} on one leg and {b} on the other"));
        }
    }
    Ok(())
}
