//! A disk's own XFS: made once, mounted by UUID, set to fail instead of retrying for ever.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{
    device::{Device, LABEL},
    error::DiskError,
};
use crate::{
    mounts,
    state_dir::{self, StateDir},
    tool,
};

/// A file in the root of every disk of ours: it was formatted to the end.
pub const MARKER: &str = "lockstep.yaml";

/// Kept while a mkfs runs: only the disk that it names is formatted again after a crash.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Formatting {
    physical: String,
    size_bytes: u64,
    #[serde(default)]
    part: String,
}

impl Formatting {
    fn of(device: &Device) -> Self {
        let identity = &device.identity;
        Self { physical: identity.physical.clone(), size_bytes: identity.size_bytes, part: device.part.clone() }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    driver: String,
    fs_uuid: String,
}

/// Removes what a kill left of records that were being written.
pub fn tidy(state: &StateDir) {
    for entry in fs::read_dir(state.formatting_dir()).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with('.') && name.ends_with(".new")) {
            drop(fs::remove_file(entry.path()));
        }
    }
}

fn began(state: &StateDir, device: &Device, uuid: &str) -> bool {
    let record = state_dir::read_record::<Formatting>(&state.formatting(uuid)).ok().flatten();
    record.is_some_and(|record| record == Formatting::of(device))
}

/// The UUID under which a mkfs of this device began and did not end.
fn unfinished(state: &StateDir, device: &Device) -> Option<String> {
    let names = fs::read_dir(state.formatting_dir()).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| uuid::Uuid::try_parse(name).is_ok()).find(|uuid| began(state, device, uuid))
}

/// Formats a disk that is blank; gives the file system's UUID. Blocks.
pub fn format_blank(state: &StateDir, device: &Device) -> Result<String, DiskError> {
    let uuid = unfinished(state, device).unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    state_dir::write_record(&state.formatting(&uuid), &Formatting::of(device))?;
    // Without -f: mkfs itself refuses what came onto the disk since it was looked at.
    make(device, &uuid, &[])?;
    Ok(uuid)
}

/// Formats a disk again whose mkfs under this UUID was cut off, as the record and the disk itself say. Anything else: `None`, and nothing
/// done. Blocks.
pub fn format_again(state: &StateDir, device: &Device, uuid: &str) -> Option<Result<(), DiskError>> {
    (began(state, device, uuid) && device.is_half_made()).then(|| make(device, uuid, &["-f"]))
}

fn make(device: &Device, uuid: &str, options: &[&str]) -> Result<(), DiskError> {
    info!(device = %device.name_for_people(), uuid, "formatting");
    let id = format!("uuid={uuid}");
    let args = ["-q", "-L", LABEL, "-m", &id].into_iter().chain(options.iter().copied()).map(Path::new);
    tool::run("mkfs.xfs", args.chain([device.path.as_path()]))?;
    Ok(())
}

/// Mounts a disk of ours and checks that it is whole. Blocks.
pub fn mount(state: &StateDir, device: &Device, uuid: &str) -> Result<PathBuf, DiskError> {
    let point = state.disk_mount(uuid);
    fs::create_dir_all(&point).map_err(DiskError::io(&point))?;
    let args = ["-t", "xfs", "-o", "noatime,nodev,nosuid,noexec"].map(Path::new).into_iter().chain([device.path.as_path(), &point]);
    tool::run("mount", args)?;
    settle_in(state, device, uuid, &point).inspect_err(|_| drop(mounts::unmount_lazily(&point)))?;
    Ok(point)
}

/// What a mounted disk needs before it is used. Blocks.
pub fn settle_in(state: &StateDir, device: &Device, uuid: &str, point: &Path) -> Result<(), DiskError> {
    if let Err(error) = fail_fast(device) {
        warn!(device = %device.name_for_people(), %error, "XFS keeps retrying metadata writes on this disk: a dead disk may hang");
    }
    check_marker(point, uuid)?;
    // Only now is there anything to lose, and no record says any more that there is not.
    Ok(state_dir::remove_record(&state.formatting(uuid))?)
}

/// The name under which the device is mounted already, by us or by an earlier csi-node.
pub fn mounted_as(state: &StateDir, device: &Device) -> Option<String> {
    let mounts = mounts::list().ok()?.into_iter().filter(|mount| mount.dev == device.dev);
    let mut names = mounts.filter_map(|mount| {
        let name = mount.point.file_name()?.to_str()?.to_owned();
        (state.disk_mount(&name) == mount.point).then_some(name)
    });
    names.next()
}

fn check_marker(point: &Path, uuid: &str) -> Result<(), DiskError> {
    let (marker, volumes) = (point.join(MARKER), point.join("volumes"));
    if state_dir::read_record::<Marker>(&marker)?.is_none() {
        // Ours by its emptiness: a crash came between the mkfs and the marker.
        if !is_empty_but_for(point, &[&format!(".{MARKER}.new"), "volumes"])? || volumes.exists() && !is_empty_but_for(&volumes, &[])? {
            return Err(DiskError::NoMarker);
        }
        state_dir::write_record(&marker, &Marker { driver: lockstep_proto::DRIVER_NAME.into(), fs_uuid: uuid.into() })?;
    }
    fs::create_dir_all(&volumes).map_err(DiskError::io(&volumes))?;
    File::open(point).and_then(|root| root.sync_all()).map_err(DiskError::io(point))
}

fn is_empty_but_for(dir: &Path, names: &[&str]) -> Result<bool, DiskError> {
    for entry in fs::read_dir(dir).map_err(DiskError::io(dir))? {
        let name = entry.map_err(DiskError::io(dir))?.file_name();
        if names.iter().all(|allowed| name != *allowed) {
            return Ok(false);
        }
    }
    Ok(true)
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

#[cfg(test)]
mod tests {
    use lockstep_proto::objects::DiskIdentity;

    use super::*;

    const UUID: &str = "0b7ab7a6-6f14-4b8d-9b1c-0d5a3c9f2a11";

    fn device(part: &str) -> Device {
        let identity = DiskIdentity { physical: "wwn".into(), size_bytes: 1 << 30, ..DiskIdentity::default() };
        Device { path: "/nonexistent".into(), dev: (8, 0), identity, part: part.into() }
    }

    #[test]
    fn only_a_record_of_this_very_part_names_an_unfinished_mkfs() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), false).unwrap();
        let half_written = state.formatting_dir().join(format!(".{UUID}.new"));
        state_dir::write_record(&half_written, &Formatting::of(&device("2048"))).unwrap();
        assert_eq!(unfinished(&state, &device("2048")), None, "a record that was not written to its end");
        tidy(&state);
        assert!(!half_written.exists());
        state_dir::write_record(&state.formatting(UUID), &Formatting::of(&device("2048"))).unwrap();
        tidy(&state);
        assert_eq!(unfinished(&state, &device("2048")).as_deref(), Some(UUID));
        assert_eq!(unfinished(&state, &device("4096")), None, "another partition of the same size");
        assert!(format_again(&state, &device("2048"), UUID).is_none(), "the disk does not say that its mkfs was cut off");
    }

    #[test]
    fn a_root_is_ours_if_it_has_the_marker_or_nothing() {
        let cut_off: [&[&str]; 4] = [&[], &["volumes"], &[".lockstep.yaml.new"], &["volumes", ".lockstep.yaml.new"]];
        for made in cut_off {
            let dir = tempfile::tempdir().unwrap();
            made.iter().for_each(|name| fs::create_dir(dir.path().join(name)).unwrap());
            // What is left of the marker is a file.
            drop(fs::remove_dir(dir.path().join(".lockstep.yaml.new")));
            check_marker(dir.path(), UUID).unwrap();
            fs::create_dir(dir.path().join("volumes/leg")).unwrap();
            check_marker(dir.path(), UUID).unwrap();
            fs::remove_file(dir.path().join(MARKER)).unwrap();
            assert!(matches!(check_marker(dir.path(), UUID), Err(DiskError::NoMarker)), "there are legs");
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("letter"), "").unwrap();
        assert!(matches!(check_marker(dir.path(), UUID), Err(DiskError::NoMarker)));
    }
}
