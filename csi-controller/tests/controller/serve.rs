use std::time::{Duration, Instant};

use lockstep_csi_controller::serve;
use lockstep_proto::{
    csi::{
        ControllerGetCapabilitiesRequest, ControllerPublishVolumeRequest, CreateSnapshotRequest, GetPluginCapabilitiesRequest,
        GetPluginInfoRequest, ProbeRequest,
        controller_client::ControllerClient,
        controller_service_capability::{self, rpc},
        identity_client::IdentityClient,
    },
    endpoint::Endpoint,
};
use tokio::{sync::oneshot, task::JoinHandle};
use tonic::{Code, Request, transport::Channel};

use crate::rig::{PATIENT, Rig, TAKES, contains, refused, wanted, within};

/// Serves the rig's objects on a socket: a client, what ends it, and its end.
async fn served(rig: &Rig, dir: &tempfile::TempDir) -> (Channel, oneshot::Sender<()>, JoinHandle<()>) {
    let endpoint: Endpoint = format!("unix://{}/c.sock", dir.path().display()).parse().unwrap();
    let (end, ended) = oneshot::channel::<()>();
    let (incoming, store) = (endpoint.bind().unwrap(), rig.store.clone());
    let server = tokio::spawn(async move { serve(store, incoming, async { drop(ended.await) }).await.unwrap() });
    let channel = tonic::transport::Endpoint::new(endpoint.to_string()).unwrap().connect().await.unwrap();
    (channel, end, server)
}

#[tokio::test]
async fn the_services_say_who_they_are_and_what_they_can() {
    let (rig, dir) = (Rig::new(), tempfile::tempdir().unwrap());
    let (channel, _end, _server) = served(&rig, &dir).await;
    let mut identity = IdentityClient::new(channel.clone());
    let info = identity.get_plugin_info(GetPluginInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.name.as_str(), info.vendor_version.as_str()), ("csi.lockstep.io", env!("CARGO_PKG_VERSION")));
    assert_eq!(identity.probe(ProbeRequest {}).await.unwrap().into_inner().ready, Some(true));
    let plugin = identity.get_plugin_capabilities(GetPluginCapabilitiesRequest {}).await.unwrap().into_inner();
    assert_eq!(plugin.capabilities.len(), 3);
    let mut controller = ControllerClient::new(channel);
    let capabilities = controller.controller_get_capabilities(ControllerGetCapabilitiesRequest {}).await.unwrap().into_inner().capabilities;
    let types: Vec<_> = capabilities
        .into_iter()
        .map(|capability| match capability.r#type.unwrap() {
            controller_service_capability::Type::Rpc(rpc) => rpc::Type::try_from(rpc.r#type).unwrap().as_str_name(),
        })
        .collect();
    assert_eq!(types, ["CREATE_DELETE_VOLUME", "LIST_VOLUMES", "GET_CAPACITY", "EXPAND_VOLUME", "GET_VOLUME", "SINGLE_NODE_MULTI_WRITER"]);
    refused(controller.create_snapshot(CreateSnapshotRequest::default()).await, Code::Unimplemented);
    refused(controller.controller_publish_volume(ControllerPublishVolumeRequest::default()).await, Code::Unimplemented);
}

#[tokio::test]
async fn a_caller_with_a_deadline_learns_in_time_what_was_waited_for() {
    let (rig, dir) = (Rig::new(), tempfile::tempdir().unwrap());
    rig.disks("a", &[8, 8]).await;
    let (channel, _end, _server) = served(&rig, &dir).await;
    let mut controller = ControllerClient::new(channel);
    let late = controller.create_volume(within(2500, wanted("v"))).await;
    contains(&refused(late, Code::DeadlineExceeded), &["node a", "not claimed"]);
    rig.node("a", TAKES);
    controller.create_volume(within(PATIENT, wanted("v"))).await.unwrap();
}

#[tokio::test]
async fn the_end_does_not_wait_for_a_node() {
    let (rig, dir) = (Rig::new(), tempfile::tempdir().unwrap());
    rig.disks("a", &[8, 8]).await;
    let (channel, end, server) = served(&rig, &dir).await;
    let call = tokio::spawn(async move { ControllerClient::new(channel).create_volume(Request::new(wanted("v"))).await });
    while rig.volume("v").await.is_none() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let started = Instant::now();
    end.send(()).unwrap();
    refused(call.await.unwrap(), Code::Unavailable);
    server.await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(30));
}
