//! The controller's calls on a directory of objects; the tests play the nodes.
#![allow(missing_docs)]

mod create;
mod delete;
mod expand;
mod look;
mod place;
mod race;
mod rig;
mod serve;
