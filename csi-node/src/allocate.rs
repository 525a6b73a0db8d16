//! From objects to legs: a volume's node claims it, gives it two legs, makes them longer, and removes them.
//!
//! ```text
//! created --no room--> Rejected (nothing exists)
//!    | finalizer and observedUID: claimed
//!    v
//! Allocating --two legs, then the witness--> Ready --spec grows--> its legs longer, then status.capacityBytes
//!    +------------------------------ deleted: legs, witness, then the finalizer
//! ```
//! Every step can be cut off and is done again.

use std::{collections::BTreeSet, fs, sync::Arc, time::Duration};

use lockstep_datapath::{
    core::{
        format,
        units::{BLOCK_SIZE, LegId, VolumeId},
    },
    create_leg, create_witness, extend_leg,
};
use lockstep_proto::{
    FINALIZER,
    objects::{DiskPhase, LegState, LegStatus, LocalDisk, MirrorVolume, VolumePhase},
};
use lockstep_store::Store;
use tracing::{info, warn};

use crate::{
    disks::Reservation,
    error::Error,
    legs::{self, LegDir, OVERHEAD},
    node::{Holder, Node, blocking, names},
    state_dir, tombstone,
};

/// How long a disk that need not have anything of a volume may take to say so.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is to be done for a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Claim,
    Allocate,
    Extend,
    /// It was rejected after it was claimed: the claim is given back.
    LetGo,
    /// It says that it is in use, and is not.
    ForgetDevice,
    Delete,
}

fn claimed(volume: &MirrorVolume) -> bool {
    volume.metadata.finalizers.as_ref().is_some_and(|finalizers| finalizers.iter().any(|name| name == FINALIZER))
}

fn task(volume: &MirrorVolume) -> Option<Task> {
    let status = volume.status.clone().unwrap_or_default();
    let grows = volume.spec.capacity_bytes > status.capacity_bytes;
    match status.phase {
        _ if volume.metadata.deletion_timestamp.is_some() => claimed(volume).then_some(Task::Delete),
        VolumePhase::Allocating if claimed(volume) => Some(Task::Allocate),
        VolumePhase::Allocating => Some(Task::Claim),
        VolumePhase::Ready if grows && status.refused_capacity_bytes != Some(volume.spec.capacity_bytes) => Some(Task::Extend),
        VolumePhase::Rejected if claimed(volume) => Some(Task::LetGo),
        VolumePhase::Ready | VolumePhase::Rejected => None,
    }
}

impl<S: Store> Node<S> {
    /// Does what the objects ask for, until the process ends.
    pub async fn follow_volumes(self: Arc<Self>) {
        loop {
            let mut changes = match self.store.changes::<MirrorVolume>().await {
                Ok(changes) => changes,
                Err(error) => {
                    warn!(%error, "the objects cannot be watched");
                    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
                    continue;
                }
            };
            loop {
                self.look_at_volumes().await;
                lockstep_store::Changes::next(&mut changes).await;
            }
        }
    }

    async fn look_at_volumes(self: &Arc<Self>) {
        let volumes = match self.store.list::<MirrorVolume>().await {
            Ok(listing) => {
                for error in &listing.unreadable {
                    warn!(%error, "an object is left alone");
                }
                listing.objects
            }
            Err(error) => return warn!(%error, "the volumes cannot be listed"),
        };
        for volume in volumes.into_iter().filter(|volume| volume.spec.node == self.name) {
            self.seen(&volume);
            if self.task(&volume).is_none() {
                continue;
            }
            let (id, uid) = names(&volume);
            // Busy: its end is a change, or the slow relist comes.
            let Ok(guard) = self.begin(&id, Holder::Object) else { continue };
            let node = Arc::clone(self);
            let span = tracing::info_span!(parent: None, "volume", id, uid);
            tokio::spawn(tracing::Instrument::instrument(
                async move {
                    let _guard = guard;
                    if let Err(error) = node.do_task(&id).await {
                        warn!(%error, "the volume is not as its object wants it; tried again");
                        // Who waits for it can read why. What says so already is not written again, or this would go round.
                        let message = error.to_string();
                        drop(node.patch_status(&id, &uid, |status| status.message.clone_from(&message)).await);
                    }
                },
                span,
            ));
        }
    }

    fn task(&self, volume: &MirrorVolume) -> Option<Task> {
        let uid = volume.metadata.uid.as_deref().unwrap_or_default();
        let says = volume.status.as_ref().is_some_and(|status| status.device.is_some());
        if says && self.open_volume(uid).is_none() && !state_dir::has_record(&self.state.staged(uid)) {
            return Some(Task::ForgetDevice);
        }
        task(volume)
    }

    async fn do_task(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        // Under the guard it is read again: what was listed may be old.
        let volume = self.volume(id).await?;
        match self.task(&volume) {
            None => Ok(()),
            Some(Task::Claim) => self.claim(volume).await,
            Some(Task::Allocate) => self.allocate(volume).await,
            Some(Task::Extend) => self.extend(volume).await,
            Some(Task::LetGo) => self.let_go(volume).await,
            Some(Task::ForgetDevice) => {
                let (id, uid) = names(&volume);
                self.patch_status(&id, &uid, |status| status.device = None).await.map(drop)
            }
            Some(Task::Delete) => self.delete(volume).await,
        }
    }

    async fn claim(self: &Arc<Self>, mut volume: MirrorVolume) -> Result<(), Error> {
        let (_, uid) = names(&volume);
        let bytes = volume.spec.capacity_bytes;
        if legs::volume_id(&uid).is_none() || bytes == 0 || !bytes.is_multiple_of(BLOCK_SIZE) || bytes / BLOCK_SIZE > format::MAX_BLOCKS {
            return self.reject(&volume, format!("a volume cannot have {bytes} bytes")).await;
        }
        if self.disks.reserve(2, bytes + OVERHEAD, |_| false).is_none() {
            let message = self.no_room(bytes);
            return self.reject(&volume, message).await;
        }
        volume.metadata.finalizers.get_or_insert_default().push(FINALIZER.to_owned());
        // From here on the controller does not withdraw it.
        let volume = self.store.update(volume).await?;
        info!(bytes, "claimed");
        self.allocate(volume).await
    }

    /// Two disks and no more were found.
    fn no_room(&self, bytes: u64) -> String {
        let free =
            self.disks.ready().iter().map(|disk| format!("{} has {} MiB", disk.label, self.disks.free(disk) >> 20)).collect::<Vec<_>>();
        let disks = if free.is_empty() { "it has no disks that can be used".to_owned() } else { free.join(", ") };
        format!("node {} has no two disks with {} MiB free on each: {disks}. Add a disk, or ask for less", self.name, bytes >> 20)
    }

    async fn reject(&self, volume: &MirrorVolume, message: String) -> Result<(), Error> {
        let (id, uid) = names(volume);
        info!(reason = "NoRoom", "{message}");
        self.patch_status(&id, &uid, |status| {
            status.phase = VolumePhase::Rejected;
            status.reason = "NoRoom".into();
            status.message = message.clone();
            status.observed_uid = Some(uid.clone());
            status.legs.clear();
        })
        .await?;
        Ok(())
    }

    async fn allocate(self: &Arc<Self>, volume: MirrorVolume) -> Result<(), Error> {
        let (id, uid) = names(&volume);
        let found = self.find_legs(&uid, &known(&volume)).await?;
        let placed = match self.already_made(&uid, &found).await? {
            Some(legs) => legs,
            None => {
                let Some(reserved) = self.disks.reserve(2, volume.spec.capacity_bytes + OVERHEAD, |_| false) else {
                    // The room is gone since it was claimed: nothing of the volume exists, and it is let go.
                    self.reject(&volume, self.no_room(volume.spec.capacity_bytes)).await?;
                    return self.let_go(self.volume(&id).await?).await;
                };
                let legs = reserved.iter().map(|disk| (disk, LegId(*uuid::Uuid::new_v4().as_bytes()))).collect::<Vec<_>>();
                let placed: Vec<LegStatus> = legs.iter().map(|(disk, leg)| leg_status(disk.disk_name(), *leg)).collect();
                // Where the legs will be is on record before a disk is touched.
                self.patch_status(&id, &uid, |status| {
                    status.observed_uid = Some(uid.clone());
                    status.legs.clone_from(&placed);
                })
                .await?;
                let ids = [legs[0].1, legs[1].1];
                if let Err(error) = self.make_legs(&volume, &uid, &reserved, ids).await {
                    let found = self.find_legs(&uid, &placed.iter().map(|leg| leg.disk.clone()).collect()).await?;
                    self.remove_legs(found).await?;
                    if !error.is_no_space() {
                        return Err(error);
                    }
                    self.reject(&volume, error.to_string()).await?;
                    return self.let_go(self.volume(&id).await?).await;
                }
                placed
            }
        };
        self.patch_status(&id, &uid, |status| {
            status.phase = VolumePhase::Ready;
            status.reason.clear();
            status.message.clear();
            status.observed_uid = Some(uid.clone());
            status.capacity_bytes = volume.spec.capacity_bytes;
            status.legs.clone_from(&placed);
        })
        .await?;
        info!(disks = ?placed.iter().map(|leg| &leg.disk).collect::<Vec<_>>(), "allocated");
        Ok(())
    }

    /// The legs of a volume that was allocated to the end, although its object does not say so. Those of a cut-off attempt are removed.
    async fn already_made(&self, uid: &str, found: &[LegDir]) -> Result<Option<Vec<LegStatus>>, Error> {
        let whole = blocking(uid, {
            let (found, witness) = (found.to_vec(), self.state.witness(uid));
            move || {
                Ok(found.len() == 2 && witness.exists() && found.iter().all(|leg| legs::epoch(&leg.dir).is_ok_and(|epoch| epoch.is_some())))
            }
        });
        if whole.await? {
            return Ok(Some(found.iter().map(|leg| leg_status(&leg.disk, leg.leg)).collect()));
        }
        self.remove_unused(uid, found).await?;
        Ok(None)
    }

    /// Removes what an allocation that was cut off left. Whatever was ever served is left alone: a new leg and a new witness have the first
    /// record, and serving them writes a later one.
    async fn remove_unused(&self, uid: &str, found: &[LegDir]) -> Result<(), Error> {
        let (legs, witness) = (found.to_vec(), self.state.witness(uid));
        let used = blocking(uid, move || {
            for leg in &legs {
                if legs::epoch(&leg.dir)?.is_some_and(|epoch| epoch > 1) {
                    return Ok(Some(leg.dir.clone()));
                }
            }
            let record = fs::read(&witness).ok().and_then(|bytes| format::witness(&bytes).ok());
            Ok(record.is_some_and(|(record, _)| record.record.name.epoch.0 > 1).then_some(witness))
        });
        if let Some(path) = used.await? {
            return Err(Error::Precondition(format!(
                "{} is of a volume that holds data, although its object says that it was never allocated: was an older copy of the objects restored? Move it away, or repair the object",
                path.display()
            )));
        }
        self.remove_legs(found.to_vec()).await?;
        Ok(state_dir::remove_record(&self.state.witness(uid))?)
    }

    async fn make_legs(&self, volume: &MirrorVolume, uid: &str, disks: &[Reservation], ids: [LegId; 2]) -> Result<(), Error> {
        let (volume, uid, witness) = (volume.clone(), uid.to_owned(), self.state.witness(uid));
        let disks: Vec<_> = disks.iter().filter_map(Reservation::disk).collect();
        blocking(&uid.clone(), move || {
            let id = legs::volume_id(&uid).ok_or_else(|| Error::NoVolume(uid.clone()))?;
            let bytes = volume.spec.capacity_bytes;
            for (disk, leg) in disks.iter().zip(ids) {
                let dir = legs::dir(disk, &uid, leg);
                legs::prepare(&dir, &volume, &uid, leg, None)?;
                create_leg(&dir, bytes, &format::new_leg(id, ids, leg, bytes / BLOCK_SIZE))?;
            }
            Ok(create_witness(&witness, &format::new_witness(id, ids, bytes / BLOCK_SIZE))?)
        })
        .await
    }

    /// A claimed volume that was rejected: nothing of it exists here any more, and the claim is given back.
    async fn let_go(&self, volume: MirrorVolume) -> Result<(), Error> {
        let (_, uid) = names(&volume);
        let found = self.find_legs(&uid, &known(&volume)).await?;
        self.remove_unused(&uid, &found).await?;
        self.remove_finalizer(volume).await
    }

    async fn extend(self: &Arc<Self>, volume: MirrorVolume) -> Result<(), Error> {
        let (id, uid) = names(&volume);
        let status = volume.status.clone().unwrap_or_default();
        let (from, to) = (status.capacity_bytes, volume.spec.capacity_bytes);
        let found: Vec<LegDir> = self.find_legs(&uid, &known(&volume)).await?;
        let found: Vec<LegDir> =
            found.into_iter().filter(|found| status.legs.iter().any(|leg| leg.leg_id == found.leg.to_string())).collect();
        if found.is_empty() {
            return Err(Error::Precondition(format!("no leg of {id} is on a disk that can be used")));
        }
        match self.grow_legs(&id, &found, to).await? {
            None => {
                info!(from, to, "the legs are longer; the volume grows when its node is asked to");
                self.patch_status(&id, &uid, |status| {
                    (status.capacity_bytes, status.refused_capacity_bytes) = (to, None);
                    status.message.clear();
                })
                .await?;
            }
            Some(message) => {
                warn!(%message, "there is no room to grow");
                self.patch_status(&id, &uid, |status| {
                    status.refused_capacity_bytes = Some(to);
                    status.message.clone_from(&message);
                })
                .await?;
            }
        }
        Ok(())
    }

    /// Makes the legs that are here at least `to` long. If a disk has no room: what is said of it.
    async fn grow_legs(self: &Arc<Self>, id: &str, found: &[LegDir], to: u64) -> Result<Option<String>, Error> {
        let mut reserved = Vec::new();
        for leg in found {
            // An attempt that was cut off may have made it longer.
            let more = to.saturating_sub(legs::data_len(&leg.dir));
            match (self.disks.reserve_on(&leg.disk, more), self.disks.get(&leg.disk)) {
                (Some(reservation), _) => reserved.push(reservation),
                (None, Some(disk)) if disk.phase == DiskPhase::Ready => {
                    let free = self.disks.free(&disk) >> 20;
                    return Ok(Some(format!("its disk {} has {free} MiB free, and {} MiB are needed", disk.label, more.div_ceil(1 << 20))));
                }
                (None, _) => return Err(Error::Precondition(format!("disk {} failed just now", leg.disk))),
            }
        }
        let found = found.to_vec();
        let extended = blocking(id, move || found.iter().try_for_each(|leg| extend_leg(&leg.dir, to)).map_err(Error::from)).await;
        match extended {
            Err(error) if error.is_no_space() => Ok(Some(error.to_string())),
            extended => extended.map(|()| None),
        }
    }

    async fn delete(self: &Arc<Self>, volume: MirrorVolume) -> Result<(), Error> {
        let (id, uid) = names(&volume);
        if self.open_volume(&uid).is_some() || state_dir::has_record(&self.state.staged(&uid)) {
            return Err(Error::Precondition(format!("{id} is staged: it is deleted when it is unstaged")));
        }
        let found = self.find_legs(&uid, &known(&volume)).await?;
        let status = volume.status.clone().unwrap_or_default();
        let missing: Vec<_> = status.legs.iter().filter(|leg| found.iter().all(|found| found.leg.to_string() != leg.leg_id)).collect();
        if !missing.is_empty() || self.a_disk_is_away().await? {
            warn!(missing = ?missing.iter().map(|leg| &leg.disk).collect::<Vec<_>>(), "a disk is away: a copy that is on it is deleted when it comes back");
            tombstone::write(&self.state, &uid)?;
        }
        self.remove_legs(found).await?;
        state_dir::remove_record(&self.state.witness(&uid))?;
        state_dir::remove_record(&self.state.growing(&uid))?;
        state_dir::remove_record(&self.state.assembling(&uid))?;
        self.remove_finalizer(volume).await?;
        info!("deleted");
        Ok(())
    }

    /// Then it may have an older copy of any volume.
    async fn a_disk_is_away(&self) -> Result<bool, Error> {
        let disks = self.store.list::<LocalDisk>().await?;
        let away = |disk: &LocalDisk| {
            let phase = disk.status.as_ref().map(|status| status.phase);
            disk.spec.node == self.name && !matches!(phase, Some(DiskPhase::Ready | DiskPhase::Refused))
        };
        Ok(!disks.unreadable.is_empty() || disks.objects.iter().any(away))
    }

    async fn remove_finalizer(&self, mut volume: MirrorVolume) -> Result<(), Error> {
        if let Some(finalizers) = &mut volume.metadata.finalizers {
            finalizers.retain(|name| name != FINALIZER);
        }
        self.store.update(volume).await?;
        Ok(())
    }

    /// Every leg of the volume on a disk that can be used. Disks that the volume is known to be on are waited for; of the others, one that does
    /// not answer keeps nobody.
    pub(crate) async fn find_legs(&self, uid: &str, known: &BTreeSet<String>) -> Result<Vec<LegDir>, Error> {
        let looks = self.disks.ready().into_iter().map(|disk| {
            let (uid, waited_for) = (uid.to_owned(), known.contains(&disk.name));
            let name = disk.name.clone();
            (name, waited_for, tokio::task::spawn_blocking(move || legs::find(&disk, &uid)))
        });
        let looks: Vec<_> = looks.collect();
        let mut found = Vec::new();
        for (disk, waited_for, look) in looks {
            let looked = if waited_for { Ok(look.await) } else { tokio::time::timeout(PATIENCE, look).await };
            match looked {
                Ok(Ok(legs)) => found.extend(legs),
                Ok(Err(_)) => return Err(Error::Panicked(uid.to_owned())),
                Err(_) => warn!(disk, "a disk does not answer"),
            }
        }
        Ok(found)
    }

    /// Removes legs; the space is free for others when it returns, and the disks' objects say so.
    pub(crate) async fn remove_legs(&self, found: Vec<LegDir>) -> Result<(), Error> {
        let disks = Arc::clone(&self.disks);
        let removed = blocking("its legs", move || {
            for leg in found {
                legs::remove(&leg.dir).map_err(Error::io(format!("removing {}", leg.dir.display())))?;
                disks.refresh(&leg.disk);
            }
            Ok(())
        })
        .await;
        // Who is told that they are gone can count on their space.
        match tokio::time::timeout(PATIENCE, self.disks.publish(&self.store, &self.name)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "the disks' objects do not say yet what is free"),
            Err(_) => warn!("the disks' objects cannot be written in time"),
        }
        removed
    }
}

/// The disks that a volume's object names.
pub(crate) fn known(volume: &MirrorVolume) -> BTreeSet<String> {
    volume.status.iter().flat_map(|status| &status.legs).map(|leg| leg.disk.clone()).collect()
}

/// A leg that is current.
fn leg_status(disk: &str, leg: LegId) -> LegStatus {
    LegStatus { disk: disk.to_owned(), leg_id: leg.to_string(), state: LegState::In, progress_percent: None, last_error: None }
}

/// The volume's id for the datapath.
pub(crate) fn datapath_id(uid: &str) -> Result<VolumeId, Error> {
    legs::volume_id(uid).ok_or_else(|| Error::NoVolume(uid.to_owned()))
}
