//! What csi-node needs of what is around it: mounts that reach the host, and memory.
#![allow(missing_docs)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use lockstep_csi_tests::{
    driver::Driver,
    lab::{Lab, identical, text},
    load,
};
use lockstep_native::run;
use tonic::Code;

const MIB: u64 = 1 << 20;

fn namespace(propagation: &str) -> [&str; 4] {
    ["unshare", "--mount", "--propagation", propagation]
}

/// From here on, what is mounted below the directory is mounted below its copies in other namespaces too, if they share it.
fn shared(dir: &Path) {
    run("mount", &["--bind", text(dir), text(dir)]);
    run("mount", &["--make-shared", text(dir)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_mount_namespace_of_its_own_csi_node_insists_on_mounts_that_reach_the_host() {
    let lab = Lab::new(2, 1200);
    shared(&lab.path(""));
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let place = driver.place("v", 64 * MIB, Some("ext4")).await;
    driver.terminate_node();
    for alone in ["private", "slave", "shared"] {
        // The last one is shared, but with nobody: what was private on the host has no peers there.
        if alone == "shared" {
            run("mount", &["--make-private", text(&lab.path(""))]);
        }
        driver.start_node_by(&namespace(alone));
        let said = driver.start_node_in_vain();
        assert!(said.contains("mountPropagation: Bidirectional") && said.contains("driver/state/run"), "{alone}: {said}");
    }
    run("mount", &["--make-shared", text(&lab.path(""))]);
    driver.start_node_by(&namespace("unchanged"));
    driver.start_node().await;

    // The state directory reaches the host, and the path that a caller names does not.
    let inner = lab.path("inner");
    fs::create_dir(&inner).unwrap();
    run("mount", &["-t", "tmpfs", "tmpfs", text(&inner)]);
    run("mount", &["--make-private", text(&inner)]);
    // It is in csi-node's namespace too by now, with the host's for its peer: only a new namespace has it private.
    driver.terminate_node();
    driver.start_node().await;
    let refused = driver.client.stage(&place.id, &inner.join("staging"), place.fs_type).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("mountPropagation: Bidirectional"), "{refused}");
    driver.client.stage(&place.id, &place.staging, place.fs_type).await.unwrap();
    let refused = driver.client.publish(&place.id, &place.staging, &inner.join("target"), place.fs_type).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");

    // The host sees it, and it outlives the namespace.
    place.up(&driver.client).await.unwrap();
    let file = place.target.join("f");
    fs::write(&file, "seen").and_then(|()| fs::File::open(&file)?.sync_all()).unwrap();
    driver.kill_node();
    driver.start_node().await;
    assert_eq!(fs::read_to_string(&file).unwrap(), "seen");
    place.down(&driver.client).await.unwrap();
    driver.stop();
}

/// A memory cgroup of version 1 below our own; dropped, it goes.
struct Limit(PathBuf);

impl Limit {
    /// `None`: this machine has no such thing.
    fn new(name: &str, megabytes: u64) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.split_once(":memory:"))?.1.to_owned();
        let dir = Path::new("/sys/fs/cgroup/memory").join(own.trim_start_matches('/')).join(format!("{name}.{}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        let group = Self(dir);
        group.set("memory.limit_in_bytes", megabytes * MIB);
        Some(group)
    }

    fn set(&self, file: &str, value: u64) {
        fs::write(self.0.join(file), value.to_string()).unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    fn get(&self, file: &str) -> u64 {
        fs::read_to_string(self.0.join(file)).unwrap().trim().parse().unwrap()
    }

    /// A shell that enters it and becomes what follows.
    fn enter(&self) -> [String; 4] {
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", text(&self.0));
        ["sh", "-c", &script, "sh"].map(str::to_owned)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // Who was in it may be ending still.
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Fills a file from `/dev/zero` through the page cache, and syncs it at the end.
fn fill(group: &Limit, file: &Path, megabytes: u64) -> Child {
    let [shell, rest @ ..] = group.enter();
    let dd = ["dd", "if=/dev/zero", "bs=1M", "conv=fsync", "status=none", &format!("count={megabytes}"), &format!("of={}", text(file))]
        .map(str::to_owned);
    Command::new(shell).args(rest).args(dd).stdin(Stdio::null()).spawn().expect("a shell")
}

fn ends_well(mut child: Child, by: Instant) {
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < by, "it hangs");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(child.wait().unwrap().success(), "it saw an error");
}

/// A line of `/proc/PID/status`, in KiB.
fn kib(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// What the README promises: so much for csi-node with its two threads, and so much for each volume.
const NODE_MIB: u64 = 180;
const VOLUME_MIB: u64 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn writers_with_too_little_memory_and_csi_node_within_its_bound_do_not_wait_for_each_other() {
    const VOLUMES: u64 = 8;
    let Some(writers) = Limit::new("lockstep-writers", 48) else { return println!("SKIPPED: no memory controller of cgroup v1") };
    let bound = NODE_MIB + VOLUMES * VOLUME_MIB;
    let node = Limit::new("lockstep-node", bound).unwrap();
    let lab = Lab::new(2, 3000);
    let mut driver = Driver::start(&lab).await;
    driver.start_holder();
    driver.terminate_node();
    driver.start_node_by(&node.enter().each_ref().map(String::as_str));
    driver.start_node().await;
    let idle = kib(driver.node_pid(), "VmRSS");
    let (mut places, mut staged) = (Vec::new(), Vec::new());
    for number in 0..VOLUMES {
        let place = driver.place(&format!("v{number}"), 320 * MIB, Some(if number % 2 == 0 { "ext4" } else { "xfs" })).await;
        place.up(&driver.client).await.unwrap();
        places.push(place);
        staged.push(kib(driver.node_pid(), "VmRSS"));
    }
    let begun = Instant::now();
    let mut fills: Vec<Child> = places.iter().map(|place| fill(&writers, &place.target.join("zeroes"), 150)).collect();
    let load = load::on_files(&places[0].target, 15);
    tokio::time::sleep(Duration::from_secs(3)).await;
    // Killed and started without free memory.
    let peak = kib(driver.node_pid(), "VmHWM");
    driver.kill_node();
    driver.start_node().await;
    let deadline = begun + Duration::from_secs(180);
    fills.drain(..).for_each(|child| ends_well(child, deadline));
    assert!(load.succeeded(), "the load saw an error, or read what it did not write");
    let peak = peak.max(kib(driver.node_pid(), "VmHWM"));
    let mib = [idle, staged[0], staged[staged.len() - 1], peak, locked(driver.node_pid())].map(|kib| kib >> 10);
    println!(
        "figure: {VOLUMES} x 150 MiB through {} MiB of page cache in {:.1?}; csi-node: MiB without volumes, with one, with {VOLUMES}, at most, locked: {mib:?}; \
         its cgroup {} MiB at most",
        writers.get("memory.max_usage_in_bytes") / MIB,
        begun.elapsed(),
        node.get("memory.max_usage_in_bytes") / MIB
    );
    assert!(writers.get("memory.failcnt") > 0, "there was memory enough: this shows nothing");
    assert!(peak <= bound << 10, "{peak} KiB");
    for place in &places {
        place.down(&driver.client).await.unwrap();
        let copies = driver.copies(&place.id).await;
        assert!(identical(&copies[0], &copies[1]), "the copies of {} differ", place.id);
    }
    driver.stop();
}

/// What of a process's memory is locked, in KiB.
fn locked(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Locked:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
