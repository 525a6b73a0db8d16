//! A disk's own XFS: made once, mounted by UUID, set to fail instead of retrying for ever.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use lockstep_proto::objects::DiskIdentity;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::device::{Device, LABEL};
use crate::{
    mounts,
    state_dir::{self, StateDir},
    tool,
};

/// A file in the root of every disk of ours: it was formatted to the end.
const MARKER: &str = "lockstep.yaml";

/// Kept while a mkfs runs: only the disk that it names is formatted again after a crash.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Formatting {
    physical: String,
    size_bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    driver: String,
    fs_uuid: String,
}

/// The UUID under which a mkfs of this disk began and did not end.
pub fn unfinished(state: &StateDir, identity: &DiskIdentity) -> Option<String> {
    let entries = fs::read_dir(state.formatting_dir()).ok()?.flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).find(|uuid| {
        let record = state_dir::read_record::<Formatting>(&state.formatting(uuid)).ok().flatten();
        record.is_some_and(|record| record.physical == identity.physical && record.size_bytes == identity.size_bytes)
    })
}

/// Formats a disk that is blank, or whose mkfs under this UUID did not end. Blocks.
pub fn format(state: &StateDir, device: &Device, uuid: &str) -> Result<(), String> {
    let record = state.formatting(uuid);
    let identity = &device.identity;
    let formatting = Formatting { physical: identity.physical.clone(), size_bytes: identity.size_bytes };
    state_dir::write_record(&record, &formatting).map_err(|error| error.to_string())?;
    info!(device = %device.name_for_people(), uuid, "formatting");
    let id = format!("uuid={uuid}");
    let args = ["-q", "-f", "-L", LABEL, "-m", &id].map(Path::new).into_iter().chain([device.path.as_path()]);
    tool::run("mkfs.xfs", args).map_err(|error| error.to_string())?;
    Ok(())
}

/// Mounts a disk of ours and checks that it is whole. Blocks.
pub fn mount(state: &StateDir, device: &Device, uuid: &str) -> Result<PathBuf, String> {
    let point = state.disk_mount(uuid);
    fs::create_dir_all(&point).map_err(|error| format!("{}: {error}", point.display()))?;
    let args = ["-t", "xfs", "-o", "noatime,nodev,nosuid,noexec"].map(Path::new).into_iter().chain([device.path.as_path(), &point]);
    tool::run("mount", args).map_err(|error| error.to_string())?;
    if let Err(error) = fail_fast(device) {
        warn!(device = %device.name_for_people(), %error, "XFS keeps retrying metadata writes on this disk: a dead disk may hang");
    }
    check_marker(state, &point, uuid).inspect_err(|_| drop(mounts::unmount_lazily(&point)))?;
    Ok(point)
}

/// Where this file system of ours is mounted already, by an earlier csi-node.
pub fn mounted(state: &StateDir, device: &Device, uuid: &str) -> Option<PathBuf> {
    let point = state.disk_mount(uuid);
    mounts::at(&point).ok().flatten().filter(|mount| mount.dev == device.dev).map(|_| point)
}

fn check_marker(state: &StateDir, point: &Path, uuid: &str) -> Result<(), String> {
    let path = point.join(MARKER);
    let text = |error: state_dir::StateError| error.to_string();
    match state_dir::read_record::<Marker>(&path).map_err(text)? {
        Some(_) => {}
        // Ours by the record, or by its emptiness: a crash came between the mkfs and the marker.
        None if fs::read_dir(point).is_ok_and(|mut entries| entries.next().is_none()) => {
            fs::create_dir(point.join("volumes")).map_err(|error| format!("{}: {error}", point.display()))?;
            let marker = Marker { driver: lockstep_proto::DRIVER_NAME.into(), fs_uuid: uuid.into() };
            state_dir::write_record(&path, &marker).map_err(text)?;
        }
        None => return Err(format!("its label says {LABEL}, but {MARKER} is missing and other files are there: it is left alone")),
    }
    fs::create_dir_all(point.join("volumes")).map_err(|error| format!("{}: {error}", point.display()))?;
    state_dir::remove_record(&state.formatting(uuid)).map_err(text)
}

/// By default XFS retries a failed metadata write for ever, which hangs whoever waits for it. A dead disk must be seen to be dead.
fn fail_fast(device: &Device) -> io::Result<()> {
    let name = device.path.file_name().unwrap_or_default();
    let errors = Path::new("/sys/fs/xfs").join(name).join("error");
    fs::write(errors.join("fail_at_unmount"), "1")?;
    for kind in fs::read_dir(errors.join("metadata"))? {
        let kind = kind?.path();
        fs::write(kind.join("max_retries"), "0")?;
        fs::write(kind.join("retry_timeout_seconds"), "0")?;
    }
    Ok(())
}

/// Whether a mounted disk still answers: a file system that was shut down refuses to open a file. Blocks, for ever if the disk hangs.
pub fn answers(point: &Path) -> Result<(), String> {
    File::open(point.join(MARKER)).and_then(|file| file.sync_all()).map_err(|error| error.to_string())
}
