//! Blank disks, and what the kernel can do to them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use lockstep_native::{attach_loop, faulty::FaultyDisk, remove_dead_runs, run, tear_down};

const PREFIX: &str = "lockstep-csi.";

/// A directory with blank disks. Everything in it goes when it is dropped: mounts, loop devices, files.
#[derive(Debug)]
pub struct Lab {
    dir: tempfile::TempDir,
    /// Image and device.
    disks: Vec<(PathBuf, PathBuf)>,
    forgotten: BTreeSet<String>,
}

impl Lab {
    /// Makes this many blank disks of this size. What a run that was cut off left is removed first.
    pub fn new(disks: usize, megabytes: u64) -> Self {
        remove_dead_runs(PREFIX);
        let prefix = format!("{PREFIX}{}.", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir().expect("a temporary directory");
        let mut lab = Self { dir, disks: Vec::new(), forgotten: forgotten_loops() };
        fs::create_dir(lab.path("disks")).expect("a directory of disks");
        for _ in 0..disks {
            lab.add_disk(megabytes);
        }
        lab
    }

    /// One more blank disk, and its number. csi-node finds it under `disks/N`.
    pub fn add_disk(&mut self, megabytes: u64) -> usize {
        let image = self.path(&format!("disk{}.img", self.disks.len()));
        self.add_image(&image, &image, megabytes)
    }

    /// One more blank disk, over a file system that can be made to hang, and its number.
    pub fn add_faulty_disk(&mut self, megabytes: u64, seed: u64) -> (usize, FaultyDisk) {
        let disk = FaultyDisk::start(self.dir.path(), &format!("faulty{}", self.disks.len()), seed, 256);
        let number = self.add_image(&disk.backing.join("image"), &disk.mount.join("image"), megabytes);
        (number, disk)
    }

    fn add_image(&mut self, made: &Path, used: &Path, megabytes: u64) -> usize {
        let number = self.disks.len();
        fs::File::create(made).and_then(|file| file.set_len(megabytes << 20)).expect("an image");
        let device = attach_loop(used);
        std::os::unix::fs::symlink(&device, self.path(&format!("disks/{number}"))).expect("a link");
        self.disks.push((used.to_owned(), device));
        number
    }

    /// A path in the lab.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// How many disks there are.
    pub fn disks(&self) -> usize {
        self.disks.len()
    }

    /// A disk's block device.
    pub fn device(&self, number: usize) -> &Path {
        &self.disks[number].1
    }

    /// Where csi-node mounted a disk.
    pub fn mount_of(&self, number: usize) -> Option<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc");
        let mut here =
            mounts.lines().filter_map(|line| line.split_once(' ')).filter(|(device, _)| Path::new(device) == self.device(number));
        here.find_map(|(_, rest)| rest.split(' ').next()).map(PathBuf::from)
    }

    /// The number of the disk that csi-node gave this name, and mounted.
    pub fn number_of(&self, disk: &str) -> usize {
        let named = |number: &usize| self.mount_of(*number).is_some_and(|mount| mount.ends_with(disk));
        (0..self.disks()).find(named).unwrap_or_else(|| panic!("{disk} is not mounted"))
    }

    /// The kernel shuts the disk's file system down: every I/O to it fails from now on.
    pub fn fail_disk(&self, number: usize) {
        let mount = self.mount_of(number).expect("the disk is mounted");
        run("xfs_io", &["-x", "-c", "shutdown", text(&mount)]);
    }

    /// Pulls a disk that is not mounted any more.
    pub fn pull_disk(&mut self, number: usize) {
        fs::remove_file(self.path(&format!("disks/{number}"))).expect("the link");
        run("losetup", &["-d", text(self.device(number))]);
    }

    /// Plugs it in again.
    pub fn plug_disk(&mut self, number: usize) {
        let device = attach_loop(&self.disks[number].0);
        std::os::unix::fs::symlink(&device, self.path(&format!("disks/{number}"))).expect("a link");
        self.disks[number].1 = device;
    }

    /// What is left of the lab in the kernel: mounts and loop devices. Nothing, after everything was taken down.
    pub fn left_over(&self) -> Vec<String> {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc");
        let under = |path: &str| Path::new(path).starts_with(self.dir.path());
        let mounts = mounts.lines().filter(|line| line.split(' ').nth(1).is_some_and(under)).map(str::to_owned);
        let loops = run("losetup", &["--list", "--noheadings", "--output", "NAME,BACK-FILE"]);
        // Over a file of a mount that is gone: of no path any more, so of nobody. Those that were there before are not ours.
        let forgotten = forgotten_loops().difference(&self.forgotten).cloned().collect::<Vec<_>>();
        let own = |line: &&str| !self.disks.iter().any(|(_, disk)| line.starts_with(&format!("{} ", text(disk))));
        let loops = loops.lines().filter(|line| line.contains(text(self.dir.path()))).filter(own).map(str::to_owned);
        mounts.chain(loops).chain(forgotten).collect()
    }
}

/// Loop devices over files that have no path any more.
fn forgotten_loops() -> BTreeSet<String> {
    let loops = run("losetup", &["--list", "--raw", "--noheadings", "--output", "NAME,BACK-FILE"]);
    loops.lines().filter(|line| line.trim().ends_with(" /")).map(str::to_owned).collect()
}

impl Drop for Lab {
    fn drop(&mut self) {
        tear_down(self.dir.path());
    }
}

/// How many mounts there are at a path.
pub fn mounts_at(path: &Path) -> usize {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc");
    mounts.lines().filter(|line| line.split(' ').nth(1) == Some(text(path))).count()
}

/// A path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("the lab's paths are text")
}

/// Whether two copies are the same, says a program that shares no code with the datapath, after the page cache was dropped.
pub fn identical(a: &Path, b: &Path) -> bool {
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root drops caches");
    lockstep_native::succeeds("cmp", &["--silent", text(a), text(b)])
}

/// How a copy is mounted alone: the README says the same.
pub const ALONE: &str = "loop,ro";

/// How it is after a crash, when its journal has something that a read-only mount cannot replay.
pub fn alone_after_a_crash(fs_type: &str) -> &'static str {
    if fs_type == "xfs" { "loop,ro,norecovery,nouuid" } else { "loop,ro,noload" }
}

/// Runs `work` on a copy that is mounted alone, read-only, without the driver.
///
/// # Panics
/// If it cannot be mounted.
pub fn alone<T>(lab: &Lab, copy: &Path, fs_type: &str, work: impl FnOnce(&Path) -> T) -> T {
    alone_with(lab, copy, fs_type, ALONE, work).expect("it is mounted")
}

/// The same with these options of mount. `None`: it cannot be mounted so.
pub fn alone_with<T>(lab: &Lab, copy: &Path, fs_type: &str, options: &str, work: impl FnOnce(&Path) -> T) -> Option<T> {
    let at = lab.path("copy");
    fs::create_dir_all(&at).expect("a mount point");
    lockstep_native::succeeds("mount", &["-t", fs_type, "-o", options, text(copy), text(&at)]).then(|| {
        let result = work(&at);
        run("umount", &[text(&at)]);
        result
    })
}
