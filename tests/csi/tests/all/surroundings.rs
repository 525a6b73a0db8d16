//! What csi-node needs of what is around it: mounts that reach the host, and memory.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use lockstep_csi_tests::{
    client::Place,
    driver::Driver,
    lab::{Lab, text},
    load,
    memory::{MemoryGroup, NODE_MIB, VOLUME_MIB, kib},
};
use lockstep_native::run;
use tonic::Code;

const MIB: u64 = 1 << 20;

fn namespace(propagation: &str) -> [&str; 4] {
    ["unshare", "--mount", "--propagation", propagation]
}

/// From here on, what is mounted below the directory is mounted below its copies in other namespaces too, if they share it.
pub(crate) fn shared(dir: &Path) {
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

/// The loop devices of this size, by their names.
fn loops_of(bytes: u64) -> BTreeSet<String> {
    let attached = fs::read_dir("/sys/block").unwrap().flatten().filter(|entry| entry.path().join("loop").exists());
    let size = |entry: &fs::DirEntry| fs::read_to_string(entry.path().join("size")).unwrap_or_default();
    let so_large = attached.filter(|entry| size(entry).trim() == (bytes / 512).to_string());
    so_large.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

/// What a loop device is over has no path any more when the mount namespace in which that was opened has ended, as a pod's does with the pod.
#[tokio::test(flavor = "multi_thread")]
async fn csi_node_in_a_new_mount_namespace_serves_the_devices_on_that_it_left_in_the_old_one() {
    let lab = Lab::new(2, 1200);
    shared(&lab.path(""));
    let mut driver = Driver::start(&lab).await;
    driver.start_node_by(&namespace("unchanged"));
    driver.use_holder().await;
    let foreign = &loops_of(203 * MIB) | &loops_of(67 * MIB);
    let (files, block) = (driver.place("files", 203 * MIB, Some("ext4")).await, driver.place("block", 67 * MIB, None).await);
    for place in [&files, &block] {
        place.up(&driver.client).await.unwrap();
    }
    let loops = || [203 * MIB, 67 * MIB].map(|bytes| loops_of(bytes).difference(&foreign).cloned().collect::<Vec<_>>());
    let before = loops();
    assert!(before.iter().all(|loops| loops.len() == 1), "{before:?}");
    let load = load::on_files(&files.target, 15);
    let mut device = load::Direct::open(&block.target).unwrap();
    for round in 1..=3_u8 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        if round == 2 {
            driver.terminate_node();
        } else {
            driver.kill_node();
        }
        driver.start_node().await;
        device.block().fill(round);
        device.write(0).unwrap_or_else(|error| panic!("round {round}: {error}"));
        device.block().fill(0);
        device.read(0).unwrap();
        assert!(device.block().iter().all(|byte| *byte == round), "round {round}");
        assert_eq!(loops(), before, "round {round}");
    }
    assert!(load.succeeded(), "the load saw an error, or read what it did not write");
    drop(device);
    for place in [&files, &block] {
        place.down(&driver.client).await.unwrap();
        driver.assert_copies_identical(&place.id).await;
    }
    assert_eq!(loops().concat(), Vec::<String>::new());
    let left: Vec<_> =
        lab.left_over().into_iter().filter(|left| ["/run/", "staging", "target"].iter().any(|of| left.contains(of))).collect();
    assert_eq!(left, Vec::<String>::new());
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_below_another_mount_is_not_unpublished_and_is_when_that_is_gone() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let mut place = driver.place("v", 64 * MIB, Some("ext4")).await;
    let pods = lab.path("pods");
    place.target = pods.join("pod/target");
    place.up(&driver.client).await.unwrap();
    run("mount", &["-t", "tmpfs", "tmpfs", text(&pods)]);
    let refused = tokio::time::timeout(Duration::from_secs(20), driver.client.unpublish(&place.id, &place.target)).await;
    let refused = refused.expect("it never ends").unwrap_err();
    assert!(refused.message().contains("hidden"), "{refused}");
    run("umount", &[text(&pods)]);
    place.down(&driver.client).await.unwrap();
    assert!(!place.target.exists());
    driver.stop();
}

/// Fills a file from `/dev/zero` through the page cache, and syncs it at the end.
fn fill(group: &MemoryGroup, file: &Path, megabytes: u64) -> Child {
    let [shell, rest @ ..] = group.enter();
    let dd = ["dd", "if=/dev/zero", "bs=1M", "conv=fsync", "status=none", &format!("count={megabytes}"), &format!("of={}", text(file))]
        .map(str::to_owned);
    Command::new(shell).args(rest).args(dd).stdin(Stdio::null()).spawn().expect("a shell")
}

/// Waits for it. The kernel may kill a writer while csi-node is away and nothing can be written back: that is no error of the volume, and it begins anew.
fn ends_well(mut child: Child, by: Instant, again: impl Fn() -> Child) {
    loop {
        let Some(status) = child.try_wait().unwrap() else {
            assert!(Instant::now() < by, "it hangs");
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        if status.signal() != Some(libc::SIGKILL) {
            return assert!(status.success(), "it saw an error: {status}");
        }
        child = again();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_with_too_little_memory_and_csi_node_within_its_bound_do_not_wait_for_each_other() {
    const VOLUMES: u64 = 8;
    let Some(writers) = MemoryGroup::new("lockstep-writers") else { return };
    let bound = NODE_MIB + VOLUMES * VOLUME_MIB;
    let node = MemoryGroup::new("lockstep-node").unwrap();
    for (group, megabytes) in [(&writers, 48), (&node, bound)] {
        group.set("memory.limit_in_bytes", megabytes * MIB);
    }
    let lab = Lab::new(2, 3000);
    let mut driver = Driver::start(&lab).await;
    driver.start_holder();
    driver.terminate_node();
    driver.start_node_by(&node.enter().each_ref().map(String::as_str));
    driver.start_node().await;
    let idle = kib(driver.node_id(), "status", "VmRSS");
    let (mut places, mut staged) = (Vec::new(), Vec::new());
    for number in 0..VOLUMES {
        let place = driver.place(&format!("v{number}"), 320 * MIB, Some(if number % 2 == 0 { "ext4" } else { "xfs" })).await;
        place.up(&driver.client).await.unwrap();
        places.push(place);
        staged.push(kib(driver.node_id(), "status", "VmRSS"));
    }
    let begun = Instant::now();
    let filled = |place: &Place| fill(&writers, &place.target.join("zeroes"), 150);
    let fills: Vec<Child> = places.iter().map(filled).collect();
    let load = load::on_files(&places[0].target, 15);
    tokio::time::sleep(Duration::from_secs(3)).await;
    // Killed and started without free memory.
    let peak = kib(driver.node_id(), "status", "VmHWM");
    driver.kill_node();
    driver.start_node().await;
    let deadline = begun + Duration::from_secs(180);
    fills.into_iter().zip(&places).for_each(|(child, place)| ends_well(child, deadline, || filled(place)));
    assert!(load.succeeded(), "the load saw an error, or read what it did not write");
    let peak = peak.max(kib(driver.node_id(), "status", "VmHWM"));
    let (locked, used) = (kib(driver.node_id(), "smaps_rollup", "Locked"), kib(driver.node_id(), "status", "VmRSS"));
    let mib = [idle, staged[0], staged[staged.len() - 1], peak, locked].map(|kib| kib >> 10);
    println!(
        "figure: {VOLUMES} x 150 MiB through {} MiB of page cache in {:.1?}; csi-node: MiB without volumes, with one, with {VOLUMES}, at most, locked: {mib:?}; \
         its cgroup {} MiB at most",
        writers.get("memory.max_usage_in_bytes") / MIB,
        begun.elapsed(),
        node.get("memory.max_usage_in_bytes") / MIB
    );
    assert!(writers.get("memory.failcnt") > 0, "there was memory enough: this shows nothing");
    assert!(peak <= bound << 10, "{peak} KiB");
    // The kernel counts only its part of what processes share.
    assert!(locked > used / 2, "of {used} KiB in use {locked} KiB are locked");
    for place in &places {
        place.down(&driver.client).await.unwrap();
        driver.assert_copies_identical(&place.id).await;
    }
    driver.stop();
}
