//! Volumes that an earlier csi-node served and whose devices are alive: they are served on, from the staged records and the legs alone.
//!
//! All at once; but those during whose assembly csi-node ended before come last and one after the other: the one that takes csi-node with it again is
//! counted alone then, and its neighbours do not go into quarantine with it (mirror rule 33).

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use lockstep_datapath::{VolumeSpec, kernel_can_resend};
use lockstep_proto::objects::MirrorVolume;
use lockstep_store::Store;
use tracing::{Instrument, error, info, warn};

use super::{OpenVolume, leg_paths};
use crate::{
    allocate::datapath_id,
    error::Error,
    legs,
    node::{Node, blocking, names},
    stage::until_ready,
    staged::{self, Staged},
};

/// How long the store may take for a volume's object: without it the legs say enough.
const OBJECT: Duration = Duration::from_secs(1);
/// A volume that cannot be served after this ends: better an error than a program that hangs for ever.
const GIVE_UP: Duration = Duration::from_secs(60);
/// How soon what failed is tried again.
const AGAIN: Duration = Duration::from_millis(500);
/// How long the next one waits for one that may take csi-node with it.
const HEAD_START: Duration = Duration::from_secs(2);

impl<S: Store> Node<S> {
    /// Begins to take up every volume that an earlier csi-node served, all at once; what cannot be taken up is said, and ends. From the return of
    /// this on, calls for those volumes wait.
    pub async fn resume_all(self: &Arc<Self>) {
        let (records, unreadable) = match staged::all(&self.state) {
            Ok(found) => found,
            Err(error) => return error!(%error, "the staged records cannot be read: no volume is taken up"),
        };
        let node = Arc::clone(self);
        let held = blocking("the FUSE holder", move || Ok(node.datapath.resumable()?)).await;
        let held: BTreeSet<String> = held
            .unwrap_or_else(|error| {
                error!(%error, "no volume is taken up");
                Vec::new()
            })
            .into_iter()
            .collect();
        let all_known = unreadable.is_empty();
        for staged::Unreadable { volume, error } in unreadable {
            warn!(volume, %error, "a staged volume is not taken up: its users wait");
        }
        let mut staged_ids = BTreeSet::new();
        let mut suspects = Vec::new();
        for staged in records {
            staged_ids.insert(staged.uid.clone());
            let span = tracing::info_span!("volume", id = staged.volume, uid = staged.uid);
            let (node, held) = (Arc::clone(self), held.contains(&staged.uid));
            let Ok(guard) = self.begin(&staged.volume, crate::node::Holder::Object) else { continue };
            let suspect = self.assembly_crashed(&staged.uid);
            let resume = async move {
                node.resume_or_end(&staged, held).await;
                drop(guard);
            };
            let resume = resume.instrument(span);
            if suspect {
                suspects.push(resume);
            } else {
                tokio::spawn(resume);
            }
        }
        tokio::spawn(async move {
            for resume in suspects {
                drop(tokio::time::timeout(HEAD_START, tokio::spawn(resume)).await);
            }
        });
        // It was being unstaged, or staged, when its csi-node ended. An unreadable record may be its.
        for uid in held.iter().filter(|uid| all_known && !staged_ids.contains(*uid)) {
            warn!(uid, "a device that belongs to no staged volume is removed");
            if let Err(error) = self.remove_dead_mirror(uid).await {
                warn!(uid, %error, "it cannot be removed");
            }
        }
    }

    async fn resume_or_end(self: Arc<Self>, staged: &Staged, held: bool) {
        let deadline = Instant::now() + GIVE_UP;
        let failed = loop {
            if !held || staged.device.is_none() {
                break None;
            }
            // What its users wait for was asked of a process that is gone, and is never asked again: no leg need be looked at.
            if !kernel_can_resend() {
                break Some(Error::Precondition("this kernel is older than Linux 6.9 and cannot send again what was not answered".into()));
            }
            match self.resume(staged).await {
                Ok(()) => return,
                Err(error @ (Error::Precondition(_) | Error::Panicked(_))) => break Some(error),
                Err(error) if Instant::now() >= deadline => break Some(error),
                Err(error) => warn!(%error, "its mirror cannot be assembled yet; its users wait"),
            }
            // A disk that comes late.
            self.disks.scan().await;
            tokio::time::sleep(AGAIN).await;
        };
        if let Some(error) = failed {
            error!(%error, "the volume cannot be served: its users get I/O errors");
        }
        if held {
            let (node, uid) = (Arc::clone(&self), staged.uid.clone());
            let ended = blocking(&staged.volume, move || Ok(node.datapath.let_go(&uid)?)).await;
            if let Err(error) = ended {
                warn!(%error, "its users may hang");
            }
        }
        warn!(
            path = %staged.staging_path.display(),
            "it was staged when an earlier csi-node ended, and its device is dead: unpublish and unstage it, then stage it again"
        );
    }

    /// Until the mirror serves.
    async fn resume(self: &Arc<Self>, staged: &Staged) -> Result<(), Error> {
        let found = self.find_legs(&staged.uid, &BTreeSet::new()).await?;
        let object = match tokio::time::timeout(OBJECT, self.volume(&staged.volume)).await {
            Ok(Ok(object)) if names(&object).1 == staged.uid => object,
            _ => self.object_of_legs(staged, &found).await?,
        };
        self.assembly_begins(&object).await?;
        let ready = match self.take_up(staged, &object, found).await {
            Ok(open) => until_ready(&open).await,
            Err(error) => {
                self.assembly_ended(&staged.uid, Some(&error))?;
                return Err(error);
            }
        };
        self.assembly_ended(&staged.uid, ready.as_ref().err())?;
        if let Err(error) = ready {
            error!(%error, "its users get I/O errors");
        }
        Ok(())
    }

    async fn take_up(self: &Arc<Self>, staged: &Staged, object: &MirrorVolume, found: Vec<legs::LegDir>) -> Result<Arc<OpenVolume>, Error> {
        let spec = VolumeSpec {
            volume: datapath_id(&staged.uid)?,
            legs: leg_paths(&found),
            witness: self.state.witness(&staged.uid),
            // What lags may veto a new start, not a volume in use.
            seen_epoch: None,
            force: None,
            run_dir: self.state.run(),
        };
        let gone = || Error::Precondition("its device is gone".into());
        let volume = self.datapath.resume(spec).await?.ok_or_else(gone)?;
        info!(device = %volume.device().display(), legs = found.len(), "served on");
        Ok(self.opened(object, staged.uid.clone(), volume, found))
    }

    /// The object as the legs remember it.
    async fn object_of_legs(&self, staged: &Staged, found: &[legs::LegDir]) -> Result<MirrorVolume, Error> {
        let dirs: Vec<_> = found.iter().map(|leg| leg.dir.clone()).collect();
        let (volume, uid) = (staged.volume.clone(), staged.uid.clone());
        blocking(&staged.volume, move || {
            let object = dirs.iter().find_map(|dir| legs::object(dir).ok().flatten());
            let mut object = object.ok_or_else(|| Error::NoVolume(volume.clone()))?;
            object.metadata.uid = Some(uid);
            Ok(object)
        })
        .await
    }
}
