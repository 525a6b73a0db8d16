//! How a caller wants to use a volume: one validated form of CSI's VolumeCapability.

use lockstep_proto::{
    csi::{VolumeCapability, volume_capability::AccessType, volume_capability::access_mode::Mode},
    objects::{MirrorVolume, VolumeMode},
};

use crate::{error::Error, file_system};

/// A valid capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// With a file system, or bare.
    pub volume_mode: VolumeMode,
    /// The file system that is asked for; empty: whichever it has.
    pub fs_type: String,
    /// Mount options, each as it is: one may contain commas in quotes.
    pub mount_flags: Vec<String>,
    /// Whether more than one target on the node may have it.
    pub many_targets: bool,
    /// Whether it may be written.
    pub read_only: bool,
}

impl Access {
    /// Checks a capability.
    ///
    /// # Errors
    /// `Error::InvalidArgument` naming the field.
    pub fn parse(capability: Option<VolumeCapability>) -> Result<Self, Error> {
        let invalid = |text: &str| Error::InvalidArgument(text.to_owned());
        let capability = capability.ok_or_else(|| invalid("volume_capability is missing"))?;
        let mode = capability.access_mode.ok_or_else(|| invalid("volume_capability.access_mode is missing"))?;
        let (many_targets, read_only) = match mode.mode() {
            Mode::SingleNodeMultiWriter => (true, false),
            Mode::SingleNodeReaderOnly => (true, true),
            Mode::SingleNodeWriter | Mode::SingleNodeSingleWriter => (false, false),
            Mode::Unknown => return Err(invalid("volume_capability.access_mode is unknown")),
            multi => {
                let text = format!("access mode {} spans nodes: a volume is on the disks of one node", multi.as_str_name());
                return Err(Error::InvalidArgument(text));
            }
        };
        let (volume_mode, fs_type, mount_flags) = match capability.access_type {
            Some(AccessType::Block(_)) => (VolumeMode::Block, String::new(), Vec::new()),
            Some(AccessType::Mount(mount)) => (VolumeMode::Filesystem, mount.fs_type, mount.mount_flags),
            None => return Err(invalid("volume_capability.access_type is missing: mount or block")),
        };
        Ok(Self { volume_mode, fs_type, mount_flags, many_targets, read_only })
    }

    /// The volume was made for this.
    ///
    /// # Errors
    /// `Error::InvalidArgument` saying what it was made for.
    pub fn fits(&self, volume: &MirrorVolume) -> Result<(), Error> {
        let made = volume.spec.volume_mode;
        if self.volume_mode != made {
            return Err(Error::InvalidArgument(format!("the volume was created for {made:?}, not for {:?}", self.volume_mode)));
        }
        match volume.spec.fs_type {
            Some(fs_type) if !self.fs_type.is_empty() && self.fs_type != file_system::name(fs_type) => Err(Error::InvalidArgument(
                format!("the volume was created with fs_type {}, not {}", file_system::name(fs_type), self.fs_type),
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use lockstep_proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};

    use super::*;

    fn capability(mode: Mode, access: Option<AccessType>) -> VolumeCapability {
        VolumeCapability { access_mode: Some(AccessMode { mode: mode.into() }), access_type: access }
    }

    #[test]
    fn what_is_missing_or_spans_nodes_is_named() {
        let block = || Some(AccessType::Block(BlockVolume {}));
        let said = |capability| Access::parse(capability).unwrap_err().to_string();
        assert!(said(None).contains("volume_capability"));
        assert!(said(Some(VolumeCapability { access_type: block(), ..Default::default() })).contains("access_mode"));
        assert!(said(Some(capability(Mode::SingleNodeWriter, None))).contains("access_type"));
        assert!(said(Some(capability(Mode::MultiNodeMultiWriter, block()))).contains("MULTI_NODE_MULTI_WRITER"));
        assert!(!Access::parse(Some(capability(Mode::SingleNodeSingleWriter, block()))).unwrap().many_targets);
    }

    #[test]
    fn a_volume_is_used_as_it_was_made() {
        let spec = serde_json::from_str(r#"{"csiName":"v","capacityBytes":1,"node":"n","volumeMode":"Filesystem","fsType":"xfs"}"#);
        let volume = MirrorVolume::new("v", spec.unwrap());
        let mount = |fs_type: &str| {
            let mount = MountVolume { fs_type: fs_type.into(), ..Default::default() };
            Access::parse(Some(capability(Mode::SingleNodeWriter, Some(AccessType::Mount(mount))))).unwrap()
        };
        mount("").fits(&volume).unwrap();
        mount("xfs").fits(&volume).unwrap();
        assert!(mount("ext4").fits(&volume).unwrap_err().to_string().contains("fs_type xfs"));
    }
}
