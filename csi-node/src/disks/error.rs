//! Why a disk cannot be used.

use std::{io, path::PathBuf};

use super::{device::LABEL, file_system::MARKER, probe::ProbeError};
use crate::{state_dir::StateError, tool::ToolError};

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiskError {
    /// Its name leads nowhere.
    #[error("{0}")]
    Path(io::Error),
    /// Its name leads to something else.
    #[error("it is not a block device: take it out of the selection")]
    NotBlock,
    /// The kernel does not say what it is.
    #[error("sysfs: {0}")]
    Sysfs(io::Error),
    /// The kernel does not say what is mounted.
    #[error("/proc/self/mountinfo: {0}")]
    Mounts(io::Error),
    /// It does not open.
    #[error("it cannot be opened: {0}")]
    Open(io::Error),
    /// Nobody knows what is on it.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// mkfs or mount failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A record of it failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// Something in its file system, or its mount point, failed.
    #[error("{path}: {source}")]
    Io {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It has our label and other files.
    #[error(
        "its label says {LABEL}, but {MARKER} is missing and other files are there: it is left alone. Take it out of the selection, or wipe it (wipefs --all) if nothing on it is needed"
    )]
    NoMarker,
}

impl DiskError {
    /// With the path that it is about.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |source| Self::Io { path, source }
    }
}
