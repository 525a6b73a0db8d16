//! csi-node is replaced under load by another build, that one by this one, and so on: LOCKSTEP_OTHER_NODE is that build's csi-node, as in `make soak`; without
//! it the build replaces itself.

use std::{fs, time::Duration};

use lockstep_csi_tests::{
    driver::{Driver, program, until},
    kills::{self, Plan},
    lab::Lab,
    load::Direct,
};

#[tokio::test(flavor = "multi_thread")]
async fn csi_node_is_replaced_by_another_build_and_back_and_nobody_notices() {
    let other = std::env::var_os("LOCKSTEP_OTHER_NODE");
    let replacements = if other.is_some() { 20 } else { 4 };
    let other = other.map_or_else(|| program("csi-node"), Into::into);
    let report = kills::run(Plan::upgrades(replacements, other, kills::seed())).await;
    kills::show(&report);
    assert!(report.is_clean(), "somebody noticed");
    assert_eq!(report.ends.len(), replacements);
}

/// A csi-node that is older than the one before it, which wrote what this one does not know: it touches nothing, and the volume's users wait for the
/// one that does.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_a_later_format_is_refused_before_anything_is_touched() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let place = driver.place("later", 256 << 20, None).await;
    place.up(&driver.client).await.unwrap();
    Direct::open(&place.target).unwrap().write(0).unwrap();
    let uid = driver.volume(&place.id).await.metadata.uid.unwrap();
    let record = driver.node_log().with_file_name("state").join(format!("staged/{uid}.yaml"));
    let copies = driver.copies(&place.id).await;
    driver.kill_node();
    let known = fs::read_to_string(&record).unwrap();
    let later = known.replace("version: 1", "version: 2");
    assert_ne!(known, later);
    fs::write(&record, &later).unwrap();
    let metas = || copies.iter().map(|copy| fs::read(copy.with_file_name("meta")).unwrap()).collect::<Vec<_>>();
    let before = metas();
    let device = place.target.clone();
    let waiting = std::thread::spawn(move || Direct::open(&device).unwrap().write(4096));
    driver.start_node().await;
    let log = || fs::read_to_string(driver.node_log()).unwrap();
    until("said", || async { log().contains("its version is 2, and this csi-node knows 1").then_some(()) }).await;
    let refused = driver.client.unstage(&place.id, &place.staging).await.unwrap_err();
    assert!(refused.message().contains("start the csi-node that wrote it"), "{refused}");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!waiting.is_finished(), "its users were given an answer");
    assert!(fs::read_to_string(&record).unwrap() == later && metas() == before, "it was touched");
    driver.kill_node();
    fs::write(&record, &known).unwrap();
    driver.start_node().await;
    waiting.join().unwrap().expect("who knows the record serves");
    place.down(&driver.client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
    driver.stop();
}
