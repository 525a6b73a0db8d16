//! Leg directories: `<disk>/volumes/<volume-uid>.<leg-uuid>/{data,meta,volume.yaml}`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use lockstep_datapath::core::{
    format::{self, META_LEN},
    units::{LegId, VolumeId},
};
use lockstep_proto::objects::MirrorVolume;
use serde::{Deserialize, Serialize};

use crate::{
    disks::Disk,
    error::Error,
    state_dir::{self, StateError},
};

/// What a leg takes of a disk beside its data: `meta`, `volume.yaml`, a directory.
pub const OVERHEAD: u64 = META_LEN + (64 << 10);
/// Kept free on every disk, for XFS itself.
const SLACK_MIN: u64 = 64 << 20;

/// A leg that is on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LegDir {
    /// The disk's name.
    pub disk: String,
    /// Its id.
    pub leg: LegId,
    /// Its directory.
    pub dir: PathBuf,
}

/// Beside the data, for a person or a program that finds the leg alone.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct VolumeFile {
    driver: String,
    volume: String,
    uid: String,
    leg_id: String,
    spec: lockstep_proto::objects::MirrorVolumeSpec,
    /// The file system that was made on the volume, to its end: there may be data on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fs_uuid: Option<String>,
}

/// A UUID's 128 bits, from its text.
pub fn parse_id(text: &str) -> Option<[u8; 16]> {
    uuid::Uuid::parse_str(text).ok().map(|uuid| *uuid.as_bytes())
}

/// The volume's id, from the UID of its object.
pub fn volume_id(uid: &str) -> Option<VolumeId> {
    parse_id(uid).map(VolumeId)
}

fn volumes(mount: &Path) -> PathBuf {
    mount.join("volumes")
}

/// Where a leg is to be.
pub fn dir(disk: &Disk, uid: &str, leg: LegId) -> PathBuf {
    volumes(&disk.mount).join(format!("{uid}.{leg}"))
}

/// Every leg on a disk, with the UID of its volume. Blocks.
pub fn all(disk: &Disk) -> Vec<(String, LegDir)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(volumes(&disk.mount)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let named = name.to_str().and_then(|name| name.split_once('.'));
        if let Some((uid, leg)) = named.and_then(|(uid, leg)| Some((uid, parse_id(leg)?))) {
            found.push((uid.to_owned(), LegDir { disk: disk.name.clone(), leg: LegId(leg), dir: entry.path() }));
        }
    }
    found
}

/// Every leg of the volume on a disk. Blocks.
pub fn find(disk: &Disk, uid: &str) -> Vec<LegDir> {
    all(disk).into_iter().filter(|(of, _)| of == uid).map(|(_, leg)| leg).collect()
}

/// The epoch of the newest record on a leg. `None`: it was never made to the end.
///
/// # Errors
/// If that cannot be told: it may hold data. Blocks.
pub fn epoch(dir: &Path) -> Result<Option<u64>, Error> {
    let path = dir.join("meta");
    match fs::read(&path) {
        // Damaged: cut off while it was written, or later; the witness knows which.
        Ok(meta) => Ok(format::peek(&meta).ok().map(|summary| summary.epoch.0)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("reading {}", path.display()))(error)),
    }
}

/// Makes the leg's directory with `volume.yaml`. `data` and `meta` are the datapath's. What a cut-off attempt left there is removed: the
/// caller knows that the leg was never used. `fs_uuid` is of the volume's file system, if it was made. Blocks.
///
/// # Errors
/// `StateError::Io`.
pub fn prepare(dir: &Path, volume: &MirrorVolume, uid: &str, leg: LegId, fs_uuid: Option<String>) -> Result<(), StateError> {
    let failed = |source| StateError::Io { path: dir.to_owned(), source };
    remove(dir).map_err(failed)?;
    fs::create_dir(dir).map_err(failed)?;
    let file = VolumeFile {
        driver: lockstep_proto::DRIVER_NAME.into(),
        volume: volume.metadata.name.clone().unwrap_or_default(),
        uid: uid.to_owned(),
        leg_id: leg.to_string(),
        spec: volume.spec.clone(),
        fs_uuid,
    };
    state_dir::write_record(&volume_file(dir), &file)
}

fn volume_file(dir: &Path) -> PathBuf {
    dir.join("volume.yaml")
}

fn read_volume_file(dir: &Path) -> Result<Option<VolumeFile>, StateError> {
    state_dir::read_record(&volume_file(dir))
}

/// The UUID of the file system that was made on the volume, to its end. `None`: none was, as far as this leg knows. Blocks.
///
/// # Errors
/// `StateError::Unreadable`.
pub fn file_system(dir: &Path) -> Result<Option<String>, StateError> {
    Ok(read_volume_file(dir)?.and_then(|file| file.fs_uuid))
}

/// Says on the leg that this file system was made, if it does not say so yet. Blocks.
///
/// # Errors
/// `StateError::Unreadable`, also if there is no `volume.yaml`; `StateError::Io`.
pub fn record_file_system(dir: &Path, fs_uuid: &str) -> Result<(), StateError> {
    let path = volume_file(dir);
    let mut file = read_volume_file(dir)?.ok_or_else(|| StateError::Unreadable { path: path.clone(), reason: "it is not there".into() })?;
    if file.fs_uuid.as_deref() == Some(fs_uuid) {
        return Ok(());
    }
    file.fs_uuid = Some(fs_uuid.to_owned());
    state_dir::write_record(&path, &file)
}

/// The volume's object as it was when the leg was made, without its status. `None`: the leg does not say. Blocks.
///
/// # Errors
/// `StateError::Unreadable`.
pub fn object(dir: &Path) -> Result<Option<MirrorVolume>, StateError> {
    Ok(read_volume_file(dir)?.map(|file| MirrorVolume::new(&file.volume, file.spec)))
}

/// Whether an operator once forced the volume of this leg to be assembled. Blocks.
///
/// # Errors
/// If that cannot be told.
pub fn was_forced(dir: &Path) -> Result<bool, Error> {
    let path = dir.join("meta");
    let meta = fs::read(&path).map_err(Error::io(format!("reading {}", path.display())))?;
    let summary = format::peek(&meta).map_err(|source| lockstep_datapath::Error::Meta { path, source })?;
    Ok(summary.forced)
}

/// Removes a leg. `meta` goes first, so that half of a leg is never taken for a whole one. Not there: nothing done. Blocks. XFS gives back
/// the space of a removed file when it likes, and that of a shortened one at once.
///
/// # Errors
/// What the system says.
pub fn remove(dir: &Path) -> io::Result<()> {
    let absent = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) };
    fs::remove_file(dir.join("meta")).or_else(absent)?;
    fs::File::options().write(true).open(dir.join("data")).and_then(|data| data.set_len(0)).or_else(absent)?;
    fs::remove_dir_all(dir).or_else(absent)?;
    let parent = dir.parent().unwrap_or(Path::new("/"));
    fs::File::open(parent).and_then(|parent| parent.sync_all())
}

/// How long a leg's data is; 0 if it is not there. Blocks.
pub fn data_len(dir: &Path) -> u64 {
    fs::metadata(dir.join("data")).map_or(0, |data| data.len())
}

/// Bytes that legs can have on this disk, and bytes that they have. Blocks.
///
/// # Errors
/// What the system says.
pub fn space(mount: &Path) -> io::Result<(u64, u64)> {
    let mut allocated = 0;
    for entry in fs::read_dir(volumes(mount))? {
        let entry = entry?;
        allocated += data_len(&entry.path()) + OVERHEAD;
    }
    let stat = rustix::fs::statvfs(mount)?;
    let (free, total) = (stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize);
    let slack = SLACK_MIN.max(total / 50);
    Ok(((free + allocated).saturating_sub(slack), allocated))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leg_that_was_cut_off_is_made_again_and_removed_twice() {
        let root = tempfile::tempdir().unwrap();
        let spec = serde_json::from_str(r#"{"csiName":"v","capacityBytes":1,"node":"n","volumeMode":"Block"}"#).unwrap();
        let (volume, leg) = (MirrorVolume::new("v", spec), LegId([7; 16]));
        let dir = root.path().join("u.l");
        prepare(&dir, &volume, "u", leg, None).unwrap();
        fs::write(dir.join("data"), "half").unwrap();
        prepare(&dir, &volume, "u", leg, None).unwrap();
        assert!(!dir.join("data").exists());
        let file = read_volume_file(&dir).unwrap().unwrap();
        assert_eq!((file.uid.as_str(), file.leg_id), ("u", leg.to_string()));
        remove(&dir).unwrap();
        remove(&dir).unwrap();
    }
}
