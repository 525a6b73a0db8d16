//! The pure core of a Lockstep mirror: all decisions about the data, none of the performing.
//!
//! ```text
//!   events in                      effects out
//!   ---------> [ state machine ] --------------> leg I/O, metadata, witness, answers, notices
//! ```
//! Data bytes never enter it; buffers are named by tag. An effect that needs earlier durability is asked for only after that
//! durability was reported, so whoever performs the effects needs no barriers of its own.
//!
//! Vocabulary: a *leg* is one copy; IN = counted for reads and answers, OUT = stale, RECOVERING = being filled. The unit is the
//! 4096-byte block. A *region* (16 MiB) is the unit of the write-intent bitmap. An *epoch* counts membership records.
#![no_std]

extern crate alloc;

pub mod assembly;
mod bad_blocks;
mod bitmap;
pub mod fault;
pub mod format;
pub mod io;
pub mod membership;
mod mirror;
mod page;
mod range_lock;
pub mod status;
pub mod units;

pub use mirror::{COPY_BLOCKS, COPY_WINDOW, Mirror};
