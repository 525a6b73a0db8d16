//! What is asked for is not what is there: objects from the past, a copy from the past, a call that fails half-way. Nothing is lost to it.

use std::{fs, path::Path, time::Duration};

use lockstep_csi_tests::{
    client::{Client, Place, capability},
    driver::{Driver, until},
    lab::{Lab, text},
};
use lockstep_native::run;
use lockstep_proto::{
    csi::{NodeStageVolumeRequest, volume_capability::AccessType, volume_capability::access_mode::Mode},
    objects::{FormatState, FormatStatus, MirrorVolume, MirrorVolumeStatus},
};
use lockstep_store::Store;
use tonic::{Code, Status};

const MIB: u64 = 1 << 20;

/// A volume that has a file, not staged any more.
async fn used(driver: &Driver, name: &str) -> Place {
    let place = driver.place(name, 64 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    write(&place, "precious");
    place.down(&driver.client).await.unwrap();
    place
}

fn write(place: &Place, content: &str) {
    let file = place.target.join("f");
    fs::write(&file, content).and_then(|()| fs::File::open(&file)?.sync_all()).unwrap();
}

fn read(place: &Place) -> String {
    fs::read_to_string(place.target.join("f")).unwrap()
}

async fn set_status(driver: &Driver, id: &str, change: impl FnOnce(&mut MirrorVolumeStatus)) {
    let mut object = driver.volume(id).await;
    change(object.status.as_mut().expect("it has a status"));
    driver.store.update_status(object).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_with_another_file_system_than_on_record_is_neither_mounted_nor_formatted() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = used(&driver, "v").await;
    let right = driver.volume(&place.id).await.status.unwrap().format;
    let never = FormatStatus { state: FormatState::Never, fs_uuid: None };
    let other = FormatStatus { state: FormatState::Formatted, fs_uuid: Some("00000000-0000-4000-8000-000000000000".into()) };
    for (record, named) in [(never, "was never formatted"), (other, "should have ext4 (00000000")] {
        set_status(&driver, &place.id, |status| status.format = record).await;
        let refused = place.up(&driver.client).await.unwrap_err();
        assert_eq!(refused.code(), Code::DataLoss, "{refused}");
        assert!(refused.message().contains(named), "{refused}");
    }
    set_status(&driver, &place.id, |status| status.format = right).await;
    place.up(&driver.client).await.unwrap();
    assert_eq!(read(&place), "precious");
    place.down(&driver.client).await.unwrap();
    driver.stop();
}

/// As an API server that was restored from a backup has them.
#[tokio::test(flavor = "multi_thread")]
async fn an_object_from_before_mkfs_was_done_does_not_cost_the_volume_its_file_system() {
    let lab = Lab::new(3, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = used(&driver, "v").await;
    // One of the copies that know is lost; the one in its place has to know it too.
    place.up(&driver.client).await.unwrap();
    let disk = driver.volume(&place.id).await.status.unwrap().legs[0].disk.clone();
    lab.fail_disk(lab.number_of(&disk));
    write(&place, "precious");
    until("a copy on the third disk", || async {
        let status = driver.volume(&place.id).await.status?;
        let healthy = status.conditions.iter().any(|condition| condition.type_ == "Ready" && condition.reason == "Healthy");
        (healthy && status.legs.iter().all(|leg| leg.disk != disk)).then_some(())
    })
    .await;
    place.down(&driver.client).await.unwrap();
    for copy in driver.copies(&place.id).await {
        let said = fs::read_to_string(copy.with_file_name("volume.yaml")).unwrap();
        assert!(said.contains("fsUuid"), "{said}");
    }

    let right = driver.volume(&place.id).await.status.unwrap().format;
    let forgotten = FormatStatus { state: FormatState::Formatting, fs_uuid: Some("00000000-0000-4000-8000-000000000000".into()) };
    set_status(&driver, &place.id, |status| status.format = forgotten.clone()).await;
    place.up(&driver.client).await.unwrap();
    assert_eq!(read(&place), "precious");
    assert_eq!(driver.volume(&place.id).await.status.unwrap().format, right, "the object was not told");
    place.down(&driver.client).await.unwrap();

    // Nothing is there any more: that is not a reason to make it again.
    for copy in driver.copies(&place.id).await {
        run("wipefs", &["--all", "--quiet", text(&copy)]);
    }
    for record in [forgotten, FormatStatus { state: FormatState::Never, fs_uuid: None }] {
        set_status(&driver, &place.id, |status| status.format = record).await;
        let refused = place.up(&driver.client).await.unwrap_err();
        assert_eq!(refused.code(), Code::DataLoss, "{refused}");
    }
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_from_before_a_volume_was_allocated_do_not_cost_it_its_data() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = used(&driver, "v").await;
    let (copies, right) = (driver.copies(&place.id).await, driver.volume(&place.id).await.status.unwrap());
    let uid = driver.volume(&place.id).await.metadata.uid.unwrap();
    fs::remove_file(lab.path(&format!("driver/state/witness/{uid}"))).unwrap();
    set_status(&driver, &place.id, |status| *status = MirrorVolumeStatus::default()).await;
    until("a word about it", || async { fs::read_to_string(driver.node_log()).unwrap().contains("that holds data").then_some(()) }).await;
    assert_eq!(place.up(&driver.client).await.unwrap_err().code(), Code::FailedPrecondition);
    assert!(copies.iter().all(|copy| copy.exists()), "a copy was removed");
    set_status(&driver, &place.id, |status| *status = right).await;
    place.up(&driver.client).await.unwrap();
    assert_eq!(read(&place), "precious");
    place.down(&driver.client).await.unwrap();
    driver.stop();
}

/// The object alone remembers that there was something newer. Its owner may insist.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_from_the_past_with_a_witness_from_the_past_is_served_only_by_force() {
    let mut lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("v", 64 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    write(&place, "old");
    let object = driver.volume(&place.id).await;
    let witness = lab.path(&format!("driver/state/witness/{}", object.metadata.uid.clone().unwrap()));
    let of_the_past = fs::read(&witness).unwrap();
    let legs = object.status.unwrap().legs;
    let (survivor, lost) = (lab.number_of(&legs[0].disk), lab.number_of(&legs[1].disk));
    lab.fail_disk(lost);
    write(&place, "new");
    driver.until_ready_is(&place.id, "Degraded").await;
    place.down(&driver.client).await.unwrap();
    driver.kill_node();
    for mount in [survivor, lost].into_iter().filter_map(|disk| lab.mount_of(disk)) {
        run("umount", &[text(&mount)]);
    }
    lab.pull_disk(survivor);
    fs::write(&witness, of_the_past).unwrap();
    driver.start_node().await;
    let refused = place.up(&driver.client).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("stale") && refused.message().contains(&legs[1].leg_id), "{refused}");

    driver.annotate(&place.id, &[("force-leg", "the good one")]).await;
    let refused = place.up(&driver.client).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    driver.annotate(&place.id, &[("force-leg", &legs[1].leg_id)]).await;
    place.up(&driver.client).await.unwrap();
    assert_eq!(read(&place), "old");
    let annotations = driver.volume(&place.id).await.metadata.annotations.unwrap_or_default();
    assert!(!annotations.contains_key("lockstep.io/force-leg"), "it was obeyed, and stays");
    place.down(&driver.client).await.unwrap();
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_whose_object_is_deleted_while_it_is_staged_goes_when_it_is_unstaged_and_not_before() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("v", 64 * MIB, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    let copies = driver.copies(&place.id).await;
    // As kubectl does it: nobody asks csi-controller.
    driver.store.delete::<MirrorVolume>(&place.id, None).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    write(&place, "still there");
    assert!(copies.iter().all(|copy| copy.exists()), "a copy was removed while it was in use");
    place.down(&driver.client).await.unwrap();
    until("gone", || async { driver.store.get::<MirrorVolume>(&place.id).await.unwrap().is_none().then_some(()) }).await;
    assert!(copies.iter().all(|copy| !copy.exists()), "a copy is left");
    driver.stop();
}

async fn stage_with(client: &Client, place: &Place, flags: &[&str]) -> Result<(), Status> {
    let mut capability = capability(place.fs_type, Mode::SingleNodeWriter);
    if let Some(AccessType::Mount(mount)) = &mut capability.access_type {
        mount.mount_flags = flags.iter().copied().map(str::to_owned).collect();
    }
    let request = NodeStageVolumeRequest {
        volume_id: place.id.clone(),
        staging_target_path: text(&place.staging).into(),
        volume_capability: Some(capability),
        ..Default::default()
    };
    client.node().node_stage_volume(request).await.map(drop)
}

fn options_of(path: &Path) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut fields = mounts.lines().map(|line| line.split(' ')).filter(|line| line.clone().nth(1) == Some(text(path)));
    fields.find_map(|mut line| line.nth(3).map(str::to_owned))
}

#[tokio::test(flavor = "multi_thread")]
async fn mount_options_are_used_and_after_one_that_cannot_be_nothing_is_staged() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let (place, client) = (driver.place("v", 64 * MIB, Some("ext4")).await, driver.client.clone());
    let refused = stage_with(&client, &place, &["there-is-no-such-option"]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Internal, "{refused}");
    assert_eq!(options_of(&place.staging), None);
    assert_eq!(driver.volume(&place.id).await.status.unwrap().device, None, "it is half-staged");
    assert!(fs::read_dir(lab.path("driver/state/run")).unwrap().next().is_none(), "its device is left");
    assert!(fs::read_dir(lab.path("driver/state/staged")).unwrap().next().is_none(), "its record is left");

    stage_with(&client, &place, &["noatime", "nodev"]).await.unwrap();
    let options = options_of(&place.staging).unwrap();
    assert!(["noatime", "nodev"].iter().all(|wanted| options.split(',').any(|option| option == *wanted)), "{options}");
    stage_with(&client, &place, &["noatime", "nodev"]).await.unwrap();
    assert_eq!(stage_with(&client, &place, &["nodev"]).await.unwrap_err().code(), Code::AlreadyExists);
    // Read-only by its access mode.
    let mut publish = Client::publish_request(&place.id, &place.staging, &place.target, place.fs_type);
    publish.volume_capability = Some(capability(place.fs_type, Mode::SingleNodeReaderOnly));
    client.node().node_publish_volume(publish).await.unwrap();
    assert_eq!(fs::write(place.target.join("f"), "x").unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    place.down(&client).await.unwrap();
    driver.stop();
}
