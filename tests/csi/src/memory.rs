//! What processes have of memory, and how little they may be given.

use std::{
    fmt::Display,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crate::lab::text;

/// A figure of a process, in KiB: what stands after `name` in its file `status`, `smaps_rollup` or the like in `/proc`.
pub fn kib(process: u32, file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/{file}")).expect("the process is there");
    let figure = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("the kernel says it");
    figure.trim().trim_end_matches("kB").trim().parse().expect("a number")
}

/// What the README promises: so much for csi-node with its two threads, ...
pub const NODE_MIB: u64 = 180;
/// ... and so much for each volume.
pub const VOLUME_MIB: u64 = 4;

/// A memory cgroup of version 1 below our own; dropped, it goes.
#[derive(Debug)]
pub struct MemoryGroup(PathBuf);

impl MemoryGroup {
    /// `None`: this machine has no such thing, and what needs it is skipped, which is said and counted.
    pub fn new(name: &str) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").expect("/proc");
        let root = Path::new("/sys/fs/cgroup/memory");
        let own = own.lines().find_map(|line| line.split_once(":memory:")).map(|(_, own)| root.join(own.trim_start_matches('/')));
        // A container may see another path than it is in, or none.
        let Some(own) = own.filter(|own| own.join("memory.limit_in_bytes").exists()) else {
            crate::skipped(name, "no memory controller of cgroup v1 here");
            return None;
        };
        let dir = own.join(format!("{name}.{}", std::process::id()));
        fs::create_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        Some(Self(dir))
    }

    /// Writes one of its files.
    pub fn set(&self, file: &str, value: impl Display) {
        fs::write(self.0.join(file), value.to_string()).unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    /// Reads one of its files.
    pub fn get(&self, file: &str) -> u64 {
        fs::read_to_string(self.0.join(file)).expect("a memory cgroup").trim().parse().expect("a number")
    }

    /// A shell that enters it and becomes what follows.
    pub fn enter(&self) -> [String; 4] {
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", text(&self.0));
        ["sh", "-c", &script, "sh"].map(str::to_owned)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Who was in it may be ending still.
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
    }
}
