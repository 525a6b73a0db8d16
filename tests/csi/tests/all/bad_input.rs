//! Bad input: each gets an error that names the thing and the remedy, and nothing is lost or half-made.

use std::{
    fs::{self, OpenOptions},
    io::{Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::Duration,
};

use lockstep_csi_tests::{
    client::{Client, create_request},
    driver::{Driver, replug, until},
    lab::{Lab, alone, text},
};
use lockstep_native::{run, succeeds};
use lockstep_proto::{
    csi::CapacityRange,
    objects::{DiskPhase, LocalDisk, MirrorVolume},
};
use lockstep_store::Store;
use tonic::{Code, Status};

const MIB: u64 = 1 << 20;

fn says(error: &Status, code: Code, named: &[&str]) {
    assert_eq!(error.code(), code, "{error}");
    for name in named {
        assert!(error.message().contains(name), "{name:?} is not in {:?}", error.message());
    }
}

async fn create(client: &Client, change: impl FnOnce(&mut lockstep_proto::csi::CreateVolumeRequest)) -> Result<String, Status> {
    let mut request = create_request("v", 64 * MIB, None);
    change(&mut request);
    Ok(client.controller().create_volume(request).await?.into_inner().volume.unwrap().volume_id)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_request_is_refused_by_name_and_leaves_nothing() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let client = driver.client.clone();
    for (name, value) in [("replicas", "3"), ("provisioning", "thin"), ("transport", "warp")] {
        let refused = create(&client, |request| drop(request.parameters.insert(name.into(), value.into()))).await.unwrap_err();
        says(&refused, Code::InvalidArgument, &[name]);
    }
    for (required, limit, code, named) in [
        (0, 0, Code::InvalidArgument, ["capacity_range", "required_bytes"]),
        (-1, 0, Code::OutOfRange, ["-1 bytes", "below zero"]),
        (2 << 20, 1 << 20, Code::OutOfRange, ["at least 2097152 and at most 1048576 bytes", "whole MiB"]),
        (1 << 40, 0, Code::ResourceExhausted, ["the largest volume that fits", "Ask for less, or add disks"]),
    ] {
        let refused = create(&client, |request| {
            let range = request.capacity_range.as_mut().unwrap();
            (range.required_bytes, range.limit_bytes) = (required, limit);
        });
        says(&refused.await.unwrap_err(), code, &named);
    }
    says(&create(&client, |request| request.name = "n".repeat(129)).await.unwrap_err(), Code::InvalidArgument, &["129", "128"]);
    says(
        &create(&client, |request| request.volume_capabilities.clear()).await.unwrap_err(),
        Code::InvalidArgument,
        &["volume_capabilities"],
    );
    assert!(driver.store.list::<MirrorVolume>().await.unwrap().objects.is_empty());

    // Legal, if odd: a slash, capitals, the longest name; without a size it is the default, or the limit.
    for name in ["a/b".to_owned(), "../../etc".into(), "N".repeat(128)] {
        let id = create(&client, |request| request.name.clone_from(&name)).await.unwrap();
        let object = driver.volume(&id).await;
        assert_eq!(object.spec.csi_name, name);
        client.delete(&id).await.unwrap();
    }
    let id = create(&client, |request| request.capacity_range = None).await.unwrap();
    assert_eq!(driver.volume(&id).await.status.unwrap().capacity_bytes, 1 << 30);
    client.delete(&id).await.unwrap();
    let id = create(&client, |request| request.capacity_range = Some(CapacityRange { required_bytes: 0, limit_bytes: 32 << 20 })).await;
    assert_eq!(driver.volume(id.as_ref().unwrap()).await.status.unwrap().capacity_bytes, 32 << 20);
    client.delete(&id.unwrap()).await.unwrap();
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_cannot_be_is_refused_and_left_alone() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let client = driver.client.clone();
    let place = driver.place("v", 64 * MIB, Some("ext4")).await;
    fs::write(&place.staging, "mine").unwrap();
    let refused = place.up(&client).await.unwrap_err();
    says(&refused, Code::InvalidArgument, &["staging_target_path", text(&place.staging), "is a file"]);
    assert_eq!(fs::read_to_string(&place.staging).unwrap(), "mine");
    assert_eq!(driver.volume(&place.id).await.status.unwrap().device, None, "nothing is half-staged");
    fs::remove_file(&place.staging).unwrap();
    client.stage(&place.id, &place.staging, Some("ext4")).await.unwrap();
    fs::write(&place.target, "mine").unwrap();
    let refused = place.up(&client).await.unwrap_err();
    says(&refused, Code::InvalidArgument, &["target_path", "is a file"]);
    let refused = client.unpublish(&place.id, &place.target).await.unwrap_err();
    says(&refused, Code::FailedPrecondition, &["not empty"]);
    assert_eq!(fs::read_to_string(&place.target).unwrap(), "mine");
    client.unstage(&place.id, &place.staging).await.unwrap();
    driver.stop();
}

async fn refused(driver: &Driver, named: &str) -> LocalDisk {
    until(&format!("a disk refused for {named}"), || async {
        let disks = driver.disks().await;
        disks.into_iter().find(|disk| {
            let status = disk.status.clone().unwrap_or_default();
            status.phase == DiskPhase::Refused && status.message.contains(named)
        })
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_not_blank_is_refused_by_what_is_on_it_and_not_touched() {
    let mut lab = Lab::new(6, 1500);
    let small = lab.add_disk(100);
    let both = lab.add_disk(1500);
    run("mkfs.ext4", &["-q", text(lab.device(0))]);
    run("mkswap", &[text(lab.device(1))]);
    run("mkfs.xfs", &["-q", "-L", "lockstep", text(lab.device(2))]);
    run("mkfs.xfs", &["-q", text(lab.device(both))]);
    let of = format!("of={}", text(lab.device(both)));
    // Of disk 1: what makes a swap area of a page.
    run(
        "dd",
        &[&format!("if={}", text(lab.device(1))), &of, "bs=1", "skip=1024", "seek=1024", "count=3072", "conv=notrunc", "status=none"],
    );
    let mounted = lab.path("mounted");
    fs::create_dir(&mounted).unwrap();
    run("mount", &[text(lab.device(2)), text(&mounted)]);
    fs::write(mounted.join("precious"), "data").unwrap();
    std::process::Command::new("sfdisk")
        .arg(lab.device(3))
        .stdin(pipe("label: gpt\n"))
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    // The same physical disk a second time.
    let twice = run("losetup", &["--find", "--show", text(&lab.path("disk4.img"))]);
    std::os::unix::fs::symlink(twice.trim(), lab.path("disks/twice")).unwrap();
    fs::write(lab.path("disks/file"), "not a disk").unwrap();
    // Blank and not mounted, and somebody's: so do swap, md and LVM hold their devices.
    let held = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(lab.device(5)).unwrap();
    let before = run("md5sum", &[text(&lab.path("disk0.img"))]);
    let mut driver = Driver::start(&lab).await;
    for (named, remedies) in [
        ("it has ext4", &["wipefs --all /dev/loop", "take it out of the selection"][..]),
        ("it has swap", &["wipefs --all /dev/loop", "take it out of the selection"]),
        ("several signatures at once (swap, xfs)", &["wipefs --all /dev/loop", "take it out of the selection"]),
        ("a gpt partition table", &["wipefs --all /dev/loop", "take it out of the selection"]),
        ("it is mounted at", &["unmount it", "take it out of the selection"]),
        ("it is in use", &["end that", "take it out of the selection"]),
        ("too small: 100 MiB", &["needs 1 GiB", "take it out of the selection", "a larger one"]),
        ("the same file system as", &["Take one of the two out of the selection"]),
        ("not a block device", &["take it out of the selection"]),
    ] {
        let disk = refused(&driver, named).await.status.unwrap();
        assert!(disk.message.starts_with(text(&lab.path("disks"))) || disk.message.starts_with("/dev/"), "which one? {}", disk.message);
        assert!(remedies.iter().all(|remedy| disk.message.contains(remedy)), "{}", disk.message);
    }
    assert_eq!(run("md5sum", &[text(&lab.path("disk0.img"))]), before, "it was written to");
    assert!(lab.mount_of(small).is_none());
    let no_pair = driver.client.create("v", 64 * MIB, None).await.unwrap_err();
    says(&no_pair, Code::ResourceExhausted, &["it has no two usable disks", "add disks", "status.message of its LocalDisk"]);

    // Ours by its label, but it has files that are not.
    run("umount", &[text(&mounted)]);
    let other = refused(&driver, "other files are there").await.status.unwrap();
    assert!(other.message.contains("out of the selection") && other.message.contains("wipefs"), "{}", other.message);
    // Nobody holds it any more, or it is wiped: it is claimed.
    drop(held);
    until("a second disk", || async { driver.client.create("v", 64 * MIB, None).await.ok() }).await;
    // csi-node looks at it now and then, and has it to itself for that moment.
    until("wiped", || async { succeeds("wipefs", &["--all", "--quiet", text(lab.device(0))]).then_some(()) }).await;
    until("a third disk", || async { lab.mount_of(0) }).await;
    driver.stop();
    run("losetup", &["-d", twice.trim()]);
}

fn pipe(text: &str) -> std::process::Stdio {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.rewind().unwrap();
    file.into()
}

fn damage(meta: &Path) {
    let mut meta = OpenOptions::new().write(true).open(meta).unwrap();
    meta.seek(SeekFrom::Start(0)).unwrap();
    meta.write_all(&[0xff; 8192]).unwrap();
    meta.sync_all().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_metadata_takes_a_copy_out_and_never_the_volume() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("v", 64 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    fs::write(place.target.join("f"), "x").unwrap();
    place.down(&driver.client).await.unwrap();
    let metas = async |driver: &Driver| driver.copies(&place.id).await.iter().map(|copy| copy.with_file_name("meta")).collect::<Vec<_>>();
    let damaged = metas(&driver).await[1].clone();
    damage(&damaged);
    place.up(&driver.client).await.unwrap();
    assert_eq!(fs::read_to_string(place.target.join("f")).unwrap(), "x");
    // The copy is made again, on the same disk, since there is no other.
    driver.until_ready_is(&place.id, "Healthy").await;
    until("the damaged one gone", || async { (!damaged.exists()).then_some(()) }).await;
    place.down(&driver.client).await.unwrap();
    for meta in metas(&driver).await {
        damage(&meta);
    }
    let refused = place.up(&driver.client).await.unwrap_err();
    let metas = metas(&driver).await;
    says(&refused, Code::FailedPrecondition, &[text(&metas[0]), text(&metas[1]), "damaged", "mounted alone, read-only", "a new volume"]);
    // As it says.
    for copy in driver.copies(&place.id).await {
        assert_eq!(alone(&lab, &copy, "ext4", |at| fs::read_to_string(at.join("f")).unwrap()), "x");
    }
    assert!(driver.copies(&place.id).await.iter().all(|copy| copy.exists()), "nothing is thrown away");
    driver.stop();
}

/// Beside a stale copy, which says what it is, the best one must not look as if it were lost.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_metadata_of_the_only_current_copy_is_named_and_that_copy_outlives_a_force() {
    let mut lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("v", 128 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    let lost = lab.number_of(&driver.status(&place.id).await.legs[1].disk);
    lab.fail_disk(lost);
    fs::write(place.target.join("f"), "only on one").and_then(|()| fs::File::open(place.target.join("f"))?.sync_all()).unwrap();
    let stale = driver.until_ready_is(&place.id, "Degraded").await.legs[1].leg_id.clone();
    place.down(&driver.client).await.unwrap();
    replug(&mut lab, lost).await;
    until("the stale copy back", || async { lab.mount_of(lost) }).await;

    let [best, other]: [_; 2] = driver.copies(&place.id).await.try_into().unwrap();
    let meta = best.with_file_name("meta");
    let advice =
        ["is stale", "bring the other leg's disk back", text(&meta), "before another is forced", "`data`", "A copy without Lockstep"];
    let good = fs::read(&meta).unwrap();
    fs::remove_file(&meta).unwrap();
    says(&place.up(&driver.client).await.unwrap_err(), Code::FailedPrecondition, &[&advice[..], &["No such file"]].concat());
    fs::write(&meta, good).unwrap();
    damage(&meta);
    says(&place.up(&driver.client).await.unwrap_err(), Code::FailedPrecondition, &[&advice[..], &["the file is damaged"]].concat());
    assert!(best.exists() && meta.exists() && other.exists(), "nothing is thrown away");

    // Forced all the same: there is room for a new copy, and the best one stays.
    driver.annotate(&place.id, &[("force-leg", &stale)]).await;
    place.up(&driver.client).await.unwrap();
    assert!(!place.target.join("f").exists(), "it has what it missed");
    driver.until_ready_is(&place.id, "Healthy").await;
    let said = format!("so {} is kept", text(best.parent().unwrap()));
    let log = || fs::read_to_string(driver.node_log()).unwrap();
    until("said to be kept", || async { log().contains(&said).then_some(()) }).await;
    // It looks again every ten seconds.
    tokio::time::sleep(Duration::from_secs(13)).await;
    assert_eq!(log().matches("a copy that").count(), 1, "it is said once:\n{}", log());
    place.down(&driver.client).await.unwrap();
    assert_eq!(alone(&lab, &best, "ext4", |at| fs::read_to_string(at.join("f")).unwrap()), "only on one");
    driver.client.delete(&place.id).await.unwrap();
    assert!(!best.exists(), "it goes with its volume");
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_object_is_named_and_left_alone() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let id = driver.client.create("v", 64 * MIB, None).await.unwrap().volume_id;
    let path = lab.path(&format!("driver/objects/mirrorvolumes/{id}.yaml"));
    let good = fs::read(&path).unwrap();
    fs::write(&path, "spec: [").unwrap();
    let place = driver.place_of(id.clone(), None);
    let refused = place.up(&driver.client).await.unwrap_err();
    // Both let the caller come again.
    says(&refused, Code::Unavailable, &["v.yaml", "Repair it"]);
    says(&driver.client.delete(&id).await.unwrap_err(), Code::Unavailable, &["v.yaml", "Repair it"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), "spec: [");
    // Another volume goes on.
    let other = driver.place("w", 64 * MIB, None).await;
    other.up(&driver.client).await.unwrap();
    other.down(&driver.client).await.unwrap();
    fs::write(&path, good).unwrap();
    place.up(&driver.client).await.unwrap();
    place.down(&driver.client).await.unwrap();
    driver.client.delete(&id).await.unwrap();
    driver.stop();
}

/// What was there is gone, or is something else: that is said, and nothing is formatted over it.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_whose_file_system_is_gone_is_data_loss_and_not_formatted_again() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("v", 64 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    place.down(&driver.client).await.unwrap();
    let copies = driver.copies(&place.id).await;
    for copy in &copies {
        run("wipefs", &["--all", "--quiet", text(copy)]);
    }
    for round in 0..2 {
        let refused = place.up(&driver.client).await.unwrap_err();
        let found = if round == 0 { "it has nothing" } else { "it has xfs (01234567" };
        says(&refused, Code::DataLoss, &["should have ext4 (", found, "set status.format", "look at each copy alone", "from a backup"]);
        assert_eq!(driver.volume(&place.id).await.status.unwrap().device, None, "nothing is half-staged");
        for copy in &copies {
            run("mkfs.xfs", &["-q", "-f", "-m", "uuid=01234567-89ab-cdef-0123-456789abcdef", "-d", "size=300m,file", text(copy)]);
            OpenOptions::new().write(true).open(copy).unwrap().set_len(64 * MIB).unwrap();
        }
    }
    driver.stop();
}

/// Unmounted behind our back: a pod must not be given the bare directory.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_was_unmounted_by_hand_is_not_published_and_mounted_again_at_its_next_stage() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let client = driver.client.clone();
    let place = driver.place("v", 64 * MIB, Some("ext4")).await;
    client.stage(&place.id, &place.staging, Some("ext4")).await.unwrap();
    run("umount", &[text(&place.staging)]);
    let refused = client.publish(&place.id, &place.staging, &place.target, Some("ext4")).await.unwrap_err();
    says(&refused, Code::FailedPrecondition, &["not mounted any more", "stage it again"]);
    assert!(!place.target.exists());
    place.up(&client).await.unwrap();
    fs::write(place.target.join("f"), "x").unwrap();
    place.down(&client).await.unwrap();
    driver.stop();
}
