//! One volume on its datapath thread: requests from FUSE, the mirror's decisions, their performance.
//!
//! ```text
//! /dev/fuse --read--> Event::Submit --> [ core ] --> Effect::Leg ------> a local task on the ring --> Event::Done
//!     ^---- reply <------------------------ Complete         WriteWitness -> the blocking pool ------------^
//! ```

mod guard;
mod share;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    os::{fd::OwnedFd, unix::fs::FileExt},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use lockstep_core::{
    COPY_WINDOW, Mirror,
    io::{self, Effect, Effects, Event, Notice, Outcome},
    status::{ScrubState, Status, Sync},
    units::{BLOCK_SIZE, BlockRange, Errno, Instant, IoId, Slot, Tag},
};
use tokio::sync::{Notify, broadcast, mpsc, oneshot, watch};
use tracing::{debug, error, info, warn};

use crate::{
    abi::fuse::{self, Operation},
    buffers::{Buffer, Class, Pool, Window},
    compare,
    connection::Connection,
    landing::Landing,
    leg::{LegFiles, OpenLeg, Prepared},
};

/// Requests taken from one volume before its neighbours get a turn.
const BATCH: usize = 64;
/// How often progress is published while the legs are made equal.
const PROGRESS: Duration = Duration::from_millis(250);
/// Tags of commands; the kernel's own never have this bit.
const COMMAND: u64 = 1 << 62;

/// What the handle asks of the volume's task.
pub(crate) enum Command {
    /// A request of the operator's.
    Submit(io::Request, oneshot::Sender<Result<(), Errno>>),
    /// A leg's files, for a slot whose leg is OUT, and then the request to attach it.
    Attach { slot: Slot, leg: Box<OpenLeg>, request: io::Request, reply: oneshot::Sender<Result<(), Errno>> },
    /// How the leg with this `meta` may come back.
    Readmission(Vec<u8>, oneshot::Sender<Option<(Slot, io::Fill)>>),
    /// Have the kernel ask for the attributes again.
    InvalidateAttributes(oneshot::Sender<Result<(), Errno>>),
    /// Forget everything. The mirror was stopped before.
    Close(oneshot::Sender<Result<(), Errno>>),
}

/// Everything a datapath thread needs to run a volume.
pub(crate) struct Start {
    pub(crate) name: String,
    pub(crate) mirror: Mirror,
    pub(crate) effects: Effects,
    pub(crate) legs: [Option<OpenLeg>; 2],
    pub(crate) witness: std::fs::File,
    pub(crate) fuse: OwnedFd,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) status: watch::Sender<Status>,
    pub(crate) notices: broadcast::Sender<Notice>,
}

enum Pending {
    Fuse { unique: u64, answer: Answer },
    Command(Option<oneshot::Sender<Result<(), Errno>>>),
}

#[derive(Clone, Copy)]
enum Answer {
    Empty,
    Written(u32),
    /// So many bytes of the payload.
    Payload(usize),
}

struct Entry {
    pending: Pending,
    payload: Option<(Rc<Buffer>, usize)>,
    /// How often its memory was left to a late I/O.
    renewed: u64,
}

struct Volume {
    name: String,
    pool: Rc<Pool>,
    mirror: RefCell<Option<Mirror>>,
    legs: RefCell<[Option<Rc<LegFiles>>; 2]>,
    witness: Arc<std::fs::File>,
    fuse: Connection,
    entries: RefCell<HashMap<Tag, Entry>>,
    /// The mirror's own buffers, and how often each was released.
    copies: RefCell<[(Option<Rc<Buffer>>, u64); COPY_WINDOW as usize]>,
    born: std::time::Instant,
    blocks: Cell<u64>,
    next_command: Cell<u64>,
    /// The deadline may have moved.
    rearm: Notify,
    closed: Cell<bool>,
    closing: Notify,
    status: watch::Sender<Status>,
    notices: broadcast::Sender<Notice>,
}

/// Runs a volume until it is closed.
pub(crate) async fn run(start: Start, pool: Rc<Pool>, landing: Rc<RefCell<Landing>>) {
    let mut commands = start.commands;
    let mut legs = [None, None];
    for (slot, leg) in start.legs.into_iter().enumerate() {
        match leg.map(OpenLeg::into_files).transpose() {
            Ok(files) => legs[slot] = files,
            Err(error) => return error!(volume = start.name, %error, "the volume cannot be started"),
        }
    }
    let fuse = match Connection::new(start.fuse) {
        Ok(fuse) => fuse,
        Err(error) => return error!(volume = start.name, %error, "the FUSE device cannot be polled"),
    };
    let volume = Rc::new(Volume {
        name: start.name,
        pool,
        blocks: Cell::new(start.mirror.status().blocks),
        mirror: RefCell::new(Some(start.mirror)),
        legs: RefCell::new(legs),
        witness: Arc::new(start.witness),
        fuse,
        entries: RefCell::default(),
        copies: RefCell::default(),
        born: std::time::Instant::now(),
        next_command: Cell::new(COMMAND),
        rearm: Notify::new(),
        closed: Cell::new(false),
        closing: Notify::new(),
        status: start.status,
        notices: start.notices,
    });
    volume.guard(|| volume.perform(start.effects));
    volume.spawn(Rc::clone(&volume).keep_time());
    let reader = tokio_uring::spawn(Rc::clone(&volume).read_requests(landing));
    while let Some(command) = commands.recv().await {
        match command {
            Command::Submit(request, reply) => volume.command(request, reply),
            Command::Attach { slot, leg, request, reply } => volume.attach(slot, *leg, request, reply),
            Command::Readmission(meta, reply) => {
                let fill = volume.guard(|| volume.mirror.borrow().as_ref().and_then(|mirror| mirror.readmission(&meta)));
                let _ = reply.send(fill.flatten());
            }
            Command::InvalidateAttributes(reply) => {
                let sent = volume.fuse.notify(&fuse::invalidate_attributes());
                // ENOENT: the kernel has nothing cached.
                let sent = sent.or_else(|errno| if errno == rustix::io::Errno::NOENT { Ok(()) } else { Err(errno) });
                let _ = reply.send(sent.map_err(|errno| Errno(errno.raw_os_error())));
            }
            Command::Close(reply) => {
                volume.stop_tasks();
                drop(reader.await);
                volume.legs.take();
                let _ = reply.send(Ok(()));
                return;
            }
        }
    }
    // The handle is gone without a close: as after a kill, the dirty bits tell the next assembly what may differ.
    volume.stop_tasks();
}

impl Volume {
    fn now(&self) -> Instant {
        Instant(u64::try_from(self.born.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// The reader and the timekeeper end.
    fn stop_tasks(&self) {
        self.closed.set(true);
        self.closing.notify_waiters();
        self.rearm.notify_one();
    }

    fn handle(self: &Rc<Self>, event: Event) {
        self.guard(|| {
            let mut out = Effects::new();
            let mut slot = self.mirror.borrow_mut();
            let Some(mirror) = slot.as_mut() else { return };
            let before = mirror.next_deadline();
            mirror.handle(self.now(), event, &mut out);
            if mirror.next_deadline() != before {
                self.rearm.notify_one();
            }
            drop(slot);
            self.perform(out);
        });
    }

    fn perform(self: &Rc<Self>, mut out: Effects) {
        for effect in out.drain() {
            match effect {
                Effect::Leg { slot, io, op } => {
                    let volume = Rc::clone(self);
                    let files = self.legs.borrow()[slot.index()].clone();
                    match self.unborn(&op) {
                        // A buffer comes to life, perhaps after a wait.
                        Some((buffer, class)) => {
                            let life = self.life(buffer);
                            self.spawn(async move {
                                let memory = Rc::new(volume.pool.get(class).await);
                                // Its leg may have gone OUT meanwhile: then it is late, and the memory is its own.
                                if volume.life(buffer) == life {
                                    volume.give(buffer, &memory);
                                }
                                let op = Prepared::new(op, |buffer, range| {
                                    let (io::Buffer::Request { skip, .. } | io::Buffer::Copy { skip, .. }) = buffer;
                                    Window::new(memory, (skip * BLOCK_SIZE) as usize, range.byte_len() as usize)
                                });
                                volume.leg_io(slot, files, io, op).await;
                            });
                        }
                        None => {
                            let op = self.prepare(op);
                            self.spawn(async move { volume.leg_io(slot, files, io, op).await });
                        }
                    }
                }
                Effect::WriteWitness { io, offset, page } => {
                    let volume = Rc::clone(self);
                    self.spawn(async move {
                        let witness = Arc::clone(&volume.witness);
                        let write = tokio::task::spawn_blocking(move || witness.write_all_at(page.as_slice(), offset)).await;
                        let outcome = match write {
                            Ok(Ok(())) => Outcome::Done(0),
                            Ok(Err(error)) => Outcome::Failed(crate::leg::errno(&error)),
                            Err(_) => Outcome::Failed(Errno::EIO),
                        };
                        volume.handle(Event::Done { io, outcome });
                    });
                }
                Effect::Compare { io, a, b, blocks } => {
                    let volume = Rc::clone(self);
                    let windows = [a, b].map(|buffer| self.window(buffer, blocks * BLOCK_SIZE));
                    self.spawn(async move {
                        let outcome = Outcome::Differ(compare::differing(windows[0].bytes(), windows[1].bytes()));
                        volume.handle(Event::Done { io, outcome });
                    });
                }
                Effect::Complete { tag, result } => self.complete(tag, result),
                Effect::Release { tag } => drop(self.entries.borrow_mut().remove(&tag)),
                Effect::NewBuffer { tag } => {
                    if let Some(entry) = self.entries.borrow_mut().get_mut(&tag) {
                        entry.payload = None;
                        entry.renewed += 1;
                    }
                }
                Effect::ReleaseCopy { index } => {
                    let copy = &mut self.copies.borrow_mut()[usize::from(index)];
                    *copy = (None, copy.1 + 1);
                }
                Effect::Notice(notice) => self.notice(notice),
            }
        }
    }

    /// The buffer that a read is to fill and that has no memory yet: the first piece of a copy, or a read that goes on without the memory that
    /// a late I/O has.
    fn unborn(&self, op: &io::LegOp) -> Option<(io::Buffer, Class)> {
        let io::LegOp::Read { buffer, .. } = op else { return None };
        match buffer {
            io::Buffer::Copy { index, .. } => self.copies.borrow()[usize::from(*index)].0.is_none().then_some((*buffer, Class::Copy)),
            io::Buffer::Request { tag, .. } => match self.entries.borrow().get(tag) {
                Some(Entry { pending: Pending::Fuse { answer: Answer::Payload(len), .. }, payload: None, .. }) => {
                    Some((*buffer, Class::of_payload(*len)))
                }
                _ => None,
            },
        }
    }

    /// Tells the lives of a buffer's name apart; `None`: it has none.
    fn life(&self, buffer: io::Buffer) -> Option<u64> {
        match buffer {
            io::Buffer::Copy { index, .. } => Some(self.copies.borrow()[usize::from(index)].1),
            io::Buffer::Request { tag, .. } => self.entries.borrow().get(&tag).map(|entry| entry.renewed),
        }
    }

    fn give(&self, buffer: io::Buffer, memory: &Rc<Buffer>) {
        match buffer {
            io::Buffer::Copy { index, .. } => self.copies.borrow_mut()[usize::from(index)].0 = Some(Rc::clone(memory)),
            io::Buffer::Request { tag, .. } => {
                if let Some(entry) = self.entries.borrow_mut().get_mut(&tag) {
                    entry.payload = Some((Rc::clone(memory), 0));
                }
            }
        }
    }

    async fn leg_io(self: Rc<Self>, slot: Slot, files: Option<Rc<LegFiles>>, io: IoId, op: Prepared) {
        let (kind, wanted) = op.described();
        let page = op.meta_page().inspect(|page| debug!(volume = self.name, ?slot, ?page, "metadata is written"));
        let outcome = match files {
            Some(files) => files.perform(&self.pool, op).await,
            None => Outcome::Failed(Errno::ENODEV),
        };
        page.inspect(|page| debug!(volume = self.name, ?slot, ?page, "metadata was written"));
        match outcome {
            Outcome::Failed(errno) => debug!(?slot, kind, errno = errno.0, "a leg's I/O failed"),
            Outcome::Done(bytes) if bytes < wanted => debug!(?slot, kind, bytes, wanted, "a leg's I/O fell short"),
            Outcome::Done(_) | Outcome::Extent(_) | Outcome::Differ(_) => {}
        }
        self.handle(Event::Done { io, outcome });
    }

    fn prepare(&self, op: io::LegOp) -> Prepared {
        Prepared::new(op, |buffer, range| self.window(buffer, range.byte_len()))
    }

    fn window(&self, buffer: io::Buffer, bytes: u64) -> Window {
        let (memory, start, skip) = match buffer {
            io::Buffer::Request { tag, skip } => {
                let entries = self.entries.borrow();
                let payload = entries.get(&tag).and_then(|entry| entry.payload.as_ref());
                let (memory, start) = payload.expect("a tag keeps its payload until it is released");
                (Rc::clone(memory), *start, skip)
            }
            io::Buffer::Copy { index, skip } => {
                let copies = self.copies.borrow();
                (Rc::clone(copies[usize::from(index)].0.as_ref().expect("a copy is read before it is written")), 0, skip)
            }
        };
        Window::new(memory, start + (skip * BLOCK_SIZE) as usize, bytes as usize)
    }

    fn complete(&self, tag: Tag, result: Result<(), Errno>) {
        let mut entries = self.entries.borrow_mut();
        let Some(entry) = entries.get_mut(&tag) else { return };
        match &mut entry.pending {
            Pending::Command(reply) => {
                if let Some(reply) = reply.take() {
                    let _ = reply.send(result);
                }
            }
            Pending::Fuse { unique, answer } => self.reply(*unique, *answer, entry.payload.as_ref(), result),
        }
    }

    fn reply(&self, unique: u64, answer: Answer, payload: Option<&(Rc<Buffer>, usize)>, result: Result<(), Errno>) {
        match (result, answer, payload) {
            (Err(errno), ..) => self.fuse.reply(unique, errno.0, &[]),
            (Ok(()), Answer::Written(size), _) => self.fuse.reply(unique, 0, &fuse::write_reply(size)),
            (Ok(()), Answer::Payload(len), Some((buffer, start))) => {
                self.fuse.reply_payload(unique, Window::new(Rc::clone(buffer), *start, len));
            }
            (Ok(()), Answer::Empty | Answer::Payload(_), _) => self.fuse.reply(unique, 0, &[]),
        }
    }

    fn notice(&self, notice: Notice) {
        match &notice {
            Notice::LegOut { slot } => {
                // What is in flight keeps the files; nothing new is sent there, and the disk can be unmounted when it ends.
                if let Some(files) = self.legs.borrow_mut()[slot.index()].take() {
                    files.let_go(&self.pool);
                }
                warn!(volume = self.name, ?slot, "leg is OUT");
            }
            Notice::Grown { blocks } => {
                self.blocks.set(*blocks);
                info!(volume = self.name, blocks, "grown");
            }
            Notice::LegFailed { .. }
            | Notice::BlocksLost { .. }
            | Notice::RebuildBlocked { .. }
            | Notice::WitnessFailed { .. }
            | Notice::ReadOnly { .. }
            | Notice::Mismatch { .. } => warn!(volume = self.name, ?notice),
            _ => info!(volume = self.name, ?notice),
        }
        // Before the status that it leads to: who sees the status can know why. Nobody listens: nobody wants to know.
        drop(self.notices.send(notice));
        self.publish();
    }

    fn publish(&self) {
        self.guard(|| {
            if let Ok(mirror) = self.mirror.try_borrow()
                && let Some(mirror) = mirror.as_ref()
            {
                let status = mirror.status();
                self.status.send_if_modified(|old| std::mem::replace(old, status) != status);
            }
        });
    }

    async fn keep_time(self: Rc<Self>) {
        while !self.closed.get() {
            let (deadline, syncing) = match self.mirror.borrow().as_ref() {
                Some(mirror) => (mirror.next_deadline(), copies_or_compares(&mirror.status())),
                None => return,
            };
            let wait = deadline.map(|at| Duration::from_nanos(at.0.saturating_sub(self.now().0)));
            let wait = if syncing { Some(wait.map_or(PROGRESS, |wait| wait.min(PROGRESS))) } else { wait };
            tokio::select! {
                () = tokio::time::sleep(wait.unwrap_or(Duration::from_secs(3600))) => {}
                () = self.rearm.notified() => {}
            }
            if deadline.is_some_and(|at| at <= self.now()) {
                // What the ring has is delivered first: its poll, the completions, their tasks.
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                }
                self.handle(Event::Tick);
            }
            self.publish();
        }
    }

    fn command(self: &Rc<Self>, request: io::Request, reply: oneshot::Sender<Result<(), Errno>>) {
        let tag = Tag(self.next_command.get());
        self.next_command.set(tag.0 + 1);
        if self.mirror.borrow().is_none() {
            let _ = reply.send(Err(Errno::EIO));
            return;
        }
        self.entries.borrow_mut().insert(tag, Entry { pending: Pending::Command(Some(reply)), payload: None, renewed: 0 });
        self.handle(Event::Submit { tag, request });
        self.publish();
    }

    /// Puts the leg's files into the slot, if nothing is there, and takes them out again if the mirror does not want them.
    fn attach(self: &Rc<Self>, slot: Slot, leg: OpenLeg, request: io::Request, reply: oneshot::Sender<Result<(), Errno>>) {
        if self.legs.borrow()[slot.index()].is_some() {
            // The files of a leg that still counts must stay where they are.
            let _ = reply.send(Err(Errno::EBUSY));
            return;
        }
        let Ok(files) = leg.into_files() else {
            let _ = reply.send(Err(Errno::EIO));
            return;
        };
        self.legs.borrow_mut()[slot.index()] = Some(Rc::clone(&files));
        let (answer, answered) = oneshot::channel();
        self.command(request, answer);
        let volume = Rc::clone(self);
        self.spawn(async move {
            let result = answered.await.unwrap_or(Err(Errno::EIO));
            let mut legs = volume.legs.borrow_mut();
            let installed = &mut legs[slot.index()];
            if result.is_err() && installed.as_ref().is_some_and(|now| Rc::ptr_eq(now, &files)) {
                *installed = None;
            }
            let _ = reply.send(result);
        });
    }

    /// Takes requests while there is memory for any of them.
    async fn read_requests(self: Rc<Self>, landing: Rc<RefCell<Landing>>) {
        while !self.closed.get() {
            let ready = tokio::select! {
                ready = self.fuse.readable() => ready,
                () = self.closing.notified() => return,
            };
            let Ok(mut ready) = ready else { return };
            for _ in 0..BATCH {
                // Buffers to land in, and one of each class for what the request turns out to be.
                landing.borrow_mut().refill(&self.pool);
                if !self.may_take_another(&self.pool) {
                    tokio::select! {
                        () = self.pool.until(|pool| self.may_take_another(pool)) => {}
                        () = self.closing.notified() => return,
                    }
                    continue;
                }
                let read = landing.borrow_mut().fill(&self.pool, |parts| self.fuse.read(parts));
                match read {
                    Ok(len) => {
                        let large_write = self.guard(|| self.request(&landing, len)) == Some(true);
                        // The disks begin with it while the next one is copied, which takes about as long.
                        if large_write {
                            submitted().await;
                        }
                    }
                    // A request was taken back before it was read.
                    Err(rustix::io::Errno::NOENT | rustix::io::Errno::INTR) => {}
                    Err(rustix::io::Errno::WOULDBLOCK) => {
                        ready.clear_ready();
                        break;
                    }
                    Err(errno) => {
                        if errno != rustix::io::Errno::NODEV {
                            error!(%errno, "reading requests failed");
                        }
                        return;
                    }
                }
                if self.closed.get() {
                    return;
                }
            }
            drop(ready);
            tokio::task::yield_now().await;
        }
    }

    /// Takes up one request. Whether it is a large write.
    fn request(self: &Rc<Self>, landing: &RefCell<Landing>, len: usize) -> bool {
        let request = fuse::decode(landing.borrow().head(len), len);
        let Some(request) = request else {
            error!(len, "the kernel sent something that is no FUSE request");
            return false;
        };
        let size = self.blocks.get() * BLOCK_SIZE;
        let unique = request.unique;
        match request.operation {
            Operation::Ignored => {}
            Operation::Nothing => self.fuse.reply(unique, 0, &[]),
            Operation::Unsupported(errno) => self.fuse.reply(unique, errno, &[]),
            Operation::Init { major: 7, minor, readahead, flags, flags2 } => {
                self.fuse.reply(unique, 0, &fuse::init_reply(minor, readahead, flags, flags2));
            }
            Operation::Init { .. } => self.fuse.reply(unique, libc::EPROTO, &[]),
            Operation::GetAttr => self.fuse.reply(unique, 0, &fuse::attr_reply(size)),
            Operation::Open => self.fuse.reply(unique, 0, &fuse::open_reply()),
            Operation::Statfs => self.fuse.reply(unique, 0, &fuse::statfs_reply(size)),
            Operation::Fsync => self.submit(unique, Answer::Empty, None, io::Request::Flush),
            Operation::Zero { offset, length } => match blocks(offset, length) {
                Some(range) => self.submit(unique, Answer::Empty, None, io::Request::Zero(range)),
                None => self.fuse.reply(unique, libc::EINVAL, &[]),
            },
            Operation::Read { offset, size: wanted } => {
                let len = u64::from(wanted).min(size.saturating_sub(offset));
                match blocks(offset, len) {
                    _ if len == 0 => self.fuse.reply(unique, 0, &[]),
                    None => self.fuse.reply(unique, libc::EINVAL, &[]),
                    Some(range) => {
                        let payload = self.pool.take_or_make(Class::of_payload(len as usize));
                        self.submit(unique, Answer::Payload(len as usize), Some((Rc::new(payload), 0)), io::Request::Read(range));
                    }
                }
            }
            Operation::Write { offset, size: len } => {
                let Some(range) = blocks(offset, len.into()) else {
                    self.fuse.reply(unique, libc::EINVAL, &[]);
                    return false;
                };
                let (payload, start) = landing.borrow_mut().payload(&self.pool, len as usize);
                self.submit(unique, Answer::Written(len), Some((Rc::new(payload), start)), io::Request::Write { range, fua: false });
                return Class::of_payload(len as usize) == Class::Large;
            }
        }
        false
    }

    fn submit(self: &Rc<Self>, unique: u64, answer: Answer, payload: Option<(Rc<Buffer>, usize)>, request: io::Request) {
        if self.mirror.borrow().is_none() {
            return self.fuse.reply(unique, libc::EIO, &[]);
        }
        let tag = Tag(unique);
        self.entries.borrow_mut().insert(tag, Entry { pending: Pending::Fuse { unique, answer }, payload, renewed: 0 });
        self.handle(Event::Submit { tag, request });
    }
}

/// What the ring has goes to the kernel now, not when the thread has nothing else to do.
async fn submitted() {
    drop(tokio_uring::no_op().await);
}

/// Its progress is worth a look.
fn copies_or_compares(status: &Status) -> bool {
    status.sync != Sync::Idle || status.scrub.state == ScrubState::Running
}

/// Whole blocks, or nothing.
fn blocks(offset: u64, len: u64) -> Option<BlockRange> {
    let aligned = offset.is_multiple_of(BLOCK_SIZE) && len.is_multiple_of(BLOCK_SIZE) && len > 0;
    aligned.then(|| BlockRange::new(offset / BLOCK_SIZE, (offset + len) / BLOCK_SIZE))
}
