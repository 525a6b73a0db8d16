use lockstep_proto::{
    csi::{
        ControllerGetVolumeRequest, CreateVolumeRequest, GetCapacityRequest, GetCapacityResponse, ListVolumesRequest,
        ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse, VolumeCapability, controller_server::Controller as _,
        volume_capability::access_mode::Mode,
    },
    objects::LocalDisk,
};
use lockstep_store::Store;
use tonic::{Code, Request, Status};

use crate::rig::{GIB, Rig, TAKES, block, capability, contains, mount, refused, topology, wanted};

impl Rig {
    async fn page(&self, max_entries: i32, starting_token: &str) -> Result<(Vec<String>, String), Status> {
        let request = ListVolumesRequest { max_entries, starting_token: starting_token.into() };
        let response = self.controller.list_volumes(Request::new(request)).await?.into_inner();
        Ok((response.entries.into_iter().map(|entry| entry.volume.unwrap().volume_id).collect(), response.next_token))
    }

    async fn validate(&self, capabilities: Vec<VolumeCapability>) -> ValidateVolumeCapabilitiesResponse {
        let request = ValidateVolumeCapabilitiesRequest {
            volume_id: "v".into(),
            volume_capabilities: capabilities,
            ..ValidateVolumeCapabilitiesRequest::default()
        };
        self.controller.validate_volume_capabilities(Request::new(request)).await.unwrap().into_inner()
    }

    async fn capacity(&self, request: GetCapacityRequest) -> Result<GetCapacityResponse, Status> {
        Ok(self.controller.get_capacity(Request::new(request)).await?.into_inner())
    }
}

#[tokio::test]
async fn volumes_are_listed_in_pages_also_when_one_goes_away_in_between() {
    let rig = Rig::new();
    assert_eq!(rig.page(0, "").await.unwrap(), (vec![], String::new()));
    for name in ["c", "a", "e", "b", "d"] {
        rig.existing(name, "n", GIB, |_| {}).await;
    }
    rig.existing("being-made", "n", GIB, |status| status.observed_uid = None).await;
    let (first, token) = rig.page(2, "").await.unwrap();
    assert_eq!(first, ["a", "b"]);
    let mut gone = rig.volume("b").await.unwrap();
    gone.metadata.finalizers = None;
    let gone = rig.store.update(gone).await.unwrap();
    rig.store.delete("b", Some(&gone)).await.unwrap();
    let (second, token) = rig.page(2, &token).await.unwrap();
    assert_eq!(second, ["c", "d"]);
    assert_eq!(rig.page(2, &token).await.unwrap(), (vec!["e".to_owned()], String::new()));
    assert_eq!(rig.page(0, "").await.unwrap(), (["a", "c", "d", "e"].map(str::to_owned).into(), String::new()));
    assert_eq!(rig.page(4, "").await.unwrap().1, "", "a full last page is the last one");
    contains(&refused(rig.page(2, "nonsense").await, Code::Aborted), &["nonsense"]);
    contains(&refused(rig.page(-1, "").await, Code::InvalidArgument), &["max_entries"]);
    rig.damage("mirrorvolumes", "x");
    contains(&refused(rig.page(0, "").await, Code::Unavailable), &["x.yaml"]);
}

#[tokio::test]
async fn one_volume_is_looked_up() {
    let rig = Rig::new();
    rig.existing("v", "n", GIB, |_| {}).await;
    rig.existing("new", "n", GIB, |status| status.observed_uid = None).await;
    let get = |id: &str| rig.controller.controller_get_volume(Request::new(ControllerGetVolumeRequest { volume_id: id.into() }));
    let found = get("v").await.unwrap().into_inner();
    let volume = found.volume.unwrap();
    assert_eq!((volume.capacity_bytes as u64, volume.accessible_topology), (GIB, vec![topology("n")]));
    assert!(found.status.unwrap().published_node_ids.is_empty());
    refused(get("").await, Code::InvalidArgument);
    refused(get("w").await, Code::NotFound);
    refused(get("Not/A:Name").await, Code::NotFound);
    refused(get("new").await, Code::Aborted);
}

#[tokio::test]
async fn capabilities_are_confirmed_as_far_as_the_volume_has_them() {
    let rig = Rig::new();
    rig.existing("v", "n", GIB, |_| {}).await;
    for good in [mount(""), mount("ext4")] {
        let capabilities = vec![capability(Mode::SingleNodeWriter, good)];
        let answer = rig.validate(capabilities.clone()).await;
        assert_eq!(answer.confirmed.unwrap().volume_capabilities, capabilities);
    }
    for (mode, access, names) in [
        (Mode::SingleNodeWriter, block(), "raw block"),
        (Mode::SingleNodeWriter, mount("xfs"), "ext4 and not xfs"),
        (Mode::MultiNodeSingleWriter, mount(""), "MULTI_NODE_SINGLE_WRITER"),
    ] {
        let answer = rig.validate(vec![capability(mode, access)]).await;
        assert_eq!(answer.confirmed, None);
        contains(&answer.message, &[names]);
    }
    let validate = |request| rig.controller.validate_volume_capabilities(Request::new(request));
    let plain = ValidateVolumeCapabilitiesRequest {
        volume_id: "v".into(),
        volume_capabilities: vec![capability(Mode::SingleNodeWriter, mount(""))],
        ..ValidateVolumeCapabilitiesRequest::default()
    };
    let other = [("transport".to_owned(), "fuse".to_owned())];
    let answer = validate(ValidateVolumeCapabilitiesRequest { parameters: other.clone().into(), ..plain.clone() }).await.unwrap();
    assert_eq!(answer.into_inner().confirmed, None);
    let context = [("storage.kubernetes.io/csiProvisionerIdentity".to_owned(), "x".to_owned())];
    let answer =
        validate(ValidateVolumeCapabilitiesRequest { volume_context: context.into(), ..plain.clone() }).await.unwrap().into_inner();
    assert_eq!(answer.confirmed, None);
    contains(&answer.message, &["volume_context", "csiProvisionerIdentity"]);
    let answer = validate(ValidateVolumeCapabilitiesRequest { mutable_parameters: other.into(), ..plain.clone() }).await.unwrap();
    contains(&answer.into_inner().message, &["transport"]);
    refused(validate(ValidateVolumeCapabilitiesRequest { volume_id: String::new(), ..plain.clone() }).await, Code::InvalidArgument);
    refused(validate(ValidateVolumeCapabilitiesRequest { volume_capabilities: vec![], ..plain.clone() }).await, Code::InvalidArgument);
    refused(validate(ValidateVolumeCapabilitiesRequest { volume_id: "w".into(), ..plain }).await, Code::NotFound);
}

#[tokio::test]
async fn capacity_is_what_pairs_of_disks_can_take_and_ignores_the_sidecars_parameters() {
    let rig = Rig::new();
    rig.disks("a", &[8, 4, 4]).await;
    rig.disks("b", &[2, 3]).await;
    let parameters = [("csi.storage.k8s.io/fstype", "xfs"), ("csi.storage.k8s.io/anything", "x"), ("transport", "auto")];
    let request = GetCapacityRequest {
        parameters: parameters.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        ..GetCapacityRequest::default()
    };
    let answer = |available: u64, maximum: u64, minimum: u64| GetCapacityResponse {
        available_capacity: available as i64,
        maximum_volume_size: Some(maximum as i64),
        minimum_volume_size: Some(minimum as i64),
    };
    assert_eq!(rig.capacity(request.clone()).await.unwrap(), answer(10 * GIB, 4 * GIB, 1 << 20));
    let on = |node| GetCapacityRequest { accessible_topology: Some(topology(node)), ..request.clone() };
    assert_eq!(rig.capacity(on("a")).await.unwrap(), answer(8 * GIB, 4 * GIB, 1 << 20));
    assert_eq!(rig.capacity(on("b")).await.unwrap(), answer(2 * GIB, 2 * GIB, 1 << 20));
    assert_eq!(rig.capacity(on("elsewhere")).await.unwrap(), answer(0, 0, 1 << 20));
    let capable = |access| GetCapacityRequest { volume_capabilities: vec![capability(Mode::SingleNodeWriter, access)], ..on("b") };
    assert_eq!(rig.capacity(capable(mount("xfs"))).await.unwrap(), answer(2 * GIB, 2 * GIB, 300 << 20));
    contains(&refused(rig.capacity(capable(mount("zfs"))).await, Code::InvalidArgument), &["zfs"]);
    let thin = GetCapacityRequest { parameters: [("provisioning".to_owned(), "thin".to_owned())].into(), ..on("a") };
    contains(&refused(rig.capacity(thin).await, Code::InvalidArgument), &["provisioning"]);
    let mut disk = rig.store.get::<LocalDisk>("b-1").await.unwrap().unwrap();
    disk.status.as_mut().unwrap().allocated_bytes = 2 * GIB;
    rig.store.update_status(disk).await.unwrap();
    assert_eq!(rig.capacity(on("b")).await.unwrap(), answer(GIB, GIB, 1 << 20));
    rig.damage("localdisks", "c-0");
    contains(&refused(rig.capacity(on("b")).await, Code::Unavailable), &["c-0.yaml"]);
}

#[tokio::test]
async fn the_largest_volume_that_capacity_names_can_be_had_and_no_larger_one() {
    let rig = Rig::new();
    rig.disks("a", &[5, 3, 2]).await;
    rig.node("a", TAKES);
    let room = rig.capacity(GetCapacityRequest::default()).await.unwrap();
    let maximum = room.maximum_volume_size.unwrap() as u64;
    let of = |name, bytes| CreateVolumeRequest { capacity_range: Some(crate::rig::range(bytes, 0)), ..wanted(name) };
    refused(rig.create(of("larger", maximum + 1)).await, Code::ResourceExhausted);
    assert_eq!(rig.create(of("largest", maximum)).await.unwrap().capacity_bytes as u64, maximum);
}
