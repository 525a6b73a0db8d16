//! `mount_setattr`: `include/uapi/linux/mount.h`.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

const _: () = assert!(size_of::<libc::mount_attr>() == 32);

/// Makes one mount read-only, attached or not. ENOSYS before Linux 5.12.
pub(crate) fn set_read_only(mount: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let (path, flags, size) = (c"".as_ptr(), libc::AT_EMPTY_PATH, size_of::<libc::mount_attr>());
    // SAFETY: the kernel reads the path and the attributes during the call, and both live until it returns.
    let done = unsafe { libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), path, flags, &raw const attributes, size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
