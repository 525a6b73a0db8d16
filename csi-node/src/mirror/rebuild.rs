//! Which leg is filled, and where: the same disk if it is back, else another one with room.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lockstep_datapath::{
    LegPath,
    core::{
        format::{self, MetaError},
        io::Fill,
        status::{LegState, Status, Sync},
        units::{BLOCK_SIZE, Errno, LegId, Slot},
    },
    create_leg,
};
use lockstep_store::Store;
use tracing::{info, warn};

use super::OpenVolume;
use crate::{
    allocate::datapath_id,
    disks::Disk,
    error::Error,
    legs::{self, LegDir, OVERHEAD},
    node::{Node, blocking},
};

/// After a leg could not be attached, it is not tried again at once;
const RETRY: Duration = Duration::from_secs(10);
/// sooner, if the lost one's last I/O was not over.
const RETRY_BUSY: Duration = Duration::from_millis(500);

/// When the next try may be made.
#[derive(Debug, Default)]
pub(super) struct Patience {
    not_before: Option<Instant>,
    /// Nobody has room: said once.
    complained: bool,
}

impl Patience {
    /// How long nothing needs to be looked at, if nothing changes.
    pub(super) fn lasts(&self, at_most: Duration) -> Duration {
        self.not_before.map_or(at_most, |at| at.saturating_duration_since(Instant::now()).min(at_most))
    }
}

impl<S: Store> Node<S> {
    /// Attaches a leg where one is missing; removes those that were replaced, once both count. Says whether a leg was attached.
    pub(super) async fn fill_legs(&self, open: &OpenVolume, status: &Status, patience: &mut Patience) -> bool {
        let state = |slot: Slot| status.legs[slot.index()].state;
        if !status.ready || status.stopped || status.read_only {
            return false;
        }
        if Slot::BOTH.into_iter().all(|slot| state(slot) == LegState::In) {
            if status.sync == Sync::Idle {
                self.remove_replaced(open, status).await;
            }
            *patience = Patience::default();
            return false;
        }
        let Some(slot) = Slot::BOTH.into_iter().find(|slot| state(*slot) == LegState::Out && state(slot.other()) == LegState::In) else {
            return false;
        };
        if patience.not_before.is_some_and(|at| Instant::now() < at) {
            return false;
        }
        match self.attach(open, status, slot).await {
            Ok(Some(fill)) => {
                info!(
                    reason = "RebuildStarted",
                    ?fill,
                    disk = open.disk_of(open.volume.status().borrow().legs[slot.index()].id),
                    "a copy is being filled"
                );
                *patience = Patience::default();
                true
            }
            Ok(None) => {
                if !std::mem::replace(&mut patience.complained, true) {
                    warn!("no other disk of this node has room for the missing copy: add a disk, and the volume rebuilds by itself");
                }
                false
            }
            Err(error) => {
                let busy = matches!(error, Error::Datapath(lockstep_datapath::Error::Mirror(Errno::EBUSY)));
                if !busy {
                    warn!(%error, "the missing copy cannot be made; tried again");
                }
                patience.not_before = Some(Instant::now() + if busy { RETRY_BUSY } else { RETRY });
                false
            }
        }
    }

    /// `None`: no disk has room.
    async fn attach(&self, open: &OpenVolume, status: &Status, slot: Slot) -> Result<Option<Fill>, Error> {
        let found = self.find_legs(&open.uid, &open.known()).await?;
        let lost = status.legs[slot.index()].id;
        // The same disk, back first.
        if let Some(leg) = found.iter().find(|leg| leg.leg == lost) {
            let path = LegPath { dir: leg.dir.clone() };
            if let Ok(Some((at, Fill::DirtyRegions))) = open.volume.readmission(&path).await
                && at == slot
            {
                match open.volume.attach(slot, path, Fill::DirtyRegions).await {
                    Ok(()) => return Ok(Some(Fill::DirtyRegions)),
                    Err(error @ lockstep_datapath::Error::Mirror(Errno::EBUSY)) => return Err(error.into()),
                    // Another disk may do better.
                    Err(error) => warn!(%error, disk = leg.disk, "the copy that came back cannot be used"),
                }
            }
        }
        self.attach_new(open, status, slot, &found).await
    }

    /// Copies that take room and can never be used again: nothing that may hold what the mirror's record does not know.
    async fn useless(&self, open: &OpenVolume, status: &Status, found: &[LegDir]) -> Vec<LegDir> {
        let mut useless = Vec::new();
        for leg in found.iter().filter(|leg| status.legs.iter().all(|member| member.id != leg.leg || member.state == LegState::Out)) {
            let dir = leg.dir.clone();
            let old =
                blocking(&open.id, move || legs::epoch(&dir)).await.is_ok_and(|epoch| epoch.is_none_or(|epoch| epoch <= status.epoch.0));
            let readmission = open.volume.readmission(&LegPath { dir: leg.dir.clone() }).await;
            // A member whose place is not free yet has no answer, which is not "never".
            let member = status.legs.iter().any(|member| member.id == leg.leg);
            let never = match readmission {
                Ok(Some((_, Fill::Everything))) => true,
                Err(lockstep_datapath::Error::Meta { source: MetaError::Damaged, .. }) => {
                    let forced = self.was_forced(open, status).await;
                    if forced {
                        say_that_it_is_kept(open, leg.leg, &leg.dir);
                    }
                    !forced
                }
                Ok(None) => !member,
                Ok(Some((_, Fill::DirtyRegions))) | Err(_) => false,
            };
            if old && never {
                useless.push(leg.clone());
            }
        }
        useless
    }

    /// Where a leg is, if its disk is here.
    fn dir_of(&self, open: &OpenVolume, leg: LegId) -> Option<PathBuf> {
        let disk = self.disks.get(&open.disk_of(leg)?)?;
        Some(legs::dir(&disk, &open.uid, leg))
    }

    /// Whether a person once chose among the copies, or that cannot be told.
    async fn was_forced(&self, open: &OpenVolume, status: &Status) -> bool {
        let counts = status.legs.iter().filter(|leg| leg.state == LegState::In);
        let dirs: Vec<_> = counts.filter_map(|leg| self.dir_of(open, leg.id)).collect();
        let forced = blocking(&open.id, move || Ok(dirs.is_empty() || dirs.iter().any(|dir| !matches!(legs::was_forced(dir), Ok(false)))));
        forced.await.unwrap_or(true)
    }

    async fn attach_new(&self, open: &OpenVolume, status: &Status, slot: Slot, found: &[LegDir]) -> Result<Option<Fill>, Error> {
        let bytes = status.blocks * BLOCK_SIZE;
        let survivor = status.legs[slot.other().index()].id;
        let survivors_disk = open.disk_of(survivor).and_then(|name| self.disks.get(&name)).map(|disk| disk.identity.physical);
        let avoid = |disk: &Disk| survivors_disk.as_ref().is_some_and(|physical| disk.shares_a_disk_with(physical));
        let reserve = || self.disks.reserve(1, bytes + OVERHEAD, avoid).and_then(|mut reserved| reserved.pop());
        let mut reserved = reserve();
        if reserved.is_none() {
            // Useless copies make room, and only where that is enough.
            let mut useless = self.useless(open, status, found).await;
            useless.retain(|leg| {
                let disk = self.disks.get(&leg.disk).filter(|disk| !avoid(disk));
                disk.is_some_and(|disk| self.disks.free(&disk) + legs::data_len(&leg.dir) >= bytes)
            });
            self.remove_for(open, useless).await?;
            reserved = reserve();
        }
        let Some(disk) = reserved.as_ref().and_then(crate::disks::Reservation::disk) else { return Ok(None) };
        let object = open.object.clone();
        let survivors_dir = self.dir_of(open, survivor);
        let (uid, leg) = (open.uid.clone(), LegId(*uuid::Uuid::new_v4().as_bytes()));
        let dir = legs::dir(&disk, &uid, leg);
        let made = {
            let (dir, volume) = (dir.clone(), datapath_id(&uid)?);
            blocking(&open.id, move || {
                // If that cannot be read, the next stage says so on the new leg.
                let fs_uuid = survivors_dir.and_then(|survivor| legs::file_system(&survivor).ok().flatten());
                legs::prepare(&dir, &object, &uid, leg, fs_uuid)?;
                create_leg(&dir, bytes, &format::spare_leg(volume, leg, bytes / BLOCK_SIZE))?;
                Ok(())
            })
            .await
        };
        let attached = match made {
            Ok(()) => open.volume.attach(slot, LegPath { dir: dir.clone() }, Fill::Everything).await.map_err(Error::from),
            Err(error) => Err(error),
        };
        if let Err(error) = attached {
            self.remove_legs(vec![LegDir { disk: disk.name, leg, dir }]).await?;
            return Err(error);
        }
        open.place(leg, &disk.name);
        Ok(Some(Fill::Everything))
    }

    /// Both copies count: what else there is of the volume is older, and goes. What is newer is a riddle, and stays.
    async fn remove_replaced(&self, open: &OpenVolume, status: &Status) {
        let Ok(mut found) = self.find_legs(&open.uid, &open.known()).await else { return };
        found.retain(|leg| status.legs.iter().all(|member| member.id != leg.leg));
        if found.is_empty() {
            return;
        }
        let useless = self.useless(open, status, &found).await;
        found.retain(|leg| useless.iter().all(|other| other.dir != leg.dir) && open.error_of(leg.leg).is_none());
        for leg in found {
            say_once(open, leg.leg, format!("the mirror does not know {}, which may be newer: it is left alone", leg.dir.display()));
        }
        if useless.is_empty() {
            return;
        }
        info!(disks = ?useless.iter().map(|leg| &leg.disk).collect::<Vec<_>>(), "a copy that was replaced is removed");
        if let Err(error) = self.remove_for(open, useless).await {
            warn!(%error, "a copy that was replaced is still there");
        }
    }

    /// Removes legs of an open mirror, unless it is being closed: what is known of them may be old by then.
    async fn remove_for(&self, open: &OpenVolume, legs: Vec<LegDir>) -> Result<(), Error> {
        if *open.closing.borrow() {
            return Ok(());
        }
        self.remove_legs(legs).await
    }
}

/// A copy that nobody counts on stays: what it holds may be newer than what was forced.
fn say_that_it_is_kept(open: &OpenVolume, leg: LegId, dir: &Path) {
    let error = format!(
        "its `meta` is damaged, and another copy was forced, which may be older: so {} is kept. If nothing of its `data` is needed any more, remove that \
         directory",
        dir.display()
    );
    say_once(open, leg, error);
}

/// Says why a copy is neither used nor removed, until there is another reason.
fn say_once(open: &OpenVolume, leg: LegId, error: String) {
    if open.error_of(leg).as_ref() != Some(&error) {
        warn!(%error, "a copy that nobody counts on is kept");
        open.leg_failed(leg, error);
    }
}
