//! Bounded exploration: not some histories of the mirror but all of them, within small bounds.
//!
//! ```text
//!  scenario -> state -- every event --> state -- ... breadth first, each different state once
//!                |  every crash: every image that it may leave, each different image once
//!                v
//!              assembly, resync, return of the leg that is OUT, in one fixed order -> what may be read, are the legs equal
//! ```
//! **Bounds.** A volume on which two blocks are ever written, in one region or in two. Up to N writes that overlap in every way, and a
//! flush, or a read of the client's. One fault: a leg's operation of any kind fails and leaves what was there, what was to be there, or
//! torn metadata; or a leg is silent past its deadline; or the host fails an operation for a moment. What a lost leg still has outstanding ends at any
//! time after that, or fails with a host's error, or never ends. With two writes time for the two passes that clear a bit. In one family the leg that
//! went OUT returns and is filled, one begins with an unclean stop. A crash at every event, of the process or of the machine. `Family` says what goes
//! together.
//!
//! **What a crash leaves.** Of each block of each leg, independently: what is durable, whatever landed since the last flush that covered it, whatever is in flight.
//! A flush covers what had landed when it was issued, and nothing is durable without one or FUA. A page of metadata is durable when its
//! write has ended, until then old, new or torn. If only the process died, what landed stays. Each image is started with both legs, with each leg alone, and with
//! both and no witness.
//!
//! **Oracles.** What was flushed survives a power cut, and what was answered or read the end of the process; a start is refused if and only if the
//! rules say so; whatever is read after a start is read again, also when all is quiet and when a leg has returned; then the legs are
//! identical and both are IN. In every state, reads of every block, twice, return nothing old; overlapping writes are not
//! on a leg together; nothing is read into memory that a late read may still land in; when nothing is outstanding, but on a lost leg, every request has ended, every failed leg is durably OUT and the legs are
//! identical; nobody gets an error, since there is one fault. `Mirror::check_invariants`, unless it is told not to.
//!
//! **Which states are the same.** Those that are equal, field by field, mirror included: nothing is renamed, so there is no renaming to be wrong. The
//! names are made so that different orders mostly meet all the same: time stands still but for ticks, requests have fixed names, the core counts I/O,
//! entries and records by what was issued, and record ids come from one seed. What a canonical naming would merge beyond that is small: the orders in
//! which things that are outstanding now were issued. Equality is that of 128 bits of SipHash: with n states the probability that any two
//! different ones are taken for one is below n*n / 2^129, for a hundred million 10^-23. The key is fixed, since nobody chooses states to collide.
//!
//! **What is left out without loss.** Writes are submitted in the order of their numbers: the scenarios have their ranges in every order. Work on a disk is done
//! in the moment that it is reported: what it would be between is among what a crash may leave of work in flight, and a read then waits for the
//! write or is itself in flight. A crash adds nothing where the disks' possible remains and the client's knowledge are those of a
//! state that crashed before; equal images have equal recoveries. The reads that look at a state are made on a copy of it, and only where the
//! disks do not hold the same. Time passes for a silent leg when nobody else has anything to do: that it is silent earlier is that its work ends later.
//!
//! **What is left out with loss.** Two faults; a crash in a recovery (`simulator` has both); a failed flush whose disk then forgets what it had not
//! written; a write that fails having done some of its blocks; hangs beside the return of a leg; more than one region in a rebuild.
mod client;
mod crash;
mod disks;
mod recovery;
mod scenarios;
mod search;
mod shell;
mod world;

pub use crate::broken::Broken;
pub use client::Ask;
pub use scenarios::{Begin, Family, Scenario};
pub use search::{Counts, Explorer, Failure};
pub use world::Event;

/// A panic of the core breaks an oracle too.
fn caught<T>(work: impl FnOnce() -> T) -> Result<T, Broken> {
    crate::broken::caught("nothing panics", work)
}
