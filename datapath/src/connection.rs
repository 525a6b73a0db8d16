//! A volume's FUSE connection: requests are read as they come, replies go out through the ring.
//!
//! A reply ends a block request in the kernel, which wakes others. One system call for each reply is a trip through the scheduler
//! for each; in the ring, all replies of one round leave in one call, together with that round's leg I/O. Entries of a ring are taken in
//! order, so a reply still goes before any I/O that was asked for after it (mirror rule 5).
#![allow(unsafe_code)]

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsRawFd, OwnedFd},
    rc::Rc,
};

use io_uring::{cqueue, opcode, types};
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio_uring::{OneshotOutputTransform, UnsubmittedOneshot, buf::IoBuf};

use crate::{
    abi::fuse::{self, REPLY_HEAD},
    buffers::Window,
};

/// The connection, on its datapath thread.
#[derive(Debug)]
pub(crate) struct Connection {
    device: Rc<AsyncFd<OwnedFd>>,
}

/// A reply on its way: what the kernel reads must stay where it is.
struct Reply {
    _device: Rc<AsyncFd<OwnedFd>>,
    head: [u8; REPLY_HEAD + fuse::MAX_BODY],
    payload: Option<Window>,
    parts: [libc::iovec; 2],
}

/// A failed reply is one that nobody wants any more: ENOENT, the request was aborted; ENODEV, unmounted.
struct Unwatched;

impl OneshotOutputTransform for Unwatched {
    type Output = ();
    type StoredData = Box<Reply>;
    fn transform_oneshot_output(self, _: Box<Reply>, _: cqueue::Entry) {}
}

impl Connection {
    /// Has the calling thread's reactor watch the FUSE device.
    pub(crate) fn new(device: OwnedFd) -> io::Result<Self> {
        Ok(Self { device: Rc::new(fuse::watch(device)?) })
    }

    /// Waits until a request can be read, or perhaps can.
    pub(crate) async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.device.readable().await
    }

    /// Reads one request into these parts, one after the other. `WOULDBLOCK`: there is none.
    pub(crate) fn read(&self, parts: &mut [IoSliceMut<'_>]) -> rustix::io::Result<usize> {
        rustix::io::readv(self.device.get_ref(), parts)
    }

    /// Tells the kernel something that it did not ask for.
    pub(crate) fn notify(&self, message: &[u8]) -> rustix::io::Result<()> {
        rustix::io::write(self.device.get_ref(), message).map(drop)
    }

    /// Answers a request with a body of at most `fuse::MAX_BODY` bytes.
    pub(crate) fn reply(&self, unique: u64, error: i32, body: &[u8]) {
        self.push(unique, error, body, None);
    }

    /// Answers a request with the window's bytes.
    pub(crate) fn reply_payload(&self, unique: u64, payload: Window) {
        self.push(unique, 0, &[], Some(payload));
    }

    fn push(&self, unique: u64, error: i32, body: &[u8], payload: Option<Window>) {
        let payload_len = payload.as_ref().map_or(0, IoBuf::bytes_init);
        let mut reply = Box::new(Reply {
            _device: Rc::clone(&self.device),
            head: [0; REPLY_HEAD + fuse::MAX_BODY],
            payload,
            parts: [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 2],
        });
        reply.head[..REPLY_HEAD].copy_from_slice(&fuse::reply_header(unique, error, body.len() + payload_len));
        reply.head[REPLY_HEAD..][..body.len()].copy_from_slice(body);
        let (head, len) = (reply.head.as_mut_ptr(), REPLY_HEAD + body.len());
        let fd = types::Fd(self.device.as_raw_fd());
        let entry = match &reply.payload {
            None => opcode::Write::new(fd, head, len as u32).build(),
            Some(window) => {
                let (payload, payload_len) = (window.stable_ptr().cast_mut().cast(), window.bytes_init());
                reply.parts =
                    [libc::iovec { iov_base: head.cast(), iov_len: len }, libc::iovec { iov_base: payload, iov_len: payload_len }];
                opcode::Writev::new(fd, reply.parts.as_ptr(), 2).build()
            }
        };
        // The operation, dropped, leaves the box with the ring until the kernel is done with what it points to: the head, the parts, the
        // window's memory, and the open device.
        drop(UnsubmittedOneshot::new(reply, Unwatched, entry).submit());
    }
}
