//! What a call can end with, and the one place that chooses its gRPC code.

use lockstep_proto::{capacity::SizeError, parameters::ParameterError};
use tonic::{Code, Status};

use crate::volume::VolumeId;

/// Why a call was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field that must be there.
    #[error("{field} is missing")]
    Missing {
        /// Its name in CSI.
        field: &'static str,
    },
    /// A field that cannot be so.
    #[error("{field} cannot be {value}: {allowed}")]
    Argument {
        /// Its name in CSI.
        field: &'static str,
        /// What was given.
        value: String,
        /// What can be given.
        allowed: &'static str,
    },
    /// A name that is too long.
    #[error("name has {length} bytes: at most {longest} are allowed")]
    LongName {
        /// Its bytes.
        length: usize,
        /// The most.
        longest: usize,
    },
    /// A parameter.
    #[error(transparent)]
    Parameter(#[from] ParameterError),
    /// No parameter can be changed yet.
    #[error("mutable parameter {name:?} is not supported: a volume's parameters are those of its StorageClass")]
    MutableParameter {
        /// Its name.
        name: String,
    },
    /// A size.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The volume is larger than it may be.
    #[error("volume {id} has {present} bytes already, more than the limit of {limit}: a volume is never made smaller")]
    Larger {
        /// The volume.
        id: VolumeId,
        /// Its size.
        present: u64,
        /// What the call allows.
        limit: i64,
    },
    /// Its disks have no room to grow.
    #[error("volume {id} cannot grow to {wanted} bytes: {why}. Ask for less, or delete volumes that lie on the same disk")]
    CannotGrow {
        /// The volume.
        id: VolumeId,
        /// The size that was asked for.
        wanted: u64,
        /// Which disk, and what it has.
        why: String,
    },
    /// Another volume has the name.
    #[error("volume {id} exists, but {difference}")]
    Different {
        /// The volume.
        id: VolumeId,
        /// What is different, and how.
        difference: String,
    },
    /// No node can take it. Nothing of it exists.
    #[error(
        "no node can take a volume of {bytes} bytes: {}. Ask for less, or add disks; why a disk is not used says status.message of its LocalDisk",
        if refusals.is_empty() { "no node has two usable disks" } else { refusals.as_str() }
    )]
    NoRoom {
        /// Its size.
        bytes: u64,
        /// What each node says.
        refusals: String,
    },
    /// There is no such volume.
    #[error("volume {id} does not exist")]
    NotFound {
        /// The volume.
        id: VolumeId,
    },
    /// It is staged.
    #[error("volume {id} is in use on node {node} as {device}: unstage it there first")]
    InUse {
        /// The volume.
        id: VolumeId,
        /// Where.
        node: String,
        /// Its block device.
        device: String,
    },
    /// Another call is at work on it.
    #[error("another call is at work on volume {id}: repeat this one later")]
    Busy {
        /// The volume.
        id: VolumeId,
    },
    /// It is going away.
    #[error("volume {id} is being deleted: repeat the call later")]
    BeingDeleted {
        /// The volume.
        id: VolumeId,
    },
    /// It is not there yet.
    #[error("volume {id} is still being created: repeat the call later")]
    BeingCreated {
        /// The volume.
        id: VolumeId,
    },
    /// It went away, or another took its name.
    #[error("volume {id} was deleted in the meantime: repeat the call")]
    Vanished {
        /// The volume.
        id: VolumeId,
    },
    /// It is no token of ours.
    #[error("{token:?} is not a token of ListVolumes: list again from the beginning")]
    Token {
        /// What was given.
        token: String,
    },
    /// The time is over. It may still happen.
    #[error("volume {id} waits for node {node} to {what}: repeat the call")]
    Waiting {
        /// The volume.
        id: VolumeId,
        /// Its node.
        node: String,
        /// What it has to do, and what it says.
        what: String,
    },
    /// This process ends.
    #[error("the controller is ending: repeat the call")]
    Ending,
    /// The store.
    #[error(transparent)]
    Store(#[from] lockstep_store::Error),
}

impl Error {
    /// What each means to the sidecars is in the design of the CSI surface; see the crate's documentation for which are final.
    fn code(&self) -> Code {
        match self {
            Self::Missing { .. } | Self::Argument { .. } | Self::LongName { .. } | Self::Parameter(_) | Self::MutableParameter { .. } => {
                Code::InvalidArgument
            }
            Self::Size(_) | Self::Larger { .. } | Self::CannotGrow { .. } => Code::OutOfRange,
            Self::Different { .. } => Code::AlreadyExists,
            Self::NoRoom { .. } => Code::ResourceExhausted,
            Self::NotFound { .. } => Code::NotFound,
            Self::InUse { .. } => Code::FailedPrecondition,
            Self::Busy { .. } | Self::BeingDeleted { .. } | Self::BeingCreated { .. } | Self::Vanished { .. } | Self::Token { .. } => {
                Code::Aborted
            }
            Self::Waiting { .. } => Code::DeadlineExceeded,
            Self::Ending => Code::Unavailable,
            Self::Store(error) => match error {
                // Whoever changed it did so within this call: the next one sees the result.
                lockstep_store::Error::Conflict { .. }
                | lockstep_store::Error::AlreadyExists { .. }
                | lockstep_store::Error::NotFound { .. } => Code::Aborted,
                // What cannot be read may exist: nothing that is final. A name that no object can have was some object's word for another.
                lockstep_store::Error::Unreadable { .. }
                | lockstep_store::Error::Name { .. }
                | lockstep_store::Error::Api { .. }
                | lockstep_store::Error::Io { .. } => Code::Unavailable,
            },
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
    use lockstep_store::Error as StoreError;

    use super::*;

    #[test]
    fn nothing_that_the_store_says_is_final() {
        let (kind, name) = (|| "MirrorVolume".to_owned(), || "v".to_owned());
        for error in [
            StoreError::NotFound { kind: kind(), name: name() },
            StoreError::AlreadyExists { kind: kind(), name: name() },
            StoreError::Conflict { kind: kind(), name: name() },
            StoreError::Name { name: "Not/A:Name".into() },
            StoreError::Unreadable { path: "v.yaml".into(), reason: "no YAML".into() },
            StoreError::Io { what: "reading v.yaml".into(), source: std::io::ErrorKind::PermissionDenied.into() },
        ] {
            let status = Status::from(Error::from(error));
            assert!(matches!(status.code(), Code::Aborted | Code::Unavailable), "{status}");
        }
    }
}
