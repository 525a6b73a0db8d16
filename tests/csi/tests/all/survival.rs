//! csi-node dies, and nobody who uses a volume notices.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lockstep_csi_tests::{
    client::Place,
    driver::{Driver, until},
    lab::{Lab, mounts_at, text},
    load,
};
use lockstep_native::faulty::{Faults, FaultyDisk};
use tokio::task::JoinHandle;
use tonic::Status;

const MIB: u64 = 1 << 20;

async fn copies_are_equal(driver: &Driver, place: &Place) {
    place.down(&driver.client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
}

/// How long a write takes that comes after the kill: the users' stall.
fn first_write(place: &Place, block: u64) -> Duration {
    let mut device = load::Direct::open(&place.target).unwrap();
    let start = Instant::now();
    device.write(block * 4096).unwrap();
    start.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn csi_node_is_killed_again_and_again_under_load_and_nobody_notices() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let files = driver.place("files", 512 * MIB, Some("ext4")).await;
    let block = driver.place("block", 256 * MIB, None).await;
    for place in [&files, &block] {
        place.up(&driver.client).await.unwrap();
    }
    let mut loads = [load::on_files(&files.target, 20), load::on_device(&block.target, 20)];
    for round in 0..6u64 {
        tokio::time::sleep(Duration::from_millis(700 + 300 * round)).await;
        assert!(loads.iter_mut().all(load::Load::runs), "a load ended early");
        driver.kill_node();
        driver.start_node().await;
        println!("round {round}: first write after {:?}", first_write(&block, 60000));
    }
    for load in loads {
        assert!(load.succeeded(), "the load saw an error, or read what it did not write");
    }
    for place in [&files, &block] {
        copies_are_equal(&driver, place).await;
    }
    driver.stop();
}

/// Case 50 of the mirror's rules: the process is killed while a disk hangs, so that it cannot end. The other disk serves by the deadline.
#[tokio::test(flavor = "multi_thread")]
async fn csi_node_is_killed_while_a_disk_hangs_and_the_other_disk_serves() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let place = driver.place("hung", 256 * MIB, None).await;
    place.up(&driver.client).await.unwrap();
    first_write(&place, 0);
    let load = load::on_device(&place.target, 40);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let hung = lab.mount_of(0).unwrap();
    lockstep_native::run("fsfreeze", &["--freeze", text(&hung)]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut remains = driver.kill_hung_node();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(remains.try_wait().unwrap().is_none(), "it ended: nothing of it hangs, and this shows nothing");
    let start = Instant::now();
    driver.start_node().await;
    first_write(&place, 1);
    println!("served after {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(45), "not by the deadline of 30 s");
    assert!(remains.try_wait().unwrap().is_none(), "it ended by itself");
    lockstep_native::run("fsfreeze", &["--unfreeze", text(&hung)]);
    remains.wait().unwrap();
    assert!(load.succeeded(), "the load saw an error, or read what it did not write");
    driver.until_ready_is(&place.id, "Healthy").await;
    copies_are_equal(&driver, &place).await;
    driver.stop();
}

/// The child of a process that was started for this errand.
fn errand(of: u32, name: &str) -> Option<PathBuf> {
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    processes.into_iter().find(|process| {
        let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
        let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse::<u32>().ok());
        parent == Some(of) && fs::read(process.join("cmdline")).is_ok_and(|line| line.starts_with(name.as_bytes()))
    })
}

/// Whether a process of `/proc` is over, reaped or not.
fn ended(process: &Path) -> bool {
    let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with(['Z', 'X']))
}

/// A volume that is being unmounted by a child of csi-node's, on disks that take a while for each step of what that writes back. They do so through csi-node
/// itself: the child ends when the next one serves.
pub(crate) struct Unmounting {
    disks: [FaultyDisk; 2],
    pub(crate) place: Place,
    content: Vec<u8>,
    pub(crate) unstaging: JoinHandle<Result<(), Status>>,
}

impl Unmounting {
    pub(crate) fn disks(lab: &mut Lab) -> [FaultyDisk; 2] {
        [1, 2].map(|seed| lab.add_faulty_disk(1500, seed).1)
    }

    pub(crate) async fn begin(driver: &Driver, mut disks: [FaultyDisk; 2]) -> Self {
        let place = driver.place("files", 512 * MIB, Some("ext4")).await;
        place.up(&driver.client).await.unwrap();
        let content: Vec<u8> = (0..64 * MIB).map(|at| (at / 4096 % 251) as u8).collect();
        fs::write(place.target.join("file"), &content).unwrap();
        driver.client.unpublish(&place.id, &place.target).await.unwrap();
        // Each step of the writing back takes a while from now on, and nothing takes long.
        disks.iter_mut().for_each(|disk| disk.arm(Faults { late: 1, late_millis: 150, ..Faults::default() }));
        let (client, staged) = (driver.client.clone(), place.clone());
        let unstaging = tokio::spawn(async move { client.unstage(&staged.id, &staged.staging).await });
        until("not in the list of mounts any more", || async { (mounts_at(&place.staging) == 0).then_some(()) }).await;
        Self { disks, place, content, unstaging }
    }

    /// Until it is written back it is in use: a caller tries again.
    pub(crate) async fn unstaged(&self, driver: &Driver) {
        until("unstaged", || async { self.place.down(&driver.client).await.ok() }).await;
    }

    /// What was written before is there, and on both copies.
    pub(crate) async fn intact(mut self, driver: &Driver) {
        self.disks.iter_mut().for_each(FaultyDisk::release);
        self.place.up(&driver.client).await.unwrap();
        assert!(fs::read(self.place.target.join("file")).unwrap() == self.content, "what was written before the unmount is not there");
        copies_are_equal(driver, &self.place).await;
    }
}

/// Killed in the middle of an unmount it has to end all the same: who starts the next one may wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn csi_node_that_is_killed_while_it_unmounts_ends_at_once_and_the_next_one_finishes_it() {
    let mut lab = Lab::new(0, 0);
    let disks = Unmounting::disks(&mut lab);
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let mut unmount = Unmounting::begin(&driver, disks).await;
    let unmounting = errand(driver.node_id(), "unmount");
    let killed = Instant::now();
    driver.kill_node();
    let took = killed.elapsed();
    println!("figure: csi-node that was killed in an unmount ended after {took:.1?}");
    assert!(took < Duration::from_secs(2), "it did not end at once: {took:?}");
    (&mut unmount.unstaging).await.unwrap().unwrap_err();
    let unmounting = unmounting.expect("a process of its own unmounts");
    assert!(!ended(&unmounting), "nothing was left to write: this shows nothing");
    let open: Vec<_> = fs::read_dir(unmounting.join("fd")).unwrap().flatten().flat_map(|fd| fs::read_link(fd.path())).collect();
    let its_parents =
        |path: &&PathBuf| path.starts_with(lab.path("")) || ["/dev/fuse", "anon_inode:"].iter().any(|of| text(path).starts_with(of));
    assert_eq!(open.iter().filter(its_parents).count(), 0, "it has {open:?} open");

    driver.start_node().await;
    unmount.unstaged(&driver).await;
    until("an end of the unmount", || async { ended(&unmounting).then_some(()) }).await;
    unmount.intact(&driver).await;
    driver.stop();
}

/// Writes numbers and syncs each, until that fails: the last one that was synced, and the error.
fn numbers_until_an_error(path: &Path) -> std::thread::JoinHandle<(u64, std::io::Error)> {
    let path = path.to_owned();
    std::thread::spawn(move || {
        let mut synced = 0;
        loop {
            let write = || -> std::io::Result<()> {
                let mut file = File::options().create(true).append(true).open(&path)?;
                file.write_all(&(synced + 1_u64).to_le_bytes())?;
                file.sync_all()
            };
            match write() {
                Ok(()) => synced += 1,
                Err(error) => return (synced, error),
            }
        }
    })
}

fn open_files(process: u32) -> Vec<PathBuf> {
    let dir = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    dir.flatten().filter_map(|file| fs::read_link(file.path()).ok()).collect()
}

fn is_on_a_disk(path: &Path) -> bool {
    path.iter().any(|part| part == "disks")
}

/// What `numbers_until_an_error` synced.
fn assert_all_synced_are_there(path: &Path, synced: u64) {
    let found = fs::read(path).unwrap();
    let found: Vec<u64> = found.chunks_exact(8).map(|number| u64::from_le_bytes(number.try_into().unwrap())).collect();
    assert!(found.len() as u64 >= synced && found.iter().zip(1..=synced).all(|(found, wanted)| *found == wanted), "{synced} were synced");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_holder_dies_alone_unnoticed_and_with_csi_node_io_ends_with_an_error_and_nothing_that_was_fsynced_is_lost() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let place = driver.place("files", 256 * MIB, Some("ext4")).await;
    let block = driver.place("block", 64 * MIB, None).await;
    for place in [&place, &block] {
        place.up(&driver.client).await.unwrap();
    }
    let numbers = place.target.join("numbers");
    let writer = numbers_until_an_error(&numbers);

    // Alone, and there is another one before csi-node dies.
    driver.kill_holder();
    tokio::time::sleep(Duration::from_millis(300)).await;
    first_write(&block, 0);
    driver.start_holder();
    until("the new holder has all", || async {
        fs::read_to_string(driver.node_log()).unwrap().contains("the FUSE holder is back").then_some(())
    })
    .await;
    driver.kill_node();
    driver.start_node().await;
    first_write(&block, 1);
    assert!(!writer.is_finished(), "somebody noticed: {:?}", writer.join());

    // Both. A holder has a part in the volumes' connections, and none in their disks.
    let holds = open_files(driver.holder_id());
    assert_eq!(holds.iter().filter(|path| path.ends_with("dev/fuse")).count(), 2, "{holds:?}");
    assert!(!holds.iter().any(|path| is_on_a_disk(path)), "{holds:?}");
    assert!(open_files(driver.node_id()).iter().any(|path| is_on_a_disk(path)), "legs are somewhere else: this shows nothing");
    driver.kill_holder();
    driver.kill_node();
    let killed = Instant::now();
    until("an error", || async { writer.is_finished().then_some(()) }).await;
    println!("figure: users of a volume without csi-node and holder got an error after {:.1?}", killed.elapsed());
    let (synced, error) = writer.join().unwrap();
    let raw = [libc::EIO, libc::EROFS];
    assert!(error.raw_os_error().is_some_and(|errno| raw.contains(&errno)), "{error}");
    assert!(synced > 0, "nothing was synced: this shows nothing");
    let device = File::open(&block.target).and_then(|device| std::os::unix::fs::FileExt::read_at(&device, &mut [0; 4096], 32 << 20));
    assert_eq!(device.unwrap_err().raw_os_error(), Some(libc::EIO));

    driver.start_holder();
    driver.start_node().await;
    for place in [&place, &block] {
        place.down(&driver.client).await.unwrap();
        place.up(&driver.client).await.unwrap();
    }
    assert_all_synced_are_there(&numbers, synced);
    for place in [&place, &block] {
        copies_are_equal(&driver, place).await;
    }
    assert_eq!(lab.left_over().iter().filter(|left| left.contains("staging")).count(), 0);
    driver.stop();
}

/// `uname` says 2.6 to csi-node: what that kernel cannot do is known by its version alone.
#[tokio::test(flavor = "multi_thread")]
async fn on_an_old_kernel_a_restart_ends_devices_at_once_as_csi_node_says_and_staging_again_brings_the_files_back() {
    let lab = Lab::new(2, 1500);
    let mut driver = Driver::start(&lab).await;
    driver.start_node_by(&["setarch", "--uname-2.6"]);
    driver.use_holder().await;
    let said = |what: &str| fs::read_to_string(driver.node_log()).unwrap().contains(what);
    assert!(said("older than Linux 6.9") && said("the running pods of its volumes get I/O errors and must be restarted"));
    let place = driver.place("files", 256 * MIB, Some("ext4")).await;
    let block = driver.place("block", 64 * MIB, None).await;
    for place in [&place, &block] {
        place.up(&driver.client).await.unwrap();
    }
    let numbers = place.target.join("numbers");
    let writer = numbers_until_an_error(&numbers);
    tokio::time::sleep(Duration::from_secs(1)).await;
    driver.kill_node();
    let mut device = load::Direct::open(&block.target).unwrap();
    let waiting = std::thread::spawn(move || device.write(0));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!waiting.is_finished() && !writer.is_finished(), "nobody waits: this shows nothing");
    driver.start_node().await;
    let ready = Instant::now();
    until("an error", || async { (waiting.is_finished() && writer.is_finished()).then_some(()) }).await;
    let took = ready.elapsed();
    println!("figure: users of a volume on an old kernel got an error {took:.1?} after the next csi-node was ready");
    assert!(took < Duration::from_secs(5), "they hung for {took:?}");
    assert_eq!(waiting.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    let (synced, error) = writer.join().unwrap();
    assert!(matches!(error.raw_os_error(), Some(libc::EIO | libc::EROFS)), "{error}");
    assert!(synced > 0, "nothing was synced: this shows nothing");

    for place in [&place, &block] {
        place.down(&driver.client).await.unwrap();
        place.up(&driver.client).await.unwrap();
    }
    assert_all_synced_are_there(&numbers, synced);
    first_write(&block, 0);
    for place in [&place, &block] {
        copies_are_equal(&driver, place).await;
    }
    driver.stop();
}
