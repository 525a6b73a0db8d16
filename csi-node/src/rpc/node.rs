//! The Node service.

use std::sync::Arc;

use lockstep_proto::{
    TOPOLOGY_KEY,
    csi::{
        NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest,
        NodeGetInfoResponse, NodeGetStorageHealthRequest, NodeGetStorageHealthResponse, NodeGetVolumeHealthRequest,
        NodeGetVolumeHealthResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest,
        NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest, NodeStageVolumeResponse, NodeUnpublishVolumeRequest,
        NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest, NodeUnstageVolumeResponse, Topology, VolumeHealth, node_server,
        node_service_capability::{Rpc, Type, rpc},
    },
};
use lockstep_store::Store;
use tonic::{Request, Response, Status, async_trait};

use super::{absolute_path, required, required_path};
use crate::{capability::Access, error::Error, node::Node};

/// Serves a node.
#[derive(Debug)]
pub struct NodeService<S> {
    node: Arc<Node<S>>,
}

impl<S> NodeService<S> {
    /// Serves this one.
    pub fn new(node: Arc<Node<S>>) -> Self {
        Self { node }
    }
}

#[async_trait]
impl<S: Store> node_server::Node for NodeService<S> {
    async fn node_stage_volume(&self, request: Request<NodeStageVolumeRequest>) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = required("volume_id", &request.volume_id)?;
        let path = absolute_path("staging_target_path", &request.staging_target_path)?;
        let access = Access::parse(request.volume_capability)?;
        self.node.scanned()?;
        let named = id.clone();
        self.node.exclusively(&named, |node| node.stage(id, path, access)).await?;
        Ok(Response::new(NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(&self, request: Request<NodeUnstageVolumeRequest>) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = required("volume_id", &request.volume_id)?;
        let path = required_path("staging_target_path", &request.staging_target_path)?;
        let named = id.clone();
        self.node.exclusively(&named, |node| node.unstage(id, path)).await?;
        Ok(Response::new(NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(&self, request: Request<NodePublishVolumeRequest>) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = required("volume_id", &request.volume_id)?;
        let target = absolute_path("target_path", &request.target_path)?;
        let access = Access::parse(request.volume_capability)?;
        if request.staging_target_path.is_empty() {
            return Err(Error::Precondition("staging_target_path is missing: the volume has to be staged first".into()).into());
        }
        let staging = required_path("staging_target_path", &request.staging_target_path)?;
        let (named, read_only) = (id.clone(), request.readonly);
        self.node.exclusively(&named, |node| node.publish(id, staging, target, access, read_only)).await?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = required("volume_id", &request.volume_id)?;
        let target = required_path("target_path", &request.target_path)?;
        let named = id.clone();
        self.node.exclusively(&named, |node| node.unpublish(id, target)).await?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let id = required("volume_id", &request.volume_id)?;
        let path = required_path("volume_path", &request.volume_path)?;
        let usage = Arc::clone(&self.node).usage(id, path).await?;
        Ok(Response::new(NodeGetVolumeStatsResponse { usage }))
    }

    async fn node_get_volume_health(
        &self,
        request: Request<NodeGetVolumeHealthRequest>,
    ) -> Result<Response<NodeGetVolumeHealthResponse>, Status> {
        let volume_id = required("volume_id", &request.into_inner().volume_id)?;
        let health_statuses = self.node.volume_health(&volume_id).await?;
        Ok(Response::new(NodeGetVolumeHealthResponse { volume_health: Some(VolumeHealth { volume_id, health_statuses }) }))
    }

    async fn node_get_storage_health(
        &self,
        _: Request<NodeGetStorageHealthRequest>,
    ) -> Result<Response<NodeGetStorageHealthResponse>, Status> {
        self.node.scanned()?;
        Ok(Response::new(NodeGetStorageHealthResponse { backend_health: self.node.storage_health() }))
    }

    async fn node_expand_volume(&self, request: Request<NodeExpandVolumeRequest>) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = required("volume_id", &request.volume_id)?;
        let path = required_path("volume_path", &request.volume_path)?;
        let bytes = request.capacity_range.map_or(0, |range| range.required_bytes);
        let bytes =
            u64::try_from(bytes).map_err(|_| Error::InvalidArgument(format!("capacity_range.required_bytes is {bytes}: below zero")))?;
        let named = id.clone();
        let bytes = self.node.exclusively(&named, |node| node.expand(id, path, bytes)).await?;
        Ok(Response::new(NodeExpandVolumeResponse { capacity_bytes: i64::try_from(bytes).unwrap_or(i64::MAX) }))
    }

    async fn node_get_capabilities(&self, _: Request<NodeGetCapabilitiesRequest>) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capabilities = [
            rpc::Type::StageUnstageVolume,
            rpc::Type::GetVolumeStats,
            rpc::Type::ExpandVolume,
            rpc::Type::SingleNodeMultiWriter,
            rpc::Type::GetVolumeHealth,
            rpc::Type::GetStorageHealth,
        ];
        let capability = |kind: rpc::Type| NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })) };
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: capabilities.map(capability).into() }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        let segments = [(TOPOLOGY_KEY.to_owned(), self.node.name.clone())].into();
        let accessible_topology = Some(Topology { segments });
        Ok(Response::new(NodeGetInfoResponse { node_id: self.node.name.clone(), accessible_topology, ..Default::default() }))
    }
}
