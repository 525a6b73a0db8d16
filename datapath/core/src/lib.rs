//! Being written (the design comment comes with the code).
#![no_std]
#![deny(unsafe_code)]
extern crate alloc;
pub mod assembly;
pub mod format;
pub mod io;
mod mirror;
pub mod status;
pub mod units;
pub use mirror::{COPY_BLOCKS, COPY_WINDOW, Mirror};
