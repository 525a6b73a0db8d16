//! What only looks: volumes one by one and in pages, their capabilities, and the room that is left.

use lockstep_proto::{
    TOPOLOGY_KEY,
    csi::{
        ControllerGetVolumeRequest, ControllerGetVolumeResponse, GetCapacityRequest, GetCapacityResponse, ListVolumesRequest,
        ListVolumesResponse, ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse, controller_get_volume_response,
        list_volumes_response::Entry, validate_volume_capabilities_response::Confirmed,
    },
    objects::{MirrorVolume, VolumePhase},
    parameters,
};
use lockstep_store::{Error as StoreError, Listing, Store};

use crate::{
    Controller, Error,
    capability::{self, Usage},
    volume::{VolumeId, answer, being_deleted, bytes, phase},
    wanted,
};

/// What a page's token begins with; the last volume's id follows. So a volume that is deleted between two pages does no harm.
const TOKEN: &str = "after/";

impl<S: Store> Controller<S> {
    /// A volume that is there, perhaps on its way out.
    async fn existing(&self, id: &VolumeId) -> Result<MirrorVolume, Error> {
        let found: Option<MirrorVolume> = match self.store.get(id.as_str()).await {
            // What cannot be a name names nothing.
            Err(StoreError::Name { .. }) => None,
            found => found?,
        };
        let volume = found.ok_or_else(|| Error::NotFound { id: id.clone() })?;
        match phase(&volume) {
            VolumePhase::Ready => Ok(volume),
            VolumePhase::Allocating => Err(Error::BeingCreated { id: id.clone() }),
            VolumePhase::Rejected => Err(Error::NotFound { id: id.clone() }),
        }
    }

    /// A volume that is there to stay.
    pub(crate) async fn ready(&self, id: &VolumeId) -> Result<MirrorVolume, Error> {
        let volume = self.existing(id).await?;
        if being_deleted(&volume) { Err(Error::BeingDeleted { id: id.clone() }) } else { Ok(volume) }
    }

    pub(crate) async fn get(&self, request: ControllerGetVolumeRequest) -> Result<ControllerGetVolumeResponse, Error> {
        let volume = self.existing(&VolumeId::given(request.volume_id)?).await?;
        // We publish nothing from here, and say so.
        let status = Some(controller_get_volume_response::VolumeStatus::default());
        Ok(ControllerGetVolumeResponse { volume: Some(answer(&volume)), status })
    }

    pub(crate) async fn list(&self, request: ListVolumesRequest) -> Result<ListVolumesResponse, Error> {
        let ListVolumesRequest { max_entries, starting_token } = request;
        let allowed = "0 (all) or more entries";
        let value = max_entries.to_string();
        let most = usize::try_from(max_entries).map_err(|_| Error::Argument { field: "max_entries", value, allowed })?;
        let after = match starting_token.strip_prefix(TOKEN) {
            Some(id) => id,
            None if starting_token.is_empty() => "",
            None => return Err(Error::Token { token: starting_token }),
        };
        let Listing { objects, unreadable } = self.store.list::<MirrorVolume>().await?;
        if let Some(error) = unreadable.into_iter().next() {
            return Err(error.into());
        }
        let mut volumes: Vec<_> = objects.iter().filter(|volume| phase(volume) == VolumePhase::Ready).map(answer).collect();
        volumes.sort_by(|one, other| one.volume_id.cmp(&other.volume_id));
        volumes.retain(|volume| volume.volume_id.as_str() > after);
        let page = if most == 0 { volumes.len() } else { most.min(volumes.len()) };
        let rest = volumes.split_off(page);
        let last = volumes.last().filter(|_| !rest.is_empty());
        let next_token = last.map(|last| format!("{TOKEN}{}", last.volume_id)).unwrap_or_default();
        let entries = volumes.into_iter().map(|volume| Entry { volume: Some(volume), status: None }).collect();
        Ok(ListVolumesResponse { entries, next_token })
    }

    pub(crate) async fn validate(&self, request: ValidateVolumeCapabilitiesRequest) -> Result<ValidateVolumeCapabilitiesResponse, Error> {
        let id = VolumeId::given(request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(Error::Missing { field: "volume_capabilities" });
        }
        let volume = self.existing(&id).await?;
        let given = parameters::own(&request.parameters);
        let problem = match capability::common(&request.volume_capabilities) {
            Err(error) => Some(error.to_string()),
            Ok(usage) => capability::mismatch(&volume, usage),
        };
        let problem = problem
            .or_else(|| request.volume_context.keys().next().map(|name| format!("a volume has no volume_context, and {name:?} is given")))
            .or_else(|| (given != volume.spec.parameters && !given.is_empty()).then(|| "its parameters are others".to_owned()))
            .or_else(|| request.mutable_parameters.keys().next().map(|name| Error::MutableParameter { name: name.clone() }.to_string()));
        let confirmed = Confirmed {
            volume_context: request.volume_context,
            volume_capabilities: request.volume_capabilities,
            parameters: request.parameters,
            mutable_parameters: request.mutable_parameters,
        };
        Ok(match problem {
            None => ValidateVolumeCapabilitiesResponse { confirmed: Some(confirmed), message: String::new() },
            Some(message) => ValidateVolumeCapabilitiesResponse { confirmed: None, message },
        })
    }

    /// The provisioner gives the StorageClass's parameters here as they are, with the sidecars' own: those are ignored, or no node would
    /// have a capacity and every pod would wait for ever.
    pub(crate) async fn room(&self, request: GetCapacityRequest) -> Result<GetCapacityResponse, Error> {
        parameters::parse(&request.parameters)?;
        let usage = match request.volume_capabilities.as_slice() {
            [] => Usage::Filesystem(None),
            capabilities => capability::common(capabilities)?,
        };
        let nodes = self.nodes().await?;
        let room = match request.accessible_topology.filter(|topology| !topology.segments.is_empty()) {
            None => nodes.total(),
            // Where no node of ours is, there is no room.
            Some(topology) => topology.segments.get(TOPOLOGY_KEY).and_then(|node| nodes.get(node)).unwrap_or_default(),
        };
        Ok(GetCapacityResponse {
            available_capacity: bytes(room.available_bytes),
            maximum_volume_size: Some(bytes(room.maximum_volume_bytes)),
            minimum_volume_size: Some(bytes(wanted::minimum(usage))),
        })
    }
}
