//! Volumes grow: while they are used, each in its way, and at their next stage.

use std::{
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
};

use lockstep_csi_tests::{
    driver::{Driver, until},
    lab::{Lab, text},
    load, skipped,
};
use lockstep_native::run;
use lockstep_store::Store;
use tonic::Code;

const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_grows_while_it_is_used_and_again_at_its_next_stage() {
    let lab = Lab::new(2, 2000);
    let mut driver = Driver::start(&lab).await;
    let client = driver.client.clone();
    let place = driver.place("grows", 320 * MIB, Some("xfs")).await;
    place.up(&client).await.unwrap();
    let size = async || client.usage(&place.id, &place.target).await.unwrap()[0].total;
    let before = size().await;
    assert_eq!(client.node_expand(&place.id, &place.target, 640 * MIB).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(client.controller_expand(&place.id, 640 * MIB).await.unwrap(), 640 << 20);
    assert_eq!(client.node_expand(&place.id, &place.target, 640 * MIB).await.unwrap(), 640 << 20);
    assert!(size().await > before + (300 << 20));
    let refused = client.controller_expand(&place.id, 4000 * MIB).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    // Its node says so where the disks' objects did not.
    let mut object = driver.volume(&place.id).await;
    object.spec.capacity_bytes = 4000 * MIB;
    driver.store.update(object).await.unwrap();
    until("refused", || async { driver.status(&place.id).await.refused_capacity_bytes }).await;
    let refused = client.controller_expand(&place.id, 4000 * MIB).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    for named in [
        "its node says",
        "its disk /dev/loop",
        "MiB free, and 3360 MiB are needed",
        "Ask for less, or delete volumes that lie on the same disk",
    ] {
        assert!(refused.message().contains(named), "{named:?} is not in {:?}", refused.message());
    }
    place.down(&client).await.unwrap();
    // Without being staged: the next stage gives it the rest.
    assert_eq!(client.controller_expand(&place.id, 960 * MIB).await.unwrap(), 960 << 20);
    place.up(&client).await.unwrap();
    assert!(size().await > before + (600 << 20));
    let file = place.target.join("big");
    run("dd", &["if=/dev/urandom", &format!("of={}", text(&file)), "bs=1M", "count=700", "conv=fsync", "status=none"]);
    place.down(&client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
    driver.stop();
}

/// Its users see that it is larger where they have it, and go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_raw_block_volume_grows_while_it_is_used() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let client = driver.client.clone();
    let place = driver.place("raw", 320 * MIB, None).await;
    place.up(&client).await.unwrap();
    let mut load = load::on_device(&place.target, 15);
    let mut open = File::open(&place.target).unwrap();
    let mut device = load::Direct::open(&place.target).unwrap();
    for bytes in [321 * MIB, 640 * MIB, 1024 * MIB] {
        let refused = client.node_expand(&place.id, &place.target, bytes).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(device.write(bytes - 4096).is_err(), "there was room before it was asked for");
        assert_eq!(client.controller_expand(&place.id, bytes).await.unwrap(), bytes.cast_signed());
        assert_eq!(client.node_expand(&place.id, &place.target, bytes).await.unwrap(), bytes.cast_signed());
        assert_eq!(open.seek(SeekFrom::End(0)).unwrap(), bytes, "who had it open does not see it");
        assert_eq!(client.usage(&place.id, &place.target).await.unwrap()[0].total, bytes.cast_signed());
        device.block().fill(u8::try_from(bytes / MIB % 251).unwrap());
        device.write(bytes - 4096).unwrap();
        // Again: nothing to do.
        assert_eq!(client.node_expand(&place.id, &place.target, bytes).await.unwrap(), bytes.cast_signed());
        assert!(load.runs(), "the load ended before: this shows nothing");
    }
    assert!(load.succeeded(), "the load saw an error, or read what it did not write");
    drop((open, device));
    place.down(&client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
    place.up(&client).await.unwrap();
    let mut device = load::Direct::open(&place.target).unwrap();
    for bytes in [321 * MIB, 640 * MIB, 1024 * MIB] {
        device.read(bytes - 4096).unwrap();
        assert!(device.block().iter().all(|byte| u64::from(*byte) == bytes / MIB % 251), "what was written at {bytes} is not there");
    }
    drop(device);
    place.down(&client).await.unwrap();
    driver.stop();
}

/// Whether the kernel lets this machine's root have a mounted ext4 grow.
fn may_grow_mounted_ext4() -> bool {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let capabilities = own.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("capabilities");
    u64::from_str_radix(capabilities.trim(), 16).unwrap() & CAP_SYS_RESOURCE != 0
}

/// The kernel wants CAP_SYS_RESOURCE for that, as csi-node has it in its pod. Without it the call says so, and the volume gets the rest before it is mounted
/// the next time.
#[tokio::test(flavor = "multi_thread")]
async fn ext4_grows_while_it_is_used_where_the_kernel_allows_it_and_anyhow_at_its_next_stage() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    let client = driver.client.clone();
    let place = driver.place("ext4", 64 * MIB, Some("ext4")).await;
    place.up(&client).await.unwrap();
    let size = async || client.usage(&place.id, &place.target).await.unwrap()[0].total;
    let before = size().await;
    let mut file = File::create(place.target.join("f")).unwrap();
    client.controller_expand(&place.id, 256 * MIB).await.unwrap();
    let expanded = client.node_expand(&place.id, &place.target, 256 * MIB).await;
    if may_grow_mounted_ext4() {
        assert_eq!(expanded.unwrap(), 256 << 20);
        assert!(size().await > before + (150 << 20));
    } else {
        skipped("growing a mounted ext4", "root has no CAP_SYS_RESOURCE on this machine");
        let refused = expanded.unwrap_err();
        assert!(refused.message().contains("resize2fs") && refused.message().contains("Permission denied"), "{refused}");
        assert_eq!(size().await, before);
    }
    // In use all the time.
    file.write_all(b"kept").and_then(|()| file.sync_all()).unwrap();
    drop(file);
    place.down(&client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
    place.up(&client).await.unwrap();
    assert!(size().await > before + (150 << 20));
    assert_eq!(fs::read_to_string(place.target.join("f")).unwrap(), "kept");
    place.down(&client).await.unwrap();
    driver.stop();
}
