//! A leg's two files: `data`, a plain image from offset 0, and `meta` beside it.

use std::{
    cell::Cell,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use io_uring::{cqueue, opcode, squeue, types};
use lockstep_core::{
    format::{self, MetaPage},
    io::{LegOp, Outcome, Page},
    units::{BLOCK_SIZE, BlockRange, Errno},
};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use tokio_uring::{
    InFlightOneshot, OneshotOutputTransform, UnsubmittedOneshot,
    buf::{IoBuf, IoBufMut},
};
use tracing::debug;

use crate::{
    abi::xfs,
    buffers::{Class, Pool, Window},
    disk_queue::{DiskQueue, Place},
    error::{Context, Error},
    fence::{Before, fence},
};

/// Zeroes without giving the space back: a thick volume keeps what it was promised.
const ZERO_KEEPING_SPACE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// The piece in which space is allocated: XFS reserves room for a whole call, also where the file has its blocks already.
const ALLOCATE_STEP: u64 = 16 << 20;

/// Allocates `[from, to)` of a file durably, making it that long.
pub(crate) fn allocate(file: &File, from: u64, to: u64) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let len = ALLOCATE_STEP.min(to - at);
        fallocate(file, FallocateFlags::empty(), at, len)?;
        at += len;
    }
    file.sync_all()
}

fn create_durable(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).context(|| format!("creating {}", path.display()))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).context(|| format!("writing {}", path.display()))
}

fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|dir| dir.sync_all()).context(|| format!("syncing {}", dir.display()))
}

/// Makes the files of one leg in `dir`, which must exist: `data`, `bytes` long, fully allocated and reading as zeroes, and `meta` with this
/// content (`lockstep_core::format::{new_leg, spare_leg}`). Durable when it returns; `meta` is made last, so that a leg with a `meta` is whole.
///
/// # Errors
/// `Error::Io`; "no space" among them. An existing file is never touched.
pub fn create_leg(dir: &Path, bytes: u64, meta: &[u8]) -> Result<(), Error> {
    let path = dir.join("data");
    let data =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).context(|| format!("creating {}", path.display()))?;
    // In one call, so that a file system without the room says so at once.
    fallocate(&data, FallocateFlags::empty(), 0, bytes)
        .map_err(io::Error::from)
        .and_then(|()| data.sync_all())
        .context(|| format!("allocating {bytes} bytes for {}", path.display()))?;
    create_durable(&dir.join("meta"), meta)?;
    sync_dir(dir)
}

/// Makes a leg's `data` at least `bytes` long, durably and fully allocated: the ground for `Volume::grow`. Safe while the leg is in use.
/// Blocks.
///
/// # Errors
/// `Error::Io`: the leg is as long as before then.
pub fn extend_leg(dir: &Path, bytes: u64) -> Result<(), Error> {
    let path = dir.join("data");
    let what = || format!("extending {} to {bytes} bytes", path.display());
    let data = OpenOptions::new().write(true).open(&path).context(what)?;
    let old = data.metadata().context(what)?.len();
    allocate(&data, old, bytes).context(what).inspect_err(|_| drop(data.set_len(old)))
}

/// Makes a volume's witness file with this content (`lockstep_core::format::new_witness`), durably.
///
/// # Errors
/// `Error::Io`. An existing file is never touched.
pub fn create_witness(path: &Path, content: &[u8]) -> Result<(), Error> {
    create_durable(path, content)?;
    sync_dir(path.parent().unwrap_or(Path::new("/")))
}

/// A leg that was opened and fenced: nobody else has I/O on it.
#[derive(Debug)]
pub(crate) struct OpenLeg {
    pub(crate) dir: PathBuf,
    pub(crate) meta: Vec<u8>,
    pub(crate) len: u64,
    data: File,
    meta_file: File,
    queue: Arc<DiskQueue>,
}

/// Opens a file for direct I/O that leaves its time stamps alone, or at least for direct I/O.
fn open_direct(dir: &Path, name: &str, flags: i32) -> Result<File, Error> {
    let (path, flags) = (dir.join(name), libc::O_DIRECT | flags);
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path).context(|| format!("opening {}", path.display()))?;
    let directory = File::open(dir).context(|| format!("opening {}", dir.display()))?;
    Ok(xfs::reopen_without_times(&directory, &file, libc::O_RDWR | libc::O_CLOEXEC | flags).unwrap_or_else(|error| {
        debug!(%error, path = %path.display(), "opened with time stamps");
        file
    }))
}

impl OpenLeg {
    /// Opens and fences the leg in `dir`. Blocks: up to `limit` if an earlier process's writes are still on their way.
    pub(crate) fn open(dir: &Path, limit: Duration, before: Before) -> Result<Self, Error> {
        let path = dir.join("data");
        let data = open_direct(dir, "data", 0)?;
        let deadline = Instant::now() + limit;
        fence(&data, &path, deadline, before)?;
        let meta_path = dir.join("meta");
        let meta_file = open_direct(dir, "meta", libc::O_DSYNC)?;
        fence(&meta_file, &meta_path, deadline, before)?;
        let mut meta = Vec::new();
        File::open(&meta_path)
            .and_then(|file| file.take(format::META_LEN).read_to_end(&mut meta))
            .context(|| format!("reading {}", meta_path.display()))?;
        let about = data.metadata().context(|| format!("reading the size and the disk of {}", path.display()))?;
        let (len, queue) = (about.len(), DiskQueue::of(about.dev()));
        Ok(Self { dir: dir.to_owned(), meta, len, data, meta_file, queue })
    }

    /// Its data is as long as its own metadata says. What was cut off its end would come back as zeroes.
    pub(crate) fn whole(&self, blocks: u64) -> Result<(), Error> {
        let wanted = blocks * BLOCK_SIZE;
        if self.len < wanted { Err(Error::Truncated { path: self.dir.join("data"), found: self.len, wanted }) } else { Ok(()) }
    }

    /// Allocates whatever of the first `bytes` is not, so that no write meets a full disk (a discard from elsewhere may have punched).
    pub(crate) fn allocate(&self, bytes: u64) -> Result<(), Error> {
        allocate(&self.data, 0, bytes).context(|| format!("allocating {bytes} bytes for {}", self.dir.join("data").display()))
    }

    /// Hands the files to the datapath thread that calls this.
    pub(crate) fn into_files(self) -> Result<Rc<LegFiles>, Error> {
        let seek_file = self.data.try_clone().context(|| format!("opening {}", self.dir.display()))?;
        Ok(Rc::new(LegFiles {
            data: tokio_uring::fs::File::from_std(self.data),
            meta: tokio_uring::fs::File::from_std(self.meta_file),
            seek: Arc::new(seek_file),
            queue: self.queue,
            in_use: Default::default(),
            late: Cell::new(false),
        }))
    }
}

/// A leg's files on its datapath thread.
pub(crate) struct LegFiles {
    data: tokio_uring::fs::File,
    meta: tokio_uring::fs::File,
    seek: Arc<File>,
    queue: Arc<DiskQueue>,
    /// By class: buffers that I/O in flight has.
    in_use: [Cell<usize>; Class::ALL.len()],
    /// The leg is OUT: what is in flight is late.
    late: Cell<bool>,
}

/// A leg operation with its memory.
pub(crate) enum Prepared {
    Read { at: u64, window: Window },
    Write { at: u64, window: Window, fua: bool },
    Zero(BlockRange),
    Flush,
    NextData(BlockRange),
    WriteMeta { offset: u64, page: Page },
}

impl Prepared {
    /// `window` finds the memory of the operation's buffer.
    pub(crate) fn new(op: LegOp, window: impl FnOnce(lockstep_core::io::Buffer, BlockRange) -> Window) -> Self {
        match op {
            LegOp::Read { range, buffer } => Self::Read { at: range.byte_offset(), window: window(buffer, range) },
            LegOp::Write { range, buffer, fua } => Self::Write { at: range.byte_offset(), window: window(buffer, range), fua },
            LegOp::Zero { range } => Self::Zero(range),
            LegOp::Flush => Self::Flush,
            LegOp::NextData { range } => Self::NextData(range),
            LegOp::WriteMeta { offset, page } => Self::WriteMeta { offset, page },
        }
    }

    /// What of the metadata it writes.
    pub(crate) fn meta_page(&self) -> Option<MetaPage> {
        match self {
            Self::WriteMeta { offset, page } => Some(MetaPage::of(*offset, page)),
            _ => None,
        }
    }

    /// What a log calls it, and how many bytes it is to move.
    pub(crate) fn described(&self) -> (&'static str, u64) {
        match self {
            Self::Read { window, .. } => ("read", window.bytes_total() as u64),
            Self::Write { window, .. } => ("write", window.bytes_total() as u64),
            Self::Zero(_) => ("zero", 0),
            Self::Flush => ("flush", 0),
            Self::NextData(_) => ("next data", 0),
            Self::WriteMeta { .. } => ("metadata", 0),
        }
    }
}

pub(crate) fn errno(error: &io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(libc::EIO))
}

fn outcome(result: io::Result<u64>) -> Outcome {
    match result {
        Ok(bytes) => Outcome::Done(bytes),
        Err(error) => Outcome::Failed(errno(&error)),
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

/// What the kernel uses until an operation's end.
struct InFlight {
    _files: Rc<LegFiles>,
    _window: Window,
    _place: Place,
}

struct Transferred;

impl OneshotOutputTransform for Transferred {
    type Output = io::Result<u64>;
    type StoredData = InFlight;
    fn transform_oneshot_output(self, _: InFlight, entry: cqueue::Entry) -> io::Result<u64> {
        u64::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()))
    }
}

/// Reads or writes a file of the leg.
fn transfer(
    files: &Rc<LegFiles>,
    file: &tokio_uring::fs::File,
    direction: Direction,
    mut window: Window,
    at: u64,
) -> InFlightOneshot<InFlight, Transferred> {
    let (memory, bytes) = (window.stable_mut_ptr(), window.bytes_total());
    let (fd, len) = (types::Fd(file.as_raw_fd()), bytes as u32);
    let entry = match (direction, window.registered()) {
        (Direction::Read, true) => opcode::ReadFixed::new(fd, memory, len, 0).offset(at).build(),
        (Direction::Read, false) => opcode::Read::new(fd, memory, len).offset(at).build(),
        (Direction::Write, true) => opcode::WriteFixed::new(fd, memory, len, 0).offset(at).build(),
        (Direction::Write, false) => opcode::Write::new(fd, memory, len).offset(at).build(),
    };
    let place = files.queue.enter(bytes);
    let entry = if place.beyond { entry.flags(squeue::Flags::ASYNC) } else { entry };
    // What the entry points to is in `InFlight`, which the ring keeps to the operation's end, also if nobody waits for it any more.
    let in_flight = InFlight { _files: Rc::clone(files), _window: window, _place: place };
    UnsubmittedOneshot::new(in_flight, Transferred, entry).submit()
}

impl LegFiles {
    /// The leg is OUT: whatever memory its I/O has, nobody waits for it.
    pub(crate) fn let_go(&self, pool: &Pool) {
        if !self.late.replace(true) {
            Class::ALL.into_iter().for_each(|class| pool.replace(class, self.in_use[class as usize].get()));
        }
    }

    /// Does it.
    pub(crate) async fn perform(self: &Rc<Self>, pool: &Rc<Pool>, op: Prepared) -> Outcome {
        let class = match &op {
            Prepared::Read { window, .. } | Prepared::Write { window, .. } => Some(window.class()),
            _ => None,
        };
        let in_use = class.map(|class| (class, &self.in_use[class as usize]));
        if let Some((class, in_use)) = in_use {
            in_use.set(in_use.get() + 1);
            if self.late.get() {
                pool.replace(class, 1);
            }
        }
        let outcome = self.perform_now(pool, op).await;
        if let Some((class, in_use)) = in_use {
            in_use.set(in_use.get() - 1);
            if self.late.get() {
                pool.no_longer_late(class);
            }
        }
        outcome
    }

    async fn perform_now(self: &Rc<Self>, pool: &Rc<Pool>, op: Prepared) -> Outcome {
        match op {
            Prepared::Read { at, window } => outcome(transfer(self, &self.data, Direction::Read, window, at).await),
            Prepared::Write { at, window, fua } => {
                let written = transfer(self, &self.data, Direction::Write, window, at).await;
                if fua && written.is_ok() {
                    return outcome(self.data.sync_data().await.and(written));
                }
                outcome(written)
            }
            Prepared::Zero(range) => {
                outcome(self.data.fallocate(range.byte_offset(), range.byte_len(), ZERO_KEEPING_SPACE).await.map(|()| 0))
            }
            Prepared::Flush => outcome(self.data.sync_data().await.map(|()| 0)),
            Prepared::NextData(range) => self.next_data(range).await,
            Prepared::WriteMeta { offset, page } => {
                // The record that a disk hangs must not wait for that disk.
                let mut buffer = pool.take_or_make(Class::Meta);
                buffer.bytes_mut().copy_from_slice(page.as_slice());
                let window = Window::new(Rc::new(buffer), 0, page.len());
                match transfer(self, &self.meta, Direction::Write, window, offset).await {
                    Ok(written) if written == page.len() as u64 => Outcome::Done(0),
                    Ok(_) => Outcome::Failed(Errno::EIO),
                    Err(error) => Outcome::Failed(errno(&error)),
                }
            }
        }
    }

    /// There is no ring operation for SEEK_DATA.
    async fn next_data(&self, range: BlockRange) -> Outcome {
        let file = Arc::clone(&self.seek);
        let found = tokio::task::spawn_blocking(move || {
            let start = match seek(&file, SeekFrom::Data(range.byte_offset())) {
                Ok(start) => start / BLOCK_SIZE,
                Err(rustix::io::Errno::NXIO) => return Ok(None),
                Err(error) => return Err(error),
            };
            if start >= range.end {
                return Ok(None);
            }
            let end = seek(&file, SeekFrom::Hole(start * BLOCK_SIZE))?.div_ceil(BLOCK_SIZE);
            Ok(Some(BlockRange::new(start.max(range.start), end.min(range.end))))
        });
        match found.await {
            Ok(Ok(extent)) => Outcome::Extent(extent),
            Ok(Err(error)) => Outcome::Failed(Errno(error.raw_os_error())),
            Err(_) => Outcome::Failed(Errno::EIO),
        }
    }
}
