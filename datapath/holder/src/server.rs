//! The holder itself: one thread, one loop.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::Path,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{FileType, fstat, major, minor},
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, listen, socket_with,
        sockopt::{set_socket_send_buffer_size, socket_peercred},
    },
    process::Pid,
};
use tracing::{info, warn};

use crate::{
    process::{Fate, Process},
    protocol::{DYING, Kind, Request, Status, receive, send},
};

/// Connections that are kept at most: far more than a node has volumes.
const MAX_HELD: usize = 4096;
/// Clients that are listened to at once.
const MAX_CLIENTS: usize = 16;
/// The device number of `/dev/fuse`.
const FUSE: (u32, u32) = (10, 229);

/// What it keeps, and for whom.
#[derive(Debug)]
pub struct Server {
    listener: OwnedFd,
    clients: Vec<Client>,
    held: BTreeMap<String, OwnedFd>,
    /// Who was admitted last.
    owner: Option<Process>,
}

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    pid: Pid,
    admitted: bool,
}

/// Makes the socket. One that nobody listens on any more is replaced.
///
/// # Errors
/// `AddrInUse` if another holder listens there; what the system says.
pub fn bind(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let new = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    match connect(new()?, &address) {
        Ok(()) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another holder listens there")),
        Err(rustix::io::Errno::CONNREFUSED) => fs::remove_file(path)?,
        Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let socket = new()?;
    rustix::net::bind(&socket, &address)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listen(&socket, 16)?;
    Ok(socket)
}

/// Whether a descriptor is of `/dev/fuse`.
fn is_fuse(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && (major(stat.st_rdev), minor(stat.st_rdev)) == FUSE
    })
}

impl Server {
    /// Holds nothing yet.
    pub fn new(listener: OwnedFd) -> Self {
        Self { listener, clients: Vec::new(), held: BTreeMap::new(), owner: None }
    }

    /// Serves for ever.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn run(mut self) -> io::Result<Infallible> {
        loop {
            let sockets = self.clients.iter().map(|client| client.socket.as_fd()).chain([self.listener.as_fd()]);
            let mut fds: Vec<PollFd<'_>> = sockets.map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::IN)).collect();
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                polled => polled?,
            };
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            // From the end, so that the places of those before do not change.
            for place in (0..self.clients.len()).rev().filter(|place| ready[*place]) {
                if !self.serve(place) {
                    let gone = self.clients.remove(place);
                    if gone.admitted {
                        info!(pid = gone.pid.as_raw_nonzero(), held = self.held.len(), "the client is gone; its connections are kept");
                    }
                }
            }
            if ready.last() == Some(&true) {
                self.accept();
            }
        }
    }

    fn accept(&mut self) {
        let accepted = accept_with(&self.listener, SocketFlags::CLOEXEC).and_then(|socket| {
            set_socket_send_buffer_size(&socket, 256 << 10)?;
            let pid = socket_peercred(&socket)?.pid;
            Ok(Client { socket, pid, admitted: false })
        });
        match accepted {
            Ok(_) if self.clients.len() >= MAX_CLIENTS => warn!("too many clients at once: one is turned away"),
            Ok(client) => self.clients.push(client),
            Err(error) => warn!(%error, "a client could not be accepted"),
        }
    }

    /// Answers one request. `false`: the client is gone, or is to go.
    fn serve(&mut self, place: usize) -> bool {
        let packet = match receive(&self.clients[place].socket) {
            Ok(Some(packet)) => packet,
            Ok(None) | Err(_) => return false,
        };
        let (status, text, fd) = match packet.request() {
            Ok(request) => self.answer(place, request),
            Err(status) => (status, String::new(), None),
        };
        send(&self.clients[place].socket, status as u8, &text, fd.as_ref().map(AsFd::as_fd)).is_ok() && status != Status::Version
    }

    fn answer(&mut self, place: usize, request: Request) -> (Status, String, Option<OwnedFd>) {
        let Request { kind, name, fd } = request;
        let nothing = |status| (status, String::new(), None);
        if kind == Kind::Hello {
            let (status, before) = self.admit(place, &name);
            return (status, before.to_owned(), None);
        }
        if !self.clients[place].admitted {
            return nothing(Status::Busy);
        }
        match kind {
            Kind::Hello => nothing(Status::Busy),
            Kind::Put => match fd.filter(is_fuse) {
                None => nothing(Status::Malformed),
                Some(_) if self.held.len() >= MAX_HELD && !self.held.contains_key(&name) => nothing(Status::Full),
                Some(fd) => {
                    info!(name, "held");
                    self.held.insert(name, fd);
                    nothing(Status::Done)
                }
            },
            Kind::Get => match self.held.get(&name).map(OwnedFd::try_clone) {
                Some(Ok(fd)) => (Status::Done, String::new(), Some(fd)),
                Some(Err(error)) => {
                    warn!(name, %error, "it cannot be given");
                    nothing(Status::Full)
                }
                None => nothing(Status::NotFound),
            },
            Kind::Remove => {
                if self.held.remove(&name).is_some() {
                    info!(name, "let go");
                }
                nothing(Status::Done)
            }
            Kind::List => (Status::Done, self.held.keys().map(|name| format!("{name}\n")).collect(), None),
        }
    }

    /// The descriptors are one process's at a time. Says what the one before is, if it has not ended.
    fn admit(&mut self, place: usize, who: &str) -> (Status, &'static str) {
        let pid = self.clients[place].pid;
        let before = match self.owner.as_ref().filter(|owner| owner.pid != pid).map(Process::fate) {
            Some(Fate::Alive) => return (Status::Busy, ""),
            Some(Fate::Dying) => DYING,
            Some(Fate::Ended) | None => "",
        };
        match Process::of(pid) {
            Ok(process) => self.owner = Some(process),
            Err(error) => {
                warn!(%error, "a client that cannot be watched is turned away");
                return (Status::Busy, "");
            }
        }
        for client in &mut self.clients {
            client.admitted = client.pid == pid;
        }
        info!(who, pid = pid.as_raw_nonzero(), held = self.held.len(), before, "a client");
        (Status::Done, before)
    }
}
