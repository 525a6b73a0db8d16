//! Both binaries on a real Kubernetes API: what people are told of a volume, and how often.
#![allow(missing_docs)]

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::api::{
    core::v1::{PersistentVolume, PersistentVolumeClaim},
    events::v1::Event,
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
};
use lockstep_cluster_tests::{
    chart::{apply, kubeconfig_of, make_namespace, rendered},
    client, define, store,
};
use lockstep_csi_tests::{
    driver::{Driver, NODE, until},
    lab::{Lab, text},
};
use lockstep_proto::{crds, objects::MirrorVolume};
use lockstep_store::Store;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// By reason: of which type, how often, and the newest message. `uid` is whom they are about.
async fn events(client: &Client, uid: &str) -> BTreeMap<String, (String, i32, String)> {
    let listed = Api::<Event>::all(client.clone()).list(&ListParams::default()).await.expect("events").items;
    let mut events = BTreeMap::new();
    for event in listed.into_iter().filter(|event| event.regarding.as_ref().is_some_and(|about| about.uid.as_deref() == Some(uid))) {
        let entry = events.entry(event.reason.unwrap_or_default()).or_insert_with(|| (event.type_.unwrap_or_default(), 0, String::new()));
        entry.1 += event.series.map_or(1, |series| series.count);
        entry.2 = event.note.unwrap_or_default();
    }
    events
}

async fn event(client: &Client, uid: &str, reason: &str) -> (String, i32, String) {
    until(reason, || async { events(client, uid).await.remove(reason) }).await
}

/// A claim and the PersistentVolume that it is bound to, as the provisioner makes it; here by hand, and so with a name of its own.
async fn claim_of(client: &Client, id: &str) -> String {
    let spec = json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "512Mi"}}, "storageClassName": "", "volumeName": "by-hand"});
    let claim: PersistentVolumeClaim = serde_json::from_value(json!({"metadata": {"name": "data"}, "spec": spec})).unwrap();
    let claim = Api::default_namespaced(client.clone()).create(&PostParams::default(), &claim).await.expect("a claim");
    let uid = claim.metadata.uid.expect("a UID");
    let spec = json!({
        "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "512Mi"}, "storageClassName": "",
        "csi": {"driver": "csi.lockstep.io", "volumeHandle": id},
        "claimRef": {"namespace": "default", "name": "data", "uid": uid},
    });
    let volume: PersistentVolume = serde_json::from_value(json!({"metadata": {"name": "by-hand"}, "spec": spec})).unwrap();
    Api::all(client.clone()).create(&PostParams::default(), &volume).await.expect("a PersistentVolume");
    uid
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_to_a_volume_is_told_once_to_its_claim_the_volume_the_disk_and_the_node_also_after_kills() {
    let client = client().await;
    for crd in crds::all() {
        define(&client, &crd).await;
    }
    let mut lab = Lab::new(2, 1200);
    // With the rights that the chart gives them, and no others.
    make_namespace(&client).await;
    let rights = ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];
    for object in rendered(&[]).unwrap().iter().filter(|object| rights.map(Value::from).contains(&object["kind"])) {
        apply(&client, object, false).await.expect("the chart's objects");
    }
    let mut objects = Vec::new();
    for account in ["lockstep-node", "lockstep-controller"] {
        objects.push(["--kubeconfig".to_owned(), text(&kubeconfig_of(&client, account, &lab.path("")).await).to_owned()]);
    }
    let mut driver = Driver::start_with(&lab, store().await, objects.try_into().unwrap()).await;
    driver.use_holder().await;
    let place = driver.place("told", 512 * MIB, Some("ext4")).await;
    let claim = claim_of(&client, &place.id).await;
    place.up(&driver.client).await.unwrap();
    let legs = driver.until_ready_is(&place.id, "Healthy").await.legs;
    let uid = driver.volume(&place.id).await.metadata.uid.unwrap();
    assert!(events(&client, &claim).await.is_empty(), "nothing is wrong, and nothing was");
    let disks = driver.disks().await;
    let disk_uid =
        |name: &str| disks.iter().find(|disk| disk.metadata.name.as_deref() == Some(name)).unwrap().metadata.uid.clone().unwrap();
    for leg in &legs {
        let (kind, count, note) = event(&client, &disk_uid(&leg.disk), "DiskClaimed").await;
        assert_eq!((kind.as_str(), count), ("Normal", 1), "{note}");
    }

    let lost = lab.number_of(&legs[1].disk);
    lab.fail_disk(lost);
    std::fs::write(place.target.join("file"), "written to the other copy").unwrap();
    driver.until_ready_is(&place.id, "Degraded").await;
    let place_of_disk = lab.device(lost).display().to_string();
    for about in [&claim, &uid] {
        let (kind, count, note) = event(&client, about, "MirrorDegraded").await;
        assert_eq!((kind.as_str(), count), ("Warning", 1), "{note}");
        assert!(note.contains(&place_of_disk) && note.contains("add a disk"), "{note}");
    }
    for about in [disk_uid(&legs[1].disk), NODE.to_owned()] {
        let (kind, count, note) = event(&client, &about, "DiskFailed").await;
        assert_eq!((kind.as_str(), count), ("Warning", 1), "{note}");
        assert!(note.contains(&place_of_disk), "{note}");
    }

    // Whoever begins anew finds it as it was, and has nothing to tell. The disk is away: or it would be used again.
    until("unmounted", || async { lab.mount_of(lost).is_none().then_some(()) }).await;
    lab.pull_disk(lost);
    for _ in 0..2 {
        driver.kill_node();
        driver.start_node().await;
        driver.until_ready_is(&place.id, "Degraded").await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(
        events(&client, &claim).await.into_iter().map(|(reason, (_, count, _))| (reason, count)).collect::<Vec<_>>(),
        [("MirrorDegraded".to_owned(), 1)]
    );

    lab.add_disk(1200);
    driver.until_ready_is(&place.id, "Healthy").await;
    for about in [&claim, &uid] {
        event(&client, about, "MirrorHealthy").await;
        let told = events(&client, about).await;
        assert_eq!(
            told.iter().map(|(reason, (kind, count, _))| (reason.as_str(), kind.as_str(), *count)).collect::<Vec<_>>(),
            [
                ("MirrorDegraded", "Warning", 1),
                ("MirrorHealthy", "Normal", 1),
                ("RebuildCompleted", "Normal", 1),
                ("RebuildStarted", "Normal", 1)
            ],
            "{told:?}"
        );
    }
    assert!(driver.store.list::<MirrorVolume>().await.unwrap().objects.len() == 1);
    place.down(&driver.client).await.unwrap();
    driver.client.delete(&place.id).await.unwrap();
    driver.stop();
    for log in [driver.node_log(), driver.sockets().1.with_file_name("controller.log")] {
        let log = std::fs::read_to_string(log).unwrap();
        assert!(!log.contains("orbidden"), "{log}");
    }
}
