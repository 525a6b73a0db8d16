//! `make demo`: the whole of Lockstep on this machine, with real disks images and the ordinary binaries. Ends with an error if anything
//! is not as it is said to be.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use lockstep_csi_tests::{
    client::Place,
    driver::{Driver, until},
    lab::{Lab, alone, identical, text},
    load::{self, Load},
};
use lockstep_native::run;
use lockstep_proto::objects::{DiskPhase, LegState, MirrorVolumeStatus};
use tokio::task::JoinHandle;

const VOLUME_BYTES: u64 = 1 << 30;
const DISK_MIB: u64 = 1600;
const FS: &str = "ext4";
/// Seconds of fio while nothing fails, and while a disk does.
const CALM: u32 = 12;
const STORM: u32 = 30;

/// What the demo says, as it goes.
struct Story {
    began: Instant,
    spinner: ProgressBar,
}

impl Story {
    fn new() -> Self {
        Self { began: Instant::now(), spinner: ProgressBar::hidden() }
    }

    /// A step begins.
    fn step(&mut self, text: &str) {
        self.spinner = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {msg}").expect("a template"));
        self.spinner.enable_steady_tick(Duration::from_millis(100));
        self.spinner.set_message(text.to_owned());
    }

    /// It was as it should be.
    fn done(&self, text: &str) {
        self.spinner.finish_and_clear();
        println!("{:>4} s  ok  {text}", self.began.elapsed().as_secs());
    }
}

/// Dropped in this order: the driver ends before its disks do.
struct Demo {
    driver: Driver,
    lab: Lab,
    place: Place,
    story: Story,
}

impl Demo {
    async fn status(&self) -> MirrorVolumeStatus {
        self.driver.volume(&self.place.id).await.status.unwrap_or_default()
    }

    async fn health(&self) -> String {
        let conditions = self.status().await.conditions;
        conditions.into_iter().find(|condition| condition.type_ == "Ready").map_or(String::new(), |ready| ready.reason)
    }

    async fn until_healthy(&self) {
        until("healthy", || async { (self.health().await == "Healthy").then_some(()) }).await;
    }

    /// The numbers of the disks that the copies are on, by the state that is asked for.
    async fn disks(&self, state: LegState) -> Vec<usize> {
        let legs = self.status().await.legs;
        let mounted = |number: &usize| {
            let mount = self.lab.mount_of(*number).unwrap_or_default();
            legs.iter().any(|leg| leg.state == state && mount.ends_with(&leg.disk))
        };
        (0..3).filter(mounted).collect()
    }

    async fn compare(&self, copies: &[PathBuf]) -> anyhow::Result<()> {
        ensure!(identical(&copies[0], &copies[1]), "the copies differ: {copies:?}");
        let bytes = fs::metadata(&copies[0])?.len();
        self.story.done(&format!(
            "both copies are identical, byte by byte: {} MiB each, compared by cmp after the cache was dropped",
            bytes >> 20
        ));
        Ok(())
    }

    /// fio, and a copy of many files with fsync, both on the mounted volume.
    fn work(&self, seconds: u32) -> (Load, JoinHandle<anyhow::Result<()>>) {
        let load = load::on_files(&self.place.target, seconds);
        let files = self.place.target.join(format!("files-{seconds}"));
        (load, tokio::task::spawn_blocking(move || copy_with_fsync(&files)))
    }
}

/// The kernel's header files of this machine.
fn originals() -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir("/usr/include/linux").context("no files to copy: apt-get install linux-libc-dev")?.flatten();
    let files: Vec<_> = entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    ensure!(!files.is_empty(), "no files to copy are in /usr/include/linux");
    Ok(files)
}

/// Each written and fsynced.
fn copy_with_fsync(to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for original in originals()? {
        let file = to.join(original.file_name().unwrap_or_default());
        fs::copy(&original, &file)?;
        fs::File::open(&file)?.sync_all()?;
    }
    Ok(())
}

/// Whether both times that they were copied there they are what they are on this machine.
fn same_files(at: &Path) -> anyhow::Result<()> {
    for (seconds, original) in
        [CALM, STORM].into_iter().flat_map(|seconds| originals().into_iter().flatten().map(move |file| (seconds, file)))
    {
        let copy = at.join(format!("files-{seconds}")).join(original.file_name().unwrap_or_default());
        ensure!(
            lockstep_native::succeeds("cmp", &["--silent", text(&original), text(&copy)]),
            "{} is not {}",
            copy.display(),
            original.display()
        );
    }
    Ok(())
}

async fn provision() -> anyhow::Result<Demo> {
    let mut story = Story::new();
    story.step("starting csi-node and csi-controller; three blank disks");
    let lab = Lab::new(3, DISK_MIB);
    let driver = Driver::start(&lab).await;
    until("three disks claimed", || async {
        let disks = driver.disks().await;
        (disks.len() == 3 && disks.iter().all(|disk| disk.status.as_ref().is_some_and(|status| status.capacity_bytes > 0))).then_some(())
    })
    .await;
    story.done(&format!("three blank disks of {DISK_MIB} MiB claimed: each has an XFS of ours"));

    story.step("creating a volume");
    let volume = driver.client.create("demo", VOLUME_BYTES, Some(FS)).await?;
    let place = driver.place_of(volume.volume_id, Some(FS));
    place.up(&driver.client).await?;
    let mut demo = Demo { driver, lab, place, story };
    demo.until_healthy().await;
    let device = demo.status().await.device.unwrap_or_default();
    demo.story.done(&format!("a volume of 1 GiB, created, staged ({device}, {FS}) and published through the two CSI sockets"));

    demo.story.step(&format!("{CALM} s of direct I/O: 12 jobs that overlap, 2 that verify; a copy with fsync"));
    let (load, copy) = demo.work(CALM);
    copy.await??;
    ensure!(tokio::task::spawn_blocking(|| load.succeeded()).await?, "fio failed");
    demo.story.done(&format!("{CALM} s of direct I/O, 12 jobs that overlap and 2 that verify, and a copy with fsync: no error"));

    demo.place.down(&demo.driver.client).await?;
    demo.story.step("comparing the copies");
    demo.compare(&demo.driver.copies(&demo.place.id).await).await?;
    Ok(demo)
}

async fn fail_and_rebuild(demo: &mut Demo) -> anyhow::Result<()> {
    demo.story.step("the same load again, and a disk fails under it");
    demo.place.up(&demo.driver.client).await?;
    demo.until_healthy().await;
    let (mut load, copy) = demo.work(STORM);
    let before = demo.disks(LegState::In).await;
    let lost = *before.last().context("no disk is in use")?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    demo.lab.fail_disk(lost);
    until("degraded", || async {
        let conditions = demo.status().await.conditions;
        conditions.into_iter().find(|condition| condition.type_ == "Degraded" && condition.status == "True").map(drop)
    })
    .await;
    ensure!(load.runs(), "fio ended when the disk failed");
    let message =
        demo.status().await.conditions.into_iter().find(|condition| condition.type_ == "Degraded").map(|condition| condition.message);
    demo.story.done(&format!("disk {lost} was shut down by the kernel under load; the volume says: {}", message.unwrap_or_default()));

    let bar = ProgressBar::new(100).with_style(ProgressStyle::with_template("        rebuilding onto the third disk {bar:40} {pos} %")?);
    until("rebuilt", || async {
        let status = demo.status().await;
        if let Some(percent) = status.legs.iter().find_map(|leg| leg.progress_percent) {
            bar.set_position(percent.into());
        }
        let healthy = status.conditions.iter().any(|condition| condition.type_ == "Ready" && condition.reason == "Healthy");
        (healthy && status.legs.iter().all(|leg| leg.state == LegState::In)).then_some(())
    })
    .await;
    bar.finish_and_clear();
    let after = demo.disks(LegState::In).await;
    ensure!(after != before && !after.contains(&lost), "it was not rebuilt onto the third disk: {after:?}");
    ensure!(load.runs(), "fio ended before the rebuild did: the load was too short to prove anything");
    demo.story
        .done(&format!("rebuilt by itself, under load, onto disk {}", after.iter().find(|disk| !before.contains(disk)).unwrap_or(&lost)));

    demo.story.step("the load goes on to its end");
    copy.await??;
    ensure!(tokio::task::spawn_blocking(|| load.succeeded()).await?, "fio saw an error");
    demo.story.done("the load saw no error");
    demo.place.down(&demo.driver.client).await?;
    demo.story.step("comparing the copies");
    let copies = demo.driver.copies(&demo.place.id).await;
    demo.compare(&copies).await?;
    for copy in &copies {
        alone(&demo.lab, copy, FS, same_files).with_context(|| format!("{} does not hold the files", copy.display()))?;
    }
    demo.story.done("each copy alone, loop-mounted read-only without the driver, holds the files");
    Ok(())
}

async fn kill_and_resync(demo: &mut Demo) -> anyhow::Result<()> {
    demo.story.step("SIGKILL for csi-node");
    demo.place.up(&demo.driver.client).await?;
    demo.until_healthy().await;
    let last = demo.place.target.join("last");
    fs::write(&last, "written just before the kill").and_then(|()| fs::File::open(&last)?.sync_all())?;
    demo.driver.kill_node();
    demo.driver.start_node().await;
    demo.place.down(&demo.driver.client).await?;
    demo.place.up(&demo.driver.client).await?;
    demo.until_healthy().await;
    ensure!(fs::read_to_string(&last)? == "written just before the kill", "the last file is not what it was");
    same_files(&demo.place.target).context("the files are not what they were")?;
    let copied =
        demo.status().await.conditions.into_iter().find(|condition| condition.type_ == "Rebuilding").map(|condition| condition.message);
    let copied = copied.unwrap_or_default();
    let mebibytes: u64 =
        copied.split(' ').next().and_then(|number| number.parse().ok()).with_context(|| format!("nothing was resynced: {copied}"))?;
    ensure!(mebibytes < (VOLUME_BYTES >> 20) / 2, "more than the dirty regions: {copied}");
    demo.story.done(&format!("csi-node killed with the volume mounted, unstaged, staged again: the files are there, {copied}"));
    demo.place.down(&demo.driver.client).await?;
    demo.story.step("comparing the copies");
    demo.compare(&demo.driver.copies(&demo.place.id).await).await
}

async fn clean_up(demo: Demo) -> anyhow::Result<()> {
    let Demo { mut driver, lab, place, mut story } = demo;
    story.step("cleaning up");
    driver.client.delete(&place.id).await?;
    until("all space free", || async {
        let disks = driver.disks().await;
        // Not of the failed disk: nobody knows what it has.
        let mut statuses = disks.iter().filter_map(|disk| disk.status.as_ref()).filter(|status| status.phase == DiskPhase::Ready);
        statuses.all(|status| status.allocated_bytes == 0).then_some(())
    })
    .await;
    driver.stop();
    for number in 0..3 {
        if let Some(mount) = lab.mount_of(number) {
            run("umount", &[text(&mount)]);
        }
    }
    let left = lab.left_over();
    ensure!(left.is_empty(), "something is left behind: {left:?}");
    story.done("volume deleted, both processes ended by SIGTERM, nothing is left behind");
    println!("All of it held, in {} s.", story.began.elapsed().as_secs());
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut demo = provision().await?;
    fail_and_rebuild(&mut demo).await?;
    kill_and_resync(&mut demo).await?;
    clean_up(demo).await
}
