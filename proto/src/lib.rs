//! What two processes must agree on, and what both do alike. No policy of volumes here.
//!
//! ```text
//! sidecars, kubelet --csi over a unix socket (endpoint, rpc_log)--> controller, node
//! CreateVolume -> MirrorVolume.spec (controller) -> the node named in it claims and allocates -> MirrorVolume.status -> answer
//! a blank disk -> LocalDisk (node) -> capacity (controller)
//! ```

pub mod capacity;
pub mod crds;
pub mod endpoint;
pub mod logging;
pub mod objects;
pub mod parameters;
pub mod probes;
pub mod rpc_log;

/// The Container Storage Interface: what `csi.proto` says, as Rust. Maps are ordered.
#[allow(missing_docs, clippy::all)]
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// The kubelet's plugin registration: what `registration.proto` says, as Rust.
#[allow(missing_docs, clippy::all)]
pub mod registration {
    tonic::include_proto!("pluginregistration");
}

/// The CSI driver's name.
pub const DRIVER_NAME: &str = "csi.lockstep.io";
/// The topology key; its value is the node's name, for ever.
pub const TOPOLOGY_KEY: &str = "topology.lockstep.io/node";
/// The finalizer by which a node claims a volume.
pub const FINALIZER: &str = "lockstep.io/legs";
