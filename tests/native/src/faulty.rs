//! A disk made of ordinary files that fails as it is told: the program `faulty` serves a directory through FUSE, in a process of its own.
//!
//! Every request for the content of a file is drawn a fate from the seed: it is answered after a random while, so that later ones overtake it, and
//! perhaps not as asked. With I/O in flight from many threads the seed does not replay a run; it is printed to tell runs apart.
//!
//! A disk whose user was killed never hangs for longer than `LONGEST_HOLD`, and ends with its standard input.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Lines, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{program, text};

/// A request is held no longer than this, whatever was ordered: a process with I/O in flight cannot end before it does.
pub const LONGEST_HOLD: Duration = Duration::from_secs(90);

/// How often what goes wrong, while armed: one request in so many; 0: never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults {
    /// Reads of data that do only a part, perhaps nothing of it, and say how much. (Not writes: of an asynchronous write through FUSE that
    /// fell short the kernel says EIO.)
    pub short_read: u32,
    /// Any request that fails with EINTR, ENOMEM, ECANCELED or EBUSY, perhaps after a part of it was done.
    pub host: u32,
    /// Any request that fails with EAGAIN.
    pub again: u32,
    /// Reads of data that fail with EIO.
    pub read_error: u32,
    /// Writes of data that fail with EIO, perhaps after a part was written.
    pub write_error: u32,
    /// Flushes that fail with EIO.
    pub flush_error: u32,
    /// Writes of metadata that fail with EIO.
    pub meta_error: u32,
    /// Zeroings that fail with EIO.
    pub zero_error: u32,
    /// Writes of data that fail with ENOSPC, perhaps after a part was written.
    pub no_space: u32,
    /// Requests that are answered late: after up to `late_millis`.
    pub late: u32,
    /// Milliseconds.
    pub late_millis: u32,
    /// Every request is answered after up to so many microseconds.
    pub jitter_micros: u32,
    /// Requests that are held until `release`, zeroings not among them; 1: all.
    pub hold: u32,
}

/// What the program is told, a line of JSON each.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Order {
    /// From now on, these faults.
    Arm(Faults),
    /// No more faults, and what is held goes on, in any order: half of it was done before, half is done now.
    Release,
    /// How often what happened.
    Count,
}

/// How often what happened, by a short name.
pub type Counts = BTreeMap<String, u64>;

/// A running disk.
#[derive(Debug)]
pub struct FaultyDisk {
    child: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    /// The ordinary directory beneath.
    pub backing: PathBuf,
    /// Where it is mounted.
    pub mount: PathBuf,
}

impl FaultyDisk {
    /// Starts one under `dir`, with this many requests in flight at most.
    pub fn start(dir: &Path, name: &str, seed: u64, depth: u16) -> Self {
        let (backing, mount) = (dir.join(format!("{name}.below")), dir.join(name));
        fs::create_dir_all(&backing).expect("a directory");
        fs::create_dir_all(&mount).expect("a mount point");
        let mut child = Command::new(program("faulty"))
            .args([text(&backing), text(&mount), &seed.to_string(), &depth.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("faulty starts");
        let orders = child.stdin.take().expect("piped");
        let mut answers = BufReader::new(child.stdout.take().expect("piped")).lines();
        let ready = answers.next().and_then(Result::ok);
        assert_eq!(ready.as_deref(), Some("ready"), "the faulty disk does not start");
        Self { child, orders, answers, backing, mount }
    }

    fn order(&mut self, order: Order) -> String {
        let line = serde_json::to_string(&order).expect("an order is JSON");
        writeln!(self.orders, "{line}").and_then(|()| self.orders.flush()).expect("the faulty disk listens");
        self.answers.next().expect("the faulty disk answers").expect("text")
    }

    /// From now on, these faults.
    pub fn arm(&mut self, faults: Faults) {
        self.order(Order::Arm(faults));
    }

    /// A good disk again; what was held goes on.
    pub fn release(&mut self) {
        self.order(Order::Release);
    }

    /// How often what happened so far.
    pub fn counts(&mut self) -> Counts {
        serde_json::from_str(&self.order(Order::Count)).expect("counts")
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for FaultyDisk {
    /// What is held fails; the mount is dead, and the rig unmounts it.
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
