//! What is asked of every decoder, whatever it is given: no panic, nothing larger than it may be, and decoding, encoding and decoding again gives
//! the same.
//!
//! `fuzzers` (a workspace of its own: it compiles libFuzzer) hands these functions what libFuzzer thinks of, `tests` what proptest does: a target
//! that does not fit its decoder any more fails where there is no fuzzer, too.

mod bitmap;
mod fuse;
mod input;
mod parameters;
mod superblock;

pub use {bitmap::bitmap, fuse::fuse, parameters::parameters, superblock::superblock};

/// The decoder of the shell's, which shows it to nobody else.
#[allow(dead_code)]
#[path = "../../../datapath/src/abi/fuse.rs"]
mod fuse_abi;

/// By path, so that a fuzzer does not instrument all of a Kubernetes client.
#[path = "../../../proto/src/parameters.rs"]
mod volume_parameters;
