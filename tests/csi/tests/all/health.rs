//! What csi-node says of a volume's health, and of its disks' (CSI 1.13).

use std::fs;

use lockstep_csi_tests::{
    driver::{Driver, until},
    lab::Lab,
};
use lockstep_proto::csi::{
    NodeGetStorageHealthRequest, NodeGetVolumeHealthRequest, StorageHealthErrorType, VolumeHealthErrorType,
    node_get_storage_health_response::StorageBackendHealth, volume_health::VolumeHealthEntry,
};
use tonic::{Code, Status};

const MIB: u64 = 1 << 20;

async fn of_volume(driver: &Driver, id: &str) -> Result<Vec<VolumeHealthEntry>, Status> {
    let request = NodeGetVolumeHealthRequest { volume_id: id.into(), ..Default::default() };
    let health = driver.client.node().node_get_volume_health(request).await?.into_inner().volume_health.expect("it is required");
    assert_eq!(health.volume_id, id);
    Ok(health.health_statuses)
}

async fn of_disks(driver: &Driver) -> Vec<StorageBackendHealth> {
    let answer = driver.client.node().node_get_storage_health(NodeGetStorageHealthRequest::default()).await;
    answer.expect("the disks were looked at").into_inner().backend_health
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_disk_is_said_of_the_volume_and_of_the_node_until_the_volume_has_two_copies_again() {
    let mut lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("db", 256 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    driver.until_ready_is(&place.id, "Healthy").await;
    assert_eq!(of_volume(&driver, &place.id).await.unwrap(), []);
    assert_eq!(of_disks(&driver).await, []);
    assert_eq!(of_volume(&driver, "nobody").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(of_volume(&driver, "").await.unwrap_err().code(), Code::InvalidArgument);

    let lost = driver.status(&place.id).await.legs[1].disk.clone();
    lab.fail_disk(lab.number_of(&lost));
    let wrong = until("something is wrong with the volume", || async { of_volume(&driver, &place.id).await.unwrap().pop() }).await;
    assert_eq!((wrong.status(), wrong.reason.as_str()), (VolumeHealthErrorType::Degraded, "CopyLost"));
    assert!(wrong.message.contains("is lost") && wrong.message.contains("add a disk"), "{}", wrong.message);
    let disks = until("something is wrong with the disks", || async { of_disks(&driver).await.pop() }).await;
    assert_eq!((disks.status(), disks.reason.as_str()), (StorageHealthErrorType::StorageDegraded, "DiskFailed"));
    assert!(disks.message.contains(" failed: "), "{}", disks.message);

    // Nobody is asked for it.
    driver.until_ready_is(&place.id, "Degraded").await;
    let wrong = of_volume(&driver, &place.id).await.unwrap().pop().unwrap();
    let objects = driver.node_log().with_file_name("objects");
    let away = objects.with_extension("away");
    fs::rename(&objects, &away).unwrap();
    let answer = of_volume(&driver, &place.id).await;
    fs::rename(&away, &objects).unwrap();
    assert_eq!(answer.unwrap(), std::slice::from_ref(&wrong));

    // Where it is not staged, its object says how it was.
    place.down(&driver.client).await.unwrap();
    assert_eq!(of_volume(&driver, &place.id).await.unwrap(), [wrong]);

    place.up(&driver.client).await.unwrap();
    lab.add_disk(1200);
    driver.until_ready_is(&place.id, "Healthy").await;
    assert_eq!(of_volume(&driver, &place.id).await.unwrap(), []);
    place.down(&driver.client).await.unwrap();
    driver.client.delete(&place.id).await.unwrap();
    driver.stop();
}
