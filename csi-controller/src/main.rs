//! The CSI controller.
fn main() {}
