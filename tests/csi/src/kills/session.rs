//! Brings about the phases, ends csi-node in them, and looks at what is left.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use lockstep_native::{frozen::Frozen, limit, run as command};
use rustix::process::Signal;
use tokio::task::JoinHandle;
use tonic::Status;

use super::{
    End, Kind, Phase, Plan, Report,
    end::{ends, exhaust, signal, threads},
    loads::{self, Loads, Seen, Used},
    log::Log,
    postgres,
};
use crate::{
    client::Place,
    driver::{Driver, until},
    lab::{Lab, alone, text},
    load,
    memory::MemoryGroup,
};

const MIB: u64 = 1 << 20;
/// What a slow disk does in a second: bytes and operations.
const SLOW: (u64, u64) = (24 * MIB, 250);
/// One that is slower still: a record of three writes is soon made.
const SLOWER: (u64, u64) = (8 * MIB, 60);
/// One that is not slow.
const FAST: (u64, u64) = (0, 0);
/// A phase that does not come about in this time does not.
const PATIENCE: Duration = Duration::from_secs(20);
/// So long nothing is to be made good, and all is well.
const CALM: Duration = Duration::from_millis(400);
/// The disk that hangs and the one that fails.
const DISK: usize = 1;
/// What is in the page cache when a volume is unstaged.
static DIRTY: &[u8] = &[7; 8 << 20];

struct Session {
    driver: Driver,
    memory: Option<MemoryGroup>,
    lab: Lab,
    plan: Plan,
    log: Log,
    seen: Arc<Seen>,
    report: Report,
    /// In use all the time.
    used: Used,
    /// Comes and goes.
    churn: Place,
    /// How many were formatted, and how many csi-nodes started.
    new: usize,
    started: usize,
    /// Ends that nothing was answered after yet.
    unanswered: Vec<(Kind, Vec<Phase>, Instant)>,
    random: u64,
}

/// What csi-node was asked when it ended.
type Call = JoinHandle<Result<(), Status>>;

/// Carries out a plan.
pub async fn run(mut plan: Plan) -> Report {
    let lab = Lab::new(2, 2400);
    // PostgreSQL does not run as root.
    fs::set_permissions(lab.path("."), fs::Permissions::from_mode(0o711)).expect("it is ours");
    let mut driver = Driver::start(&lab).await;
    driver.start_holder();
    driver.terminate_node();
    let memory = MemoryGroup::new("lockstep-kills");
    if memory.is_none() {
        plan.kinds.retain(|kind| *kind != Kind::OutOfMemory);
    }
    let report = Report { start: time_to_start(&plan.builds[0]), phases: plan.phases.clone(), ..Report::default() };
    let place = |name: &str, fs_type| driver.place_of(name.into(), fs_type);
    let used = Used { block: place("block", None), files: place("files", Some("ext4")), database: place("database", Some("xfs")) };
    let mut session = Session {
        log: Log::open(&log_path(&lab, 0)),
        churn: place("churn", Some("ext4")),
        used,
        random: plan.seed | 1,
        memory,
        lab,
        driver,
        plan,
        seen: Arc::default(),
        report,
        new: 0,
        started: 0,
        unanswered: Vec::new(),
    };
    session.start_node();
    session.ready().await;
    session.create_volumes().await;

    let loads = Loads::start(&session.lab, &session.used, &session.seen);
    until("every load at work", || async { (session.seen.all_at_work() || session.has_errors()).then_some(()) }).await;
    session.healthy(None).await;
    let mut steps = session.plan.steps();
    while session.report.ends.len() < session.plan.ends && !session.has_errors() {
        let (phase, kind) = steps.next().expect("it has no end");
        session.one(phase, kind).await;
    }
    // What did not come about when it was its turn.
    let most = session.plan.ends * 3 / 2;
    while session.report.ends.len() < most && !session.has_errors() {
        let Some((phase, kind)) = session.report.wanting(&session.plan) else { break };
        session.one(phase, kind).await;
    }
    session.report.missing = session.report.wanting(&session.plan);
    loads.end();
    session.judge().await
}

fn log_path(lab: &Lab, number: usize) -> PathBuf {
    lab.path(&format!("csi-node.{number}.log"))
}

fn time_to_start(build: &Path) -> Duration {
    let started = Instant::now();
    command(text(build), &["--version"]);
    started.elapsed()
}

impl Session {
    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    fn has_errors(&self) -> bool {
        !self.seen.errors.lock().expect("no holder panics").is_empty()
    }

    /// Starts a csi-node with a log of its own; gives the log of the one before.
    fn start_node(&mut self) -> Log {
        let path = log_path(&self.lab, self.started);
        let build = &self.plan.builds[self.started % self.plan.builds.len()];
        // Not the first one, which mounts what is used: the pages of those file systems are not its group's then. They would be what is freed there, and
        // who waits for one that is being written to a volume waits for csi-node.
        let group = self.memory.as_ref().filter(|_| self.started > 0);
        self.started += 1;
        self.driver.spawn_node(build, &path, group);
        std::mem::replace(&mut self.log, Log::open(&path))
    }

    async fn ready(&self) {
        until("a node that is ready", || async { self.driver.client.node_ready().await.then_some(()) }).await;
    }

    /// The copies of a volume that is not used.
    async fn compare(&mut self, place: &Place) -> Vec<PathBuf> {
        let copies = self.driver.copies(&place.id).await;
        self.report.mismatched += differing(&copies[0], &copies[1]);
        copies
    }

    async fn create_volumes(&mut self) {
        for (place, mebibytes) in self.used.all().into_iter().chain([&self.churn]).zip([640, 192, 400, 64]) {
            let volume = self.driver.client.create(&place.id, mebibytes * MIB, place.fs_type).await.expect("it is created");
            assert_eq!(volume.volume_id, place.id, "a volume is named as it was asked for");
        }
        for place in self.used.all() {
            place.up(&self.driver.client).await.expect("it is staged");
        }
        self.bring_up(&self.churn).await;
        self.take_down(&self.churn).await;
    }

    /// Until this csi-node says so, and the object: that may be its predecessor's word.
    async fn healthy(&mut self, also: Option<&Place>) {
        let places: Vec<Place> = self.used.all().into_iter().chain(also).cloned().collect();
        let deadline = Instant::now() + 3 * PATIENCE;
        let mut since = None;
        while since.is_none_or(|since: Instant| since.elapsed() < CALM) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            self.log.read();
            let (mut well, mut uids) = (true, Vec::new());
            for place in &places {
                let volume = self.driver.volume(&place.id).await;
                uids.push(volume.metadata.uid.expect("a stored object"));
                let status = volume.status.unwrap_or_default();
                well &= status.conditions.iter().any(|condition| condition.type_ == "Ready" && condition.reason == "Healthy");
            }
            well &= self.log.is_calm(uids.iter());
            since = if well { since.or_else(|| Some(Instant::now())) } else { None };
            if self.has_errors() {
                return;
            }
            assert!(Instant::now() < deadline, "never healthy again");
        }
    }

    fn disks_are(&self, speed: (u64, u64)) {
        let limited = |disk| limit(self.lab.device(disk), speed.0, speed.1);
        if !(0..self.lab.disks()).all(limited) && speed != FAST {
            println!("no blkio controller of cgroup v1 with throttling: the phases are short");
        }
    }

    /// Until csi-node says that it is in this phase.
    async fn wait_for(&mut self, phase: Phase) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.log.read();
            if self.log.phases().contains(&phase) {
                return;
            }
            if Instant::now() >= deadline {
                return println!("no {phase} came about");
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Ends csi-node in this phase, starts the next one, and waits until all is well.
    async fn one(&mut self, phase: Phase, kind: Kind) {
        let mut call: Option<(Place, Call)> = None;
        match phase {
            Phase::Normal | Phase::Hung => {}
            Phase::BitmapSet | Phase::BitmapClear => self.disks_are(SLOW),
            Phase::Recovery | Phase::Resync => {
                self.disks_are(SLOW);
                self.end(kind, None).await;
            }
            Phase::OutRecord => {
                self.disks_are(SLOWER);
                self.lab.fail_disk(DISK);
            }
            Phase::Rebuild => {
                self.lab.fail_disk(DISK);
                tokio::time::sleep(Duration::from_secs(1)).await;
                self.disks_are(SLOW);
                self.end(kind, None).await;
            }
            Phase::Assembly | Phase::Stage => {
                self.disks_are(SLOW);
                call = Some((self.churn.clone(), self.stage(&self.churn)));
            }
            Phase::Mkfs => {
                self.new += 1;
                let place = self.driver.place(&format!("new{}", self.new), 64 * MIB, Some("ext4")).await;
                self.disks_are(SLOW);
                call = Some((place.clone(), self.stage(&place)));
            }
            Phase::Unstage => {
                let place = self.churn.clone();
                self.bring_up(&place).await;
                fs::write(place.target.join("dirty"), DIRTY).expect("the volume works");
                self.disks_are(SLOW);
                let (client, of) = (self.driver.client.clone(), place.clone());
                call = Some((place, tokio::spawn(async move { of.down(&client).await })));
            }
        }
        match phase {
            Phase::Normal | Phase::Hung => tokio::time::sleep(Duration::from_millis(100 + self.random(700))).await,
            _ => self.wait_for(phase).await,
        }
        let frozen = (phase == Phase::Hung).then(|| Frozen::freeze(&self.lab.mount_of(DISK).expect("the disk is mounted")));
        let delay = if frozen.is_some() { 300 } else { self.random(4) };
        tokio::time::sleep(Duration::from_millis(delay)).await;
        self.end(kind, frozen).await;
        self.disks_are(FAST);
        self.answered().await;
        self.ready().await;
        if let Some((place, call)) = call {
            drop(call.await);
            if phase == Phase::Unstage {
                self.take_down(&place).await;
            }
            self.bring_up(&place).await;
            if phase == Phase::Unstage {
                let found = fs::read(place.target.join("dirty")).expect("the volume works");
                self.report.mismatched += loads::differences(&found, DIRTY);
            }
            self.healthy(Some(&place)).await;
            self.take_down(&place).await;
            self.compare(&place).await;
            if phase == Phase::Mkfs {
                self.driver.client.delete(&place.id).await.expect("it is deleted");
            }
        }
        self.healthy(None).await;
    }

    fn stage(&self, place: &Place) -> Call {
        let (client, place) = (self.driver.client.clone(), place.clone());
        tokio::spawn(async move { client.stage(&place.id, &place.staging, place.fs_type).await })
    }

    /// As kubelet: again and again.
    async fn bring_up(&self, place: &Place) {
        until("it is staged", || async { said(place.up(&self.driver.client).await) }).await;
    }

    async fn take_down(&self, place: &Place) {
        until("it is unstaged", || async { said(place.down(&self.driver.client).await) }).await;
    }

    /// Ends csi-node and starts the next one at once. A frozen disk is thawed after a while.
    async fn end(&mut self, mut kind: Kind, frozen: Option<Frozen>) {
        let mut node = self.driver.take_node();
        let mut over = Instant::now();
        let (mut asked_in, mut hog) = (None, None);
        match kind {
            Kind::Kill => signal(&node, Signal::KILL),
            Kind::Abort => signal(&node, Signal::ABORT),
            Kind::Term => {
                // What it says from there on is not what it was asked in.
                self.log.read();
                asked_in = Some(self.log.phases());
                signal(&node, Signal::TERM);
            }
            Kind::OutOfMemory => {
                let (who, killed) = exhaust(self.memory.as_ref().expect("it was planned"), &mut node);
                hog = Some(who);
                over = Instant::now();
                if !killed {
                    println!("nobody is killed for want of memory: SIGKILL");
                    kind = Kind::Kill;
                    signal(&node, Signal::KILL);
                }
            }
        }
        // At once: it may end only when its successor serves what a thread of it waits for.
        let mut log = self.start_node();
        let hung = frozen.is_some();
        if let Some(frozen) = frozen {
            tokio::time::sleep(Duration::from_millis(1000 + self.random(1500))).await;
            drop(frozen);
        }
        let Some(status) = ends(&mut node, 3 * PATIENCE) else {
            panic!("csi-node does not end:\n{}\nand its successor:\n{}", threads(node.id()), threads(self.driver.node_id()));
        };
        assert!(kind.ended_so(status), "{kind}: csi-node's end was another one: {status}");
        if let Some(mut hog) = hog {
            assert!(ends(&mut hog, 3 * PATIENCE).is_some(), "who took the memory does not end:\n{}", threads(hog.id()));
        }
        if kind == Kind::Term {
            over = Instant::now();
        }
        log.read();
        let mut phases = asked_in.unwrap_or_else(|| log.phases());
        if hung {
            phases.push(Phase::Hung);
        }
        if phases.is_empty() {
            phases.push(Phase::Normal);
        }
        self.unanswered.push((kind, phases, over));
    }

    /// Until somebody's request is answered that came after the last end.
    async fn answered(&mut self) {
        let Some((_, _, last)) = self.unanswered.last() else { return };
        let last = *last;
        let served = || self.seen.requests.lock().expect("no holder panics").last().is_some_and(|(begun, _)| *begun > last);
        until("an answer", || async { (served() || self.has_errors()).then_some(()) }).await;
        for (kind, phases, over) in std::mem::take(&mut self.unanswered) {
            let (stall, until) = self.seen.stall(over).unwrap_or((Duration::ZERO, over));
            let answered = (over == last).then(|| until.saturating_duration_since(over));
            println!("{:>4} {kind} {phases:?}: stall {stall:.1?}, answered after {answered:.1?}", self.report.ends.len() + 1);
            self.report.ends.push(End { kind, phases, stall, answered });
        }
    }

    /// What is left, as programs see it that share no code with the datapath.
    async fn judge(mut self) -> Report {
        let Seen { errors, mismatched, records, rows, .. } = &*self.seen;
        let (records, rows) = (records.load(Ordering::Relaxed), rows.load(Ordering::Relaxed));
        self.report.errors = errors.lock().expect("no holder panics").clone();
        self.report.mismatched = mismatched.load(Ordering::Relaxed);
        self.report.commits = records + rows;
        // What fio wrote last it has not read.
        if !load::verified_on_device(&self.used.block.target) {
            self.report.errors.push("fio: something is not what was written last".into());
        }
        let used = self.used.clone();
        for place in used.all() {
            self.take_down(place).await;
            let copies = self.compare(place).await;
            for copy in &copies {
                if place.id == used.files.id {
                    self.report.lost += alone(&self.lab, copy, "ext4", |dir| loads::lost(dir, records));
                } else if place.id == used.database.id {
                    let lost = postgres::lost(copy, "xfs", &self.lab.path("alone"), rows);
                    self.report.lost += lost.unwrap_or_else(|error| {
                        self.report.errors.push(format!("PostgreSQL on one copy: {error}"));
                        rows
                    });
                }
            }
        }
        println!(
            "{records} records fsynced, {rows} rows committed, {} requests timed",
            self.seen.requests.lock().expect("no holder panics").len()
        );
        if self.report.is_clean() {
            self.driver.stop();
        }
        self.report.clone()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A loop device keeps its limits for whoever has it next.
        self.disks_are(FAST);
        if std::thread::panicking() || !self.report.is_clean() {
            let kept = std::env::temp_dir().join(format!("kills-logs.{}", std::process::id()));
            drop(fs::create_dir_all(&kept));
            let logs = (0..self.started).map(|number| log_path(&self.lab, number));
            drop(Command::new("cp").args(logs).arg(&kept).status());
            println!("what each csi-node said: {}", kept.display());
        }
    }
}

fn said(result: Result<(), Status>) -> Option<()> {
    result.inspect_err(|error| println!("{}: {}", error.code(), error.message())).ok()
}

/// How many bytes differ, says `cmp`, after the page cache was dropped.
fn differing(a: &Path, b: &Path) -> u64 {
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root drops caches");
    let compare = |how: &str| Command::new("cmp").arg(how).args([a, b]).output().expect("cmp is installed");
    let same = compare("--silent").status.success();
    let lines = |text: &[u8]| text.iter().filter(|byte| **byte == b'\n').count() as u64;
    // Also where one is shorter.
    if same { 0 } else { lines(&compare("--verbose").stdout).max(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_that_differs_counts_and_so_does_an_end_that_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut bytes = vec![0; 100_000];
        fs::write(&a, &bytes).unwrap();
        fs::write(&b, &bytes).unwrap();
        assert_eq!(differing(&a, &b), 0);
        bytes[77_000] = 1;
        bytes[99_999] = 1;
        fs::write(&b, &bytes).unwrap();
        assert_eq!(differing(&a, &b), 2);
        bytes[77_000] = 0;
        fs::write(&b, &bytes[..99_999]).unwrap();
        assert_eq!(differing(&a, &b), 1);
    }
}
