//! DeleteVolume: the object is marked; its node removes the legs and then its finalizer.

use kube::Resource;
use lockstep_proto::{
    csi::{DeleteVolumeRequest, DeleteVolumeResponse},
    objects::MirrorVolume,
};
use lockstep_store::{Error as StoreError, Store};

use crate::{
    Controller, Error,
    volume::{VolumeId, being_deleted, status},
    wait::{Deadline, Over},
};

impl<S: Store> Controller<S> {
    pub(crate) async fn delete(&self, request: DeleteVolumeRequest, deadline: Deadline) -> Result<DeleteVolumeResponse, Error> {
        let id = VolumeId::given(request.volume_id)?;
        if !lockstep_store::is_name(id.as_str()) {
            // No object can have this name.
            return Ok(DeleteVolumeResponse {});
        }
        let _busy = self.busy.enter(&id)?;
        let mut changes = self.store.changes::<MirrorVolume>().await?;
        let mut marked = None;
        loop {
            let Some(volume) = self.store.get::<MirrorVolume>(id.as_str()).await? else { return Ok(DeleteVolumeResponse {}) };
            if marked.as_ref().is_some_and(|uid| *uid != volume.meta().uid) {
                // It is gone; this is a new one of the same name, which nobody asked us to delete.
                return Ok(DeleteVolumeResponse {});
            }
            if let Some(device) = status(&volume).device {
                return Err(Error::InUse { id, node: volume.spec.node, device });
            }
            if !being_deleted(&volume) {
                match self.store.delete(id.as_str(), Some(&volume)).await {
                    // It may have been staged in between.
                    Err(StoreError::Conflict { .. }) => continue,
                    Ok(()) | Err(StoreError::NotFound { .. }) => {
                        marked = Some(volume.meta().uid.clone());
                        continue;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            marked = Some(volume.meta().uid.clone());
            deadline.change(&mut changes, &self.ending).await.map_err(|over| match over {
                Over::Ending => Error::Ending,
                Over::Deadline => {
                    let what = format!("remove its legs (it says {:?})", status(&volume).message);
                    Error::Waiting { id: id.clone(), node: volume.spec.node.clone(), what }
                }
            })?;
        }
    }
}
