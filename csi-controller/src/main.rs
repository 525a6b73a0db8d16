//! The CSI controller's process: arguments, signals, log.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use lockstep_proto::{endpoint::Endpoint, logging};
use lockstep_store::Directory;
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
    /// if it is not there. Required for now: working on a Kubernetes API server is not supported yet.
    #[arg(long, value_name = "DIR")]
    objects: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { endpoint, objects } = Arguments::parse();
    logging::init()?;
    let (mut terminated, mut interrupted) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let store = Directory::open(&objects).with_context(|| format!("--objects {}", objects.display()))?;
    let incoming = endpoint.bind()?;
    tracing::info!(%endpoint, objects = %objects.display(), "serving");
    let ended = async move {
        tokio::select! {
            _ = terminated.recv() => tracing::info!("SIGTERM: ending"),
            _ = interrupted.recv() => tracing::info!("SIGINT: ending"),
        }
    };
    lockstep_csi_controller::serve(store, incoming, ended).await?;
    Ok(())
}
