//! Who uses the volumes meanwhile.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::postgres;
use crate::{
    client::Place,
    lab::Lab,
    load::{self, Direct},
};

const BLOCK: usize = 4096;
const MIB: u64 = 1 << 20;
/// Behind what fio works on.
const PROBE_AT: u64 = 240 * MIB;
/// Regions of the bitmap that are written now and then, from here to the device's end.
const PULSES_AT: u64 = 256 * MIB;
const REGION: u64 = 16 * MIB;
/// So that each of them is clean for a while before it is written again: a region is cleaned 5 to 10 s after its last write.
const PULSE_PERIOD: Duration = Duration::from_secs(13);
/// One run of fio.
const FIO_SECONDS: u32 = 10;

/// What the users of the volumes saw.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) errors: Mutex<Vec<String>>,
    pub(super) mismatched: AtomicU64,
    /// The probe's requests: from, to.
    pub(super) requests: Mutex<Vec<(Instant, Instant)>>,
    /// Records that were fsynced.
    pub(super) records: AtomicU64,
    /// Rows that PostgreSQL has committed.
    pub(super) rows: AtomicU64,
}

/// The volumes in use.
#[derive(Clone, Debug)]
pub(super) struct Used {
    /// A bare device of 640 MiB, ...
    pub(super) block: Place,
    /// a file system with records, ...
    pub(super) files: Place,
    /// and one with PostgreSQL.
    pub(super) database: Place,
}

impl Used {
    pub(super) fn all(&self) -> [&Place; 3] {
        [&self.block, &self.files, &self.database]
    }
}

impl Seen {
    fn check(&self, who: &str, result: io::Result<()>) {
        if let Err(error) = result {
            self.errors.lock().expect("no holder panics").push(format!("{who}: {error}"));
        }
    }

    /// Whether each load has something to lose.
    pub(super) fn all_at_work(&self) -> bool {
        let counts = [&self.records, &self.rows].map(|count| count.load(Ordering::Relaxed));
        counts.iter().all(|count| *count > 0) && !self.requests.lock().expect("no holder panics").is_empty()
    }

    /// The request that took longest of those that were under way at this time, or came next: how long, and until when.
    pub(super) fn stall(&self, at: Instant) -> Option<(Duration, Instant)> {
        let requests = self.requests.lock().expect("no holder panics");
        let begun = |(from, to): &&(Instant, Instant)| *to >= at && *from <= at + Duration::from_millis(10);
        requests.iter().filter(begun).map(|(from, to)| (*to - *from, *to)).max()
    }
}

/// Running loads.
#[derive(Debug)]
pub(super) struct Loads {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Loads {
    /// On these volumes.
    pub(super) fn start(lab: &Lab, used: &Used, seen: &Arc<Seen>) -> Self {
        let mut loads = Self { stop: Arc::default(), threads: Vec::new() };
        let device = &used.block.target;
        loads.spawn(seen, "fio", device, verify);
        loads.spawn(seen, "the probe", device, probe);
        loads.spawn(seen, "now and then", device, pulse);
        loads.spawn(seen, "the writer of records", &used.files.target, commit);
        let sockets = lab.path("postgres");
        loads.spawn(seen, "PostgreSQL", &used.database.target, move |dir, seen, stop| postgres::commit(dir, &sockets, seen, stop));
        loads
    }

    fn spawn<F>(&mut self, seen: &Arc<Seen>, who: &'static str, at: &Path, work: F)
    where
        F: FnOnce(&Path, &Seen, &dyn Fn() -> bool) -> io::Result<()> + Send + 'static,
    {
        let (seen, at, stop) = (Arc::clone(seen), at.to_owned(), Arc::clone(&self.stop));
        self.threads.push(thread::spawn(move || seen.check(who, work(&at, &seen, &|| stop.load(Ordering::Relaxed)))));
    }

    /// Ends them, fio at the end of its run.
    pub(super) fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().expect("a load does not panic"));
    }
}

impl Drop for Loads {
    /// Something went wrong: they end by themselves, when nobody serves them any more.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// fio, run after run.
fn verify(device: &Path, _: &Seen, stop: &dyn Fn() -> bool) -> io::Result<()> {
    while !stop() {
        if !load::on_device(device, FIO_SECONDS).succeeded() {
            return Err(io::Error::other("it got an error, or read what it did not write"));
        }
    }
    Ok(())
}

/// One write after the other, each timed.
fn probe(device: &Path, seen: &Seen, stop: &dyn Fn() -> bool) -> io::Result<()> {
    let mut device = Direct::open(device)?;
    while !stop() {
        let from = Instant::now();
        device.write(PROBE_AT)?;
        seen.requests.lock().expect("no holder panics").push((from, Instant::now()));
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Writes one block of each region in turn, and looks before whether it is what was written last.
fn pulse(path: &Path, seen: &Seen, stop: &dyn Fn() -> bool) -> io::Result<()> {
    let mut device = Direct::open(path)?;
    let size = fs::read_to_string(sysfs_size(path)?)?.trim().parse::<u64>().map_err(io::Error::other)? * 512;
    let regions = (size - PULSES_AT) / REGION;
    for round in 0u64.. {
        for region in 0..regions {
            if stop() {
                return Ok(());
            }
            let at = PULSES_AT + region * REGION;
            let content = |round: u64| (round << 32 | region).to_le_bytes().repeat(BLOCK / 8);
            if round > 0 {
                device.read(at)?;
                seen.mismatched.fetch_add(differences(device.block(), &content(round)), Ordering::Relaxed);
            }
            device.block().copy_from_slice(&content(round + 1));
            device.write(at)?;
            thread::sleep(PULSE_PERIOD / regions as u32);
        }
    }
    Ok(())
}

/// How many bytes are not as they should be.
pub(super) fn differences(found: &[u8], wanted: &[u8]) -> u64 {
    let differ = found.iter().zip(wanted).filter(|(is, was)| is != was).count();
    (differ + found.len().abs_diff(wanted.len())) as u64
}

/// A bind mount of a device's node has another name than the device.
fn sysfs_size(device: &Path) -> io::Result<PathBuf> {
    let number = fs::metadata(device)?.rdev();
    Ok(PathBuf::from(format!("/sys/dev/block/{}:{}/size", libc::major(number), libc::minor(number))))
}

const RECORD: usize = 64;

fn record(number: u64) -> String {
    format!("{number:>20} {:>42}\n", number.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

/// Appends records and fsyncs each; now and then a new file, and its directory.
fn commit(dir: &Path, seen: &Seen, stop: &dyn Fn() -> bool) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).create_new(true).open(dir.join("records"))?;
    for number in 1u64.. {
        if stop() {
            return Ok(());
        }
        file.write_all(record(number).as_bytes())?;
        if number.is_multiple_of(100) {
            let new = dir.join("new");
            fs::write(&new, record(number))?;
            File::open(&new)?.sync_all()?;
            fs::rename(&new, dir.join("newest"))?;
            File::open(dir)?.sync_all()?;
        }
        file.sync_data()?;
        seen.records.store(number, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(3));
    }
    Ok(())
}

/// How many of the records that were fsynced are not in this directory.
pub(super) fn lost(dir: &Path, records: u64) -> u64 {
    let mut text = Vec::new();
    if let Ok(mut file) = File::open(dir.join("records")) {
        drop(file.read_to_end(&mut text));
    }
    let there = |number: u64| text.get((number as usize - 1) * RECORD..number as usize * RECORD) == Some(record(number).as_bytes());
    let lost = (1..=records).filter(|number| !there(*number)).count() as u64;
    let newest = records / 100 * 100;
    let named = fs::read_to_string(dir.join("newest")).unwrap_or_default();
    let late = newest > 0 && ![newest, newest + 100].iter().any(|number| named == record(*number));
    lost + u64::from(late)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_is_not_there_or_not_whole_is_lost_and_so_is_a_name_that_is_too_old() {
        let dir = tempfile::tempdir().unwrap();
        let write = |count: u64, newest: u64| {
            fs::write(dir.path().join("records"), (1..=count).map(record).collect::<String>()).unwrap();
            fs::write(dir.path().join("newest"), record(newest)).unwrap();
            lost(dir.path(), 250)
        };
        assert_eq!(record(1).len(), RECORD);
        assert_eq!(write(250, 200), 0);
        assert_eq!(write(251, 300), 0, "more than was answered is no loss");
        assert_eq!(write(249, 200), 1);
        assert_eq!(write(250, 100), 1);
        let mut bytes = fs::read(dir.path().join("records")).unwrap();
        bytes[100 * RECORD + 7] ^= 1;
        fs::write(dir.path().join("records"), bytes).unwrap();
        assert_eq!(lost(dir.path(), 99), 0);
        assert_eq!(lost(dir.path(), 250), 2);
    }
}
