//! The two binaries, as a user runs them.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use lockstep_proto::objects::{LocalDisk, MirrorVolume, MirrorVolumeStatus};
use lockstep_store::{Directory, Error, Store};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};

use crate::{
    client::{Client, Place},
    lab::{Lab, identical, text},
    memory::MemoryGroup,
};

/// The name of the lab's node.
pub const NODE: &str = "node-1";
/// The chart's `timeoutSeconds` of a probe.
const PROBE: Duration = Duration::from_secs(10);
/// Waiting longer than this is a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// Both processes and a client of both. Their objects are in a directory, unless it is said otherwise.
#[derive(Debug)]
pub struct Driver<S = Directory> {
    node: Option<Child>,
    controller: Option<Child>,
    holder: Option<Child>,
    /// Calls them.
    pub client: Client,
    /// Their objects.
    pub store: S,
    /// How csi-node and csi-controller are told where these are.
    objects: [[String; 2]; 2],
    dir: PathBuf,
    /// Where csi-node says whether it lives.
    probes: Option<SocketAddr>,
    /// csi-node's PATH.
    programs: OsString,
    /// What starts csi-node, with its arguments.
    starter: Vec<String>,
}

/// csi-node, csi-controller or fuse-holder: in the directory `PROGRAMS`.
pub fn program(name: &str) -> PathBuf {
    Path::new(&std::env::var_os("PROGRAMS").expect("PROGRAMS: run tests/csi/run")).join(name)
}

/// Ends with us, whatever happens to us; its log is appended to a file.
fn start(name: &str, log: &Path, programs: &OsStr, args: &[&str]) -> Child {
    start_by(&[], name, log, programs, args)
}

/// The same, by another program, which becomes this one.
fn start_by(starter: &[String], name: &str, log: &Path, programs: &OsStr, args: &[&str]) -> Child {
    let log = fs::File::options().create(true).append(true).open(log).expect("a log");
    let mut command = Command::new("setpriv");
    command.env("PATH", programs);
    command.args(["--pdeathsig", "KILL"]).args(starter).arg(program(name)).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Waits for what must come; says what did not.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut wanted: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = wanted().await {
            return found;
        }
        assert!(Instant::now() < deadline, "never {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Pulls a disk that failed, once nothing uses it any more, and plugs it in again when csi-node has noticed.
pub async fn replug(lab: &mut Lab, number: usize) {
    until("unmounted", || async { lab.mount_of(number).is_none().then_some(()) }).await;
    lab.pull_disk(number);
    tokio::time::sleep(Duration::from_secs(3)).await;
    lab.plug_disk(number);
}

impl Driver {
    /// Starts both for the lab's disks, and waits until they are ready.
    pub async fn start(lab: &Lab) -> Self {
        fs::create_dir_all(lab.path("driver")).expect("a directory");
        let objects = lab.path("driver/objects");
        let store = Directory::open(&objects).expect("a directory of objects");
        let objects = ["--objects".into(), text(&objects).into()];
        Self::start_with(lab, store, [objects.clone(), objects]).await
    }
}

impl<S: Store> Driver<S> {
    /// The same with their objects elsewhere: an argument of csi-node, and one of csi-controller, say where.
    pub async fn start_with(lab: &Lab, store: S, objects: [[String; 2]; 2]) -> Self {
        let dir = lab.path("driver");
        fs::create_dir_all(&dir).expect("a directory");
        fs::write(dir.join("node.yaml"), format!("disks:\n- path: {}/*\n", text(&lab.path("disks")))).expect("a configuration");
        let client = Client::new(&dir.join("node.sock"), &dir.join("controller.sock"));
        let programs = std::env::var_os("PATH").unwrap_or_default();
        let mut driver =
            Self { node: None, controller: None, holder: None, client, store, objects, dir, probes: None, programs, starter: Vec::new() };
        driver.start_node().await;
        driver.start_controller().await;
        // Ready is who answers; what the disks are is said a moment later.
        let said = async || driver.disks().await.iter().filter(|disk| disk.status.is_some()).count();
        until("a word about each disk", || async { (said().await >= lab.disks()).then_some(()) }).await;
        driver
    }

    /// Starts a FUSE holder, and csi-node anew with it.
    pub async fn use_holder(&mut self) {
        self.start_holder();
        self.terminate_node();
        self.start_node().await;
    }

    /// Starts csi-node anew so that it can be asked whether it lives.
    pub async fn use_probes(&mut self) {
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr());
        self.probes = Some(free.expect("a port"));
        self.terminate_node();
        self.start_node().await;
    }

    /// Asks csi-node every half second whether it lives, and gives it as long as the kubelet does. The task ends, with an error, when it does not.
    pub fn must_live(&self) -> JoinHandle<()> {
        let address = self.probes.expect("use_probes first");
        let ask = async move || -> io::Result<String> {
            let mut connection = TcpStream::connect(address).await?;
            connection.write_all(b"GET /livez HTTP/1.0\r\n\r\n").await?;
            let mut answer = String::new();
            connection.read_to_string(&mut answer).await?;
            Ok(answer)
        };
        tokio::spawn(async move {
            loop {
                let answer = tokio::time::timeout(PROBE, ask()).await.expect("an answer in time").expect("it listens");
                assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        })
    }

    /// Starts a FUSE holder: csi-node uses it from its next start on.
    pub fn start_holder(&mut self) {
        self.start_holder_by(&[]);
    }

    /// The same, by another program, which becomes it.
    pub fn start_holder_by(&mut self, starter: &[String]) {
        let args = ["--socket", &self.at("holder.sock")];
        self.holder = Some(start_by(starter, "fuse-holder", &self.dir.join("holder.log"), &self.programs, &args));
    }

    /// The holder's process.
    pub fn holder_id(&self) -> u32 {
        self.holder.as_ref().expect("the holder runs").id()
    }

    /// SIGKILL for the holder, and its end.
    pub fn kill_holder(&mut self) {
        let mut holder = self.holder.take().expect("the holder runs");
        holder.kill().and_then(|()| holder.wait()).expect("it is alive");
    }

    fn at(&self, name: &str) -> String {
        text(&self.dir.join(name)).to_owned()
    }

    /// From its next start on, csi-node runs the programs in this directory instead of the system's; none: the system's.
    pub fn use_programs(&mut self, dir: Option<&Path>) {
        let system = std::env::var_os("PATH").unwrap_or_default();
        let first = dir.map(Path::to_owned).into_iter();
        self.programs = std::env::join_paths(first.chain(std::env::split_paths(&system))).expect("a PATH");
    }

    /// From its next start on, csi-node is started by this program, which becomes it.
    pub fn start_node_by(&mut self, starter: &[&str]) {
        self.starter = starter.iter().map(|arg| (*arg).to_owned()).collect();
    }

    fn node_args(&self) -> Vec<String> {
        let mut args: Vec<String> = Vec::new();
        let endpoint = format!("unix://{}", self.at("node.sock"));
        let pairs = [
            ("--endpoint", endpoint),
            ("--node-name", NODE.into()),
            ("--config", self.at("node.yaml")),
            ("--state-dir", self.at("state")),
            (self.objects[0][0].as_str(), self.objects[0][1].clone()),
        ];
        let holder = self.holder.is_some().then(|| ("--fuse-holder", self.at("holder.sock")));
        let probes = self.probes.map(|address| ("--probes", address.to_string()));
        for (name, value) in pairs.into_iter().chain(holder).chain(probes) {
            args.extend([name.to_owned(), value]);
        }
        args
    }

    /// Starts csi-node.
    pub async fn start_node(&mut self) {
        self.spawn();
        let client = &self.client;
        until("a node that is ready", || async { client.node_ready().await.then_some(()) }).await;
    }

    /// Starts a csi-node that is to end by itself, with an error: what its log says since.
    pub fn start_node_in_vain(&mut self) -> String {
        let before = fs::read_to_string(self.node_log()).unwrap_or_default().len();
        self.spawn();
        let mut node = self.node.take().expect("it was started");
        let deadline = Instant::now() + PATIENCE;
        while node.try_wait().expect("it was started").is_none() {
            assert!(Instant::now() < deadline, "csi-node does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!node.wait().expect("it ended").success(), "it ended without an error");
        fs::read_to_string(self.node_log()).expect("a log")[before..].to_owned()
    }

    fn spawn(&mut self) {
        let args = self.node_args();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.node = Some(start_by(&self.starter, "csi-node", &self.node_log(), &self.programs, &args));
    }

    /// Starts this build of csi-node, in a cgroup perhaps, and does not wait for it; what it does to its volumes' metadata is in its log.
    pub fn spawn_node(&mut self, build: &Path, log: &Path, group: Option<&MemoryGroup>) {
        let log = fs::File::options().create(true).append(true).open(log).expect("a log");
        let mut command = Command::new("setpriv");
        command.env("PATH", &self.programs).env("LOCKSTEP_LOG", "info,lockstep_datapath=debug");
        command.args(["--pdeathsig", "KILL"]).args(group.into_iter().flat_map(MemoryGroup::enter)).arg(build).args(self.node_args());
        self.node = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("csi-node"));
    }

    /// csi-node itself, to be ended by somebody else. The client connects anew.
    pub fn take_node(&mut self) -> Child {
        self.client = Client::new(&self.dir.join("node.sock"), &self.dir.join("controller.sock"));
        self.node.take().expect("csi-node runs")
    }

    /// Starts csi-controller.
    pub async fn start_controller(&mut self) {
        let endpoint = format!("unix://{}", self.at("controller.sock"));
        let [_, [option, objects]] = &self.objects;
        self.controller =
            Some(start("csi-controller", &self.dir.join("controller.log"), &self.programs, &["--endpoint", &endpoint, option, objects]));
        let client = &self.client;
        until("a controller that is ready", || async { client.controller_ready().await.then_some(()) }).await;
    }

    /// SIGKILL for csi-controller, and its end.
    pub fn kill_controller(&mut self) {
        let mut controller = self.controller.take().expect("csi-controller runs");
        controller.kill().and_then(|()| controller.wait()).expect("it is alive");
    }

    /// csi-node's process.
    pub fn node_id(&self) -> u32 {
        self.node.as_ref().expect("csi-node runs").id()
    }

    /// csi-node's log.
    pub fn node_log(&self) -> PathBuf {
        self.dir.join("node.log")
    }

    /// The socket of csi-node and of csi-controller.
    pub fn sockets(&self) -> (PathBuf, PathBuf) {
        (self.dir.join("node.sock"), self.dir.join("controller.sock"))
    }

    /// SIGKILL for csi-node, and its end.
    pub fn kill_node(&mut self) {
        let mut node = self.node.take().expect("csi-node runs");
        node.kill().expect("it is alive");
        let killed = Instant::now();
        while node.try_wait().expect("it was started").is_none() {
            assert!(killed.elapsed() < PATIENCE, "csi-node was killed and does not end: a thread of it waits for its own device");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGKILL for a csi-node that cannot end, because a disk hangs. Its remains.
    pub fn kill_hung_node(&mut self) -> Child {
        let mut node = self.node.take().expect("csi-node runs");
        node.kill().expect("it is alive");
        // The dead one has the other end of this client's connection, and will never close it.
        self.client = Client::new(&self.dir.join("node.sock"), &self.dir.join("controller.sock"));
        node
    }

    /// SIGTERM for csi-node, and its end by itself.
    pub fn terminate_node(&mut self) {
        let node = self.node.take().expect("csi-node runs");
        lockstep_native::run("kill", &[&node.id().to_string()]);
        let status = node.wait_with_output().expect("it was started").status;
        assert!(status.success(), "it ended with {status}");
    }

    /// SIGTERM for both; they must end by themselves, without an error.
    pub fn stop(&mut self) {
        for child in [self.node.take(), self.controller.take()].into_iter().flatten() {
            lockstep_native::run("kill", &[&child.id().to_string()]);
            let status = child.wait_with_output().expect("it was started").status;
            assert!(status.success(), "it ended with {status}");
        }
        if self.holder.is_some() {
            self.kill_holder();
        }
    }

    /// Creates a volume, to be staged and published at paths of its own.
    pub async fn place(&self, name: &str, bytes: u64, fs_type: Option<&'static str>) -> Place {
        let volume = self.client.create(name, bytes, fs_type).await.expect("it is created");
        self.place_of(volume.volume_id, fs_type)
    }

    /// So many raw volumes of this size, `v0` and on, staged and published all at once.
    pub async fn devices_up(&self, count: usize, bytes: u64) -> Vec<Place> {
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..count {
            let place = self.place(&format!("v{number}"), bytes, None).await;
            let client = self.client.clone();
            tasks.spawn(async move {
                place.up(&client).await.unwrap_or_else(|error| panic!("{}: {error}", place.id));
                place
            });
        }
        tasks.join_all().await
    }

    /// The paths of a volume that there is.
    pub fn place_of(&self, id: String, fs_type: Option<&'static str>) -> Place {
        let path = |what: &str| self.dir.with_file_name(format!("{what}-{id}"));
        Place { staging: path("staging"), target: path("target"), id, fs_type }
    }

    /// A volume's object.
    pub async fn volume(&self, id: &str) -> MirrorVolume {
        self.store.get(id).await.expect("the store").unwrap_or_else(|| panic!("{id} has no object"))
    }

    /// What its object says of how it is.
    pub async fn status(&self, id: &str) -> MirrorVolumeStatus {
        self.volume(id).await.status.unwrap_or_else(|| panic!("{id} has no status"))
    }

    /// The same, once its condition Ready has this reason.
    pub async fn until_ready_is(&self, id: &str, reason: &str) -> MirrorVolumeStatus {
        until(&format!("{id} {reason}"), || async {
            let status = self.volume(id).await.status?;
            status.conditions.iter().any(|condition| condition.type_ == "Ready" && condition.reason == reason).then_some(status)
        })
        .await
    }

    /// Annotates a volume's object, as `kubectl annotate` does: names without their prefix.
    pub async fn annotate(&self, id: &str, pairs: &[(&str, &str)]) {
        loop {
            let mut object = self.volume(id).await;
            let annotations = object.metadata.annotations.get_or_insert_default();
            annotations.extend(pairs.iter().map(|(name, value)| (format!("lockstep.io/{name}"), (*value).to_owned())));
            match self.store.update(object).await {
                Err(Error::Conflict { .. }) => {}
                written => return drop(written.expect("the store")),
            }
        }
    }

    /// All disks' objects.
    pub async fn disks(&self) -> Vec<LocalDisk> {
        self.store.list().await.expect("the store").objects
    }

    /// The two `data` files of a volume, in the order of its object's legs.
    pub async fn copies(&self, id: &str) -> Vec<PathBuf> {
        let volume = self.volume(id).await;
        let uid = volume.metadata.uid.expect("a stored object");
        let legs = volume.status.expect("it is allocated").legs;
        let dir = self.dir.canonicalize().expect("it is there");
        legs.iter().map(|leg| dir.join(format!("state/disks/{}/volumes/{uid}.{}/data", leg.disk, leg.leg_id))).collect()
    }

    /// Compares them with `cmp`, while nobody uses the volume.
    ///
    /// # Panics
    /// If they differ.
    pub async fn assert_copies_identical(&self, id: &str) {
        let copies = self.copies(id).await;
        assert!(identical(&copies[0], &copies[1]), "the copies of {id} differ");
    }
}

impl<S> Drop for Driver<S> {
    fn drop(&mut self) {
        // Not stopped: something went wrong.
        let failed = std::thread::panicking() || self.node.is_some() || self.controller.is_some();
        // The holder first of those that are waited for: csi-node may end only when nothing is asked of its volumes any more.
        let mut children: Vec<Child> = [self.holder.take(), self.controller.take(), self.node.take()].into_iter().flatten().collect();
        children.iter_mut().for_each(|child| drop(child.kill()));
        children.iter_mut().for_each(|child| drop(child.wait()));
        if failed {
            eprintln!("csi-node said:\n{}", fs::read_to_string(self.dir.join("node.log")).unwrap_or_default());
            eprintln!("csi-controller said:\n{}", fs::read_to_string(self.dir.join("controller.log")).unwrap_or_default());
        }
    }
}
