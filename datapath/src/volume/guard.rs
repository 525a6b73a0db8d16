//! A panic is its mirror's end and nobody else's (mirror rule 33).
//!
//! Whatever runs for a volume on its thread runs in here: what the core decides, what the shell does of it, every task of a leg's I/O. A panic
//! anywhere in it means that nobody knows any more what was decided and what was done: the mirror is dropped, everything that waits gets EIO, and so
//! does everything that comes. The dirty bits tell the next assembly what may differ, as after a kill.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
};

use futures::FutureExt;
use lockstep_core::units::{Errno, Tag};
use tracing::error;

use super::Volume;

impl Volume {
    /// Does it; `None`: it panicked, and the mirror is gone.
    pub(super) fn guard<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        let result = catch_unwind(AssertUnwindSafe(work)).ok();
        if result.is_none() {
            self.fail_everything();
        }
        result
    }

    /// Spawns it on this thread.
    pub(super) fn spawn(self: &Rc<Self>, work: impl Future<Output = ()> + 'static) {
        let volume = Rc::clone(self);
        let guarded = AssertUnwindSafe(work).catch_unwind().map(move |ended| {
            if ended.is_err() {
                volume.fail_everything();
            }
        });
        drop(tokio_uring::spawn(guarded));
    }

    fn fail_everything(&self) {
        error!(
            reason = "MirrorFailed",
            "the mirror's code panicked: its requests get EIO from now on; unstage the volume and stage it again"
        );
        drop(self.mirror.take());
        let tags: Vec<Tag> = self.entries.borrow().keys().copied().collect();
        for tag in tags {
            self.complete(tag, Err(Errno::EIO));
        }
        self.entries.take();
        self.copies.take();
        self.legs.take();
        self.status.send_modify(|status| status.read_only = true);
        self.rearm.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::ErrorKind,
        os::unix::net::UnixDatagram,
        path::Path,
        time::Duration,
    };

    use lockstep_core::{
        assembly::{Assembly, Limits, assemble},
        format,
        io::Effects,
        status::Status,
        units::{Instant, LegId, VolumeId},
    };
    use tokio::sync::{broadcast, mpsc, watch};

    use crate::{
        abi::fuse::{self, IN_HEADER},
        fence::{Before, FENCE_DEADLINE},
        leg::{OpenLeg, create_leg},
        thread::Thread,
        volume::{Command, Start},
    };

    const BLOCKS: u64 = 256;

    /// One end is the volume's FUSE device, the other one the kernel: whole requests, whole replies.
    struct Kernel {
        socket: UnixDatagram,
        status: watch::Receiver<Status>,
        _commands: mpsc::Sender<Command>,
    }

    impl Kernel {
        fn ask(&self, opcode: u32, unique: u64, block: u64, payload: &[u8]) {
            let mut bytes = vec![0; IN_HEADER + 40];
            bytes.extend(payload);
            let len = bytes.len() as u32;
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
            bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
            bytes[IN_HEADER + 8..][..8].copy_from_slice(&(block * 4096).to_ne_bytes());
            bytes[IN_HEADER + 16..][..4].copy_from_slice(&4096u32.to_ne_bytes());
            self.socket.send(&bytes).unwrap();
        }

        /// The error, the request, and what follows.
        fn answer(&self) -> (i32, u64, Vec<u8>) {
            let mut bytes = vec![0; 8192];
            let len = self.socket.recv(&mut bytes).unwrap_or_else(|error| {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                panic!("no answer came");
            });
            let error = i32::from_ne_bytes(bytes[4..8].try_into().unwrap());
            (error, u64::from_ne_bytes(bytes[8..16].try_into().unwrap()), bytes[16..len].to_vec())
        }
    }

    fn volume(dir: &Path, id: u8) -> (Start, Kernel) {
        let (volume, legs) = (VolumeId([id; 16]), [LegId([id; 16]), LegId([id + 1; 16])]);
        let open = legs.map(|leg| {
            let dir = dir.join(leg.to_string());
            fs::create_dir(&dir).unwrap();
            create_leg(&dir, BLOCKS * 4096, &format::new_leg(volume, legs, leg, BLOCKS)).unwrap();
            OpenLeg::open(&dir, FENCE_DEADLINE, Before::Ended).unwrap()
        });
        let witness = dir.join(format!("witness{id}"));
        let content = format::new_witness(volume, legs, BLOCKS);
        fs::write(&witness, &content).unwrap();
        let metas: Vec<&[u8]> = open.iter().map(|leg| leg.meta.as_slice()).collect();
        let assembly = Assembly {
            volume,
            metas: &metas,
            witness: Some(&content),
            seen_epoch: None,
            force: None,
            seed: 7,
            now: Instant(0),
            limits: Limits::default(),
        };
        let mut effects = Effects::new();
        let mirror = assemble(&assembly, &mut effects).unwrap().mirror;
        let (kernel, device) = UnixDatagram::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        kernel.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let (commands, incoming) = mpsc::channel(1);
        let status = watch::Sender::new(mirror.status());
        let kernel = Kernel { socket: kernel, status: status.subscribe(), _commands: commands };
        let start = Start {
            name: id.to_string(),
            mirror,
            effects,
            legs: open.map(Some),
            witness: File::options().write(true).open(&witness).unwrap(),
            fuse: device.into(),
            commands: incoming,
            status,
            notices: broadcast::Sender::new(16),
        };
        (start, kernel)
    }

    /// A kernel that names two requests alike, which no kernel does: the payload of the second goes with the end of the first, and the shell
    /// panics where it wants to write it.
    #[test]
    fn rule_33_a_panic_ends_its_mirror_with_errors_for_all_who_ask_it_and_its_neighbour_on_the_thread_serves_on() {
        let dir = tempfile::tempdir().unwrap();
        let ((first, doomed), (second, neighbour)) = (volume(dir.path(), 1), volume(dir.path(), 3));
        let thread = Thread::start(0, 64).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (mut dying, mut living) = (doomed.status.clone(), neighbour.status.clone());
        runtime.block_on(async {
            for start in [first, second] {
                thread.add(start).await.unwrap();
            }
            dying.wait_for(|status| status.ready).await.unwrap();
            living.wait_for(|status| status.ready).await.unwrap();
        });
        // The waiting one is overlapped by both, and is told.
        for (unique, block) in [(5, 0), (5, 0), (6, 0)] {
            doomed.ask(fuse::opcode::WRITE, unique, block, &[9; 4096]);
        }
        let (error, unique, _) = doomed.answer();
        assert_eq!((error, unique), (0, 5));
        let (error, unique, _) = doomed.answer();
        assert_eq!((error, unique), (-libc::EIO, 6));
        runtime.block_on(async { dying.wait_for(|status| status.read_only).await.unwrap() });
        for (unique, opcode) in [(7, fuse::opcode::READ), (8, fuse::opcode::FSYNC)] {
            doomed.ask(opcode, unique, 0, &[]);
            assert_eq!(doomed.answer(), (-libc::EIO, unique, vec![]));
        }
        neighbour.ask(fuse::opcode::WRITE, 1, 3, &[7; 4096]);
        assert_eq!(neighbour.answer().0, 0);
        neighbour.ask(fuse::opcode::READ, 2, 3, &[]);
        assert_eq!(neighbour.answer(), (0, 2, vec![7; 4096]));
        assert!(!neighbour.status.borrow().read_only);
    }
}
