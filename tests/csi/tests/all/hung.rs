//! Disks that answer nothing any more, with much in flight, and what goes on meanwhile. With LOCKSTEP_SOAK in the environment (`make soak`) in more
//! ways than one.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use lockstep_csi_tests::{
    client::Place,
    driver::{Driver, replug, until},
    lab::{Lab, text},
    load,
};
use lockstep_native::{
    faulty::{Faults, FaultyDisk},
    frozen::Frozen,
};
use lockstep_proto::objects::{DiskPhase, LegState};

const MIB: u64 = 1 << 20;
/// Of a leg's I/O (mirror rule 27).
const DEADLINE: Duration = Duration::from_secs(30);

fn soaking() -> bool {
    std::env::var_os("LOCKSTEP_SOAK").is_some()
}

/// How a disk is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// What is below its file system answers nothing.
    Silent,
    /// Its file system is frozen: writes wait, each on a worker of the kernel's.
    Frozen,
    /// Its file system is shut down: everything fails.
    ShutDown,
}

/// A lost disk. Dropped, as when a test fails, it does what it held: csi-node could not end before.
struct Lost {
    disk: FaultyDisk,
    frozen: Option<Frozen>,
}

impl Lost {
    /// It does not hang any more.
    fn ends(&mut self) {
        self.disk.release();
        self.frozen = None;
    }
}

impl Drop for Lost {
    fn drop(&mut self) {
        self.ends();
    }
}

impl Loss {
    fn happens(self, lab: &Lab, number: usize, mut disk: FaultyDisk) -> Lost {
        let mount = lab.mount_of(number).expect("the disk is mounted");
        let mut frozen = None;
        match self {
            Self::Silent => disk.arm(Faults { hold: 1, ..Faults::default() }),
            Self::Frozen => frozen = Some(Frozen::freeze(&mount)),
            Self::ShutDown => lab.fail_disk(number),
        }
        Lost { disk, frozen }
    }
}

/// Writes small files under a directory and syncs each, on a thread of its own, until it is asked how long the slowest took.
struct Neighbour {
    stop: Arc<AtomicBool>,
    writer: JoinHandle<std::io::Result<(u32, Duration)>>,
}

impl Neighbour {
    fn of(dir: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, path) = (Arc::clone(&stop), dir.join("neighbour"));
        let writer = std::thread::spawn(move || {
            let (mut files, mut slowest) = (0, Duration::ZERO);
            while !stopped.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let mut file = File::create(&path)?;
                // Requests of all sizes.
                file.write_all(&vec![7; if files % 4 == 0 { 2 << 20 } else { 8 << 10 }])?;
                file.sync_all()?;
                (files, slowest) = (files + 1, slowest.max(begun.elapsed()));
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok((files, slowest))
        });
        Self { stop, writer }
    }

    fn slowest(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let (files, slowest) = self.writer.join().expect("it does not panic").expect("a neighbour saw an error");
        println!("figure: a neighbour: {files} files, the slowest in {slowest:.1?}");
        slowest
    }
}

async fn made(driver: &Driver, name: &str, bytes: u64, fs_type: Option<&'static str>) -> Place {
    let place = driver.place(name, bytes, fs_type).await;
    place.up(&driver.client).await.unwrap_or_else(|error| panic!("{name}: {error}"));
    driver.until_ready_is(&place.id, "Healthy").await;
    place
}

async fn until_ready_disks(driver: &Driver, count: usize) {
    let ready = async || {
        let disks = driver.disks().await;
        disks.iter().filter(|disk| disk.status.as_ref().is_some_and(|status| status.phase == DiskPhase::Ready)).count()
    };
    until("enough disks", || async { (ready().await == count).then_some(()) }).await;
}

/// The name of the lab's disk.
fn name_of(lab: &Lab, number: usize) -> String {
    let mount = lab.mount_of(number).expect("the disk is mounted");
    mount.file_name().expect("a name").to_string_lossy().into_owned()
}

/// Requests that a volume's device has accepted and not answered.
fn in_flight(target: &Path) -> u64 {
    let meta = fs::metadata(target).expect("a target");
    let device = if meta.rdev() == 0 { meta.dev() } else { meta.rdev() };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let counts = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/inflight")).expect("its device");
    counts.split_whitespace().map(|count| count.parse::<u64>().expect("a number")).sum()
}

/// One fio: each device written at random, by requests of this size, so many at a time.
fn flood(devices: &[(&Path, &str, u32)], seconds: u32) -> Child {
    let mut command = Command::new("fio");
    command.args(["--direct=1", "--ioengine=libaio", "--rw=randwrite", "--size=32m", "--time_based=1", "--output-format=terse"]);
    command.arg(format!("--runtime={seconds}"));
    for (number, (device, size, depth)) in devices.iter().enumerate() {
        command.arg(format!("--name=flood{number}")).arg(format!("--filename={}", text(device)));
        command.arg(format!("--bs={size}")).arg(format!("--iodepth={depth}"));
    }
    command.stdout(Stdio::null()).spawn().expect("fio is installed")
}

/// Pulled, plugged in again, and everything is as it was.
async fn healed(lab: &mut Lab, driver: &Driver, number: usize, places: &[Place]) {
    replug(lab, number).await;
    for place in places {
        driver.until_ready_is(&place.id, "Healthy").await;
        place.down(&driver.client).await.unwrap();
        driver.assert_copies_identical(&place.id).await;
    }
}

/// Mirror rules 25 and 27, case 36: the legs on it are OUT by the deadline, the others serve, csi-node does its work; volumes of the same datapath
/// threads that have no leg on it do not notice; and what the disk does when it wakes up harms nobody.
async fn a_disk_hangs_with_256_requests_in_flight(loss: Loss) {
    let mut lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    driver.use_probes().await;
    // One on each datapath thread. They leave no room for others' legs.
    let neighbours =
        [made(&driver, "neighbour1", 450 * MIB, Some("ext4")).await, made(&driver, "neighbour2", 450 * MIB, Some("xfs")).await];
    let (hung, disk) = lab.add_faulty_disk(3000, 36);
    lab.add_disk(3000);
    until_ready_disks(&driver, 4).await;
    let files = made(&driver, "files", 512 * MIB, Some("ext4")).await;
    let mut places = vec![files.clone()];
    for number in 0..3 {
        places.push(made(&driver, &format!("bare{number}"), 256 * MIB, None).await);
    }
    let hung_name = name_of(&lab, hung);
    for place in neighbours.iter().chain(&places) {
        let on_it = driver.status(&place.id).await.legs.iter().any(|leg| leg.disk == hung_name);
        assert_eq!(on_it, !neighbours.iter().any(|neighbour| neighbour.id == place.id), "{} is elsewhere", place.id);
    }
    let bare: Vec<PathBuf> = places[1..].iter().map(|place| place.target.clone()).collect();
    let load = load::on_files(&files.target, 50);
    let mut flood = flood(&[(&bare[0], "4k", 128), (&bare[1], "4k", 128), (&bare[2], "1m", 64)], 50);
    tokio::time::sleep(Duration::from_secs(3)).await;

    let beside = neighbours.each_ref().map(|place| Neighbour::of(&place.target));
    let lives = driver.must_live();
    let mut lost = loss.happens(&lab, hung, disk);
    let begun = Instant::now();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let waiting: u64 = places.iter().map(|place| in_flight(&place.target)).sum();
    for place in &places {
        let degraded = driver.until_ready_is(&place.id, "Degraded").await;
        assert_eq!(degraded.legs.iter().filter(|leg| leg.state == LegState::Out).count(), 1);
    }
    let out_after = begun.elapsed();
    let slowest = beside.map(Neighbour::slowest);
    println!("figure: {loss:?}: {waiting} requests in flight, OUT after {out_after:.1?}");
    assert!(waiting >= 256, "{waiting} requests wait for the disk: this proves nothing");
    assert!(out_after > DEADLINE - Duration::from_secs(3) && out_after < DEADLINE * 3 / 2, "{out_after:?}");
    assert!(slowest.iter().all(|slowest| *slowest < DEADLINE / 3), "the neighbours waited too: {slowest:?}");
    // It serves, and answers calls.
    let file = files.target.join("meanwhile");
    fs::write(&file, "written while a disk hung").and_then(|()| File::open(&file)?.sync_all()).unwrap();
    assert!(driver.client.node_ready().await, "csi-node does not answer");
    until("the disk said to have failed", || async {
        let failed = driver.disks().await.into_iter().filter(|disk| disk.status.as_ref().is_some_and(|it| it.phase == DiskPhase::Failed));
        (failed.count() == 1).then_some(())
    })
    .await;

    lost.ends();
    assert!(!lives.is_finished(), "a disk that hangs is no reason to start csi-node again: {:?}", lives.await);
    lives.abort();
    assert!(load.succeeded() && flood.wait().unwrap().success(), "the load saw an error");
    healed(&mut lab, &driver, hung, &places).await;
    places[0].up(&driver.client).await.unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "written while a disk hung");
    for place in neighbours.iter().chain(&places[..1]) {
        place.down(&driver.client).await.unwrap();
    }
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_hangs_with_256_requests_in_flight_is_out_by_the_deadline_and_the_neighbours_go_on() {
    a_disk_hangs_with_256_requests_in_flight(Loss::Silent).await;
    if soaking() {
        a_disk_hangs_with_256_requests_in_flight(Loss::Frozen).await;
    }
}

/// Each of them has a record to write, all at once, on the same witness disk.
async fn fifty_volumes_lose_a_disk(loss: Loss) {
    const VOLUMES: usize = 50;
    let mut lab = Lab::new(1, 3000);
    let (lost_disk, disk) = lab.add_faulty_disk(3000, 50);
    let mut driver = Driver::start(&lab).await;
    until_ready_disks(&driver, 2).await;
    let places = driver.devices_up(VOLUMES, 16 * MIB).await;
    for place in &places {
        driver.until_ready_is(&place.id, "Healthy").await;
    }
    let seconds = if loss == Loss::ShutDown { 12 } else { 50 };
    let load = load::on_many(places.iter().map(|place| place.target.as_path()), seconds);
    tokio::time::sleep(Duration::from_secs(4)).await;

    let mut lost = loss.happens(&lab, lost_disk, disk);
    let begun = Instant::now();
    for place in &places {
        driver.until_ready_is(&place.id, "Degraded").await;
    }
    let out_after = begun.elapsed();
    if loss != Loss::ShutDown {
        assert!(out_after < DEADLINE * 3 / 2, "{out_after:?}");
    }
    let slowest = load.slowest_write();
    println!("figure: {loss:?}: {VOLUMES} volumes degraded after {out_after:.1?}, their slowest write took {slowest:.1?}");
    lost.ends();
    healed(&mut lab, &driver, lost_disk, &places).await;
    driver.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_volumes_that_lose_a_disk_at_once_all_go_on() {
    fifty_volumes_lose_a_disk(Loss::ShutDown).await;
    if soaking() {
        fifty_volumes_lose_a_disk(Loss::Frozen).await;
        fifty_volumes_lose_a_disk(Loss::Silent).await;
    }
}
