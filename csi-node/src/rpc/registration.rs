//! The kubelet's plugin registration, served by csi-node itself.
//!
//! Nothing here waits for a disk, a volume or the API server: the kubelet gives up after a second. What it refuses it asks for again, so that no
//! process need end for that, least of all one that serves volumes.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use lockstep_proto::{
    DRIVER_NAME,
    endpoint::{Endpoint, EndpointError},
    registration::{
        InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
        registration_server::{self, RegistrationServer},
    },
};
use tonic::{Request, Response, Status, async_trait, transport::Server};
use tracing::{info, warn};

/// Of CSI, as far as the kubelet asks: its major version.
const CSI_VERSION: &str = "1.0.0";

/// Tells the kubelet about csi-node.
#[derive(Clone, Debug)]
pub struct Registration {
    endpoint: PathBuf,
    /// The kubelet's last word was no.
    refused: Arc<AtomicBool>,
}

impl Registration {
    /// `endpoint`: the CSI socket, where the kubelet finds it.
    pub fn new(endpoint: PathBuf) -> Self {
        Self { endpoint, refused: Arc::default() }
    }

    /// Whether the kubelet has said that it does not take this node.
    pub fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// Serves in the kubelet's directory of plugins, for ever: a kubelet that is restarted looks there again. The CSI socket must listen
    /// already. The file stays when the process ends; the next one takes its place.
    ///
    /// # Errors
    /// If there is no socket to serve on, or no server.
    pub async fn serve(self, dir: &Path) -> Result<(), RegistrationError> {
        let socket: Endpoint = format!("unix://{}", dir.join(socket_name()).display()).parse()?;
        let incoming = socket.bind()?;
        info!(%socket, "the kubelet can register this node");
        Ok(Server::builder().add_service(RegistrationServer::new(self)).serve_with_incoming(incoming).await?)
    }
}

/// The kubelet's gRPC takes the path, percent-encoded, for the authority of its requests, and an HTTP/2 server refuses what is no host. What is before
/// an `@` is no part of the host: so this name is valid.
fn socket_name() -> String {
    format!("{DRIVER_NAME}@reg.sock")
}

/// Why the kubelet cannot register this node.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationError {
    /// There is no socket.
    #[error(transparent)]
    Socket(#[from] EndpointError),
    /// There is no server.
    #[error("serving: {0}")]
    Serve(#[from] tonic::transport::Error),
}

#[async_trait]
impl registration_server::Registration for Registration {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".into(),
            name: DRIVER_NAME.into(),
            endpoint: self.endpoint.display().to_string(),
            supported_versions: vec![CSI_VERSION.into()],
        }))
    }

    async fn notify_registration_status(
        &self,
        status: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = status.into_inner();
        self.refused.store(!status.plugin_registered, Ordering::Relaxed);
        match status {
            RegistrationStatus { plugin_registered: true, .. } => info!("the kubelet has registered this node"),
            RegistrationStatus { error, .. } => {
                warn!(reason = "RegistrationFailed", error, "the kubelet has not registered this node; it tries again")
            }
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use registration_server::Registration as _;

    use super::*;

    #[tokio::test]
    async fn what_the_kubelet_said_last_counts() {
        let registration = Registration::new("/host/csi.sock".into());
        assert!(!registration.is_refused());
        for (registered, error) in [(false, "no such version"), (true, "")] {
            let status = RegistrationStatus { plugin_registered: registered, error: error.into() };
            registration.notify_registration_status(Request::new(status)).await.unwrap();
            assert_eq!(registration.clone().is_refused(), !registered);
        }
    }
}
