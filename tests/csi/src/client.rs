//! The calls that Kubernetes makes.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use lockstep_proto::csi::{
    CapacityRange, ControllerExpandVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, NodeExpandVolumeRequest,
    NodeGetVolumeStatsRequest, NodePublishVolumeRequest, NodeStageVolumeRequest, NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest,
    ProbeRequest, Volume, VolumeCapability, VolumeUsage,
    controller_client::ControllerClient,
    identity_client::IdentityClient,
    node_client::NodeClient,
    volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume, access_mode::Mode},
};
use tonic::{
    Status,
    transport::{Channel, Endpoint, Uri},
};

/// Both sockets.
#[derive(Clone, Debug)]
pub struct Client {
    node: Channel,
    controller: Channel,
}

/// Connects when it is used, and again when the server was restarted.
const SILENCE: std::time::Duration = std::time::Duration::from_secs(2);

fn connect(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    // A killed process that cannot end accepts connections and is silent.
    let endpoint = Endpoint::from_static("http://localhost").http2_keep_alive_interval(SILENCE).keep_alive_timeout(SILENCE);
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    }))
}

/// A capability for a file system, or, without one, for a bare device.
pub fn capability(fs_type: Option<&str>, mode: Mode) -> VolumeCapability {
    let access = match fs_type {
        Some(fs_type) => AccessType::Mount(MountVolume { fs_type: fs_type.into(), ..Default::default() }),
        None => AccessType::Block(BlockVolume {}),
    };
    VolumeCapability { access_mode: Some(AccessMode { mode: mode.into() }), access_type: Some(access) }
}

/// The ordinary mode.
fn ordinary(fs_type: Option<&str>) -> Option<VolumeCapability> {
    Some(capability(fs_type, Mode::SingleNodeWriter))
}

fn utf8(path: &Path) -> String {
    path.to_str().expect("the lab's paths are text").to_owned()
}

/// A request for a volume, to be changed where a test wants another.
pub fn create_request(name: &str, bytes: u64, fs_type: Option<&str>) -> CreateVolumeRequest {
    let required_bytes = i64::try_from(bytes).expect("a size");
    CreateVolumeRequest {
        name: name.into(),
        capacity_range: Some(CapacityRange { required_bytes, limit_bytes: 0 }),
        volume_capabilities: ordinary(fs_type).into_iter().collect(),
        ..Default::default()
    }
}

impl Client {
    /// Of these sockets.
    pub fn new(node: &Path, controller: &Path) -> Self {
        Self { node: connect(node), controller: connect(controller) }
    }

    /// The Node service.
    pub fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.node.clone())
    }

    /// The Controller service.
    pub fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.controller.clone())
    }

    async fn ready(channel: &Channel) -> bool {
        let probe = IdentityClient::new(channel.clone()).probe(ProbeRequest {}).await;
        probe.is_ok_and(|answer| answer.into_inner().ready == Some(true))
    }

    /// Whether csi-node says that it is ready.
    pub async fn node_ready(&self) -> bool {
        Self::ready(&self.node).await
    }

    /// Whether csi-controller says that it is ready.
    pub async fn controller_ready(&self) -> bool {
        Self::ready(&self.controller).await
    }

    /// CreateVolume.
    pub async fn create(&self, name: &str, bytes: u64, fs_type: Option<&str>) -> Result<Volume, Status> {
        let answer = self.controller().create_volume(create_request(name, bytes, fs_type)).await?.into_inner();
        Ok(answer.volume.expect("an answer has a volume"))
    }

    /// CreateVolume with parameters of a StorageClass: the volume's id.
    pub async fn create_with(&self, name: &str, bytes: u64, parameters: &[(&str, &str)]) -> Result<String, Status> {
        let mut request = create_request(name, bytes, None);
        request.parameters = parameters.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let answer = self.controller().create_volume(request).await?.into_inner();
        Ok(answer.volume.expect("an answer has a volume").volume_id)
    }

    /// DeleteVolume.
    pub async fn delete(&self, id: &str) -> Result<(), Status> {
        let request = DeleteVolumeRequest { volume_id: id.into(), ..Default::default() };
        self.controller().delete_volume(request).await.map(drop)
    }

    /// ControllerExpandVolume: the new size.
    pub async fn controller_expand(&self, id: &str, bytes: u64) -> Result<i64, Status> {
        let capacity_range = Some(CapacityRange { required_bytes: i64::try_from(bytes).expect("a size"), limit_bytes: 0 });
        let request = ControllerExpandVolumeRequest { volume_id: id.into(), capacity_range, ..Default::default() };
        Ok(self.controller().controller_expand_volume(request).await?.into_inner().capacity_bytes)
    }

    /// NodeStageVolume.
    pub async fn stage(&self, id: &str, path: &Path, fs_type: Option<&str>) -> Result<(), Status> {
        let request = NodeStageVolumeRequest {
            volume_id: id.into(),
            staging_target_path: utf8(path),
            volume_capability: ordinary(fs_type),
            ..Default::default()
        };
        self.node().node_stage_volume(request).await.map(drop)
    }

    /// NodeUnstageVolume.
    pub async fn unstage(&self, id: &str, path: &Path) -> Result<(), Status> {
        let request = NodeUnstageVolumeRequest { volume_id: id.into(), staging_target_path: utf8(path) };
        self.node().node_unstage_volume(request).await.map(drop)
    }

    /// A NodePublishVolume request.
    pub fn publish_request(id: &str, staging: &Path, target: &Path, fs_type: Option<&str>) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: id.into(),
            staging_target_path: utf8(staging),
            target_path: utf8(target),
            volume_capability: ordinary(fs_type),
            ..Default::default()
        }
    }

    /// NodePublishVolume.
    pub async fn publish(&self, id: &str, staging: &Path, target: &Path, fs_type: Option<&str>) -> Result<(), Status> {
        self.node().node_publish_volume(Self::publish_request(id, staging, target, fs_type)).await.map(drop)
    }

    /// NodeUnpublishVolume.
    pub async fn unpublish(&self, id: &str, target: &Path) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest { volume_id: id.into(), target_path: utf8(target) };
        self.node().node_unpublish_volume(request).await.map(drop)
    }

    /// NodeExpandVolume: the new size.
    pub async fn node_expand(&self, id: &str, path: &Path, bytes: u64) -> Result<i64, Status> {
        let capacity_range = Some(CapacityRange { required_bytes: i64::try_from(bytes).expect("a size"), limit_bytes: 0 });
        let request = NodeExpandVolumeRequest { volume_id: id.into(), volume_path: utf8(path), capacity_range, ..Default::default() };
        Ok(self.node().node_expand_volume(request).await?.into_inner().capacity_bytes)
    }

    /// NodeGetVolumeStats.
    pub async fn usage(&self, id: &str, path: &Path) -> Result<Vec<VolumeUsage>, Status> {
        let request = NodeGetVolumeStatsRequest { volume_id: id.into(), volume_path: utf8(path), ..Default::default() };
        Ok(self.node().node_get_volume_stats(request).await?.into_inner().usage)
    }
}

/// A volume of a test: where it is staged and published.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its id.
    pub id: String,
    /// Its file system; none: a bare device.
    pub fs_type: Option<&'static str>,
    /// Where it is staged.
    pub staging: PathBuf,
    /// Where it is published.
    pub target: PathBuf,
}

impl Place {
    /// Stages and publishes it.
    pub async fn up(&self, client: &Client) -> Result<(), Status> {
        client.stage(&self.id, &self.staging, self.fs_type).await?;
        client.publish(&self.id, &self.staging, &self.target, self.fs_type).await
    }

    /// Unpublishes and unstages it. A file of it that a test had open may be open a moment longer, in a child that is being started for another test: where it
    /// is busy it is asked again, as the kubelet does.
    pub async fn down(&self, client: &Client) -> Result<(), Status> {
        let patience = Instant::now() + Duration::from_secs(5);
        while let Err(error) = client.unpublish(&self.id, &self.target).await {
            if !error.message().contains("os error 16") || Instant::now() > patience {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        client.unstage(&self.id, &self.staging).await
    }
}
