//! What people should hear: events of a volume's object and of its claim, of a disk's object and of its node.
//!
//! It is told when the object says it, so that each change is told once, also after a restart or a time without an API. Who tells does not wait.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolume};
use kube::Resource;
use lockstep_datapath::core::assembly::Refusal;
use lockstep_proto::{
    DRIVER_NAME,
    objects::{DiskPhase, LocalDisk, MirrorVolume},
};
use lockstep_store::{Error as StoreError, News, Store};
use tracing::{Instrument, warn};

use crate::{error::Error, node::Node};

/// Tried so often,
const TRIES: usize = 3;
/// after so long each time.
const AGAIN: Duration = Duration::from_secs(10);

/// News of this reason.
pub(crate) fn news(warning: bool, reason: &'static str, message: String) -> News {
    News { warning, reason, message, related: None }
}

/// The object of a disk, for news of something else.
pub(crate) fn disk(name: &str) -> ObjectReference {
    let (api_version, kind) = (LocalDisk::api_version(&()).into_owned(), LocalDisk::kind(&()).into_owned());
    ObjectReference { api_version: Some(api_version), kind: Some(kind), name: Some(name.to_owned()), ..ObjectReference::default() }
}

async fn told<S: Store>(store: &S, about: &ObjectReference, news: &News) {
    for tried in 1..=TRIES {
        match store.tell(about, news).await {
            Ok(()) => return,
            Err(error) if tried == TRIES => warn!(%error, "nobody is told"),
            Err(_) => tokio::time::sleep(AGAIN).await,
        }
    }
}

impl<S: Store> Node<S> {
    /// News of a volume, for those who look at it and for those whose claim it is.
    pub(crate) fn tell_of_volume(self: &Arc<Self>, volume: &MirrorVolume, news: Vec<News>) {
        if news.is_empty() {
            return;
        }
        let (node, volume) = (Arc::clone(self), volume.object_ref(&()));
        let telling = async move {
            let claim = claim(&node.store, volume.name.as_deref().unwrap_or_default()).await.unwrap_or_else(|error| {
                warn!(%error, "whose claim the volume is could not be found: its owner is not told");
                None
            });
            for news in &news {
                for about in std::iter::once(&volume).chain(&claim) {
                    told(&node.store, about, news).await;
                }
            }
        };
        tokio::spawn(telling.in_current_span());
    }

    /// A mirror is not assembled from what was found.
    pub(crate) fn tell_of_refusal(self: &Arc<Self>, volume: &MirrorVolume, error: &Error) {
        use lockstep_datapath::Error as Mirror;
        let Error::Datapath(error) = error else { return };
        let how = match error {
            Mirror::Refused(_) => ". README, \"When a disk fails\", says how",
            Mirror::Damaged { .. } | Mirror::AllDamaged { .. } => "",
            _ => return,
        };
        let split = matches!(error, Mirror::Refused(Refusal::SplitBrain(..)) | Mirror::Damaged { refusal: Refusal::SplitBrain(..), .. });
        let reason = if split { "SplitBrainRefused" } else { "LegRefused" };
        self.tell_of_volume(volume, vec![news(true, reason, format!("the volume is not served: {error}{how}"))]);
    }
}

/// The claim that a volume is bound to. It is asked for when there is news: the UID is that of the claim of now, without which nobody is shown them.
async fn claim<S: Store>(store: &S, id: &str) -> Result<Option<ObjectReference>, StoreError> {
    let ours = |volume: &PersistentVolume| {
        let source = volume.spec.as_ref().and_then(|spec| spec.csi.as_ref());
        source.is_some_and(|csi| csi.driver == DRIVER_NAME && csi.volume_handle == id)
    };
    // The provisioner names both alike; whoever makes a PersistentVolume by hand need not.
    let volume = match store.get::<PersistentVolume>(id).await?.filter(ours) {
        Some(volume) => Some(volume),
        None => store.list::<PersistentVolume>().await?.objects.into_iter().find(ours),
    };
    let claim = volume.and_then(|volume| volume.spec?.claim_ref);
    Ok(claim.filter(|claim| claim.uid.is_some()).map(|claim| ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("PersistentVolumeClaim".into()),
        resource_version: None,
        ..claim
    }))
}

/// The node, as the kubelet names it in events: its name is the UID.
fn node_ref(node: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Node".into()),
        name: Some(node.to_owned()),
        uid: Some(node.to_owned()),
        ..ObjectReference::default()
    }
}

/// News of a disk, now that its object says how it is.
pub(crate) async fn tell_of_disk<S: Store>(store: &S, object: &LocalDisk, before: DiskPhase) {
    let Some(news) = news_of_disk(object, before) else { return };
    for about in [object.object_ref(&()), node_ref(&object.spec.node)] {
        if let Err(error) = store.tell(&about, &news).await {
            warn!(%error, "nobody is told");
        }
    }
}

fn news_of_disk(object: &LocalDisk, before: DiskPhase) -> Option<News> {
    let status = object.status.as_ref().filter(|status| status.phase != before)?;
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let identity = status.identity.clone().unwrap_or_default();
    let mut described = vec![identity.physical];
    described.extend(identity.model.map(|model| format!("model {model}")));
    described.extend(identity.serial.map(|serial| format!("serial {serial}")));
    let described = described.join(", ");
    let mut news = match (status.phase, before) {
        (DiskPhase::Ready, DiskPhase::Pending) => {
            news(false, "DiskClaimed", format!("{described}: the disk is Lockstep's, with {} MiB for volumes", status.capacity_bytes >> 20))
        }
        (DiskPhase::Failed, _) => news(true, "DiskFailed", format!("{described}: {}", status.message)),
        (DiskPhase::Refused, _) => news(true, "DiskRefused", format!("{described}: {}", status.message)),
        _ => return None,
    };
    news.related = Some(disk(name));
    Some(news)
}
