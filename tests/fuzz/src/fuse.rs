//! The decoder of FUSE requests.

use crate::fuse_abi::{
    IN_HEADER, MAX_BODY, Operation, REPLY_HEAD, Request, WRITE_HEAD, attr_reply, decode, init_reply, opcode, open_reply, reply_header,
    statfs_reply,
};

/// A request as it is, and one whose header says how long it is.
pub fn fuse(data: &[u8]) {
    read(data);
    let mut bytes = data.to_vec();
    if bytes.len() >= 4 {
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        read(&bytes);
    }
    // A write that says how much it brings.
    if bytes.len() >= WRITE_HEAD {
        bytes[4..8].copy_from_slice(&opcode::WRITE.to_ne_bytes());
        let payload = (bytes.len() - WRITE_HEAD) as u32;
        bytes[IN_HEADER + 16..IN_HEADER + 20].copy_from_slice(&payload.to_ne_bytes());
        let Some(Request { operation: Operation::Write { size, .. }, .. }) = decode(&bytes, bytes.len()) else {
            panic!("it is a whole write")
        };
        assert_eq!(size, payload);
        read(&bytes);
    }
}

fn read(bytes: &[u8]) {
    let decoded = decode(bytes, bytes.len());
    assert_eq!(decode(&bytes[..bytes.len().min(WRITE_HEAD)], bytes.len()), decoded, "what follows the head does not matter");
    let Some(request) = decoded else { return };
    assert!(bytes.len() >= IN_HEADER);
    assert_eq!(decode(&bytes[..bytes.len() - 1], bytes.len() - 1), None, "a part of it is no request");
    let body = match request.operation {
        Operation::Write { size, .. } => {
            assert_eq!(bytes.len(), WRITE_HEAD + size as usize);
            0
        }
        Operation::Init { minor, readahead, flags, flags2, .. } => init_reply(minor, readahead, flags, flags2).len(),
        Operation::GetAttr => attr_reply(u64::MAX).len(),
        Operation::Open => open_reply().len(),
        Operation::Statfs => statfs_reply(u64::MAX).len(),
        Operation::Unsupported(errno) => {
            assert!((1..4096).contains(&errno));
            0
        }
        Operation::Read { .. } | Operation::Fsync | Operation::Zero { .. } | Operation::Nothing | Operation::Ignored => 0,
    };
    assert!(body <= MAX_BODY);
    let reply = reply_header(request.unique, 5, body);
    assert_eq!(reply[..4], ((REPLY_HEAD + body) as u32).to_ne_bytes());
    assert_eq!((&reply[4..8], &reply[8..]), (&(-5i32).to_ne_bytes()[..], &request.unique.to_ne_bytes()[..]));
    let whole = encode(request);
    assert_eq!(decode(&whole, whole.len()), Some(request));
}

/// What a kernel would have sent.
fn encode(Request { unique, operation }: Request) -> Vec<u8> {
    let io = |offset: u64, size: u32| [&[0; 8], &offset.to_ne_bytes()[..], &size.to_ne_bytes(), &[0; 20]].concat();
    let (opcode, body) = match operation {
        Operation::Init { major, minor, readahead, flags, flags2 } => {
            (opcode::INIT, [major, minor, readahead, flags, flags2].into_iter().flat_map(u32::to_ne_bytes).collect())
        }
        Operation::GetAttr => (opcode::GETATTR, Vec::new()),
        Operation::Open => (opcode::OPEN, Vec::new()),
        Operation::Statfs => (opcode::STATFS, Vec::new()),
        Operation::Read { offset, size } => (opcode::READ, io(offset, size)),
        Operation::Write { offset, size } => (opcode::WRITE, [io(offset, size), vec![0; size as usize]].concat()),
        Operation::Fsync => (opcode::FSYNC, Vec::new()),
        Operation::Zero { offset, length } => {
            let mode = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
            (opcode::FALLOCATE, [&[0; 8], &offset.to_ne_bytes()[..], &length.to_ne_bytes(), &mode.to_ne_bytes(), &[0; 4]].concat())
        }
        Operation::Nothing => (opcode::RELEASE, Vec::new()),
        Operation::Ignored => (opcode::FORGET, Vec::new()),
        Operation::Unsupported(libc::EOPNOTSUPP) => (opcode::FALLOCATE, vec![0; 32]),
        Operation::Unsupported(_) => (u32::MAX, Vec::new()),
    };
    let len = (IN_HEADER + body.len()) as u32;
    [&len.to_ne_bytes()[..], &opcode.to_ne_bytes(), &unique.to_ne_bytes(), &[0; 24], &body].concat()
}
