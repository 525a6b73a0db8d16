//! Open mirrors and who looks after them: one task for each, until it is closed.
//!
//! ```text
//! datapath: status, notices --+                    +--> rebuild: which leg comes back, where (rebuild.rs)
//! disks: found, failed -------+--> the task -------+
//!                                                  +--> report: status, conditions, what a person should know (report.rs)
//!                                                  +--> scrub: what a person wants compared (scrub.rs)
//!                                                  +--> slow: which leg writes may be behind on (slow.rs)
//! ```
//! The mirror never waits for any of this.

mod rebuild;
pub(crate) mod report;
mod resume;
mod scrub;
mod slow;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use lockstep_datapath::{
    LegPath, Volume, VolumeSpec,
    core::{
        io::Notice,
        status::Status,
        units::{BLOCK_SIZE, Epoch, Errno, LegId, Slot},
    },
};
use lockstep_proto::objects::{LegStatus, MirrorVolume};
use lockstep_store::Store;
use tokio::{
    sync::{broadcast::error::TryRecvError, watch},
    task::JoinHandle,
};
use tracing::{Instrument, info, warn};

use crate::{
    allocate::datapath_id,
    error::Error,
    legs::{self, LegDir},
    node::{Node, blocking, names},
};

/// The operator insists on this leg where assembly would be refused; removed when it was obeyed.
pub const FORCE_ANNOTATION: &str = "lockstep.io/force-leg";
/// Changes that come in a burst are answered together.
const PACE: Duration = Duration::from_millis(200);
/// Without any change, it is looked again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// How long the store may take for one report.
const REPORT: Duration = Duration::from_secs(5);
/// How long what looks after a mirror may take to end.
const LET_GO: Duration = Duration::from_secs(10);

/// Which disk each leg is on.
fn places(legs: &[LegStatus]) -> impl Iterator<Item = (LegId, String)> {
    let known = legs.iter().filter(|leg| !leg.disk.is_empty());
    known.filter_map(|leg| Some((LegId(legs::parse_id(&leg.leg_id)?), leg.disk.clone())))
}

/// An open mirror.
#[derive(Debug)]
pub struct OpenVolume {
    /// The volume's id: the name of its object.
    pub id: String,
    /// The UID of its object.
    pub uid: String,
    /// The mirror.
    pub volume: Volume,
    /// Which disk a leg is on.
    disks: Mutex<BTreeMap<LegId, String>>,
    /// What a leg failed with.
    errors: Mutex<BTreeMap<LegId, String>>,
    /// Which copy was lost last, for people.
    loss: Mutex<Option<String>>,
    /// What the newest scrub found.
    found: Mutex<scrub::Found>,
    /// The newest annotations that were seen: a change wakes who looks after the mirror.
    annotations: watch::Sender<Option<BTreeMap<String, String>>>,
    /// Its object as it was when it was opened: what a new copy's `volume.yaml` says, without asking anybody.
    object: MirrorVolume,
    /// Its object as it was last seen or written.
    latest: Mutex<MirrorVolume>,
    closing: watch::Sender<bool>,
    looked_after: Mutex<Option<JoinHandle<()>>>,
}

impl OpenVolume {
    /// The size of its device.
    pub fn bytes(&self) -> u64 {
        self.volume.status().borrow().blocks * BLOCK_SIZE
    }

    /// The disks that it is on.
    fn known(&self) -> BTreeSet<String> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn disk_of(&self, leg: LegId) -> Option<String> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner).get(&leg).cloned()
    }

    /// What the object says of the places of legs, where nobody has seen them since this process began.
    fn learn(&self, legs: &[LegStatus]) {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        for (leg, disk) in places(legs) {
            disks.entry(leg).or_insert(disk);
        }
    }

    fn place(&self, leg: LegId, disk: &str) {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner).insert(leg, disk.to_owned());
    }

    pub(crate) fn latest(&self) -> MirrorVolume {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What was seen or written, unless something later was.
    pub(crate) fn set_latest(&self, object: &MirrorVolume) {
        let version = |object: &MirrorVolume| object.metadata.resource_version.as_ref().and_then(|version| version.parse::<u64>().ok());
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if version(object) >= version(&latest) {
            latest.clone_from(object);
        }
    }

    fn leg_failed(&self, leg: LegId, error: String) {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).insert(leg, error);
    }

    /// Which copy was lost last, and why.
    fn loss(&self) -> Option<String> {
        self.loss.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn error_of(&self, leg: LegId) -> Option<String> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).get(&leg).cloned()
    }
}

fn leg_paths(found: &[LegDir]) -> Vec<LegPath> {
    found.iter().map(|leg| LegPath { dir: leg.dir.clone() }).collect()
}

impl<S: Store> Node<S> {
    /// Assembles a volume's mirror from the legs that were found, makes its device, and looks after it from then on.
    ///
    /// # Errors
    /// The datapath's: refusals among them.
    pub(crate) async fn open_mirror(self: &Arc<Self>, object: &MirrorVolume, found: Vec<LegDir>) -> Result<Arc<OpenVolume>, Error> {
        let (id, uid) = names(object);
        let force = object.metadata.annotations.as_ref().and_then(|annotations| annotations.get(FORCE_ANNOTATION));
        let force = match force {
            Some(leg) => Some(legs::parse_id(leg).map(LegId).ok_or_else(|| {
                Error::InvalidArgument(format!("annotation {FORCE_ANNOTATION}: {leg:?} is not a leg's id: see status.legs of {id}"))
            })?),
            None => None,
        };
        let spec = VolumeSpec {
            volume: datapath_id(&uid)?,
            legs: leg_paths(&found),
            witness: self.state.witness(&uid),
            seen_epoch: object.status.as_ref().map(|status| Epoch(status.epoch)),
            force,
            run_dir: self.state.run(),
        };
        let volume = self.datapath.open(spec).await?;
        info!(device = %volume.device().display(), legs = found.len(), "assembled");
        if force.is_some() {
            warn!(?force, "the operator forced a leg: what only the other one had is given up");
            if let Err(error) = self.change_annotations(&id, |annotations| annotations.remove(FORCE_ANNOTATION).is_some()).await {
                warn!(%error, "take the annotation {FORCE_ANNOTATION} away by hand");
            }
        }
        Ok(self.opened(object, uid, volume, found))
    }

    /// A mirror that is open from now on, with who looks after it.
    pub(super) fn opened(self: &Arc<Self>, object: &MirrorVolume, uid: String, volume: Volume, found: Vec<LegDir>) -> Arc<OpenVolume> {
        let mut disks: BTreeMap<LegId, String> = object.status.iter().flat_map(|status| places(&status.legs)).collect();
        disks.extend(found.into_iter().map(|leg| (leg.leg, leg.disk)));
        let open = Arc::new(OpenVolume {
            id: names(object).0,
            uid: uid.clone(),
            volume,
            disks: Mutex::new(disks),
            errors: Mutex::default(),
            loss: Mutex::default(),
            found: Mutex::default(),
            annotations: watch::Sender::new(object.metadata.annotations.clone()),
            object: object.clone(),
            latest: Mutex::new(object.clone()),
            closing: watch::Sender::new(false),
            looked_after: Mutex::default(),
        });
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(uid, Arc::clone(&open));
        self.begin_to_look_after(&open);
        open
    }

    fn begin_to_look_after(self: &Arc<Self>, open: &Arc<OpenVolume>) {
        open.closing.send_replace(false);
        let span = tracing::info_span!(parent: None, "mirror", id = open.id);
        let task = tokio::spawn(Arc::clone(self).look_after(Arc::clone(open)).instrument(span));
        *open.looked_after.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
    }

    /// Stops a mirror cleanly and lets go of its legs. Its device's users must be gone; it can be called again after an error.
    ///
    /// # Errors
    /// The datapath's.
    pub(crate) async fn close_mirror(self: &Arc<Self>, open: &Arc<OpenVolume>) -> Result<(), Error> {
        open.closing.send_replace(true);
        let task = open.looked_after.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task
            && tokio::time::timeout(LET_GO, task).await.is_err()
        {
            // It waits for a sick disk, and when it goes on it sees that it has to end.
            warn!("what looked after the mirror does not end");
        }
        if let Err(error) = open.volume.close().await {
            self.begin_to_look_after(open);
            return Err(error.into());
        }
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&open.uid);
        self.report_closed(open).await;
        Ok(())
    }

    /// Removes the device of a mirror whose csi-node died.
    pub(crate) async fn remove_dead_mirror(self: &Arc<Self>, uid: &str) -> Result<(), Error> {
        let (node, uid) = (Arc::clone(self), uid.to_owned());
        blocking(&uid.clone(), move || Ok(node.datapath.remove_leftovers(&node.state.run(), &uid)?)).await
    }

    async fn look_after(self: Arc<Self>, open: Arc<OpenVolume>) {
        let (mut status, mut notices) = (open.volume.status(), open.volume.notices());
        let mut disks = self.disks.changes();
        let (mut closing, mut annotations) = (open.closing.subscribe(), open.annotations.subscribe());
        let mut scrubs = scrub::Scrubs::default();
        let mut write_behind = false;
        let mut health = None;
        let mut patience = rebuild::Patience::default();
        loop {
            if *closing.borrow() {
                return;
            }
            let snapshot = *status.borrow_and_update();
            // Before any leg is attached: a notice names a slot, and means the leg that was in it.
            loop {
                match notices.try_recv() {
                    Ok(notice) => self.noticed(&open, &snapshot, &notice),
                    Err(TryRecvError::Lagged(missed)) => warn!(missed, "notices were missed: the status has what counts"),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Closed) => return,
                }
            }
            self.mind_slow_leg(&open, &snapshot, &mut write_behind).await;
            let legs_changed = self.fill_legs(&open, &snapshot, &mut patience).await;
            // The mirror is not kept waiting for whoever keeps the objects.
            let mut scrub_ended = false;
            match tokio::time::timeout(REPORT, self.report(&open, &snapshot, &mut health)).await {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(object))) => {
                    let wish = scrub::Wish::of(object.metadata.annotations.as_ref());
                    scrub_ended = self.mind_scrub(&open, &snapshot, wish, &mut scrubs).await;
                }
                Ok(Err(error)) => warn!(%error, "the volume's object does not say what is; tried again"),
                Err(_) => warn!("the volume's object cannot be written in time; tried again"),
            }
            if legs_changed || scrub_ended {
                continue;
            }
            tokio::select! {
                changed = status.changed() => if changed.is_err() { return },
                changed = disks.changed() => if changed.is_err() { return },
                _ = closing.changed() => return,
                _ = annotations.changed() => {}
                () = scrubs.ended() => {}
                () = tokio::time::sleep(patience.lasts(LOOK_AGAIN)) => {}
            }
            tokio::time::sleep(PACE).await;
        }
    }

    /// An open volume's object was seen: perhaps a person wants something of it.
    pub(crate) fn seen(&self, volume: &MirrorVolume) {
        let Some(open) = self.open_volume(volume.metadata.uid.as_deref().unwrap_or_default()) else { return };
        open.set_latest(volume);
        let annotations = &volume.metadata.annotations;
        open.annotations.send_if_modified(|seen| std::mem::replace(seen, annotations.clone()) != *annotations);
    }

    fn noticed(&self, open: &OpenVolume, status: &Status, notice: &Notice) {
        let leg = |slot: Slot| status.legs[slot.index()].id;
        match notice {
            Notice::LegFailed { slot, error } => {
                let leg = leg(*slot);
                open.leg_failed(leg, error.to_string());
                if let Some(disk) = open.disk_of(leg) {
                    let label = self.disks.get(&disk).map_or_else(|| disk.clone(), |disk| disk.label);
                    *open.loss.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("the copy on {label} is lost ({error})"));
                    // ENODEV: it was left out when the mirror was assembled, which says nothing about its disk.
                    if *error != Errno::ENODEV {
                        self.disks.fail(&disk, &format!("a copy of volume {} on it got {error}", open.id));
                    }
                }
            }
            Notice::Unreadable { range } => {
                warn!(
                    reason = "BlocksUnreadable",
                    ?range,
                    "no copy of these blocks can be read: their readers get an error until they are written again"
                );
            }
            Notice::BlocksLost { range } => {
                warn!(
                    reason = "BlocksLost",
                    ?range,
                    "the only good copy of these blocks cannot be read, so they are lost: their readers get an error until they are written again"
                );
            }
            Notice::RebuildBlocked { range, .. } => {
                warn!(reason = "RebuildBlocked", ?range, "the only good copy cannot be read here: the rebuild is tried again");
            }
            _ => open.scrub_noticed(notice),
        }
    }
}
