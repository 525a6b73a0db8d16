//! The shell of the mirror, with real rings, on two disks that fail as they are told (`faulty`): rounds of load, one kind of trouble each.
//!
//! The budget is the simulator's: host faults and short counts on both disks, fewer than the reissues in a row; what may take a leg OUT on one
//! disk at a time, until the mirror was healthy again. After each round both copies are equal, byte by byte, and hold what was last written.

use std::{
    fmt, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use lockstep_datapath::{
    Datapath, Error, LegPath, Settings, Volume, VolumeSpec,
    core::{
        format,
        io::{Fill, Notice},
        status::{LegState, Status, Sync},
        units::{BLOCK_SIZE, LegId, Slot, VolumeId},
    },
    create_leg, create_witness,
};
use tokio::sync::broadcast;

use crate::{
    faulty::{Counts, Faults, FaultyDisk},
    leg_id, program, remove_dead_runs, run, seen, succeeds, tear_down, text,
};

const PREFIX: &str = "lockstep-soak.";
const MIB: u64 = 64;
const IMAGE_MIB: u64 = 512;
/// Longer than anything takes that does not hang.
const PATIENCE: Duration = Duration::from_secs(100);
/// Legs go OUT by it: late enough for a machine that does other things too.
const DEADLINE: Duration = Duration::from_secs(4);

/// The trouble of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Host faults, short counts, late and reordered completions on both disks: nobody goes OUT.
    Host,
    /// A disk fails reads: repaired, then OUT.
    Reads,
    /// A disk fails writes, in part.
    Writes,
    /// A disk fails flushes.
    Flushes,
    /// A disk fails metadata.
    Metadata,
    /// A disk fails to zero.
    Zeroes,
    /// A disk answers nothing any more; later, everything.
    Hang,
    /// A disk answers most, and a few requests far too late.
    Late,
    /// A disk is full at times: the writers are told, nobody goes OUT.
    NoSpace,
    /// The volume is not closed: resync, on disks with host faults.
    Unclean,
}

impl Trouble {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Host,
        Self::Reads,
        Self::Writes,
        Self::Flushes,
        Self::Metadata,
        Self::Zeroes,
        Self::Hang,
        Self::Late,
        Self::NoSpace,
        Self::Unclean,
    ];

    /// What the troubled disk does beyond the faults of the host.
    fn faults(self, usual: Faults) -> Faults {
        match self {
            Self::Host | Self::Unclean => usual,
            Self::Reads => Faults { read_error: 10, ..usual },
            Self::Writes => Faults { write_error: 20, ..usual },
            Self::Flushes => Faults { flush_error: 2, ..usual },
            // Every one: few are written, the last of them when all is quiet and nothing is dirty any more.
            Self::Metadata => Faults { meta_error: 1, ..usual },
            Self::Zeroes => Faults { zero_error: 2, ..usual },
            Self::Hang => Faults { hold: 1, ..usual },
            Self::Late => Faults { hold: 40, ..usual },
            Self::NoSpace => Faults { no_space: 30, ..usual },
        }
    }

    fn takes_a_leg_out(self) -> bool {
        !matches!(self, Self::Host | Self::NoSpace | Self::Unclean)
    }

    /// What the shell must have seen after a round of it, each of these.
    fn proof(self) -> &'static [&'static str] {
        match self {
            Self::Host | Self::Unclean => &["short read", "EINTR write", "ENOMEM write", "ECANCELED write", "EBUSY write", "EINTR read"],
            Self::Reads => &["EIO read"],
            Self::Writes => &["EIO write"],
            Self::Flushes => &["EIO flush"],
            Self::Metadata => &["EIO metadata"],
            Self::Zeroes => &["EIO zero"],
            Self::Hang | Self::Late => &[],
            Self::NoSpace => &["ENOSPC write"],
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{self:?}")
    }
}

/// The faults of the host, which no leg goes OUT for: three in a hundred requests make no progress, so nine in a row never come.
const USUAL: Faults = Faults {
    short_read: 20,
    host: 50,
    again: 50,
    late: 400,
    late_millis: 900,
    jitter_micros: 1500,
    read_error: 0,
    write_error: 0,
    flush_error: 0,
    meta_error: 0,
    zero_error: 0,
    no_space: 0,
    hold: 0,
};

/// What a round did.
#[derive(Clone, Debug, Default)]
pub struct Done {
    /// What the load counted.
    pub load: Counts,
    /// What both disks counted, since they were started.
    pub disks: Counts,
    /// What the shell saw, since the process started.
    pub seen: Counts,
    /// How long the mirror took to take the hung leg OUT.
    pub out_after: Option<Duration>,
}

/// What the legs lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disks {
    /// The faulty file system itself: what it answers reaches the shell, except EAGAIN of reads and writes, which the kernel tries again, and short
    /// writes, of which it says EIO.
    Files,
    /// XFS on a loop device over a file of it, as in production: what hangs below hangs as a real disk does. (Host faults and short counts end in
    /// the loop driver.)
    Xfs,
}

/// How the disks and the datapath are set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Of the datapath's ring.
    pub ring_entries: u32,
    /// Requests that each disk takes at once.
    pub depth: u16,
    /// Of the load.
    pub threads: u32,
    /// What the legs lie on.
    pub disks: Disks,
}

impl Default for Setup {
    fn default() -> Self {
        Self { ring_entries: Settings::default().ring_entries, depth: 256, threads: 18, disks: Disks::Files }
    }
}

/// Two disks and a volume on them.
#[derive(Debug)]
pub struct Soak {
    disks: [FaultyDisk; 2],
    places: [(PathBuf, PathBuf); 2],
    usual: Faults,
    spec: VolumeSpec,
    datapath: Datapath,
    random: fastrand::Rng,
    next_leg: u8,
    threads: u32,
    dir: tempfile::TempDir,
}

impl Drop for Soak {
    fn drop(&mut self) {
        // While they answer.
        self.disks.iter_mut().for_each(FaultyDisk::release);
        tear_down(self.dir.path());
    }
}

/// A running load, killed if it is dropped.
#[derive(Debug)]
struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        drop(self.0.kill());
        // Its threads may wait for the device: who serves it must not wait for them.
    }
}

/// An XFS on the disk; where it is mounted.
fn on_xfs(disk: &FaultyDisk) -> PathBuf {
    let image = disk.backing.join("image");
    fs::File::create(&image).and_then(|file| file.set_len(IMAGE_MIB << 20)).expect("an image");
    let device = run("losetup", &["--find", "--show", "--direct-io=on", text(&disk.mount.join("image"))]).trim().to_owned();
    run("mkfs.xfs", &["-q", "-K", &device]);
    let at = disk.mount.with_extension("xfs");
    fs::create_dir(&at).expect("a mount point");
    run("mount", &[&device, text(&at)]);
    at
}

/// A volume with this number on both disks: legs are made in the first of each disk's places, and used in the second.
fn new_volume(dir: &Path, places: &[(PathBuf, PathBuf); 2], number: u8, megabytes: u64) -> VolumeSpec {
    let (volume, legs) = (VolumeId([number; 16]), [leg_id(number, 1), leg_id(number, 2)]);
    let blocks = (megabytes << 20) / BLOCK_SIZE;
    for ((made, _), leg) in places.iter().zip(legs) {
        let made = made.join(leg.to_string());
        fs::create_dir(&made).expect("a leg's directory");
        create_leg(&made, megabytes << 20, &format::new_leg(volume, legs, leg, blocks)).expect("a leg");
    }
    let witness = dir.join(format!("witness-{number}"));
    create_witness(&witness, &format::new_witness(volume, legs, blocks)).expect("a witness");
    VolumeSpec {
        volume,
        legs: [0, 1].map(|n: usize| LegPath { dir: places[n].1.join(legs[n].to_string()) }).to_vec(),
        witness,
        seen_epoch: None,
        force: None,
        run_dir: dir.join("run"),
    }
}

/// What a disk that hangs may have all of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllOf {
    /// Memory for large requests.
    Memory,
    /// The kernel's workers: flushes of many volumes, which no ring does by itself.
    Workers,
}

impl AllOf {
    fn volumes(self) -> u8 {
        if self == Self::Workers { 16 } else { 1 }
    }

    /// More than there is of it, for 11 seconds.
    fn load(self, volumes: &[Volume]) -> Child {
        let mut command = Command::new("fio");
        command.args(["--direct=1", "--time_based=1", "--runtime=11", "--output-format=terse", "--verify_state_save=0"]);
        command.args(match self {
            Self::Memory => ["--rw=write", "--bs=1M", "--iodepth=64", "--ioengine=libaio"],
            Self::Workers => ["--rw=randwrite", "--bs=4k", "--fsync=1", "--ioengine=psync"],
        });
        for volume in volumes {
            command.arg(format!("--name={}", volume.name())).arg(format!("--filename={}", text(volume.device())));
        }
        command.stdout(Stdio::null()).spawn().expect("fio is installed")
    }
}

/// For as long as `AllOf::load`; its output is JSON.
fn requests_of_all_sizes(device: &Path) -> Child {
    let mut command = Command::new("fio");
    command.args(["--name=beside", "--direct=1", "--time_based=1", "--runtime=11", "--output-format=json", "--ioengine=libaio"]);
    command.args(["--rw=randrw", "--bsrange=4k-1m", "--blockalign=4k", "--iodepth=4", "--rate_iops=100"]);
    command.arg(format!("--filename={}", text(device))).stdout(Stdio::piped()).spawn().expect("fio is installed")
}

/// Of all its requests.
fn slowest(said: ChildStdout) -> Duration {
    let said = std::io::read_to_string(said).expect("text");
    // It may have a word to say before.
    let said: serde_json::Value = serde_json::from_str(&said[said.find('{').expect("JSON")..]).expect("fio's JSON");
    let of = |kind: &str| said["jobs"][0][kind]["clat_ns"]["max"].as_u64().expect("a time");
    Duration::from_nanos(of("read").max(of("write")))
}

fn healthy(status: &Status) -> bool {
    status.ready && status.sync == Sync::Idle && status.legs.iter().all(|leg| leg.state == LegState::In)
}

async fn wait(volume: &Volume, what: &str, wanted: impl Fn(&Status) -> bool) {
    let mut status = volume.status();
    let found = tokio::time::timeout(PATIENCE, status.wait_for(|status| wanted(status))).await;
    found.unwrap_or_else(|_| panic!("never {what}: {:?}", *volume.status().borrow())).expect("the volume is open");
}

/// When its I/O is over, it is not on its way out any more, and its disk does not say EAGAIN.
async fn attach(volume: &Volume, slot: Slot, (path, fill): (LegPath, Fill)) {
    let begun = Instant::now();
    loop {
        match volume.attach(slot, path.clone(), fill).await {
            Ok(()) => return,
            Err(Error::Mirror(_) | Error::LegBusy { .. } | Error::Io { .. }) if begun.elapsed() < PATIENCE => {}
            Err(error) => panic!("the leg cannot come back: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn same(a: &Path, b: &Path) -> bool {
    succeeds("cmp", &[text(a), text(b)])
}

impl Soak {
    /// A new volume on two new disks, for a load of this many threads.
    pub fn new(seed: u64, setup: Setup) -> Self {
        let Setup { ring_entries, depth, threads, disks: kind } = setup;
        seen::watch();
        remove_dead_runs(PREFIX);
        let prefix = format!("{PREFIX}{}.", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir().expect("a temporary directory");
        let disks = [0, 1].map(|number| FaultyDisk::start(dir.path(), &format!("disk{number}"), seed ^ number, depth));
        // Where legs are made, and where they are used.
        let places = disks.each_ref().map(|disk| match kind {
            Disks::Files => (disk.backing.clone(), disk.mount.clone()),
            Disks::Xfs => {
                let at = on_xfs(disk);
                (at.clone(), at)
            }
        });
        let spec = new_volume(dir.path(), &places, 1, MIB);
        let mut settings = Settings { threads: 1, ring_entries, ..Settings::default() };
        settings.limits.leg_deadline_millis = DEADLINE.as_millis() as u64;
        let datapath = Datapath::start_with(settings, None).expect("a datapath");
        let usual = if kind == Disks::Files { USUAL } else { Faults { jitter_micros: USUAL.jitter_micros, ..Faults::default() } };
        Self { disks, places, usual, spec, datapath, random: fastrand::Rng::with_seed(seed), next_leg: 3, threads, dir }
    }

    /// A volume of the same datapath thread, on directories of the machine's own disk.
    async fn neighbour(&self) -> Volume {
        let places = ["beside0", "beside1"].map(|name| (self.path(name), self.path(name)));
        places.iter().for_each(|(place, _)| fs::create_dir_all(place).expect("a directory"));
        let volume = self.datapath.open(new_volume(self.dir.path(), &places, 99, MIB)).await.expect("the neighbour is opened");
        wait(&volume, "healthy", healthy).await;
        volume
    }

    /// A disk answers nothing any more while it has what the shell has of something. By the deadline it is OUT, and the other one serves; a
    /// volume that has no leg on it does not wait. How long that one's slowest request took.
    pub async fn hung_with(&mut self, all: AllOf) -> Duration {
        let more = (2..=all.volumes()).map(|number| new_volume(self.dir.path(), &self.places, number, 16));
        let specs: Vec<VolumeSpec> = std::iter::once(self.spec.clone()).chain(more).collect();
        let mut volumes = Vec::new();
        for spec in &specs {
            let volume = self.datapath.open(spec.clone()).await.expect("the volume is opened");
            wait(&volume, "healthy", healthy).await;
            volumes.push(volume);
        }
        let neighbour = self.neighbour().await;
        let load = Load(all.load(&volumes));
        let beside = Load(requests_of_all_sizes(neighbour.device()));
        self.until_both_are_busy().await;
        self.disks[1].arm(Faults { hold: 1, ..Faults::default() });
        let begun = Instant::now();
        for volume in &volumes {
            wait(volume, "degraded", |status| status.legs[1].state == LegState::Out).await;
        }
        self.out_with_io_outstanding(&volumes[0], 1, begun).await;
        self.disks[1].release();
        for (volume, spec) in volumes.iter().zip(&specs) {
            let leg = spec.legs[1].clone();
            attach(volume, Slot::B, (leg, Fill::DirtyRegions)).await;
        }
        Self::success(load).await;
        let slowest = slowest(Self::success(beside).await.expect("piped"));
        assert!(slowest < DEADLINE / 2, "a volume that has no leg on the disk waited {slowest:?} for it");
        neighbour.close().await.expect("it is closed");
        for (volume, spec) in volumes.iter().zip(&specs) {
            wait(volume, "healthy", healthy).await;
            volume.close().await.expect("it is closed");
            let [one, other] = [0, 1].map(|n: usize| self.places[n].0.join(spec.legs[n].dir.file_name().expect("a leg")).join("data"));
            assert!(same(&one, &other), "the copies of {} differ", volume.name());
        }
        slowest
    }

    /// What each disk has been given to write.
    fn writes(&mut self) -> [u64; 2] {
        self.disks.each_mut().map(|disk| disk.counts().get("writes").copied().unwrap_or_default())
    }

    /// The load has begun, however slow this machine is.
    async fn until_both_are_busy(&mut self) {
        let (begun, before) = (Instant::now(), self.writes());
        while self.writes().iter().zip(before).any(|(now, before)| *now < before + 200) {
            assert!(begun.elapsed() < PATIENCE, "the load does not begin");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The leg's file in its backing directory, past the faulty file system.
    fn beneath(&self, slot: usize) -> PathBuf {
        let name = self.spec.legs[slot].dir.file_name().expect("a leg's directory");
        self.places[slot].0.join(name).join("data")
    }

    fn load(&mut self, volume: &Volume, seconds: f64, may_fail: bool) -> Load {
        let seed = self.random.u32(1..=u32::MAX);
        let image = self.path("image");
        let mut command = Command::new(program("hammer"));
        command.args([text(volume.device()), &seed.to_string(), &seconds.to_string(), &self.threads.to_string(), text(&image)]);
        if may_fail {
            command.arg("may-fail");
        }
        Load(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("hammer starts"))
    }

    /// Its end, and what it counted.
    async fn ended(load: Load) -> Counts {
        let out = Self::success(load).await.expect("piped");
        let line = BufReader::new(out).lines().next().expect("a line").expect("text");
        serde_json::from_str(&line).expect("counts")
    }

    async fn success(mut load: Load) -> Option<ChildStdout> {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = load.0.try_wait().expect("it was started") {
                break status;
            }
            assert!(begun.elapsed() < PATIENCE, "the load does not end: a request hangs");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert!(status.success(), "the load found an error: see above");
        load.0.stdout.take()
    }

    /// One round of load with this trouble, seconds long, and longer if the mirror has not recovered by then.
    pub async fn round(&mut self, trouble: Trouble, seconds: f64) -> Done {
        let before = seen::counts();
        let troubled = self.random.usize(0..2);
        // Most metadata is written at the beginning, when the volume is opened and regions become dirty: some of it fails then.
        let at_once = if trouble == Trouble::Metadata { Faults { meta_error: 2, ..self.usual } } else { self.usual };
        for (number, disk) in self.disks.iter_mut().enumerate() {
            disk.arm(if number == troubled { at_once } else { self.usual });
        }
        let volume = self.datapath.open(self.spec.clone()).await.expect("the volume is opened");
        let mut notices = volume.notices();
        // A leg that hangs takes its time.
        let hangs = matches!(trouble, Trouble::Hang | Trouble::Late);
        let seconds = if hangs { seconds.max(3.0 * DEADLINE.as_secs_f64()) } else { seconds };
        let load = self.load(&volume, seconds, trouble == Trouble::NoSpace);
        tokio::time::sleep(Duration::from_secs_f64((seconds / 4.0).min(2.0))).await;
        if hangs {
            self.until_both_are_busy().await;
        }
        self.disks[troubled].arm(trouble.faults(self.usual));
        let mut done = Done::default();
        if trouble.takes_a_leg_out() {
            let begun = Instant::now();
            wait(&volume, "degraded", |status| status.legs[troubled].state == LegState::Out).await;
            done.out_after = Some(begun.elapsed());
            if hangs {
                self.out_with_io_outstanding(&volume, troubled, begun).await;
            }
            self.disks[troubled].release();
            self.disks[troubled].arm(self.usual);
            self.heal(&volume, troubled).await;
        }
        done.load = Self::ended(load).await;
        for disk in &mut self.disks {
            disk.release();
        }
        let volume = if trouble == Trouble::Unclean { self.opened_again(volume).await } else { volume };
        wait(&volume, "healthy", healthy).await;
        self.judge_notices(&mut notices, trouble, troubled);
        volume.close().await.expect("it is closed");
        self.compare(&trouble.to_string());
        done.seen = seen::counts();
        for what in trouble.proof() {
            assert!(done.seen.get(*what) > before.get(*what), "{trouble}: the shell saw no {what:?}: {:?}", done.seen);
        }
        for disk in &mut self.disks {
            for (what, count) in disk.counts() {
                *done.disks.entry(what).or_default() += count;
            }
        }
        let Faults { late, again, jitter_micros, .. } = self.usual;
        for (wanted, what) in [(late > 0, "late"), (again > 0, "EAGAIN"), (jitter_micros > 0, "overtook")] {
            assert!(!wanted || done.disks.contains_key(what), "{trouble}: {what:?} never came to be: {:?}", done.disks);
        }
        done
    }

    /// By the deadline, and the other serves; nothing brings the leg back while it has I/O outstanding (mirror rules 25 and 27).
    async fn out_with_io_outstanding(&mut self, volume: &Volume, troubled: usize, begun: Instant) {
        assert!(begun.elapsed() < DEADLINE * 2 + Duration::from_secs(2), "it took {:?}", begun.elapsed());
        let held = self.disks[troubled].counts()["held now"];
        assert!(held > 0, "nothing is outstanding: this proves nothing");
        let before = self.writes()[1 - troubled];
        let path = self.spec.legs[troubled].clone();
        let early = tokio::time::timeout(Duration::from_secs(2), volume.attach(Slot::BOTH[troubled], path, Fill::DirtyRegions)).await;
        assert!(!matches!(early, Ok(Ok(()))), "a leg came back with I/O outstanding");
        assert!(self.writes()[1 - troubled] > before + 20, "the other leg does not serve");
    }

    /// Brings the leg back, as csi-node does.
    async fn heal(&mut self, volume: &Volume, troubled: usize) {
        let path = self.spec.legs[troubled].clone();
        let fill = match volume.readmission(&path).await.expect("its metadata can be read") {
            Some((_, Fill::DirtyRegions)) => (path, Fill::DirtyRegions),
            _ => (self.spare(troubled), Fill::Everything),
        };
        attach(volume, Slot::BOTH[troubled], fill).await;
        wait(volume, "rebuilt", healthy).await;
    }

    /// A new, empty leg in the place of one that is worth nothing any more.
    fn spare(&mut self, slot: usize) -> LegPath {
        let leg: LegId = leg_id(1, self.next_leg);
        self.next_leg = self.next_leg.wrapping_add(1).max(3);
        let beneath = self.places[slot].0.join(leg.to_string());
        fs::create_dir(&beneath).expect("a leg's directory");
        create_leg(&beneath, MIB << 20, &format::spare_leg(self.spec.volume, leg, (MIB << 20) / BLOCK_SIZE)).expect("a leg");
        let old = std::mem::replace(&mut self.spec.legs[slot], LegPath { dir: self.places[slot].1.join(leg.to_string()) });
        let old = self.places[slot].0.join(old.dir.file_name().expect("a leg's directory"));
        fs::remove_dir_all(old).expect("an old leg");
        self.spec.legs[slot].clone()
    }

    /// As after a kill.
    async fn opened_again(&mut self, volume: Volume) -> Volume {
        drop(volume);
        for disk in &mut self.disks {
            disk.arm(self.usual);
        }
        let volume = self.datapath.open(self.spec.clone()).await.expect("the volume is opened again");
        wait(&volume, "resynced", healthy).await;
        assert!(volume.status().borrow().copied_blocks > 0, "nothing was dirty");
        for disk in &mut self.disks {
            disk.release();
        }
        volume
    }

    /// Who failed, and who must not have.
    fn judge_notices(&self, notices: &mut broadcast::Receiver<Notice>, trouble: Trouble, troubled: usize) {
        let mut out = [0, 0];
        loop {
            match notices.try_recv() {
                Ok(Notice::LegOut { slot }) => out[slot.index()] += 1,
                Ok(_) => {}
                Err(broadcast::error::TryRecvError::Lagged(_)) => {}
                Err(_) => break,
            }
        }
        assert_eq!(out[1 - troubled], 0, "{trouble}: the good leg went OUT");
        assert_eq!(out[troubled] > 0, trouble.takes_a_leg_out(), "{trouble}: OUT {} times", out[troubled]);
    }

    fn compare(&self, what: &str) {
        assert!(same(&self.beneath(0), &self.beneath(1)), "{what}: the copies differ");
        assert!(same(&self.path("image"), &self.beneath(0)), "{what}: the copies are not what was read at the end");
    }

    /// Entries of the submission rings of this process, by what the kernel says of them.
    pub fn ring_entries() -> Vec<u64> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc/self/fd").expect("/proc").flatten() {
            if fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().contains("io_uring")) {
                let info = fs::read_to_string(Path::new("/proc/self/fdinfo").join(entry.file_name())).unwrap_or_default();
                let mask = info.lines().find_map(|line| line.strip_prefix("SqMask:"));
                let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim().trim_start_matches("0x"), 16).ok());
                found.extend(mask.map(|mask| mask + 1));
            }
        }
        found
    }

    /// What both disks have counted.
    pub fn disk_counts(&mut self) -> [Counts; 2] {
        self.disks.each_mut().map(FaultyDisk::counts)
    }
}
