//! `hammer DEVICE SEED SECONDS THREADS IMAGE [may-fail]`: overlapping writers and readers on a block device, and owners of ranges that are written,
//! zeroed and verified; then everything is flushed, and the device is copied to IMAGE. Whoever reads what no order of the writes explains,
//! or gets an error that was not allowed, ends the run with status 1. The last line counts.
//!
//! A program of its own: who waits for a device must not be who serves it.

mod owner;
mod shared;

use std::{
    error::Error,
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use lockstep_native::history::BLOCK;

/// The device, and what everybody counts.
pub(crate) struct Device {
    file: File,
    may_fail: bool,
    until: Instant,
    stop: AtomicBool,
    failed: AtomicU64,
    operations: AtomicU64,
    flushes: AtomicU64,
    zeroes: AtomicU64,
    value: AtomicU64,
}

/// Memory for direct I/O.
pub(crate) struct Aligned(Vec<u8>, usize, usize);

impl Aligned {
    pub(crate) fn new(blocks: usize) -> Self {
        let memory = vec![0; (blocks + 1) * BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        Self(memory, start, blocks)
    }

    pub(crate) fn blocks(&mut self, count: usize) -> &mut [u8] {
        assert!(count <= self.2, "more than there is");
        &mut self.0[self.1..self.1 + count * BLOCK]
    }
}

impl Device {
    pub(crate) fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed) && Instant::now() < self.until
    }

    /// A value that was never written before.
    pub(crate) fn new_value(&self) -> u64 {
        self.value.fetch_add(1, Ordering::Relaxed)
    }

    /// `false`: it failed, and may.
    fn ended(&self, what: &str, block: u64, result: std::io::Result<()>) -> Result<bool, String> {
        self.operations.fetch_add(1, Ordering::Relaxed);
        match result {
            Ok(()) => Ok(true),
            Err(error) if self.may_fail => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                // EIO from a device that is dead would be counted for ever.
                std::thread::sleep(Duration::from_millis(1));
                drop(error);
                Ok(false)
            }
            Err(error) => Err(format!("{what} at block {block}: {error}")),
        }
    }

    pub(crate) fn read(&self, block: u64, bytes: &mut [u8]) -> Result<bool, String> {
        self.ended("a read", block, self.file.read_exact_at(bytes, block * BLOCK as u64))
    }

    pub(crate) fn write(&self, block: u64, bytes: &[u8]) -> Result<bool, String> {
        self.ended("a write", block, self.file.write_all_at(bytes, block * BLOCK as u64))
    }

    pub(crate) fn zero(&self, block: u64, count: u64) -> Result<bool, String> {
        use rustix::fs::{FallocateFlags, fallocate};
        self.zeroes.fetch_add(1, Ordering::Relaxed);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zeroed = fallocate(&self.file, flags, block * BLOCK as u64, count * BLOCK as u64);
        self.ended("zeroes", block, zeroed.map_err(Into::into))
    }

    pub(crate) fn flush(&self) -> Result<bool, String> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.ended("a flush", 0, self.file.sync_data())
    }
}

fn copy(device: &Device, blocks: u64, image: &Path) -> Result<(), Box<dyn Error>> {
    let mut out = File::create(image)?;
    let mut memory = Aligned::new(256);
    let mut at = 0;
    while at < blocks {
        let count = (blocks - at).min(256) as usize;
        let bytes = memory.blocks(count);
        while !device.read(at, bytes)? {}
        out.write_all(bytes)?;
        at += count as u64;
    }
    Ok(out.sync_all()?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, seed, seconds, threads, image, rest @ ..] = arguments.as_slice() else {
        return Err("DEVICE SEED SECONDS THREADS IMAGE [may-fail]".into());
    };
    let (seed, threads): (u64, usize) = (seed.parse()?, threads.parse()?);
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
    let blocks = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))? / BLOCK as u64;
    let device = Device {
        file,
        may_fail: rest.iter().any(|word| word == "may-fail"),
        until: Instant::now() + Duration::from_secs_f64(seconds.parse()?),
        stop: AtomicBool::new(false),
        failed: AtomicU64::new(0),
        operations: AtomicU64::new(0),
        flushes: AtomicU64::new(0),
        zeroes: AtomicU64::new(0),
        // Never a value of an earlier run, never 0.
        value: AtomicU64::new((seed << 32) + 1),
    };
    let shared = shared::Shared::found(&device)?;
    let owners = (threads / 6).max(1);
    let failure = std::thread::scope(|scope| {
        let spawn = |number: usize| {
            let (device, shared) = (&device, &shared);
            scope.spawn(move || {
                let random = fastrand::Rng::with_seed(seed ^ (number as u64) << 40);
                let result =
                    if number < owners { owner::run(device, number as u64, random) } else { shared.run(device, number - owners, random) };
                // Everybody else is to end too.
                device.stop.fetch_or(result.is_err(), Ordering::Relaxed);
                result
            })
        };
        let running: Vec<_> = (0..threads).map(spawn).collect();
        running.into_iter().filter_map(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into())).err()).next()
    });
    if let Some(failure) = failure {
        return Err(failure.into());
    }
    while !device.flush()? {}
    shared.finally(&device)?;
    copy(&device, blocks, Path::new(image))?;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let counts = serde_json::json!({
        "operations": count(&device.operations), "flushes": count(&device.flushes), "zeroes": count(&device.zeroes),
        "failed": count(&device.failed), "blocks written": shared.written(),
    });
    println!("{counts}");
    Ok(())
}
