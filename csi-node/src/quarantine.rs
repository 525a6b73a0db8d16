//! A mirror whose assembly takes csi-node with it, again and again, is left alone (mirror rule 33): it would take the node's other volumes too.
//!
//! ```text
//! NodeStage, resume --> counted, durably --> assembled --> serves: the count goes
//!                          |                     |  an orderly error, an orderly end of csi-node: as before
//!                          |                     |  csi-node is gone: the count stays
//!                          +--> three: refused, until a person lifts it
//! ```
//! A SIGKILL counts too: that is how an assembly ends which takes all memory, and nothing tells it from a person's.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use lockstep_proto::objects::MirrorVolume;
use lockstep_store::Store;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    error::Error,
    mirror::report,
    news::news,
    node::{Node, names},
    state_dir::{self, StateDir, StateError},
};

/// The operator wants it tried again; removed when it is.
pub const LIFT_ANNOTATION: &str = "lockstep.io/lift-quarantine";
/// So many ends of csi-node in the middle of assemblies of one volume, none of which came to serve, and it is in quarantine.
const CRASHES: u32 = 3;

/// On disk from before an assembly until it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Attempts {
    /// For a person who looks.
    volume: String,
    /// Assemblies that began and are not known to have ended.
    unfinished: u32,
}

/// What is being assembled, and how often csi-node had ended in that before.
#[derive(Debug, Default)]
pub(crate) struct Assemblies(Mutex<BTreeMap<String, Attempts>>);

impl Assemblies {
    fn take(&self, uid: &str) -> Option<Attempts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(uid)
    }

    fn restore(state: &StateDir, uid: &str, before: &Attempts) -> Result<(), StateError> {
        let path = state.assembling(uid);
        if before.unfinished == 0 { state_dir::remove_record(&path) } else { state_dir::write_record(&path, before) }
    }

    /// csi-node ends in an orderly way: what it did not come to finish did not crash it.
    pub(crate) fn abandon(&self, state: &StateDir) {
        let unfinished = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for (uid, before) in unfinished {
            if let Err(error) = Self::restore(state, &uid, &before) {
                warn!(volume = before.volume, %error, "the end of csi-node will be taken for a crash of this volume's mirror");
            }
        }
    }
}

impl<S: Store> Node<S> {
    /// Counts an assembly before it begins.
    ///
    /// # Errors
    /// `Error::Precondition` if the volume is in quarantine.
    pub(crate) async fn assembly_begins(self: &Arc<Self>, volume: &MirrorVolume) -> Result<(), Error> {
        let (id, uid) = names(volume);
        let path = self.state.assembling(&uid);
        let mut before = state_dir::read_record::<Attempts>(&path)?.unwrap_or(Attempts { volume: id.clone(), unfinished: 0 });
        if before.unfinished >= CRASHES {
            let lifted = volume.metadata.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(LIFT_ANNOTATION));
            if !lifted {
                return Err(self.refuse_quarantined(volume, before.unfinished).await);
            }
            warn!("the quarantine is lifted: the mirror is assembled once more");
            before.unfinished = 0;
            self.change_annotations(&id, |annotations| annotations.remove(LIFT_ANNOTATION).is_some()).await?;
        }
        state_dir::write_record(&path, &Attempts { unfinished: before.unfinished + 1, ..before.clone() })?;
        self.assemblies.0.lock().unwrap_or_else(PoisonError::into_inner).insert(uid, before);
        Ok(())
    }

    /// Whether csi-node ended while it assembled this volume's mirror, and did not come to serve it since.
    pub(crate) fn assembly_crashed(&self, uid: &str) -> bool {
        state_dir::has_record(&self.state.assembling(uid))
    }

    async fn refuse_quarantined(self: &Arc<Self>, volume: &MirrorVolume, crashes: u32) -> Error {
        let (id, uid) = names(volume);
        let message = format!(
            "{id} is in quarantine: csi-node ended {crashes} times while it assembled this volume's mirror, and with it the node's other volumes. Nothing \
             is done to its copies. Look for the reason in csi-node's log before each of those ends; then annotate the MirrorVolume with \
             {LIFT_ANNOTATION}: now, and stage it again"
        );
        warn!(reason = "MirrorQuarantined", "{message}");
        self.tell_of_volume(volume, vec![news(true, "MirrorQuarantined", message.clone())]);
        let said =
            self.patch_status(&id, &uid, |status| report::set(&mut status.conditions, "Ready", false, "Quarantined", message.clone()));
        if let Err(error) = said.await {
            warn!(%error, "the volume's object does not say that it is in quarantine");
        }
        Error::Precondition(message)
    }

    /// An assembly is over: the mirror serves, or there is an error. Only a panic counts as a crash, although csi-node survived it.
    pub(crate) fn assembly_ended(&self, uid: &str, error: Option<&Error>) -> Result<(), Error> {
        let Some(before) = self.assemblies.take(uid) else { return Ok(()) };
        match error {
            None => Ok(state_dir::remove_record(&self.state.assembling(uid))?),
            Some(Error::Datapath(lockstep_datapath::Error::Panicked) | Error::Panicked(_)) => Ok(()),
            Some(_) => Ok(Assemblies::restore(&self.state, uid, &before)?),
        }
    }
}
