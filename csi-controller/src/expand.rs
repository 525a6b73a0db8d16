//! ControllerExpandVolume: the size in the object is raised; its node makes the legs longer, or says that it cannot.
//!
//! ```text
//!  spec == status --raise--> spec > status --node--> spec == status ==> the answer
//!        ^                        '--------> refused == spec ==> taken back, OUT_OF_RANGE (the PVC can be lowered again)
//!        '-----------------------------------------'
//! ```

use lockstep_proto::{
    capacity::{ROUNDING, SizeError, volume_bytes},
    csi::{CapacityRange, ControllerExpandVolumeRequest, ControllerExpandVolumeResponse},
    objects::{LocalDisk, MirrorVolume, MirrorVolumeStatus},
};
use lockstep_store::{Error as StoreError, Store};

use crate::{
    Controller, Error, capability, nodes,
    volume::{VolumeId, bytes, status},
    wait::{Deadline, Over},
};

impl<S: Store> Controller<S> {
    pub(crate) async fn expand(
        &self,
        request: ControllerExpandVolumeRequest,
        deadline: Deadline,
    ) -> Result<ControllerExpandVolumeResponse, Error> {
        let id = VolumeId::given(request.volume_id)?;
        let range = request.capacity_range.ok_or(Error::Missing { field: "capacity_range" })?;
        let usage = request.volume_capability.map(|capability| capability::common(&[capability])).transpose()?;
        let _busy = self.busy.enter(&id)?;
        let mut changes = self.store.changes::<MirrorVolume>().await?;
        loop {
            let volume = self.ready(&id).await?;
            if let Some(value) = usage.and_then(|usage| capability::mismatch(&volume, usage)) {
                return Err(Error::Argument { field: "volume_capability", value, allowed: "use the volume's own" });
            }
            let MirrorVolumeStatus { capacity_bytes: present, refused_capacity_bytes: refused, message, .. } = status(&volume);
            let pending = volume.spec.capacity_bytes;
            let wanted = wanted(&id, range, present)?;
            if present >= wanted {
                return Ok(ControllerExpandVolumeResponse { capacity_bytes: bytes(present), node_expansion_required: true });
            }
            if pending > present && refused == Some(pending) {
                let taken_back = self.set_size(volume, present).await?;
                if taken_back && pending <= wanted {
                    return Err(Error::CannotGrow { id, wanted, why: format!("its node says {message:?}") });
                }
                // A larger size was refused: the smaller one may fit.
            } else if pending >= wanted {
                deadline.change(&mut changes, &self.ending).await.map_err(|over| match over {
                    Over::Ending => Error::Ending,
                    Over::Deadline => {
                        let what = format!("grow it from {present} to {pending} bytes (it says {message:?})");
                        Error::Waiting { id: id.clone(), node: volume.spec.node.clone(), what }
                    }
                })?;
            } else if refused.is_some() {
                // A refusal of the past must not be taken for the answer to this call.
                let mut volume = volume;
                volume.status.get_or_insert_default().refused_capacity_bytes = None;
                unless_lost(self.store.update_status(volume).await)?;
            } else {
                self.check_room(&id, &volume, wanted, present).await?;
                self.set_size(volume, wanted).await?;
            }
        }
    }

    /// Whether it was set; if not, the object changed and is to be looked at again.
    async fn set_size(&self, mut volume: MirrorVolume, bytes: u64) -> Result<bool, Error> {
        volume.spec.capacity_bytes = bytes;
        unless_lost(self.store.update(volume).await)
    }

    /// A disk that is away does not count: a leg that comes back is made longer then.
    async fn check_room(&self, id: &VolumeId, volume: &MirrorVolume, wanted: u64, present: u64) -> Result<(), Error> {
        for leg in status(volume).legs {
            let disk: Option<LocalDisk> = match self.store.get(&leg.disk).await {
                // What no object can be called is no disk that is there.
                Err(StoreError::Name { .. }) => None,
                found => found?,
            };
            let (more, free) = (wanted - present, disk.as_ref().and_then(nodes::free));
            if let Some(free) = free.filter(|free| *free < more) {
                let why = format!("disk {} has {free} bytes free, and {more} are needed", leg.disk);
                return Err(Error::CannotGrow { id: id.clone(), wanted, why });
            }
        }
        Ok(())
    }
}

/// The size that is wanted: the present one, if only a limit is given.
fn wanted(id: &VolumeId, range: CapacityRange, present: u64) -> Result<u64, Error> {
    let CapacityRange { required_bytes, limit_bytes } = range;
    let wanted = match (required_bytes, limit_bytes) {
        (0, 0) => return Err(Error::Missing { field: "capacity_range.required_bytes" }),
        (0, limit) if limit < 0 => return Err(SizeError::Negative(limit).into()),
        (0, _) => present,
        (required, limit) => volume_bytes(required, limit, ROUNDING)?,
    };
    let larger = limit_bytes > 0 && i128::from(present) > i128::from(limit_bytes);
    if larger { Err(Error::Larger { id: id.clone(), present, limit: limit_bytes }) } else { Ok(wanted) }
}

/// Whether it was stored: false if somebody else was faster.
fn unless_lost<T>(stored: Result<T, StoreError>) -> Result<bool, Error> {
    match stored {
        Ok(_) => Ok(true),
        Err(StoreError::Conflict { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
