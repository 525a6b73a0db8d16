//! The life of a volume, call by call.
#![allow(missing_docs)]

use std::{fs, path::Path};

use lockstep_csi_tests::{
    client::{Client, Place, capability},
    driver::Driver,
    lab::{Lab, alone, identical, text},
};
use lockstep_native::{run, succeeds};
use lockstep_proto::{
    csi::{volume_capability::access_mode::Mode, volume_usage::Unit},
    objects::{DiskPhase, VolumePhase},
};
use tonic::Code;

const MIB: u64 = 1 << 20;

async fn place(lab: &Lab, driver: &Driver, name: &str, bytes: u64, fs_type: Option<&'static str>) -> Place {
    let volume = driver.client.create(name, bytes, fs_type).await.expect("it is created");
    Place { id: volume.volume_id, fs_type, staging: lab.path(&format!("staging-{name}")), target: lab.path(&format!("target-{name}")) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_lives_on_two_identical_copies_that_can_each_be_read_alone() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    for fs_type in ["ext4", "xfs"] {
        let place = place(&lab, &driver, fs_type, 400 * MIB, Some(fs_type)).await;
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
