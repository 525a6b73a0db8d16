//! Keeps the FUSE connections of a node's volumes open while csi-node is killed, upgraded or restarted.
//!
//! ```text
//!  csi-node (old) --Put(volume, /dev/fuse)--> fuse-holder --Get(volume)--> csi-node (new)
//!        |                                        |                             |
//!        +---------- the same open /dev/fuse -----+-----------------------------+
//! ```
//! A FUSE connection ends, and every request on it with an error, when the last descriptor of its `/dev/fuse` is closed. The holder keeps one
//! descriptor for each volume, so that what the kernel asked for and the dead csi-node did not answer is still there for the next one, which
//! has the kernel send it again.
//!
//! Guarantees:
//! - One csi-node at a time has the descriptors: `Hello` is answered with `Busy` as long as a thread of the one before may still run code of
//!   its own. Threads that are being killed and hang in the kernel do not count: nothing new comes from them, and what they had in the
//!   kernel is fenced by the legs' locks.
//! - It never has a leg's descriptor, which would defeat that fence: only `/dev/fuse` is taken.
//! - It hardly ever changes: a request of another version of the protocol is answered with its own version, and nothing else is done.
//!
//! Vocabulary: a *connection* here is a volume's FUSE connection; a *client* is a csi-node.

mod client;
mod process;
mod protocol;
mod server;

pub use client::{Error, Holder};
pub use protocol::VERSION;
pub use server::{Server, bind};
