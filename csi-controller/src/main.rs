//! The CSI controller's process: arguments, signals, log.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use lockstep_proto::{endpoint::Endpoint, logging};
use lockstep_store::{Directory, Kubernetes, Store};
use tokio::signal::unix::{SignalKind, signal};

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
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { endpoint, objects, kubeconfig } = Arguments::parse();
    logging::init()?;
    match (objects, kubeconfig) {
        (Some(dir), _) => {
            let store = Directory::open(&dir).with_context(|| format!("--objects {}", dir.display()))?;
            serve(store, &endpoint, &dir.display().to_string()).await
        }
        (None, Some(file)) => {
            let store = Kubernetes::with_kubeconfig(&file).await.with_context(|| format!("--kubeconfig {}", file.display()))?;
            serve(store, &endpoint, &file.display().to_string()).await
        }
        (None, None) => {
            let store = Kubernetes::in_pod().context("neither --objects nor --kubeconfig is given, and this is no pod of a cluster")?;
            serve(store, &endpoint, "the pod's cluster").await
        }
    }
}

async fn serve(store: impl Store, endpoint: &Endpoint, objects: &str) -> anyhow::Result<()> {
    let (mut terminated, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let incoming = endpoint.bind()?;
    tracing::info!(%endpoint, objects, "serving");
    let ended = async move {
        tokio::select! {
            _ = terminated.recv() => tracing::info!("SIGTERM: ending"),
            _ = interrupted.recv() => tracing::info!("SIGINT: ending"),
        }
    };
    lockstep_csi_controller::serve(store, incoming, ended).await?;
    Ok(())
}
