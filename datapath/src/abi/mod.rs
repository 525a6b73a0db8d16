//! The kernel's ABI, nothing else: no policy here.

pub(crate) mod fuse;
pub(crate) mod loop_device;
pub(crate) mod mount;
pub(crate) mod xfs;
