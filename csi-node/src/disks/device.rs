//! What a block device is, as sysfs and the signatures on it say.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use lockstep_proto::objects::DiskIdentity;
use rustix::fs::{OFlags, major, minor};

use crate::{mounts, tool};

/// The label of our file systems: how a disk is known to be ours.
pub const LABEL: &str = "lockstep";
/// The smallest disk that is used.
pub const MIN_BYTES: u64 = 1 << 30;

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its node, without links.
    pub path: PathBuf,
    /// Device number.
    pub dev: (u32, u32),
    /// What stays the same; without a file system's UUID.
    pub identity: DiskIdentity,
}

/// What was found on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing at all.
    Blank,
    /// A file system of ours, with this UUID.
    Ours(String),
    /// It must be left alone: why, and what to do.
    Foreign(String),
}

fn attribute(dir: &Path, name: &str) -> Option<String> {
    let text = fs::read_to_string(dir.join(name)).ok()?;
    let text = text.trim().trim_matches('\0').trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Looks a device up. `Err`: it cannot be used as a disk, and why.
pub fn look_up(path: &Path) -> Result<Device, String> {
    let path = path.canonicalize().map_err(|error| error.to_string())?;
    let meta = fs::metadata(&path).map_err(|error| error.to_string())?;
    if !meta.file_type().is_block_device() {
        return Err("it is not a block device".into());
    }
    let dev = (major(meta.rdev()), minor(meta.rdev()));
    let own = fs::canonicalize(format!("/sys/dev/block/{}:{}", dev.0, dev.1)).map_err(|error| format!("sysfs: {error}"))?;
    let whole = if own.join("partition").exists() { own.parent().unwrap_or(&own).to_owned() } else { own.clone() };
    let first = |names: &[&str]| names.iter().find_map(|name| attribute(&whole, name));
    let serial = first(&["serial", "device/serial"]);
    let wwn = first(&["wwid", "device/wwid"]);
    let model = first(&["device/model"]);
    // A loop device is as distinct as the file behind it.
    let physical = match first(&["loop/backing_file"]) {
        Some(file) => format!("file:{file}"),
        None => wwn.clone().or_else(|| serial.clone()).unwrap_or_else(|| whole.display().to_string()),
    };
    let sectors: u64 = attribute(&own, "size").and_then(|size| size.parse().ok()).unwrap_or(0);
    let identity = DiskIdentity { fs_uuid: String::new(), serial, wwn, model, physical, size_bytes: sectors * 512 };
    Ok(Device { path, dev, identity })
}

impl Device {
    /// Looks at what is on it, and writes nothing. `Err`: it gives errors.
    pub fn content(&self) -> Result<Content, String> {
        let mounted = mounts::list().map_err(|error| error.to_string())?.into_iter().find(|mount| mount.dev == self.dev);
        if let Some(mount) = mounted {
            return Ok(Content::Foreign(format!(
                "it is mounted at {}: unmount it, or take it out of the selection",
                mount.point.display()
            )));
        }
        let flags = i32::try_from((OFlags::EXCL | OFlags::CLOEXEC).bits()).expect("flags are small");
        let file = match File::options().read(true).write(true).custom_flags(flags).open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                return Ok(Content::Foreign("it is in use (LVM, md, swap or another program has it open)".into()));
            }
            Err(error) => return Err(format!("it cannot be opened: {error}")),
        };
        if self.identity.size_bytes < MIN_BYTES {
            return Ok(Content::Foreign(format!("it is too small: {} MiB, a disk needs 1 GiB", self.identity.size_bytes >> 20)));
        }
        readable(&file, self.identity.size_bytes).map_err(|error| format!("it cannot be read: {error}"))?;
        drop(file);
        self.signatures()
    }

    fn signatures(&self) -> Result<Content, String> {
        let args = [Path::new("-p"), Path::new("-o"), Path::new("export"), &self.path];
        let said = match tool::run("blkid", args) {
            Ok(said) => said,
            // blkid: nothing was found.
            Err(error) if error.code() == Some(2) => return Ok(Content::Blank),
            // blkid: what was found contradicts itself.
            Err(error) if error.code() == Some(8) => return Ok(self.foreign("several signatures at once")),
            Err(error) => return Err(error.to_string()),
        };
        Ok(self.verdict(&said))
    }

    fn verdict(&self, said: &str) -> Content {
        let value = |key: &str| said.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        match (value("TYPE"), value("LABEL"), value("UUID"), value("PTTYPE")) {
            (Some("xfs"), Some(LABEL), Some(uuid), _) => Content::Ours(uuid.to_owned()),
            (Some(kind), Some(label), ..) => self.foreign(&format!("{kind} with the label {label:?}")),
            (Some(kind), ..) => self.foreign(kind),
            (None, .., Some(table)) => self.foreign(&format!("a {table} partition table")),
            _ => self.foreign("a signature that blkid cannot name"),
        }
    }

    fn foreign(&self, what: &str) -> Content {
        Content::Foreign(format!(
            "it is not blank, it has {what}: if nothing on it is needed, `wipefs --all {}`, or take it out of the selection",
            self.path.display()
        ))
    }

    /// How a person knows it: model, serial number, node.
    pub fn name_for_people(&self) -> String {
        let known = [&self.identity.model, &self.identity.serial].into_iter().flatten().map(String::as_str);
        let known: Vec<&str> = known.collect();
        let path = self.path.display();
        if known.is_empty() { format!("{path} ({})", self.identity.physical) } else { format!("{path} ({})", known.join(", ")) }
    }
}

/// The beginning and the end of a disk can be read.
fn readable(mut file: &File, bytes: u64) -> io::Result<()> {
    let mut block = vec![0; 4096];
    for at in [0, bytes - 4096] {
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut block)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> Device {
        Device { path: "/dev/sdx".into(), dev: (8, 0), identity: DiskIdentity::default() }
    }

    #[test]
    fn only_xfs_with_our_label_is_ours() {
        let ours = device().verdict("DEVNAME=/dev/sdx\nLABEL=lockstep\nUUID=1-2\nTYPE=xfs\nUSAGE=filesystem");
        assert_eq!(ours, Content::Ours("1-2".into()));
        for (said, named) in [
            ("LABEL=data\nUUID=1-2\nTYPE=xfs", "xfs with the label \"data\""),
            ("UUID=1-2\nTYPE=xfs", "it has xfs:"),
            ("LABEL=lockstep\nUUID=1-2\nTYPE=ext4", "ext4"),
            ("UUID=1\nTYPE=LVM2_member", "LVM2_member"),
            ("PTUUID=1\nPTTYPE=gpt", "a gpt partition table"),
            ("AMBIVALENT=x", "cannot name"),
        ] {
            let Content::Foreign(why) = device().verdict(said) else { panic!("{said} was taken") };
            assert!(why.contains(named) && why.contains("wipefs --all /dev/sdx"), "{why}");
        }
    }

    #[test]
    fn what_is_no_block_device_is_said() {
        assert_eq!(look_up(Path::new("/dev/null")).unwrap_err(), "it is not a block device");
        assert!(look_up(Path::new("/nonexistent")).unwrap_err().contains("No such file"));
    }
}
