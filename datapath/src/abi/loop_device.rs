//! Loop devices: `include/uapi/linux/loop.h`.
#![allow(unsafe_code)]

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// How long a free device is asked for that nobody else has.
const PATIENCE: Duration = Duration::from_secs(5);

const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const NAME_LEN: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_LEN],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);

const EMPTY: LoopInfo64 = LoopInfo64 {
    device: 0,
    inode: 0,
    rdevice: 0,
    offset: 0,
    sizelimit: 0,
    number: 0,
    encrypt_type: 0,
    encrypt_key_size: 0,
    flags: 0,
    file_name: [0; NAME_LEN],
    crypt_name: [0; 64],
    encrypt_key: [0; 32],
    init: [0; 2],
};

/// An attached loop device. Whatever touches it may wait for who serves its backing file: see `errand` and `isolated`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LoopDevice {
    path: PathBuf,
    /// The kernel's number of this attachment: no other one since the machine started has it. `None`: the kernel is older than 5.15.
    sequence: Option<u64>,
}

/// A loop device, and the path of its backing file.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) device: LoopDevice,
    /// `/`, if nothing that is mounted has that file any more: all mounts of it were undone, or the mount namespace ended in which it was opened.
    pub(crate) over: Option<PathBuf>,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// Puts a loop device with 4096-byte blocks and direct I/O over `backing`. `name` (at most 63 bytes) marks it as ours. Blocks, for `PATIENCE` if
/// somebody else has every device that is offered.
pub(crate) fn attach(backing: &OwnedFd, name: &str) -> io::Result<LoopDevice> {
    let control = open(Path::new("/dev/loop-control"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument.
        let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let file = open(&path)?;
        let mut info = EMPTY;
        info.flags = LO_FLAGS_DIRECT_IO;
        let len = name.len().min(NAME_LEN - 1);
        info.file_name[..len].copy_from_slice(&name.as_bytes()[..len]);
        let config = LoopConfig { fd: backing.as_raw_fd() as u32, block_size: 4096, info, reserved: [0; 8] };
        // SAFETY: `config` is a struct loop_config that lives through the call; the kernel only reads it.
        match check(unsafe { libc::ioctl(file.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }) {
            Ok(_) => return Ok(LoopDevice::at(path)),
            // Somebody else took that number in between; or has it open for himself, to look at it or to attach it: then it is still offered.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error),
        }
    }
}

/// Every loop device that is attached. None is touched.
pub(crate) fn attached() -> io::Result<Vec<Attached>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/block")? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with("loop") || !entry.path().join("loop").exists() {
            continue;
        }
        let over = std::fs::read_to_string(entry.path().join("loop/backing_file")).ok();
        let over = over.map(|over| PathBuf::from(over.trim_end_matches('\n')));
        found.push(Attached { device: LoopDevice::at(Path::new("/dev").join(entry.file_name())), over });
    }
    Ok(found)
}

impl LoopDevice {
    /// As it is attached now.
    fn at(path: PathBuf) -> Self {
        let sequence = attribute(&path, "diskseq").ok().and_then(|number| number.parse().ok());
        Self { path, sequence }
    }

    /// `/dev/loopN`.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel's number of this attachment.
    pub(crate) fn sequence(&self) -> Option<u64> {
        self.sequence
    }

    /// The name that it was given when it was attached.
    pub(crate) fn name(&self) -> io::Result<String> {
        let (file, mut info) = (open(&self.path)?, EMPTY);
        // SAFETY: `info` is a struct loop_info64 that lives through the call; the kernel fills it.
        check(unsafe { libc::ioctl(file.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) })?;
        let len = info.file_name.iter().position(|byte| *byte == 0).unwrap_or(NAME_LEN);
        Ok(String::from_utf8_lossy(&info.file_name[..len]).into_owned())
    }

    /// Reads the backing file's size again.
    pub(crate) fn refresh_size(&self) -> io::Result<()> {
        let file = open(&self.path)?;
        // SAFETY: LOOP_SET_CAPACITY takes no argument.
        check(unsafe { libc::ioctl(file.as_raw_fd(), LOOP_SET_CAPACITY, 0) }).map(drop)
    }

    /// Whether the kernel will send flushes.
    pub(crate) fn has_write_cache(&self) -> io::Result<bool> {
        Ok(attribute(&self.path, "queue/write_cache")? == "write back")
    }

    /// Detaches it. In use: the kernel does so when the last user is gone. Not attached any more: fine.
    pub(crate) fn detach(&self) -> io::Result<()> {
        self.clear(&open(&self.path)?)
    }

    /// The same, but EBUSY if a file system has it.
    pub(crate) fn detach_unmounted(&self) -> io::Result<()> {
        self.clear(&OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(&self.path)?)
    }

    fn clear(&self, device: &File) -> io::Result<()> {
        // What is open stays attached. Another attachment is somebody else's: this one is over.
        if Self::at(self.path.clone()) != *self {
            return Ok(());
        }
        // SAFETY: LOOP_CLR_FD takes no argument.
        match check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD, 0) }) {
            Err(error) if error.raw_os_error() != Some(libc::ENXIO) => Err(error),
            _ => Ok(()),
        }
    }
}

/// What the kernel says of a block device.
fn attribute(device: &Path, name: &str) -> io::Result<String> {
    let dir = Path::new("/sys/block").join(device.file_name().unwrap_or_default());
    Ok(std::fs::read_to_string(dir.join(name))?.trim().to_owned())
}
