//! Both binaries on real disks, driven by a CSI client.
