//! One look at everything that the selectors match.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use lockstep_proto::objects::DiskPhase;
use tracing::{info, warn};

use super::{
    Disk, Disks, Refused,
    device::{self, Content, Device},
    error::DiskError,
    file_system,
};
use crate::legs;

/// How long a disk may take to answer before the others are gone on with.
const PATIENCE: Duration = Duration::from_secs(10);

impl Disks {
    /// Looks at every device that is selected; claims blank ones, mounts ours, notices those that failed or are gone.
    pub async fn scan(self: &Arc<Self>) {
        let disks = Arc::clone(self);
        let Ok(matches) = tokio::task::spawn_blocking(move || disks.matches()).await else { return };
        let mut seen = BTreeSet::new();
        let mut looks = Vec::new();
        for paths in matches.into_values() {
            // Slow is not gone.
            let slow = self.all().into_iter().filter(|disk| paths.contains(&disk.device)).map(|disk| disk.name);
            if !self.busy.lock().expect("no holder panics").insert(paths[0].clone()) {
                seen.extend(slow);
                continue;
            }
            let (slow, disks): (Vec<_>, _) = (slow.collect(), Arc::clone(self));
            let look = tokio::task::spawn_blocking(move || {
                let found: Vec<_> = paths.iter().filter_map(|path| disks.look_at(path)).collect();
                disks.busy.lock().expect("no holder panics").remove(&paths[0]);
                found
            });
            looks.push((slow, tokio::time::timeout(PATIENCE, look)));
        }
        for (slow, look) in looks {
            match look.await {
                Ok(Ok(found)) => seen.extend(found),
                Ok(Err(error)) => warn!(%error, "looking at a disk ended in a panic"),
                Err(_) => {
                    warn!(disks = ?slow, "a disk does not answer");
                    seen.extend(slow);
                }
            }
        }
        let disks = Arc::clone(self);
        drop(tokio::task::spawn_blocking(move || disks.notice_absent(&seen)).await);
    }

    /// The devices of each physical disk, each once, whatever the number of selectors that match it.
    fn matches(&self) -> BTreeMap<String, Vec<PathBuf>> {
        let mut matches: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        let mut refused = BTreeMap::new();
        for selector in &self.selectors {
            for path in glob::glob(&selector.path).into_iter().flatten().flatten() {
                match device::look_up(&path) {
                    Ok(device) => {
                        let paths = matches.entry(device.identity.physical).or_default();
                        if !paths.contains(&device.path) {
                            paths.push(device.path);
                        }
                    }
                    Err(error) => drop(refused.insert(path, error.to_string())),
                }
            }
        }
        let gone = |path: &PathBuf| !refused.contains_key(path) && !matches.values().flatten().any(|matched| matched == path);
        self.refused.write().expect("no holder panics").retain(|path, _| !gone(path));
        for (path, message) in &refused {
            self.refuse(path, None, message.clone());
        }
        matches
    }

    /// Gives the name of the disk that is there, if it is ours.
    fn look_at(&self, path: &Path) -> Option<String> {
        let device = match device::look_up(path) {
            Ok(device) => device,
            Err(error) => return self.refuse(path, None, error.to_string()),
        };
        if let Some(name) = file_system::mounted_as(&self.state, &device) {
            return match self.take_over(&device, &name) {
                Ok(()) => {
                    self.check(&name);
                    Some(name)
                }
                Err(error) => self.refuse(path, Some(&device), error.to_string()),
            };
        }
        match device.content() {
            Ok(Content::Blank) => self.claim_blank(&device),
            Ok(Content::Ours(uuid)) => self.claim(&device, &uuid),
            Ok(Content::Foreign(message)) => self.refuse(path, Some(&device), message),
            Err(error) => self.refuse(path, Some(&device), error.to_string()),
        }
    }

    /// A device that is mounted in its place: perhaps an earlier csi-node did that and got no further.
    fn take_over(&self, device: &Device, name: &str) -> Result<(), DiskError> {
        if self.get(name).is_none() {
            let point = self.state.disk_mount(name);
            file_system::settle_in(&self.state, device, name, &point).inspect_err(|_| drop(crate::mounts::unmount_all(&point)))?;
            self.adopt(device, name, point);
        }
        Ok(())
    }

    fn claim_blank(&self, device: &Device) -> Option<String> {
        let made = file_system::format_blank(&self.state, device);
        match made.and_then(|uuid| Ok((file_system::mount(&self.state, device, &uuid)?, uuid))) {
            Ok((point, uuid)) => {
                self.adopt(device, &uuid, point);
                info!(reason = "DiskClaimed", disk = uuid, device = %device.name_for_people(), "a blank disk was claimed");
                Some(uuid)
            }
            Err(error) => self.refuse(&device.path, Some(device), error.to_string()),
        }
    }

    fn claim(&self, device: &Device, uuid: &str) -> Option<String> {
        if let Some(disk) = self.get(uuid) {
            match disk.phase {
                DiskPhase::Failed if disk.absent => info!(disk = uuid, "the disk is back"),
                // It failed and was never away: it stays out.
                DiskPhase::Failed => return Some(uuid.to_owned()),
                _ => {
                    let other = disk.label;
                    return self.refuse(&device.path, Some(device), format!("it has the same file system as {other}: a disk is used once"));
                }
            }
        }
        // What can be mounted is never formatted, whatever is on record.
        let mounted = file_system::mount(&self.state, device, uuid).or_else(|error| {
            let again = file_system::format_again(&self.state, device, uuid).unwrap_or(Err(error));
            again.and_then(|()| file_system::mount(&self.state, device, uuid))
        });
        match mounted {
            Ok(point) => self.adopt(device, uuid, point),
            Err(error) => return self.refuse(&device.path, Some(device), error.to_string()),
        }
        Some(uuid.to_owned())
    }

    fn adopt(&self, device: &Device, uuid: &str, mount: PathBuf) {
        let (capacity, allocated) = legs::space(&mount).unwrap_or_default();
        let mut identity = device.identity.clone();
        identity.fs_uuid = uuid.to_owned();
        let disk = Disk {
            name: uuid.to_owned(),
            identity,
            label: device.name_for_people(),
            device: device.path.clone(),
            mount,
            phase: DiskPhase::Ready,
            message: String::new(),
            capacity,
            allocated,
            absent: false,
        };
        self.known.write().expect("no holder panics").insert(uuid.to_owned(), disk);
        self.refused.write().expect("no holder panics").remove(&device.path);
        self.change();
    }

    fn refuse(&self, path: &Path, device: Option<&Device>, message: String) -> Option<String> {
        let identity = device.map(|device| device.identity.clone()).unwrap_or_default();
        let refusal = Refused { path: path.to_owned(), identity, message };
        let before = self.refused.write().expect("no holder panics").insert(path.to_owned(), refusal.clone());
        if before.as_ref() != Some(&refusal) {
            warn!(reason = "DiskRefused", path = %path.display(), "{}", refusal.message);
            self.change();
        }
        None
    }

    /// A mounted disk: does it still answer?
    fn check(&self, name: &str) {
        let Some(disk) = self.get(name) else { return };
        match (disk.phase, file_system::answers(&disk.mount)) {
            (DiskPhase::Ready, Ok(())) => self.refresh(name),
            (DiskPhase::Ready, Err(error)) => self.fail(name, &error),
            // So that it can be pulled. It is busy as long as I/O to it is not over.
            _ => drop(crate::mounts::unmount_all(&disk.mount)),
        }
    }

    fn notice_absent(&self, seen: &BTreeSet<String>) {
        for disk in self.all().into_iter().filter(|disk| !seen.contains(&disk.name)) {
            if disk.phase == DiskPhase::Ready {
                self.fail(&disk.name, "it is gone");
            }
            drop(crate::mounts::unmount_all(&disk.mount));
            if let Some(disk) = self.known.write().expect("no holder panics").get_mut(&disk.name) {
                disk.absent = true;
            }
        }
    }
}
