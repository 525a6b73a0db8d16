//! What is mounted where, as the kernel says it.

use std::{
    ffi::OsString,
    io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use lockstep_datapath::{
    bind_read_only,
    errand::{self, Errand, Said},
};
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount},
};
use serde::{Deserialize, Serialize};

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Device number of the file system.
    pub dev: (u32, u32),
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// Mounted read-only here.
    pub read_only: bool,
    /// The file system's type.
    pub fs_type: String,
    /// What it was mounted from.
    pub source: PathBuf,
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = if *first == b'\\' { tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok()) } else { None };
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

fn parse(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(2);
    let (major, minor) = left.next()?.split_once(':')?;
    let (root, point, options) = (left.next()?, left.next()?, left.next()?);
    let mut right = right.split(' ');
    Some(Mount {
        dev: (major.parse().ok()?, minor.parse().ok()?),
        root: unescape(root),
        point: unescape(point),
        read_only: options.split(',').any(|option| option == "ro"),
        fs_type: right.next()?.to_owned(),
        source: unescape(right.next()?),
    })
}

/// Every mount that this process sees, in the order in which they were made.
///
/// # Errors
/// If `/proc` is not there.
pub fn list() -> io::Result<Vec<Mount>> {
    Ok(std::fs::read_to_string("/proc/self/mountinfo")?.lines().filter_map(parse).collect())
}

/// What is mounted at exactly this path, topmost. Never touches the path itself: what serves it may be dead.
///
/// # Errors
/// If `/proc` is not there.
pub fn at(path: &Path) -> io::Result<Option<Mount>> {
    Ok(list()?.into_iter().rev().find(|mount| mount.point == path))
}

/// The path as the kernel's list of mounts has it: without links, except at its end. What is at its end is not touched.
pub fn resolve(path: &Path) -> PathBuf {
    let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
    parent.zip(path.file_name()).map_or_else(|| path.to_owned(), |(parent, name)| parent.join(name))
}

/// Mounts `from` at `to` too. Read-only it is so from the moment that it is there, but for a kernel before Linux 5.12.
///
/// # Errors
/// What the kernel says.
pub fn bind(from: &Path, to: &Path, read_only: bool) -> io::Result<()> {
    if read_only {
        match bind_read_only(from, to) {
            Err(error) if error.raw_os_error() == Some(Errno::NOSYS.raw_os_error()) => {}
            done => return done,
        }
    }
    mount_bind(from, to)?;
    if read_only && let Err(errno) = mount_remount(to, MountFlags::BIND | MountFlags::RDONLY, c"") {
        let _ = unmount(to, UnmountFlags::DETACH);
        return Err(errno.into());
    }
    Ok(())
}

/// Unmounts everything that is mounted at this path. Nothing there: nothing done. Blocks until what has to be written back is: csi-node can be killed
/// meanwhile.
///
/// # Errors
/// EBUSY among them.
pub fn unmount_all(path: &Path) -> io::Result<()> {
    unmount_with(path, false)
}

/// As `unmount_all`, also if it is in use or what serves it is dead.
///
/// # Errors
/// What the kernel says.
pub fn unmount_lazily(path: &Path) -> io::Result<()> {
    unmount_with(path, true)
}

fn unmount_with(path: &Path, lazily: bool) -> io::Result<()> {
    // One mount is one errand: whoever comes after a csi-node that was killed may have mounted something there.
    while at(path)?.is_some() {
        errand::send(Unmount { path: path.to_owned(), lazily })?.map_err(io::Error::from_raw_os_error)?;
    }
    Ok(())
}

/// Unmounts what is mounted topmost.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Unmount {
    path: PathBuf,
    lazily: bool,
}

impl Errand for Unmount {
    const NAME: &'static str = "unmount";
    type Answer = Said<()>;

    fn run(self) -> Said<()> {
        let lazily = if self.lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        match unmount(&self.path, UnmountFlags::NOFOLLOW | lazily) {
            // Somebody else was faster.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.raw_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read() {
        let line = r"52 29 7:3 /a\040b /mnt/x\134y ro,noatime shared:1 - xfs /dev/loop3 rw,attr2";
        let mount = parse(line).unwrap();
        assert_eq!((mount.dev, mount.read_only, mount.fs_type.as_str()), ((7, 3), true, "xfs"));
        assert_eq!((mount.root, mount.point, mount.source), ("/a b".into(), r"/mnt/x\y".into(), "/dev/loop3".into()));
        assert_eq!(parse("nonsense"), None);
    }

    #[test]
    fn what_is_mounted_is_found_and_what_is_not_is_not() {
        assert_eq!(at(Path::new("/proc")).unwrap().unwrap().fs_type, "proc");
        assert_eq!(at(Path::new("/proc/self")).unwrap(), None);
        unmount_all(Path::new("/nonexistent")).unwrap();
    }
}
