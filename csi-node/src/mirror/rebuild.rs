//! Which leg is filled, and where: the same disk if it is back, else another one with room.

use std::time::{Duration, Instant};

use lockstep_datapath::{
    LegPath,
    core::{
        format,
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
        let found = self.find_legs(&open.uid).await?;
        let lost = status.legs[slot.index()].id;
        // The same disk, back first.
        if let Some(leg) = found.iter().find(|leg| leg.leg == lost) {
            let path = LegPath { dir: leg.dir.clone() };
            // A leg that cannot be asked is as good as none.
            if let Ok(Some((at, Fill::DirtyRegions))) = open.volume.readmission(&path).await
                && at == slot
            {
                open.volume.attach(slot, path, Fill::DirtyRegions).await?;
                return Ok(Some(Fill::DirtyRegions));
            }
        }
        self.attach_new(open, status, slot, &found).await
    }

    async fn attach_new(&self, open: &OpenVolume, status: &Status, slot: Slot, found: &[LegDir]) -> Result<Option<Fill>, Error> {
        let bytes = status.blocks * BLOCK_SIZE;
        let survivor = status.legs[slot.other().index()].id;
        let survivors_disk = open.disk_of(survivor).and_then(|name| self.disks.get(&name)).map(|disk| disk.identity.physical);
        let reserve = || {
            let avoid = |disk: &crate::disks::Disk| Some(&disk.identity.physical) == survivors_disk.as_ref();
            self.disks.reserve(1, bytes + OVERHEAD, avoid).and_then(|mut reserved| reserved.pop())
        };
        let mut reserved = reserve();
        if reserved.is_none() {
            // Copies that cannot be used any more make room, and only then.
            let stale: Vec<_> = found
                .iter()
                .filter(|leg| status.legs.iter().all(|member| member.id != leg.leg || slot_is_out(status, leg.leg)))
                .cloned()
                .collect();
            self.remove_legs(stale).await?;
            reserved = reserve();
        }
        let Some(disk) = reserved.as_ref().and_then(crate::disks::Reservation::disk) else { return Ok(None) };
        let object = self.volume(&open.id).await?;
        let (uid, leg) = (open.uid.clone(), LegId(*uuid::Uuid::new_v4().as_bytes()));
        let dir = legs::dir(&disk, &uid, leg);
        let made = {
            let (dir, volume) = (dir.clone(), datapath_id(&uid)?);
            blocking(&open.id, move || {
                legs::prepare(&dir, &object, &uid, leg)?;
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

    /// Both copies count: what else there is of the volume is older, and goes.
    async fn remove_replaced(&self, open: &OpenVolume, status: &Status) {
        let Ok(mut found) = self.find_legs(&open.uid).await else { return };
        found.retain(|leg| status.legs.iter().all(|member| member.id != leg.leg));
        if found.is_empty() {
            return;
        }
        info!(disks = ?found.iter().map(|leg| &leg.disk).collect::<Vec<_>>(), "a copy that was replaced is removed");
        if let Err(error) = self.remove_legs(found).await {
            warn!(%error, "a copy that was replaced is still there");
        }
    }
}

fn slot_is_out(status: &Status, leg: LegId) -> bool {
    status.legs.iter().any(|member| member.id == leg && member.state == LegState::Out)
}
