use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use lockstep_proto::{
    FINALIZER,
    csi::{CreateVolumeRequest, controller_server::Controller as _},
    objects::{LocalDisk, MirrorVolumeStatus, VolumePhase},
};
use lockstep_store::Store;
use tonic::Code;

use crate::rig::{BRIEF, GIB, PATIENT, Plays, Rig, TAKES, contains, nodes, range, refused, topology, wanted, within};

fn on(name: &str, requisite: &[&str], preferred: &[&str]) -> CreateVolumeRequest {
    CreateVolumeRequest { accessibility_requirements: nodes(requisite, preferred), ..wanted(name) }
}

#[tokio::test]
async fn the_preferred_node_comes_first_and_without_any_that_with_the_most_room() {
    let rig = Rig::new();
    for (node, free) in [("a", [4, 4]), ("b", [8, 8]), ("c", [6, 6])] {
        rig.disks(node, &free).await;
        rig.node(node, TAKES);
    }
    for (name, requisite, preferred, node) in [
        ("anywhere", &[][..], &[][..], "b"),
        ("preferred", &["a", "b", "c"], &["c", "a"], "c"),
        ("only-preferred", &[], &["a"], "a"),
        ("requisite", &["c", "a"], &[], "c"),
        ("not-allowed", &["a"], &["b"], "a"),
    ] {
        let volume = rig.create(on(name, requisite, preferred)).await.unwrap();
        assert_eq!(volume.accessible_topology, [topology(node)], "{name}");
    }
    let without = CreateVolumeRequest { accessibility_requirements: None, ..wanted("without") };
    assert_eq!(rig.create(without).await.unwrap().accessible_topology, [topology("b")]);
}

/// A claim of this name, and what the provisioner asks for it.
async fn claimed(rig: &Rig, name: &str, selected_node: Option<&str>, request: CreateVolumeRequest) -> CreateVolumeRequest {
    let mut claim = PersistentVolumeClaim::default();
    claim.metadata.name = Some(name.into());
    claim.metadata.annotations = selected_node.map(|node| [("volume.kubernetes.io/selected-node".to_owned(), node.to_owned())].into());
    rig.store.create(claim).await.unwrap();
    let parameters = [("csi.storage.k8s.io/pvc/name", name), ("csi.storage.k8s.io/pvc/namespace", "default")];
    CreateVolumeRequest { parameters: parameters.map(|(name, value)| (name.to_owned(), value.to_owned())).into(), ..request }
}

/// The pod runs on that node and on no other: its volume elsewhere would keep it waiting for ever.
#[tokio::test]
async fn a_volume_whose_node_the_scheduler_chose_is_there_or_nowhere() {
    let rig = Rig::new();
    rig.disks("full", &[0, 0]).await;
    rig.node("full", TAKES);
    rig.disks("dead", &[9, 9]).await;
    rig.lease("dead", 600).await;
    rig.node_with_disks("good", TAKES).await;
    rig.lease("good", 0).await;
    let all = ["full", "dead", "good"];
    for node in ["full", "dead"] {
        let request = claimed(&rig, &format!("chosen-{node}"), Some(node), on("v", &all, &[node, "good"])).await;
        let message = refused(rig.create(request).await, Code::ResourceExhausted);
        assert!(message.contains(&format!("{node}: ")) && !message.contains("good: "), "{message}");
        assert_eq!(rig.volumes().await, [""; 0]);
    }
    let request = claimed(&rig, "chosen-good", Some("good"), on("v", &all, &["good", "full"])).await;
    assert_eq!(rig.create(request).await.unwrap().accessible_topology, [topology("good")]);
    // Nobody has chosen: any of them will do.
    let request = claimed(&rig, "anywhere", None, on("w", &all, &["full", "dead", "good"])).await;
    assert_eq!(rig.create(request).await.unwrap().accessible_topology, [topology("good")]);
}

#[tokio::test]
async fn a_node_that_rejects_is_followed_by_the_next_one() {
    let rig = Rig::new();
    rig.node_with_disks("a", Plays::Rejects("no")).await;
    rig.node_with_disks("b", Plays::Rejects("no")).await;
    rig.node_with_disks("c", TAKES).await;
    let volume = rig.create(on("v", &["a", "b", "c"], &["b", "a", "c"])).await.unwrap();
    assert_eq!(volume.accessible_topology, [topology("c")]);
    assert_eq!(rig.volumes().await, ["v"]);
}

#[tokio::test]
async fn when_every_node_rejects_it_their_words_are_answered_and_nothing_exists() {
    let rig = Rig::new();
    rig.node_with_disks("a", Plays::Rejects("slack is used up")).await;
    rig.node_with_disks("b", Plays::Rejects("disk is read-only")).await;
    let message = refused(rig.create(on("v", &["a", "b"], &["b"])).await, Code::ResourceExhausted);
    contains(&message, &["a: slack is used up", "b: disk is read-only", "NoSpace"]);
    assert_eq!(rig.volumes().await, [""; 0]);
    let message = refused(rig.create(on("v", &["a"], &["a"])).await, Code::ResourceExhausted);
    assert!(!message.contains("b:"), "only what was asked for: {message}");
}

#[tokio::test]
async fn nodes_without_room_are_not_asked() {
    let rig = Rig::new();
    // Nobody plays these nodes: if one were asked, the call would wait for it.
    rig.disks("small", &[1, 8]).await;
    rig.disks("single", &[8]).await;
    rig.disks("good", &[8, 8]).await;
    rig.node("good", TAKES);
    let big = |name| CreateVolumeRequest { capacity_range: Some(range(2 * GIB, 0)), ..wanted(name) };
    let request = CreateVolumeRequest {
        accessibility_requirements: nodes(&["small", "single", "bare", "good"], &["small", "single", "bare"]),
        ..big("v")
    };
    assert_eq!(rig.create(request).await.unwrap().accessible_topology, [topology("good")]);
    let request = CreateVolumeRequest { accessibility_requirements: nodes(&["small", "single", "bare"], &[]), ..big("w") };
    let message = refused(rig.create(request).await, Code::ResourceExhausted);
    contains(&message, &["small: the largest volume", &GIB.to_string(), "single: it has no two usable disks", "bare: it has no disk"]);
    contains(&message, &["Ask for less", "add disks"]);
    let huge = CreateVolumeRequest { capacity_range: Some(range(1 << 62, 0)), ..wanted("huge") };
    refused(rig.create(huge).await, Code::ResourceExhausted);
    assert_eq!(rig.volumes().await, ["v"]);
}

#[tokio::test]
async fn parts_of_one_physical_disk_are_no_pair_and_that_is_said() {
    let rig = Rig::new();
    rig.disks("a", &[8, 8]).await;
    let mut disk = rig.store.get::<LocalDisk>("a-1").await.unwrap().unwrap();
    disk.status.as_mut().unwrap().identity.as_mut().unwrap().physical = "a-0".into();
    rig.store.update_status(disk).await.unwrap();
    let message = refused(rig.create(wanted("v")).await, Code::ResourceExhausted);
    contains(
        &message,
        &["a: all its disks that can be used are parts of one physical disk (a-0), and a second one is needed", "add disks"],
    );
}

#[tokio::test]
async fn without_any_disk_there_is_no_room() {
    contains(
        &refused(Rig::new().create(wanted("v")).await, Code::ResourceExhausted),
        &["no node has two usable disks", "add disks", "LocalDisk"],
    );
}

#[tokio::test]
async fn a_disk_that_cannot_be_read_stops_placement_and_not_what_exists() {
    let rig = Rig::new();
    rig.node_with_disks("a", TAKES).await;
    rig.create(wanted("v")).await.unwrap();
    rig.damage("localdisks", "b-0");
    contains(&refused(rig.create(wanted("w")).await, Code::Unavailable), &["b-0.yaml", "Repair it"]);
    rig.create(wanted("v")).await.unwrap();
    assert_eq!(rig.store.list::<LocalDisk>().await.unwrap().unreadable.len(), 1);
}

/// A volume that nobody claimed, made long ago, on node `dead`; node `b` takes it.
async fn left_over() -> Rig {
    let rig = Rig::new();
    rig.disks("dead", &[8, 8]).await;
    refused(rig.controller.create_volume(within(50, on("v", &["dead", "b"], &["dead"]))).await, Code::DeadlineExceeded);
    rig.age("v");
    rig.node_with_disks("b", TAKES).await;
    rig
}

async fn asked_again(rig: &Rig, milliseconds: u64) -> Result<Vec<lockstep_proto::csi::Topology>, tonic::Status> {
    let response = rig.controller.create_volume(within(milliseconds, on("v", &["dead", "b"], &["dead"]))).await?;
    Ok(response.into_inner().volume.unwrap().accessible_topology)
}

#[tokio::test]
async fn a_volume_that_a_silent_node_never_claimed_goes_to_the_next_one() {
    let rig = left_over().await;
    assert_eq!(asked_again(&rig, PATIENT).await.unwrap(), [topology("b")], "no Lease");
    let rig = left_over().await;
    rig.lease("dead", 45).await;
    assert_eq!(asked_again(&rig, PATIENT).await.unwrap(), [topology("b")], "a stale Lease");
    let rig = left_over().await;
    let message = refused(rig.create(on("v", &["dead"], &[])).await, Code::ResourceExhausted);
    contains(&message, &["dead: it did not answer for 60 s", "Lease"]);
    assert_eq!(rig.volumes().await, [""; 0]);
}

/// Nodes `dead` and `gone`, with room and silent.
async fn two_silent_nodes() -> Rig {
    let rig = Rig::new();
    for node in ["dead", "gone"] {
        rig.disks(node, &[8, 8]).await;
    }
    rig.lease("dead", 600).await;
    rig
}

const ALL: [&str; 3] = ["dead", "gone", "good"];

#[tokio::test]
async fn two_silent_nodes_do_not_pass_a_volume_to_and_fro_while_a_third_one_is_there() {
    let rig = two_silent_nodes().await;
    let call = |name: &'static str, milliseconds| rig.controller.create_volume(within(milliseconds, on(name, &ALL, &["dead", "gone"])));
    contains(&refused(call("v", BRIEF).await, Code::DeadlineExceeded), &["node dead", "not claimed"]);
    rig.age("v");
    contains(&refused(call("v", BRIEF).await, Code::DeadlineExceeded), &["node gone", "not claimed"]);
    rig.node_with_disks("good", TAKES).await;
    rig.lease("good", 15).await;
    rig.age("v");
    for name in ["v", "w", "x"] {
        let volume = call(name, PATIENT).await.unwrap().into_inner().volume.unwrap();
        assert_eq!(volume.accessible_topology, [topology("good")], "{name}");
    }
}

#[tokio::test]
async fn when_the_only_node_that_speaks_rejects_a_volume_the_silent_ones_are_not_waited_for() {
    let rig = two_silent_nodes().await;
    rig.node_with_disks("good", Plays::Rejects("slack is used up")).await;
    rig.lease("good", 15).await;
    for _ in 0..2 {
        let message = refused(rig.create(on("v", &ALL, &["dead"])).await, Code::ResourceExhausted);
        contains(&message, &["dead: its Lease was not renewed for 60", "gone: it has no Lease", "good: slack is used up"]);
        assert_eq!(rig.volumes().await, [""; 0]);
    }
    let message = refused(rig.create(on("v", &["dead"], &[])).await, Code::ResourceExhausted);
    contains(&message, &["dead: its Lease was not renewed"]);
}

#[tokio::test]
async fn when_every_node_is_silent_one_that_comes_back_gets_the_volume() {
    let rig = two_silent_nodes().await;
    let call = |milliseconds| rig.controller.create_volume(within(milliseconds, on("v", &ALL, &["dead"])));
    refused(call(BRIEF).await, Code::DeadlineExceeded);
    rig.node("dead", TAKES);
    assert_eq!(call(PATIENT).await.unwrap().into_inner().volume.unwrap().accessible_topology, [topology("dead")]);
}

#[tokio::test]
async fn a_lease_that_cannot_be_read_keeps_a_volume_from_its_node_only() {
    let rig = two_silent_nodes().await;
    rig.damage("leases", "gone");
    rig.node_with_disks("good", Plays::Rejects("no")).await;
    rig.lease("good", 0).await;
    let message = refused(rig.create(on("v", &ALL, &["gone"])).await, Code::ResourceExhausted);
    contains(&message, &["gone: ", "gone.yaml", "good: no"]);
}

#[tokio::test]
async fn a_node_whose_name_no_object_can_have_is_silent() {
    let rig = Rig::new();
    rig.disks("dead", &[8, 8]).await;
    refused(rig.controller.create_volume(within(50, wanted("v"))).await, Code::DeadlineExceeded);
    rig.replace("v", |text, _| text.replace("node: dead", "node: Not/A:Name"));
    rig.age("v");
    rig.node("dead", TAKES);
    assert_eq!(rig.create(wanted("v")).await.unwrap().accessible_topology, [topology("dead")]);
}

#[tokio::test]
async fn a_volume_of_a_node_that_renews_its_lease_is_not_withdrawn() {
    let rig = left_over().await;
    rig.lease("dead", 15).await;
    contains(&refused(asked_again(&rig, BRIEF).await, Code::DeadlineExceeded), &["node dead"]);
}

#[tokio::test]
async fn a_volume_that_is_young_is_not_withdrawn() {
    let rig = Rig::new();
    rig.disks("dead", &[8, 8]).await;
    rig.node_with_disks("b", TAKES).await;
    contains(&refused(asked_again(&rig, BRIEF).await, Code::DeadlineExceeded), &["node dead"]);
    contains(&refused(asked_again(&rig, BRIEF).await, Code::DeadlineExceeded), &["node dead"]);
}

#[tokio::test]
async fn a_volume_that_was_claimed_is_never_withdrawn() {
    let rig = left_over().await;
    let mut volume = rig.volume("v").await.unwrap();
    volume.metadata.finalizers = Some(vec![FINALIZER.into()]);
    let mut volume = rig.store.update(volume).await.unwrap();
    contains(&refused(asked_again(&rig, BRIEF).await, Code::DeadlineExceeded), &["node dead", "(claimed"]);
    // Not even if it is rejected: the claim is given back when nothing is left on the disks.
    volume.status = Some(MirrorVolumeStatus {
        phase: VolumePhase::Rejected,
        observed_uid: volume.metadata.uid.clone(),
        ..MirrorVolumeStatus::default()
    });
    let mut volume = rig.store.update_status(volume).await.unwrap();
    refused(asked_again(&rig, BRIEF).await, Code::DeadlineExceeded);
    volume.metadata.finalizers = None;
    rig.store.update(volume).await.unwrap();
    assert_eq!(asked_again(&rig, PATIENT).await.unwrap(), [topology("b")]);
}
