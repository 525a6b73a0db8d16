//! What a block device is, as sysfs and the signatures on it say.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use lockstep_proto::objects::DiskIdentity;
use rustix::fs::{OFlags, major, minor};

use super::{
    error::DiskError,
    probe::{self, Found, Signature},
};
use crate::mounts;

/// The label of our file systems: how a disk is known to be ours.
pub const LABEL: &str = "lockstep";
/// The smallest disk that is used.
pub const MIN_BYTES: u64 = 1 << 30;
/// Between the whole disks of a device that lies on several.
const AND: &str = " + ";

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its node, without links.
    pub path: PathBuf,
    /// Device number.
    pub dev: (u32, u32),
    /// What stays the same; without a file system's UUID.
    pub identity: DiskIdentity,
    /// Which part of its physical disk it is: where a partition starts, or a mapped device's id; empty for a whole disk.
    pub part: String,
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

/// The whole disks that a device lies on, by their directories in sysfs.
fn wholes(own: &Path) -> BTreeSet<PathBuf> {
    let whole = if own.join("partition").exists() { own.parent().unwrap_or(own) } else { own };
    let below = fs::read_dir(whole.join("slaves")).into_iter().flatten().flatten();
    let below: BTreeSet<_> = below.filter_map(|slave| slave.path().canonicalize().ok()).flat_map(|slave| wholes(&slave)).collect();
    if below.is_empty() { BTreeSet::from([whole.to_owned()]) } else { below }
}

/// What tells a whole disk from others.
fn physical(whole: &Path) -> String {
    // A loop device is as distinct as the file behind it.
    match attribute(whole, "loop/backing_file") {
        Some(file) => format!("file:{file}"),
        None => first(whole, WWN).or_else(|| first(whole, SERIAL)).unwrap_or_else(|| whole.display().to_string()),
    }
}

const WWN: &[&str] = &["wwid", "device/wwid"];
const SERIAL: &[&str] = &["serial", "device/serial"];

fn first(dir: &Path, names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| attribute(dir, name))
}

/// Whether two devices, by their physical identities, have a disk in common: they are no pair then.
pub fn overlap(a: &str, b: &str) -> bool {
    a.split(AND).any(|a| b.split(AND).any(|b| a == b))
}

/// Whether a device lies on a disk that rotates.
pub fn rotates(path: &Path) -> bool {
    let Ok(meta) = fs::metadata(path) else { return false };
    let dev = (major(meta.rdev()), minor(meta.rdev()));
    let Ok(own) = fs::canonicalize(format!("/sys/dev/block/{}:{}", dev.0, dev.1)) else { return false };
    wholes(&own).iter().any(|whole| attribute(whole, "queue/rotational").as_deref() == Some("1"))
}

/// Looks a device up. `Err`: it cannot be used as a disk, and why.
pub fn look_up(path: &Path) -> Result<Device, DiskError> {
    let path = path.canonicalize().map_err(DiskError::Path)?;
    let meta = fs::metadata(&path).map_err(DiskError::Path)?;
    if !meta.file_type().is_block_device() {
        return Err(DiskError::NotBlock);
    }
    let dev = (major(meta.rdev()), minor(meta.rdev()));
    let own = fs::canonicalize(format!("/sys/dev/block/{}:{}", dev.0, dev.1)).map_err(DiskError::Sysfs)?;
    let (identity, part) = identify(&own);
    Ok(Device { path, dev, identity, part })
}

/// From a device's directory in sysfs: what it is, and which part of a disk.
fn identify(own: &Path) -> (DiskIdentity, String) {
    let wholes = wholes(own);
    let only = wholes.first().filter(|_| wholes.len() == 1);
    let of_only = |names| only.and_then(|whole| first(whole, names));
    let identity = DiskIdentity {
        fs_uuid: String::new(),
        serial: of_only(SERIAL),
        wwn: of_only(WWN),
        model: of_only(&["device/model"]),
        physical: wholes.iter().map(|whole| physical(whole)).collect::<Vec<_>>().join(AND),
        size_bytes: attribute(own, "size").and_then(|sectors| sectors.parse::<u64>().ok()).unwrap_or(0) * 512,
    };
    let start = attribute(own, "start").filter(|_| own.join("partition").exists());
    (identity, start.or_else(|| first(own, &["dm/uuid", "md/uuid"])).unwrap_or_default())
}

impl Device {
    /// Looks at what is on it, and writes nothing. `Err`: it gives errors.
    pub fn content(&self) -> Result<Content, DiskError> {
        let mounted = mounts::list().map_err(DiskError::Mounts)?.into_iter().find(|mount| mount.dev == self.dev);
        if let Some(mount) = mounted {
            return Ok(Content::Foreign(format!(
                "it is mounted at {}: unmount it, or take it out of the selection",
                mount.point.display()
            )));
        }
        // Not for writing: udev would probe a device again whenever it is closed after that.
        let flags = i32::try_from((OFlags::EXCL | OFlags::CLOEXEC).bits()).expect("flags are small");
        let file = match File::options().read(true).custom_flags(flags).open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                return Ok(Content::Foreign(
                    "it is in use (LVM, md, swap or another program has it open): end that, or take it out of the selection".into(),
                ));
            }
            Err(error) => return Err(DiskError::Open(error)),
        };
        if self.identity.size_bytes < MIN_BYTES {
            let mebibytes = self.identity.size_bytes >> 20;
            return Ok(Content::Foreign(format!(
                "it is too small: {mebibytes} MiB, a disk needs 1 GiB: take it out of the selection, or put a larger one in its place"
            )));
        }
        Ok(self.verdict(probe::found(&self.path, &file)?))
    }

    fn verdict(&self, found: Found) -> Content {
        let Signature { kind, label, uuid, table } = match found {
            Found::Nothing => return Content::Blank,
            Found::Several(kinds) => return self.foreign(&probe::several(&kinds, &self.path)),
            Found::Signature(signature) => signature,
        };
        match (kind.as_deref(), label.as_deref(), uuid, table) {
            (Some("xfs"), Some(LABEL), Some(uuid), _) => Content::Ours(uuid),
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

    /// Whether its XFS says that its mkfs did not end: `sb_inprogress` is set by mkfs's first write and cleared by its last.
    pub fn is_half_made(&self) -> bool {
        let mut superblock = [0; 512];
        let read = File::open(&self.path).and_then(|file| file.read_exact_at(&mut superblock, 0));
        read.is_ok() && superblock.starts_with(b"XFSB") && superblock[126] != 0
    }

    /// How a person knows it: model, serial number, node.
    pub fn name_for_people(&self) -> String {
        let known = [&self.identity.model, &self.identity.serial].into_iter().flatten().map(String::as_str);
        let known: Vec<&str> = known.collect();
        let path = self.path.display();
        if known.is_empty() { format!("{path} ({})", self.identity.physical) } else { format!("{path} ({})", known.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> Device {
        Device { path: "/dev/sdx".into(), dev: (8, 0), identity: DiskIdentity::default(), part: String::new() }
    }

    fn signature(kind: Option<&str>, label: Option<&str>, table: Option<&str>) -> Found {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Found::Signature(Signature { kind: owned(kind), label: owned(label), uuid: Some("1-2".into()), table: owned(table) })
    }

    #[test]
    fn only_xfs_with_our_label_is_ours() {
        assert_eq!(device().verdict(signature(Some("xfs"), Some("lockstep"), None)), Content::Ours("1-2".into()));
        assert_eq!(device().verdict(Found::Nothing), Content::Blank);
        for (found, named) in [
            (signature(Some("xfs"), Some("data"), None), "xfs with the label \"data\""),
            (signature(Some("xfs"), None, None), "it has xfs:"),
            (signature(Some("ext4"), Some("lockstep"), None), "ext4"),
            (signature(Some("LVM2_member"), None, None), "LVM2_member"),
            (signature(None, None, Some("gpt")), "a gpt partition table"),
            (signature(None, None, None), "cannot name"),
            (Found::Several(vec!["swap".into(), "xfs".into()]), "several signatures at once (swap, xfs)"),
            (Found::Several(Vec::new()), "several signatures at once (`wipefs /dev/sdx` lists them)"),
        ] {
            let Content::Foreign(why) = device().verdict(found) else { panic!("{named} was taken") };
            assert!(why.contains(named) && why.contains("wipefs --all /dev/sdx"), "{why}");
        }
    }

    #[test]
    fn what_is_no_block_device_is_said() {
        assert_eq!(look_up(Path::new("/dev/null")).unwrap_err().to_string(), "it is not a block device: take it out of the selection");
        assert!(look_up(Path::new("/nonexistent")).unwrap_err().to_string().contains("No such file"));
    }

    /// A sysfs with two disks; `sda` has a partition.
    fn sysfs() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (disk, serial) in [("sda", "A"), ("sdb", "B")] {
            fs::create_dir_all(dir.path().join(disk).join("device")).unwrap();
            fs::write(dir.path().join(disk).join("device/serial"), serial).unwrap();
            fs::write(dir.path().join(disk).join("size"), "100").unwrap();
        }
        fs::create_dir(dir.path().join("sda/sda1")).unwrap();
        for (name, text) in [("partition", "1"), ("start", "2048"), ("size", "10")] {
            fs::write(dir.path().join("sda/sda1").join(name), text).unwrap();
        }
        dir
    }

    /// A mapped device on others.
    fn map(dir: &Path, name: &str, on: &[&str]) -> PathBuf {
        fs::create_dir_all(dir.join(name).join("slaves")).unwrap();
        fs::create_dir_all(dir.join(name).join("dm")).unwrap();
        fs::write(dir.join(name).join("dm/uuid"), format!("LVM-{name}")).unwrap();
        for below in on {
            let link = dir.join(name).join("slaves").join(Path::new(below).file_name().unwrap());
            std::os::unix::fs::symlink(dir.join(below), link).unwrap();
        }
        dir.join(name)
    }

    #[test]
    fn mapped_devices_are_the_disks_below_them() {
        let sysfs = sysfs();
        let dir = sysfs.path();
        let physical = |own: &Path| identify(own).0.physical;
        let (first, second) = (map(dir, "dm-0", &["sda/sda1"]), map(dir, "dm-1", &["sda"]));
        let (striped, stacked) = (map(dir, "dm-2", &["sda", "sdb"]), map(dir, "dm-3", &["dm-0"]));
        assert_eq!([&first, &second, &stacked].map(|own| physical(own)), ["A", "A", "A"]);
        assert_eq!(physical(&striped), "A + B");
        assert!(overlap(&physical(&striped), "A") && overlap("B", &physical(&striped)) && overlap("A", "A") && !overlap("A", "B"));
        assert_eq!((identify(&first).1.as_str(), identify(&dir.join("sda/sda1")).1.as_str()), ("LVM-dm-0", "2048"));
        assert_eq!(
            identify(&dir.join("sda")),
            (DiskIdentity { serial: Some("A".into()), physical: "A".into(), size_bytes: 51200, ..Default::default() }, String::new())
        );
    }
}
