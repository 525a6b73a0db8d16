//! What a CreateVolume asks for, once it is validated.

use std::collections::BTreeMap;

use lockstep_proto::{
    TOPOLOGY_KEY, capacity,
    csi::{CapacityRange, CreateVolumeRequest, Topology, TopologyRequirement},
    objects::{FsType, MirrorVolume, MirrorVolumeSpec, VolumeMode},
    parameters,
};

use crate::{
    Error,
    capability::{self, Usage},
    nodes::Nodes,
    volume::VolumeId,
};

/// A volume that is wanted.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) id: VolumeId,
    pub(crate) bytes: u64,
    pub(crate) placement: Placement,
    csi_name: String,
    range: CapacityRange,
    usage: Usage,
    parameters: BTreeMap<String, String>,
    /// The claim that it is for, as namespace/name.
    pub(crate) claim: Option<String>,
}

/// Where it may be.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placement {
    /// These, in this order,
    preferred: Vec<String>,
    /// and then the rest of these. Empty: all that are preferred; all nodes, if none is.
    requisite: Vec<String>,
}

impl Placement {
    fn of(requirement: TopologyRequirement) -> Result<Self, Error> {
        let node =
            |field: &'static str| move |topology: Topology| topology.segments.get(TOPOLOGY_KEY).cloned().ok_or(Error::Missing { field });
        let requisite = requirement.requisite.into_iter().map(node("the segment topology.lockstep.io/node of a requisite topology"));
        let preferred = requirement.preferred.into_iter().map(node("the segment topology.lockstep.io/node of a preferred topology"));
        Ok(Self { preferred: preferred.collect::<Result<_, _>>()?, requisite: requisite.collect::<Result<_, _>>()? })
    }

    fn allows(&self, node: &str) -> bool {
        let allowed = if self.requisite.is_empty() { &self.preferred } else { &self.requisite };
        allowed.is_empty() || allowed.iter().any(|allowed| allowed == node)
    }

    /// The nodes to try, in order: as preferred, then by room, then those that have no disk of ours (which the answer then says).
    pub(crate) fn order(&self, nodes: &Nodes) -> Vec<String> {
        let mut order: Vec<String> = Vec::new();
        for node in self.preferred.iter().cloned().chain(nodes.by_room()).chain(self.requisite.iter().cloned()) {
            if self.allows(&node) && !order.contains(&node) {
                order.push(node);
            }
        }
        order
    }
}

impl Wanted {
    /// # Errors
    /// What is missing or wrong: then nothing was applied.
    pub(crate) fn of(request: CreateVolumeRequest) -> Result<Self, Error> {
        // Destructured: a field that CSI adds does not go unseen. `secrets`: we have none.
        let CreateVolumeRequest {
            name,
            capacity_range,
            volume_capabilities,
            parameters,
            secrets: _,
            volume_content_source,
            accessibility_requirements,
            mutable_parameters,
        } = request;
        let id = VolumeId::of_name(&name)?;
        if volume_content_source.is_some() {
            let field = "volume_content_source";
            return Err(Error::Argument { field, value: "given".into(), allowed: "a new volume is empty; copies are not supported yet" });
        }
        parameters::parse(&mutable_parameters)?;
        if let Some(name) = mutable_parameters.into_keys().next() {
            return Err(Error::MutableParameter { name });
        }
        parameters::parse(&parameters)?;
        let (claim, parameters) = (parameters::claim(&parameters), parameters::own(&parameters));
        let usage = match capability::common(&volume_capabilities)? {
            Usage::Filesystem(fs_type) => Usage::Filesystem(Some(fs_type.unwrap_or(FsType::Ext4))),
            Usage::Block => Usage::Block,
        };
        // CSI: a range names at least one of its two fields; 0 is "not given". Without a range the size is ours to choose.
        if capacity_range == Some(CapacityRange::default()) {
            let allowed = "name a size in required_bytes or limit_bytes, or leave capacity_range out for a volume of 1 GiB";
            return Err(Error::Argument { field: "capacity_range", value: "0 bytes".into(), allowed });
        }
        let range = capacity_range.unwrap_or_default();
        let bytes = capacity::volume_bytes(range.required_bytes, range.limit_bytes, minimum(usage))?;
        let placement = accessibility_requirements.map(Placement::of).transpose()?.unwrap_or_default();
        Ok(Self { id, bytes, placement, csi_name: name, range, usage, parameters, claim })
    }

    fn mode(&self) -> (VolumeMode, Option<FsType>) {
        match self.usage {
            Usage::Filesystem(fs_type) => (VolumeMode::Filesystem, fs_type),
            Usage::Block => (VolumeMode::Block, None),
        }
    }

    /// The object, on a node.
    pub(crate) fn on(&self, node: &str) -> MirrorVolume {
        let (volume_mode, fs_type) = self.mode();
        let spec = MirrorVolumeSpec {
            csi_name: self.csi_name.clone(),
            capacity_bytes: self.bytes,
            node: node.to_owned(),
            volume_mode,
            fs_type,
            parameters: self.parameters.clone(),
            claim: self.claim.clone(),
        };
        MirrorVolume::new(self.id.as_str(), spec)
    }

    /// Whether a volume that exists is the one that is wanted.
    ///
    /// # Errors
    /// `Error::Different`: in what it differs.
    pub(crate) fn compare(&self, volume: &MirrorVolume) -> Result<(), Error> {
        let MirrorVolumeSpec { csi_name, capacity_bytes, node, volume_mode: _, fs_type: _, parameters, claim: _ } = &volume.spec;
        let (CapacityRange { required_bytes, limit_bytes }, size) = (self.range, i128::from(*capacity_bytes));
        let in_range = size >= i128::from(required_bytes) && (limit_bytes == 0 || size <= i128::from(limit_bytes));
        let difference = if *csi_name != self.csi_name {
            Some(format!("for the name {csi_name:?} and not {:?}", self.csi_name))
        } else if !in_range {
            Some(format!("it has {size} bytes, and {required_bytes} to {limit_bytes} (0: any) are wanted"))
        } else if let Some(mismatch) = capability::mismatch(volume, self.usage) {
            Some(mismatch)
        } else if *parameters != self.parameters {
            Some(format!("its parameters are {parameters:?} and not {:?}", self.parameters))
        } else if !self.placement.allows(node) {
            Some(format!("it is on node {node}, which is not among those wanted"))
        } else {
            None
        };
        difference.map_or(Ok(()), |difference| Err(Error::Different { id: self.id.clone(), difference }))
    }
}

/// The smallest volume that can be used so, in bytes.
pub(crate) fn minimum(usage: Usage) -> u64 {
    match usage {
        Usage::Filesystem(Some(FsType::Xfs)) => capacity::MIN_XFS_BYTES,
        Usage::Filesystem(_) | Usage::Block => capacity::ROUNDING,
    }
}
