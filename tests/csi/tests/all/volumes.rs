//! The life of a volume, call by call.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use lockstep_csi_tests::{
    client::{Client, capability, create_request},
    driver::Driver,
    lab::{ALONE, Lab, alone, alone_after_a_crash, alone_with, identical, text},
    load,
};
use lockstep_native::{run, succeeds};
use lockstep_proto::{
    csi::{
        ControllerGetCapabilitiesRequest, ControllerServiceCapability, NodeGetCapabilitiesRequest, NodeServiceCapability,
        controller_service_capability, node_service_capability, volume_capability::access_mode::Mode, volume_usage::Unit,
    },
    objects::{DiskPhase, VolumePhase},
};
use tonic::Code;

const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn what_both_programs_can_do_is_advertised_and_nothing_else() {
    use controller_service_capability::rpc::Type as Controller;
    use node_service_capability::rpc::Type as Node;
    let lab = Lab::new(0, 0);
    let mut driver = Driver::start(&lab).await;
    let said = driver.client.controller().controller_get_capabilities(ControllerGetCapabilitiesRequest {}).await.unwrap().into_inner();
    let rpc = |capability: ControllerServiceCapability| match capability.r#type {
        Some(controller_service_capability::Type::Rpc(rpc)) => rpc.r#type(),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        said.capabilities.into_iter().map(rpc).collect::<BTreeSet<_>>(),
        BTreeSet::from([
            Controller::CreateDeleteVolume,
            Controller::ListVolumes,
            Controller::GetCapacity,
            Controller::ExpandVolume,
            Controller::GetVolume,
            Controller::SingleNodeMultiWriter,
        ])
    );
    let said = driver.client.node().node_get_capabilities(NodeGetCapabilitiesRequest {}).await.unwrap().into_inner();
    let rpc = |capability: NodeServiceCapability| match capability.r#type {
        Some(node_service_capability::Type::Rpc(rpc)) => rpc.r#type(),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        said.capabilities.into_iter().map(rpc).collect::<BTreeSet<_>>(),
        BTreeSet::from([
            Node::StageUnstageVolume,
            Node::GetVolumeStats,
            Node::ExpandVolume,
            Node::SingleNodeMultiWriter,
            Node::GetVolumeHealth,
            Node::GetStorageHealth,
        ])
    );
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_lives_on_two_identical_copies_that_can_each_be_read_alone() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    for fs_type in ["ext4", "xfs"] {
        let place = driver.place(fs_type, 400 * MIB, Some(fs_type)).await;
        place.up(&driver.client).await.unwrap();
        assert_eq!(driver.volume(&place.id).await.status.unwrap().phase, VolumePhase::Ready);
        fs::write(place.target.join("hello"), "kept twice").unwrap();
        run("cp", &["-r", "/usr/include/linux", text(&place.target)]);
        let usage = driver.client.usage(&place.id, &place.target).await.unwrap();
        let bytes = usage.iter().find(|usage| usage.unit() == Unit::Bytes).unwrap();
        assert!(bytes.total > 300 << 20 && bytes.used > 1 << 20, "{bytes:?}");
        assert!(usage.iter().any(|usage| usage.unit() == Unit::Inodes && usage.used > 100));
        assert_eq!(driver.client.delete(&place.id).await.unwrap_err().code(), Code::FailedPrecondition, "it is in use");
        place.down(&driver.client).await.unwrap();
        assert!(!place.target.exists(), "the target is removed");

        let copies = driver.copies(&place.id).await;
        assert!(identical(&copies[0], &copies[1]), "the copies differ");
        for copy in &copies {
            assert_eq!(alone(&lab, copy, fs_type, |at| fs::read_to_string(at.join("hello")).unwrap()), "kept twice");
        }
        // What is there stays there.
        place.up(&driver.client).await.unwrap();
        assert_eq!(fs::read_to_string(place.target.join("hello")).unwrap(), "kept twice");
        place.down(&driver.client).await.unwrap();
        driver.client.delete(&place.id).await.unwrap();
        assert!(copies.iter().all(|copy| !copy.exists()), "its legs are gone");
        assert!(driver.disks().await.iter().all(|disk| disk.status.as_ref().unwrap().phase == DiskPhase::Ready));
    }
    driver.stop();
}

/// The driver is gone, and with it the devices, in the middle of the volumes' use.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash_each_copy_can_be_read_alone_as_the_readme_says() {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md")).unwrap();
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let mut places = Vec::new();
    for fs_type in ["ext4", "xfs"] {
        assert!([ALONE, alone_after_a_crash(fs_type)].iter().all(|options| readme.contains(&format!("-o {options}"))), "{fs_type}");
        let place = driver.place(fs_type, 320 * MIB, Some(fs_type)).await;
        place.up(&driver.client).await.unwrap();
        fs::write(place.target.join("before"), "in place").unwrap();
        place.down(&driver.client).await.unwrap();
        place.up(&driver.client).await.unwrap();
        let last = place.target.join("last");
        fs::write(&last, "in the journal").and_then(|()| fs::File::open(&last)?.sync_all()).unwrap();
        places.push(place);
    }
    driver.kill_node();
    for place in &places {
        for point in [&place.target, &place.staging] {
            run("umount", &["--lazy", text(point)]);
        }
    }
    let replayed = lab.path("replayed.img");
    for place in &places {
        let fs_type = place.fs_type.unwrap();
        for copy in driver.copies(&place.id).await {
            let read = |options: &str, copy: &Path, file: &str| {
                alone_with(&lab, copy, fs_type, options, |at| fs::read_to_string(at.join(file)).ok())
            };
            assert_eq!(read(ALONE, &copy, "before"), None, "{fs_type}: nothing is in its journal: this shows nothing");
            assert_eq!(read(alone_after_a_crash(fs_type), &copy, "before").unwrap().as_deref(), Some("in place"));
            run("cp", &["--sparse=always", text(&copy), text(&replayed)]);
            let writable = if fs_type == "xfs" { "loop,nouuid" } else { "loop" };
            assert_eq!(read(writable, &replayed, "last").unwrap().as_deref(), Some("in the journal"));
            fs::remove_file(&replayed).unwrap();
        }
    }
    // None of that did anything to the volumes.
    driver.start_node().await;
    for place in &places {
        place.down(&driver.client).await.unwrap();
        place.up(&driver.client).await.unwrap();
        assert_eq!(fs::read_to_string(place.target.join("last")).unwrap(), "in the journal");
        place.down(&driver.client).await.unwrap();
        driver.assert_copies_identical(&place.id).await;
    }
    driver.stop();
}

/// The comparison can fail: it finds one byte that is not the same, and nothing once it is again.
fn a_flipped_byte_is_found(copies: &[PathBuf], at: u64) {
    let copy = fs::OpenOptions::new().read(true).write(true).open(&copies[0]).unwrap();
    let mut byte = [0];
    copy.read_exact_at(&mut byte, at).unwrap();
    let put = |byte: u8| copy.write_all_at(&[byte], at).and_then(|()| copy.sync_all()).unwrap();
    put(!byte[0]);
    assert!(!identical(&copies[0], &copies[1]), "the byte {at} was flipped and not found");
    put(byte[0]);
    assert!(identical(&copies[0], &copies[1]), "the byte {at} is what it was, and the copies differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_device_is_verified_under_load_and_a_flipped_byte_is_found() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("block", 400 * MIB, None).await;
    place.up(&driver.client).await.unwrap();
    assert!(load::on_device(&place.target, 8).succeeded(), "fio found an error");
    let usage = driver.client.usage(&place.id, &place.target).await.unwrap();
    assert_eq!(usage.iter().map(|usage| (usage.unit(), usage.total)).collect::<Vec<_>>(), [(Unit::Bytes, 400 << 20)]);
    place.down(&driver.client).await.unwrap();
    let copies = driver.copies(&place.id).await;
    assert!(identical(&copies[0], &copies[1]), "the copies differ");
    a_flipped_byte_is_found(&copies, 400 * MIB - 1);
    driver.client.delete(&place.id).await.unwrap();
    driver.stop();
}

/// A minute of overlapping and verifying writers, on a file system and on a bare device at once: two volumes on one pair of disks.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_minute_of_load_all_copies_are_identical() {
    const SECONDS: u32 = 60;
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let ext4 = driver.place("ext4", 512 * MIB, Some("ext4")).await;
    let block = driver.place("block", 512 * MIB, None).await;
    ext4.up(&driver.client).await.unwrap();
    block.up(&driver.client).await.unwrap();
    let loads = [load::on_files(&ext4.target, SECONDS), load::on_device(&block.target, SECONDS)];
    assert!(loads.into_iter().all(load::Load::succeeded), "fio found an error");
    for place in [&ext4, &block] {
        place.down(&driver.client).await.unwrap();
        driver.assert_copies_identical(&place.id).await;
        a_flipped_byte_is_found(&driver.copies(&place.id).await, 300 * MIB + 17);
        place.up(&driver.client).await.unwrap();
    }
    // What was written last, too, which a load does not come to verify.
    assert!(load::verified_on_files(&ext4.target), "a file does not hold what was written to it");
    assert!(load::verified_on_device(&block.target), "the device does not hold what was written to it");
    for place in [&ext4, &block] {
        place.down(&driver.client).await.unwrap();
        driver.client.delete(&place.id).await.unwrap();
    }
    driver.stop();
}

/// A csi-node that is killed in the middle leaves nothing, or what was asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_target_is_never_writable_not_even_for_a_moment() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let client = driver.client.clone();
    let place = driver.place("ro", 64 * MIB, Some("ext4")).await;
    client.stage(&place.id, &place.staging, Some("ext4")).await.unwrap();
    fs::write(place.staging.join("f"), "x").unwrap();
    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (file, ends) = (place.target.join("f"), std::sync::Arc::clone(&over));
    let watch = std::thread::spawn(move || {
        let (mut refused, mut written) = (0, 0);
        while !ends.load(std::sync::atomic::Ordering::Relaxed) {
            match fs::File::options().write(true).open(&file) {
                Ok(_) => written += 1,
                Err(error) => refused += u64::from(error.kind() == std::io::ErrorKind::ReadOnlyFilesystem),
            }
        }
        (refused, written)
    });
    let mut request = Client::publish_request(&place.id, &place.staging, &place.target, Some("ext4"));
    request.readonly = true;
    for _ in 0..100 {
        client.node().node_publish_volume(request.clone()).await.unwrap();
        // A look that is under way holds the mount: it is busy for that moment, and the kubelet asks again.
        while let Err(busy) = client.unpublish(&place.id, &place.target).await {
            assert!(busy.message().contains("os error 16"), "{busy}");
        }
    }
    over.store(true, std::sync::atomic::Ordering::Relaxed);
    let (refused, written) = watch.join().unwrap();
    assert!(refused > 0, "it was never seen");
    assert_eq!(written, 0, "of {} looks", refused + written);
    client.unstage(&place.id, &place.staging).await.unwrap();
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_can_be_repeated_and_what_does_not_fit_is_refused() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let client = driver.client.clone();
    let place = driver.place("again", 64 * MIB, Some("ext4")).await;
    assert_eq!(client.create("again", 64 * MIB, Some("ext4")).await.unwrap().volume_id, place.id);
    assert_eq!(client.create("again", 65 * MIB, Some("ext4")).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(client.publish(&place.id, &place.staging, &place.target, Some("ext4")).await.unwrap_err().code(), Code::FailedPrecondition);
    for _ in 0..3 {
        place.up(&client).await.unwrap();
    }
    let elsewhere = lab.path("elsewhere");
    assert_eq!(client.stage(&place.id, &elsewhere, Some("ext4")).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(client.stage(&place.id, &place.staging, Some("xfs")).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(client.publish(&place.id, &place.staging, &elsewhere, Some("ext4")).await.unwrap_err().code(), Code::FailedPrecondition);
    assert!(!elsewhere.exists(), "a refused target is not left behind");
    let mut read_only = Client::publish_request(&place.id, &place.staging, &place.target, Some("ext4"));
    read_only.readonly = true;
    assert_eq!(client.node().node_publish_volume(read_only.clone()).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(client.unstage(&place.id, &place.staging).await.unwrap_err().code(), Code::FailedPrecondition, "it is published");

    // More than one target, one of them read-only, where the access mode allows it.
    let shared = capability(Some("ext4"), Mode::SingleNodeMultiWriter);
    read_only.target_path = text(&elsewhere).into();
    read_only.volume_capability = Some(shared);
    client.node().node_publish_volume(read_only).await.unwrap();
    fs::write(place.target.join("f"), "x").unwrap();
    assert_eq!(fs::read_to_string(elsewhere.join("f")).unwrap(), "x");
    assert_eq!(fs::write(elsewhere.join("g"), "x").unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    client.unpublish(&place.id, &elsewhere).await.unwrap();

    for _ in 0..3 {
        place.down(&client).await.unwrap();
    }
    for _ in 0..2 {
        client.delete(&place.id).await.unwrap();
    }
    assert_eq!(client.stage(&place.id, &place.staging, Some("ext4")).await.unwrap_err().code(), Code::NotFound);
    driver.stop();
}

/// What was admitted can be filled to the last block: after mkfs, after fstrim, on disks that are full to the brim.
#[tokio::test(flavor = "multi_thread")]
async fn a_thick_volume_on_full_disks_never_runs_out_of_space() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let client = driver.client.clone();
    let largest = async || {
        let request = lockstep_proto::csi::GetCapacityRequest::default();
        let largest = client.controller().get_capacity(request).await.unwrap().into_inner().maximum_volume_size.unwrap();
        u64::try_from(largest).unwrap()
    };
    let mut bytes = largest().await;
    assert!(bytes > 1200 * MIB, "{bytes}");
    let place = driver.place("full", bytes, Some("xfs")).await;
    let more = client.create("more", 8 * MIB, None).await.unwrap_err();
    assert_eq!(more.code(), Code::ResourceExhausted, "{more}");
    place.up(&client).await.unwrap();
    let free = || {
        let said = run("stat", &["--file-system", "--format=%a %S", text(&place.target)]);
        said.split_whitespace().map(|number| number.parse::<u64>().unwrap()).product::<u64>()
    };
    let fill = || {
        // Until the file system on the volume is full; the volume itself must take every block.
        succeeds("dd", &["if=/dev/urandom", &format!("of={}", text(&place.target.join("fill"))), "bs=1M", "oflag=direct", "status=none"])
    };
    assert!(!fill(), "it is not full");
    assert!(free() < 4 * MIB, "it took no more, and {} bytes are free", free());
    fs::remove_file(place.target.join("fill")).unwrap();
    run("fstrim", &[text(&place.target)]);
    assert!(!fill(), "it is not full");
    assert!(free() < 4 * MIB, "it took no more, and {} bytes are free", free());
    for copy in driver.copies(&place.id).await {
        let meta = fs::metadata(copy).unwrap();
        assert!(meta.blocks() * 512 >= meta.len(), "a copy lost its promised space: {meta:?}");
    }
    let health = driver.volume(&place.id).await.status.unwrap();
    assert!(health.conditions.iter().any(|condition| condition.type_ == "Ready" && condition.reason == "Healthy"), "{health:?}");
    run("sync", &["-f", text(&place.target)]);
    place.down(&client).await.unwrap();
    // The raw device, to its last byte.
    let device = place.clone();
    client.delete(&device.id).await.unwrap();
    // At once, but for what XFS has taken for itself since.
    let all = std::mem::replace(&mut bytes, largest().await);
    assert!(bytes + 8 * MIB >= all, "of {all} bytes {bytes} are free again");
    let block = driver.place("raw", bytes, None).await;
    block.up(&client).await.unwrap();
    let of = format!("of={}", text(&block.target));
    run("dd", &["if=/dev/urandom", &of, "bs=1M", &format!("count={}", bytes / MIB), "oflag=direct", "status=none"]);
    block.down(&client).await.unwrap();
    driver.assert_copies_identical(&block.id).await;
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_volume_costs_no_resync_and_a_clean_stop_leaves_none() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let client = driver.client.clone();
    let place = driver.place("new", 1024 * MIB, Some("ext4")).await;
    for _ in 0..2 {
        place.up(&client).await.unwrap();
        fs::write(place.target.join("f"), "x").unwrap();
        place.down(&client).await.unwrap();
        let status = driver.volume(&place.id).await.status.unwrap();
        let copied = status.conditions.iter().find(|condition| condition.type_ == "Rebuilding").unwrap();
        assert!(copied.message.starts_with("nothing had to be copied"), "{}", copied.message);
        assert_eq!(status.device, None);
    }
    let wrong = create_request("new", 1024 * MIB, Some("xfs"));
    assert_eq!(client.controller().create_volume(wrong).await.unwrap_err().code(), Code::AlreadyExists);
    driver.stop();
}
