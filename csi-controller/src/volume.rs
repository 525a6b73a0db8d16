//! A volume's id, and what its object says.

use std::{fmt, time::Duration};

use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use lockstep_proto::{
    FINALIZER, TOPOLOGY_KEY, csi,
    objects::{MirrorVolume, MirrorVolumeStatus, VolumePhase},
};
use sha2::{Digest, Sha256};

use crate::Error;

/// The longest name that CSI allows, in bytes.
const LONGEST_NAME: usize = 128;

/// A volume's CSI id: its object's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VolumeId(String);

impl VolumeId {
    /// Of a new volume: its name if an object can have it, else a hash of it. Two names can have one id only on purpose; the original is
    /// in the object and is compared.
    pub(crate) fn of_name(name: &str) -> Result<Self, Error> {
        match name.len() {
            0 => Err(Error::Missing { field: "name" }),
            1..=LONGEST_NAME if lockstep_store::is_name(name) => Ok(Self(name.to_owned())),
            1..=LONGEST_NAME => {
                let hash: String = Sha256::digest(name).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
                Ok(Self(format!("v-{hash}")))
            }
            length => Err(Error::LongName { length, longest: LONGEST_NAME }),
        }
    }

    /// Of a volume that there may be.
    pub(crate) fn given(id: String) -> Result<Self, Error> {
        if id.is_empty() { Err(Error::Missing { field: "volume_id" }) } else { Ok(Self(id)) }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the node says; what a new object has, if it said nothing yet.
pub(crate) fn status(volume: &MirrorVolume) -> MirrorVolumeStatus {
    volume.status.clone().unwrap_or_default()
}

/// Whether what the node says is about this object, and not about an earlier one of the name.
fn observed(volume: &MirrorVolume) -> bool {
    volume.status.as_ref().is_some_and(|status| status.observed_uid == volume.meta().uid)
}

/// How far it is, as far as the node's word counts.
pub(crate) fn phase(volume: &MirrorVolume) -> VolumePhase {
    if observed(volume) { status(volume).phase } else { VolumePhase::Allocating }
}

/// Whether its node has put its finalizer on it: from then on there may be something on its disks.
pub(crate) fn claimed(volume: &MirrorVolume) -> bool {
    volume.meta().finalizers.iter().flatten().any(|finalizer| finalizer == FINALIZER)
}

pub(crate) fn being_deleted(volume: &MirrorVolume) -> bool {
    volume.meta().deletion_timestamp.is_some()
}

/// How long it exists, by this machine's clock.
pub(crate) fn age(volume: &MirrorVolume) -> Duration {
    volume.meta().creation_timestamp.as_ref().map_or(Duration::ZERO, |created| since(created.0))
}

/// How long ago it was; zero for the future.
pub(crate) fn since(moment: Timestamp) -> Duration {
    Duration::try_from(Timestamp::now().duration_since(moment)).unwrap_or_default()
}

/// As CSI has it. It can be used on the node that it IS on, whatever the call asked for.
pub(crate) fn answer(volume: &MirrorVolume) -> csi::Volume {
    csi::Volume {
        capacity_bytes: bytes(status(volume).capacity_bytes),
        volume_id: volume.meta().name.clone().unwrap_or_default(),
        accessible_topology: vec![csi::Topology { segments: [(TOPOLOGY_KEY.to_owned(), volume.spec.node.clone())].into() }],
        ..csi::Volume::default()
    }
}

/// As CSI has it.
pub(crate) fn bytes(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_its_own_id_if_an_object_can_have_it() {
        assert_eq!(VolumeId::of_name("pvc-0b1c").unwrap().as_str(), "pvc-0b1c");
        let longest = "a".repeat(128);
        assert_eq!(VolumeId::of_name(&longest).unwrap().as_str(), longest);
        // printf '%s' 'a/b' | sha256sum
        assert_eq!(VolumeId::of_name("a/b").unwrap().as_str(), "v-c14cddc033f64b9dea80ea675cf280a0");
        for name in ["A", "a..b", "../x", "-a", "snow☃"] {
            let id = VolumeId::of_name(name).unwrap();
            assert!(id.as_str().starts_with("v-") && lockstep_store::is_name(id.as_str()), "{id}");
        }
        assert!(matches!(VolumeId::of_name(""), Err(Error::Missing { .. })));
        assert!(matches!(VolumeId::of_name(&"a".repeat(129)), Err(Error::LongName { length: 129, .. })));
    }
}
