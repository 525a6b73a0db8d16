//! Write-behind, as the StorageClass parameter `writeBehind` asks for it (mirror rule 32): which leg is the slow one.

use lockstep_datapath::core::{
    status::{LegState, Status},
    units::Slot,
};
use lockstep_proto::parameters::{self, WriteBehind};
use lockstep_store::Store;
use tracing::{info, warn};

use super::OpenVolume;
use crate::node::Node;

impl<S: Store> Node<S> {
    /// Tells the mirror which leg is slow, if that is not what it knows. Legs come and go, and it forgets then.
    pub(super) async fn mind_slow_leg(&self, open: &OpenVolume, status: &Status, before: &mut bool) {
        if std::mem::replace(before, status.write_behind) != status.write_behind {
            let disk = status.write_mostly.and_then(|slot| open.disk_of(status.legs[slot.index()].id));
            match status.write_behind {
                true => info!(reason = "WriteBehind", disk, "writes are answered before the copy on this disk has them"),
                false => info!(reason = "WriteThrough", "writes wait for both copies"),
            }
        }
        let wanted = self.slow_leg(open, status);
        let known = status.write_mostly == wanted && status.write_behind == wanted.is_some();
        if known || !status.ready || status.read_only || status.stopped {
            return;
        }
        if let Err(error) = open.volume.write_mostly(wanted).await {
            warn!(%error, "the mirror could not be told which of its copies is slow");
        }
    }

    /// The leg on a rotating disk, if the other one is not on one too.
    fn slow_leg(&self, open: &OpenVolume, status: &Status) -> Option<Slot> {
        let asked = parameters::parse(&open.object.spec.parameters).is_ok_and(|given| given.write_behind == WriteBehind::Rotational);
        if !asked || status.legs.iter().any(|leg| leg.state != LegState::In) {
            return None;
        }
        let rotates =
            |slot: Slot| open.disk_of(status.legs[slot.index()].id).and_then(|name| self.disks.get(&name)).map(|disk| disk.rotates());
        match (rotates(Slot::A), rotates(Slot::B)) {
            (Some(true), Some(false)) => Some(Slot::A),
            (Some(false), Some(true)) => Some(Slot::B),
            _ => None,
        }
    }
}
