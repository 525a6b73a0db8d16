//! CreateVolume: an object on a node, and the next node if that one cannot have it.
//!
//! ```text
//!  nothing --place--> unclaimed --node--> claimed --> Ready ==> the answer
//!     ^                 |                    '------> Rejected (claim given back)
//!     |                 | old, and its node silent        |
//!     '-----------------'---------------------------------'   withdrawn, with a precondition; this node is not tried again
//! ```
//! A node that is silent is not tried at all while another one is not. Where the scheduler has chosen the node, there is no other one.
//! The whole picture is in the object, so a repeated call goes on where the last one was.

use std::collections::BTreeMap;

use k8s_openapi::api::{coordination::v1::Lease, core::v1::PersistentVolumeClaim};
use kube::Resource;
use lockstep_proto::{
    csi::{CreateVolumeRequest, CreateVolumeResponse},
    objects::{MirrorVolume, VolumePhase},
};
use lockstep_store::{Error as StoreError, Store};

use crate::{
    Controller, Error, SILENT, UNCLAIMED,
    nodes::Nodes,
    volume::{age, answer, being_deleted, claimed, phase, since, status},
    wait::{Deadline, Over},
    wanted::Wanted,
};

/// The annotation of a claim by which the scheduler says which node it has chosen (WaitForFirstConsumer).
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";

/// What became of an object.
enum Settled {
    Ready(MirrorVolume),
    /// Its node does not take it. It is to be withdrawn exactly as it was seen.
    Refused {
        volume: MirrorVolume,
        why: String,
    },
}

impl<S: Store> Controller<S> {
    pub(crate) async fn create(&self, request: CreateVolumeRequest, deadline: Deadline) -> Result<CreateVolumeResponse, Error> {
        let wanted = Wanted::of(request)?;
        let _busy = self.busy.enter(&wanted.id)?;
        // The nodes that did not take it, and why.
        let mut refusals: BTreeMap<String, String> = BTreeMap::new();
        loop {
            let volume = match self.store.get(wanted.id.as_str()).await? {
                Some(volume) => volume,
                None => match self.store.create(wanted.on(&self.place(&wanted, &refusals).await?)).await {
                    // Another replica was faster; or an earlier call of ours, which was dropped but not its create.
                    Err(StoreError::AlreadyExists { .. }) => continue,
                    created => created?,
                },
            };
            if being_deleted(&volume) {
                return Err(Error::BeingDeleted { id: wanted.id });
            }
            wanted.compare(&volume)?;
            match self.settle(&wanted, volume, deadline).await? {
                Settled::Ready(volume) => return Ok(CreateVolumeResponse { volume: Some(answer(&volume)) }),
                Settled::Refused { volume, why } => match self.store.delete(wanted.id.as_str(), Some(&volume)).await {
                    // It changed: perhaps its node claimed it just now.
                    Err(StoreError::Conflict { .. }) => {}
                    Ok(()) | Err(StoreError::NotFound { .. }) => {
                        tracing::info!(volume = %wanted.id, node = volume.spec.node, why, "withdrawn from a node");
                        refusals.insert(volume.spec.node, why);
                    }
                    Err(error) => return Err(error.into()),
                },
            }
        }
    }

    /// The next node to try. Nodes without room are not even asked. Nor are silent ones while another node is not: what a call learnt of
    /// them is forgotten with it, so two of them could pass a volume to and fro for ever. If all are silent, one may come back: that is
    /// waited for.
    async fn place(&self, wanted: &Wanted, refused: &BTreeMap<String, String>) -> Result<String, Error> {
        let nodes = self.nodes().await?;
        let (mut refusals, mut first_silent) = (Vec::new(), None);
        for node in self.candidates(wanted, &nodes).await? {
            let why = match (refused.get(&node), nodes.get(&node)) {
                (Some(why), _) => why.clone(),
                (None, None) => "it has no disk of Lockstep".into(),
                (None, Some(room)) if room.maximum_volume_bytes == 0 => match nodes.one_disk(&node) {
                    Some(disk) => {
                        format!("all its disks that can be used are parts of one physical disk ({disk}), and a second one is needed")
                    }
                    None => "it has no two usable disks with room left".into(),
                },
                (None, Some(room)) if room.maximum_volume_bytes < wanted.bytes => {
                    format!("the largest volume that fits on two of its disks is {} bytes", room.maximum_volume_bytes)
                }
                (None, Some(_)) => match self.silence_or_damage(&node).await? {
                    None => return Ok(node),
                    Some(why) => {
                        first_silent.get_or_insert_with(|| node.clone());
                        why
                    }
                },
            };
            refusals.push(format!("{node}: {why}"));
        }
        if let Some(node) = first_silent
            && !self.any_speaks(&nodes).await?
        {
            return Ok(node);
        }
        Err(Error::NoRoom { bytes: wanted.bytes, refusals: refusals.join("; ") })
    }

    /// The nodes to try, in order. Where the scheduler has chosen one for the pod it is that one or none: the pod would wait for ever for a volume on
    /// another. If it cannot have it, the scheduler is asked to choose again. What is bound before there is a pod may be on any.
    async fn candidates(&self, wanted: &Wanted, nodes: &Nodes) -> Result<Vec<String>, Error> {
        let mut candidates = wanted.placement.order(nodes);
        if let Some(selected) = self.selected_node(wanted).await? {
            candidates.retain(|node| *node == selected);
        }
        Ok(candidates)
    }

    /// The node that the scheduler has chosen. The call itself does not say whether it has: only the claim does.
    async fn selected_node(&self, wanted: &Wanted) -> Result<Option<String>, Error> {
        let Some((namespace, name)) = wanted.claim.as_deref().and_then(|claim| claim.split_once('/')) else { return Ok(None) };
        let claim: Option<PersistentVolumeClaim> = self.store.get_in(namespace, name).await?;
        Ok(claim.and_then(|claim| claim.metadata.annotations?.remove(SELECTED_NODE)))
    }

    /// Waits until it is known what becomes of the object.
    async fn settle(&self, wanted: &Wanted, volume: MirrorVolume, deadline: Deadline) -> Result<Settled, Error> {
        let mut changes = self.store.changes::<MirrorVolume>().await?;
        let uid = volume.meta().uid.clone();
        loop {
            let now: Option<MirrorVolume> = self.store.get(wanted.id.as_str()).await?;
            let Some(volume) = now.filter(|volume| volume.meta().uid == uid) else {
                return Err(Error::Vanished { id: wanted.id.clone() });
            };
            if being_deleted(&volume) {
                return Err(Error::BeingDeleted { id: wanted.id.clone() });
            }
            match phase(&volume) {
                VolumePhase::Ready => return Ok(Settled::Ready(volume)),
                // It gives its claim back last: until then something of it may be on its disks.
                VolumePhase::Rejected if !claimed(&volume) => {
                    let why = status(&volume);
                    return Ok(Settled::Refused { volume, why: format!("{} ({})", why.message, why.reason) });
                }
                VolumePhase::Rejected | VolumePhase::Allocating => {}
            }
            if !claimed(&volume)
                && age(&volume) >= UNCLAIMED
                && let Some(silence) = self.silence(&volume.spec.node).await?
            {
                let why = format!("it did not answer for {} s and {silence}", UNCLAIMED.as_secs());
                return Ok(Settled::Refused { volume, why });
            }
            deadline.change(&mut changes, &self.ending).await.map_err(|over| match over {
                Over::Ending => Error::Ending,
                Over::Deadline => waiting(wanted, &volume),
            })?;
        }
    }

    /// Why a node counts as silent; `None`: it renews its Lease.
    async fn silence(&self, node: &str) -> Result<Option<String>, Error> {
        if !lockstep_store::is_name(node) {
            return Ok(Some("no node can have this name".into()));
        }
        let lease: Option<Lease> = self.store.get(node).await?;
        let renewed = lease.and_then(|lease| lease.spec?.renew_time);
        Ok(match renewed {
            None => Some("it has no Lease (does csi-node run there?)".into()),
            Some(renewed) if since(renewed.0) > SILENT => {
                Some(format!("its Lease was not renewed for {} s (does csi-node run there?)", since(renewed.0).as_secs()))
            }
            Some(_) => None,
        })
    }

    /// For placement: a Lease that cannot be read keeps a volume from its node, and not from the others.
    async fn silence_or_damage(&self, node: &str) -> Result<Option<String>, Error> {
        match self.silence(node).await {
            Err(Error::Store(error @ StoreError::Unreadable { .. })) => Ok(Some(error.to_string())),
            known => known,
        }
    }

    /// Whether any node with disks is not silent.
    async fn any_speaks(&self, nodes: &Nodes) -> Result<bool, Error> {
        for node in nodes.by_room() {
            if self.silence_or_damage(&node).await?.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn waiting(wanted: &Wanted, volume: &MirrorVolume) -> Error {
    let what = if claimed(volume) {
        format!("allocate its legs (claimed; it says {:?})", status(volume).message)
    } else {
        "claim it (not claimed: is csi-node running there?)".into()
    };
    Error::Waiting { id: wanted.id.clone(), node: volume.spec.node.clone(), what }
}
