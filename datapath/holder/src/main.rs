//! The FUSE holder of a node.

use std::{io::IsTerminal, path::PathBuf};

use anyhow::Context;
use clap::Parser;
use lockstep_fuse_holder::{Server, bind};
use tracing::info;

/// Keeps the FUSE connections of this node's volumes, so that csi-node can be killed, upgraded or restarted under running pods.
///
/// It must outlive csi-node: run it apart from it, and upgrade it when no volume is in use. When it ends, nothing happens to volumes whose
/// csi-node is alive: its successor is given their connections again.
///
/// Logging: LOCKSTEP_LOG=debug (default info), to stderr.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The unix socket to listen on: the same as csi-node's --fuse-holder.
    #[arg(long, value_name = "PATH", default_value = "/run/lockstep/fuse-holder.sock")]
    socket: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let Args { socket } = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("LOCKSTEP_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal()).init();
    let listener = bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    info!(socket = %socket.display(), version = lockstep_fuse_holder::VERSION, "listening");
    match Server::new(listener).run().context("serving")? {}
}
