//! A simulated world around one mirror: two disks with a volatile cache, a witness, a client, and a schedule drawn from a seed.
//!
//! Fault budget: at any time one disk at most has failed or is being filled again; a crash may come at any event. Within it,
//! - a block reads as its newest acked-and-flushed write or a newer one, after any crash;
//! - a read never returns a write older than the newest one acked before the read was submitted;
//! - every request ends, and each tag is released once;
//! - quiescent legs that are both IN are identical.
//!
//! A block's content is a token: the number of the write that put it there (0: zeroes). Overlapping writes take effect in the order of their
//! submission (mirror rule 4), so tokens of one block rise.

mod broken;
mod disk;
pub mod explore;
mod memory;
pub mod oracles;
mod orders;
mod performing;
pub mod simulator;
mod world;

pub use disk::Disk;
pub use world::{BLOCKS, Rng, VOLUME, World};
