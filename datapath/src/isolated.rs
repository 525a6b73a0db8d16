//! Work on a device that this very process serves and nobody else has a descriptor of: the holder is not given it yet, or not any more. With a holder
//! it is a child's work (`errand`).
//!
//! A thread that waits for such a device waits for its own process. Killed then, the process would never end: its descriptors, `/dev/fuse`
//! among them, stay open as long as that thread waits; so the kernel never aborts the device's requests; so the thread waits on. (Seen:
//! SIGKILL while LOOP_CONFIGURE syncs its backing file.) Whoever opens a loop device next hangs behind it.
//!
//! So such work runs on a thread with a descriptor table of its own that has nothing but the standard streams in it. When the process is killed,
//! the real table goes with the other threads, the kernel aborts the connection, and the work ends with an error.
#![allow(unsafe_code)]

use std::thread;

/// Runs `work` on a thread that has none of this process's descriptors, and waits for it. Blocks. `work` opens what it needs by path.
pub fn isolated<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = thread::spawn(move || {
        // SAFETY: only this thread's table changes: it is unshared by the same call. The thread was just born and owns no descriptor, and
        // `work` was not given any: it is `'static`, and what it captures is documented to be paths.
        let result = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE) };
        if result != 0 {
            // Kernels before 5.9. The work is done all the same; a kill in the middle of it may then hang.
            tracing::debug!(error = %std::io::Error::last_os_error(), "close_range");
        }
        work()
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsRawFd};

    use super::*;

    #[test]
    fn isolated_work_has_none_of_the_processs_descriptors() {
        let file = fs::File::open("/dev/null").unwrap();
        let descriptor = format!("/proc/thread-self/fd/{}", file.as_raw_fd().max(3));
        assert!(fs::symlink_metadata(&descriptor).is_ok(), "this thread has it");
        let open = isolated(|| fs::read_dir("/proc/thread-self/fd").unwrap().count());
        // The three standard streams and the directory itself.
        assert!(open <= 4, "{open} are open");
        assert!(fs::symlink_metadata(&descriptor).is_ok(), "and still has it");
    }

    #[test]
    #[should_panic(expected = "what it said")]
    fn a_panic_of_isolated_work_is_its_callers() {
        isolated(|| panic!("what it said"));
    }
}
