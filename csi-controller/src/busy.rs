//! Which volumes a call is at work on.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{Error, volume::VolumeId};

/// The volumes that a call is at work on, in this process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Busy(Arc<Mutex<BTreeSet<VolumeId>>>);

/// Keeps others out until it is dropped: also when its call is dropped.
#[derive(Debug)]
pub(crate) struct Guard {
    busy: Busy,
    id: VolumeId,
}

impl Busy {
    fn ids(&self) -> MutexGuard<'_, BTreeSet<VolumeId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// `Error::Busy`: another call is at work on it.
    pub(crate) fn enter(&self, id: &VolumeId) -> Result<Guard, Error> {
        if self.ids().insert(id.clone()) { Ok(Guard { busy: self.clone(), id: id.clone() }) } else { Err(Error::Busy { id: id.clone() }) }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.busy.ids().remove(&self.id);
    }
}
