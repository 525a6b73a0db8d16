//! What travels on the socket (`SOCK_SEQPACKET`): one packet a request, one a reply.
//!
//! ```text
//! request: version u8, kind u8, name (UTF-8, at most MAX_NAME bytes); with Put: one descriptor
//! reply:   version u8, status u8, text (Hello: nothing, or `dying`; List: names, each ended by a newline); with Get: one descriptor
//! ```

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::{Errno, Result},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
        sendmsg,
    },
};

/// The version of the protocol. Another one is refused by either side.
pub const VERSION: u8 = 1;
/// Said with `Hello`'s `Done`: the client before was killed and does not end.
pub(crate) const DYING: &str = "dying";
/// Bytes in the longest name.
pub(crate) const MAX_NAME: usize = 128;
/// Bytes in the longest packet: the names of some thousand connections.
const MAX_PACKET: usize = 128 << 10;

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Comes first; the name says who asks, for the log.
    Hello = 1,
    /// Keep this descriptor under this name, instead of what was there.
    Put = 2,
    /// Give a descriptor that is the same open file.
    Get = 3,
    /// Let go of it. Not there: done.
    Remove = 4,
    /// All names.
    List = 5,
}

impl Kind {
    fn of(code: u8) -> Option<Self> {
        [Self::Hello, Self::Put, Self::Get, Self::Remove, Self::List].into_iter().find(|kind| *kind as u8 == code)
    }
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// Done.
    Done = 0,
    /// Nothing has that name.
    NotFound = 1,
    /// This version of the protocol is not spoken here.
    Version = 2,
    /// It cannot be understood, or the descriptor is not `/dev/fuse`.
    Malformed = 3,
    /// The client before is not gone yet, or `Hello` did not come first.
    Busy = 4,
    /// There are too many.
    Full = 5,
}

impl Status {
    fn of(code: u8) -> Option<Self> {
        [Self::Done, Self::NotFound, Self::Version, Self::Malformed, Self::Busy, Self::Full]
            .into_iter()
            .find(|status| *status as u8 == code)
    }
}

/// A packet as it came.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) bytes: Vec<u8>,
    pub(crate) fd: Option<OwnedFd>,
}

/// Why a packet is no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoReply {
    /// The other side speaks this version of the protocol.
    Version(u8),
    /// It cannot be understood.
    Malformed,
}

/// A request.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) fd: Option<OwnedFd>,
}

impl Packet {
    /// Reads it as a request; what to answer if it is none.
    pub(crate) fn request(self) -> std::result::Result<Request, Status> {
        let [version, kind, name @ ..] = self.bytes.as_slice() else { return Err(Status::Malformed) };
        if *version != VERSION {
            return Err(Status::Version);
        }
        let (Some(kind), Ok(name)) = (Kind::of(*kind), std::str::from_utf8(name)) else { return Err(Status::Malformed) };
        if name.len() > MAX_NAME || name.contains('\n') {
            return Err(Status::Malformed);
        }
        Ok(Request { kind, name: name.to_owned(), fd: self.fd })
    }

    /// Reads it as a reply: its status, its text. Of another version nothing but that is read: what else it says may mean anything.
    pub(crate) fn reply(&self) -> std::result::Result<(Status, &str), NoReply> {
        let (version, rest) = self.bytes.split_first().ok_or(NoReply::Malformed)?;
        if *version != VERSION {
            return Err(NoReply::Version(*version));
        }
        let (status, text) = rest.split_first().ok_or(NoReply::Malformed)?;
        Status::of(*status).zip(std::str::from_utf8(text).ok()).ok_or(NoReply::Malformed)
    }
}

/// Sends one packet.
pub(crate) fn send(socket: impl AsFd, code: u8, text: &str, fd: Option<BorrowedFd<'_>>) -> Result<()> {
    let head = [VERSION, code];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(socket, &[IoSlice::new(&head), IoSlice::new(text.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
}

/// Receives one packet. `None`: the other side is gone.
pub(crate) fn receive(socket: impl AsFd) -> Result<Option<Packet>> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.next().and_then(|mut fds| fds.next());
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(Errno::MSGSIZE);
    }
    bytes.truncate(received.bytes);
    Ok(Some(Packet { bytes, fd }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(bytes: &[u8]) -> Packet {
        Packet { bytes: bytes.to_vec(), fd: None }
    }

    #[test]
    fn what_is_no_request_is_told_so() {
        assert_eq!(packet(&[]).request().unwrap_err(), Status::Malformed);
        assert_eq!(packet(&[VERSION]).request().unwrap_err(), Status::Malformed);
        assert_eq!(packet(&[VERSION + 1, 1]).request().unwrap_err(), Status::Version);
        assert_eq!(packet(&[VERSION, 99]).request().unwrap_err(), Status::Malformed);
        assert_eq!(packet(&[VERSION, 3, 0xff]).request().unwrap_err(), Status::Malformed);
        assert_eq!(packet(&[VERSION, 3, b'a', b'\n']).request().unwrap_err(), Status::Malformed);
        let mut long = vec![VERSION, 3];
        long.resize(2 + MAX_NAME + 1, b'a');
        assert_eq!(packet(&long).request().unwrap_err(), Status::Malformed);
        long.pop();
        assert_eq!(packet(&long).request().unwrap().name.len(), MAX_NAME);
    }

    #[test]
    fn of_another_version_only_the_version_is_read() {
        let others =
            [&[VERSION + 1][..], &[VERSION + 1, 0], &[VERSION + 1, 2], &[VERSION + 1, 4], &[VERSION + 1, 99], &[VERSION + 1, 0, 0xff]];
        for other in others {
            assert_eq!(packet(other).reply(), Err(NoReply::Version(VERSION + 1)), "{other:?}");
        }
        for bad in [&[][..], &[VERSION], &[VERSION, 99], &[VERSION, 0, 0xff]] {
            assert_eq!(packet(bad).reply(), Err(NoReply::Malformed), "{bad:?}");
        }
        assert_eq!(packet(&[VERSION, 0, b'a']).reply(), Ok((Status::Done, "a")));
    }
}
