//! Both binaries on loop disks. One program: each links a gRPC client and a runtime, and they take longer to build than to run.
#![allow(missing_docs)]

mod bad_input;
mod containers;
mod cut_off;
mod disks;
mod failures;
mod growth;
mod health;
mod hung;
mod kept;
mod kills;
mod quarantine;
mod restart;
mod scrub;
mod surroundings;
mod survival;
mod upgrade;
mod volumes;
mod write_behind;
