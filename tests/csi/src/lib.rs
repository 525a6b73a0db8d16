//! Both binaries on real disks, driven by a CSI client.
//!
//! ```text
//! lab: blank disks (images on loop devices) -- failed from below by the kernel
//! driver: csi-node and csi-controller as ordinary processes, in standalone mode, started, stopped, killed
//! client: the calls that Kubernetes would make, over the two sockets
//! ```

pub mod client;
pub mod driver;
pub mod kills;
pub mod lab;
pub mod load;
pub mod memory;
