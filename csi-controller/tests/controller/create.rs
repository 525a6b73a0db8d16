use std::time::Duration;

use kube::Resource;
use lockstep_proto::{
    csi::{
        CreateVolumeRequest, VolumeCapability, VolumeContentSource, controller_server::Controller as _,
        volume_capability::access_mode::Mode,
    },
    objects::{FsType, VolumeMode},
};
use tonic::{Code, Request};

use crate::rig::{
    GIB, PATIENT, Plays, Rig, TAKES, block, capability, contains, mount, nodes, polled, range, refused, repeated, topology, wanted, within,
};

#[tokio::test]
async fn a_volume_is_answered_once_its_node_made_it_ready() {
    let rig = Rig::new();
    rig.node_with_disks("a", TAKES).await;
    let parameters = [("transport", "fuse"), ("csi.storage.k8s.io/pvc/name", "claim"), ("csi.storage.k8s.io/pvc/namespace", "shop")];
    let request = CreateVolumeRequest {
        parameters: parameters.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        capacity_range: Some(range(GIB + 1, 0)),
        ..wanted("pvc-1")
    };
    let volume = rig.create(request).await.unwrap();
    assert_eq!(volume.volume_id, "pvc-1");
    assert_eq!(volume.capacity_bytes as u64, GIB + (1 << 20), "whole MiB");
    assert_eq!(volume.accessible_topology, [topology("a")]);
    let spec = rig.volume("pvc-1").await.unwrap().spec;
    assert_eq!((spec.csi_name.as_str(), spec.node.as_str(), spec.capacity_bytes), ("pvc-1", "a", GIB + (1 << 20)));
    assert_eq!((spec.volume_mode, spec.fs_type), (VolumeMode::Filesystem, Some(FsType::Ext4)));
    assert_eq!(spec.parameters, [("transport".to_owned(), "fuse".to_owned())].into(), "the sidecars' own are left out");
    assert_eq!(spec.claim.as_deref(), Some("shop/claim"));
}

#[tokio::test]
async fn a_file_system_is_pinned_and_a_block_volume_has_none() {
    let rig = Rig::new();
    rig.node_with_disks("a", TAKES).await;
    let xfs = CreateVolumeRequest {
        capacity_range: Some(range(1, 0)),
        volume_capabilities: vec![capability(Mode::SingleNodeMultiWriter, mount("xfs"))],
        ..wanted("xfs")
    };
    assert_eq!(rig.create(xfs).await.unwrap().capacity_bytes, 300 << 20, "the smallest XFS");
    let small = CreateVolumeRequest {
        capacity_range: Some(range(100 << 20, 200 << 20)),
        volume_capabilities: vec![capability(Mode::SingleNodeWriter, mount("xfs"))],
        ..wanted("small")
    };
    contains(&refused(rig.create(small).await, Code::OutOfRange), &["at least 300 MiB"]);
    let block = CreateVolumeRequest {
        capacity_range: Some(range(1, 0)),
        volume_capabilities: vec![capability(Mode::SingleNodeReaderOnly, block())],
        ..wanted("block")
    };
    assert_eq!(rig.create(block).await.unwrap().capacity_bytes, 1 << 20);
    assert_eq!(rig.volume("xfs").await.unwrap().spec.fs_type, Some(FsType::Xfs));
    let spec = rig.volume("block").await.unwrap().spec;
    assert_eq!((spec.volume_mode, spec.fs_type), (VolumeMode::Block, None));
}

#[tokio::test]
async fn a_repeated_call_gets_the_same_answer_and_another_one_is_told_the_difference() {
    let rig = Rig::new();
    rig.node_with_disks("a", TAKES).await;
    let first = rig.create(wanted("v")).await.unwrap();
    assert_eq!(rig.create(wanted("v")).await.unwrap(), first);
    let same = CreateVolumeRequest {
        capacity_range: Some(range(1, 2 * GIB)),
        accessibility_requirements: nodes(&["b", "a"], &["b"]),
        ..wanted("v")
    };
    assert_eq!(rig.create(same).await.unwrap(), first, "its size is in the range, and it stays on its node");
    let with = |change: fn(&mut CreateVolumeRequest)| {
        let mut request = wanted("v");
        change(&mut request);
        request
    };
    for (request, difference) in [
        (with(|request| request.capacity_range = Some(range(2 * GIB, 0))), "1073741824 bytes"),
        (with(|request| request.capacity_range = Some(range(1 << 20, 2 << 20))), "1073741824 bytes"),
        (with(|request| request.volume_capabilities = vec![capability(Mode::SingleNodeWriter, block())]), "not for raw block"),
        (with(|request| request.volume_capabilities = vec![capability(Mode::SingleNodeWriter, mount("xfs"))]), "ext4 and not xfs"),
        (with(|request| drop(request.parameters.insert("transport".into(), "fuse".into()))), "transport"),
        (with(|request| request.accessibility_requirements = nodes(&["b"], &["b"])), "node a"),
    ] {
        contains(&refused(rig.create(request).await, Code::AlreadyExists), &["volume v exists", difference]);
    }
}

#[tokio::test]
async fn a_name_that_no_object_can_have_is_hashed_and_the_original_is_compared() {
    let rig = Rig::new();
    rig.node_with_disks("a", TAKES).await;
    let first = rig.create(wanted("Team/Claim 1")).await.unwrap();
    assert!(first.volume_id.starts_with("v-") && first.volume_id.len() == 34, "{}", first.volume_id);
    assert_eq!(rig.volume(&first.volume_id).await.unwrap().spec.csi_name, "Team/Claim 1");
    assert_eq!(rig.create(wanted("Team/Claim 1")).await.unwrap(), first);
    let twin = rig.create(wanted(&first.volume_id)).await;
    contains(&refused(twin, Code::AlreadyExists), &["Team/Claim 1"]);
    assert_eq!(rig.create(wanted(&"n".repeat(128))).await.unwrap().volume_id, "n".repeat(128));
    contains(&refused(rig.create(wanted(&"n".repeat(129))).await, Code::InvalidArgument), &["129", "128"]);
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_named_and_nothing_is_applied() {
    let rig = Rig::new();
    rig.node_with_disks("a", TAKES).await;
    let with = |change: &dyn Fn(&mut CreateVolumeRequest)| {
        let mut request = wanted("v");
        change(&mut request);
        request
    };
    let capable = |capabilities: Vec<VolumeCapability>| with(&|request| request.volume_capabilities = capabilities.clone());
    let parameter = |name: &str, value: &str| with(&|request| drop(request.parameters.insert(name.into(), value.into())));
    let mutable = |name: &str, value: &str| with(&|request| drop(request.mutable_parameters.insert(name.into(), value.into())));
    let plain = || capability(Mode::SingleNodeWriter, mount(""));
    for (request, names) in [
        (with(&|request| request.name.clear()), "name is missing"),
        (capable(vec![]), "volume_capabilities is missing"),
        (capable(vec![VolumeCapability { access_type: None, ..plain() }]), "access_type is missing"),
        (capable(vec![VolumeCapability { access_mode: None, ..plain() }]), "access_mode"),
        (capable(vec![capability(Mode::Unknown, mount(""))]), "SINGLE_NODE"),
        (capable(vec![plain(), capability(Mode::MultiNodeMultiWriter, mount(""))]), "MULTI_NODE_MULTI_WRITER"),
        (capable(vec![capability(Mode::MultiNodeReaderOnly, block())]), "MULTI_NODE_READER_ONLY"),
        (capable(vec![capability(Mode::SingleNodeWriter, mount("btrfs"))]), "btrfs"),
        (capable(vec![plain(), capability(Mode::SingleNodeWriter, block())]), "mount and block"),
        (capable(["ext4", "xfs"].map(|fs_type| capability(Mode::SingleNodeWriter, mount(fs_type))).into()), "ext4 and xfs"),
        (with(&|request| request.volume_content_source = Some(VolumeContentSource::default())), "volume_content_source"),
        (parameter("replicas", "3"), "replicas"),
        (parameter("provisioning", "thin"), "provisioning"),
        (mutable("transport", "fuse"), "transport"),
        (mutable("speed", "11"), "speed"),
        (
            with(&|request| {
                request.accessibility_requirements = nodes(&["a"], &[]).map(|mut given| {
                    given.requisite[0].segments.clear();
                    given
                })
            }),
            "topology.lockstep.io/node",
        ),
    ] {
        contains(&refused(rig.create(request).await, Code::InvalidArgument), &[names]);
    }
    let none = with(&|request| request.capacity_range = Some(range(0, 0)));
    contains(&refused(rig.create(none).await, Code::InvalidArgument), &["capacity_range", "required_bytes", "leave capacity_range out"]);
    for (required, limit) in [(-1, 0), (0, -1), (2 << 20, 1 << 20), (0, 1), ((1 << 20) + 1, (1 << 20) + 2)] {
        let size = lockstep_proto::csi::CapacityRange { required_bytes: required, limit_bytes: limit };
        refused(rig.create(with(&|request| request.capacity_range = Some(size))).await, Code::OutOfRange);
    }
    assert_eq!(rig.volumes().await, [""; 0]);
}

#[tokio::test]
async fn a_call_whose_time_is_over_says_what_it_waits_for_and_goes_on_when_it_is_repeated() {
    let rig = Rig::new();
    rig.disks("a", &[8, 8]).await;
    let late = rig.controller.create_volume(within(100, wanted("v"))).await;
    contains(&refused(late, Code::DeadlineExceeded), &["volume v", "node a", "not claimed"]);
    let uid = rig.volume("v").await.unwrap().meta().uid.clone();
    rig.node("a", TAKES);
    rig.create(wanted("v")).await.unwrap();
    assert_eq!(rig.volume("v").await.unwrap().meta().uid, uid, "it is the same object");
    rig.disks("b", &[8, 8]).await;
    rig.node("b", Plays::OnlyClaims);
    let request = CreateVolumeRequest { accessibility_requirements: nodes(&["b"], &["b"]), ..wanted("w") };
    let late = rig.controller.create_volume(within(2500, request)).await;
    contains(&refused(late, Code::DeadlineExceeded), &["node b", "(claimed"]);
}

#[tokio::test]
async fn what_a_node_said_of_an_earlier_object_of_the_name_does_not_count() {
    let rig = Rig::new();
    rig.existing("v", "a", GIB, |status| status.observed_uid = Some("another".into())).await;
    refused(rig.controller.create_volume(within(100, wanted("v"))).await, Code::DeadlineExceeded);
    rig.existing("w", "a", GIB, |status| status.observed_uid = None).await;
    refused(rig.controller.create_volume(within(100, wanted("w"))).await, Code::DeadlineExceeded);
}

#[tokio::test]
async fn a_volume_that_is_being_deleted_is_not_answered() {
    let rig = Rig::new();
    let volume = rig.existing("v", "a", GIB, |_| {}).await;
    lockstep_store::Store::delete(&rig.store, "v", Some(&volume)).await.unwrap();
    contains(&refused(rig.create(wanted("v")).await, Code::Aborted), &["being deleted"]);
    let other = CreateVolumeRequest { capacity_range: Some(range(2 * GIB, 0)), ..wanted("v") };
    contains(&refused(rig.create(other).await, Code::Aborted), &["being deleted"]);
}

#[tokio::test]
async fn a_second_call_on_a_volume_is_aborted_until_the_first_one_is_over_or_dropped() {
    let rig = Rig::new();
    rig.disks("a", &[8, 8]).await;
    let controller = rig.controller.clone();
    let first = tokio::spawn(async move { controller.create_volume(Request::new(wanted("v"))).await });
    while rig.volume("v").await.is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    contains(&refused(rig.create(wanted("v")).await, Code::Aborted), &["another call"]);
    refused(rig.controller.delete_volume(within(100, crate::rig::delete("v"))).await, Code::Aborted);
    refused(rig.controller.controller_expand_volume(within(100, crate::rig::grow("v", GIB))).await, Code::Aborted);
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    rig.node("a", TAKES);
    rig.create(wanted("v")).await.unwrap();
}

#[tokio::test]
async fn a_call_that_is_dropped_at_any_point_and_repeated_makes_one_volume_on_the_node_that_takes_it() {
    let rig = Rig::new();
    rig.node_with_disks("a", Plays::Rejects("not here")).await;
    rig.node_with_disks("b", TAKES).await;
    for times in 1.. {
        let name = format!("v{times}");
        let request = || within(PATIENT, CreateVolumeRequest { accessibility_requirements: nodes(&["a", "b"], &["a"]), ..wanted(&name) });
        let done = polled(times, rig.controller.create_volume(request())).await;
        let volume = repeated(|| rig.controller.create_volume(request())).await.volume.unwrap();
        assert_eq!((volume.volume_id.as_str(), &volume.accessible_topology), (name.as_str(), &vec![topology("b")]));
        assert_eq!(rig.volumes().await.len(), times);
        if let Some(done) = done {
            assert_eq!(done.unwrap().into_inner().volume.unwrap(), volume);
            assert!(times > 10, "only {times} points: what was dropped?");
            return;
        }
    }
}

#[tokio::test]
async fn two_replicas_at_once_make_one_volume_and_give_the_same_answer() {
    let rig = Rig::new();
    rig.node_with_disks("a", TAKES).await;
    let other = rig.replica();
    for number in 0..20 {
        let request = || within(PATIENT, wanted(&format!("v{number}")));
        let (one, two) = tokio::join!(repeated(|| rig.controller.create_volume(request())), repeated(|| other.create_volume(request())));
        assert_eq!(one, two);
    }
    assert_eq!(rig.volumes().await.len(), 20);
}

#[tokio::test]
async fn a_waiting_call_gives_up_when_the_controller_ends() {
    let rig = Rig::new();
    rig.disks("a", &[8, 8]).await;
    let (call, ()) = tokio::join!(rig.controller.create_volume(Request::new(wanted("v"))), async { rig.controller.end() });
    refused(call, Code::Unavailable);
}

#[tokio::test]
async fn an_object_that_cannot_be_read_is_named_and_not_taken_for_absent() {
    let rig = Rig::new();
    rig.node_with_disks("a", TAKES).await;
    rig.damage("mirrorvolumes", "v");
    contains(&refused(rig.create(wanted("v")).await, Code::Unavailable), &["v.yaml", "Repair it"]);
    let deleted = rig.controller.delete_volume(within(100, crate::rig::delete("v"))).await;
    contains(&refused(deleted, Code::Unavailable), &["v.yaml"]);
    rig.create(wanted("w")).await.unwrap();
}

#[tokio::test]
async fn a_volume_that_another_call_deleted_meanwhile_is_not_answered() {
    let rig = Rig::new();
    rig.disks("a", &[8, 8]).await;
    let controller = rig.controller.clone();
    let first = tokio::spawn(async move { controller.create_volume(within(PATIENT, wanted("v"))).await });
    while rig.volume("v").await.is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Another replica: nobody claimed it, so it goes at once.
    rig.replica().delete_volume(within(PATIENT, crate::rig::delete("v"))).await.unwrap();
    contains(&refused(first.await.unwrap(), Code::Aborted), &["deleted in the meantime"]);
    assert!(rig.volume("v").await.is_none());
}

#[tokio::test]
async fn a_volume_that_replaced_the_one_that_is_waited_for_is_not_answered() {
    let rig = Rig::new();
    rig.disks("a", &[8, 8]).await;
    let controller = rig.controller.clone();
    let first = tokio::spawn(async move { controller.create_volume(within(PATIENT, wanted("v"))).await });
    while rig.volume("v").await.is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    rig.replace("v", |text, uid| text.replace(uid, "another-uid"));
    contains(&refused(first.await.unwrap(), Code::Aborted), &["deleted in the meantime"]);
    assert_eq!(rig.volume("v").await.unwrap().meta().uid.as_deref(), Some("another-uid"));
}
