//! An application that changes its buffer while the write of it is in flight (mirror rule 1).
#![allow(unsafe_code)]

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    fs, io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

const WORDS: usize = (128 << 10) / 8;

/// Memory that one thread changes while the kernel reads it.
struct Shared(*mut u8, Layout);

// SAFETY: it is only ever looked at as atomics, and by the kernel.
unsafe impl Sync for Shared {}

impl Shared {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: WORDS words, aligned to a page, alive as long as `self`, and atomics may be shared.
        unsafe { std::slice::from_raw_parts(self.0.cast(), WORDS) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and freed only here.
        unsafe { dealloc(self.0, self.1) }
    }
}

/// Writes `count` pieces of 128 KiB side by side to a device, past the page cache, while another thread fills the buffer with one number
/// after the other.
pub fn write_while_changing(device: &Path, count: u64) -> io::Result<()> {
    let file = fs::OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(device)?;
    let layout = Layout::from_size_align(WORDS * 8, 4096).map_err(io::Error::other)?;
    // SAFETY: the layout is not empty.
    let shared = Shared(unsafe { alloc_zeroed(layout) }, layout);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 1.. {
                shared.words().iter().for_each(|word| word.store(number, Ordering::Relaxed));
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let written = (0..count).try_for_each(|piece| {
            let at = (piece * WORDS as u64 * 8) as libc::off_t;
            // SAFETY: the buffer is WORDS * 8 bytes long and outlives the call; the kernel only reads it.
            let bytes = unsafe { libc::pwrite(file.as_raw_fd(), shared.0.cast(), WORDS * 8, at) };
            if bytes == (WORDS * 8) as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
        });
        stop.store(true, Ordering::Relaxed);
        written
    })
}

/// How many of the pieces in this image hold more than one number: they were changed while they were written.
pub fn changed_pieces(image: &Path, count: usize) -> io::Result<usize> {
    let bytes = fs::read(image)?;
    let changed = |piece: &&[u8]| piece.chunks(8).any(|word| word != &piece[..8]);
    Ok(bytes.chunks(WORDS * 8).take(count).filter(changed).count())
}
