//! What breaks below a volume, and in the middle of a call.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use lockstep_csi_tests::{
    driver::{Driver, NODE, replug, until},
    lab::{Lab, identical, text},
    load,
};
use lockstep_native::{frozen::Frozen, run, succeeds};
use lockstep_proto::{
    FINALIZER,
    objects::{DiskPhase, FormatState, LegState, MirrorVolume, MirrorVolumeStatus, VolumePhase},
};

const MIB: u64 = 1 << 20;

/// The lab's number of the disk that a leg is on.
async fn disk_of_leg(lab: &Lab, driver: &Driver, id: &str, leg: usize) -> usize {
    lab.number_of(&driver.status(id).await.legs[leg].disk)
}

/// All of it under load: a disk is lost, nobody notices; a new one is claimed, the volume rebuilds by itself; the old disk comes back, and
/// what is on it goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_disk_is_replaced_by_a_new_one_under_load_and_the_old_copy_goes_when_it_returns() {
    let mut lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("db", 512 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    driver.until_ready_is(&place.id, "Healthy").await;
    let mut load = load::on_files(&place.target, 25);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let lost = disk_of_leg(&lab, &driver, &place.id, 1).await;
    let lost_name = driver.status(&place.id).await.legs[1].disk.clone();
    lab.fail_disk(lost);
    let degraded = driver.until_ready_is(&place.id, "Degraded").await;
    let message = &degraded.conditions.iter().find(|condition| condition.type_ == "Degraded").unwrap().message;
    assert!(message.contains("add a disk"), "{message}");
    assert_eq!((degraded.legs[0].state, degraded.legs[1].state), (LegState::In, LegState::Out));
    until("the disk said to have failed", || async {
        let disk = driver.disks().await.into_iter().find(|disk| disk.metadata.name.as_ref() == Some(&lost_name))?;
        (disk.status?.phase == DiskPhase::Failed).then_some(())
    })
    .await;
    let log = fs::read_to_string(driver.node_log()).unwrap();
    assert!(log.contains("MirrorDegraded") && log.contains("DiskFailed"), "{log}");

    lab.add_disk(1200);
    let healthy = driver.until_ready_is(&place.id, "Healthy").await;
    assert!(healthy.legs.iter().all(|leg| leg.state == LegState::In && leg.disk != lost_name), "{healthy:?}");
    assert!(load.runs(), "the load was over before the rebuild");
    assert!(load.succeeded(), "the load saw an error");

    // Pulled, plugged in again: it is used again, and its old copy, which nobody counts on, is removed.
    replug(&mut lab, lost).await;
    until("used again", || async {
        let disks = driver.disks().await;
        let disk = disks.into_iter().find(|disk| disk.metadata.name.as_ref() == Some(&lost_name))?.status?;
        (disk.phase == DiskPhase::Ready && disk.allocated_bytes == 0).then_some(())
    })
    .await;
    assert!(fs::read_to_string(driver.node_log()).unwrap().contains("a copy that was replaced is removed"));
    place.down(&driver.client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
    driver.client.delete(&place.id).await.unwrap();
    driver.stop();
}

/// Mirror rule 12: who serves does not wait for whoever keeps the objects.
#[tokio::test(flavor = "multi_thread")]
async fn case_14_a_leg_that_fails_while_the_objects_are_away_stalls_nobody_and_they_say_so_later() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("away", 256 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    driver.until_ready_is(&place.id, "Healthy").await;
    let lost = disk_of_leg(&lab, &driver, &place.id, 1).await;
    let objects = driver.node_log().with_file_name("objects");
    let away = objects.with_extension("away");
    fs::rename(&objects, &away).unwrap();
    let mut load = load::on_files(&place.target, 10);
    tokio::time::sleep(Duration::from_secs(2)).await;
    lab.fail_disk(lost);
    let out = || fs::read_to_string(driver.node_log()).unwrap().contains("leg is OUT");
    until("said to be OUT", || async { out().then_some(()) }).await;
    let begun = Instant::now();
    let file = place.target.join("acked");
    fs::write(&file, "fsynced").and_then(|()| fs::File::open(&file)?.sync_all()).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(8), "it waited {:?}", begun.elapsed());
    assert!(load.runs(), "the load was over before the disk failed");
    assert!(load.succeeded(), "the load saw an error");
    assert!(!objects.exists(), "nobody makes the objects anew");
    fs::rename(&away, &objects).unwrap();
    let degraded = driver.until_ready_is(&place.id, "Degraded").await;
    assert_eq!((degraded.legs[0].state, degraded.legs[1].state), (LegState::In, LegState::Out));
    // What was acknowledged meanwhile is there when both processes begin anew.
    driver.kill_node();
    driver.start_node().await;
    place.down(&driver.client).await.unwrap();
    place.up(&driver.client).await.unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "fsynced");
    place.down(&driver.client).await.unwrap();
    driver.stop();
}

/// The same disk comes back before another one was there: it gets what it missed and no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_comes_back_gets_only_what_it_missed() {
    let mut lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("back", 512 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    let fill = format!("of={}", text(&place.target.join("fill")));
    run("dd", &["if=/dev/urandom", &fill, "bs=1M", "count=300", "conv=fsync", "status=none"]);
    // What was written is clean again: only what comes now is dirty.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let lost = disk_of_leg(&lab, &driver, &place.id, 1).await;
    lab.fail_disk(lost);
    fs::write(place.target.join("missed"), "written while the disk was away").unwrap();
    run("sync", &["-f", text(&place.target)]);
    driver.until_ready_is(&place.id, "Degraded").await;
    replug(&mut lab, lost).await;
    let healthy = driver.until_ready_is(&place.id, "Healthy").await;
    let message = &healthy.conditions.iter().find(|condition| condition.type_ == "Rebuilding").unwrap().message;
    let copied: u64 = message.split(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("{message}"));
    assert!((1..256).contains(&copied), "{message}");
    place.down(&driver.client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn csi_node_is_killed_with_volumes_mounted_and_they_are_staged_again() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    for fs_type in ["ext4", "xfs"] {
        let place = driver.place(fs_type, 512 * MIB, Some(fs_type)).await;
        place.up(&driver.client).await.unwrap();
        for round in 0..2 {
            let file = place.target.join(format!("f{round}"));
            fs::write(&file, "fsynced").and_then(|()| fs::File::open(&file)?.sync_all()).unwrap();
            driver.kill_node();
            driver.start_node().await;
            // Its device is dead; that is said, and nothing hangs.
            assert!(!succeeds("stat", &[text(&place.target.join("not-cached"))]));
            place.down(&driver.client).await.unwrap();
            place.up(&driver.client).await.unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), "fsynced");
        }
        let healthy = driver.until_ready_is(&place.id, "Healthy").await;
        let message = &healthy.conditions.iter().find(|condition| condition.type_ == "Rebuilding").unwrap().message;
        let copied: u64 = message.split(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("{message}"));
        assert!((1..512).contains(&copied), "{message}");
        place.down(&driver.client).await.unwrap();
        driver.assert_copies_identical(&place.id).await;
    }
    driver.stop();
}

/// A thread of csi-node that waits for its own volume cannot be killed: csi-node would never end, and nobody could take its place.
#[tokio::test(flavor = "multi_thread")]
async fn csi_node_is_killed_while_its_volumes_are_written_back_and_it_ends() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let ext4 = driver.place("ext4", 256 * MIB, Some("ext4")).await;
    let block = driver.place("block", 128 * MIB, None).await;
    for place in [&ext4, &block] {
        place.up(&driver.client).await.unwrap();
    }
    let fill = |of: &Path| run("dd", &["if=/dev/urandom", &format!("of={}", text(of)), "bs=1M", "count=64", "conv=notrunc", "status=none"]);
    fill(&ext4.target.join("fill"));
    fill(&block.target);
    driver.client.unpublish(&ext4.id, &ext4.target).await.unwrap();
    // The disks take no writes for a while: the unmount does not end.
    let disks = [0, 1].map(|disk| lab.mount_of(disk).unwrap());
    let frozen = Frozen::freeze_for(&disks, Duration::from_secs(3));
    let (client, gone) = (driver.client.clone(), ext4.clone());
    let unstage = tokio::spawn(async move { client.unstage(&gone.id, &gone.staging).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    driver.kill_node();
    assert!(unstage.await.unwrap().is_err(), "it was unstaged before csi-node was killed");
    frozen.join().unwrap();
    driver.start_node().await;
    for place in [&ext4, &block] {
        place.down(&driver.client).await.unwrap();
        place.up(&driver.client).await.unwrap();
        place.down(&driver.client).await.unwrap();
        driver.assert_copies_identical(&place.id).await;
    }
    driver.stop();
}

/// mkfs killed in the middle: by hand, and with csi-node itself. The volume is not lost to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_mkfs_does_not_brick_the_volume() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("mkfs", 512 * MIB, Some("ext4")).await;
    // What a mkfs that was killed leaves: the record says that it began, and some of it is on the device.
    place.up(&driver.client).await.unwrap();
    place.down(&driver.client).await.unwrap();
    for copy in driver.copies(&place.id).await {
        let file = copy.with_file_name("volume.yaml");
        let said = fs::read_to_string(&file).unwrap();
        fs::write(&file, said.lines().filter(|line| !line.starts_with("fsUuid")).map(|line| format!("{line}\n")).collect::<String>())
            .unwrap();
        run("dd", &["if=/dev/urandom", &format!("of={}", text(&copy)), "bs=4096", "seek=1", "count=64", "conv=notrunc", "status=none"]);
    }
    let mut object = driver.volume(&place.id).await;
    object.status.as_mut().unwrap().format.state = FormatState::Formatting;
    use lockstep_store::Store;
    driver.store.update_status(object).await.unwrap();
    place.up(&driver.client).await.unwrap();
    fs::write(place.target.join("f"), "x").unwrap();
    place.down(&driver.client).await.unwrap();
    assert_eq!(driver.status(&place.id).await.format.state, FormatState::Formatted);

    // csi-node is killed at many moments of a first stage.
    for round in 0..8u32 {
        let place = driver.place(&format!("kill{round}"), 64 * MIB, Some("ext4")).await;
        let (client, staged) = (driver.client.clone(), place.clone());
        let stage = tokio::spawn(async move { staged.up(&client).await });
        tokio::time::sleep(Duration::from_millis(u64::from(5 + round * 12))).await;
        driver.kill_node();
        drop(stage.await);
        driver.start_node().await;
        // On a fast machine it was published already, and is dead at the target.
        driver.client.unpublish(&place.id, &place.target).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        place.up(&driver.client).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        fs::write(place.target.join("f"), "x").unwrap();
        place.down(&driver.client).await.unwrap();
        driver.client.delete(&place.id).await.unwrap();
    }
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn csi_node_is_killed_between_mkfs_and_its_record_and_the_volume_is_formatted_again() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let programs = lab.path("programs");
    fs::create_dir(&programs).unwrap();
    for (name, fs_type) in [("mkfs.ext4", "ext4"), ("mkfs.xfs", "xfs")] {
        let made = programs.join(format!("made-{fs_type}"));
        let report = format!("ls -l /proc/$$/fd > {0}.new && mv {0}.new {0}", text(&made));
        let slow = format!("#!/bin/sh\nPATH=${{PATH#*:}} {name} \"$@\" && {report} && sleep 20\n");
        fs::write(programs.join(name), slow).unwrap();
        run("chmod", &["+x", text(&programs.join(name))]);
        let place = driver.place(fs_type, 320 * MIB, Some(fs_type)).await;
        driver.kill_node();
        driver.use_programs(Some(&programs));
        driver.start_node().await;
        let (client, staged) = (driver.client.clone(), place.clone());
        let stage = tokio::spawn(async move { staged.up(&client).await });
        until("a file system", || async { made.exists().then_some(()) }).await;
        // Else the legs were locked for as long as it runs.
        let open = fs::read_to_string(&made).unwrap();
        assert!(!open.contains("/volumes/"), "mkfs was given the legs: {open}");
        assert_eq!(driver.status(&place.id).await.format.state, FormatState::Formatting);
        driver.kill_node();
        drop(stage.await);
        driver.use_programs(None);
        driver.start_node().await;
        place.up(&driver.client).await.unwrap();
        fs::write(place.target.join("f"), "x").unwrap();
        place.down(&driver.client).await.unwrap();
    }
    driver.stop();
}

/// What a csi-node that was killed in the middle of an allocation leaves: two legs, no witness, an object that says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_allocation_that_was_cut_off_is_made_again_from_nothing() {
    use lockstep_store::Store;
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("v", 64 * MIB, None).await;
    let (old, mut object) = (driver.copies(&place.id).await, driver.volume(&place.id).await);
    driver.kill_node();
    fs::remove_file(lab.path(&format!("driver/state/witness/{}", object.metadata.uid.as_ref().unwrap()))).unwrap();
    object.status = Some(MirrorVolumeStatus::default());
    driver.store.update_status(object).await.unwrap();
    driver.start_node().await;
    until("allocated", || async { (driver.status(&place.id).await.phase == VolumePhase::Ready).then_some(()) }).await;
    // Before it is staged, which would remove what is too much.
    let new = driver.copies(&place.id).await;
    assert!(old.iter().all(|copy| !copy.exists() && !new.contains(copy)), "{old:?} {new:?}");
    place.up(&driver.client).await.unwrap();
    place.down(&driver.client).await.unwrap();
    driver.stop();
}

/// As long as something of it is on a disk, the object is there: whoever is killed then goes on with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_deleted_when_its_legs_are_gone_and_not_before() {
    use lockstep_store::Store;
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("v", 64 * MIB, None).await;
    let (copies, disks) = (driver.copies(&place.id).await, [0, 1].map(|disk| lab.mount_of(disk).unwrap()));
    let frozen = Frozen::freeze_for(&disks, Duration::from_secs(3));
    let (client, id) = (driver.client.clone(), place.id.clone());
    let delete = tokio::spawn(async move { client.delete(&id).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let object = driver.store.get::<MirrorVolume>(&place.id).await.unwrap();
    assert!(object.is_some() && copies.iter().all(|copy| copy.exists()));
    frozen.join().unwrap();
    delete.await.unwrap().unwrap();
    assert!(copies.iter().all(|copy| !copy.exists()), "a copy is left");
    driver.stop();
}

/// csi-node is killed while it makes and removes legs: nothing is half-made for ever.
#[tokio::test(flavor = "multi_thread")]
async fn csi_node_is_killed_while_it_allocates_and_deletes() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    for round in 0..8u32 {
        let name = format!("v{round}");
        let client = driver.client.clone();
        let (creating, named) = (client.clone(), name.clone());
        let create = tokio::spawn(async move { creating.create(&named, 256 * MIB, None).await });
        tokio::time::sleep(Duration::from_millis(u64::from(4 + round * 4))).await;
        driver.kill_node();
        driver.start_node().await;
        let created = create.await.unwrap();
        let id = match created {
            Ok(volume) => volume.volume_id,
            Err(_) => client.create(&name, 256 * MIB, None).await.unwrap().volume_id,
        };
        let deleting = client.clone();
        let gone = id.clone();
        let delete = tokio::spawn(async move { deleting.delete(&gone).await });
        tokio::time::sleep(Duration::from_millis(u64::from(1 + round * 3))).await;
        driver.kill_node();
        driver.start_node().await;
        drop(delete.await);
        client.delete(&id).await.unwrap();
    }
    until("all space free", || async {
        driver.disks().await.iter().all(|disk| disk.status.as_ref().unwrap().allocated_bytes == 0).then_some(())
    })
    .await;
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_deleted_while_a_disk_is_away_leaves_nothing_when_it_returns() {
    let mut lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("gone", 256 * MIB, None).await;
    place.up(&driver.client).await.unwrap();
    let lost = disk_of_leg(&lab, &driver, &place.id, 1).await;
    lab.fail_disk(lost);
    // A write is how the mirror learns of it.
    run("dd", &["if=/dev/zero", &format!("of={}", text(&place.target)), "bs=1M", "count=4", "oflag=direct", "conv=notrunc", "status=none"]);
    driver.until_ready_is(&place.id, "Degraded").await;
    place.down(&driver.client).await.unwrap();
    driver.client.delete(&place.id).await.unwrap();
    replug(&mut lab, lost).await;
    until("its space free", || async {
        let disks = driver.disks().await;
        let free = |disk: &lockstep_proto::objects::LocalDisk| {
            disk.status.as_ref().is_some_and(|status| status.phase == DiskPhase::Ready && status.allocated_bytes == 0)
        };
        (disks.len() == 2 && disks.iter().all(free)).then_some(())
    })
    .await;
    driver.stop();
}

/// Only the stale copy is there: it is not served.
#[tokio::test(flavor = "multi_thread")]
async fn a_stale_copy_alone_is_refused() {
    let mut lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("stale", 128 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    let (survivor, lost) = (disk_of_leg(&lab, &driver, &place.id, 0).await, disk_of_leg(&lab, &driver, &place.id, 1).await);
    lab.fail_disk(lost);
    fs::write(place.target.join("f"), "only on one").and_then(|()| fs::File::open(place.target.join("f"))?.sync_all()).unwrap();
    driver.until_ready_is(&place.id, "Degraded").await;
    place.down(&driver.client).await.unwrap();
    // The survivor is pulled, the other one is back.
    driver.kill_node();
    for disk in [survivor, lost] {
        if let Some(mount) = lab.mount_of(disk) {
            run("umount", &[text(&mount)]);
        }
    }
    lab.pull_disk(survivor);
    driver.start_node().await;
    let refused = place.up(&driver.client).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("stale") && refused.message().contains("bring the other leg's disk back"), "{refused}");
    // By force: what only the other copy has is given up, and that is on record.
    let object = driver.volume(&place.id).await;
    let stale = object.status.as_ref().unwrap().legs.iter().find(|leg| leg.state == LegState::Out).unwrap().leg_id.clone();
    driver.annotate(&place.id, &[("force-leg", &stale)]).await;
    place.up(&driver.client).await.unwrap();
    assert!(!place.target.join("f").exists(), "it has what it missed");
    fs::write(place.target.join("g"), "after the force").unwrap();
    place.down(&driver.client).await.unwrap();
    assert!(driver.volume(&place.id).await.metadata.annotations.is_none_or(|annotations| annotations.is_empty()));
    lab.plug_disk(survivor);
    until("staged again", || async { place.up(&driver.client).await.ok() }).await;
    assert_eq!(fs::read_to_string(place.target.join("g")).unwrap(), "after the force");
    driver.until_ready_is(&place.id, "Healthy").await;
    place.down(&driver.client).await.unwrap();
    let copies = driver.copies(&place.id).await;
    assert!(identical(&copies[0], &copies[1]), "the copies differ");
    assert!(copies.iter().all(|copy: &std::path::PathBuf| Path::new(copy).exists()));
    driver.stop();
}

/// A growth that was cut off is gone on with: what it has made longer is not asked for twice.
#[tokio::test(flavor = "multi_thread")]
async fn csi_node_is_killed_while_a_volume_grows() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    for round in 0..6u32 {
        let place = driver.place(&format!("grow{round}"), 300 * MIB, None).await;
        let (client, id) = (driver.client.clone(), place.id.clone());
        let grow = tokio::spawn(async move { client.controller_expand(&id, 1200 * MIB).await });
        tokio::time::sleep(Duration::from_millis(u64::from(2 + round * 3))).await;
        driver.kill_node();
        driver.start_node().await;
        drop(grow.await);
        let grown = driver.client.controller_expand(&place.id, 1200 * MIB).await;
        assert_eq!(grown.unwrap_or_else(|error| panic!("round {round}: {error}")), 1200 << 20);
        place.up(&driver.client).await.unwrap();
        assert_eq!(driver.client.usage(&place.id, &place.target).await.unwrap()[0].total, 1200 << 20);
        place.down(&driver.client).await.unwrap();
        driver.client.delete(&place.id).await.unwrap();
        until("its space free", || async {
            driver.disks().await.iter().all(|disk| disk.status.as_ref().unwrap().allocated_bytes == 0).then_some(())
        })
        .await;
    }
    driver.stop();
}

/// csi-node ended between saying that it cannot have a volume and giving its claim back.
#[tokio::test(flavor = "multi_thread")]
async fn the_claim_of_a_rejected_volume_is_given_back() {
    use lockstep_store::Store;
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    driver.kill_node();
    let spec = format!(r#"{{"csiName":"v","capacityBytes":1048576,"node":"{NODE}","volumeMode":"Block"}}"#);
    let mut object = MirrorVolume::new("v", serde_json::from_str(&spec).unwrap());
    object.metadata.finalizers = Some(vec![FINALIZER.into()]);
    let mut object = driver.store.create(object).await.unwrap();
    object.status = Some(MirrorVolumeStatus { phase: VolumePhase::Rejected, ..Default::default() });
    driver.store.update_status(object).await.unwrap();
    driver.start_node().await;
    until("given back", || async { driver.volume("v").await.metadata.finalizers.is_none_or(|names| names.is_empty()).then_some(()) }).await;
    driver.stop();
}

/// A thread that waits for a device which its own process serves would keep the killed process, and its device, for ever.
#[tokio::test(flavor = "multi_thread")]
async fn csi_node_can_be_killed_at_any_moment_of_stage_and_unstage() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("any", 64 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    place.down(&driver.client).await.unwrap();
    for round in 0..20u64 {
        for up in [true, false] {
            let (client, moved) = (driver.client.clone(), place.clone());
            if !up {
                place.up(&client).await.unwrap();
                fs::write(place.target.join("f"), "dirty").unwrap();
            }
            let call = tokio::spawn(async move { if up { moved.up(&client).await } else { moved.down(&client).await } });
            tokio::time::sleep(Duration::from_millis(round * 2)).await;
            driver.kill_node();
            drop(call.await);
            driver.start_node().await;
            let begun = Instant::now();
            place.down(&driver.client).await.unwrap_or_else(|error| panic!("round {round}, up {up}: {error}"));
            // csi-node waits ten seconds for a file system to let go of a device. None has it here.
            assert!(begun.elapsed() < Duration::from_secs(10), "round {round}, up {up}: down after {:?}", begun.elapsed());
        }
    }
    assert!(lab.left_over().iter().all(|line| line.contains("/state/disks/")), "{:?}", lab.left_over());
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn csi_node_ends_at_sigterm_with_a_volume_mounted_and_nothing_that_was_written_is_lost() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("term", 64 * MIB, Some("xfs")).await;
    place.up(&driver.client).await.unwrap();
    fs::write(place.target.join("f"), "written").unwrap();
    run("sync", &["-f", text(&place.target)]);
    driver.terminate_node();
    driver.start_node().await;
    place.down(&driver.client).await.unwrap();
    place.up(&driver.client).await.unwrap();
    assert_eq!(fs::read_to_string(place.target.join("f")).unwrap(), "written");
    place.down(&driver.client).await.unwrap();
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_grows_on_one_copy_and_the_other_follows_when_it_is_made_again() {
    let mut lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("grow", 300 * MIB, Some("xfs")).await;
    place.up(&driver.client).await.unwrap();
    let lost = disk_of_leg(&lab, &driver, &place.id, 0).await;
    lab.fail_disk(lost);
    fs::write(place.target.join("f"), "x").and_then(|()| fs::File::open(place.target.join("f"))?.sync_all()).unwrap();
    driver.until_ready_is(&place.id, "Degraded").await;
    assert_eq!(driver.client.controller_expand(&place.id, 600 * MIB).await.unwrap(), 600 << 20);
    assert_eq!(driver.client.node_expand(&place.id, &place.target, 600 * MIB).await.unwrap(), 600 << 20);
    lab.add_disk(1500);
    driver.until_ready_is(&place.id, "Healthy").await;
    run("dd", &["if=/dev/urandom", &format!("of={}", text(&place.target.join("big"))), "bs=1M", "count=400", "conv=fsync", "status=none"]);
    place.down(&driver.client).await.unwrap();
    let copies = driver.copies(&place.id).await;
    assert_eq!(fs::metadata(&copies[0]).unwrap().len(), 600 * MIB);
    assert!(identical(&copies[0], &copies[1]), "the copies differ");
    driver.stop();
}

/// Somebody cut a copy off at its end: what is missing there is in no dirty region, so the copy is made anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_copy_is_made_anew_and_never_taken_for_zeroes() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("cut", 128 * MIB, None).await;
    place.up(&driver.client).await.unwrap();
    let of = format!("of={}", text(&place.target));
    run("dd", &["if=/dev/urandom", &of, "bs=1M", "count=128", "oflag=direct", "status=none"]);
    place.down(&driver.client).await.unwrap();
    let copies = driver.copies(&place.id).await;
    let sum = run("md5sum", &[text(&copies[1])]);
    fs::OpenOptions::new().write(true).open(&copies[0]).unwrap().set_len(32 * MIB).unwrap();
    let cut = driver.status(&place.id).await.legs[0].leg_id.clone();
    place.up(&driver.client).await.unwrap();
    until("made anew", || async {
        let legs = driver.status(&place.id).await.legs;
        legs.iter().all(|leg| leg.state == LegState::In && leg.leg_id != cut).then_some(())
    })
    .await;
    place.down(&driver.client).await.unwrap();
    let copies = driver.copies(&place.id).await;
    assert!(identical(&copies[0], &copies[1]), "the copies differ");
    for copy in &copies {
        assert_eq!(run("md5sum", &[text(copy)]).split(' ').next(), sum.split(' ').next(), "the data is not what it was");
    }
    driver.stop();
}
