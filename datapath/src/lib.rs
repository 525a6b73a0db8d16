//! The shell of a Lockstep mirror: performs what `lockstep-core` decides.
//!
//! ```text
//!  file system -> /dev/loopN (direct I/O) -> a FUSE mount whose root is one regular file
//!                                              |
//!  datapath thread:  requests -> [ lockstep-core ] -> tokio-uring on the two legs' files, O_DIRECT
//! ```
//! Guarantees: one thread owns one mirror, nothing on the data path is locked; the payload is copied once, before both legs; memory
//! is bounded and allocated once a thread, but for disks that hang (`buffers.rs`); a mirror that panics fails alone.
//!
//! What may block - opening and fencing legs, mounting, loop devices - happens on the caller's blocking pool, never on a datapath thread; what
//! may wait for a device that this process serves, in a process of its own (`errand`).

mod abi;
mod buffers;
mod compare;
mod connection;
mod disk_queue;
pub mod errand;
mod error;
mod fence;
mod isolated;
mod landing;
mod leg;
mod mounts;
mod thread;
mod volume;

mod device;
mod handle;

pub use device::kernel_can_resend;
pub use error::Error;
pub use handle::{Datapath, LegPath, Settings, Volume, VolumeSpec};
pub use leg::{create_leg, create_witness, extend_leg};
pub use lockstep_core as core;
pub use lockstep_fuse_holder::{Error as HolderError, Holder};
pub use mounts::bind_read_only;
