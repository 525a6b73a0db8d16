//! NodePublishVolume and NodeUnpublishVolume: a staged volume at a pod's path; and what is there, for stats and growth.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use lockstep_proto::objects::VolumeMode;
use lockstep_store::Store;
use rustix::fs::{major, minor};
use tracing::info;

use crate::{
    capability::Access,
    error::Error,
    mounts::{self, Mount},
    node::{Node, blocking},
    stage::mounted,
    staged::{self, Staged},
};

/// Every place but `staging` where a device, or the file system on it, is mounted.
///
/// # Errors
/// If the mounts cannot be read.
pub(crate) fn targets(device: &Path, staging: &Path) -> Result<Vec<Mount>, Error> {
    let all = mounts::list().map_err(Error::io("reading the mounts"))?;
    let number = fs::metadata(device).map(|meta| (major(meta.rdev()), minor(meta.rdev()))).ok();
    let node = device.strip_prefix("/dev").unwrap_or(device);
    let here = |mount: &Mount| Some(mount.dev) == number || (mount.fs_type == "devtmpfs" && mount.root == Path::new("/").join(node));
    Ok(all.into_iter().filter(|mount| mount.point != staging && here(mount)).collect())
}

impl<S: Store> Node<S> {
    /// The record of a volume that is staged and alive.
    pub(crate) fn staged_and_alive(&self, id: &str) -> Result<Staged, Error> {
        let staged =
            staged::of(&self.state, id)?.ok_or_else(|| Error::Precondition(format!("{id} is not staged on this node: stage it first")))?;
        if self.open_volume(&staged.uid).is_none() {
            let text = format!("{id} was staged when an earlier csi-node ended and is dead: unpublish and unstage it, then stage it again");
            return Err(Error::Precondition(text));
        }
        Ok(staged)
    }

    /// Publishes a staged volume. The target is made.
    ///
    /// # Errors
    /// After an error the target is as it was before.
    pub(crate) async fn publish(
        self: Arc<Self>,
        id: String,
        staging: PathBuf,
        target: PathBuf,
        access: Access,
        read_only: bool,
    ) -> Result<(), Error> {
        let volume = self.volume(&id).await?;
        access.fits(&volume)?;
        mounts::must_reach_the_host(&target)?;
        let staged = self.staged_and_alive(&id)?;
        if staged.staging_path != staging {
            let text = format!("{id} is staged at {}, not at {}", staged.staging_path.display(), staging.display());
            return Err(Error::Precondition(text));
        }
        let device = staged.device.clone().ok_or_else(|| Error::Precondition(format!("{id} has no device yet")))?;
        let read_only = read_only || access.read_only;
        if read_only && staged.volume_mode == VolumeMode::Block {
            return Err(Error::InvalidArgument("readonly: the writers of a raw block volume cannot be kept out of one target".into()));
        }
        if staged.volume_mode == VolumeMode::Filesystem && !mounted(&staged)? {
            let text = format!("{id} is not mounted any more at {}: stage it again", staging.display());
            return Err(Error::Precondition(text));
        }
        blocking(&id.clone(), move || {
            let published = targets(&device, &staged.staging_path)?;
            if let Some(there) = published.iter().find(|mount| mount.point == target) {
                return match there.read_only == read_only {
                    true => Ok(()),
                    false => Err(Error::Incompatible(format!("{id} is published at {} with another readonly", target.display()))),
                };
            }
            if let Some(other) = published.first().filter(|_| !access.many_targets) {
                let text = format!("{id} is published at {} already, and its access mode allows one target", other.point.display());
                return Err(Error::Precondition(text));
            }
            let source = if staged.volume_mode == VolumeMode::Block { device } else { staged.staging_path };
            bind(&source, &target, staged.volume_mode, read_only)?;
            info!(target = %target.display(), read_only, "published");
            Ok(())
        })
        .await
    }

    /// Unpublishes a volume and removes the target. Not published: nothing done.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) async fn unpublish(self: Arc<Self>, id: String, target: PathBuf) -> Result<(), Error> {
        let staged = staged::of(&self.state, &id)?;
        let alive = staged.as_ref().is_some_and(|staged| self.open_volume(&staged.uid).is_some());
        blocking(&id.clone(), move || {
            if let Some((staged, device)) = staged.as_ref().and_then(|staged| Some((staged, staged.device.as_deref()?)))
                && let Some(other) = mounts::at(&target).map_err(Error::io("reading the mounts"))?
                && !targets(device, &staged.staging_path)?.iter().any(|mount| mount.point == target)
            {
                let text = format!("{} is mounted at target_path {}, not {id}: it is left alone", other.source.display(), target.display());
                return Err(Error::Precondition(text));
            }
            let unmounted = if alive { mounts::unmount_all(&target) } else { mounts::unmount_lazily(&target) };
            unmounted.map_err(Error::io(format!("unmounting {}", target.display())))?;
            remove_target(&target)
        })
        .await
    }
}

fn bind(source: &Path, target: &Path, mode: VolumeMode, read_only: bool) -> Result<(), Error> {
    let failed = |what: &str| Error::io(format!("{what} {}", target.display()));
    if mounts::at(target).map_err(failed("reading the mounts for"))?.is_some() {
        return Err(Error::Precondition(format!("something else is mounted at target_path {}: unmount it", target.display())));
    }
    let made = match (fs::metadata(target), mode) {
        (Ok(meta), VolumeMode::Filesystem) if !meta.is_dir() => {
            return Err(Error::InvalidArgument(format!("target_path {} is a file: a file system needs a directory", target.display())));
        }
        (Ok(meta), VolumeMode::Block) if meta.is_dir() => {
            return Err(Error::InvalidArgument(format!("target_path {} is a directory: a block volume needs a file", target.display())));
        }
        (Ok(_), _) => false,
        (Err(_), VolumeMode::Filesystem) => fs::create_dir_all(target).map(|()| true).map_err(failed("creating target_path"))?,
        (Err(_), VolumeMode::Block) => {
            let parent = target.parent().unwrap_or(Path::new("/"));
            let create = fs::create_dir_all(parent).and_then(|()| fs::File::create(target));
            create.map(|_| true).map_err(failed("creating target_path"))?
        }
    };
    mounts::bind(source, target, read_only).map_err(failed("mounting at")).inspect_err(|_| {
        if made {
            drop(remove_target(target));
        }
    })
}

/// An empty directory or an empty file; anything else is somebody's data.
fn remove_target(target: &Path) -> Result<(), Error> {
    let removed = match fs::symlink_metadata(target) {
        Ok(meta) if meta.is_dir() => fs::remove_dir(target),
        Ok(meta) if meta.len() == 0 => fs::remove_file(target),
        Ok(_) => {
            return Err(Error::Precondition(format!("target_path {} is a file that is not empty: it is left alone", target.display())));
        }
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(format!("removing {}", target.display()))(error)),
        _ => Ok(()),
    }
}
