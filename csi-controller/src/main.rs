//! The CSI controller's process: arguments, signals, log.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::Context;
use clap::Parser;
use lockstep_proto::{endpoint::Endpoint, logging, objects::MirrorVolume, probes};
use lockstep_store::{Directory, Kubernetes, Listing, Store};
use tokio::signal::unix::{SignalKind, signal};

/// So many volumes are named where none should be.
const NAMED: usize = 10;

/// Lockstep's CSI controller: serves CSI's Identity and Controller services on a unix socket. It only works on objects and may run
/// anywhere, as any user. What it logs is set with LOCKSTEP_LOG (error, warn, info, debug).
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where to serve: a unix socket, written unix:// and its absolute path. Only this user can connect.
    #[arg(long, value_name = "ENDPOINT", default_value = "unix:///run/lockstep/controller.sock")]
    endpoint: Endpoint,
    /// Standalone: the directory of the objects (MirrorVolume, LocalDisk, Lease), one YAML file each, shared with csi-node. It is made
    /// if it is not there.
    #[arg(long, value_name = "DIR", conflicts_with = "kubeconfig")]
    objects: Option<PathBuf>,
    /// The objects are in the Kubernetes API that this file's current context names. Without this and --objects: in that of the pod's own
    /// cluster.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Where to answer whoever asks over HTTP whether this process lives (/livez) and is ready (/readyz: its objects can be reached), as in
    /// 0.0.0.0:9808. Without it nobody can ask.
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = probes::address)]
    probes: Option<SocketAddr>,
    /// Serves nothing: ends with an error if there are volumes, and names them. The chart asks this before it is uninstalled.
    #[arg(long)]
    refuse_if_volumes_exist: bool,
}

/// Where it can be asked.
struct Addresses {
    endpoint: Endpoint,
    probes: Option<SocketAddr>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { endpoint, objects, kubeconfig, probes, refuse_if_volumes_exist } = Arguments::parse();
    logging::init()?;
    let serves = (!refuse_if_volumes_exist).then_some(Addresses { endpoint, probes });
    match (objects, kubeconfig) {
        (Some(dir), _) => {
            let store = Directory::open(&dir).with_context(|| format!("--objects {}", dir.display()))?;
            run(store, serves, &dir.display().to_string()).await
        }
        (None, Some(file)) => {
            let store = Kubernetes::with_kubeconfig(&file).await.with_context(|| format!("--kubeconfig {}", file.display()))?;
            run(store, serves, &file.display().to_string()).await
        }
        (None, None) => {
            let store = Kubernetes::in_pod().context("neither --objects nor --kubeconfig is given, and this is no pod of a cluster")?;
            run(store, serves, "the pod's cluster").await
        }
    }
}

async fn run(store: impl Store, serves: Option<Addresses>, objects: &str) -> anyhow::Result<()> {
    match serves {
        Some(addresses) => serve(store, addresses, objects).await,
        None => refuse_if_volumes_exist(&store).await,
    }
}

/// What cannot be read is a volume too.
async fn refuse_if_volumes_exist(store: &impl Store) -> anyhow::Result<()> {
    let Listing { objects, unreadable } = match store.list::<MirrorVolume>().await {
        // The definition is gone, and every volume's object with it.
        Err(error) if error.is_undefined() => return Ok(()),
        listed => listed?,
    };
    let count = objects.len() + unreadable.len();
    let described = |volume: MirrorVolume| {
        let claim = volume.spec.claim.map_or(String::new(), |claim| format!(" ({claim})"));
        format!("{}{claim}", volume.metadata.name.unwrap_or_default())
    };
    let named =
        objects.into_iter().map(described).chain(unreadable.iter().map(ToString::to_string)).take(NAMED).collect::<Vec<_>>().join(", ");
    anyhow::ensure!(
        count == 0,
        "there are {count} volumes, and nobody would serve them: {named}. Delete their claims, or their PersistentVolumes, first"
    );
    Ok(())
}

async fn serve(store: impl Store, addresses: Addresses, objects: &str) -> anyhow::Result<()> {
    let Addresses { endpoint, probes: probed_at } = addresses;
    let (mut terminated, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let incoming = endpoint.bind()?;
    tracing::info!(%endpoint, objects, "serving");
    if let Some(address) = probed_at {
        tokio::spawn(probes::serve(address, endpoint, Arc::new(())));
    }
    let ended = async move {
        tokio::select! {
            _ = terminated.recv() => tracing::info!("SIGTERM: ending"),
            _ = interrupted.recv() => tracing::info!("SIGINT: ending"),
        }
    };
    lockstep_csi_controller::serve(store, incoming, ended).await?;
    Ok(())
}
