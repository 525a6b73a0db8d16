use lockstep_proto::{
    csi::{
        CapacityRange, ControllerExpandVolumeRequest, ControllerExpandVolumeResponse, controller_server::Controller as _,
        volume_capability::access_mode::Mode,
    },
    objects::DiskPhase,
};
use lockstep_store::Store;
use tonic::{Code, Status};

use crate::rig::{GIB, PATIENT, Plays, Rig, TAKES, block, capability, contains, grow, polled, range, refused, repeated, within};

impl Rig {
    async fn expand(&self, request: ControllerExpandVolumeRequest) -> Result<u64, Status> {
        let ControllerExpandVolumeResponse { capacity_bytes, node_expansion_required } =
            self.controller.controller_expand_volume(within(PATIENT, request)).await?.into_inner();
        assert!(node_expansion_required);
        Ok(capacity_bytes as u64)
    }
}

/// A volume `v` of 1 GiB on node `a`, whose two disks have 4 GiB free and which grows it up to so many GiB.
async fn with_volume(at_most: u64) -> Rig {
    let rig = Rig::new();
    rig.disks("a", &[4, 4]).await;
    rig.node("a", Plays::Takes { at_most: at_most * GIB });
    rig.existing("v", "a", GIB, |_| {}).await;
    rig
}

#[tokio::test]
async fn a_volume_has_grown_when_its_node_says_so_and_never_shrinks() {
    let rig = with_volume(4).await;
    assert_eq!(rig.expand(grow("v", 2 * GIB + 1)).await.unwrap(), 2 * GIB + (1 << 20));
    assert_eq!(rig.expand(grow("v", 2 * GIB + 1)).await.unwrap(), 2 * GIB + (1 << 20));
    assert_eq!(rig.expand(grow("v", GIB)).await.unwrap(), 2 * GIB + (1 << 20), "it stays as it is");
    let within_limit = ControllerExpandVolumeRequest { capacity_range: Some(range(0, 3 * GIB)), ..grow("v", 0) };
    assert_eq!(rig.expand(within_limit).await.unwrap(), 2 * GIB + (1 << 20));
    assert_eq!(rig.volume("v").await.unwrap().spec.capacity_bytes, 2 * GIB + (1 << 20));
}

#[tokio::test]
async fn a_size_that_its_disks_have_no_room_for_is_not_even_asked_for() {
    let rig = with_volume(100).await;
    let message = refused(rig.expand(grow("v", 6 * GIB)).await, Code::OutOfRange);
    contains(
        &message,
        &["disk a-0", &(4 * GIB).to_string(), &(5 * GIB).to_string(), "Ask for less, or delete volumes that lie on the same disk"],
    );
    assert_eq!(rig.volume("v").await.unwrap().spec.capacity_bytes, GIB);
    // The second disk is away: its leg is made longer when it comes back. The first one is full, and counts.
    let mut disk = rig.store.get::<lockstep_proto::objects::LocalDisk>("a-0").await.unwrap().unwrap();
    disk.status.as_mut().unwrap().phase = DiskPhase::Failed;
    rig.store.update_status(disk).await.unwrap();
    contains(&refused(rig.expand(grow("v", 6 * GIB)).await, Code::OutOfRange), &["disk a-1"]);
    let disk = rig.store.get::<lockstep_proto::objects::LocalDisk>("a-1").await.unwrap().unwrap();
    rig.store.delete("a-1", Some(&disk)).await.unwrap();
    assert_eq!(rig.expand(grow("v", 6 * GIB)).await.unwrap(), 6 * GIB);
}

#[tokio::test]
async fn what_its_node_refuses_is_taken_back_and_can_be_asked_for_again() {
    let rig = with_volume(3).await;
    for _ in 0..2 {
        contains(&refused(rig.expand(grow("v", 4 * GIB)).await, Code::OutOfRange), &["disk full"]);
        assert_eq!(rig.volume("v").await.unwrap().spec.capacity_bytes, GIB);
    }
    assert_eq!(rig.expand(grow("v", 2 * GIB)).await.unwrap(), 2 * GIB);
    // Room was made since: the refusal of the past does not count.
    let rig = Rig::new();
    rig.disks("a", &[4, 4]).await;
    rig.existing("v", "a", GIB, |status| status.refused_capacity_bytes = Some(4 * GIB)).await;
    let call = rig.controller.controller_expand_volume(within(100, grow("v", 4 * GIB))).await;
    refused(call, Code::DeadlineExceeded);
    rig.node("a", TAKES);
    assert_eq!(rig.expand(grow("v", 4 * GIB)).await.unwrap(), 4 * GIB);
}

#[tokio::test]
async fn a_refusal_of_a_larger_size_is_not_the_answer_to_a_smaller_one() {
    let rig = Rig::new();
    rig.disks("a", &[4, 4]).await;
    let larger = |volume: &mut lockstep_proto::objects::MirrorVolume| volume.spec.capacity_bytes = 4 * GIB;
    rig.existing_as("v", "a", larger, |status| (status.capacity_bytes, status.refused_capacity_bytes) = (GIB, Some(4 * GIB))).await;
    rig.node("a", Plays::Takes { at_most: 2 * GIB });
    assert_eq!(rig.expand(grow("v", 2 * GIB)).await.unwrap(), 2 * GIB);
}

#[tokio::test]
async fn a_growth_that_was_begun_goes_on_when_the_call_is_repeated() {
    let rig = Rig::new();
    rig.disks("a", &[4, 4]).await;
    rig.existing("v", "a", GIB, |_| {}).await;
    let call = rig.controller.controller_expand_volume(within(100, grow("v", 4 * GIB))).await;
    contains(&refused(call, Code::DeadlineExceeded), &["node a", "grow it"]);
    // Its room is taken by now: it is not counted twice.
    let mut disk = rig.store.get::<lockstep_proto::objects::LocalDisk>("a-0").await.unwrap().unwrap();
    disk.status.as_mut().unwrap().allocated_bytes = 4 * GIB;
    rig.store.update_status(disk).await.unwrap();
    rig.node("a", TAKES);
    assert_eq!(rig.expand(grow("v", 4 * GIB)).await.unwrap(), 4 * GIB);
}

#[tokio::test]
async fn what_is_wrong_with_a_growth_is_named() {
    let rig = with_volume(4).await;
    let with = |id: &str, size: Option<CapacityRange>| ControllerExpandVolumeRequest {
        volume_id: id.into(),
        capacity_range: size,
        ..grow("v", 0)
    };
    let negative = CapacityRange { required_bytes: -1, limit_bytes: 0 };
    let block =
        ControllerExpandVolumeRequest { volume_capability: Some(capability(Mode::SingleNodeWriter, block())), ..grow("v", 2 * GIB) };
    for (request, code, names) in [
        (with("", Some(range(GIB, 0))), Code::InvalidArgument, "volume_id"),
        (with("v", None), Code::InvalidArgument, "capacity_range"),
        (with("v", Some(range(0, 0))), Code::InvalidArgument, "required_bytes"),
        (block, Code::InvalidArgument, "raw block"),
        (with("v", Some(negative)), Code::OutOfRange, "-1"),
        (with("v", Some(range(0, 1))), Code::OutOfRange, "never made smaller"),
        (with("v", Some(range(2 * GIB, GIB))), Code::OutOfRange, "at most"),
        (grow("gone", GIB), Code::NotFound, "gone"),
        (grow("Not/A:Name", GIB), Code::NotFound, "Not/A:Name"),
    ] {
        contains(&refused(rig.expand(request).await, code), &[names]);
    }
    rig.existing("new", "b", GIB, |status| status.observed_uid = None).await;
    contains(&refused(rig.expand(grow("new", GIB)).await, Code::Aborted), &["still being created"]);
    let volume = rig.existing("old", "b", GIB, |_| {}).await;
    rig.store.delete("old", Some(&volume)).await.unwrap();
    contains(&refused(rig.expand(grow("old", GIB)).await, Code::Aborted), &["being deleted"]);
}

#[tokio::test]
async fn a_call_that_is_dropped_at_any_point_and_repeated_grows_the_volume_or_takes_it_back() {
    let rig = Rig::new();
    rig.disks("a", &[20, 20]).await;
    rig.node("a", Plays::Takes { at_most: 9 * GIB });
    for (wanted, code) in [(8 * GIB, Code::Ok), (10 * GIB, Code::OutOfRange)] {
        for times in 1.. {
            let name = format!("v{times}-{wanted}");
            rig.existing(&name, "a", GIB, |_| {}).await;
            let call = || rig.controller.controller_expand_volume(within(PATIENT, grow(&name, wanted)));
            let done = polled(times, call()).await;
            let size = match code {
                Code::Ok => repeated(call).await.capacity_bytes as u64,
                code => {
                    refused(call().await, code);
                    GIB
                }
            };
            let spec = rig.volume(&name).await.unwrap().spec;
            assert_eq!(spec.capacity_bytes, size);
            if done.is_some() {
                assert!(times > 3, "only {times} points: what was dropped?");
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_leg_on_what_cannot_be_a_disk_is_like_one_whose_disk_is_away() {
    let rig = Rig::new();
    rig.existing("v", "a", GIB, |status| status.legs[0].disk = "Not/A:Disk".into()).await;
    rig.node("a", TAKES);
    assert_eq!(rig.expand(grow("v", 2 * GIB)).await.unwrap(), 2 * GIB);
}
