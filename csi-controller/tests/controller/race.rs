//! What happens between a look at an object and what is done about it.

use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::core::v1::ObjectReference;
use lockstep_csi_controller::Controller;
use lockstep_proto::{FINALIZER, csi::controller_server::Controller as _, objects::MirrorVolume};
use lockstep_store::{Changes, Directory, Error, Listing, News, Object, Store};
use tonic::Code;

use crate::rig::{GIB, PATIENT, Rig, contains, delete, grow, nodes, refused, wanted, within};

type Meddle = Box<dyn FnOnce(&mut MirrorVolume) + Send>;

/// A store in which somebody changes volume `v` just before the first update or delete.
struct Meddled {
    store: Directory,
    meddle: Mutex<Option<Meddle>>,
}

impl Meddled {
    async fn meddle(&self) {
        let meddle = self.meddle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(meddle) = meddle else { return };
        let mut volume = self.store.get::<MirrorVolume>("v").await.unwrap().unwrap();
        meddle(&mut volume);
        let mut stored = self.store.update(volume.clone()).await.unwrap();
        stored.status = volume.status;
        self.store.update_status(stored).await.unwrap();
    }
}

impl Store for Meddled {
    async fn get<K: Object>(&self, name: &str) -> Result<Option<K>, Error> {
        self.store.get(name).await
    }
    async fn get_in<K: Object>(&self, namespace: &str, name: &str) -> Result<Option<K>, Error> {
        self.store.get_in(namespace, name).await
    }
    async fn list<K: Object>(&self) -> Result<Listing<K>, Error> {
        self.store.list().await
    }
    async fn create<K: Object>(&self, object: K) -> Result<K, Error> {
        self.store.create(object).await
    }
    async fn update<K: Object>(&self, object: K) -> Result<K, Error> {
        self.meddle().await;
        self.store.update(object).await
    }
    async fn update_status<K: Object>(&self, object: K) -> Result<K, Error> {
        self.store.update_status(object).await
    }
    async fn delete<K: Object>(&self, name: &str, unchanged: Option<&K>) -> Result<(), Error> {
        self.meddle().await;
        self.store.delete(name, unchanged).await
    }
    async fn tell(&self, about: &ObjectReference, news: &News) -> Result<(), Error> {
        self.store.tell(about, news).await
    }
    async fn changes<K: Object>(&self) -> Result<impl Changes, Error> {
        self.store.changes::<K>().await
    }
}

fn meddled(rig: &Rig, meddle: impl FnOnce(&mut MirrorVolume) + Send + 'static) -> Controller<Meddled> {
    Controller::new(Meddled { store: rig.store.clone(), meddle: Mutex::new(Some(Box::new(meddle))) })
}

#[tokio::test]
async fn a_volume_that_is_staged_just_before_it_is_deleted_stays() {
    let rig = Rig::new();
    rig.existing("v", "a", GIB, |_| {}).await;
    let controller = meddled(&rig, |volume| volume.status.as_mut().unwrap().device = Some("/dev/loop7".into()));
    let call = controller.delete_volume(within(PATIENT, delete("v"))).await;
    contains(&refused(call, Code::FailedPrecondition), &["/dev/loop7"]);
    assert_eq!(rig.volume("v").await.unwrap().metadata.deletion_timestamp, None);
}

#[tokio::test]
async fn a_volume_that_is_claimed_just_before_it_is_withdrawn_stays() {
    let rig = Rig::new();
    rig.disks("a", &[8, 8]).await;
    refused(rig.controller.create_volume(within(50, wanted("v"))).await, Code::DeadlineExceeded);
    rig.age("v");
    let controller = meddled(&rig, |volume| volume.metadata.finalizers = Some(vec![FINALIZER.into()]));
    let request = lockstep_proto::csi::CreateVolumeRequest { accessibility_requirements: nodes(&["a"], &[]), ..wanted("v") };
    let call = controller.create_volume(within(300, request)).await;
    contains(&refused(call, Code::DeadlineExceeded), &["(claimed"]);
    assert_eq!(rig.volume("v").await.unwrap().metadata.deletion_timestamp, None);
}

#[tokio::test]
async fn a_refused_growth_is_taken_back_although_the_object_changes_at_that_moment() {
    let rig = Rig::new();
    let pending = |volume: &mut MirrorVolume| volume.spec.capacity_bytes = 4 * GIB;
    rig.existing_as("v", "a", pending, |status| (status.capacity_bytes, status.refused_capacity_bytes) = (GIB, Some(4 * GIB))).await;
    let controller = meddled(&rig, |volume| volume.status.as_mut().unwrap().epoch += 1);
    refused(controller.controller_expand_volume(within(PATIENT, grow("v", 4 * GIB))).await, Code::OutOfRange);
    let volume = rig.volume("v").await.unwrap();
    assert_eq!((volume.spec.capacity_bytes, volume.status.unwrap().epoch), (GIB, 1));
}

#[tokio::test]
async fn a_growth_that_succeeds_just_before_it_is_taken_back_is_answered() {
    let rig = Rig::new();
    let pending = |volume: &mut MirrorVolume| volume.spec.capacity_bytes = 4 * GIB;
    rig.existing_as("v", "a", pending, |status| (status.capacity_bytes, status.refused_capacity_bytes) = (GIB, Some(4 * GIB))).await;
    let controller = meddled(&rig, |volume| volume.status.as_mut().unwrap().capacity_bytes = 4 * GIB);
    let grown = controller.controller_expand_volume(within(PATIENT, grow("v", 4 * GIB))).await.unwrap().into_inner();
    assert_eq!(grown.capacity_bytes as u64, 4 * GIB);
    assert_eq!(rig.volume("v").await.unwrap().spec.capacity_bytes, 4 * GIB);
}
