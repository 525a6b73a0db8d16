//! csi-controller and csi-node die after any number of writes to a real Kubernetes API, and what was asked for comes about all the same.
#![allow(missing_docs)]

use std::{fs, path::PathBuf};

use lockstep_cluster_tests::{
    client, define,
    proxy::{Lost, Proxy},
    store,
};
use lockstep_csi_tests::{
    driver::{Driver, until},
    lab::{Lab, text},
};
use lockstep_proto::{
    crds,
    objects::{DiskPhase, LocalDisk, LocalDiskStatus, MirrorVolume},
};
use lockstep_store::{Kubernetes, Store};
use tonic::Status;

const MIB: u64 = 1 << 20;
/// More writes than a call takes.
const MOST: i64 = 40;

#[derive(Clone, Copy, Debug)]
enum Who {
    Controller,
    Node,
}

struct Rig {
    lab: Lab,
    driver: Driver<Kubernetes>,
    /// Of csi-node and of csi-controller.
    proxies: [Proxy; 2],
}

impl Rig {
    fn proxy(&self, who: Who) -> &Proxy {
        &self.proxies[match who {
            Who::Node => 0,
            Who::Controller => 1,
        }]
    }

    /// Makes a call; after so many writes one of both dies, begins anew, and the call is made again as whoever made it would. Whether it died.
    async fn call(&mut self, (who, lost): (Who, Lost), writes: i64, call: impl AsyncFn(&Driver<Kubernetes>) -> Result<(), Status>) -> bool {
        self.proxy(who).allow(writes, lost);
        let died = tokio::select! {
            () = self.proxy(who).spent() => true,
            answer = call(&self.driver) => { answer.unwrap(); false }
        };
        if died {
            match who {
                Who::Controller => self.driver.kill_controller(),
                Who::Node => self.driver.kill_node(),
            }
        }
        self.proxy(who).open();
        if died {
            match who {
                Who::Controller => self.driver.start_controller().await,
                Who::Node => self.driver.start_node().await,
            }
            until("the same call succeeds", || async { call(&self.driver).await.ok() }).await;
        }
        died
    }

    /// Where the lab's disks are mounted.
    fn mounts(&self) -> impl Iterator<Item = PathBuf> {
        (0..self.lab.disks()).filter_map(|number| self.lab.mount_of(number))
    }

    /// The directories of copies on the disks.
    fn copies(&self) -> Vec<String> {
        let volumes = self.mounts().filter_map(|mount| fs::read_dir(mount.join("volumes")).ok());
        volumes.flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// The names of the lab's disks.
    fn names(&self) -> Vec<String> {
        self.mounts().filter_map(|mount| Some(mount.file_name()?.to_string_lossy().into_owned())).collect()
    }

    /// What is said of this lab's disks: others have left disks of their own in this API.
    async fn disks(&self) -> Vec<LocalDiskStatus> {
        let own = |disk: &LocalDisk| disk.metadata.name.as_ref().is_some_and(|name| self.names().contains(name));
        self.driver.disks().await.into_iter().filter(own).filter_map(|disk| disk.status).collect()
    }

    async fn volumes(&self) -> Vec<MirrorVolume> {
        store().await.list().await.expect("the API").objects
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_any_number_of_writes_each_may_die_and_a_volume_is_made_and_removed_whole() {
    let client = client().await;
    for crd in crds::all() {
        define(&client, &crd).await;
    }
    let lab = Lab::new(2, 1200);
    let proxies =
        [Proxy::start(client.clone(), &lab.path(""), "node").await, Proxy::start(client.clone(), &lab.path(""), "controller").await];
    let objects = proxies.each_ref().map(|proxy| ["--kubeconfig".into(), text(&proxy.kubeconfig).into()]);
    let driver = Driver::start_with(&lab, store().await, objects).await;
    let mut rig = Rig { lab, driver, proxies };
    let usable = async || rig.disks().await.iter().filter(|disk| disk.phase == DiskPhase::Ready).count() == rig.lab.disks();
    until("both disks can be used", || async { usable().await.then_some(()) }).await;
    let ways = [Who::Controller, Who::Node].into_iter().flat_map(|who| [(who, Lost::Answer), (who, Lost::Write)]);
    for (who, lost) in ways {
        let (mut created, mut deleted) = (0, 0);
        for writes in i64::from(lost == Lost::Answer)..=MOST {
            let name = format!("{who:?}-{lost:?}-{writes}").to_lowercase();
            let died = rig.call((who, lost), writes, async |driver| driver.client.create(&name, 64 * MIB, None).await.map(drop)).await;
            let volumes = rig.volumes().await;
            let [volume] = volumes.as_slice() else { panic!("{} objects", volumes.len()) };
            let id = volume.metadata.name.clone().unwrap();
            let uid = volume.metadata.uid.clone().unwrap();
            let copies = rig.copies();
            assert!(
                copies.len() == 2 && copies.iter().all(|copy| copy.starts_with(&uid)),
                "{who:?}, {lost:?} lost, {writes} writes: {copies:?}"
            );
            let ended = rig.call((who, lost), writes, async |driver| driver.client.delete(&id).await).await;
            until("nothing is left", || async { (rig.volumes().await.is_empty() && rig.copies().is_empty()).then_some(()) }).await;
            (created, deleted) = (created + i64::from(died), deleted + i64::from(ended));
            if !died && !ended {
                break;
            }
        }
        println!("{who:?} died {created} times while a volume was made, and {deleted} while one was removed; lost: {lost:?}");
        assert!((1..MOST).contains(&created) && (1..MOST).contains(&deleted), "{created} and {deleted}");
    }
    let free = async || rig.disks().await.iter().all(|disk| disk.allocated_bytes == 0);
    until("all space is free", || async { free().await.then_some(()) }).await;
    rig.driver.stop();
}
