use std::time::Duration;

use kube::Resource;
use lockstep_proto::csi::controller_server::Controller as _;
use tonic::{Code, Request};

use crate::rig::{GIB, PATIENT, Plays, Rig, TAKES, contains, delete, polled, refused, repeated, wanted, within};

#[tokio::test]
async fn a_volume_is_deleted_when_its_node_let_it_go_and_again_and_again() {
    let rig = Rig::new();
    rig.node_with_disks("a", TAKES).await;
    rig.create(wanted("v")).await.unwrap();
    rig.controller.delete_volume(within(PATIENT, delete("v"))).await.unwrap();
    assert!(rig.volume("v").await.is_none());
    rig.controller.delete_volume(within(PATIENT, delete("v"))).await.unwrap();
    for never in ["never-there", "Not/A:Name", "..", &"n".repeat(300)] {
        rig.controller.delete_volume(within(PATIENT, delete(never))).await.unwrap();
    }
    contains(&refused(rig.controller.delete_volume(Request::new(delete(""))).await, Code::InvalidArgument), &["volume_id"]);
}

#[tokio::test]
async fn a_volume_in_use_is_not_deleted() {
    let rig = Rig::new();
    rig.node("a", TAKES);
    rig.existing("v", "a", GIB, |status| status.device = Some("/dev/loop7".into())).await;
    let call = rig.controller.delete_volume(within(PATIENT, delete("v"))).await;
    contains(&refused(call, Code::FailedPrecondition), &["node a", "/dev/loop7"]);
    assert!(rig.volume("v").await.unwrap().meta().deletion_timestamp.is_none());
}

#[tokio::test]
async fn a_volume_that_its_node_does_not_let_go_is_waited_for() {
    let rig = Rig::new();
    rig.node("a", Plays::OnlyClaims);
    rig.existing("v", "a", GIB, |status| status.message = "a disk hangs".into()).await;
    for _ in 0..2 {
        let call = rig.controller.delete_volume(within(100, delete("v"))).await;
        contains(&refused(call, Code::DeadlineExceeded), &["node a", "remove its legs", "a disk hangs"]);
    }
    assert!(rig.volume("v").await.unwrap().meta().deletion_timestamp.is_some());
}

#[tokio::test]
async fn a_volume_that_nobody_claimed_is_deleted_without_its_node() {
    let rig = Rig::new();
    rig.disks("a", &[8, 8]).await;
    refused(rig.controller.create_volume(within(50, wanted("v"))).await, Code::DeadlineExceeded);
    rig.controller.delete_volume(within(PATIENT, delete("v"))).await.unwrap();
    assert!(rig.volume("v").await.is_none());
}

#[tokio::test]
async fn a_new_volume_of_the_same_name_is_not_waited_for() {
    let rig = Rig::new();
    rig.existing("v", "a", GIB, |_| {}).await;
    let controller = rig.controller.clone();
    let call = tokio::spawn(async move { controller.delete_volume(within(PATIENT, delete("v"))).await });
    while rig.volume("v").await.unwrap().meta().deletion_timestamp.is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    rig.replace("v", |text, uid| {
        let lines: Vec<&str> = text.lines().filter(|line| !line.contains("deletionTimestamp")).collect();
        lines.join("\n").replace(uid, "another-uid")
    });
    call.await.unwrap().unwrap();
    assert!(rig.volume("v").await.unwrap().meta().deletion_timestamp.is_none());
}

#[tokio::test]
async fn a_call_that_is_dropped_at_any_point_and_repeated_deletes_the_volume() {
    let rig = Rig::new();
    rig.node("a", TAKES);
    for times in 1.. {
        let name = format!("v{times}");
        rig.existing(&name, "a", GIB, |_| {}).await;
        let done = polled(times, rig.controller.delete_volume(within(PATIENT, delete(&name)))).await;
        repeated(|| rig.controller.delete_volume(within(PATIENT, delete(&name)))).await;
        assert_eq!(rig.volumes().await, [""; 0]);
        if let Some(done) = done {
            done.unwrap();
            assert!(times > 3, "only {times} points: what was dropped?");
            return;
        }
    }
}
