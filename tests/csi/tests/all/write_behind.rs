//! `writeBehind: rotational`: a volume on a fast disk and a slow one, which is frozen from below.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use lockstep_csi_tests::{
    driver::{Driver, until},
    lab::{Lab, text},
};
use lockstep_native::{frozen::Frozen, run};

const MIB: u64 = 1 << 20;

fn rotates(lab: &Lab, disk: usize, rotates: bool) {
    let name = lab.device(disk).file_name().unwrap().to_str().unwrap();
    fs::write(format!("/sys/block/{name}/queue/rotational"), if rotates { "1" } else { "0" }).expect("root says what a disk is");
}

/// Writes 32 blocks of this byte past the page cache, and returns when they are answered.
fn write(lab: &Lab, device: &Path, byte: u8) {
    let file = lab.path("payload");
    fs::write(&file, vec![byte; 32 * 4096]).unwrap();
    let (from, to) = (format!("if={}", text(&file)), format!("of={}", text(device)));
    run("dd", &[&from, &to, "bs=4096", "seek=16", "oflag=direct", "conv=notrunc", "status=none"]);
}

fn read(lab: &Lab, device: &Path) -> Vec<u8> {
    let file = lab.path("found");
    let (from, to) = (format!("if={}", text(device)), format!("of={}", text(&file)));
    run("dd", &[&from, &to, "bs=4096", "skip=16", "count=32", "iflag=direct", "status=none"]);
    fs::read(file).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_wait_for_the_fast_disk_alone_a_flush_for_both_and_a_kill_loses_nothing_that_was_answered() {
    let lab = Lab::new(2, 1200);
    rotates(&lab, 0, true);
    rotates(&lab, 1, false);
    let mut driver = Driver::start(&lab).await;
    let id = driver.client.create_with("mixed", 64 * MIB, &[("writeBehind", "rotational")]).await.unwrap();
    let place = driver.place_of(id, None);
    place.up(&driver.client).await.unwrap();
    until("write-behind", || async { fs::read_to_string(driver.node_log()).unwrap().contains("WriteBehind").then_some(()) }).await;
    let slow = lab.mount_of(0).unwrap();
    // Its region is dirty now: that has to be on both disks before anything is.
    write(&lab, &place.target, 1);

    let begun = Instant::now();
    let frozen = Frozen::freeze_for(std::slice::from_ref(&slow), Duration::from_secs(5));
    write(&lab, &place.target, 2);
    assert_eq!(read(&lab, &place.target), vec![2; 32 * 4096]);
    assert!(begun.elapsed() < Duration::from_secs(3), "it waited for the slow disk: {:?}", begun.elapsed());
    let of = format!("of={}", text(&place.target));
    run("dd", &["if=/dev/zero", &of, "bs=4096", "seek=1", "count=1", "conv=notrunc,fsync", "status=none"]);
    assert!(begun.elapsed() >= Duration::from_secs(5), "a flush was answered after {:?}, and the slow disk is frozen", begun.elapsed());
    frozen.join().unwrap();

    // Killed with writes behind: what was answered is there, and on both copies.
    write(&lab, &place.target, 3);
    let frozen = Frozen::freeze_for(std::slice::from_ref(&slow), Duration::from_secs(4));
    write(&lab, &place.target, 4);
    driver.kill_node();
    frozen.join().unwrap();
    driver.start_node().await;
    place.down(&driver.client).await.unwrap();
    place.up(&driver.client).await.unwrap();
    assert_eq!(read(&lab, &place.target), vec![4; 32 * 4096]);
    place.down(&driver.client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;

    let wrong = driver.client.create_with("wrong", 64 * MIB, &[("writeBehind", "sometimes")]).await.unwrap_err();
    assert!(wrong.code() == tonic::Code::InvalidArgument && wrong.message().contains("writeBehind"), "{wrong}");
    driver.stop();
    rotates(&lab, 0, false);
}
