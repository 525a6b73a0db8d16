//! A datapath thread: one ring, one pool, many volumes.

use std::{
    cell::RefCell,
    fs, io,
    rc::Rc,
    sync::{
        Arc, Once,
        atomic::{AtomicI32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};
use tracing::{Instrument, warn};

use crate::{buffers::Pool, error::Error, landing::Landing, volume};

/// Kernel threads that may wait for leg I/O of one datapath thread at a time. They are made only while all that there are wait.
///
/// The kernel's default is four for each CPU, for both legs of all volumes together. A disk that hangs would soon hold them all (a
/// discard holds the file's lock, and every write behind it a worker), then nothing would be done on the other disks either, and disks
/// that hang together are not taken OUT (mirror rule 27). So there must be one for each I/O that a hung disk can hold: what the payload memory
/// has room for, and 256 discards of each of a dozen busy volumes.
const WAITING_WORKERS: u32 = 4096;

/// Completions that a ring has room for, for each submission. The kernel keeps what does not fit, one by one: slower, and nothing else.
const COMPLETIONS: u32 = 128;
/// The kernel has no larger completion ring.
const MOST_COMPLETIONS: u32 = 65536;

/// Allows the calling thread's rings so many workers: it is the thread that has them, whichever of its rings is asked.
fn allow_workers(bounded: u32) -> io::Result<()> {
    io_uring::IoUring::new(1)?.submitter().register_iowq_max_workers(&mut [bounded, 0])
}

/// The calling thread and those that are started for it never wait for memory until pages are written out to a volume that they serve.
fn never_wait_for_our_own_volumes() {
    static SAID: Once = Once::new();
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        SAID.call_once(|| warn!(%error, "PR_SET_IO_FLUSHER is not permitted (CAP_SYS_RESOURCE): without free memory, volumes that are written to may hang"));
    }
}

/// How the rest of the process reaches a datapath thread.
#[derive(Debug)]
pub(crate) struct Thread {
    starts: mpsc::Sender<volume::Start>,
    /// To be answered. One at a time: who is asked once more before has not answered.
    heartbeats: mpsc::Sender<oneshot::Sender<()>>,
    /// The kernel's number of it; 0 until it runs.
    id: Arc<AtomicI32>,
    volumes: Arc<AtomicUsize>,
}

/// One volume less, however it ends.
struct Carried(Arc<AtomicUsize>);

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Thread {
    /// Starts the thread with this number, with a ring of this many entries.
    pub(crate) fn start(number: usize, ring_entries: u32) -> io::Result<Self> {
        let (starts, mut incoming) = mpsc::channel::<volume::Start>(16);
        let (heartbeats, mut asked) = mpsc::channel::<oneshot::Sender<()>>(1);
        let id = Arc::new(AtomicI32::new(0));
        let own = Arc::clone(&id);
        let volumes = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&volumes);
        std::thread::Builder::new().name(format!("datapath-{number}")).spawn(move || {
            own.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
            never_wait_for_our_own_volumes();
            let mut ring = tokio_uring::uring_builder();
            // Completions wait for our next system call instead of interrupting us. Never DEFER_TASKRUN: with this runtime I/O hangs.
            ring.setup_coop_taskrun().setup_single_issuer().setup_cqsize(ring_entries.saturating_mul(COMPLETIONS).min(MOST_COMPLETIONS));
            tokio_uring::builder().entries(ring_entries).uring_builder(&ring).start(async move {
                if let Err(error) = allow_workers(WAITING_WORKERS) {
                    warn!(%error, "a disk that hangs may hold up the others");
                }
                let pool = Pool::new();
                if let Err(error) = pool.register() {
                    warn!(%error, "the payload memory is neither locked nor known to the ring: slower, and it can be swapped out");
                }
                let landing = Rc::new(RefCell::new(Landing::default()));
                tokio_uring::spawn(async move {
                    while let Some(answer) = asked.recv().await {
                        let _who_asked_may_be_gone = answer.send(());
                    }
                });
                while let Some(start) = incoming.recv().await {
                    let span = tracing::info_span!("volume", id = start.name);
                    let (pool, landing, count) = (Rc::clone(&pool), Rc::clone(&landing), Arc::clone(&count));
                    tokio_uring::spawn(
                        async move {
                            let _carried = Carried(count);
                            volume::run(start, pool, landing).await;
                        }
                        .instrument(span),
                    );
                }
            });
        })?;
        Ok(Self { starts, heartbeats, id, volumes })
    }

    /// How many volumes it carries.
    pub(crate) fn volumes(&self) -> usize {
        self.volumes.load(Ordering::Relaxed)
    }

    /// Gives it one more. `Err`: the thread is gone.
    pub(crate) async fn add(&self, start: volume::Start) -> Result<(), ()> {
        self.volumes.fetch_add(1, Ordering::Relaxed);
        self.starts.send(start).await.map_err(drop)
    }

    /// Waits until it answers. One that waits in the kernel need not: that is a disk's doing, and it would not end if it were told to.
    pub(crate) async fn heartbeat(&self, limit: Duration) -> Result<(), Error> {
        let asked = async {
            let (answer, answered) = oneshot::channel();
            self.heartbeats.send(answer).await.map_err(|_| Error::Gone)?;
            answered.await.map_err(|_| Error::Gone)
        };
        match tokio::time::timeout(limit, asked).await {
            Ok(answered) => answered,
            Err(_) if self.waits_in_the_kernel() => {
                warn!(thread = self.id.load(Ordering::Relaxed), "a datapath thread waits in the kernel");
                Ok(())
            }
            Err(_) => Err(Error::Stuck(self.id.load(Ordering::Relaxed))),
        }
    }

    /// Whether no signal would reach it now.
    fn waits_in_the_kernel(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/self/task/{}/stat", self.id.load(Ordering::Relaxed)));
        stat.is_ok_and(|stat| is_uninterruptible(&stat))
    }
}

/// What /proc/PID/stat says of it. Its name is in parentheses, whatever is in it.
fn is_uninterruptible(stat: &str) -> bool {
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(200);

    /// A thread that does this and nothing else.
    fn thread(work: impl FnOnce(mpsc::Receiver<oneshot::Sender<()>>) + Send + 'static) -> Thread {
        let (heartbeats, asked) = mpsc::channel(1);
        std::thread::spawn(move || work(asked));
        Thread { starts: mpsc::channel(1).0, heartbeats, id: Arc::default(), volumes: Arc::default() }
    }

    #[test]
    fn what_waits_in_the_kernel_is_told_from_what_has_such_a_name() {
        assert!(is_uninterruptible("7 (datapath-0) D 1 7"));
        assert!(!is_uninterruptible("7 (datapath-0) R 1 7") && !is_uninterruptible("7 (a) D 1) S 1 7") && !is_uninterruptible(""));
    }

    #[tokio::test]
    async fn a_thread_that_runs_answers_one_that_ended_is_gone_and_one_that_computes_for_ever_is_stuck() {
        assert!(matches!(Thread::start(0, 16).unwrap().heartbeat(Duration::from_secs(10)).await, Ok(())));
        assert!(matches!(thread(drop).heartbeat(LIMIT).await, Err(Error::Gone)));
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let computing = thread(move |asked| {
            // Until the test is over.
            assert!(ended.recv().is_err());
            drop(asked);
        });
        for _ in 0..2 {
            assert!(matches!(computing.heartbeat(LIMIT).await, Err(Error::Stuck(_))));
        }
        drop(end);
    }
}
