//! NodeStageVolume and NodeUnstageVolume: from a volume to a mounted file system or a bare device, and back.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use lockstep_datapath::core::status::Status as MirrorStatus;
use lockstep_proto::objects::{FormatState, FormatStatus, FsType, MirrorVolume, VolumeMode, VolumePhase};
use lockstep_store::Store;
use tracing::{info, warn};

use crate::{
    allocate::known,
    capability::Access,
    error::Error,
    file_system,
    mirror::OpenVolume,
    mounts,
    node::{Node, blocking, names},
    publish, staged,
    staged::Staged,
    state_dir,
};

/// What an object says of its device before there is one.
const OPENING: &str = "opening";

impl<S: Store> Node<S> {
    /// Stages a volume. Called again with the same arguments it is done at once, or goes on where it was cut off.
    ///
    /// # Errors
    /// After an error nothing is staged, unless it was staged before.
    pub(crate) async fn stage(self: Arc<Self>, id: String, path: PathBuf, access: Access) -> Result<(), Error> {
        let volume = self.volume(&id).await?;
        let wanted = wanted(&volume, &path, &access)?;
        mounts::must_reach_the_host(&path)?;
        if let Some(before) = staged::of(&self.state, &id)? {
            if let Some(open) = self.open_volume(&before.uid) {
                already(&before, &wanted)?;
                return self.mount_again(&volume, &before, &open).await;
            }
            warn!("the volume was staged when an earlier csi-node ended: what is left of that is removed");
            self.take_down(&before).await?;
        }
        let point = path.clone();
        blocking(&id, move || usable(&point)).await?;
        wanted.write(&self.state)?;
        match self.mark_in_use(&id, &wanted.uid, OPENING).await {
            Ok(()) => {}
            Err(error) => {
                state_dir::remove_record(&self.state.staged(&wanted.uid))?;
                return Err(error);
            }
        }
        match self.bring_up(&volume, wanted.clone()).await {
            Ok(()) => Ok(()),
            Err(error) => {
                // After a final error no NodeUnstageVolume follows: nothing may be half-staged.
                if let Err(left) = self.take_down(&wanted).await {
                    warn!(%left, "a volume that could not be staged could not be taken down either: it is when it is staged or unstaged next");
                }
                Err(error)
            }
        }
    }

    /// The object says that the volume is in use: from now on nobody deletes it. Who was faster wins.
    async fn mark_in_use(&self, id: &str, uid: &str, device: &str) -> Result<(), Error> {
        let marked = self.patch_status(id, uid, |status| status.device = Some(device.to_owned())).await?;
        if marked.metadata.deletion_timestamp.is_some() {
            self.patch_status(id, uid, |status| status.device = None).await?;
            return Err(Error::Precondition(format!("{id} is being deleted")));
        }
        Ok(())
    }

    async fn bring_up(self: &Arc<Self>, volume: &MirrorVolume, mut staged: Staged) -> Result<(), Error> {
        self.assembly_begins(volume).await?;
        let assembled = self.assemble(volume, &mut staged).await;
        self.assembly_ended(&staged.uid, assembled.as_ref().err())?;
        let open = assembled?;
        let wanted = volume.status.as_ref().map_or(0, |status| status.capacity_bytes);
        if let Err(error) = open.volume.grow(wanted).await {
            // Both copies are good: it is used at its old size, and grows when it is asked to again.
            warn!(%error, "the volume could not be given the size that it was granted");
        }
        if staged.volume_mode == VolumeMode::Filesystem {
            self.bring_up_file_system(volume, &staged, &open).await?;
        }
        info!(path = %staged.staging_path.display(), "staged");
        Ok(())
    }

    /// Until the mirror serves.
    async fn assemble(self: &Arc<Self>, volume: &MirrorVolume, staged: &mut Staged) -> Result<Arc<OpenVolume>, Error> {
        let found = self.find_legs(&staged.uid, &known(volume)).await?;
        staged.legs = found.iter().map(|leg| leg.dir.clone()).collect();
        let open = self.open_mirror(volume, found).await.inspect_err(|error| self.tell_of_refusal(volume, error))?;
        staged.device = Some(open.volume.device().to_owned());
        staged.write(&self.state)?;
        let device = open.volume.device().display().to_string();
        self.patch_status(&staged.volume, &staged.uid, |status| status.device = Some(device.clone())).await?;
        until_ready(&open).await?;
        Ok(open)
    }

    /// It is staged already; but was it unmounted since, or an unstage cut off in its middle?
    async fn mount_again(self: &Arc<Self>, volume: &MirrorVolume, staged: &Staged, open: &Arc<OpenVolume>) -> Result<(), Error> {
        if staged.volume_mode == VolumeMode::Block {
            return Ok(());
        }
        if mounted(staged)? {
            // Its csi-node may have been killed before it grew.
            let (staged, device) = (staged.clone(), open.volume.device().to_owned());
            if let Err(error) = blocking(&staged.volume.clone(), move || grow_if_xfs(&staged, &device)).await {
                warn!(%error, "its file system could not be given the whole device: it is used at its old size");
            }
            return Ok(());
        }
        warn!(path = %staged.staging_path.display(), "it is not mounted any more where it was staged: it is mounted again");
        let path = staged.staging_path.clone();
        blocking(&staged.volume, move || usable(&path)).await?;
        self.bring_up_file_system(volume, staged, open).await
    }

    async fn bring_up_file_system(self: &Arc<Self>, volume: &MirrorVolume, staged: &Staged, open: &Arc<OpenVolume>) -> Result<(), Error> {
        let Some(fs_type) = staged.fs_type else { return Err(Error::Precondition(format!("{} has no file system type", staged.volume))) };
        let device = open.volume.device().to_owned();
        let said = volume.status.as_ref().map(|status| status.format.clone()).unwrap_or_default();
        let record = self.format_on_record(staged, said.clone()).await?;
        let (known, uuid) = (record == said, record.fs_uuid.clone());
        let again = record.state == FormatState::Formatting;
        let looked_at = device.clone();
        if blocking(&staged.volume, move || file_system::must_format(&looked_at, fs_type, &record)).await? {
            let uuid = uuid::Uuid::new_v4().to_string();
            self.record_format(staged, FormatState::Formatting, &uuid).await?;
            let (device, new) = (device.clone(), uuid.clone());
            blocking(&staged.volume, move || file_system::format(&device, fs_type, &new, again)).await?;
            // A file system that is on record is on both disks.
            open.volume.flush().await?;
            self.record_on_legs(staged, open, &uuid).await?;
            self.record_format(staged, FormatState::Formatted, &uuid).await?;
        } else if let Some(uuid) = uuid {
            // Legs that an older csi-node made do not say so.
            if let Err(error) = self.record_on_legs(staged, open, &uuid).await {
                warn!(%error, "a copy does not say yet that the volume is formatted");
            }
            if !known {
                self.record_format(staged, FormatState::Formatted, &uuid).await?;
            }
        }
        let (staged, bytes, growing) = (staged.clone(), open.bytes(), self.state.growing(&staged.uid));
        blocking(&staged.volume.clone(), move || {
            file_system::prepare(&device, fs_type, bytes, &growing)?;
            file_system::mount(&device, &staged.staging_path, fs_type, &staged.mount_flags)?;
            grow_if_xfs(&staged, &device)
        })
        .await
    }

    async fn record_format(&self, staged: &Staged, state: FormatState, uuid: &str) -> Result<(), Error> {
        let format = FormatStatus { state, fs_uuid: Some(uuid.to_owned()) };
        self.patch_status(&staged.volume, &staged.uid, |status| status.format = format.clone()).await?;
        Ok(())
    }

    /// Unstages a volume. Not staged: nothing done. Works on a dead device too.
    ///
    /// # Errors
    /// `Error::Precondition` if it is still published; what the kernel says if it is still in use.
    pub(crate) async fn unstage(self: Arc<Self>, id: String, path: PathBuf) -> Result<(), Error> {
        let Some(staged) = staged::of(&self.state, &id)? else { return Ok(()) };
        if staged.staging_path != path {
            info!(path = %path.display(), staged = %staged.staging_path.display(), "the volume is staged elsewhere: nothing to unstage here");
            return Ok(());
        }
        let alive = self.open_volume(&staged.uid).is_some();
        if alive && let Some(device) = &staged.device {
            let published = publish::targets(device, &staged.staging_path)?;
            if let Some(target) = published.first() {
                let target = target.point.display();
                return Err(Error::Precondition(format!("{id} is still published at {target}: unpublish it first")));
            }
        }
        self.take_down(&staged).await?;
        info!("unstaged");
        Ok(())
    }

    /// Takes down whatever there is of a staged volume, its record last.
    async fn take_down(self: &Arc<Self>, staged: &Staged) -> Result<(), Error> {
        let open = self.open_volume(&staged.uid);
        let (path, alive) = (staged.staging_path.clone(), open.is_some());
        // What could not be staged was copied before there was a device.
        let device = open.as_ref().map(|open| open.volume.device().to_owned()).or_else(|| staged.device.clone());
        blocking(&staged.volume, move || unmount(&path, device.as_deref(), alive)).await?;
        match open {
            Some(open) => self.close_mirror(&open).await?,
            None => {
                self.remove_dead_mirror(&staged.uid).await?;
                self.forget_device(staged).await;
            }
        }
        Ok(state_dir::remove_record(&self.state.staged(&staged.uid))?)
    }

    /// The object of a volume whose csi-node died says that it is not staged any more.
    async fn forget_device(&self, staged: &Staged) {
        match self.patch_status(&staged.volume, &staged.uid, |status| status.device = None).await {
            Ok(_) | Err(Error::NoVolume(_)) => {}
            Err(error) => warn!(%error, "the volume's object still says that it is staged"),
        }
    }
}

/// What is asked for, as a record; the volume must be fit for it.
fn wanted(volume: &MirrorVolume, path: &Path, access: &Access) -> Result<Staged, Error> {
    let (id, uid) = names(volume);
    if volume.metadata.deletion_timestamp.is_some() {
        return Err(Error::Precondition(format!("{id} is being deleted")));
    }
    let status = volume.status.clone().unwrap_or_default();
    if status.phase != VolumePhase::Ready {
        return Err(Error::Precondition(format!("{id} is not allocated yet: {:?} {}", status.phase, status.message)));
    }
    access.fits(volume)?;
    Ok(Staged {
        version: staged::Version,
        volume: id,
        uid,
        staging_path: path.to_owned(),
        volume_mode: volume.spec.volume_mode,
        fs_type: volume.spec.fs_type,
        mount_flags: access.mount_flags.clone(),
        parameters: volume.spec.parameters.clone(),
        legs: Vec::new(),
        device: None,
    })
}

fn already(before: &Staged, wanted: &Staged) -> Result<(), Error> {
    if before.same_as(wanted) {
        return Ok(());
    }
    Err(Error::Incompatible(format!(
        "{} is staged at {} with mount options {:?}: unstage it first",
        before.volume,
        before.staging_path.display(),
        before.mount_flags
    )))
}

/// The staging path is a directory that nothing is mounted on. Made if it is not there. Blocks.
fn usable(path: &Path) -> Result<(), Error> {
    match fs::metadata(path) {
        Ok(meta) if !meta.is_dir() => {
            return Err(Error::InvalidArgument(format!("staging_target_path {} is a file: it has to be a directory", path.display())));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path).map_err(Error::io(format!("creating {}", path.display())))?;
        }
        Err(error) => return Err(Error::io(format!("staging_target_path {}", path.display()))(error)),
        Ok(_) => {}
    }
    match mounts::at(path).map_err(Error::io("reading the mounts"))? {
        Some(mount) => {
            Err(Error::Precondition(format!("{} is mounted at staging_target_path {}: unmount it", mount.source.display(), path.display())))
        }
        None => Ok(()),
    }
}

/// XFS grows when it is mounted, where it may be written to; ext4 does so before. Blocks.
fn grow_if_xfs(staged: &Staged, device: &Path) -> Result<(), Error> {
    let read_only = staged.mount_flags.iter().any(|flag| flag == "ro");
    match staged.fs_type {
        Some(FsType::Xfs) if !read_only => file_system::grow_mounted(device, &staged.staging_path, FsType::Xfs),
        _ => Ok(()),
    }
}

/// Unmounts the staging path, if this volume's device is what is mounted there.
fn unmount(path: &Path, device: Option<&Path>, alive: bool) -> Result<(), Error> {
    let mounted = mounts::at(path).map_err(Error::io("reading the mounts"))?;
    let Some(mount) = mounted.filter(|mount| Some(mount.source.as_path()) == device) else { return Ok(()) };
    info!(path = %path.display(), source = %mount.source.display(), "unmounting");
    let unmounted = if alive { mounts::unmount_all(path) } else { mounts::unmount_lazily(path) };
    unmounted.map_err(Error::io(format!("unmounting {}", path.display())))
}

/// Whether the volume's file system is mounted where it is staged.
pub(crate) fn mounted(staged: &Staged) -> Result<bool, Error> {
    let mount = mounts::at(&staged.staging_path).map_err(Error::io("reading the mounts"))?;
    Ok(mount.is_some_and(|mount| Some(&mount.source) == staged.device.as_ref()))
}

/// The mirror serves requests, or never will.
pub(crate) async fn until_ready(open: &OpenVolume) -> Result<(), Error> {
    let mut status = open.volume.status();
    let decided = status.wait_for(|status: &MirrorStatus| status.ready || status.read_only || status.stopped).await;
    let decided = *decided.map_err(|_| Error::Datapath(lockstep_datapath::Error::Gone))?;
    if decided.ready && !decided.read_only {
        return Ok(());
    }
    Err(Error::Precondition(format!("{} cannot be served: its only good copy, or its witness, cannot be written; see the log", open.id)))
}
