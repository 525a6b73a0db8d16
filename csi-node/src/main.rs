//! The CSI node plugin.
fn main() {}
