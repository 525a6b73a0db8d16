//! The block device: a FUSE mount with a loop device on it.

use std::{
    fs::{File, OpenOptions},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    abi::{
        fuse,
        loop_device::{self, Attached, LoopDevice},
    },
    errand::{self, Errand, Handler, Said},
    error::{Context, Error},
    isolated::isolated,
};

/// What of all this is done by a process of its own: it waits for the device, which is served.
pub(crate) const ERRANDS: [Handler; 3] = [Handler::of::<RefreshSize>(), Handler::of::<Detach>(), Handler::of::<Named>()];
/// How long a file system that was unmounted may take to let go of its device.
const LET_GO: Duration = Duration::from_secs(10);
/// How often a device that is in use is tried again.
const AGAIN: Duration = Duration::from_millis(100);
/// How often it is asked whether one is gone that nobody serves.
const SOON: Duration = Duration::from_millis(20);

/// How a volume's loop device is marked.
fn mark(name: &str) -> String {
    format!("lockstep:{name}")
}

/// Whether this kernel can send again what was not answered: Linux 6.9 and later. A connection says so itself only once it is there.
pub fn kernel_can_resend() -> bool {
    can_resend(&rustix::system::uname().release().to_string_lossy())
}

fn can_resend(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 9)
}

/// A mounted FUSE file.
#[derive(Clone, Debug)]
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
    fn open(&self) -> Result<File, Error> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.path)
            .context(|| format!("opening {}", self.path.display()))
    }

    /// Puts a loop device on it, and that on record. Blocks until the datapath serves it.
    pub(crate) fn attach_loop(&self, name: &str) -> Result<LoopDevice, Error> {
        let (mount, mark) = (self.clone(), mark(name));
        isolated(move || {
            let device = loop_device::attach(&mount.open()?.into(), &mark).context(|| "attaching a loop device".into())?;
            let fit = match device.has_write_cache() {
                Ok(true) => record(&mount.path, &device),
                Ok(false) | Err(_) => Err(Error::NoFlush { device: device.path().to_owned() }),
            };
            if fit.is_err() {
                drop(device.detach());
            }
            fit.map(|()| device)
        })
    }

    /// Makes the kernel see the file's new size, and then the device. Blocks until the datapath serves it.
    pub(crate) fn refresh_size(&self, device: &LoopDevice) -> Result<(), Error> {
        errand::ask(RefreshSize { file: self.path.clone(), device: device.clone() })
            .context(|| format!("growing {}", device.path().display()))
    }

    /// Unmounts it, also if somebody still has it open. Not mounted any more: fine.
    pub(crate) fn unmount(&self) -> Result<(), Error> {
        let path = self.path.clone();
        isolated(move || remove_file(&path))
    }
}

/// Takes every mount off the file, and removes it and what is on record of it.
fn remove_file(path: &Path) -> Result<(), Error> {
    while let Ok(()) = unmount(path, UnmountFlags::DETACH) {}
    for path in [path, &record_of(path)] {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context(|| format!("removing {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Beside the FUSE file: which attachment of a loop device is over it. The path that the kernel gives for what a loop device is over is lost with the
/// mount namespace in which that was opened, as a pod's is when the pod ends.
fn record_of(path: &Path) -> PathBuf {
    path.with_extension("loop")
}

/// Which start of the machine this is: the kernel counts anew with each.
fn boot() -> Result<String, Error> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(std::fs::read_to_string(path).context(|| format!("reading {path}"))?.trim().to_owned())
}

fn record(path: &Path, device: &LoopDevice) -> Result<(), Error> {
    let Some(sequence) = device.sequence() else { return Ok(()) };
    let path = record_of(path);
    // Cut off in the middle it says nothing, and need not: only then is the connection given to the holder. Nor need it outlive the machine.
    std::fs::write(&path, format!("{} {sequence}\n", boot()?)).context(|| format!("writing {}", path.display()))
}

fn recorded(path: &Path) -> Option<u64> {
    let record = std::fs::read_to_string(record_of(path)).ok()?;
    let (start, sequence) = record.trim().split_once(' ')?;
    (start == boot().ok()?).then(|| sequence.parse().ok())?
}

/// `Mount::refresh_size`.
#[derive(Serialize, Deserialize)]
struct RefreshSize {
    file: PathBuf,
    device: LoopDevice,
}

impl Errand for RefreshSize {
    const NAME: &'static str = "refresh-size";
    type Answer = Said<()>;

    fn run(self) -> Said<()> {
        // A stat brings the new size into the kernel's inode; the loop device takes it from there.
        std::fs::metadata(&self.file).and_then(|_| self.device.refresh_size()).map_err(|error| errand::number(&error))
    }
}

/// `detach`.
#[derive(Serialize, Deserialize)]
struct Detach {
    device: LoopDevice,
}

impl Errand for Detach {
    const NAME: &'static str = "detach";
    type Answer = Said<()>;

    fn run(self) -> Said<()> {
        self.device.detach_unmounted().map_err(|error| errand::number(&error))
    }
}

/// Detaches a device that no file system is on any more; one that was unmounted a moment ago is waited for. Otherwise in use: it goes with its last
/// user. Blocks until the datapath serves it.
pub(crate) fn detach(device: &LoopDevice) -> Result<(), Error> {
    let deadline = Instant::now() + LET_GO;
    loop {
        match errand::ask(Detach { device: device.clone() }) {
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy && Instant::now() < deadline => std::thread::sleep(AGAIN),
            done => {
                return done.context(|| {
                    format!(
                        "detaching {}, which no file system may be on any more, mounted or still being unmounted",
                        device.path().display()
                    )
                });
            }
        }
    }
}

/// The mount and the loop device that a process before this one made. `None`: they are not there. Touches neither: nobody serves them yet.
pub(crate) fn existing(run_dir: &Path, name: &str) -> Result<Option<(Mount, LoopDevice)>, Error> {
    let path = run_dir.join(name);
    let Some(device) = over(&attached()?, &path).into_iter().next() else { return Ok(None) };
    if recorded(&path) != device.sequence() {
        // Attached by a csi-node that kept no record.
        record(&path, &device)?;
    }
    Ok(Some((Mount { path }, device)))
}

fn attached() -> Result<Vec<Attached>, Error> {
    loop_device::attached().context(|| "looking for loop devices".into())
}

/// Those that are over the file at this path: first the one that is on record, then those of which the kernel says so.
fn over(attached: &[Attached], path: &Path) -> Vec<LoopDevice> {
    let (sequence, backing) = (recorded(path), as_the_kernel_names_it(path));
    let on_record = |found: &&Attached| sequence.is_some() && found.device.sequence() == sequence;
    let said = |found: &&Attached| !on_record(found) && found.over.as_deref() == Some(&backing);
    attached.iter().filter(on_record).chain(attached.iter().filter(said)).map(|found| found.device.clone()).collect()
}

/// With no link in its directory; the file itself is not looked at, since that may ask who serves it.
fn as_the_kernel_names_it(path: &Path) -> PathBuf {
    let dir = path.parent().and_then(|dir| dir.canonicalize().ok());
    dir.zip(path.file_name()).map_or(path.to_owned(), |(dir, name)| dir.join(name))
}

/// Which of these devices carry this name.
#[derive(Serialize, Deserialize)]
struct Named {
    mark: String,
    among: Vec<LoopDevice>,
}

impl Errand for Named {
    const NAME: &'static str = "named";
    type Answer = Vec<LoopDevice>;

    fn run(self) -> Vec<LoopDevice> {
        let Self { mark, among } = self;
        among.into_iter().filter(|device| device.name().is_ok_and(|name| name == mark)).collect()
    }
}

/// Removes what a process that died left behind for this volume: its FUSE mount, and its loop devices, which it returns. The file system on one must
/// be unmounted by then, or it goes with its last user. Nothing left: nothing done. Blocks.
///
/// # Errors
/// `Error::Io`.
pub(crate) fn remove_leftovers(run_dir: &Path, name: &str) -> Result<Vec<LoopDevice>, Error> {
    let path = run_dir.join(name);
    let attached = attached()?;
    let mut left = over(&attached, &path);
    // Its csi-node ended before it was on record, and its mount namespace with it.
    let among: Vec<LoopDevice> =
        attached.into_iter().filter(|found| found.over.as_deref() == Some(Path::new("/"))).map(|found| found.device).collect();
    if left.is_empty() && !among.is_empty() {
        left = errand::send(Named { mark: mark(name), among }).context(|| "asking loop devices for their names".into())?;
    }
    isolated(move || {
        for device in &left {
            device.detach().context(|| format!("detaching {}", device.path().display()))?;
        }
        remove_file(&path).map(|()| left)
    })
}

/// Waits for the end of devices that were detached: a file system that was unmounted lazily may hold one a little longer.
pub(crate) fn wait_until_gone(devices: &[LoopDevice]) {
    let deadline = Instant::now() + LET_GO;
    // What cannot be looked for is not waited for.
    let still_there = || attached().unwrap_or_default().into_iter().map(|found| found.device).find(|device| devices.contains(device));
    while let Some(device) = still_there() {
        if Instant::now() > deadline {
            warn!(device = %device.path().display(), "it is in use still, though nobody serves it: it goes with its last user");
            return;
        }
        std::thread::sleep(SOON);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_from_6_9_on_can_send_again_and_what_names_no_version_is_older() {
        let can = ["6.9.0-rc1", "6.9", "6.10.3", "6.18.44-fc-v669", "7.0.0", "10.0"];
        let cannot = ["5.15.0", "5.15.0-119-generic", "6.8.12", "6.8.0-90-generic", "2.6.78", "6", "v6.9", "garbage", ""];
        assert_eq!(can.map(can_resend), [true; 6]);
        assert_eq!(cannot.map(can_resend), [false; 9]);
    }
}
