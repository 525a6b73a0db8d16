//! NodeGetVolumeHealth and NodeGetStorageHealth (CSI 1.13, alpha): what is wrong now; nothing, where all is well.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use lockstep_proto::{
    csi::{
        StorageHealthErrorType, VolumeHealthErrorType, node_get_storage_health_response::StorageBackendHealth,
        volume_health::VolumeHealthEntry,
    },
    objects::DiskPhase,
};
use lockstep_store::Store;

use crate::{disks::Disk, error::Error, mirror::OpenVolume, node::Node, staged};

/// Bytes of a message that CSI lets pass.
const MESSAGE: usize = 1024;

/// As much of a text as a message may have.
fn bounded(mut text: String) -> String {
    let end = (0..=MESSAGE.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
    text
}

fn entry(status: VolumeHealthErrorType, reason: &str, message: String) -> VolumeHealthEntry {
    VolumeHealthEntry { status: status.into(), reason: reason.to_owned(), message: bounded(message) }
}

/// What a volume's conditions say is wrong.
fn adverse(conditions: &[Condition]) -> Vec<VolumeHealthEntry> {
    let is = |kind: &str, status: &str| conditions.iter().find(|condition| condition.type_ == kind && condition.status == status);
    let inaccessible = is("Ready", "False").map(|condition| (VolumeHealthErrorType::Inaccessible, condition));
    // Without a word it is not a copy that is lost.
    let degraded = is("Degraded", "True").filter(|condition| !condition.message.is_empty());
    let degraded = degraded.map(|condition| (VolumeHealthErrorType::Degraded, condition));
    let wrong = inaccessible.into_iter().chain(degraded);
    wrong.map(|(status, condition)| entry(status, &condition.reason, condition.message.clone())).collect()
}

/// What a scrub found.
fn mismatch(blocks: u64) -> Option<VolumeHealthEntry> {
    let message = || format!("its two copies differ in {blocks} blocks of 4096 bytes: say which one is right, or restore them");
    (blocks > 0).then(|| entry(VolumeHealthErrorType::Degraded, "MismatchFound", message()))
}

fn of_disks(disks: &[Disk]) -> Option<StorageBackendHealth> {
    let failed: Vec<&Disk> = disks.iter().filter(|disk| disk.phase == DiskPhase::Failed).collect();
    if failed.is_empty() {
        return None;
    }
    let none_left = failed.len() == disks.len();
    let status = if none_left { StorageHealthErrorType::StorageUnreachable } else { StorageHealthErrorType::StorageDegraded };
    let message = failed.iter().map(|disk| disk.message.as_str()).collect::<Vec<_>>().join("; ");
    Some(StorageBackendHealth { status: status.into(), reason: "DiskFailed".into(), message: bounded(message), volume_capability: None })
}

impl<S: Store> Node<S> {
    /// What is wrong with a volume, staged or not. Of one that is served nobody else is asked.
    ///
    /// # Errors
    /// `Error::NoVolume`.
    pub(crate) async fn volume_health(self: &Arc<Self>, id: &str) -> Result<Vec<VolumeHealthEntry>, Error> {
        let staged = staged::of(&self.state, id)?;
        let open = staged.as_ref().and_then(|staged| self.open_volume(&staged.uid));
        if let Some(wrong) = open.and_then(|open| self.wrong_with(&open)) {
            return Ok(wrong);
        }
        let mut wrong: Vec<VolumeHealthEntry> = match self.volume(id).await {
            Ok(volume) => {
                let status = volume.status.unwrap_or_default();
                adverse(&status.conditions).into_iter().chain(mismatch(status.mismatched_blocks)).collect()
            }
            // That it is not served is known without its object.
            Err(Error::Store(_)) if staged.is_some() => Vec::new(),
            Err(error) => return Err(error),
        };
        if staged.is_some() && wrong.iter().all(|entry| entry.status() != VolumeHealthErrorType::Inaccessible) {
            let message = "it is being staged or taken over from an earlier csi-node: if that lasts, stop its users and start them again";
            wrong.push(entry(VolumeHealthErrorType::Inaccessible, "NotServed", message.into()));
        }
        Ok(wrong)
    }

    /// `None`: the mirror does not serve yet.
    fn wrong_with(&self, open: &OpenVolume) -> Option<Vec<VolumeHealthEntry>> {
        let status = *open.volume.status().borrow();
        if !status.ready {
            return None;
        }
        let mut wrong = adverse(&self.conditions(open, &status));
        if status.bad_blocks > 0 {
            let blocks = status.bad_blocks;
            let message =
                format!("no copy holds {blocks} blocks of 4096 bytes any more: their readers get an error until they are written again");
            wrong.push(entry(VolumeHealthErrorType::DataLoss, "BlocksLost", message));
        }
        wrong.extend(mismatch(status.scrub.differing()));
        Some(wrong)
    }

    /// What is wrong with the node's disks.
    pub(crate) fn storage_health(&self) -> Vec<StorageBackendHealth> {
        of_disks(&self.disks.all()).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

    use super::*;
    use crate::disks::tests::disks;

    fn condition(kind: &str, status: &str, reason: &str) -> Condition {
        Condition {
            type_: kind.into(),
            status: status.into(),
            reason: reason.into(),
            message: "why".into(),
            last_transition_time: Time(Timestamp::now()),
            observed_generation: None,
        }
    }

    #[test]
    fn what_is_wrong_is_said_and_nothing_else() {
        let well =
            [condition("Ready", "True", "Healthy"), condition("Degraded", "False", "BothCopies"), condition("Scrubbed", "False", "")];
        assert_eq!(adverse(&well), []);
        let worse = [condition("Ready", "False", "ReadOnly"), condition("Degraded", "True", "CopyLost")];
        let wordless = Condition { message: String::new(), ..worse[1].clone() };
        assert_eq!(adverse(&[wordless]), []);
        let found = adverse(&worse);
        assert_eq!(found.iter().map(|entry| entry.reason.as_str()).collect::<Vec<_>>(), ["ReadOnly", "CopyLost"]);
        assert_eq!(found[1].status(), VolumeHealthErrorType::Degraded);
    }

    #[test]
    fn a_message_is_as_long_as_csi_lets_it_be() {
        let long = entry(VolumeHealthErrorType::Degraded, "CopyLost", "ü".repeat(MESSAGE));
        assert_eq!(long.message.len(), MESSAGE);
        assert_eq!(bounded("a".to_owned() + &"ü".repeat(MESSAGE)).len(), MESSAGE - 1);
    }

    #[test]
    fn one_disk_that_failed_degrades_the_node_and_the_last_one_cuts_it_off() {
        let (_dir, disks) = disks(&[("a", "1", 10), ("b", "2", 10)]);
        assert_eq!(of_disks(&disks.all()), None);
        disks.fail("a", "EIO");
        let found = of_disks(&disks.all()).unwrap();
        assert_eq!(found.status(), StorageHealthErrorType::StorageDegraded);
        assert!(found.message.contains("a failed: EIO"), "{}", found.message);
        disks.fail("b", "EIO");
        assert_eq!(of_disks(&disks.all()).unwrap().status(), StorageHealthErrorType::StorageUnreachable);
    }
}
