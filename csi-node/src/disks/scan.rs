//! One look at everything that the selectors match.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use lockstep_proto::objects::DiskPhase;
use tokio::task::JoinSet;
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

/// When what failed is tried again.
const AGAIN: Duration = Duration::from_millis(300);

/// One look at one disk.
struct Look {
    /// Of what there is one at a time.
    key: String,
    /// Disks that it is about: slow is not gone.
    names: Vec<String>,
    /// What is looked at.
    at: At,
}

enum At {
    /// Devices of one physical disk, which are selected.
    Devices(Vec<PathBuf>),
    /// A disk of ours that no selector matches.
    Unselected,
}

/// Tries again what failed, a moment later: the handle that told that nobody uses the device lives on in a child that is just being started for
/// another disk, and whoever wants the device for himself meanwhile is told that it is in use.
fn twice<T>(attempt: impl Fn() -> Result<T, DiskError>) -> Result<T, DiskError> {
    attempt().or_else(|_| {
        std::thread::sleep(AGAIN);
        attempt()
    })
}

impl Disks {
    /// Looks at every device that is selected; claims blank ones, mounts ours, notices those that failed or are gone. Whatever hangs: it
    /// ends, and what hangs is not looked at again before it answers.
    pub async fn scan(self: &Arc<Self>) {
        let Some(matches) = self.bounded("selectors".into(), PATIENCE, Self::matches).await else { return };
        let mut looks = JoinSet::new();
        for look in self.looks(matches) {
            let disks = Arc::clone(self);
            looks.spawn(async move {
                let Look { key, names, at } = look;
                let about = names.clone();
                disks.bounded(key, PATIENCE, move |disks| disks.look(&at, &about)).await.unwrap_or(names)
            });
        }
        let seen: BTreeSet<String> = looks.join_all().await.into_iter().flatten().collect();
        let mut gone = JoinSet::new();
        for disk in self.all().into_iter().filter(|disk| !seen.contains(&disk.name)) {
            let disks = Arc::clone(self);
            gone.spawn(async move { disks.bounded(disk.name.clone(), PATIENCE, move |disks| disks.notice_absent(&disk)).await });
        }
        gone.join_all().await;
    }

    /// Does what may hang. `None`: it does hang, or it has not ended since it began in an earlier look.
    async fn bounded<T: Send + 'static>(
        self: &Arc<Self>,
        key: String,
        patience: Duration,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Option<T> {
        if !self.busy.lock().expect("no holder panics").insert(key.clone()) {
            return None;
        }
        let free = Free { disks: Arc::clone(self), key: key.clone() };
        let task = tokio::task::spawn_blocking(move || {
            let done = work(&free.disks);
            drop(free);
            done
        });
        match tokio::time::timeout(patience, task).await {
            Ok(Ok(done)) => return Some(done),
            Ok(Err(error)) => warn!(%error, key, "looking at a disk ended in a panic"),
            Err(_) => warn!(key, "a disk does not answer"),
        }
        None
    }

    fn looks(&self, matches: BTreeMap<String, Vec<PathBuf>>) -> Vec<Look> {
        let mut unselected = self.all();
        let mut looks = Vec::new();
        for (key, paths) in matches {
            let names = unselected.extract_if(.., |disk| paths.contains(&disk.device)).map(|disk| disk.name).collect();
            looks.push(Look { key, names, at: At::Devices(paths) });
        }
        looks.extend(unselected.into_iter().map(|disk| Look { key: disk.name.clone(), names: vec![disk.name], at: At::Unselected }));
        looks
    }

    /// The devices of each physical disk, each once, whatever the number of selectors that match it.
    fn matches(&self) -> BTreeMap<String, Vec<PathBuf>> {
        let mut matches: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        let (mut refused, mut idle) = (BTreeMap::new(), BTreeSet::new());
        for selector in &self.selectors {
            let paths: Vec<PathBuf> = glob::glob(&selector.path).into_iter().flatten().flatten().collect();
            if paths.is_empty() {
                idle.insert(selector.path.clone());
            }
            for path in paths {
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
        for pattern in self.newly_idle(idle) {
            warn!(pattern, "no device matches this selector: compare it with the names in /dev/disk/by-id, or plug the disk in");
        }
        let gone = |path: &PathBuf| !refused.contains_key(path) && !matches.values().flatten().any(|matched| matched == path);
        self.refused.write().expect("no holder panics").retain(|path, _| !gone(path));
        for (path, message) in &refused {
            self.refuse(path, None, message.clone());
        }
        matches
    }

    /// Those of the selectors which match nothing now that did so, or were not looked at, before.
    fn newly_idle(&self, idle: BTreeSet<String>) -> Vec<String> {
        let mut before = self.idle.lock().expect("no holder panics");
        let new = idle.difference(&before).cloned().collect();
        *before = idle;
        new
    }

    fn look(&self, at: &At, names: &[String]) -> Vec<String> {
        match at {
            At::Devices(paths) => {
                paths.iter().filter_map(|path| self.look_at(path).inspect(|name| self.set_selected(name, true))).collect()
            }
            At::Unselected => names.iter().filter_map(|name| self.look_unselected(name)).collect(),
        }
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
        let made = twice(|| file_system::format_blank(&self.state, device));
        match made.and_then(|uuid| Ok((twice(|| file_system::mount(&self.state, device, &uuid))?, uuid))) {
            Ok((point, uuid)) => {
                self.adopt(device, &uuid, point);
                info!(reason = "DiskClaimed", disk = uuid, device = %device.name_for_people(), "a blank disk was claimed");
                Some(uuid)
            }
            Err(error) => self.refuse(&device.path, Some(device), error.to_string()),
        }
    }

    fn claim(&self, device: &Device, uuid: &str) -> Option<String> {
        let known = self.get(uuid);
        if let Some(disk) = &known {
            match disk.phase {
                DiskPhase::Failed if disk.absent => {}
                // It failed and was never away: it stays out.
                DiskPhase::Failed => return Some(uuid.to_owned()),
                _ => {
                    let other = &disk.label;
                    // Not a word of wiping it: it may be that very disk.
                    let message =
                        format!("it has the same file system as {other}: a disk is used once. Take one of the two out of the selection");
                    return self.refuse(&device.path, Some(device), message);
                }
            }
        }
        // What can be mounted is never formatted, whatever is on record.
        let mounted = twice(|| file_system::mount(&self.state, device, uuid)).or_else(|error| {
            let again = file_system::format_again(&self.state, device, uuid).unwrap_or(Err(error));
            again.and_then(|()| file_system::mount(&self.state, device, uuid))
        });
        match mounted {
            Ok(point) => self.adopt(device, uuid, point),
            Err(error) => return self.refuse(&device.path, Some(device), error.to_string()),
        }
        if known.is_some() {
            info!(disk = uuid, "the disk is back");
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
            selected: true,
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

    /// A disk that is mounted is here as long as the kernel has its device: names under /dev/disk come and go. One that is not mounted is
    /// where the selectors say.
    fn look_unselected(&self, name: &str) -> Option<String> {
        let disk = self.get(name)?;
        match crate::mounts::at(&disk.mount) {
            Ok(Some(mount)) if !Path::new(&format!("/sys/dev/block/{}:{}", mount.dev.0, mount.dev.1)).exists() => return None,
            Ok(None) => return None,
            Ok(Some(_)) | Err(_) => self.check(name),
        }
        self.set_selected(name, false);
        Some(name.to_owned())
    }

    fn set_selected(&self, name: &str, selected: bool) {
        let mut known = self.known.write().expect("no holder panics");
        let Some(disk) = known.get_mut(name).filter(|disk| disk.selected != selected) else { return };
        disk.selected = selected;
        if selected {
            info!(disk = name, device = disk.label, "the disk is selected again");
        } else {
            warn!(disk = name, device = disk.label, "no selector matches the disk any more: it stays in use until csi-node restarts");
        }
    }

    fn notice_absent(&self, disk: &Disk) {
        if disk.phase == DiskPhase::Ready {
            self.fail(&disk.name, "it is gone");
        }
        if let Some(disk) = self.known.write().expect("no holder panics").get_mut(&disk.name) {
            disk.absent = true;
        }
        drop(crate::mounts::unmount_all(&disk.mount));
    }
}

/// Lets the next look begin, also after a panic.
struct Free {
    disks: Arc<Disks>,
    key: String,
}

impl Drop for Free {
    fn drop(&mut self) {
        self.disks.busy.lock().expect("no holder panics").remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Disks, tests::disks};

    async fn bounded<T: Send + 'static>(
        disks: &std::sync::Arc<Disks>,
        key: &str,
        work: impl FnOnce(&Disks) -> T + Send + 'static,
    ) -> Option<T> {
        disks.bounded(key.into(), Duration::from_millis(200), work).await
    }

    #[test]
    fn a_selector_that_matches_nothing_is_named_once_and_again_when_it_did_match() {
        let (_dir, disks) = disks(&[]);
        let idle = |patterns: &[&str]| disks.newly_idle(patterns.iter().map(|pattern| (*pattern).to_owned()).collect());
        assert_eq!(idle(&["/dev/a*", "/dev/b"]), ["/dev/a*", "/dev/b"]);
        assert!(idle(&["/dev/a*"]).is_empty());
        assert_eq!(idle(&["/dev/a*", "/dev/b"]), ["/dev/b"]);
    }

    #[tokio::test]
    async fn what_hangs_is_waited_for_once() {
        let (_dir, disks) = disks(&[]);
        let (release, hang) = std::sync::mpsc::channel::<()>();
        assert_eq!(bounded(&disks, "sda", move |_| hang.recv().is_ok()).await, None);
        assert_eq!(bounded(&disks, "sda", |_| ()).await, None, "it hangs still");
        assert_eq!(bounded(&disks, "sdb", |_| 1).await, Some(1));
        drop(release);
        while bounded(&disks, "sda", |_| ()).await.is_none() {
            tokio::task::yield_now().await;
        }
        assert_eq!(bounded(&disks, "sda", |_| panic!("a bug")).await, None::<()>);
        while bounded(&disks, "sda", |_| ()).await.is_none() {
            tokio::task::yield_now().await;
        }
    }
}
