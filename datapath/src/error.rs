//! What can go wrong with a volume.

use std::{io, path::PathBuf};

use lockstep_core::{assembly::Refusal, format::MetaError, units::Errno};

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The legs that were found do not make a mirror that may be used.
    #[error("the mirror cannot be assembled: {0}")]
    Refused(#[from] Refusal),
    /// No leg that was found can be told, though it is there. Nothing was changed.
    #[error(
        "the mirror cannot be assembled: every `meta` of the volume that was found is damaged: {}. If a disk of it is away, bring that back. If not, nothing is lost \
         yet: each `data` beside them can be mounted alone, read-only (README, \"A copy without Lockstep\"), and copied to a new volume",
        metas.iter().map(|meta| meta.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    Damaged {
        /// The `meta` files.
        metas: Vec<PathBuf>,
    },
    /// A leg's metadata cannot be used.
    #[error("{path}: {source}")]
    Meta {
        /// The `meta` file.
        path: PathBuf,
        /// Why.
        source: MetaError,
    },
    /// I/O of an earlier process to a leg is not over, or another process has it.
    #[error("{path} is locked: another process still has I/O on it or has it open")]
    LegBusy {
        /// The `data` file.
        path: PathBuf,
    },
    /// A leg's file is shorter than its volume.
    #[error("{path} has {found} bytes, but the volume has {wanted}: it was truncated")]
    Truncated {
        /// The `data` file.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The volume's size.
        wanted: u64,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The mirror refused a command.
    #[error("the mirror answered {0}")]
    Mirror(Errno),
    /// Who keeps the volumes' connections does not do what it was asked.
    #[error(transparent)]
    Holder(#[from] lockstep_fuse_holder::Error),
    /// The volume is closed, or its datapath thread is gone.
    #[error("the volume is not open any more")]
    Gone,
    /// What looks at the legs panicked: a bug. Nothing but this volume is touched by it.
    #[error("the mirror's code panicked: see the log")]
    Panicked,
    /// The kernel would never send a flush to this device.
    #[error("{device} shows no volatile write cache, so flushes would be lost: refused")]
    NoFlush {
        /// The block device.
        device: PathBuf,
    },
}

/// Gives an `io::Error` its context.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Io { what: what(), source: source.into() })
    }
}
