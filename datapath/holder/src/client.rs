//! csi-node's side.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use tracing::{info, warn};

use crate::protocol::{DYING, Kind, NoReply, Packet, Status, VERSION, receive, send};

/// How often a holder that is busy or away is asked again.
const AGAIN: Duration = Duration::from_millis(20);
/// How long a holder may take for an answer; it does no work that could wait.
const ANSWER: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Which of the two is to be upgraded.
fn older(theirs: u8) -> &'static str {
    if theirs > VERSION { "csi-node" } else { "fuse-holder" }
}

/// Why the holder did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens, or the socket fails.
    #[error("the FUSE holder at {socket}: {source}")]
    Io {
        /// Where it was looked for.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The csi-node before this one still runs.
    #[error("the FUSE holder at {0} still serves another csi-node: end that one first")]
    Busy(PathBuf),
    /// Holder and csi-node do not understand each other.
    #[error(
        "the FUSE holder at {socket} speaks version {theirs} of its protocol and this csi-node version {VERSION}: nothing was touched; upgrade {}",
        older(*theirs)
    )]
    Version {
        /// Where it is.
        socket: PathBuf,
        /// Its version.
        theirs: u8,
    },
    /// It refused.
    #[error("the FUSE holder at {socket} refused {what}: {status}")]
    Refused {
        /// Where it is.
        socket: PathBuf,
        /// What was asked.
        what: String,
        /// What it said.
        status: String,
    },
}

/// A holder that this process is the client of. When the holder ends and another one takes its place, that one is given what this process has.
#[derive(Debug)]
pub struct Holder {
    path: PathBuf,
    who: String,
    before_is_dying: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    socket: Option<OwnedFd>,
    /// What this process serves.
    kept: BTreeMap<String, OwnedFd>,
    /// What a holder that was away is still to let go of.
    dropped: BTreeSet<String>,
}

impl Holder {
    /// Says hello, and waits this long for the end of the client before. Blocks.
    ///
    /// # Errors
    /// `Error::Busy` if it did not end; `Error::Version`; `Error::Io` if nobody listens.
    pub fn connect(path: &Path, who: &str, patience: Duration) -> Result<Arc<Self>, Error> {
        let deadline = Instant::now() + patience;
        loop {
            match say_hello(path, who) {
                Err(Error::Busy(_) | Error::Io { .. }) if Instant::now() < deadline => thread::sleep(AGAIN),
                Err(error) => return Err(error),
                Ok((socket, before_is_dying)) => {
                    let state = Mutex::new(State { socket: Some(socket), kept: BTreeMap::new(), dropped: BTreeSet::new() });
                    let holder = Arc::new(Self { path: path.to_owned(), who: who.to_owned(), before_is_dying, state });
                    let watched = Arc::downgrade(&holder);
                    let spawned = thread::Builder::new().name("fuse-holder".into()).spawn(move || watch(&watched));
                    spawned.map_err(|source| Error::Io { socket: path.to_owned(), source })?;
                    return Ok(holder);
                }
            }
        }
    }

    /// Whether the csi-node before this one was killed and cannot end, because a thread of it hangs in the kernel: all that it has open stays
    /// open, its locks among it, but no code of it runs.
    pub fn before_is_dying(&self) -> bool {
        self.before_is_dying
    }

    /// Has it keep a volume's `/dev/fuse`, from now on until `remove`. The holder away: it is given it when it is back. Blocks.
    ///
    /// # Errors
    /// `Error::Refused`.
    pub fn put(&self, name: &str, fd: OwnedFd) -> Result<(), Error> {
        let mut state = self.lock();
        match self.ask(&mut state, Kind::Put, name, Some(&fd)).and_then(|packet| self.done(&packet, name)) {
            Err(error @ Error::Io { .. }) => warn!(%error, name, "it is given the connection later"),
            put => put?,
        }
        state.dropped.remove(name);
        state.kept.insert(name.to_owned(), fd);
        Ok(())
    }

    /// The `/dev/fuse` that a process before this one gave it. `None`: there is none. Blocks.
    ///
    /// # Errors
    /// `Error::Io`, `Error::Refused`.
    pub fn get(&self, name: &str) -> Result<Option<OwnedFd>, Error> {
        let mut state = self.lock();
        let mut packet = self.ask(&mut state, Kind::Get, name, None)?;
        if matches!(packet.reply(), Ok((Status::NotFound, _))) {
            return Ok(None);
        }
        self.done(&packet, name)?;
        let fd = packet.fd.take().ok_or_else(|| self.refused(name, "no descriptor came"))?;
        let own = fd.try_clone().map_err(|source| Error::Io { socket: self.path.clone(), source })?;
        state.kept.insert(name.to_owned(), own);
        Ok(Some(fd))
    }

    /// Lets go of a volume's `/dev/fuse`: when nobody else has it, every request on it ends with an error. Not there: done. The holder
    /// away: it is told when it is back. Blocks.
    ///
    /// # Errors
    /// `Error::Refused`.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let mut state = self.lock();
        state.kept.remove(name);
        match self.ask(&mut state, Kind::Remove, name, None).and_then(|packet| self.done(&packet, name)) {
            Err(Error::Io { .. }) => {
                state.dropped.insert(name.to_owned());
                Ok(())
            }
            removed => removed,
        }
    }

    /// Every name that it has a `/dev/fuse` for. Blocks.
    ///
    /// # Errors
    /// `Error::Io`, `Error::Refused`.
    pub fn list(&self) -> Result<Vec<String>, Error> {
        let packet = self.ask(&mut self.lock(), Kind::List, "", None)?;
        self.done(&packet, "its list")?;
        Ok(packet.reply().map_or_else(|_| Vec::new(), |(_, text)| text.lines().map(str::to_owned).collect()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, state: &mut State, kind: Kind, name: &str, fd: Option<&OwnedFd>) -> Result<Packet, Error> {
        let away = || Error::Io { socket: self.path.clone(), source: io::ErrorKind::NotConnected.into() };
        let socket = state.socket.as_ref().ok_or_else(away)?;
        let answer = exchange(socket, kind, name, fd);
        if answer.is_err() {
            state.socket = None;
        }
        answer.map_err(|source| Error::Io { socket: self.path.clone(), source })
    }

    fn done(&self, packet: &Packet, what: &str) -> Result<(), Error> {
        match packet.reply() {
            Ok((Status::Done, _)) => Ok(()),
            Ok((status, _)) => Err(self.refused(what, &format!("{status:?}"))),
            Err(NoReply::Version(theirs)) => Err(Error::Version { socket: self.path.clone(), theirs }),
            Err(NoReply::Malformed) => Err(self.refused(what, "it was not understood")),
        }
    }

    fn refused(&self, what: &str, status: &str) -> Error {
        Error::Refused { socket: self.path.clone(), what: what.to_owned(), status: status.to_owned() }
    }

    /// Finds the holder again, or the one that took its place, and gives it everything.
    fn reconnect(&self) -> Result<(), Error> {
        let (socket, _) = say_hello(&self.path, &self.who)?;
        let mut state = self.lock();
        state.socket = Some(socket);
        let kept: Vec<(String, OwnedFd)> = state.kept.iter().filter_map(|(name, fd)| Some((name.clone(), fd.try_clone().ok()?))).collect();
        for (name, fd) in &kept {
            self.ask(&mut state, Kind::Put, name, Some(fd)).and_then(|packet| self.done(&packet, name))?;
        }
        for name in std::mem::take(&mut state.dropped) {
            self.ask(&mut state, Kind::Remove, &name, None).and_then(|packet| self.done(&packet, &name))?;
        }
        info!(held = kept.len(), "the FUSE holder is back");
        Ok(())
    }
}

fn exchange(socket: &OwnedFd, kind: Kind, name: &str, fd: Option<&OwnedFd>) -> io::Result<Packet> {
    send(socket, kind as u8, name, fd.map(AsFd::as_fd))?;
    let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)];
    if poll(&mut fds, Some(&ANSWER))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    receive(socket)?.ok_or_else(|| io::ErrorKind::ConnectionReset.into())
}

/// Admitted: the socket, and whether the client before is dying.
fn say_hello(path: &Path, who: &str) -> Result<(OwnedFd, bool), Error> {
    let failed = |source| Error::Io { socket: path.to_owned(), source };
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(|error| failed(error.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
    connect(&socket, &address).map_err(|error| failed(error.into()))?;
    let packet = exchange(&socket, Kind::Hello, who, None).map_err(failed)?;
    match packet.reply() {
        Ok((Status::Done, before)) => Ok((socket, before == DYING)),
        Ok((Status::Busy, _)) => Err(Error::Busy(path.to_owned())),
        Err(NoReply::Version(theirs)) => Err(Error::Version { socket: path.to_owned(), theirs }),
        Ok(_) | Err(NoReply::Malformed) => Err(failed(io::ErrorKind::InvalidData.into())),
    }
}

/// Sees the holder's end, and looks for its successor, for as long as anybody uses `holder`.
fn watch(holder: &Weak<Holder>) {
    let mut said = false;
    while let Some(holder) = holder.upgrade() {
        let socket = holder.lock().socket.as_ref().and_then(|socket| socket.try_clone().ok());
        let Some(socket) = socket else {
            match holder.reconnect() {
                Ok(()) => said = false,
                Err(error) => {
                    if !std::mem::replace(&mut said, true) {
                        warn!(%error, "if csi-node ends now, its volumes' devices end with it");
                    }
                    drop(holder);
                    thread::sleep(Duration::from_millis(500));
                }
            }
            continue;
        };
        let weak = Arc::downgrade(&holder);
        // Not kept alive by this thread while it waits.
        drop(holder);
        let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::empty())];
        let hung_up = poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).is_ok_and(|n| n > 0);
        if hung_up && let Some(holder) = weak.upgrade() {
            holder.lock().socket = None;
        }
    }
}
