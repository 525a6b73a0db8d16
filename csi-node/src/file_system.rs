//! The file system on a volume: made once, on record; never made again over what may be data.
//!
//! ```text
//! never formatted --> formatting --mkfs--> formatted(UUID) --> fsck, mount, grow
//!   must be blank       wiped first          must be there with that UUID, or DATA_LOSS
//! ```
//! The record is the object's, and each leg's from the moment that mkfs is done (`formatted.rs`).

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use lockstep_datapath::errand::{self, Errand};
use lockstep_proto::objects::{FormatState, FormatStatus, FsType};
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use crate::{
    disks::probe::{self, Found, Signature},
    error::Error,
    state_dir, tool,
};

/// How long the `xfs_growfs` of a csi-node that was killed may take to end: the kernel does not take a second one meanwhile.
const EARLIER: Duration = Duration::from_secs(5);

/// The name that mkfs and mount know it by.
pub fn name(fs_type: FsType) -> &'static str {
    match fs_type {
        FsType::Ext4 => "ext4",
        FsType::Xfs => "xfs",
    }
}

/// What is on a device: type and UUID. `None`: no signature at all. Blocks.
fn signature(device: &Path) -> Result<Option<(String, String)>, Error> {
    let looked = errand::send(Look { device: device.to_owned() });
    looked.and_then(|found| found.map_err(io::Error::other)).map_err(Error::io(format!("reading {}", device.display())))
}

/// Looks for the signature on a device that csi-node serves.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Look {
    device: PathBuf,
}

impl Errand for Look {
    const NAME: &'static str = "look";
    type Answer = Result<Option<(String, String)>, String>;

    fn run(self) -> Self::Answer {
        let file = File::open(&self.device).map_err(|error| error.to_string())?;
        match probe::found(&self.device, &file) {
            Ok(Found::Nothing) => Ok(None),
            Ok(Found::Several(kinds)) => Ok(Some((probe::several(&kinds, &self.device), "unknown".into()))),
            Ok(Found::Signature(Signature { kind, uuid, table, .. })) => {
                let text = |said: Option<String>| said.unwrap_or_else(|| "unknown".into());
                Ok(Some((text(kind.or(table)), text(uuid))))
            }
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Whether the device is as its record says. `Ok(true)`: it is to be formatted. Blocks.
///
/// # Errors
/// `Error::DataLoss` if what is there is not what was put there, or nothing is.
pub fn must_format(device: &Path, fs_type: FsType, record: &FormatStatus) -> Result<bool, Error> {
    let found = signature(device)?;
    match (record.state, found) {
        (FormatState::Never, None) | (FormatState::Formatting, _) => Ok(true),
        (FormatState::Never, Some((kind, uuid))) => Err(Error::DataLoss(format!(
            "the volume was never formatted, says its object, but it has {kind} ({uuid}): it is left alone. If that is its data, set status.format of the object to it"
        ))),
        (FormatState::Formatted, Some((kind, uuid))) if kind == name(fs_type) && Some(&uuid) == record.fs_uuid.as_ref() => Ok(false),
        (FormatState::Formatted, found) => {
            let found = found.map_or("nothing".to_owned(), |(kind, uuid)| format!("{kind} ({uuid})"));
            let expected = format!("{} ({})", name(fs_type), record.fs_uuid.as_deref().unwrap_or("unknown"));
            Err(Error::DataLoss(format!(
                "the volume should have {expected}, but it has {found}: it is neither mounted nor formatted. If what it has is its data, set status.format of \
                 its object to that. If not, look at each copy alone (README, \"A copy without Lockstep\"); what is lost comes back from a backup, onto a new \
                 volume"
            )))
        }
    }
}

/// Formats it. With `again` a mkfs was cut off before: what it left is wiped, and the device is not taken for zeroes. Blocks.
///
/// # Errors
/// `Error::Tool`.
pub fn format(device: &Path, fs_type: FsType, uuid: &str, again: bool) -> Result<(), Error> {
    if again {
        tool::run("wipefs", [Path::new("--all"), Path::new("--quiet"), device])?;
    }
    info!(device = %device.display(), kind = name(fs_type), uuid, "formatting the volume");
    let xfs_uuid = format!("uuid={uuid}");
    // Forced only over what an mkfs left that was cut off: otherwise mkfs too refuses a device that is in use, and mkfs.xfs one that has
    // anything on it. A new volume reads as zeroes: nothing is to be discarded, and ext4 need not write zeroes later.
    let (program, args): (_, Vec<&str>) = match fs_type {
        FsType::Ext4 if again => {
            ("mkfs.ext4", vec!["-q", "-F", "-m", "0", "-U", uuid, "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"])
        }
        FsType::Ext4 => ("mkfs.ext4", vec!["-q", "-m", "0", "-U", uuid, "-E", "nodiscard,assume_storage_prezeroed=1"]),
        FsType::Xfs if again => ("mkfs.xfs", vec!["-q", "-f", "-K", "-m", &xfs_uuid]),
        FsType::Xfs => ("mkfs.xfs", vec!["-q", "-K", "-m", &xfs_uuid]),
    };
    tool::run(program, args.into_iter().map(Path::new).chain([device]))?;
    info!(device = %device.display(), "formatted");
    Ok(())
}

/// Repairs what can be repaired without a question, and gives the file system the whole device. `growing` is there, durably, while resize2fs works:
/// what it leaves when it is cut off e2fsck asks about, and is told to go on. Blocks.
///
/// # Errors
/// `Error::Tool` if it needs a person; `Error::State`.
pub fn prepare(device: &Path, fs_type: FsType, bytes: u64, growing: &Path) -> Result<(), Error> {
    // XFS replays its log at mount, and grows mounted.
    if fs_type == FsType::Xfs {
        return Ok(());
    }
    let cut_off = growing.exists();
    if cut_off {
        warn!(device = %device.display(), "its growth was cut off: e2fsck repairs what that left");
    }
    check(device, if cut_off { &["-f", "-y"] } else { &["-p"] })?;
    if ext4_bytes(device)? < bytes {
        if !cut_off {
            // All of it, as resize2fs asks for.
            check(device, &["-f", "-p"])?;
        }
        info!(device = %device.display(), bytes, "growing ext4");
        state_dir::write_record(growing, &bytes)?;
        tool::run("resize2fs", [device])?;
    }
    Ok(state_dir::remove_record(growing)?)
}

fn check(device: &Path, options: &[&str]) -> Result<(), Error> {
    match tool::run("e2fsck", options.iter().map(Path::new).chain([device])) {
        // It repaired something.
        Err(error) if error.code() == Some(1) => Ok(()),
        checked => Ok(checked.map(drop)?),
    }
}

fn ext4_bytes(device: &Path) -> Result<u64, Error> {
    let said = tool::run("dumpe2fs", [Path::new("-h"), device])?;
    let value = |key: &str| said.lines().find_map(|line| line.strip_prefix(key)).and_then(|value| value.trim().parse::<u64>().ok());
    // A size that cannot be read is the whole device: nothing is grown then.
    Ok(value("Block count:").zip(value("Block size:")).map_or(u64::MAX, |(count, size)| (count + 1) * size))
}

/// Gives a mounted file system the whole device. Nothing to grow: nothing done. Blocks.
///
/// # Errors
/// `Error::Tool`.
pub fn grow_mounted(device: &Path, mounted: &Path, fs_type: FsType) -> Result<(), Error> {
    if fs_type == FsType::Ext4 {
        return Ok(tool::run("resize2fs", [device]).map(drop)?);
    }
    let patience = Instant::now() + EARLIER;
    loop {
        match tool::run("xfs_growfs", [Path::new("-d"), mounted]) {
            // It says so itself; killed, it would be killed again.
            Err(error) if error.code().is_some() && Instant::now() < patience => {
                debug!(%error, "growing XFS is tried again");
                thread::sleep(Duration::from_millis(200));
            }
            grown => return Ok(grown.map(drop)?),
        }
    }
}

/// Mounts it. `flags` are the mount options of the capability, each as it is. Blocks.
///
/// # Errors
/// `Error::Tool`.
pub fn mount(device: &Path, point: &Path, fs_type: FsType, flags: &[String]) -> Result<(), Error> {
    let options = flags.join(",");
    let mut args = vec!["-t", name(fs_type)];
    if !options.is_empty() {
        args.extend(["-o", &options]);
    }
    tool::run("mount", args.into_iter().map(Path::new).chain([device, point]))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "0b7ab7a6-6f14-4b8d-9b1c-0d5a3c9f2a11";

    #[test]
    fn a_device_that_cannot_be_read_is_not_blank() {
        let never = FormatStatus { state: FormatState::Never, fs_uuid: None };
        for path in ["/nonexistent", "/proc/self/mem"] {
            let judged = must_format(Path::new(path), FsType::Ext4, &never);
            assert!(matches!(judged, Err(Error::Io { .. })), "{path}: {judged:?}");
        }
    }

    #[test]
    fn what_was_made_is_known_again_and_xfs_is_made_once() {
        let installed = |fs_type: &FsType| tool::run(if *fs_type == FsType::Xfs { "mkfs.xfs" } else { "mkfs.ext4" }, ["-V"]).is_ok();
        for fs_type in [FsType::Ext4, FsType::Xfs].into_iter().filter(installed) {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(400 << 20).unwrap();
            let judge = |state, fs_uuid: Option<&str>| {
                must_format(file.path(), fs_type, &FormatStatus { state, fs_uuid: fs_uuid.map(str::to_owned) })
            };
            assert!(judge(FormatState::Never, None).unwrap());
            assert!(matches!(judge(FormatState::Formatted, Some(UUID)), Err(Error::DataLoss(_))), "it is blank");
            format(file.path(), fs_type, UUID, false).unwrap();
            assert!(!judge(FormatState::Formatted, Some(UUID)).unwrap());
            assert!(matches!(judge(FormatState::Formatted, Some("1-2")), Err(Error::DataLoss(_))), "it is another one");
            assert!(matches!(judge(FormatState::Never, None), Err(Error::DataLoss(_))), "somebody made it");
            if fs_type == FsType::Xfs {
                assert!(format(file.path(), fs_type, UUID, false).is_err(), "mkfs too refuses");
            }
            format(file.path(), fs_type, UUID, true).unwrap();
        }
    }
}
