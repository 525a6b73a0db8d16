//! Work for a mounted volume: many writers that overlap, some that verify what they wrote, and a copy of files.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::lab::text;

/// A running fio.
#[derive(Debug)]
pub struct Load(Child);

/// Where on a device, or in their file, the two jobs are that verify, and the first byte of those that overlap.
const ON_FILES: [&str; 3] = ["0", "64M", "0"];
const ON_DEVICE: [&str; 3] = ["64M", "128M", "192M"];

/// Direct I/O for this many seconds on files under `dir`: twelve jobs whose writes overlap, and two that verify ranges of their own.
pub fn on_files(dir: &Path, seconds: u32) -> Load {
    start(&dir.join("overlap"), &dir.join("verify"), seconds, ON_FILES)
}

/// The same on a bare device.
pub fn on_device(device: &Path, seconds: u32) -> Load {
    start(device, device, seconds, ON_DEVICE)
}

/// Whether every block of the ranges that a load of `on_files` verifies is as its last writer made it. The load itself ends in the middle of its
/// writing, and what it wrote last it does not read. It has to have come to every block.
pub fn verified_on_files(dir: &Path) -> bool {
    verified(&dir.join("verify"), ON_FILES)
}

/// The same for `on_device`.
pub fn verified_on_device(device: &Path) -> bool {
    verified(device, ON_DEVICE)
}

fn fio() -> Command {
    let mut fio = Command::new("fio");
    // fio would leave its verify states in the working directory.
    fio.args(["--verify_state_save=0", "--direct=1", "--ioengine=libaio", "--output-format=terse", "--fallocate=none"]);
    fio.stdout(Stdio::null());
    fio
}

/// A job with a range of its own. Each block has its own checksum, so that what is left of a large write can be verified.
fn own(fio: &mut Command, name: &str, file: &Path, offset: &str) {
    fio.arg(format!("--name={name}")).arg(format!("--filename={}", text(file))).arg(format!("--offset={offset}"));
    fio.args(["--size=32M", "--verify=crc32c", "--verify_interval=4096", "--verify_fatal=1", "--do_verify=1", "--iodepth=8"]);
}

fn verified(file: &Path, [first, second, _]: [&str; 3]) -> bool {
    let mut fio = fio();
    for (name, offset) in [("last1", first), ("last2", second)] {
        own(&mut fio, name, file, offset);
        fio.args(["--rw=read", "--bs=64k"]);
    }
    fio.status().expect("fio is installed").success()
}

fn start(overlap: &Path, verify: &Path, seconds: u32, [first, second, third]: [&str; 3]) -> Load {
    let mut fio = fio();
    fio.arg("--time_based=1").arg(format!("--runtime={seconds}"));
    for (name, offset) in [("own1", first), ("own2", second)] {
        own(&mut fio, name, verify, offset);
        fio.args(["--rw=randwrite", "--bsrange=4k-64k"]);
    }
    let child = fio
        .args(["--name=overlap", &format!("--filename={}", text(overlap)), &format!("--offset={third}")])
        .args(["--numjobs=12", "--size=16M", "--rw=randrw", "--rwmixread=20", "--iodepth=8", "--bsrange=4k-128k"])
        .spawn()
        .expect("fio is installed");
    Load(child)
}

impl Load {
    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.0.try_wait().expect("fio was started").is_none()
    }

    /// Waits for its end. `false`: it got an error, or read what it did not write.
    pub fn succeeded(mut self) -> bool {
        self.0.wait().expect("fio was started").success()
    }
}

/// fio on many devices at once: each slowly, and all that it writes is verified, since nobody overlaps.
#[derive(Debug)]
pub struct Many(Child);

/// On the first 8 MiB of each device, for this many seconds.
pub fn on_many<'a>(devices: impl IntoIterator<Item = &'a Path>, seconds: u32) -> Many {
    let mut fio = Command::new("fio");
    fio.args(["--direct=1", "--ioengine=libaio", "--rw=randwrite", "--bs=4k", "--iodepth=2", "--rate_iops=25", "--size=8m"]);
    fio.args(["--verify=crc32c", "--verify_state_save=0", "--serialize_overlap=1", "--time_based=1", "--group_reporting=1"]);
    fio.args([&format!("--runtime={seconds}"), "--output-format=json", "--thread"]);
    for (number, device) in devices.into_iter().enumerate() {
        fio.arg(format!("--name=v{number}")).arg(format!("--filename={}", text(device)));
    }
    Many(fio.stdout(Stdio::piped()).spawn().expect("fio is installed"))
}

impl Many {
    /// Waits for its end, and says how long the slowest write took.
    ///
    /// # Panics
    /// If it got an error, or read what it did not write.
    pub fn slowest_write(self) -> Duration {
        let ended = self.0.wait_with_output().expect("fio was started");
        let said = String::from_utf8_lossy(&ended.stdout);
        assert!(ended.status.success(), "the load saw an error: {said}");
        // It may have a word to say before.
        let said: serde_json::Value = serde_json::from_str(&said[said.find('{').expect("JSON")..]).expect("fio's JSON");
        Duration::from_nanos(said["jobs"][0]["write"]["clat_ns"]["max"].as_u64().expect("a time"))
    }
}

const BLOCK: usize = 4096;

/// A device, by direct I/O; what was written is durable.
#[derive(Debug)]
pub struct Direct {
    file: File,
    /// Has a block where direct I/O takes it.
    memory: Vec<u8>,
    skip: usize,
}

impl Direct {
    /// Opens it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open(device: &Path) -> io::Result<Self> {
        let memory = vec![0; 2 * BLOCK];
        let skip = memory.as_ptr().align_offset(BLOCK);
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT | libc::O_DSYNC).open(device)?;
        Ok(Self { file, memory, skip })
    }

    /// The block that is written and read.
    pub fn block(&mut self) -> &mut [u8] {
        &mut self.memory[self.skip..self.skip + BLOCK]
    }

    /// Writes the block at this byte.
    ///
    /// # Errors
    /// What the device says.
    pub fn write(&mut self, at: u64) -> io::Result<()> {
        self.file.write_all_at(&self.memory[self.skip..self.skip + BLOCK], at)
    }

    /// Reads the block at this byte.
    ///
    /// # Errors
    /// What the device says.
    pub fn read(&mut self, at: u64) -> io::Result<()> {
        self.file.read_exact_at(&mut self.memory[self.skip..self.skip + BLOCK], at)
    }
}
