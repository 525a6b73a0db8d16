//! Read-only mounts that are never anything else.

use std::{io, os::fd::AsFd, path::Path};

use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use crate::abi;

/// Mounts `from` at `to` too, read-only from the moment that it is there: nobody sees it writable, and a caller that is killed in the middle leaves
/// nothing.
///
/// # Errors
/// What the kernel says. ENOSYS, and nothing done: it is older than Linux 5.12.
pub fn bind_read_only(from: &Path, to: &Path) -> io::Result<()> {
    let copy = open_tree(CWD, from, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    abi::mount::set_read_only(copy.as_fd())?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    Ok(move_mount(copy, c"", CWD, to, flags)?)
}
