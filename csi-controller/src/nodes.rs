//! Which nodes have room for a volume.

use std::collections::{BTreeMap, BTreeSet};

use kube::Resource;
use lockstep_proto::{
    capacity::{Capacity, capacity},
    objects::{DiskPhase, LocalDisk},
};
use lockstep_store::{Listing, Store};

use crate::{Controller, Error};

/// What each node that has disks can still take.
#[derive(Clone, Debug)]
pub(crate) struct Nodes(BTreeMap<String, Room>);

#[derive(Clone, Debug)]
struct Room {
    capacity: Capacity,
    /// All that can be used is parts of this physical disk, several of them.
    one_disk: Option<String>,
}

/// Usable disks that share a physical one, directly or by others among them. Of these the best counts, since two parts of one disk are not a pair.
#[derive(Debug)]
struct Group {
    physical: BTreeSet<String>,
    best: u64,
    disks: usize,
}

impl Room {
    fn of(groups: &[Group]) -> Self {
        let free: Vec<u64> = groups.iter().map(|group| group.best).collect();
        let one_disk = match groups {
            [group] if group.disks > 1 => Some(group.physical.iter().map(String::as_str).collect::<Vec<_>>().join(" + ")),
            _ => None,
        };
        Self { capacity: capacity(&free), one_disk }
    }
}

/// The free bytes of a disk that can be used; `None`: it cannot.
pub(crate) fn free(disk: &LocalDisk) -> Option<u64> {
    let status = disk.status.as_ref().filter(|status| status.phase == DiskPhase::Ready && disk.meta().deletion_timestamp.is_none())?;
    Some(status.capacity_bytes.saturating_sub(status.allocated_bytes))
}

impl Nodes {
    /// # Errors
    /// If a disk's object cannot be read: nobody knows what its node has then.
    fn of(listing: Listing<LocalDisk>) -> Result<Self, Error> {
        if let Some(error) = listing.unreadable.into_iter().next() {
            return Err(error.into());
        }
        let mut disks: BTreeMap<String, Vec<Group>> = BTreeMap::new();
        for disk in listing.objects {
            let of_node = disks.entry(disk.spec.node.clone()).or_default();
            let identity = disk.status.as_ref().and_then(|status| status.identity.as_ref());
            if let (Some(free), Some(identity)) = (free(&disk), identity) {
                let mut group = Group { physical: identity.physical_disks().map(str::to_owned).collect(), best: free, disks: 1 };
                for other in of_node.extract_if(.., |other| !other.physical.is_disjoint(&group.physical)).collect::<Vec<_>>() {
                    group.physical.extend(other.physical);
                    group.best = group.best.max(other.best);
                    group.disks += other.disks;
                }
                of_node.push(group);
            }
        }
        Ok(Self(disks.into_iter().map(|(node, groups)| (node, Room::of(&groups))).collect()))
    }

    /// What a node can take; `None`: it has no disk of ours.
    pub(crate) fn get(&self, node: &str) -> Option<Capacity> {
        self.0.get(node).map(|room| room.capacity)
    }

    /// The physical disk that all usable disks of a node are parts of, if there are several.
    pub(crate) fn one_disk(&self, node: &str) -> Option<&str> {
        self.0.get(node)?.one_disk.as_deref()
    }

    /// What all nodes can take: together, and in one volume.
    pub(crate) fn total(&self) -> Capacity {
        self.0.values().fold(Capacity::default(), |total, Room { capacity, .. }| Capacity {
            maximum_volume_bytes: total.maximum_volume_bytes.max(capacity.maximum_volume_bytes),
            available_bytes: total.available_bytes.saturating_add(capacity.available_bytes),
        })
    }

    /// All nodes, that with the most room first.
    pub(crate) fn by_room(&self) -> Vec<String> {
        let mut nodes: Vec<_> = self.0.iter().collect();
        nodes.sort_by_key(|(_, room)| std::cmp::Reverse(room.capacity.available_bytes));
        nodes.into_iter().map(|(node, _)| node.clone()).collect()
    }
}

impl<S: Store> Controller<S> {
    pub(crate) async fn nodes(&self) -> Result<Nodes, Error> {
        Nodes::of(self.store.list().await?)
    }
}

#[cfg(test)]
mod tests {
    use lockstep_proto::objects::{DiskIdentity, LocalDiskSpec, LocalDiskStatus};

    use super::*;

    const GIB: u64 = 1 << 30;

    fn disk(node: &str, physical: &str, phase: DiskPhase, capacity: u64, allocated: u64) -> LocalDisk {
        let mut disk = LocalDisk::new("d", LocalDiskSpec { node: node.into() });
        let identity = Some(DiskIdentity { physical: physical.into(), ..DiskIdentity::default() });
        disk.status = Some(LocalDiskStatus {
            identity,
            phase,
            capacity_bytes: capacity * GIB,
            allocated_bytes: allocated * GIB,
            ..LocalDiskStatus::default()
        });
        disk
    }

    #[test]
    fn only_ready_disks_count_and_of_a_physical_disk_only_its_best_part() {
        let objects = vec![
            disk("a", "one", DiskPhase::Ready, 8, 2),
            disk("a", "one", DiskPhase::Ready, 9, 1),
            disk("a", "two", DiskPhase::Ready, 5, 2),
            disk("a", "three", DiskPhase::Failed, 9, 0),
            disk("b", "one", DiskPhase::Ready, 7, 0),
            disk("b", "two", DiskPhase::Ready, 7, 0),
            // More than it has, because it shrank: nothing is free.
            disk("c", "one", DiskPhase::Ready, 1, 2),
            LocalDisk::new("new", LocalDiskSpec { node: "d".into() }),
            // A device over two disks is no pair with either.
            disk("f", "one", DiskPhase::Ready, 4, 0),
            disk("f", "two", DiskPhase::Ready, 4, 0),
            disk("f", "one + two", DiskPhase::Ready, 8, 0),
        ];
        let nodes = Nodes::of(Listing { objects, unreadable: Vec::new() }).unwrap();
        assert_eq!(nodes.get("a"), Some(Capacity { maximum_volume_bytes: 3 * GIB, available_bytes: 3 * GIB }));
        assert_eq!((nodes.get("c"), nodes.get("d"), nodes.get("e")), (Some(Capacity::default()), Some(Capacity::default()), None));
        assert_eq!(nodes.get("f"), Some(Capacity::default()));
        assert_eq!(nodes.total(), Capacity { maximum_volume_bytes: 7 * GIB, available_bytes: 10 * GIB });
        assert_eq!(nodes.by_room(), ["b", "a", "c", "d", "f"]);
        assert_eq!(["a", "b", "c", "d", "e", "f"].map(|node| nodes.one_disk(node)), [None, None, None, None, None, Some("one + two")]);
    }
}
