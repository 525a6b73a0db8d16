//! The objects in which controller and node meet (group `lockstep.io`, version `v1alpha1`, cluster scoped).

// It takes the columns for repetitions of each other.
#![allow(clippy::duplicated_attributes)]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One disk that a node may use.
#[derive(CustomResource, Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "lockstep.io",
    version = "v1alpha1",
    kind = "LocalDisk",
    doc = "A disk that a node may use. csi-node makes one for each that its configuration selects, and keeps it.",
    shortname = "ld",
    category = "lockstep",
    status = "LocalDiskStatus",
    selectable = ".spec.node",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.node"),
    printcolumn(
        name = "Capacity",
        type_ = "integer",
        format = "int64",
        json_path = ".status.capacityBytes",
        description = "Bytes that volumes can have"
    ),
    printcolumn(
        name = "Allocated",
        type_ = "integer",
        format = "int64",
        json_path = ".status.allocatedBytes",
        description = "Bytes that volumes have"
    ),
    printcolumn(name = "Model", type_ = "string", json_path = ".status.identity.model"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Serial", type_ = "string", priority = 1, json_path = ".status.identity.serial"),
    printcolumn(name = "Physical", type_ = "string", priority = 1, json_path = ".status.identity.physical"),
    printcolumn(name = "Message", type_ = "string", priority = 1, json_path = ".status.message")
)]
#[serde(rename_all = "camelCase")]
pub struct LocalDiskSpec {
    /// The node that the disk is in. It changes when the disk is plugged into another one.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
}

/// What the node says about a disk.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LocalDiskStatus {
    /// Which disk it is, wherever it is plugged in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<DiskIdentity>,
    /// Bytes that volumes can have.
    #[serde(default)]
    pub capacity_bytes: u64,
    /// Bytes that volumes have.
    #[serde(default)]
    pub allocated_bytes: u64,
    /// How far it is.
    #[serde(default)]
    pub phase: DiskPhase,
    /// Why, and what to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// In the Kubernetes way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// What does not change when a disk moves to another slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiskIdentity {
    /// The UUID of our file system on it.
    pub fs_uuid: String,
    /// The serial number, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The world wide name, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wwn: Option<String>,
    /// The model, where it says one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The whole disk, or all whole disks that it is made of (` + ` between them): two that share one are not a pair.
    pub physical: String,
    /// Its size.
    pub size_bytes: u64,
}

impl DiskIdentity {
    /// The whole disks that it is made of.
    pub fn physical_disks(&self) -> impl Iterator<Item = &str> {
        self.physical.split(" + ")
    }
}

/// How far a disk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum DiskPhase {
    /// It was not looked at yet.
    #[default]
    Pending,
    /// It is blank and is being formatted.
    Formatting,
    /// It can be used.
    Ready,
    /// Something is on it: it is left alone.
    Refused,
    /// It is gone, or gives errors.
    Failed,
}

/// One volume. Its name is the CSI volume id.
///
/// The API refuses what would not be carried out: another node, name, mode or file system, and less than it has. A directory of objects
/// checks nothing.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[kube(
    group = "lockstep.io",
    version = "v1alpha1",
    kind = "MirrorVolume",
    doc = "A volume that is mirrored on two disks of its node. Its name is the CSI volume id.",
    shortname = "mv",
    category = "lockstep",
    status = "MirrorVolumeStatus",
    selectable = ".spec.node",
    printcolumn(
        name = "Health",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].reason"#,
        description = "Of the mirror, since it was first staged"
    ),
    printcolumn(name = "Leg-1", type_ = "string", json_path = ".status.legs[0].state"),
    printcolumn(name = "Leg-2", type_ = "string", json_path = ".status.legs[1].state"),
    printcolumn(
        name = "Rebuild-%",
        type_ = "integer",
        format = "int32",
        json_path = r#".status.legs[?(@.state=="Recovering")].progressPercent"#
    ),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Size", type_ = "integer", format = "int64", json_path = ".status.capacityBytes", description = "Bytes"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.node"),
    printcolumn(name = "Claim", type_ = "string", json_path = ".spec.claim"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Device", type_ = "string", priority = 1, json_path = ".status.device", description = "While it is staged"),
    printcolumn(name = "Disk-1", type_ = "string", priority = 1, json_path = ".status.legs[0].disk"),
    printcolumn(name = "Disk-2", type_ = "string", priority = 1, json_path = ".status.legs[1].disk"),
    printcolumn(name = "Degraded", type_ = "string", priority = 1, json_path = r#".status.conditions[?(@.type=="Degraded")].message"#),
    printcolumn(name = "Message", type_ = "string", priority = 1, json_path = ".status.message"),
    // What was asked for and refused may be taken back, down to what the volume has. A status that lags is nobody's fault.
    validation = Rule::new("self.spec.capacityBytes >= oldSelf.spec.capacityBytes || !has(self.status) || self.spec.capacityBytes >= self.status.capacityBytes")
        .field_path(".spec.capacityBytes")
        .message("capacityBytes cannot become less than the volume has: volumes only grow")
)]
#[x_kube(
    validation = Rule::new("self.csiName == oldSelf.csiName").field_path(".csiName").message("csiName cannot be changed"),
    validation = Rule::new("self.node == oldSelf.node").field_path(".node").message("node cannot be changed: a volume stays with its disks"),
    validation = Rule::new("self.volumeMode == oldSelf.volumeMode").field_path(".volumeMode").message("volumeMode cannot be changed"),
    validation = Rule::new("has(self.fsType) == has(oldSelf.fsType) && (!has(self.fsType) || self.fsType == oldSelf.fsType)").message("fsType cannot be changed"),
    validation = Rule::new("has(self.fsType) == (self.volumeMode == 'Filesystem')").message("fsType belongs to volumeMode Filesystem, and to it only")
)]
#[serde(rename_all = "camelCase")]
pub struct MirrorVolumeSpec {
    /// The name in the CSI call.
    #[schemars(length(min = 1, max = 128))]
    pub csi_name: String,
    /// The size that is wanted, in bytes.
    #[schemars(range(min = 1))]
    pub capacity_bytes: u64,
    /// The node that it is placed on.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    /// How it is used.
    pub volume_mode: VolumeMode,
    /// The file system, fixed at creation; none for raw block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs_type: Option<FsType>,
    /// The parameters of its StorageClass, as they were given.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, String>,
    /// The claim that it was made for, as namespace/name: for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<String>,
}

/// How a volume is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum VolumeMode {
    /// With a file system.
    Filesystem,
    /// As a block device.
    Block,
}

/// The file systems that a volume can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FsType {
    /// ext4
    Ext4,
    /// XFS
    Xfs,
}

/// What the node says about a volume.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MirrorVolumeStatus {
    /// How far it is.
    #[serde(default)]
    pub phase: VolumePhase,
    /// Why, in one CamelCase word.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Why, and what to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The UID of the object that the node claimed, before it touched a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_uid: Option<String>,
    /// The size that it has: its legs are at least this long.
    #[serde(default)]
    pub capacity_bytes: u64,
    /// A size that its disks had no room for, when it was asked to grow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused_capacity_bytes: Option<u64>,
    /// Of the membership record. It lags: it may only veto.
    #[serde(default)]
    pub epoch: u64,
    /// The two copies.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub legs: Vec<LegStatus>,
    /// What is on the device.
    #[serde(default)]
    pub format: FormatStatus,
    /// The block device, while it is staged: it is in use then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Blocks of 4096 bytes in which the two copies differed when they were last compared, and that are as they were.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub mismatched_blocks: u64,
    /// In the Kubernetes way: Ready, Degraded, Rebuilding, Scrubbed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// How far a volume is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum VolumePhase {
    /// Its node is to claim and allocate it.
    #[default]
    Allocating,
    /// Both legs are there.
    Ready,
    /// The node cannot have it: nothing of it exists there.
    Rejected,
}

/// One copy.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LegStatus {
    /// The LocalDisk that it is on.
    pub disk: String,
    /// Its id.
    pub leg_id: String,
    /// What it counts for.
    pub state: LegState,
    /// How far its rebuild is.
    #[schemars(range(max = 100))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress_percent: Option<u8>,
    /// What it failed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// What a leg counts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum LegState {
    /// It is current.
    In,
    /// It is stale.
    Out,
    /// It is being filled.
    Recovering,
}

/// What is on the device. Only a volume that was never fully formatted may be formatted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FormatStatus {
    /// How far it is.
    #[serde(default)]
    pub state: FormatState,
    /// The file system's UUID, once it is formatted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs_uuid: Option<String>,
}

/// How far formatting is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum FormatState {
    /// Nothing was ever put on it.
    #[default]
    Never,
    /// A mkfs began: what it left is wiped and formatted again.
    Formatting,
    /// It holds a file system.
    Formatted,
}

#[cfg(test)]
mod tests {
    use kube::{CustomResourceExt, ResourceExt};

    use super::*;

    #[test]
    fn the_objects_have_their_names_of_the_field() {
        for (crd, plural, short) in [(LocalDisk::crd(), "localdisks", "ld"), (MirrorVolume::crd(), "mirrorvolumes", "mv")] {
            assert_eq!(crd.name_any(), format!("{plural}.lockstep.io"));
            assert_eq!(crd.spec.names.short_names, Some(vec![short.to_owned()]));
            assert_eq!(crd.spec.scope, "Cluster");
            assert!(crd.spec.versions[0].subresources.as_ref().is_some_and(|resources| resources.status.is_some()));
        }
    }

    #[test]
    fn an_object_of_an_older_version_without_the_newer_fields_is_read() {
        let status: MirrorVolumeStatus = serde_json::from_str("{}").unwrap();
        assert_eq!(status, MirrorVolumeStatus::default());
        assert_eq!((status.phase, status.format.state), (VolumePhase::Allocating, FormatState::Never));
    }
}
