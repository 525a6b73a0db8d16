//! A volume whose assembly takes csi-node with it (mirror rule 33): its disks are frozen from below, so that csi-node can be ended in it.

use std::{fs, thread, time::Duration};

use lockstep_csi_tests::{
    client::Place,
    driver::{Driver, until},
    lab::Lab,
};
use lockstep_native::frozen::Frozen;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

const MIB: u64 = 1 << 20;

async fn count(lab: &Lab, driver: &Driver, place: &Place) -> Option<String> {
    let uid = driver.volume(&place.id).await.metadata.uid.unwrap();
    let text = fs::read_to_string(lab.path(&format!("driver/state/assembling/{uid}"))).ok()?;
    text.lines().find_map(|line| line.strip_prefix("unfinished: ")).map(str::to_owned)
}

/// A stage that hangs in the middle of its assembly: the disks take no writes for so many seconds.
async fn hanging(lab: &Lab, driver: &Driver, place: &Place, seconds: u64) -> (JoinHandle<Result<(), Status>>, thread::JoinHandle<()>) {
    // What an earlier csi-node left is taken down first, which is not what is to hang.
    place.down(&driver.client).await.unwrap();
    let before = count(lab, driver, place).await;
    let mounts = [0, 1].map(|disk| lab.mount_of(disk).unwrap());
    let frozen = Frozen::freeze_for(&mounts, Duration::from_secs(seconds));
    let (client, place_) = (driver.client.clone(), place.clone());
    let stage = tokio::spawn(async move { client.stage(&place_.id, &place_.staging, None).await });
    until("an assembly", || async { (count(lab, driver, place).await != before).then_some(()) }).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!stage.is_finished(), "it did not hang: {:?}", stage.await);
    (stage, frozen)
}

async fn kill_in_assembly(lab: &Lab, driver: &mut Driver, place: &Place) {
    let (stage, frozen) = hanging(lab, driver, place, 5).await;
    driver.kill_node();
    assert!(stage.await.unwrap().is_err());
    frozen.join().unwrap();
    driver.start_node().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_whose_assembly_took_csi_node_with_it_three_times_is_refused_until_an_operator_lifts_that() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let (place, neighbour) = (driver.place("bad", 64 * MIB, None).await, driver.place("good", 64 * MIB, None).await);
    for _ in 0..2 {
        kill_in_assembly(&lab, &mut driver, &place).await;
    }
    assert_eq!(count(&lab, &driver, &place).await.as_deref(), Some("2"));
    // Asked to end in the middle of an assembly, it does, and that is no crash. Longer than it waits for its last calls.
    let (stage, frozen) = hanging(&lab, &driver, &place, 20).await;
    driver.terminate_node();
    assert!(stage.await.unwrap().is_err(), "it was staged before csi-node ended: nothing was proved");
    frozen.join().unwrap();
    driver.start_node().await;
    assert_eq!(count(&lab, &driver, &place).await.as_deref(), Some("2"));
    // Nor is a restart.
    driver.terminate_node();
    driver.start_node().await;
    kill_in_assembly(&lab, &mut driver, &place).await;

    for _ in 0..2 {
        let refused = place.up(&driver.client).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        let message = refused.message();
        assert!(
            message.contains("quarantine") && message.contains("3 times") && message.contains("lockstep.io/lift-quarantine"),
            "{message}"
        );
    }
    let status = driver.volume(&place.id).await.status.unwrap();
    let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready").unwrap();
    assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "Quarantined"));
    assert_eq!(status.device, None, "nothing may be half-staged");
    assert!(fs::read_to_string(driver.node_log()).unwrap().contains("MirrorQuarantined"));
    neighbour.up(&driver.client).await.unwrap();
    neighbour.down(&driver.client).await.unwrap();

    driver.annotate(&place.id, &[("lift-quarantine", "now")]).await;
    place.up(&driver.client).await.unwrap();
    assert_eq!(count(&lab, &driver, &place).await, None);
    assert!(driver.volume(&place.id).await.metadata.annotations.is_none_or(|annotations| annotations.is_empty()));
    place.down(&driver.client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
    driver.stop();
}
