//! The CSI node plugin.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use clap::Parser;
use lockstep_csi_node::{
    config::Config,
    disks::Disks,
    lease, memory, mounts,
    node::Node,
    rpc::{Identity, NodeService, Registration},
    state_dir::StateDir,
};
use lockstep_datapath::{Datapath, Holder};
use lockstep_proto::{
    csi::{identity_server::IdentityServer, node_server::NodeServer},
    endpoint::Endpoint,
    logging,
    objects::LocalDisk,
    probes::{self, Process},
    rpc_log::RpcLog,
};
use lockstep_store::{Changes, Directory, Kubernetes, Store};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tonic::transport::Server;
use tracing::{error, info, warn};

/// How long calls that are under way may take at the end.
const LAST_CALLS: Duration = Duration::from_secs(15);
/// How long the csi-node before this one may take to end.
const HANDOVER: Duration = Duration::from_secs(30);
/// How long a datapath thread may take to answer whoever asks whether this process lives.
const HEARTBEAT: Duration = Duration::from_secs(4);
/// How often the disks are looked at.
const SCAN: Duration = Duration::from_secs(2);
/// How long the store may take for the objects of all disks.
const PUBLISH: Duration = Duration::from_secs(30);

/// Lockstep's CSI node plugin: claims this node's disks and serves volumes that are mirrored on two of them.
///
/// Every disk that the configuration selects belongs to Lockstep, all of it. A blank one is formatted; one that has anything on it is
/// refused, and `LocalDisk` objects say why. Volumes are served by this process. With a FUSE holder their devices outlive it: what they are asked
/// meanwhile waits for the next csi-node, which goes on. Without one their devices end with it.
///
/// Logging: LOCKSTEP_LOG=debug (default info), to stderr.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The unix socket to serve CSI on.
    #[arg(long, default_value = "unix:///run/lockstep/node.sock")]
    endpoint: Endpoint,
    /// The name of this node: the value of the topology key topology.lockstep.io/node. It must never change.
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// Which disks belong to Lockstep: a YAML file, `disks: [{path: /dev/disk/by-id/PATTERN}, ...]`.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Where this node keeps what must not be on the mirrored disks: witnesses, staged records, mounts.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lockstep")]
    state_dir: PathBuf,
    /// Standalone mode: the objects are YAML files in this directory, shared with csi-controller.
    #[arg(long, value_name = "DIR", conflicts_with = "kubeconfig")]
    objects: Option<PathBuf>,
    /// The objects are in the Kubernetes API that this file's current context names. Without this and --objects: in that of the pod's own
    /// cluster.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The socket of the FUSE holder (`fuse-holder --socket`). Without it, the end of this process is the end of its volumes' devices.
    #[arg(long, value_name = "PATH")]
    fuse_holder: Option<PathBuf>,
    /// The kubelet's directory of plugins (its plugins_registry): a socket is put there by which the kubelet registers this node. Without it
    /// nobody is registered.
    #[arg(long, value_name = "DIR", requires = "endpoint_on_host")]
    registration_dir: Option<PathBuf>,
    /// The path of the socket of --endpoint, as the kubelet sees it.
    #[arg(long, value_name = "PATH")]
    endpoint_on_host: Option<PathBuf>,
    /// Where to answer whoever asks over HTTP whether this process lives (/livez) and is ready (/readyz), as in 0.0.0.0:9808. Without it
    /// nobody can ask.
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = probes::address)]
    probes: Option<SocketAddr>,
    /// How many threads serve volumes; each carries many.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    datapath_threads: u8,
}

fn main() -> anyhow::Result<()> {
    // A dump of core waits for every thread, and one that unmounts a volume waits for this very process: it would never end. Nor is what volumes hold
    // for a dump.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    lockstep_datapath::errand::serve(&lockstep_csi_node::ERRANDS);
    let Args {
        endpoint,
        node_name,
        config,
        state_dir,
        objects,
        kubeconfig,
        fuse_holder,
        registration_dir,
        endpoint_on_host,
        probes,
        datapath_threads,
    } = Args::parse();
    let registration = registration_dir.zip(endpoint_on_host.map(Registration::new));
    logging::init()?;
    memory::lock();
    anyhow::ensure!(
        lockstep_store::is_name(&node_name),
        "--node-name {node_name:?} is not a node's name: lower-case letters, digits, '-' and '.', as in `kubectl get nodes`"
    );
    let config = Config::read(&config)?;
    // First of all: it says when the csi-node before this one is gone.
    let hello = |path: &Path| Holder::connect(path, concat!("csi-node ", env!("CARGO_PKG_VERSION")), HANDOVER);
    let holder = fuse_holder.as_deref().map(hello).transpose()?;
    say_what_a_restart_costs(holder.is_some());
    let before_is_dying = holder.as_ref().is_some_and(|holder| holder.before_is_dying());
    let state = Arc::new(StateDir::open(&state_dir, before_is_dying)?);
    mounts::say_if_the_host_cannot_be_seen();
    mounts::must_reach_the_host(&state.run())?;
    if before_is_dying {
        // It will never answer there.
        endpoint.take_away()?;
    }
    // As many as the memory bound counts, however many cores there are: what is fast has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("starting the runtime")?;
    let store = runtime.block_on(Objects::open(objects, kubeconfig, &node_name))?;
    let disks = Arc::new(Disks::new(Arc::clone(&state), config.disks));
    let datapath = Datapath::start(usize::from(datapath_threads), holder)?;
    let parts = Parts { name: node_name, state, disks, datapath };
    let addresses = Addresses { endpoint, probes, registration };
    match store {
        Objects::Directory(store) => runtime.block_on(run(parts.with(store), addresses))?,
        Objects::Kubernetes(store) => runtime.block_on(run(parts.with(*store), addresses))?,
    }
    // A thread that waits for a hung disk must not keep the process.
    runtime.shutdown_background();
    Ok(())
}

/// Says plainly what a restart of csi-node costs, where it costs anything.
fn say_what_a_restart_costs(has_holder: bool) {
    let why = match (lockstep_datapath::kernel_can_resend(), has_holder) {
        (true, true) => return,
        (true, false) => "there is no --fuse-holder",
        (false, _) => "this kernel is older than Linux 6.9 and cannot send again what was not answered, with a --fuse-holder or without",
    };
    warn!(
        "{why}: whenever csi-node ends or restarts, the running pods of its volumes get I/O errors and must be restarted (deleted and made anew, so that their \
         volumes are unstaged and staged again)"
    );
}

/// Where the objects are.
enum Objects {
    Directory(Directory),
    Kubernetes(Box<Kubernetes>),
}

impl Objects {
    async fn open(objects: Option<PathBuf>, kubeconfig: Option<PathBuf>, node: &str) -> anyhow::Result<Self> {
        let store = match (objects, kubeconfig) {
            (Some(dir), _) => return Ok(Self::Directory(Directory::open(&dir)?)),
            (None, Some(file)) => Kubernetes::with_kubeconfig(&file).await.with_context(|| format!("--kubeconfig {}", file.display()))?,
            (None, None) => Kubernetes::in_pod().context("neither --objects nor --kubeconfig is given, and this is no pod of a cluster")?,
        };
        Ok(Self::Kubernetes(Box::new(store.of_node(node))))
    }
}

/// The node but for its store.
struct Parts {
    name: String,
    state: Arc<StateDir>,
    disks: Arc<Disks>,
    datapath: Datapath,
}

impl Parts {
    fn with<S: Store>(self, store: S) -> Arc<Node<S>> {
        Arc::new(Node::new(self.name, store, self.state, self.disks, self.datapath))
    }
}

/// Where it can be asked, and what.
struct Addresses {
    endpoint: Endpoint,
    probes: Option<SocketAddr>,
    registration: Option<(PathBuf, Registration)>,
}

/// What is asked of this process itself.
struct CsiNode<S> {
    node: Arc<Node<S>>,
    registration: Option<Registration>,
}

impl<S: Store> Process for CsiNode<S> {
    async fn alive(&self) -> Result<(), String> {
        self.node.datapath.heartbeat(HEARTBEAT).await.map_err(|error| error.to_string())
    }

    fn ready(&self) -> Result<(), String> {
        let refused = self.registration.as_ref().is_some_and(Registration::is_refused);
        if refused { Err("the kubelet has not registered this node; the log says why".into()) } else { Ok(()) }
    }
}

async fn run<S: Store>(node: Arc<Node<S>>, addresses: Addresses) -> anyhow::Result<()> {
    let Addresses { endpoint, probes: probed_at, registration } = addresses;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let identity = Identity::default();
    let incoming = endpoint.bind()?;
    tokio::spawn(Arc::clone(&node.disks).settle());
    let ready = identity.clone();
    tokio::spawn(watch_disks(Arc::clone(&node), ready));
    tokio::spawn({
        let node = Arc::clone(&node);
        async move { lease::keep(&node.store, &node.name).await }
    });
    if let Some(address) = probed_at {
        let registration = registration.as_ref().map(|(_, registration)| registration.clone());
        let process = CsiNode { node: Arc::clone(&node), registration };
        tokio::spawn(probes::serve(address, endpoint.clone(), Arc::new(process)));
    }
    if let Some((dir, registration)) = registration {
        tokio::spawn(async move {
            // Volumes are served all the same.
            while let Err(error) = registration.clone().serve(&dir).await {
                error!(%error, "the kubelet cannot register this node; tried again");
                tokio::time::sleep(HANDOVER).await;
            }
        });
    }
    info!(%endpoint, node = node.name, "serving");
    let (ending, mut ended) = watch::channel(false);
    let serving = Server::builder()
        .layer(RpcLog::default())
        .add_service(IdentityServer::new(identity))
        .add_service(NodeServer::new(NodeService::new(Arc::clone(&node))))
        .serve_with_incoming_shutdown(incoming, async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            ending.send_replace(true);
        });
    let overdue = async {
        drop(ended.wait_for(|ended| *ended).await);
        tokio::time::sleep(LAST_CALLS).await;
    };
    tokio::select! {
        served = serving => served?,
        () = overdue => warn!("calls that wait for a sick disk are not waited for"),
    }
    node.flush_all().await;
    Ok(())
}

/// Looks at the disks again and again; volumes are followed once the first look is over. Neither the store nor a disk that hangs delays the
/// next look.
async fn watch_disks<S: Store>(node: Arc<Node<S>>, ready: Identity) {
    node.disks.scan().await;
    tokio::spawn(publish_disks(Arc::clone(&node)));
    node.resume_all().await;
    node.set_scanned();
    ready.set_ready();
    tokio::spawn(Arc::clone(&node).follow_volumes());
    let mut sweep = None::<tokio::task::JoinHandle<()>>;
    loop {
        let mut changes = node.disks.changes();
        if sweep.as_ref().is_none_or(tokio::task::JoinHandle::is_finished) {
            let node = Arc::clone(&node);
            sweep = Some(tokio::spawn(async move { node.sweep().await }));
        }
        tokio::select! {
            () = tokio::time::sleep(SCAN) => {}
            _ = changes.changed() => {}
        }
        node.disks.scan().await;
    }
}

/// The disks' objects follow what the looks found, as fast as the store can; and what others did to them. While nothing changes nothing is
/// asked of the store.
async fn publish_disks<S: Store>(node: Arc<Node<S>>) {
    let mut found = node.disks.changes();
    let mut objects = None;
    loop {
        found.mark_unchanged();
        if objects.is_none() {
            objects = match node.store.changes::<LocalDisk>().await {
                Ok(changes) => Some(changes),
                Err(error) => {
                    warn!(%error, "the disks' objects cannot be watched");
                    None
                }
            };
        }
        match tokio::time::timeout(PUBLISH, node.disks.publish(&node.store, &node.name)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "the disks' objects do not say what is"),
            Err(_) => warn!("the disks' objects do not say what is: the store does not answer"),
        }
        let changed = async {
            match &mut objects {
                Some(objects) => objects.next().await,
                None => std::future::pending().await,
            }
        };
        let outdated = async {
            loop {
                tokio::select! {
                    () = tokio::time::sleep(SCAN) => {}
                    _ = found.changed() => {}
                }
                if !node.disks.is_published(&node.name).await {
                    return;
                }
            }
        };
        tokio::select! {
            () = changed => {}
            () = outdated => {}
        }
    }
}
