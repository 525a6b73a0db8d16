//! What a disk is taken for, and when it is formatted: once.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use lockstep_csi_tests::{
    driver::{Driver, NODE, program, until},
    lab::{Lab, text},
};
use lockstep_native::run;
use lockstep_proto::objects::{DiskPhase, LocalDisk};

const MIB: u64 = 1 << 20;

async fn until_ready(driver: &Driver, count: usize) -> Vec<LocalDisk> {
    until("disks that are ready", || async {
        let disks = driver.disks().await;
        let ready = disks.iter().filter(|disk| disk.status.as_ref().is_some_and(|status| status.phase == DiskPhase::Ready)).count();
        (ready == count).then_some(disks)
    })
    .await
}

fn reboot(lab: &Lab, disks: usize) {
    for mount in (0..disks).filter_map(|number| lab.mount_of(number)) {
        run("umount", &[text(&mount)]);
    }
}

/// As a csi-node would leave it that was killed after it had made the file system whole, and before it removed the record of its mkfs.
fn leave_records(lab: &Lab, disks: &[LocalDisk]) -> Vec<PathBuf> {
    let leave = |disk: &LocalDisk| {
        let identity = disk.status.as_ref().and_then(|status| status.identity.clone()).expect("a disk has an identity");
        let path = lab.path("driver/state/formatting").join(&identity.fs_uuid);
        fs::write(&path, format!("physical: {:?}\nsizeBytes: {}\n", identity.physical, identity.size_bytes)).expect("a record");
        path
    };
    disks.iter().map(leave).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_with_volumes_outlives_every_kill_reboot_and_replug_whatever_is_on_record() {
    let mut lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let disks = until_ready(&driver, 2).await;
    let place = driver.place("kept", 64 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    fs::write(place.target.join("letter"), "never lost").unwrap();
    run("sync", &["-f", text(&place.target)]);
    place.down(&driver.client).await.unwrap();
    for round in 0..6 {
        driver.kill_node();
        let records = leave_records(&lab, &disks);
        // Mounted as it was left; after a reboot; in other slots.
        if round % 3 > 0 {
            reboot(&lab, 2);
        }
        if round % 3 == 2 {
            (0..2).for_each(|number| lab.pull_disk(number));
            (0..2).rev().for_each(|number| lab.plug_disk(number));
        }
        driver.start_node().await;
        until_ready(&driver, 2).await;
        assert_eq!(records.iter().find(|record| record.exists()), None, "round {round}: a record says that there is nothing to lose");
    }
    driver.kill_node();
    reboot(&lab, 2);
    driver.start_node().await;
    place.up(&driver.client).await.unwrap();
    assert_eq!(fs::read_to_string(place.target.join("letter")).unwrap(), "never lost");
    place.down(&driver.client).await.unwrap();
    let log = fs::read_to_string(driver.node_log()).unwrap();
    assert_eq!(log.lines().filter(|line| line.contains("disks::file_system: formatting")).count(), 2, "each disk once");
    driver.stop();
}

/// A csi-node that is killed with everything that it started.
struct Doomed(Child);

impl Doomed {
    fn start(lab: &Lab) -> Self {
        let at = |name: &str| text(&lab.path("driver").join(name)).to_owned();
        let mut command = Command::new(program("csi-node"));
        command.args(["--endpoint", &format!("unix://{}", at("node.sock")), "--node-name", NODE, "--config", &at("node.yaml")]);
        command.args(["--state-dir", &at("state"), "--objects", &at("objects")]).process_group(0);
        let system = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{system}", text(&lab.path("programs"))));
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("csi-node"))
    }

    fn kill(mut self) {
        run("kill", &["-KILL", "--", &format!("-{}", self.0.id())]);
        self.0.wait().expect("it was started");
    }
}

/// Its mkfs takes a while, so that a kill meets it on a fast machine, too.
fn configure(lab: &Lab) {
    let mkfs = lab.path("programs/mkfs.xfs");
    fs::create_dir_all(lab.path("programs")).unwrap();
    fs::write(&mkfs, "#!/bin/sh\nsleep 0.05\nPATH=${PATH#*:} mkfs.xfs \"$@\" && sleep 0.03\n").unwrap();
    run("chmod", &["+x", text(&mkfs)]);
    fs::create_dir_all(lab.path("driver")).unwrap();
    fs::write(lab.path("driver/node.yaml"), format!("disks:\n- path: {}/*\n", text(&lab.path("disks")))).unwrap();
}

/// Each round is killed a little later than the one before: before, in and after the mkfs, the mount, the marker.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_moment_of_a_claim_leaves_a_disk_that_is_claimed_by_the_next_csi_node() {
    let mut lab = Lab::new(0, 0);
    configure(&lab);
    let (mut cut_off, mut disks) = (0, 0);
    for round in 0..16 {
        let number = lab.add_disk(1200);
        disks += 1;
        let doomed = Doomed::start(&lab);
        // Not the time since the start, which says little on a busy machine: since the claim began.
        let records = || fs::read_dir(lab.path("driver/state/formatting")).is_ok_and(|mut records| records.next().is_some());
        until("a record", || async { (records() || lab.mount_of(number).is_some()).then_some(()) }).await;
        tokio::time::sleep(Duration::from_millis(round * 6)).await;
        doomed.kill();
        cut_off += usize::from(records());
        if round % 2 == 0 {
            reboot(&lab, disks);
        }
    }
    assert!(cut_off > 3, "hardly a claim was cut off: {cut_off}");
    let mut driver = Driver::start(&lab).await;
    until_ready(&driver, disks).await;
    assert_eq!(fs::read_dir(lab.path("driver/state/formatting")).unwrap().count(), 0);
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_disk_whose_name_is_gone_for_a_moment_stays_in_use() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    until_ready(&driver, 2).await;
    let link = lab.path("disks/0");
    let said = |what: &str| fs::read_to_string(driver.node_log()).unwrap().contains(what);
    fs::remove_file(&link).unwrap();
    until("said", || async { said("no selector matches the disk any more: it stays in use").then_some(()) }).await;
    let place = driver.place("meanwhile", 64 * MIB, Some("ext4")).await;
    std::os::unix::fs::symlink(lab.device(0), &link).unwrap();
    until("said", || async { said("the disk is selected again").then_some(()) }).await;
    until_ready(&driver, 2).await;
    assert!(!said("DiskFailed"), "it was here all the time");
    driver.client.delete(&place.id).await.unwrap();
    driver.stop();
}

/// Partitions go with this: the loop device would keep them.
struct Partitions<'a>(&'a Path);

impl Drop for Partitions<'_> {
    fn drop(&mut self) {
        lockstep_native::succeeds("partx", &["--delete", text(self.0)]);
    }
}

/// A disk of the lab in two partitions, which take its place under `disks`.
fn partition<'a>(lab: &'a Lab, number: usize) -> Partitions<'a> {
    let device = lab.device(number);
    run("sh", &["-c", &format!("printf 'label: gpt\n,1100M\n,1100M\n' | sfdisk --quiet --no-reread {}", text(device))]);
    fs::remove_file(lab.path(&format!("disks/{number}"))).unwrap();
    let partitions = Partitions(device);
    lockstep_native::succeeds("partx", &["--delete", text(device)]);
    run("partx", &["--add", text(device)]);
    for part in 1..=2 {
        let link = lab.path(&format!("disks/{number}-part{part}"));
        std::os::unix::fs::symlink(format!("{}p{part}", text(device)), link).unwrap();
    }
    partitions
}

#[tokio::test(flavor = "multi_thread")]
async fn two_partitions_of_a_disk_are_no_pair_and_partitions_of_two_disks_are() {
    let lab = Lab::new(2, 2300);
    let first = partition(&lab, 0);
    let second = partition(&lab, 1);
    let links = [0, 1].map(|part| lab.path(&format!("disks/1-part{}", part + 1)));
    for (at, link) in links.iter().enumerate() {
        fs::rename(link, lab.path(&format!("away{at}"))).unwrap();
    }
    let mut driver = Driver::start(&lab).await;
    until_ready(&driver, 2).await;
    let refused = driver.client.create("pair", 64 * MIB, Some("ext4")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused}");
    let image = fs::canonicalize(lab.path("disk0.img")).unwrap();
    let why = format!("parts of one physical disk (file:{}), and a second one is needed", text(&image));
    assert!(refused.message().contains(&why), "{refused}");
    fs::rename(lab.path("away1"), &links[1]).unwrap();
    until_ready(&driver, 3).await;
    let place = driver.place("pair", 64 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    place.down(&driver.client).await.unwrap();
    driver.stop();
    reboot_all(&lab);
    drop((first, second));
}

/// They are looked at, formatted and mounted at once, and none stands in another's way.
#[tokio::test(flavor = "multi_thread")]
async fn many_blank_disks_at_once_are_claimed_without_a_word_of_refusal() {
    let lab = Lab::new(16, 1100);
    let mut driver = Driver::start(&lab).await;
    until_ready(&driver, 16).await;
    let log = fs::read_to_string(driver.node_log()).unwrap();
    assert!(!log.contains("DiskRefused"), "{log}");
    driver.stop();
}

fn reboot_all(lab: &Lab) {
    for line in lab.left_over() {
        if let Some(point) = line.split(' ').nth(1).filter(|point| Path::new(point).starts_with(lab.path(""))) {
            lockstep_native::succeeds("umount", &[point]);
        }
    }
}
