//! Memory that csi-node never waits for.
//!
//! What pods write stays in memory until csi-node has written it to the disks. Without free memory the kernel takes what it can get, and csi-node's own
//! pages must not be among that: its code, which would have to be read again, and what it has allocated, where there is swap. So they are locked,
//! each when it is first used: what is locked is what is used, and that is bounded (README, "How fast it is").

use rustix::{
    mm::{MlockAllFlags, mlockall},
    process::{Resource, configure_io_flusher_behavior, getrlimit},
    thread::{CapabilitySet, capabilities},
};
use tracing::{info, warn};

/// From now on, for all threads that are started later too. To be called before any is. What is not permitted is said, with what to do.
pub fn lock() {
    // The datapath's threads say what that means where it is not permitted. The others share locks and memory with them.
    let _ = configure_io_flusher_behavior(true);
    let limit = getrlimit(Resource::Memlock).current;
    let unbounded = limit.is_none() || capabilities(None).is_ok_and(|own| own.effective.contains(CapabilitySet::IPC_LOCK));
    // Below a limit every later allocation could fail, and the limit counts what is only reserved.
    if let Some(limit) = limit.filter(|_| !unbounded) {
        return warn!(
            limit,
            "csi-node's memory is not locked, because RLIMIT_MEMLOCK is set and CAP_IPC_LOCK is missing: without free memory, volumes may wait until its code is \
             read from disk again. Give it CAP_IPC_LOCK or LimitMEMLOCK=infinity"
        );
    }
    match mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT) {
        Ok(()) => info!("csi-node's memory is locked as it is used"),
        Err(error) => {
            warn!(%error, "csi-node's memory is not locked: without free memory, volumes may wait until its code is read from disk again")
        }
    }
}
