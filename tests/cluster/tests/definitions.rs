//! What the API makes of our definitions: what it refuses, and what `kubectl get` shows.
#![allow(missing_docs)]

use std::{collections::BTreeMap, time::Duration};

use kube::{
    Api, Client, Resource,
    api::{ListParams, Patch, PatchParams, PostParams},
    core::Request,
};
use lockstep_cluster_tests::{client, define, store};
use lockstep_proto::{
    crds,
    objects::{
        DiskIdentity, DiskPhase, LegState, LegStatus, LocalDisk, LocalDiskSpec, LocalDiskStatus, MirrorVolume, MirrorVolumeStatus,
        VolumePhase,
    },
};
use lockstep_store::{Changes, Listing, Store};
use serde_json::{Value, json};

async fn defined() -> Client {
    let client = client().await;
    for crd in crds::all() {
        define(&client, &crd).await;
    }
    client
}

/// The cells of a row, by column, as the server computes them for `kubectl get -o wide`.
async fn row<K: Resource<DynamicType = ()>>(client: &Client, name: &str) -> BTreeMap<String, Value> {
    let params = ListParams::default().fields(&format!("metadata.name={name}"));
    let mut request = Request::new(K::url_path(&(), None)).list(&params).unwrap();
    request.headers_mut().insert("accept", "application/json;as=Table;v=v1;g=meta.k8s.io".parse().unwrap());
    let table: Value = client.request(request).await.unwrap();
    let names = table["columnDefinitions"].as_array().unwrap().iter().map(|column| column["name"].as_str().unwrap().to_owned());
    names.zip(table["rows"][0]["cells"].as_array().expect("a row").iter().cloned()).collect()
}

fn volume(name: &str) -> Value {
    json!({
        "apiVersion": "lockstep.io/v1alpha1", "kind": "MirrorVolume", "metadata": {"name": name},
        "spec": {"csiName": name, "capacityBytes": 1 << 30, "node": "n1", "volumeMode": "Filesystem", "fsType": "ext4"},
    })
}

async fn created(api: &Api<MirrorVolume>, name: &str) -> MirrorVolume {
    api.create(&PostParams::default(), &serde_json::from_value(volume(name)).unwrap()).await.expect("a good volume")
}

/// Why the API does not create this.
async fn refusal(client: &Client, body: Value) -> String {
    let request = Request::new(MirrorVolume::url_path(&(), None)).create(&PostParams::default(), body.to_string().into_bytes()).unwrap();
    client.request::<Value>(request).await.expect_err("it is refused").to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_refuses_what_nobody_would_carry_out_and_names_the_field() {
    let client = defined().await;
    for (field, value) in [
        ("capacityBytes", json!(0)),
        ("capacityBytes", json!("1Gi")),
        ("capacityBytes", Value::Null),
        ("node", json!("")),
        ("csiName", json!("x".repeat(129))),
        ("volumeMode", json!("Object")),
        ("volumeMode", json!("Block")),
        ("fsType", json!("btrfs")),
        ("fsType", Value::Null),
    ] {
        let mut bad = volume("bad");
        let spec = bad["spec"].as_object_mut().unwrap();
        if value.is_null() {
            drop(spec.remove(field))
        } else {
            drop(spec.insert(field.into(), value.clone()))
        }
        let why = refusal(&client, bad).await;
        let named = if field == "volumeMode" && value == json!("Block") { "fsType" } else { field };
        assert!(why.contains(named), "{field} = {value}: {why}");
    }

    let api: Api<MirrorVolume> = Api::all(client);
    let mut volume = created(&api, "kept").await;
    volume.status = Some(MirrorVolumeStatus { capacity_bytes: 1 << 30, ..MirrorVolumeStatus::default() });
    api.replace_status("kept", &PostParams::default(), &volume).await.unwrap();
    let change = async |spec: Value| api.patch("kept", &PatchParams::default(), &Patch::Merge(json!({"spec": spec}))).await;
    for (field, value) in [
        ("csiName", json!("other")),
        ("node", json!("n2")),
        ("volumeMode", json!("Block")),
        ("fsType", json!("xfs")),
        ("fsType", Value::Null),
        ("capacityBytes", json!((1 << 30) - 1)),
    ] {
        let why = change(json!({field: value})).await.expect_err(field).to_string();
        assert!(why.contains(field), "{field} = {value}: {why}");
    }
    change(json!({"capacityBytes": 2_u64 << 30})).await.expect("it may grow");
    change(json!({"capacityBytes": 1_u64 << 30})).await.expect("what its disks had no room for is taken back");
    api.delete("kept", &Default::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_columns_say_how_a_volume_is() {
    let client = defined().await;
    let api: Api<MirrorVolume> = Api::all(client.clone());
    let mut volume = created(&api, "shown").await;
    let leg = |disk: &str, state, progress_percent| LegStatus {
        disk: disk.into(),
        leg_id: disk.into(),
        state,
        progress_percent,
        last_error: None,
    };
    let condition = |kind: &str, reason: &str, message: &str| json!({"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let conditions = json!([condition("Ready", "Rebuilding", ""), condition("Degraded", "Rebuilding", "the copy on sdb is being filled")]);
    volume.status = Some(MirrorVolumeStatus {
        phase: VolumePhase::Ready,
        capacity_bytes: 1 << 30,
        legs: vec![leg("d1", LegState::In, None), leg("d2", LegState::Recovering, Some(40))],
        device: Some("/dev/loop7".into()),
        conditions: serde_json::from_value(conditions).unwrap(),
        ..MirrorVolumeStatus::default()
    });
    api.replace_status("shown", &PostParams::default(), &volume).await.unwrap();
    let row = row::<MirrorVolume>(&client, "shown").await;
    for (column, value) in [
        ("Name", json!("shown")),
        ("Health", json!("Rebuilding")),
        ("Leg-1", json!("In")),
        ("Leg-2", json!("Recovering")),
        ("Rebuild-%", json!(40)),
        ("Phase", json!("Ready")),
        ("Size", json!(1 << 30)),
        ("Node", json!("n1")),
        ("Device", json!("/dev/loop7")),
        ("Disk-1", json!("d1")),
        ("Disk-2", json!("d2")),
        ("Degraded", json!("the copy on sdb is being filled")),
    ] {
        assert_eq!(row[column], value, "{column}: {row:?}");
    }
    api.delete("shown", &Default::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_columns_say_how_a_disk_is_and_a_node_can_select_its_own() {
    let client = defined().await;
    let api: Api<LocalDisk> = Api::all(client.clone());
    for (name, node) in [("one", "n1"), ("two", "n2")] {
        let disk = LocalDisk::new(name, LocalDiskSpec { node: node.into() });
        let mut disk = api.create(&PostParams::default(), &disk).await.unwrap();
        disk.status = Some(LocalDiskStatus {
            identity: Some(DiskIdentity {
                model: Some("QEMU".into()),
                serial: Some("S1".into()),
                physical: "sdb".into(),
                ..Default::default()
            }),
            phase: DiskPhase::Ready,
            capacity_bytes: 5 << 30,
            allocated_bytes: 1 << 30,
            ..LocalDiskStatus::default()
        });
        api.replace_status(name, &PostParams::default(), &disk).await.unwrap();
    }
    let row = row::<LocalDisk>(&client, "two").await;
    for (column, value) in [
        ("Phase", json!("Ready")),
        ("Node", json!("n2")),
        ("Capacity", json!(5_u64 << 30)),
        ("Allocated", json!(1 << 30)),
        ("Model", json!("QEMU")),
        ("Serial", json!("S1")),
        ("Physical", json!("sdb")),
    ] {
        assert_eq!(row[column], value, "{column}: {row:?}");
    }
    let own = api.list(&ListParams::default().fields("spec.node=n2")).await.unwrap();
    assert_eq!(own.items.into_iter().map(|disk| disk.metadata.name.unwrap()).collect::<Vec<_>>(), ["two"]);

    // As a node's csi-node has the store.
    let node = store().await.of_node("n2");
    let mut changes = node.changes::<LocalDisk>().await.unwrap();
    let names = |listing: Listing<LocalDisk>| listing.objects.into_iter().filter_map(|disk| disk.metadata.name).collect::<Vec<_>>();
    assert_eq!(names(node.list().await.unwrap()), ["two"]);
    while tokio::time::timeout(Duration::from_secs(1), changes.next()).await.is_ok() {}
    let mut disk: LocalDisk = node.get("one").await.unwrap().expect("another node's can be asked for");
    disk.metadata.labels = Some([("a".to_owned(), "b".to_owned())].into());
    let mut disk = node.update(disk).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(1), changes.next()).await.is_err(), "another node's is not watched");
    disk.spec.node = "n2".into();
    node.update(disk).await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), changes.next()).await.expect("a disk that was moved here is noticed");
    assert_eq!(names(node.list().await.unwrap()), ["one", "two"]);
    for name in ["one", "two"] {
        api.delete(name, &Default::default()).await.unwrap();
    }
}
