//! The Identity service.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use lockstep_proto::{
    DRIVER_NAME,
    csi::{
        GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse, PluginCapability,
        ProbeRequest, ProbeResponse, identity_server,
        plugin_capability::{Service, Type, VolumeExpansion, service, volume_expansion},
    },
};
use tonic::{Request, Response, Status, async_trait};

/// Who we are, and whether the first look at the disks is over.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    ready: Arc<AtomicBool>,
}

impl Identity {
    /// From now on a probe says that the plugin is ready.
    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
    }
}

#[async_trait]
impl identity_server::Identity for Identity {
    async fn get_plugin_info(&self, _: Request<GetPluginInfoRequest>) -> Result<Response<GetPluginInfoResponse>, Status> {
        let vendor_version = env!("CARGO_PKG_VERSION").into();
        Ok(Response::new(GetPluginInfoResponse { name: DRIVER_NAME.into(), vendor_version, ..Default::default() }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let service = |kind: service::Type| Type::Service(Service { r#type: kind.into() });
        let capabilities = [
            service(service::Type::ControllerService),
            service(service::Type::VolumeAccessibilityConstraints),
            Type::VolumeExpansion(VolumeExpansion { r#type: volume_expansion::Type::Online.into() }),
        ];
        let capabilities = capabilities.map(|kind| PluginCapability { r#type: Some(kind) }).into();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(self.ready.load(Ordering::Relaxed)) }))
    }
}
