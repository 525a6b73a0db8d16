//! Space that is promised, from the moment of the promise until a look at the disk has counted what came of it.
//!
//! ```text
//! reserve --> reserved --drop--> settling --a look at the disk that began after the drop--> nothing: it is in the disk's own numbers
//! ```
//! In between bytes may be counted twice, never not at all.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{Disk, Disks, device::overlap};
use crate::legs;

/// What is promised of all disks.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    accounts: BTreeMap<String, Account>,
    /// Orders drops and looks.
    clock: u64,
}

#[derive(Debug, Default)]
struct Account {
    reserved: u64,
    /// Let go at this time; nobody has looked since.
    settling: Vec<(u64, u64)>,
    /// When the newest look began whose numbers the disk has.
    counted: u64,
    /// Somebody looks: a disk that hangs is looked at once.
    looking: bool,
}

impl Ledger {
    fn promised(&self, name: &str) -> u64 {
        self.accounts.get(name).map_or(0, |account| account.reserved + account.settling.iter().map(|(_, bytes)| bytes).sum::<u64>())
    }

    fn free(&self, disk: &Disk) -> u64 {
        disk.capacity.saturating_sub(disk.allocated).saturating_sub(self.promised(&disk.name))
    }
}

/// Space that nobody else is given.
#[derive(Debug)]
pub struct Reservation {
    disks: Arc<Disks>,
    name: String,
    bytes: u64,
    /// Its holder knows which disk it is, and may have written there.
    known: AtomicBool,
}

impl Reservation {
    /// The disk's name.
    pub fn disk_name(&self) -> &str {
        self.known.store(true, Ordering::Relaxed);
        &self.name
    }

    /// The disk.
    pub fn disk(&self) -> Option<Disk> {
        self.disks.get(self.disk_name())
    }
}

/// No I/O: this may be an async worker, and the disk may hang.
impl Drop for Reservation {
    fn drop(&mut self) {
        let mut ledger = self.disks.ledger.lock().expect("no holder panics");
        let now = ledger.clock;
        let account = ledger.accounts.entry(self.name.clone()).or_default();
        account.reserved = account.reserved.saturating_sub(self.bytes);
        if self.known.load(Ordering::Relaxed) {
            account.settling.push((now, self.bytes));
            self.disks.unsettled.notify_one();
        }
    }
}

impl Disks {
    /// What is neither taken nor promised of a disk.
    pub fn free(&self, disk: &Disk) -> u64 {
        let ledger = self.ledger.lock().expect("no holder panics");
        self.get(&disk.name).map_or(0, |disk| ledger.free(&disk))
    }

    /// Reserves `bytes` on each of `count` distinct physical disks: those with the most room, none that `avoid` forbids. `None`: there
    /// are not so many.
    pub fn reserve(self: &Arc<Self>, count: usize, bytes: u64, avoid: impl Fn(&Disk) -> bool) -> Option<Vec<Reservation>> {
        // What the disks have is read under the lock: what is let go meanwhile is in the one or in the other.
        let mut ledger = self.ledger.lock().expect("no holder panics");
        let mut candidates: Vec<Disk> = self.ready();
        candidates.retain(|disk| !avoid(disk) && ledger.free(disk) >= bytes);
        candidates.sort_by_key(|disk| std::cmp::Reverse(ledger.free(disk)));
        // A device on several disks may stand in the way of two others: then it is gone on without the first.
        let chosen = (0..candidates.len()).map(|from| distinct(&candidates[from..], count)).find(|chosen| chosen.len() == count)?;
        let take = |disk: &Disk| {
            ledger.accounts.entry(disk.name.clone()).or_default().reserved += bytes;
            Reservation { disks: Arc::clone(self), name: disk.name.clone(), bytes, known: AtomicBool::new(false) }
        };
        Some(chosen.into_iter().map(take).collect())
    }

    /// Reserves `bytes` on this disk. `None`: it has no room, or is not ready.
    pub fn reserve_on(self: &Arc<Self>, name: &str, bytes: u64) -> Option<Reservation> {
        let reservation = self.reserve(1, bytes, |disk| disk.name != name)?.pop()?;
        reservation.known.store(true, Ordering::Relaxed);
        Some(reservation)
    }

    /// Counts what is on the disk again. Blocks.
    pub(crate) fn refresh(&self, name: &str) {
        let Some(disk) = self.get(name).filter(|disk| disk.phase == super::DiskPhase::Ready) else { return };
        let began = self.begin_look();
        if let Ok(space) = legs::space(&disk.mount) {
            self.end_look(name, began, space);
        }
    }

    fn begin_look(&self) -> u64 {
        let mut ledger = self.ledger.lock().expect("no holder panics");
        ledger.clock += 1;
        ledger.clock
    }

    fn end_look(&self, name: &str, began: u64, (capacity, allocated): (u64, u64)) {
        let mut ledger = self.ledger.lock().expect("no holder panics");
        let account = ledger.accounts.entry(name.to_owned()).or_default();
        // A later look was faster.
        if account.counted > began {
            return;
        }
        account.counted = began;
        account.settling.retain(|(dropped, _)| *dropped >= began);
        let mut known = self.known.write().expect("no holder panics");
        let changed = known.get_mut(name).filter(|disk| (disk.capacity, disk.allocated) != (capacity, allocated));
        if let Some(disk) = changed {
            (disk.capacity, disk.allocated) = (capacity, allocated);
            drop(known);
            drop(ledger);
            self.change();
        }
    }

    /// Looks at disks on which reservations were let go, soon after; for ever.
    pub async fn settle(self: Arc<Self>) {
        loop {
            self.unsettled.notified().await;
            for name in self.to_settle() {
                let disks = Arc::clone(&self);
                tokio::task::spawn_blocking(move || {
                    disks.refresh(&name);
                    if let Some(account) = disks.ledger.lock().expect("no holder panics").accounts.get_mut(&name) {
                        account.looking = false;
                    }
                });
            }
        }
    }

    fn to_settle(&self) -> Vec<String> {
        let mut ledger = self.ledger.lock().expect("no holder panics");
        let accounts = ledger.accounts.iter_mut().filter(|(_, account)| !account.settling.is_empty() && !account.looking);
        accounts
            .map(|(name, account)| {
                account.looking = true;
                name.clone()
            })
            .collect()
    }
}

/// The first `count` that have no physical disk in common, or fewer.
fn distinct(candidates: &[Disk], count: usize) -> Vec<&Disk> {
    let mut chosen: Vec<&Disk> = Vec::new();
    for disk in candidates {
        if chosen.len() < count && !chosen.iter().any(|other| other.shares_a_disk_with(&disk.identity.physical)) {
            chosen.push(disk);
        }
    }
    chosen
}

impl Disk {
    /// Whether it lies on a physical disk on which this identity lies too: the two are no pair.
    pub fn shares_a_disk_with(&self, physical: &str) -> bool {
        overlap(&self.identity.physical, physical)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::disks, *};

    fn names(reservations: Option<Vec<Reservation>>) -> Option<Vec<String>> {
        reservations.map(|all| all.iter().map(|one| one.name.clone()).collect())
    }

    #[test]
    fn a_pair_is_two_physical_disks_with_the_most_room() {
        let (_dir, disks) = disks(&[("a", "1", 10), ("b", "1", 30), ("c", "2", 20), ("d", "3", 5)]);
        assert_eq!(names(disks.reserve(2, 6, |_| false)).unwrap(), ["b", "c"]);
        assert_eq!(names(disks.reserve(2, 25, |_| false)), None, "only one disk has so much");
        assert_eq!(names(disks.reserve(1, 1, |disk| disk.identity.physical == "1")).unwrap(), ["c"]);
    }

    #[test]
    fn what_is_reserved_is_not_given_out_twice_until_it_is_let_go() {
        let (_dir, disks) = disks(&[("a", "1", 10), ("b", "2", 10)]);
        let first = disks.reserve(2, 6, |_| false).unwrap();
        assert!(disks.reserve(2, 6, |_| false).is_none());
        assert!(disks.reserve_on("a", 5).is_none());
        drop(first);
        assert!(disks.reserve(2, 10, |_| false).is_some());
    }

    #[test]
    fn a_device_on_two_disks_is_no_pair_with_either_and_not_in_the_way_of_both() {
        let (_dir, disks) = disks(&[("striped", "1 + 2", 30), ("a", "1", 20), ("b", "2", 10)]);
        assert_eq!(names(disks.reserve(2, 5, |_| false)).unwrap(), ["a", "b"]);
        assert_eq!(names(disks.reserve(2, 5, |disk| disk.name == "b")), None);
        assert_eq!(names(disks.reserve(1, 5, |_| false)).unwrap(), ["striped"]);
    }

    #[test]
    fn what_was_let_go_counts_until_a_later_look_at_the_disk() {
        let (_dir, disks) = disks(&[("a", "1", 10)]);
        let reservation = disks.reserve_on("a", 6).unwrap();
        let early = disks.begin_look();
        drop(reservation);
        disks.end_look("a", early, (10, 0));
        assert!(disks.reserve_on("a", 5).is_none(), "that look may not have seen the leg");
        let (slow, late) = (disks.begin_look(), disks.begin_look());
        disks.end_look("a", late, (10, 6));
        disks.end_look("a", slow, (10, 0));
        assert!(disks.reserve_on("a", 5).is_none(), "the newest look counts, not the one that came last");
        assert_eq!(disks.free(&disks.get("a").unwrap()), 4);
    }

    /// However threads reserve, let go and look.
    #[test]
    fn nothing_is_given_out_twice_while_reservations_are_let_go() {
        let (_dir, disks) = disks(&[("a", "1", 10)]);
        let used = std::sync::atomic::AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let Some(reservation) = disks.reserve_on("a", 1) else { continue };
                        let in_use = used.fetch_add(1, Ordering::SeqCst) + 1;
                        assert!(in_use <= 10, "{in_use} of 10 are in use");
                        drop(reservation);
                        let began = disks.begin_look();
                        disks.end_look("a", began, (10, used.load(Ordering::SeqCst)));
                        if in_use > 5 {
                            used.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
    }
}
