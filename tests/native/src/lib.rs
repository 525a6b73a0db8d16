//! Real disks for tests: disk images on loop devices with XFS on them, made to fail from below by the kernel.
//!
//! A run that was cut off is cleaned up by the next one: everything lives under one directory per process, whose name carries the pid.

pub mod faulty;
pub mod frozen;
pub mod history;
pub mod scribble;
pub mod seen;
pub mod soak;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use lockstep_datapath::{
    LegPath, VolumeSpec,
    core::{
        format,
        units::{BLOCK_SIZE, LegId, VolumeId},
    },
    create_leg, create_witness,
};

const PREFIX: &str = "lockstep-native.";

/// Runs a command to its end; its output, or a panic that shows what it said.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {}\n{stdout}{said}", args.join(" "), output.status);
    stdout
}

/// Whether a command succeeds. Its output is dropped.
pub fn succeeds(program: &str, args: &[&str]) -> bool {
    let status = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// A directory with disks, which go when it is dropped.
#[derive(Debug)]
pub struct Rig {
    dir: tempfile::TempDir,
    disks: Vec<Disk>,
}

/// One disk: an image, a loop device, a mounted XFS.
#[derive(Debug)]
pub struct Disk {
    /// Its loop device.
    pub device: PathBuf,
    /// Where its XFS is mounted.
    pub mount: PathBuf,
}

/// A path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("the rig's paths are text")
}

/// A program of ours, built beside this one, or, for a test, one directory up.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("our own path");
    let beside = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    beside.unwrap_or_else(|| panic!("{name} is not built beside {}", own.display()))
}

/// A loop device that was detached is another's at once, under the same name: whoever looks for some to detach has nobody of this process beside him.
static LOOPS: Mutex<()> = Mutex::new(());

/// A loop device over an image.
pub fn attach_loop(image: &Path) -> PathBuf {
    let _alone = LOOPS.lock().unwrap_or_else(PoisonError::into_inner);
    run("losetup", &["--find", "--show", "--direct-io=on", text(image)]).trim().into()
}

/// Removes what runs that were cut off left in the temporary directory: theirs is `prefix`, the process id, a dot, anything.
pub fn remove_dead_runs(prefix: &str) {
    for entry in fs::read_dir(std::env::temp_dir()).expect("the temporary directory").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(prefix).and_then(|rest| rest.split('.').next().map(str::to_owned));
        if let Some(pid) = pid
            && !Path::new("/proc").join(&pid).exists()
        {
            tear_down(&entry.path());
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

/// Takes everything down that lives under `dir`: mounts, innermost first, then loop devices.
pub fn tear_down(dir: &Path) {
    // First those over files that are mounts: unmounted, their paths are forgotten. In use, they go with their last user.
    detach_loops(dir);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let under = |path: &str| Path::new(path).starts_with(dir);
    for mount in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).filter(|path| under(path)) {
        succeeds("umount", &["-l", mount]);
    }
    detach_loops(dir);
}

fn detach_loops(dir: &Path) {
    let _alone = LOOPS.lock().unwrap_or_else(PoisonError::into_inner);
    for line in run("losetup", &["--list", "--noheadings", "--output", "NAME,BACK-FILE"]).lines() {
        if let Some((device, file)) = line.trim().split_once(char::is_whitespace)
            && Path::new(file.trim()).starts_with(dir)
            && still_over(device, file.trim())
        {
            succeeds("losetup", &["-d", device]);
        }
    }
}

/// csi-node attaches some too, at any moment.
fn still_over(device: &str, file: &str) -> bool {
    let name = device.trim_start_matches("/dev/");
    let over = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).unwrap_or_default();
    over.trim_end_matches('\n') == file
}

impl Rig {
    /// Makes this many disks of this size.
    pub fn new(disks: usize, megabytes: u64) -> Self {
        remove_dead_runs(PREFIX);
        let prefix = format!("{PREFIX}{}.", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir().expect("a temporary directory");
        let mut rig = Self { dir, disks: Vec::new() };
        for _ in 0..disks {
            rig.add_disk(megabytes);
        }
        rig
    }

    /// One more disk.
    pub fn add_disk(&mut self, megabytes: u64) {
        let number = self.disks.len();
        let image = self.dir.path().join(format!("disk{number}.img"));
        fs::File::create(&image).and_then(|file| file.set_len(megabytes << 20)).expect("an image");
        let device = attach_loop(&image);
        // A run that was cut off may have left limits behind.
        limit(&device, 0, 0);
        run("mkfs.xfs", &["-q", "-K", text(&device)]);
        let mount = self.dir.path().join(format!("mnt{number}"));
        fs::create_dir(&mount).expect("a mount point");
        run("mount", &[text(&device), text(&mount)]);
        self.disks.push(Disk { device, mount });
    }

    /// Gives each disk a limit of its own, as real disks have: bytes and operations a second, reads and writes apart. `false`: this kernel
    /// cannot.
    pub fn limit_disks(&self, bytes: u64, operations: u64) -> bool {
        self.disks.iter().all(|disk| limit(&disk.device, bytes, operations))
    }

    /// A disk.
    pub fn disk(&self, number: usize) -> &Disk {
        &self.disks[number]
    }

    /// The rig's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The kernel shuts the disk's file system down: every I/O to it fails from now on.
    pub fn fail_disk(&self, number: usize) {
        run("xfs_io", &["-x", "-c", "shutdown", text(&self.disks[number].mount)]);
    }

    /// Where a leg on a disk lives.
    pub fn leg_dir(&self, number: usize, leg: LegId) -> PathBuf {
        self.disks[number].mount.join(leg.to_string())
    }

    /// Makes the two legs and the witness of a new volume on disks 0 and 1.
    pub fn new_volume(&self, id: u8, megabytes: u64) -> VolumeSpec {
        let (volume, legs) = (VolumeId([id; 16]), [leg_id(id, 1), leg_id(id, 2)]);
        let blocks = (megabytes << 20) / BLOCK_SIZE;
        for (number, leg) in legs.into_iter().enumerate() {
            let dir = self.leg_dir(number, leg);
            fs::create_dir(&dir).expect("a leg's directory");
            create_leg(&dir, megabytes << 20, &format::new_leg(volume, legs, leg, blocks)).expect("a leg");
        }
        let witness = self.dir().join(format!("witness-{volume}"));
        create_witness(&witness, &format::new_witness(volume, legs, blocks)).expect("a witness");
        VolumeSpec {
            volume,
            legs: [0, 1].map(|n| LegPath { dir: self.leg_dir(n, legs[n]) }).to_vec(),
            witness,
            seen_epoch: None,
            force: None,
            run_dir: self.dir().join("run"),
        }
    }

    /// An empty leg for a rebuild, on this disk.
    pub fn spare(&self, number: usize, volume: VolumeId, leg: LegId, megabytes: u64) -> LegPath {
        let dir = self.leg_dir(number, leg);
        fs::create_dir(&dir).expect("a leg's directory");
        create_leg(&dir, megabytes << 20, &format::spare_leg(volume, leg, (megabytes << 20) / BLOCK_SIZE)).expect("a leg");
        LegPath { dir }
    }
}

/// Limits what a block device does in a second; 0: no limit. Takes the `blkio` controller of cgroup v1 and throttling.
pub fn limit(device: &Path, bytes: u64, operations: u64) -> bool {
    let name = device.file_name().expect("a device");
    let number = fs::read_to_string(Path::new("/sys/block").join(name).join("dev")).expect("the device is there");
    let kinds = [("read_bps", bytes), ("write_bps", bytes), ("read_iops", operations), ("write_iops", operations)];
    kinds.iter().all(|(kind, limit)| {
        let file = format!("/sys/fs/cgroup/blkio/blkio.throttle.{kind}_device");
        Path::new(&file).exists() && fs::write(file, format!("{} {limit}", number.trim())).is_ok()
    })
}

impl Drop for Rig {
    fn drop(&mut self) {
        // A loop device keeps its limits for whoever has it next.
        self.limit_disks(0, 0);
        tear_down(self.dir.path());
    }
}

/// A leg's id, from its volume's and its own number.
pub fn leg_id(volume: u8, leg: u8) -> LegId {
    let mut id = [volume; 16];
    id[15] = leg;
    LegId(id)
}

/// A running `serve`: volumes in a process of their own.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// The block devices, in the order of the volumes.
    pub devices: Vec<PathBuf>,
}

impl Server {
    /// Starts `program`, the `serve` binary, for these volumes, and waits for their devices. With the socket of a FUSE holder, that has them too.
    pub fn start(program: &str, holder: Option<&Path>, volumes: &[VolumeSpec]) -> Self {
        let mut command = Command::new(program);
        command.arg(holder.unwrap_or(Path::new("")));
        for spec in volumes {
            command.arg(spec.volume.to_string()).arg(&spec.witness).arg(&spec.run_dir).arg(spec.legs.len().to_string());
            command.args(spec.legs.iter().map(|leg| &leg.dir));
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("serve starts");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let devices = lines.take(volumes.len()).map(|line| line.expect("text").into()).collect::<Vec<PathBuf>>();
        assert_eq!(devices.len(), volumes.len(), "serve ended early");
        Self { child, devices }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Proportional set size, in KiB.
    pub fn pss(&self) -> u64 {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid())).expect("smaps_rollup");
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).expect("a Pss line");
        line.trim().trim_end_matches("kB").trim().parse().expect("a number")
    }

    /// Stops it cleanly.
    pub fn stop(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().expect("serve was started").success(), "serve failed");
    }

    /// SIGKILL, and the end of the process.
    pub fn kill(mut self) {
        self.child.kill().expect("serve is alive");
        self.child.wait().expect("serve was started");
    }
}

/// Whether two legs' data files are the same, says a program that shares no code with the datapath.
pub fn identical(a: &LegPath, b: &LegPath) -> bool {
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root drops caches");
    succeeds("cmp", &["--silent", text(&a.dir.join("data")), text(&b.dir.join("data"))])
}

/// Starts fio with these options on a device: 16 jobs whose writes overlap, and two that verify ranges of their own.
pub fn fio(device: &Path, seconds: u32) -> Child {
    let filename = format!("--filename={}", text(device));
    let runtime = format!("--runtime={seconds}");
    let own = |name: &'static str, offset: &'static str| {
        [
            name,
            offset,
            "--size=20%",
            "--rw=randwrite",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--iodepth=16",
            "--bsrange=4k-64k",
        ]
    };
    // fio would leave its verify states in the working directory.
    let shared =
        ["--verify_state_save=0", "--direct=1", "--ioengine=libaio", "--time_based=1", "--group_reporting=1", "--output-format=terse"];
    let overlapping = [
        "--name=overlap",
        "--numjobs=16",
        "--offset=50%",
        "--size=5%",
        "--rw=randrw",
        "--rwmixread=20",
        "--iodepth=8",
        "--bsrange=4k-128k",
    ];
    Command::new("fio")
        .arg(filename)
        .args(shared)
        .arg(runtime)
        .args(own("--name=own1", "--offset=0%"))
        .args(own("--name=own2", "--offset=25%"))
        .args(overlapping)
        .stdout(Stdio::null())
        .spawn()
        .expect("fio is installed")
}
