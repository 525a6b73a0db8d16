//! The FUSE protocol (7.31 and later), as far as one regular file needs it: `include/uapi/linux/fuse.h`.

use std::{io, os::fd::OwnedFd};

use tokio::io::unix::AsyncFd;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(crate) const IN_HEADER: usize = 40;
/// Header of a WRITE request before its payload.
pub(crate) const WRITE_HEAD: usize = IN_HEADER + 40;
/// Header of a reply.
pub(crate) const REPLY_HEAD: usize = 16;
/// The largest body of a reply that is no payload.
pub(crate) const MAX_BODY: usize = size_of::<AttrOut>();
/// The root is the file.
pub(crate) const ROOT: u64 = 1;
/// Largest payload of one request.
pub(crate) const MAX_WRITE: u32 = 1 << 20;

pub(crate) mod opcode {
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
}

const ASYNC_READ: u32 = 1 << 0;
const BIG_WRITES: u32 = 1 << 5;
const ASYNC_DIO: u32 = 1 << 15;
const MAX_PAGES: u32 = 1 << 22;
const INIT_EXT: u32 = 1 << 30;
/// In the second word of flags: the kernel can send again what was not answered.
const HAS_RESEND: u32 = 1 << 7;
const FOPEN_DIRECT_IO: u32 = 1 << 0;
const FOPEN_NOFLUSH: u32 = 1 << 5;
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
/// In-flight requests that the kernel hands over at once; its default of 12 costs three quarters of the throughput.
const MAX_BACKGROUND: u16 = 256;
const FALLOC_KEEP_SIZE: u32 = 1;
const FALLOC_PUNCH_HOLE: u32 = 2;
const FALLOC_ZERO_RANGE: u32 = 0x10;
const NOTIFY_INVAL_INODE: i32 = 2;
const NOTIFY_RESEND: i32 = 7;

#[derive(FromBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct InHeader {
    len: u32,
    opcode: u32,
    unique: u64,
    node: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    extension_len: u16,
    padding: u16,
}

/// READ's and WRITE's arguments have the same shape.
#[derive(FromBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct IoIn {
    handle: u64,
    offset: u64,
    size: u32,
    io_flags: u32,
    lock_owner: u64,
    flags: u32,
    padding: u32,
}

#[derive(FromBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct FallocateIn {
    handle: u64,
    offset: u64,
    length: u64,
    mode: u32,
    padding: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct OutHeader {
    len: u32,
    error: i32,
    unique: u64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct InitOut {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    max_write: u32,
    time_gran: u32,
    max_pages: u16,
    map_alignment: u16,
    flags2: u32,
    unused: [u32; 7],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct AttrOut {
    valid: u64,
    valid_nsec: u32,
    dummy: u32,
    ino: u64,
    size: u64,
    blocks: u64,
    times: [u64; 3],
    times_nsec: [u32; 3],
    mode: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    blksize: u32,
    flags: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct OpenOut {
    handle: u64,
    flags: u32,
    padding: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StatfsOut {
    counts: [u64; 5],
    bsize: u32,
    namelen: u32,
    frsize: u32,
    padding: u32,
    spare: [u32; 6],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct InvalOut {
    header: OutHeader,
    ino: u64,
    offset: i64,
    len: i64,
}

const _: () = assert!(size_of::<InHeader>() == IN_HEADER && size_of::<IoIn>() == 40 && size_of::<FallocateIn>() == 32);
const _: () = assert!(size_of::<InitOut>() == 64 && size_of::<AttrOut>() == 104 && size_of::<StatfsOut>() == 80);

/// One request, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Names it in the reply.
    pub(crate) unique: u64,
    pub(crate) operation: Operation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Init {
        major: u32,
        minor: u32,
        readahead: u32,
        flags: u32,
        flags2: u32,
    },
    GetAttr,
    Open,
    Statfs,
    Read {
        offset: u64,
        size: u32,
    },
    /// The payload follows at `WRITE_HEAD`.
    Write {
        offset: u64,
        size: u32,
    },
    Fsync,
    /// Read as zeroes from now on.
    Zero {
        offset: u64,
        length: u64,
    },
    /// Answered with success, nothing to do.
    Nothing,
    /// Not answered.
    Ignored,
    /// Answered with this error.
    Unsupported(i32),
}

/// Has the calling thread's reactor watch the FUSE device.
#[allow(unsafe_code)]
pub(crate) fn watch(device: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor for as long as the `AsyncFd` owns it.
    unsafe { AsyncFd::register(device) }.map_err(Into::into)
}

/// Decodes a request of `len` bytes that was read from the FUSE device, by its beginning: `WRITE_HEAD` bytes, or all of it if that is less.
/// `None`: not a whole request.
pub(crate) fn decode(head: &[u8], len: usize) -> Option<Request> {
    let (header, body) = InHeader::read_from_prefix(head).ok()?;
    if header.len as usize != len {
        return None;
    }
    let word = |n: usize| Some(u32::from_ne_bytes(body.get(n * 4..n * 4 + 4)?.try_into().ok()?));
    let operation = match header.opcode {
        opcode::INIT => Operation::Init {
            major: word(0)?,
            minor: word(1)?,
            readahead: word(2)?,
            flags: word(3)?,
            // Older kernels send less.
            flags2: word(4).unwrap_or(0),
        },
        // A size is never changed through the file; the rest of its attributes means nothing.
        opcode::GETATTR | opcode::SETATTR => Operation::GetAttr,
        opcode::OPEN => Operation::Open,
        opcode::STATFS => Operation::Statfs,
        opcode::READ => {
            let (io, _) = IoIn::read_from_prefix(body).ok()?;
            Operation::Read { offset: io.offset, size: io.size }
        }
        opcode::WRITE => {
            let (io, _) = IoIn::read_from_prefix(body).ok()?;
            if len - WRITE_HEAD != io.size as usize {
                return None;
            }
            Operation::Write { offset: io.offset, size: io.size }
        }
        opcode::FSYNC => Operation::Fsync,
        opcode::FALLOCATE => {
            let (fallocate, _) = FallocateIn::read_from_prefix(body).ok()?;
            match fallocate.mode {
                mode if mode == FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE || mode == FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE => {
                    Operation::Zero { offset: fallocate.offset, length: fallocate.length }
                }
                _ => Operation::Unsupported(libc::EOPNOTSUPP),
            }
        }
        opcode::RELEASE | opcode::FLUSH | opcode::DESTROY => Operation::Nothing,
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => Operation::Ignored,
        _ => Operation::Unsupported(libc::ENOSYS),
    };
    Some(Request { unique: header.unique, operation })
}

/// A reply's header; `payload` is how many bytes follow it.
pub(crate) fn reply_header(unique: u64, error: i32, payload: usize) -> [u8; REPLY_HEAD] {
    zerocopy::transmute!(OutHeader { len: (16 + payload) as u32, error: -error, unique })
}

/// The body of the answer to INIT.
pub(crate) fn init_reply(minor: u32, readahead: u32, offered: u32, offered2: u32) -> Vec<u8> {
    let flags = (ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES | INIT_EXT) & offered;
    let out = InitOut {
        major: 7,
        minor: minor.min(40),
        max_readahead: readahead,
        flags,
        max_background: MAX_BACKGROUND,
        congestion_threshold: MAX_BACKGROUND,
        max_write: MAX_WRITE,
        time_gran: 1,
        max_pages: (MAX_WRITE / 4096) as u16,
        map_alignment: 0,
        flags2: if flags & INIT_EXT != 0 { HAS_RESEND & offered2 } else { 0 },
        unused: [0; 7],
    };
    out.as_bytes().to_vec()
}

/// The body of the answer to GETATTR: a regular file of this size, for a long time.
pub(crate) fn attr_reply(size: u64) -> Vec<u8> {
    let out = AttrOut {
        valid: 365 * 86400,
        valid_nsec: 0,
        dummy: 0,
        ino: ROOT,
        size,
        blocks: size / 512,
        times: [0; 3],
        times_nsec: [0; 3],
        mode: libc::S_IFREG | 0o600,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    };
    out.as_bytes().to_vec()
}

/// The body of the answer to OPEN.
pub(crate) fn open_reply() -> Vec<u8> {
    let flags = FOPEN_DIRECT_IO | FOPEN_NOFLUSH | FOPEN_PARALLEL_DIRECT_WRITES;
    OpenOut { handle: 0, flags, padding: 0 }.as_bytes().to_vec()
}

/// The body of the answer to STATFS.
pub(crate) fn statfs_reply(size: u64) -> Vec<u8> {
    let out = StatfsOut { counts: [size / 4096, 0, 0, 1, 0], bsize: 4096, namelen: 255, frsize: 4096, padding: 0, spare: [0; 6] };
    out.as_bytes().to_vec()
}

/// The body of the answer to WRITE.
pub(crate) fn write_reply(size: u32) -> [u8; 8] {
    zerocopy::transmute!([size, 0])
}

/// Tells the kernel that the file's attributes changed.
pub(crate) fn invalidate_attributes() -> Vec<u8> {
    let header = OutHeader { len: 40, error: NOTIFY_INVAL_INODE, unique: 0 };
    InvalOut { header, ino: ROOT, offset: -1, len: 0 }.as_bytes().to_vec()
}

/// Has the kernel send again what it sent and nobody answered. Those come with bit 63 of `unique` set, which their replies keep.
pub(crate) fn resend() -> [u8; REPLY_HEAD] {
    zerocopy::transmute!(OutHeader { len: 16, error: NOTIFY_RESEND, unique: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((IN_HEADER + body.len()) as u32).to_ne_bytes());
        bytes.extend(opcode.to_ne_bytes());
        bytes.extend(77u64.to_ne_bytes());
        bytes.resize(IN_HEADER, 0);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_write_is_decoded_only_if_its_payload_is_whole() {
        let mut body = vec![0; 40];
        body[8..16].copy_from_slice(&8192u64.to_ne_bytes());
        body[16..20].copy_from_slice(&4096u32.to_ne_bytes());
        body.resize(40 + 4096, 1);
        let whole = request(opcode::WRITE, &body);
        let expected = Request { unique: 77, operation: Operation::Write { offset: 8192, size: 4096 } };
        assert_eq!(decode(&whole, whole.len()), Some(expected));
        body.truncate(40 + 4095);
        let cut = request(opcode::WRITE, &body);
        assert_eq!(decode(&cut, cut.len()), None);
        let head = &whole[..WRITE_HEAD];
        assert_eq!((decode(head, whole.len()), decode(head, whole.len() - 1)), (Some(expected), None));
    }

    #[test]
    fn no_prefix_of_a_request_is_taken_for_a_request() {
        for opcode in 0..60 {
            let whole = request(opcode, &[0; 64]);
            for len in 0..whole.len() {
                assert_eq!(decode(&whole[..len], len), None, "opcode {opcode}, {len} bytes");
            }
        }
    }

    #[test]
    fn punch_and_zero_range_keep_the_size_and_nothing_else_is_promised() {
        for (mode, zero) in [(3u32, true), (0x11, true), (0, false), (1, false), (0x10, false), (8, false)] {
            let mut body = vec![0; 32];
            body[16..24].copy_from_slice(&4096u64.to_ne_bytes());
            body[24..28].copy_from_slice(&mode.to_ne_bytes());
            let whole = request(opcode::FALLOCATE, &body);
            let operation = decode(&whole, whole.len()).unwrap().operation;
            assert_eq!(operation == Operation::Zero { offset: 0, length: 4096 }, zero, "mode {mode:#x}: {operation:?}");
        }
    }
}
