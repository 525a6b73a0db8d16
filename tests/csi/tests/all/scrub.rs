//! Scrub, as an operator asks for it: one byte that rots in one copy is found, named, and repaired only if that is asked for.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

use lockstep_csi_tests::{
    driver::{Driver, until},
    lab::{Lab, identical, text},
    load,
};
use lockstep_native::run;
use lockstep_proto::objects::MirrorVolume;

const MIB: u64 = 1 << 20;
const ROTTEN: u64 = 17;

/// Waits until the annotations are gone; what the condition says then.
async fn scrubbed(driver: &Driver, id: &str) -> (MirrorVolume, String, String) {
    until("scrubbed", || async {
        let volume = driver.volume(id).await;
        let asked = volume.metadata.annotations.as_ref().is_some_and(|annotations| !annotations.is_empty());
        let conditions = volume.status.clone()?.conditions;
        let scrubbed = conditions.into_iter().find(|condition| condition.type_ == "Scrubbed")?;
        (!asked && scrubbed.reason != "ScrubRunning").then_some((volume, scrubbed.reason, scrubbed.message))
    })
    .await
}

/// Behind the driver's back.
fn flip(copy: &Path) -> u8 {
    let file = fs::File::options().read(true).write(true).open(copy).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, ROTTEN * 4096 + 5).unwrap();
    file.write_all_at(&[!byte[0]], ROTTEN * 4096 + 5).unwrap();
    file.sync_all().unwrap();
    byte[0]
}

fn byte(copy: &Path) -> u8 {
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root drops caches");
    let mut byte = [0];
    fs::File::open(copy).unwrap().read_exact_at(&mut byte, ROTTEN * 4096 + 5).unwrap();
    byte[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_that_rots_in_one_copy_is_named_under_load_and_repaired_from_the_copy_that_the_operator_believes() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("rot", 512 * MIB, None).await;
    place.up(&driver.client).await.unwrap();
    let of = format!("of={}", text(&place.target));
    run("dd", &["if=/dev/urandom", &of, "bs=1M", "count=512", "oflag=direct", "status=none"]);
    let copies = driver.copies(&place.id).await;
    let good = flip(&copies[0]);

    let mut under_load = load::on_device(&place.target, 40);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let asked = Instant::now();
    driver.annotate(&place.id, &[("scrub", "1")]).await;
    let (volume, reason, message) = scrubbed(&driver, &place.id).await;
    assert_eq!(reason, "ScrubMismatch", "{message}");
    assert!(message.contains("1 blocks of 4096 bytes differ between the copies: [17, 18)."), "{message}");
    assert_eq!(volume.status.unwrap().mismatched_blocks, 1);
    assert!(under_load.runs(), "the load was over before the scrub, which took {:?}", asked.elapsed());
    assert!(under_load.succeeded(), "the load saw an error");
    assert_eq!([byte(&copies[0]), byte(&copies[1])], [!good, good], "something was repaired that nobody asked for");
    let log = fs::read_to_string(driver.node_log()).unwrap();
    assert!(log.contains("ScrubMismatch") && log.contains("Mismatch { range: [17, 18) }"), "{log}");

    driver.annotate(&place.id, &[("scrub", "2"), ("scrub-repair-from", "no-such-disk")]).await;
    let (_, reason, message) = scrubbed(&driver, &place.id).await;
    assert!(reason == "ScrubRefused" && message.contains("no-such-disk"), "{message}");
    assert_eq!(byte(&copies[0]), !good);

    // Asked for while the volume is not staged: when it is.
    place.down(&driver.client).await.unwrap();
    let right = driver.volume(&place.id).await.status.unwrap().legs[1].disk.clone();
    driver.annotate(&place.id, &[("scrub", "3"), ("scrub-repair-from", &right)]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(byte(&copies[0]), !good);
    place.up(&driver.client).await.unwrap();
    let (volume, reason, message) = scrubbed(&driver, &place.id).await;
    assert!(reason == "ScrubRepaired" && message.contains("[17, 18)") && message.contains(&right), "{reason}: {message}");
    assert_eq!(volume.status.unwrap().mismatched_blocks, 0);
    assert_eq!([byte(&copies[0]), byte(&copies[1])], [good, good]);

    driver.annotate(&place.id, &[("scrub", "4")]).await;
    let (_, reason, message) = scrubbed(&driver, &place.id).await;
    assert!(reason == "ScrubCompleted" && message.contains("512 MiB"), "{reason}: {message}");
    place.down(&driver.client).await.unwrap();
    assert!(identical(&copies[0], &copies[1]), "the copies differ");
    driver.stop();
}
