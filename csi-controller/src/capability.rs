//! How a volume may be used.

use lockstep_proto::{
    csi::{
        VolumeCapability,
        volume_capability::{AccessType, access_mode::Mode},
    },
    objects::{FsType, MirrorVolume, VolumeMode},
};

use crate::Error;

/// What one or several capabilities ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Usage {
    /// A file system; `None`: any.
    Filesystem(Option<FsType>),
    /// The bare device.
    Block,
}

/// # Errors
/// If a capability is incomplete, or asks for what no volume of ours can do.
fn usage(capability: &VolumeCapability) -> Result<Usage, Error> {
    let field = "volume_capability.access_mode.mode";
    let mode = capability.access_mode.as_ref().ok_or(Error::Missing { field })?;
    let mode = mode.mode;
    match Mode::try_from(mode).unwrap_or(Mode::Unknown) {
        Mode::SingleNodeWriter | Mode::SingleNodeReaderOnly | Mode::SingleNodeSingleWriter | Mode::SingleNodeMultiWriter => {}
        refused @ (Mode::Unknown | Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter) => {
            let value = if refused == Mode::Unknown { mode.to_string() } else { refused.as_str_name().to_owned() };
            return Err(Error::Argument { field, value, allowed: "a volume is on one node: use a SINGLE_NODE mode (ReadWriteOnce)" });
        }
    }
    match &capability.access_type {
        None => Err(Error::Missing { field: "volume_capability.access_type" }),
        Some(AccessType::Block(_)) => Ok(Usage::Block),
        Some(AccessType::Mount(mount)) => match mount.fs_type.as_str() {
            "" => Ok(Usage::Filesystem(None)),
            "ext4" => Ok(Usage::Filesystem(Some(FsType::Ext4))),
            "xfs" => Ok(Usage::Filesystem(Some(FsType::Xfs))),
            other => {
                let field = "volume_capability.mount.fs_type";
                Err(Error::Argument { field, value: format!("{other:?}"), allowed: "use ext4 or xfs" })
            }
        },
    }
}

/// What all of them ask for.
///
/// # Errors
/// If there is none, if one is refused, or if they cannot be met by one volume.
pub(crate) fn common(capabilities: &[VolumeCapability]) -> Result<Usage, Error> {
    let field = "volume_capabilities";
    let mut common: Option<Usage> = None;
    for capability in capabilities {
        common = Some(match (common, usage(capability)?) {
            (None, usage) => usage,
            (Some(Usage::Block), Usage::Block) => Usage::Block,
            (Some(Usage::Filesystem(one)), Usage::Filesystem(other)) if one.is_none() || other.is_none() || one == other => {
                Usage::Filesystem(one.or(other))
            }
            (Some(Usage::Filesystem(_)), Usage::Filesystem(_)) => {
                return Err(Error::Argument { field, value: "ext4 and xfs at once".into(), allowed: "a volume has one file system" });
            }
            (Some(_), _) => {
                return Err(Error::Argument { field, value: "mount and block at once".into(), allowed: "a volume is either" });
            }
        });
    }
    common.ok_or(Error::Missing { field })
}

/// What keeps a volume from being used so; `None`: nothing.
pub(crate) fn mismatch(volume: &MirrorVolume, usage: Usage) -> Option<String> {
    match (volume.spec.volume_mode, usage) {
        (VolumeMode::Block, Usage::Block) => None,
        (VolumeMode::Block, Usage::Filesystem(_)) => Some("it is a raw block volume, without a file system".into()),
        (VolumeMode::Filesystem, Usage::Block) => Some("it has a file system and is not for raw block use".into()),
        (VolumeMode::Filesystem, Usage::Filesystem(wanted)) => {
            let has = volume.spec.fs_type.unwrap_or(FsType::Ext4);
            wanted.filter(|wanted| *wanted != has).map(|wanted| format!("its file system is {} and not {}", name(has), name(wanted)))
        }
    }
}

fn name(fs_type: FsType) -> &'static str {
    match fs_type {
        FsType::Ext4 => "ext4",
        FsType::Xfs => "xfs",
    }
}
