//! What can go wrong with a call, and the gRPC code that says so.

use std::{io, path::PathBuf};

use lockstep_datapath::core::units::Errno;
use tonic::{Code, Status};

use crate::{state_dir::StateError, tool::ToolError};

/// Why a call was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller's mistake: it names the field.
    #[error("{0}")]
    InvalidArgument(String),
    /// There is no such volume on this node.
    #[error("volume {0} does not exist on this node")]
    NoVolume(String),
    /// There is no such path for the volume.
    #[error("volume {volume} is not at {path}")]
    NoPath {
        /// The volume.
        volume: String,
        /// The path that was asked for.
        path: PathBuf,
    },
    /// csi-node has just started.
    #[error("the disks of this node are still being looked at: try again")]
    Starting,
    /// Another operation on the volume is under way.
    #[error("another operation on volume {0} is under way: try again")]
    Busy(String),
    /// The volume is there with other arguments.
    #[error("{0}")]
    Incompatible(String),
    /// It cannot be done as things are: what has to change first.
    #[error("{0}")]
    Precondition(String),
    /// What is on the device is not what was put there.
    #[error("{0}")]
    DataLoss(String),
    /// The object store.
    #[error(transparent)]
    Store(#[from] lockstep_store::Error),
    /// The mirror.
    #[error(transparent)]
    Datapath(#[from] lockstep_datapath::Error),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// mkfs, fsck, mount.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The system.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The work was lost: a bug.
    #[error("the work on volume {0} ended in a panic: see the log")]
    Panicked(String),
}

impl Error {
    /// With what was tried.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        |source| Self::Io { what, source }
    }

    /// Whether it says that a disk is full.
    pub fn is_no_space(&self) -> bool {
        let full = |error: &io::Error| error.kind() == io::ErrorKind::StorageFull;
        match self {
            Self::Datapath(lockstep_datapath::Error::Io { source, .. }) | Self::Io { source, .. } => full(source),
            Self::Datapath(lockstep_datapath::Error::Mirror(errno)) => *errno == Errno::ENOSPC,
            _ => false,
        }
    }

    /// The one place where codes are chosen (CSI specification, error schemes of the Node service).
    fn code(&self) -> Code {
        use lockstep_datapath::Error as Mirror;
        use lockstep_store::Error as Store;
        match self {
            Self::InvalidArgument(_) => Code::InvalidArgument,
            Self::NoVolume(_) | Self::NoPath { .. } => Code::NotFound,
            // As csi-controller has it: whoever was faster is done by the next call, and what cannot be read or reached can be later. What was asked may
            // have happened. So nothing of this is final.
            Self::Busy(_) | Self::Store(Store::Conflict { .. } | Store::AlreadyExists { .. } | Store::NotFound { .. }) => Code::Aborted,
            Self::Store(Store::Unreadable { .. } | Store::Name { .. } | Store::Api { .. } | Store::Io { .. }) => Code::Unavailable,
            Self::Incompatible(_) => Code::AlreadyExists,
            Self::Precondition(_) => Code::FailedPrecondition,
            Self::DataLoss(_) => Code::DataLoss,
            // The caller comes again; by then the operator has acted, or the old I/O is over.
            Self::Datapath(
                Mirror::Refused(_) | Mirror::Damaged { .. } | Mirror::AllDamaged { .. } | Mirror::Meta { .. } | Mirror::Truncated { .. },
            ) => Code::FailedPrecondition,
            Self::Starting | Self::Datapath(Mirror::LegBusy { .. } | Mirror::Gone | Mirror::Stuck(_)) => Code::Unavailable,
            Self::Datapath(Mirror::Io { .. } | Mirror::Mirror(_) | Mirror::NoFlush { .. } | Mirror::Holder(_) | Mirror::Panicked) => {
                Code::Internal
            }
            Self::State(_) | Self::Tool(_) | Self::Io { .. } | Self::Panicked(_) => Code::Internal,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Status::new(error.code(), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use lockstep_store::Error as Store;

    use super::*;

    #[test]
    fn nothing_that_the_store_says_is_final() {
        let (kind, name) = (|| "MirrorVolume".to_owned(), || "v".to_owned());
        for (error, code) in [
            (Store::NotFound { kind: kind(), name: name() }, Code::Aborted),
            (Store::AlreadyExists { kind: kind(), name: name() }, Code::Aborted),
            (Store::Conflict { kind: kind(), name: name() }, Code::Aborted),
            (Store::Name { name: "Not/A:Name".into() }, Code::Unavailable),
            (Store::Unreadable { path: "v.yaml".into(), reason: "no YAML".into() }, Code::Unavailable),
            (Store::Io { what: "reading v.yaml".into(), source: io::ErrorKind::PermissionDenied.into() }, Code::Unavailable),
        ] {
            assert_eq!(Error::from(error).code(), code);
        }
    }
}
