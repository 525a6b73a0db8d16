//! What becomes of each request, and when.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashSet},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lockstep_native::faulty::{Counts, Faults, LONGEST_HOLD};

/// Threads that do what is due.
pub(crate) const WORKERS: usize = 4;
/// What counts as late.
const LATE: Duration = Duration::from_millis(500);
const HOST_FAULTS: [(i32, &str); 4] =
    [(libc::EINTR, "EINTR"), (libc::ENOMEM, "ENOMEM"), (libc::ECANCELED, "ECANCELED"), (libc::EBUSY, "EBUSY")];

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Read(u64),
    Write(u64),
    Zero,
    Flush,
    Meta,
    Seek,
}

/// How it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Done,
    /// After so many bytes.
    Short(u64),
    /// With this error, after so many bytes.
    Failed(i32, u64),
}

type Work = Box<dyn FnOnce() + Send>;

struct Waiting {
    due: Instant,
    number: u64,
    work: Work,
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Waiting {}
impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

struct State {
    random: fastrand::Rng,
    faults: Faults,
    counts: Counts,
    waiting: BinaryHeap<Reverse<Waiting>>,
    held: Vec<Waiting>,
    next: u64,
    /// In flight, by number.
    open: HashSet<u64>,
}

impl State {
    fn count(&mut self, what: &str) {
        *self.counts.entry(what.to_owned()).or_default() += 1;
    }

    fn one_in(&mut self, many: u32) -> bool {
        many > 0 && self.random.u32(0..many) == 0
    }

    /// Short of the whole: nothing, some blocks, some bytes.
    fn part(&mut self, len: u64) -> u64 {
        let bytes = self.random.u64(0..len.max(1));
        match self.random.u8(0..4) {
            0 => 0,
            1 => bytes,
            _ => bytes / 4096 * 4096,
        }
    }

    fn fate(&mut self, asked: Asked) -> Fate {
        let faults = self.faults;
        let (name, len) = match asked {
            Asked::Read(len) => ("reads", len),
            Asked::Write(len) => ("writes", len),
            Asked::Zero => ("zeroes", 0),
            Asked::Flush => ("flushes", 0),
            Asked::Meta => ("metadata writes", 4096),
            Asked::Seek => ("seeks", 0),
        };
        self.count(name);
        let (error, what) = match asked {
            Asked::Read(_) => (faults.read_error, "EIO read"),
            Asked::Write(_) => (faults.write_error, "EIO write"),
            Asked::Zero => (faults.zero_error, "EIO zero"),
            Asked::Flush => (faults.flush_error, "EIO flush"),
            Asked::Meta => (faults.meta_error, "EIO metadata"),
            Asked::Seek => (0, ""),
        };
        let part = self.part(len);
        if self.one_in(error) {
            self.count(what);
            return Fate::Failed(libc::EIO, part);
        }
        if matches!(asked, Asked::Write(_)) && self.one_in(faults.no_space) {
            self.count("ENOSPC");
            return Fate::Failed(libc::ENOSPC, part);
        }
        if self.one_in(faults.again) {
            self.count("EAGAIN");
            return Fate::Failed(libc::EAGAIN, part);
        }
        if self.one_in(faults.host) {
            let (errno, name) = HOST_FAULTS[self.random.usize(0..HOST_FAULTS.len())];
            self.count(name);
            return Fate::Failed(errno, part);
        }
        if matches!(asked, Asked::Read(_)) && self.one_in(faults.short_read) {
            self.count("short read");
            return Fate::Short(part);
        }
        Fate::Done
    }
}

/// The disk's mood, and all that it has not answered yet.
pub(crate) struct Fates {
    state: Mutex<State>,
    changed: Condvar,
}

impl Fates {
    pub(crate) fn new(seed: u64) -> Self {
        let state = State {
            random: fastrand::Rng::with_seed(seed),
            faults: Faults::default(),
            counts: Counts::new(),
            waiting: BinaryHeap::new(),
            held: Vec::new(),
            next: 0,
            open: HashSet::new(),
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn arm(&self, faults: Faults) -> String {
        self.state().faults = faults;
        "armed".into()
    }

    pub(crate) fn release(&self) -> String {
        let mut state = self.state();
        state.faults = Faults::default();
        let mut held = std::mem::take(&mut state.held);
        state.random.shuffle(&mut held);
        let (now, count) = (Instant::now(), held.len());
        for (place, mut waiting) in held.into_iter().enumerate() {
            waiting.due = now + Duration::from_micros(place as u64);
            state.waiting.push(Reverse(waiting));
        }
        drop(state);
        self.changed.notify_all();
        format!("released {count}")
    }

    pub(crate) fn counts(&self) -> Counts {
        let mut state = self.state();
        let held = state.held.len() as u64;
        state.counts.insert("held now".into(), held);
        state.counts.clone()
    }

    /// Decides, and has it done when it is due. `perform` does what the fate says, and gives back the answering of it.
    pub(crate) fn decide(&self, asked: Asked, perform: impl FnOnce(Fate) -> Work + Send + 'static) {
        let mut state = self.state();
        let fate = state.fate(asked);
        let faults = state.faults;
        let mut delay = Duration::from_micros(state.random.u64(0..=u64::from(faults.jitter_micros)));
        if state.one_in(faults.late) {
            delay = Duration::from_millis(state.random.u64(0..=u64::from(faults.late_millis)));
            if delay > LATE {
                state.count("late");
            }
        }
        let number = state.next;
        state.next += 1;
        state.open.insert(number);
        let open = state.open.len() as u64;
        let most = state.counts.entry("most in flight".into()).or_default();
        *most = open.max(*most);
        // Half of what waits was done at once, and only its answer is late; half is done late.
        // The kernel holds the file's lock while it zeroes, and on FUSE a ring waits for it in the thread that submits.
        let hold = asked != Asked::Zero && state.one_in(faults.hold);
        let done_first = (hold || delay > LATE) && state.random.bool();
        if hold {
            state.count("held");
        }
        drop(state);
        let work: Work = if done_first { perform(fate) } else { Box::new(move || perform(fate)()) };
        let mut state = self.state();
        if hold && state.faults.hold > 0 {
            state.held.push(Waiting { due: Instant::now() + LONGEST_HOLD, number, work });
        } else {
            state.waiting.push(Reverse(Waiting { due: Instant::now() + delay, number, work }));
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Does what is due, for ever.
    pub(crate) fn work(&self) {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            if state.held.first().is_some_and(|first| first.due <= now) {
                let overdue = state.held.remove(0);
                state.waiting.push(Reverse(overdue));
            }
            let next = state.waiting.peek().map(|Reverse(waiting)| waiting.due);
            match next {
                Some(due) if due <= now => {
                    let Some(Reverse(waiting)) = state.waiting.pop() else { continue };
                    state.open.remove(&waiting.number);
                    if state.open.iter().any(|other| *other < waiting.number) {
                        state.count("overtook");
                    }
                    drop(state);
                    (waiting.work)();
                    state = self.state();
                }
                _ => {
                    let wait = next.map_or(Duration::from_secs(1), |due| due - now).min(Duration::from_secs(1));
                    state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }
}
