use super::*;
use alloc::{collections::BTreeSet, vec};
use proptest::prelude::*;

fn range(start: u64, end: u64) -> BlockRange {
    BlockRange::new(start, end)
}

#[test]
fn touching_ranges_go_in_parallel() {
    let mut lock = RangeLock::new();
    assert!(lock.acquire(1, range(0, 8), Class::User));
    assert!(lock.acquire(2, range(8, 16), Class::User));
}

#[test]
fn a_write_counts_all_earlier_overlaps_and_is_woken_once() {
    // The flaw of the per-disk waiter lists: A[38,51), B[12,19) in flight, C[19-,38+) on both.
    let mut lock = RangeLock::new();
    assert!(lock.acquire(1, range(38, 51), Class::User));
    assert!(lock.acquire(2, range(12, 20), Class::User));
    assert!(!lock.acquire(3, range(19, 39), Class::User));
    let mut woken = vec![];
    lock.release(2, &mut woken);
    assert!(woken.is_empty());
    lock.release(1, &mut woken);
    assert_eq!(woken, [3]);
}

#[test]
fn a_write_waits_for_a_queued_one() {
    let mut lock = RangeLock::new();
    lock.acquire(1, range(0, 4), Class::User);
    lock.acquire(2, range(2, 10), Class::User);
    assert!(!lock.acquire(3, range(8, 12), Class::User));
    let mut woken = vec![];
    lock.release(1, &mut woken);
    assert_eq!(woken, [2]);
}

#[test]
fn a_read_waits_for_issued_user_writes_only_and_nobody_waits_for_it() {
    let mut lock = RangeLock::new();
    lock.acquire(1, range(0, 4), Class::Copy);
    lock.acquire(2, range(0, 4), Class::User); // queued behind the copy
    assert!(lock.acquire(3, range(0, 4), Class::Read));
    lock.acquire(4, range(10, 14), Class::User);
    assert!(!lock.acquire(5, range(12, 13), Class::Read));
    assert!(lock.acquire(6, range(20, 21), Class::Read));
    assert!(lock.acquire(7, range(20, 21), Class::User));
    let mut woken = vec![];
    lock.release(4, &mut woken);
    assert_eq!(woken, [5]);
    lock.check_invariants();
}

#[test]
fn a_read_that_a_write_was_issued_beside_is_read_again_between_the_writes() {
    let mut lock = RangeLock::new();
    assert!(lock.acquire(1, range(0, 4), Class::Read));
    assert!(lock.acquire(2, range(4, 8), Class::User));
    assert!(!lock.raced(1));
    assert!(!lock.acquire(3, range(2, 6), Class::User) && !lock.raced(1), "it is queued");
    let mut woken = vec![];
    lock.release(2, &mut woken);
    assert!(woken == [3] && lock.raced(1));
    lock.release(1, &mut woken);
    assert!(!lock.acquire(4, range(0, 4), Class::ReadAgain));
    assert!(!lock.acquire(5, range(0, 2), Class::User));
    lock.release(3, &mut woken);
    lock.release(4, &mut woken);
    assert_eq!(woken, [3, 4, 5]);
    lock.check_invariants();
}

#[test]
fn reads_do_not_wait_for_a_write_that_is_behind_and_writes_and_reads_that_come_again_do() {
    let mut lock = RangeLock::new();
    let mut woken = vec![];
    assert!(lock.acquire(1, range(0, 4), Class::User));
    assert!(!lock.acquire(2, range(2, 8), Class::Read));
    assert!(!lock.acquire(3, range(3, 5), Class::User));
    lock.let_reads_by(1, &mut woken);
    assert_eq!(woken, [2]);
    assert!(!lock.raced(2) && lock.acquire(4, range(0, 1), Class::Read));
    assert!(!lock.acquire(5, range(0, 1), Class::ReadAgain) && !lock.acquire(6, range(0, 1), Class::Copy));
    lock.check_invariants();
    for read in [2, 4] {
        lock.release(read, &mut woken);
    }
    woken.clear();
    lock.release(1, &mut woken);
    assert_eq!(woken, [3, 5, 6]);
    lock.check_invariants();
}

#[test]
fn a_read_that_waited_while_another_write_was_issued_is_read_again_too() {
    let mut lock = RangeLock::new();
    let mut woken = vec![];
    assert!(lock.acquire(1, range(0, 2), Class::User));
    assert!(!lock.acquire(2, range(1, 4), Class::Read));
    assert!(lock.acquire(3, range(2, 4), Class::User));
    lock.release(1, &mut woken);
    assert!(woken == [2] && lock.raced(2));
    // One that is final by then has left nothing that may be taken back.
    assert!(!lock.acquire(4, range(2, 8), Class::Read));
    assert!(lock.acquire(5, range(4, 8), Class::User));
    lock.release(5, &mut woken);
    lock.release(3, &mut woken);
    assert!(woken == [2, 4] && !lock.raced(4));
    lock.check_invariants();
}

#[test]
fn a_read_waits_for_a_write_that_was_issued_before_other_reads_were_let_by() {
    let mut lock = RangeLock::new();
    let mut woken = vec![];
    assert!(lock.acquire(1, range(0, 2), Class::User));
    assert!(!lock.acquire(2, range(0, 1), Class::Read));
    assert!(lock.acquire(3, range(4, 6), Class::User));
    lock.let_reads_by(1, &mut woken);
    assert!(!lock.acquire(4, range(4, 5), Class::Read));
    lock.release(3, &mut woken);
    assert_eq!(woken, [2, 4]);
    lock.check_invariants();
}

#[test]
#[should_panic(expected = "range lock")]
fn a_count_that_is_not_what_the_table_says_is_noticed() {
    let mut lock = RangeLock::new();
    lock.acquire(1, range(0, 4), Class::User);
    lock.entries[0].blockers = 1;
    lock.check_invariants();
}

/// Keeps no counts and no clock: remembers who came after whom, and asks the whole history each time.
#[derive(Default)]
struct Naive {
    /// In order of arrival: id, range, class, whom it waits for, whether it is issued, whether it was raced.
    entries: Vec<(EntryId, BlockRange, Class, BTreeSet<EntryId>, bool, bool)>,
    /// User writes that reads do not wait for any more.
    behind: BTreeSet<EntryId>,
}

impl Naive {
    fn acquire(&mut self, id: EntryId, range: BlockRange, class: Class) -> bool {
        let waits = |other: Class, issued: bool| match class {
            Class::User | Class::Copy if matches!(other, Class::User | Class::Copy) => true,
            Class::User => other == Class::ReadAgain,
            Class::Read => other == Class::User && issued,
            Class::ReadAgain => other == Class::User,
            Class::Copy => false,
        };
        let shares = |other: BlockRange| (range.start..range.end).any(|block| (other.start..other.end).contains(&block));
        let by = |id| class == Class::Read && self.behind.contains(id);
        let earlier = self.entries.iter().filter(|(id, other, kind, _, issued, _)| shares(*other) && waits(*kind, *issued) && !by(id));
        let earlier: BTreeSet<EntryId> = earlier.map(|entry| entry.0).collect();
        self.entries.push((id, range, class, earlier, false, false));
        self.issue() == [id]
    }

    fn release(&mut self, id: EntryId) -> Vec<EntryId> {
        self.entries.retain(|entry| entry.0 != id);
        for entry in &mut self.entries {
            entry.3.remove(&id);
        }
        self.issue()
    }

    fn let_reads_by(&mut self, id: EntryId) -> Vec<EntryId> {
        self.behind.insert(id);
        for read in self.entries.iter_mut().filter(|entry| entry.2 == Class::Read) {
            read.3.remove(&id);
        }
        self.issue()
    }

    /// Issues whoever waits for nobody. A read and a user write that are under way together, and of which one was issued now, race.
    fn issue(&mut self) -> Vec<EntryId> {
        let mut now = vec![];
        for entry in self.entries.iter_mut().filter(|entry| !entry.4 && entry.3.is_empty()) {
            entry.4 = true;
            now.push(entry.0);
        }
        let under_way = self.entries.iter().filter(|entry| entry.2 == Class::User && entry.4 && !self.behind.contains(&entry.0));
        let writes: Vec<(EntryId, BlockRange)> = under_way.map(|entry| (entry.0, entry.1)).collect();
        for read in self.entries.iter_mut().filter(|entry| entry.2 == Class::Read && entry.4) {
            let raced = |(id, range): &(EntryId, BlockRange)| range.overlaps(read.1) && (now.contains(id) || now.contains(&read.0));
            read.5 |= writes.iter().any(raced);
        }
        now
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Acquire(u64, u64, Class),
    /// The n-th of those that are issued.
    Release(usize),
    /// The n-th of the user writes that are issued.
    LetReadsBy(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let class = prop_oneof![4 => Just(Class::User), 1 => Just(Class::Copy), 2 => Just(Class::Read), 1 => Just(Class::ReadAgain)];
    prop_oneof![
        3 => (0..24u64, 1..9u64, class).prop_map(|(start, len, class)| Step::Acquire(start, len, class)),
        2 => any::<usize>().prop_map(Step::Release),
        1 => any::<usize>().prop_map(Step::LetReadsBy),
    ]
}

proptest! {
    #[test]
    fn it_agrees_with_a_naive_model_on_any_history(steps in prop::collection::vec(step(), 1..120)) {
        let (mut lock, mut naive) = (RangeLock::new(), Naive::default());
        for (id, step) in (1..).zip(steps) {
            match step {
                Step::Acquire(start, len, class) => {
                    let new = range(start, start + len);
                    prop_assert_eq!(lock.acquire(id, new, class), naive.acquire(id, new, class));
                }
                Step::Release(n) => {
                    let issued: Vec<EntryId> = naive.entries.iter().filter(|entry| entry.4).map(|entry| entry.0).collect();
                    if let Some(gone) = issued.get(n % issued.len().max(1)) {
                        // What is there already stays there.
                        let mut woken = vec![7];
                        lock.release(*gone, &mut woken);
                        prop_assert_eq!(&woken[1..], naive.release(*gone));
                    }
                }
                Step::LetReadsBy(n) => {
                    let writes = naive.entries.iter().filter(|entry| entry.2 == Class::User && entry.4);
                    let writes: Vec<EntryId> = writes.map(|entry| entry.0).collect();
                    if let Some(by) = writes.get(n % writes.len().max(1)) {
                        let mut woken = vec![7];
                        lock.let_reads_by(*by, &mut woken);
                        prop_assert_eq!(&woken[1..], naive.let_reads_by(*by));
                    }
                }
            }
            for (id, .., raced) in &naive.entries {
                prop_assert_eq!(lock.raced(*id), *raced);
            }
            lock.check_invariants();
        }
        // Nobody waits for ever: whoever is issued ends, and that issues all the others.
        while let Some(gone) = naive.entries.iter().find(|entry| entry.4).map(|entry| entry.0) {
            let mut woken = vec![];
            lock.release(gone, &mut woken);
            prop_assert_eq!(woken, naive.release(gone));
        }
        prop_assert!(naive.entries.is_empty() && lock.entries.is_empty());
    }
}
