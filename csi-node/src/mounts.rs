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
use tracing::warn;

use crate::error::Error;

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its number: no other mount in any mount namespace has it.
    id: u32,
    /// Device number of the file system.
    pub dev: (u32, u32),
    /// What of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// Mounted read-only here.
    pub read_only: bool,
    /// Which mounts get what is mounted below this one: the number that they have in common.
    pub peers: Option<u32>,
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
    let mut left = left.split(' ');
    let id = left.next()?.parse().ok()?;
    let mut left = left.skip(1);
    let (major, minor) = left.next()?.split_once(':')?;
    let (root, point, options) = (left.next()?, left.next()?, left.next()?);
    let peers = left.find_map(|field| field.strip_prefix("shared:")?.parse().ok());
    let mut right = right.split(' ');
    Some(Mount {
        id,
        dev: (major.parse().ok()?, minor.parse().ok()?),
        root: unescape(root),
        point: unescape(point),
        read_only: options.split(',').any(|option| option == "ro"),
        peers,
        fs_type: right.next()?.to_owned(),
        source: unescape(right.next()?),
    })
}

/// Every mount that this process sees, in the order in which they were made.
///
/// # Errors
/// If `/proc` is not there.
pub fn list() -> io::Result<Vec<Mount>> {
    list_of("self")
}

fn list_of(process: &str) -> io::Result<Vec<Mount>> {
    let lines = std::fs::read_to_string(Path::new("/proc").join(process).join("mountinfo"))?;
    Ok(lines.lines().filter_map(parse).collect())
}

/// What is mounted below `path` must be mounted for the host too: pods would not see it otherwise, and it would be gone with this process's mount
/// namespace. The path need not be there.
///
/// # Errors
/// `Error::Precondition` if it would not be.
pub fn must_reach_the_host(path: &Path) -> Result<(), Error> {
    let own = list().map_err(Error::io("reading the mounts"))?;
    // Without the host's processes it is its own first one that is taken for the host's: `say_if_the_host_cannot_be_seen`.
    let Ok(host) = list_of("1") else { return Ok(()) };
    let peers = holding(&own, path).and_then(|mount| mount.peers);
    let same_namespace = host.iter().any(|mount| own.first().is_some_and(|own| own.id == mount.id));
    if same_namespace || peers.is_some() && host.iter().any(|mount| mount.peers == peers) {
        return Ok(());
    }
    Err(Error::Precondition(format!(
        "{} is not on a mount that csi-node's mount namespace shares with the host: no pod would see what csi-node mounts there, and it would be gone with \
         csi-node. In a pod, give the hostPath volume that it is on mountPropagation: Bidirectional, and see that it is on a shared mount of the host \
         (findmnt -o TARGET,PROPAGATION; mount --make-rshared /); as a service, let csi-node have the host's mount namespace (no PrivateMounts, \
         PrivateTmp, ProtectSystem and the like)",
        path.display()
    )))
}

/// The PID namespace that the kernel starts with: the number is part of its ABI.
const HOSTS_PID_NAMESPACE: &str = "pid:[4026531836]";

fn sees_the_host(pid_namespace: &Path) -> bool {
    pid_namespace == Path::new(HOSTS_PID_NAMESPACE)
}

/// Warns where `must_reach_the_host` cannot know: in a PID namespace of its own. A machine may be such a namespace itself, so that is no error.
pub fn say_if_the_host_cannot_be_seen() {
    let Ok(namespace) = std::fs::read_link("/proc/self/ns/pid") else { return };
    if !sees_the_host(&namespace) {
        warn!(
            namespace = %namespace.display(),
            "csi-node is in another PID namespace than the host's first process: whether what it mounts reaches the host cannot be checked. In a pod, give it \
             hostPID: true, as the chart does"
        );
    }
}

/// The mount that a path is on.
fn holding<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    // Of several at one place, the last one is on top.
    mounts.iter().filter(|mount| path.starts_with(&mount.point)).max_by_key(|mount| mount.point.components().count())
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
/// EBUSY among them; and if the path leads elsewhere, because something is mounted over a directory on it.
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
    let mut tried = None;
    // One mount is one errand: whoever comes after a csi-node that was killed may have mounted something there.
    while let Some(mount) = at(path)? {
        if tried == Some(mount.id) {
            return Err(io::Error::other("it is hidden by what is mounted above it: unmount that first"));
        }
        errand::ask(Unmount { path: path.to_owned(), lazily })?;
        tried = Some(mount.id);
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
            // Somebody else was faster; or the path does not lead there.
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
        assert_eq!(mount.peers, Some(1));
        assert_eq!(parse("52 29 7:3 / /mnt rw master:1 - xfs /dev/loop3 rw").unwrap().peers, None);
        assert_eq!(parse("nonsense"), None);
    }

    #[test]
    fn a_path_is_on_the_innermost_mount_and_there_on_the_last_one() {
        let lines = ["1 0 0:1 / / rw - a a rw", "2 1 0:2 / /m rw - a a rw", "3 2 0:3 / /m rw - a a rw", "4 3 0:4 / /m/x rw - a a rw"];
        let mounts: Vec<Mount> = lines.iter().filter_map(|line| parse(line)).collect();
        let found = |path: &str| holding(&mounts, Path::new(path)).unwrap().dev.1;
        assert_eq!([found("/m/x/y"), found("/m/xy"), found("/m"), found("/n")], [4, 3, 3, 1]);
    }

    #[test]
    fn only_in_the_first_pid_namespace_the_host_is_seen() {
        assert!(sees_the_host(Path::new("pid:[4026531836]")));
        for other in ["pid:[4026532201]", "pid:[40265318360]", "pid:[402653183]", "mnt:[4026531836]", "4026531836", ""] {
            assert!(!sees_the_host(Path::new(other)), "{other}");
        }
    }

    #[test]
    fn what_is_mounted_is_found_and_what_is_not_is_not() {
        assert_eq!(at(Path::new("/proc")).unwrap().unwrap().fs_type, "proc");
        assert_eq!(at(Path::new("/proc/self")).unwrap(), None);
        unmount_all(Path::new("/nonexistent")).unwrap();
    }
}
