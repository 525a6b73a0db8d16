//! A csi-node with many volumes ends under load, and its successor serves them all. With LOCKSTEP_SOAK in the environment (`make soak`) more often.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use lockstep_csi_tests::{
    driver::{Driver, until},
    lab::{Lab, text},
    load::{self, Direct},
    memory::{NODE_MIB, VOLUME_MIB, kib},
};
use lockstep_native::succeeds;

const MIB: u64 = 1 << 20;
const VOLUMES: usize = 50;
/// Behind what fio works on.
const BEHIND: u64 = 12 * MIB;

/// What csi-node has in memory, in KiB, its share of what it shares.
fn memory(driver: &Driver) -> u64 {
    kib(driver.node_id(), "smaps_rollup", "Pss")
}

/// What each volume adds to that.
fn each(driver: &Driver, none: u64) -> u64 {
    memory(driver).saturating_sub(none) / VOLUMES as u64
}

/// When each of them has answered a write that comes now.
fn answers(devices: &[PathBuf]) -> Vec<thread::JoinHandle<Instant>> {
    let write = |device: PathBuf| {
        let mut device = Direct::open(&device).unwrap();
        thread::spawn(move || {
            device.write(BEHIND).unwrap();
            Instant::now()
        })
    };
    devices.iter().cloned().map(write).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_volumes_under_load_are_all_served_on_by_the_next_csi_node() {
    let rounds = if std::env::var_os("LOCKSTEP_SOAK").is_some() { 10 } else { 2 };
    let lab = Lab::new(2, 2400);
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let none = memory(&driver);
    let places = driver.devices_up(VOLUMES, 16 * MIB).await;
    let targets: Vec<PathBuf> = places.iter().map(|place| place.target.clone()).collect();
    let load = load::on_many(targets.iter().map(PathBuf::as_path), 10 + 5 * rounds);
    for round in 0..rounds {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let (killed, what) = (round % 2 == 0, if round % 2 == 0 { "SIGKILL" } else { "SIGTERM" });
        let before = Instant::now();
        if killed {
            driver.kill_node()
        } else {
            driver.terminate_node()
        }
        let over = if killed { before } else { Instant::now() };
        let waiting = answers(&targets);
        driver.start_node().await;
        let mut after: Vec<Duration> = waiting.into_iter().map(|answer| answer.join().expect("a device gave an error") - over).collect();
        after.sort();
        println!(
            "figure: {VOLUMES} volumes under load, {what}: the first served after {:.1?}, the last after {:.1?}; {} KiB of memory each",
            after[0],
            after[VOLUMES - 1],
            each(&driver, none)
        );
        assert!(after[VOLUMES - 1] < Duration::from_secs(30), "not all of them in time");
    }
    println!(
        "figure: the slowest write took {:.1?}; {} KiB each after the load, {} MiB without volumes",
        load.slowest_write(),
        each(&driver, none),
        none / 1024
    );
    let peak = kib(driver.node_id(), "status", "VmHWM");
    assert!(peak <= (NODE_MIB + VOLUMES as u64 * VOLUME_MIB) << 10, "{peak} KiB");
    for place in &places {
        place.down(&driver.client).await.unwrap();
        driver.assert_copies_identical(&place.id).await;
    }
    driver.stop();
}

/// All objects; the directory itself is known by its lock, which stays.
fn move_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten().filter(|entry| entry.file_name() != ".lock") {
        let to = to.join(entry.file_name());
        // csi-node is at work in both: what it has put there meanwhile it puts there again.
        while let Err(error) = fs::rename(entry.path(), &to) {
            assert_eq!(error.kind(), ErrorKind::DirectoryNotEmpty, "{error}");
            drop(fs::remove_dir_all(&to));
        }
    }
}

/// csi-node begins anew with its staged records and its disks alone; what it could not tell anybody meanwhile it tells later, by name.
#[tokio::test(flavor = "multi_thread")]
async fn a_csi_node_without_objects_and_without_a_disk_serves_on_and_says_later_which_disk_it_lacks() {
    let mut lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let place = driver.place("alone", 256 * MIB, None).await;
    place.up(&driver.client).await.unwrap();
    let lost = driver.until_ready_is(&place.id, "Healthy").await.legs[1].disk.clone();
    let number = lab.number_of(&lost);
    let mut load = load::on_device(&place.target, 30);
    std::thread::sleep(Duration::from_secs(2));
    driver.kill_node();
    let objects = driver.node_log().with_file_name("objects");
    let (away, new) = (objects.with_extension("away"), objects.with_extension("new"));
    move_all(&objects, &away);
    // What the killed process had under way ends first.
    let mount = lab.mount_of(number).unwrap();
    until("unmounted", || async { succeeds("umount", &[text(&mount)]).then_some(()) }).await;
    lab.pull_disk(number);
    driver.start_node().await;
    Direct::open(&place.target).unwrap().write(60000 * 4096).unwrap();
    assert!(load.runs(), "the load was over before csi-node was back");
    assert!(load.succeeded(), "the load saw an error, or read what it did not write");
    move_all(&objects, &new);
    move_all(&away, &objects);
    let degraded = driver.until_ready_is(&place.id, "Degraded").await;
    let told = degraded.conditions.iter().find(|condition| condition.type_ == "Degraded").map(|condition| condition.message.clone());
    assert!(told.as_ref().is_some_and(|told| told.contains(&format!("the copy on {lost} is lost"))), "{told:?}");
    assert_eq!(degraded.legs[1].disk, lost);
    place.down(&driver.client).await.unwrap();
    driver.stop();
}
