//! The fence: a new process does not touch a leg before the I/O of those before it is over (mirror rule 25).

use std::{
    fs::File,
    io,
    path::Path,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use lockstep_core::units::BLOCK_SIZE;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use tracing::warn;

use crate::{
    error::{Context, Error},
    handle::LegPath,
    leg::OpenLeg,
};

/// How long an earlier process's I/O on a leg is waited for.
pub(crate) const FENCE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a process that was killed may take to end before its locks are taken for those of one that cannot.
const DYING_GRACE: Duration = Duration::from_secs(2);
/// Whose I/O on a leg may be under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// Nobody's, or a process's that ends as soon as its I/O is over.
    Ended,
    /// A process's that was killed and cannot end: its locks stay, but no code of it runs.
    Dying,
}

/// Locks a file for as long as it is open, and waits for the I/O on it that the lock does not cover. In-flight I/O of a dead process keeps its open
/// file and with it the lock: who gets the lock has seen the last stale write. So every file that is written is written through the description that
/// holds its lock.
///
/// A dying process keeps the locks of its sound legs too, and its successor does without them: the file is drained, for nothing new comes from that
/// process. What that successor has under way when it ends itself is seen by no lock; hence the file is always drained. On a hung disk that hangs.
pub(crate) fn fence(file: &File, path: &Path, deadline: Instant, before: Before) -> Result<(), Error> {
    let drain_at = Instant::now() + DYING_GRACE;
    while let Err(error) = flock(file, FlockOperation::NonBlockingLockExclusive) {
        if error != rustix::io::Errno::WOULDBLOCK {
            return Err(error).context(|| format!("locking {}", path.display()));
        }
        if before == Before::Dying && Instant::now() >= drain_at {
            warn!(path = %path.display(), "a csi-node that was killed does not end and keeps this file's lock: its I/O on it is waited for instead");
            break;
        }
        if Instant::now() >= deadline {
            return Err(Error::LegBusy { path: path.to_owned() });
        }
        thread::sleep(Duration::from_millis(5));
    }
    drain(file).context(|| format!("waiting for I/O on {}", path.display()))
}

/// Waits for all direct I/O on the file, and for whatever else changes it: XFS does so before it looks at a file's space.
pub(crate) fn drain(file: &File) -> io::Result<()> {
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, BLOCK_SIZE) {
        // XFS wants room also where the file has its blocks already; by then it has waited.
        Err(rustix::io::Errno::NOSPC) => Ok(()),
        drained => Ok(drained?),
    }
}

/// The legs that there are.
#[derive(Debug, Default)]
pub(crate) struct Legs {
    /// Open, and nobody else's.
    pub(crate) open: Vec<OpenLeg>,
    /// Why others are left out.
    pub(crate) left_out: Vec<Error>,
}

impl Legs {
    fn add(&mut self, opened: Result<OpenLeg, Error>) {
        match opened {
            Ok(leg) => self.open.push(leg),
            Err(error) => {
                warn!(%error, "a leg is left out");
                self.left_out.push(error);
            }
        }
    }
}

/// Opens every leg that there is. One whose last I/O is not over is waited for: without it the leg would be taken out for nothing.
pub(crate) fn open_legs(legs: &[LegPath]) -> Result<Legs, Error> {
    let mut found = Legs::default();
    for path in legs {
        match OpenLeg::open(&path.dir, FENCE_DEADLINE, Before::Ended) {
            Err(error @ Error::LegBusy { .. }) => return Err(error),
            opened => found.add(opened),
        }
    }
    Ok(found)
}

/// Opens every leg that can be opened in this time, each apart from the others: a hung disk keeps nobody waiting for longer.
pub(crate) fn open_legs_by(legs: &[LegPath], limit: Duration, before: Before) -> Legs {
    let (sender, opened) = mpsc::channel();
    for path in legs {
        let (sender, dir) = (sender.clone(), path.dir.clone());
        // Nobody is there any more who would wait for it: it is closed again.
        thread::spawn(move || drop(sender.send(OpenLeg::open(&dir, limit, before))));
    }
    drop(sender);
    let deadline = Instant::now() + limit;
    let mut found = Legs::default();
    loop {
        match opened.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(opened) => found.add(opened),
            Err(RecvTimeoutError::Disconnected) => return found,
            Err(RecvTimeoutError::Timeout) => {
                warn!(seconds = limit.as_secs(), "a leg that does not answer is left out");
                return found;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened_twice() -> (tempfile::TempDir, [File; 2]) {
        let dir = tempfile::tempdir().unwrap();
        let open = || File::options().write(true).create(true).truncate(false).open(dir.path().join("data")).unwrap();
        let files = [open(), open()];
        (dir, files)
    }

    #[test]
    fn rule_25_a_leg_is_not_touched_before_the_one_that_has_it_is_gone() {
        let (_dir, [earlier, later]) = opened_twice();
        let fence_by = |limit| fence(&later, Path::new("data"), Instant::now() + limit, Before::Ended);
        fence(&earlier, Path::new("data"), Instant::now(), Before::Ended).unwrap();
        // Also when a dying one would have been given up.
        assert!(matches!(fence_by(DYING_GRACE + Duration::from_millis(100)), Err(Error::LegBusy { .. })));
        let ends = Instant::now() + Duration::from_millis(100);
        let earlier = thread::spawn(move || {
            thread::sleep(ends - Instant::now());
            drop(earlier);
        });
        fence_by(Duration::from_secs(30)).unwrap();
        assert!(Instant::now() >= ends, "both had it");
        earlier.join().unwrap();
    }

    #[test]
    fn rule_25_a_process_that_was_killed_and_cannot_end_is_given_time_to_and_then_done_without() {
        let (_dir, [dying, next]) = opened_twice();
        fence(&dying, Path::new("data"), Instant::now(), Before::Ended).unwrap();
        let began = Instant::now();
        fence(&next, Path::new("data"), began + FENCE_DEADLINE, Before::Dying).unwrap();
        assert!(began.elapsed() >= DYING_GRACE, "it might have ended");
    }
}
