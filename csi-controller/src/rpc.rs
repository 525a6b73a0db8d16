//! The services: each call to the method that does it. What is not here is UNIMPLEMENTED.

use std::time::Duration;

use lockstep_proto::{
    DRIVER_NAME,
    csi::{
        ControllerExpandVolumeRequest, ControllerExpandVolumeResponse, ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse,
        ControllerGetVolumeRequest, ControllerGetVolumeResponse, ControllerServiceCapability, CreateVolumeRequest, CreateVolumeResponse,
        DeleteVolumeRequest, DeleteVolumeResponse, GetCapacityRequest, GetCapacityResponse, GetPluginCapabilitiesRequest,
        GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse, ListVolumesRequest, ListVolumesResponse,
        PluginCapability, ProbeRequest, ProbeResponse, ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse,
        controller_server::Controller as ControllerService,
        controller_service_capability::{self, Rpc, rpc},
        identity_server::Identity,
        plugin_capability::{self, Service, VolumeExpansion, service, volume_expansion},
    },
    objects::MirrorVolume,
};
use lockstep_store::Store;
use tonic::{Request, Response, Status, async_trait};

use crate::{Controller, wait::Deadline};

/// Whoever probes does not wait long.
const STORE_ANSWERS: Duration = Duration::from_secs(3);

/// What the controller can do: exactly what is implemented below.
const CAPABILITIES: [rpc::Type; 6] = [
    rpc::Type::CreateDeleteVolume,
    rpc::Type::ListVolumes,
    rpc::Type::GetCapacity,
    rpc::Type::ExpandVolume,
    rpc::Type::GetVolume,
    rpc::Type::SingleNodeMultiWriter,
];

#[async_trait]
impl<S: Store> Identity for Controller<S> {
    async fn get_plugin_info(&self, _: Request<GetPluginInfoRequest>) -> Result<Response<GetPluginInfoResponse>, Status> {
        let vendor_version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(GetPluginInfoResponse { name: DRIVER_NAME.to_owned(), vendor_version, ..GetPluginInfoResponse::default() }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let service = |kind: service::Type| plugin_capability::Type::Service(Service { r#type: kind.into() });
        let online = plugin_capability::Type::VolumeExpansion(VolumeExpansion { r#type: volume_expansion::Type::Online.into() });
        let types = [service(service::Type::ControllerService), service(service::Type::VolumeAccessibilityConstraints), online];
        let capabilities = types.into_iter().map(|kind| PluginCapability { r#type: Some(kind) }).collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    /// Ready as long as the store answers.
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let failed = match tokio::time::timeout(STORE_ANSWERS, self.store.get::<MirrorVolume>("probe")).await {
            Err(_) => Some(format!("nothing within {} s", STORE_ANSWERS.as_secs())),
            Ok(Err(error @ lockstep_store::Error::Io { .. })) => Some(error.to_string()),
            // Whatever else it says of this object: it answered.
            Ok(_) => None,
        };
        if let Some(error) = &failed {
            tracing::warn!(error, "the store does not answer");
        }
        Ok(Response::new(ProbeResponse { ready: Some(failed.is_none()) }))
    }
}

#[async_trait]
impl<S: Store> ControllerService for Controller<S> {
    async fn create_volume(&self, request: Request<CreateVolumeRequest>) -> Result<Response<CreateVolumeResponse>, Status> {
        let deadline = Deadline::of(request.metadata());
        Ok(Response::new(self.create(request.into_inner(), deadline).await?))
    }

    async fn delete_volume(&self, request: Request<DeleteVolumeRequest>) -> Result<Response<DeleteVolumeResponse>, Status> {
        let deadline = Deadline::of(request.metadata());
        Ok(Response::new(self.delete(request.into_inner(), deadline).await?))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        Ok(Response::new(self.validate(request.into_inner()).await?))
    }

    async fn list_volumes(&self, request: Request<ListVolumesRequest>) -> Result<Response<ListVolumesResponse>, Status> {
        Ok(Response::new(self.list(request.into_inner()).await?))
    }

    async fn get_capacity(&self, request: Request<GetCapacityRequest>) -> Result<Response<GetCapacityResponse>, Status> {
        Ok(Response::new(self.room(request.into_inner()).await?))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let capability = |kind: rpc::Type| {
            let rpc = controller_service_capability::Type::Rpc(Rpc { r#type: kind.into() });
            ControllerServiceCapability { r#type: Some(rpc) }
        };
        let capabilities = CAPABILITIES.into_iter().map(capability).collect();
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        let deadline = Deadline::of(request.metadata());
        Ok(Response::new(self.expand(request.into_inner(), deadline).await?))
    }

    async fn controller_get_volume(
        &self,
        request: Request<ControllerGetVolumeRequest>,
    ) -> Result<Response<ControllerGetVolumeResponse>, Status> {
        Ok(Response::new(self.get(request.into_inner()).await?))
    }
}
