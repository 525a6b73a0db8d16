//! Lockstep's CSI controller: a call becomes an object, the object's status becomes the answer.
//!
//! ```text
//!              CreateVolume                      claims, allocates two legs
//! provisioner --------------> Controller    node <-------------------------.
//!     ^                          |  creates                                 |
//!     |                          v                                          |
//!     '---- Ready, Rejected -- MirrorVolume { spec: node, size | status: phase, observedUid }
//! ```
//! The controller never talks to a node and keeps nothing of its own: what it must remember is in the objects. So a call may be
//! dropped at any point and repeated, here or at another replica, and the result is the same.
//!
//! What it guarantees:
//! - Every change is a create, or carries the resourceVersion of what it was decided from; a lost race is looked at again.
//! - A code that the provisioner takes for final promises that nothing exists: a node's refusal is answered only after the object is
//!   gone. While something may exist, the answer is one that is repeated (ABORTED, DEADLINE_EXCEEDED, UNAVAILABLE).
//! - An object that its node claimed (finalizer) is the node's: it is only marked as deleted. One that nobody claimed is withdrawn
//!   after `UNCLAIMED`, if the node's Lease is stale too: by the object's age, not by one call's patience.
//! - Space is promised only where it is known: an object file that cannot be read is an error, not an absent disk. It is UNAVAILABLE, with
//!   its path and the remedy: what it stands for may exist.
//!
//! Vocabulary: a volume is *claimed* once its node's finalizer is on it, and *ready* once both legs are there. A call on a volume keeps
//! others on it out (*busy*), in this process; between replicas the objects' preconditions do.

mod busy;
mod capability;
mod create;
mod delete;
mod error;
mod expand;
mod list;
mod nodes;
mod rpc;
mod volume;
mod wait;
mod wanted;

use std::{future::Future, sync::Arc, time::Duration};

pub use error::Error;
use lockstep_proto::{
    csi::{controller_server::ControllerServer, identity_server::IdentityServer},
    rpc_log::RpcLog,
};
use lockstep_store::Store;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;

/// How old a volume without a claim must be to be withdrawn from a node that is silent.
pub const UNCLAIMED: Duration = Duration::from_secs(60);
/// A node whose Lease was not renewed for this long is silent. It renews it every 10 s.
pub const SILENT: Duration = Duration::from_secs(40);

/// The services, on a store.
#[derive(Debug)]
pub struct Controller<S> {
    store: S,
    busy: busy::Busy,
    /// Whether waiting calls are to give up.
    ending: watch::Sender<bool>,
}

impl<S: Store> Controller<S> {
    /// On this store.
    pub fn new(store: S) -> Self {
        Self { store, busy: busy::Busy::default(), ending: watch::Sender::new(false) }
    }

    /// Calls that wait for a node end with UNAVAILABLE, so that the process can go. They are repeated elsewhere.
    pub fn end(&self) {
        self.ending.send_replace(true);
    }
}

/// Serves until `ended`; then waiting calls give up, and the others are finished.
///
/// # Errors
/// Those of the transport.
pub async fn serve<S: Store>(
    store: S,
    incoming: UnixListenerStream,
    ended: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let controller = Arc::new(Controller::new(store));
    let end = async {
        ended.await;
        controller.end();
    };
    tonic::transport::Server::builder()
        .layer(RpcLog::default())
        .add_service(IdentityServer::from_arc(Arc::clone(&controller)))
        .add_service(ControllerServer::from_arc(Arc::clone(&controller)))
        .serve_with_incoming_shutdown(incoming, end)
        .await
}
