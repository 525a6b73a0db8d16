//! XFS's own calls: `fs/xfs/libxfs/xfs_fs.h`.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd},
    ptr,
};

const XFS_IOC_FD_TO_HANDLE: libc::c_ulong = 0xC038_586A;
const XFS_IOC_OPEN_BY_HANDLE: libc::c_ulong = 0xC038_586B;
/// A handle has 24 bytes; there is room for more.
const HANDLE_LEN: usize = 64;

#[repr(C)]
struct HandleRequest {
    fd: u32,
    path: *const u8,
    oflags: u32,
    in_handle: *const u8,
    in_len: u32,
    out_handle: *mut u8,
    out_len: *mut u32,
}

const _: () = assert!(size_of::<HandleRequest>() == 56);

/// Opens `file` once more, with these flags, from a directory of its file system, for I/O that leaves its time stamps alone. An ordinary write that finds the time stamp old (each 4
/// ms or so) is a metadata transaction, and one that a ring may not do itself: it hands the write to a worker, and those that follow it.
pub(crate) fn reopen_without_times(directory: &File, file: &File, flags: i32) -> io::Result<File> {
    let mut handle = [0; HANDLE_LEN];
    let mut len = 0;
    let mut request = HandleRequest {
        fd: file.as_raw_fd() as u32,
        path: ptr::null(),
        oflags: flags as u32,
        in_handle: ptr::null(),
        in_len: 0,
        out_handle: handle.as_mut_ptr(),
        out_len: &raw mut len,
    };
    // SAFETY: `request` is a struct xfs_fsop_handlereq, and what it points to lives through the call; the kernel writes 24 bytes to
    // `handle` and their number to `len`.
    if unsafe { libc::ioctl(file.as_raw_fd(), XFS_IOC_FD_TO_HANDLE, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    request.in_handle = handle.as_ptr();
    request.in_len = len;
    // SAFETY: as above; the kernel only reads `handle`.
    let fd = unsafe { libc::ioctl(directory.as_raw_fd(), XFS_IOC_OPEN_BY_HANDLE, &raw mut request) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call just gave us this descriptor; nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    // XFS knows nothing of O_CLOEXEC here: a program that we start would have the leg open, and locked, for as long as it runs.
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC)?;
    Ok(file)
}
