//! NodeGetVolumeStats and NodeExpandVolume: how full a volume is, and how it grows while it is used.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use lockstep_datapath::errand::{self, Errand, Said};
use lockstep_proto::{
    csi::{VolumeUsage, volume_usage::Unit},
    objects::VolumeMode,
};
use lockstep_store::Store;
use serde::{Deserialize, Serialize};
use tracing::info;

use crate::{
    error::Error,
    file_system,
    news::news,
    node::{Node, blocking, names},
    publish,
    staged::{self, Staged},
};

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Asks a mounted file system how full it is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StatFs {
    path: PathBuf,
}

/// In all, available, used.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Usage {
    bytes: [u64; 3],
    inodes: [u64; 3],
}

impl Errand for StatFs {
    const NAME: &'static str = "statfs";
    type Answer = Said<Usage>;

    fn run(self) -> Said<Usage> {
        let stat = rustix::fs::statvfs(&self.path).map_err(|errno| errno.raw_os_error())?;
        let blocks = [stat.f_blocks, stat.f_bavail, stat.f_blocks.saturating_sub(stat.f_bfree)];
        Ok(Usage {
            bytes: blocks.map(|blocks| blocks.saturating_mul(stat.f_frsize)),
            inodes: [stat.f_files, stat.f_favail, stat.f_files.saturating_sub(stat.f_ffree)],
        })
    }
}

impl<S: Store> Node<S> {
    /// The volume must be at `path`: where it is staged, or where it is published.
    fn at(&self, id: &str, path: &Path) -> Result<Staged, Error> {
        let nowhere = || Error::NoPath { volume: id.to_owned(), path: path.to_owned() };
        let staged = staged::of(&self.state, id)?.ok_or_else(nowhere)?;
        let device = staged.device.as_deref().ok_or_else(nowhere)?;
        let published = || Ok::<_, Error>(publish::targets(device, &staged.staging_path)?.iter().any(|mount| mount.point == path));
        if staged.staging_path != path && !published()? {
            return Err(nowhere());
        }
        Ok(staged)
    }

    /// Bytes and inodes of a file system; the size of a bare device.
    ///
    /// # Errors
    /// `Error::NoPath` if the volume is not there.
    pub(crate) async fn usage(self: Arc<Self>, id: String, path: PathBuf) -> Result<Vec<VolumeUsage>, Error> {
        self.volume(&id).await?;
        let staged = self.at(&id, &path)?;
        if staged.volume_mode == VolumeMode::Block {
            let total = self.open_volume(&staged.uid).map_or(0, |open| open.bytes());
            return Ok(vec![VolumeUsage { unit: Unit::Bytes.into(), total: signed(total), ..VolumeUsage::default() }]);
        }
        blocking(&id, move || {
            let used = errand::ask(StatFs { path: path.clone() });
            let Usage { bytes, inodes } = used.map_err(Error::io(format!("statfs {}", path.display())))?;
            let unit = |unit: Unit, [total, available, used]: [u64; 3]| VolumeUsage {
                unit: unit.into(),
                total: signed(total),
                available: signed(available),
                used: signed(used),
            };
            Ok(vec![unit(Unit::Bytes, bytes), unit(Unit::Inodes, inodes)])
        })
        .await
    }

    /// Gives the device, and the file system on it, the size that the controller made room for.
    ///
    /// # Errors
    /// `Error::Precondition` if the controller did not, or the volume is not staged.
    pub(crate) async fn expand(self: Arc<Self>, id: String, path: PathBuf, required: u64) -> Result<u64, Error> {
        let volume = self.volume(&id).await?;
        self.at(&id, &path)?;
        let staged = self.staged_and_alive(&id)?;
        let open = self.open_volume(&names(&volume).1).ok_or_else(|| Error::NoVolume(id.clone()))?;
        let granted = volume.status.as_ref().map_or(0, |status| status.capacity_bytes);
        if required > granted {
            let text = format!("{id} has room for {granted} bytes on its disks, not for {required}: the controller has to expand it first");
            return Err(Error::Precondition(text));
        }
        let before = open.bytes();
        open.volume.grow(granted).await?;
        let bytes = open.bytes();
        if let Some(fs_type) = staged.fs_type {
            let (device, mounted) = (open.volume.device().to_owned(), staged.staging_path);
            blocking(&id, move || file_system::grow_mounted(&device, &mounted, fs_type)).await?;
        }
        info!(reason = "VolumeExpanded", bytes, "expanded");
        if bytes > before {
            let message = format!("the volume and what is on it were grown from {} to {} MiB, in use", before >> 20, bytes >> 20);
            self.tell_of_volume(&volume, vec![news(false, "VolumeExpanded", message)]);
        }
        Ok(bytes)
    }
}
