//! The block device: a FUSE mount with a loop device on it.

use std::{
    fs::{File, OpenOptions},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{
    abi::{
        fuse,
        loop_device::{self, LoopDevice},
    },
    error::{Context, Error},
};

/// How a volume's loop device is marked.
fn mark(name: &str) -> String {
    format!("lockstep:{name}")
}

/// A mounted FUSE file: nothing serves it yet.
#[derive(Debug)]
pub(crate) struct Mount {
    path: PathBuf,
}

/// Mounts `run_dir/name`, a regular file. The caller serves the descriptor.
pub(crate) fn mount_fuse(run_dir: &Path, name: &str) -> Result<(Mount, OwnedFd), Error> {
    std::fs::create_dir_all(run_dir).context(|| format!("creating {}", run_dir.display()))?;
    let path = run_dir.join(name);
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .context(|| format!("creating {}", path.display()))?;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/fuse")
        .context(|| "opening /dev/fuse (is the fuse module loaded?)".into())?;
    let options = format!("fd={},rootmode=100600,user_id=0,group_id=0,max_read={}", device.as_raw_fd(), fuse::MAX_WRITE);
    let options = std::ffi::CString::new(options).expect("no NUL in it");
    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("lockstep", &path, "fuse.lockstep", flags, options.as_c_str()).context(|| format!("mounting {}", path.display()))?;
    Ok((Mount { path }, device.into()))
}

impl Mount {
    /// Opens the file. Blocks until the datapath serves it.
    pub(crate) fn open(&self) -> Result<File, Error> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.path)
            .context(|| format!("opening {}", self.path.display()))
    }

    /// Puts a loop device on it. Blocks until the datapath serves it.
    pub(crate) fn attach_loop(&self, name: &str) -> Result<LoopDevice, Error> {
        let device = loop_device::attach(&self.open()?.into(), &mark(name)).context(|| "attaching a loop device".into())?;
        match device.has_write_cache() {
            Ok(true) => Ok(device),
            Ok(false) | Err(_) => {
                let path = device.path().to_owned();
                drop(device.detach());
                Err(Error::NoFlush { device: path })
            }
        }
    }

    /// Unmounts it, also if somebody still has it open.
    pub(crate) fn unmount(&self) -> Result<(), Error> {
        unmount(&self.path, UnmountFlags::DETACH).context(|| format!("unmounting {}", self.path.display()))?;
        std::fs::remove_file(&self.path).context(|| format!("removing {}", self.path.display()))
    }
}

/// Removes what a process that died left behind for this volume: its loop device and its FUSE mount. The file system on the device must
/// be unmounted by then, or the loop device goes with its last user. Nothing left: nothing done. Blocks.
///
/// # Errors
/// `Error::Io`.
pub fn remove_leftovers(run_dir: &Path, name: &str) -> Result<(), Error> {
    for device in loop_device::find(&mark(name)).context(|| "looking for loop devices".into())? {
        let path = device.path().to_owned();
        device.detach().context(|| format!("detaching {}", path.display()))?;
    }
    let path = run_dir.join(name);
    while let Ok(()) = unmount(&path, UnmountFlags::DETACH) {}
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context(|| format!("removing {}", path.display())),
        _ => Ok(()),
    }
}
