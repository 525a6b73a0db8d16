//! From bytes on disk to a decision: the codec of format version 1 against a naive reader, every flipped bit, images that must always open,
//! and assembly against a model that knows what was acknowledged.
#![allow(missing_docs)]

mod assembly;
mod codec;
mod decisions;
mod flips;
mod golden;
mod naive;
mod node;
mod strategies;
