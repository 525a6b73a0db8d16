//! A controller on a directory, and nodes that are played.

use std::{
    fmt::Debug,
    fs,
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::{SignedDuration, Timestamp},
};
use kube::{Resource, ResourceExt};
use lockstep_csi_controller::Controller;
use lockstep_proto::{
    FINALIZER, TOPOLOGY_KEY,
    csi::{
        CapacityRange, ControllerExpandVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, Topology, TopologyRequirement, Volume,
        VolumeCapability,
        controller_server::Controller as _,
        volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume, access_mode::Mode},
    },
    objects::{
        DiskIdentity, DiskPhase, LegState, LegStatus, LocalDisk, LocalDiskSpec, LocalDiskStatus, MirrorVolume, MirrorVolumeStatus,
        VolumePhase,
    },
};
use lockstep_store::{Changes, Directory, Error, Store};
use tonic::{Code, Request, Response, Status};

pub const GIB: u64 = 1 << 30;
/// Milliseconds for a call that is expected to succeed, on a machine that is busy with other things.
pub const PATIENT: u64 = 30_000;
/// Milliseconds for a call that is expected to wait in vain.
pub const BRIEF: u64 = 200;

pub struct Rig {
    dir: tempfile::TempDir,
    pub store: Directory,
    pub controller: Arc<Controller<Directory>>,
}

/// What a played node does with a volume on it.
#[derive(Clone, Copy)]
pub enum Plays {
    /// Claims it, makes it ready, grows it up to so many bytes, and lets it go.
    Takes { at_most: u64 },
    /// Says no.
    Rejects(&'static str),
    /// Claims it, and then nothing.
    OnlyClaims,
}

pub const TAKES: Plays = Plays::Takes { at_most: u64::MAX };

impl Rig {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Directory::open(dir.path()).unwrap();
        Self { controller: Arc::new(Controller::new(store.clone())), store, dir }
    }

    /// Another replica.
    pub fn replica(&self) -> Controller<Directory> {
        Controller::new(Directory::open(self.dir.path()).unwrap())
    }

    /// Gives a node disks, each with so many GiB free. Their names are `<node>-0`, `<node>-1` and so on.
    pub async fn disks(&self, node: &str, free: &[u64]) {
        for (number, free) in free.iter().enumerate() {
            let name = format!("{node}-{number}");
            let mut disk = self.store.create(LocalDisk::new(&name, LocalDiskSpec { node: node.into() })).await.unwrap();
            disk.status = Some(LocalDiskStatus {
                identity: Some(DiskIdentity { physical: name, ..DiskIdentity::default() }),
                capacity_bytes: free * GIB,
                phase: DiskPhase::Ready,
                ..LocalDiskStatus::default()
            });
            self.store.update_status(disk).await.unwrap();
        }
    }

    /// A node that is played from now on.
    pub fn node(&self, name: &'static str, plays: Plays) {
        let store = self.store.clone();
        tokio::spawn(async move {
            let mut changes = store.changes::<MirrorVolume>().await.unwrap();
            loop {
                for volume in store.list::<MirrorVolume>().await.unwrap().objects.into_iter().filter(|volume| volume.spec.node == name) {
                    match play(&store, volume, plays).await {
                        Ok(()) | Err(Error::Conflict { .. } | Error::NotFound { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                changes.next().await;
            }
        });
    }

    /// A node with two disks of 8 GiB.
    pub async fn node_with_disks(&self, name: &'static str, plays: Plays) {
        self.disks(name, &[8, 8]).await;
        self.node(name, plays);
    }

    pub async fn lease(&self, node: &str, age_seconds: i64) {
        let renewed = Timestamp::now() - SignedDuration::from_secs(age_seconds);
        let mut lease =
            Lease { spec: Some(LeaseSpec { renew_time: Some(MicroTime(renewed)), ..LeaseSpec::default() }), ..Lease::default() };
        lease.metadata.name = Some(node.into());
        self.store.create(lease).await.unwrap();
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("mirrorvolumes").join(format!("{name}.yaml"))
    }

    /// Replaces the file of an object, which never is without one. `change` gets its text and its UID.
    pub fn replace(&self, name: &str, change: impl FnOnce(&str, &str) -> String) {
        let (path, beside) = (self.file(name), self.file(name).with_extension("new"));
        let text = fs::read_to_string(&path).unwrap();
        let uid = text.lines().find_map(|line| line.trim_start().strip_prefix("uid: ")).unwrap();
        fs::write(&beside, change(&text, uid)).unwrap();
        fs::rename(beside, path).unwrap();
    }

    /// Makes an object look as if it were made years ago.
    pub fn age(&self, name: &str) {
        self.replace(name, |text, _| {
            let line = text.lines().find(|line| line.trim_start().starts_with("creationTimestamp:")).unwrap();
            text.replace(line, "  creationTimestamp: \"2020-01-01T00:00:00Z\"")
        });
    }

    /// Damages the file of an object of this kind.
    pub fn damage(&self, plural: &str, name: &str) {
        fs::create_dir_all(self.dir.path().join(plural)).unwrap();
        fs::write(self.dir.path().join(plural).join(format!("{name}.yaml")), "spec: [unclosed").unwrap();
    }

    pub async fn volume(&self, name: &str) -> Option<MirrorVolume> {
        self.store.get(name).await.unwrap()
    }

    pub async fn volumes(&self) -> Vec<String> {
        self.store.list::<MirrorVolume>().await.unwrap().objects.iter().map(ResourceExt::name_any).collect()
    }

    pub async fn create(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        let response = self.controller.create_volume(within(PATIENT, request)).await?;
        Ok(response.into_inner().volume.unwrap())
    }

    /// A volume that is there, and what of its status the test wants otherwise.
    pub async fn existing(&self, name: &str, node: &str, bytes: u64, change: impl FnOnce(&mut MirrorVolumeStatus)) -> MirrorVolume {
        self.existing_as(name, node, |volume| volume.spec.capacity_bytes = bytes, change).await
    }

    pub async fn existing_as(
        &self,
        name: &str,
        node: &str,
        spec: impl FnOnce(&mut MirrorVolume),
        change: impl FnOnce(&mut MirrorVolumeStatus),
    ) -> MirrorVolume {
        let mut volume = MirrorVolume::new(name, sample(name, node));
        volume.meta_mut().finalizers = Some(vec![FINALIZER.into()]);
        spec(&mut volume);
        let created = self.store.create(volume).await.unwrap();
        let mut status = ready(&created);
        change(&mut status);
        loop {
            let mut volume = self.volume(name).await.unwrap();
            volume.status = Some(status.clone());
            match self.store.update_status(volume).await {
                // A node that is played already was faster.
                Err(Error::Conflict { .. }) => {}
                stored => return stored.unwrap(),
            }
        }
    }
}

fn sample(name: &str, node: &str) -> lockstep_proto::objects::MirrorVolumeSpec {
    lockstep_proto::objects::MirrorVolumeSpec {
        csi_name: name.into(),
        capacity_bytes: GIB,
        node: node.into(),
        volume_mode: lockstep_proto::objects::VolumeMode::Filesystem,
        fs_type: Some(lockstep_proto::objects::FsType::Ext4),
        parameters: Default::default(),
        claim: None,
    }
}

fn ready(volume: &MirrorVolume) -> MirrorVolumeStatus {
    let leg = |number| LegStatus {
        disk: format!("{}-{number}", volume.spec.node),
        leg_id: format!("leg-{number}"),
        state: LegState::In,
        progress_percent: None,
        last_error: None,
    };
    MirrorVolumeStatus {
        phase: VolumePhase::Ready,
        observed_uid: volume.meta().uid.clone(),
        capacity_bytes: volume.spec.capacity_bytes,
        legs: vec![leg(0), leg(1)],
        ..MirrorVolumeStatus::default()
    }
}

async fn play(store: &Directory, mut volume: MirrorVolume, plays: Plays) -> Result<(), Error> {
    let claimed = volume.finalizers().iter().any(|finalizer| finalizer == FINALIZER);
    let status = volume.status.clone().unwrap_or_default();
    if volume.meta().deletion_timestamp.is_some() {
        if !matches!(plays, Plays::OnlyClaims) {
            volume.finalizers_mut().clear();
            store.update(volume).await?;
        }
        return Ok(());
    }
    match plays {
        Plays::Rejects(message) if status.phase != VolumePhase::Rejected => {
            volume.status = Some(MirrorVolumeStatus {
                phase: VolumePhase::Rejected,
                reason: "NoSpace".into(),
                message: message.into(),
                observed_uid: volume.meta().uid.clone(),
                ..MirrorVolumeStatus::default()
            });
            store.update_status(volume).await?;
        }
        Plays::Rejects(_) => {}
        Plays::Takes { .. } | Plays::OnlyClaims if !claimed => {
            volume.finalizers_mut().push(FINALIZER.into());
            store.update(volume).await?;
        }
        Plays::OnlyClaims => {}
        Plays::Takes { at_most } => {
            let wanted = volume.spec.capacity_bytes;
            if status.phase != VolumePhase::Ready {
                volume.status = Some(ready(&volume));
            } else if wanted > at_most && status.refused_capacity_bytes != Some(wanted) {
                let refused = MirrorVolumeStatus { refused_capacity_bytes: Some(wanted), message: "disk full".into(), ..status };
                volume.status = Some(refused);
            } else if wanted <= at_most && wanted > status.capacity_bytes {
                volume.status = Some(MirrorVolumeStatus { capacity_bytes: wanted, refused_capacity_bytes: None, ..status });
            } else {
                return Ok(());
            }
            store.update_status(volume).await?;
        }
    }
    Ok(())
}

pub fn capability(mode: Mode, access_type: AccessType) -> VolumeCapability {
    VolumeCapability { access_mode: Some(AccessMode { mode: mode.into() }), access_type: Some(access_type) }
}

pub fn mount(fs_type: &str) -> AccessType {
    AccessType::Mount(MountVolume { fs_type: fs_type.into(), ..MountVolume::default() })
}

pub fn block() -> AccessType {
    AccessType::Block(BlockVolume {})
}

/// A volume of 1 GiB with a file system.
pub fn wanted(name: &str) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.into(),
        capacity_range: Some(range(GIB, 0)),
        volume_capabilities: vec![capability(Mode::SingleNodeWriter, mount(""))],
        ..CreateVolumeRequest::default()
    }
}

pub fn range(required: u64, limit: u64) -> CapacityRange {
    CapacityRange { required_bytes: required as i64, limit_bytes: limit as i64 }
}

pub fn topology(node: &str) -> Topology {
    Topology { segments: [(TOPOLOGY_KEY.to_owned(), node.to_owned())].into() }
}

pub fn nodes(requisite: &[&str], preferred: &[&str]) -> Option<TopologyRequirement> {
    let list = |nodes: &[&str]| nodes.iter().map(|node| topology(node)).collect();
    Some(TopologyRequirement { requisite: list(requisite), preferred: list(preferred) })
}

pub fn delete(id: &str) -> DeleteVolumeRequest {
    DeleteVolumeRequest { volume_id: id.into(), ..DeleteVolumeRequest::default() }
}

pub fn grow(id: &str, required: u64) -> ControllerExpandVolumeRequest {
    ControllerExpandVolumeRequest {
        volume_id: id.into(),
        capacity_range: Some(range(required, 0)),
        ..ControllerExpandVolumeRequest::default()
    }
}

/// A call whose caller gives up after so many milliseconds.
pub fn within<T>(milliseconds: u64, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("grpc-timeout", format!("{milliseconds}m").parse().unwrap());
    request
}

/// The message of a call that ended with this code.
#[track_caller]
pub fn refused<T: Debug>(result: Result<T, Status>, code: Code) -> String {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{}", status.message());
    status.message().to_owned()
}

#[track_caller]
pub fn contains(text: &str, parts: &[&str]) {
    assert!(parts.iter().all(|part| text.contains(part)), "{text:?} does not contain all of {parts:?}");
}

/// What a call answers when it is repeated as the provisioner does.
pub async fn repeated<T, F: Future<Output = Result<Response<T>, Status>>>(mut call: impl FnMut() -> F) -> T {
    loop {
        match call().await {
            Ok(response) => return response.into_inner(),
            Err(status) if status.code() == Code::Aborted => {}
            Err(status) => panic!("{status}"),
        }
    }
}

/// Polls a future so many times and then drops it: `None`, if it was not done until then.
pub async fn polled<F: Future>(times: usize, future: F) -> Option<F::Output> {
    struct Polled<F> {
        future: Pin<Box<F>>,
        left: usize,
    }
    impl<F: Future> Future for Polled<F> {
        type Output = Option<F::Output>;

        fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
            self.left -= 1;
            match self.future.as_mut().poll(context) {
                Poll::Ready(output) => Poll::Ready(Some(output)),
                Poll::Pending if self.left == 0 => Poll::Ready(None),
                Poll::Pending => Poll::Pending,
            }
        }
    }
    Polled { future: Box::pin(future), left: times }.await
}
