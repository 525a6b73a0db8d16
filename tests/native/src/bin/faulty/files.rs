//! The file system: what lies in the backing directory, with direct I/O only. Files are made and removed in the backing directory itself.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, WriteFlags,
};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use crate::fates::{Asked, Fate, Fates};

/// Files change beneath.
const NO_TIME: Duration = Duration::ZERO;

#[derive(Clone)]
struct Open {
    file: Arc<File>,
    /// A disk's block is old or new, never half of each.
    one_at_a_time: Arc<RwLock<()>>,
    /// `meta`, not `data`.
    meta: bool,
}

pub(crate) struct Files {
    fates: Arc<Fates>,
    depth: u16,
    paths: Mutex<HashMap<u64, PathBuf>>,
    open: Mutex<HashMap<u64, Open>>,
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

fn attributes(path: &Path, root: &Path) -> io::Result<FileAttr> {
    let found = fs::metadata(path)?;
    let kind = if found.is_dir() { FileType::Directory } else { FileType::RegularFile };
    Ok(FileAttr {
        ino: if path == root { INodeNo::ROOT } else { INodeNo(found.ino()) },
        size: found.len(),
        blocks: found.blocks(),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: if found.is_dir() { 0o700 } else { 0o600 },
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    })
}

/// As much as there is of it.
fn read_at(file: &File, offset: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], offset + filled as u64)? {
            0 => break,
            more => filled += more,
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

impl Files {
    pub(crate) fn new(backing: &Path, depth: u16, fates: Arc<Fates>) -> Self {
        let paths = Mutex::new(HashMap::from([(INodeNo::ROOT.0, backing.to_owned())]));
        Self { fates, depth, paths, open: Mutex::default() }
    }

    fn path(&self, ino: INodeNo) -> Option<PathBuf> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner).get(&ino.0).cloned()
    }

    fn root(&self) -> PathBuf {
        self.path(INodeNo::ROOT).expect("the root stays")
    }

    fn file(&self, handle: FileHandle) -> Option<Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).get(&handle.0).cloned()
    }

    /// Decides about a request that only succeeds or fails.
    fn plain(&self, asked: Asked, reply: ReplyEmpty, work: impl FnOnce() -> io::Result<()> + Send + 'static) {
        self.fates.decide(asked, move |fate| {
            let result = match fate {
                Fate::Failed(number, _) => Err(io::Error::from_raw_os_error(number)),
                Fate::Done | Fate::Short(_) => work(),
            };
            Box::new(move || match result {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            })
        });
    }
}

impl Filesystem for Files {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let refused = |_| io::Error::from_raw_os_error(libc::EPROTO);
        // Without it nothing is reordered; and a ring reads what follows a short count from the wrong place (Linux 6.18).
        config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).map_err(|_| io::Error::from_raw_os_error(libc::EPROTO))?;
        config.set_max_write(1 << 20).map_err(refused)?;
        for set in [KernelConfig::set_max_background, KernelConfig::set_congestion_threshold] {
            set(config, self.depth).map_err(|_| io::Error::from_raw_os_error(libc::EPROTO))?;
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(path) = self.path(parent).map(|parent| parent.join(name)) else { return reply.error(Errno::ENOENT) };
        match attributes(&path, &self.root()) {
            Ok(attributes) => {
                self.paths.lock().unwrap_or_else(PoisonError::into_inner).insert(attributes.ino.0, path);
                reply.entry(&NO_TIME, &attributes, Generation(0));
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let Some(path) = self.path(ino) else { return reply.error(Errno::ENOENT) };
        match attributes(&path, &self.root()) {
            Ok(attributes) => reply.attr(&NO_TIME, &attributes),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let Some(path) = self.path(ino) else { return reply.error(Errno::ENOENT) };
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => {
                let meta = path.file_name() == Some(OsStr::new("meta"));
                let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
                let handle = (1..).find(|number| !open.contains_key(number)).expect("few are open");
                open.insert(handle, Open { file: Arc::new(file), one_at_a_time: Arc::default(), meta });
                let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES | FopenFlags::FOPEN_NOFLUSH;
                reply.opened(FileHandle(handle), flags);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn release(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, _: Option<LockOwner>, _: bool, reply: ReplyEmpty) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&handle.0);
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(Open { file, one_at_a_time, meta }) = self.file(handle) else { return reply.error(Errno::EBADF) };
        let len = u64::from(size);
        if meta {
            // Read at opening only, and not through the shell's ring.
            return match read_at(&file, offset, len) {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(errno(&error)),
            };
        }
        self.fates.decide(Asked::Read(len), move |fate| {
            let _shared = one_at_a_time.read();
            let read = match fate {
                Fate::Done => read_at(&file, offset, len),
                Fate::Short(part) => read_at(&file, offset, part),
                Fate::Failed(number, _) => Err(io::Error::from_raw_os_error(number)),
            };
            Box::new(move || match read {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(errno(&error)),
            })
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(Open { file, one_at_a_time, meta }) = self.file(handle) else { return reply.error(Errno::EBADF) };
        let (data, len) = (data.to_vec(), data.len() as u64);
        let asked = if meta { Asked::Meta } else { Asked::Write(len) };
        self.fates.decide(asked, move |fate| {
            let (part, failure) = match fate {
                Fate::Done => (len, None),
                Fate::Short(part) => (part, None),
                Fate::Failed(number, part) => (part, Some(number)),
            };
            let _alone = one_at_a_time.write();
            // Whole blocks: rather more than it says than half of one.
            let written = file.write_all_at(&data[..part.next_multiple_of(4096).min(len) as usize], offset);
            let written = written.and(failure.map_or(Ok(()), |number| Err(io::Error::from_raw_os_error(number))));
            Box::new(move || match written {
                Ok(()) => reply.written(part as u32),
                Err(error) => reply.error(errno(&error)),
            })
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // Nothing here is to survive a power cut.
        self.plain(Asked::Flush, reply, || Ok(()));
    }

    fn fallocate(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: u64, length: u64, mode: i32, reply: ReplyEmpty) {
        let Some(Open { file, one_at_a_time, .. }) = self.file(handle) else { return reply.error(Errno::EBADF) };
        let Some(flags) = FallocateFlags::from_bits(mode as u32) else { return reply.error(Errno::EOPNOTSUPP) };
        let work = move || {
            let _alone = one_at_a_time.write();
            Ok(fallocate(&*file, flags, offset, length)?)
        };
        if flags.contains(FallocateFlags::ZERO_RANGE) {
            return self.plain(Asked::Zero, reply, work);
        }
        // Space is made sure of at opening only, and not through the shell's ring.
        match work() {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn lseek(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let Some(Open { file, .. }) = self.file(handle) else { return reply.error(Errno::EBADF) };
        let at = offset as u64;
        self.fates.decide(Asked::Seek, move |fate| {
            let found: io::Result<u64> = match (fate, whence) {
                (Fate::Failed(number, _), _) => Err(io::Error::from_raw_os_error(number)),
                (_, libc::SEEK_DATA) => seek(&*file, SeekFrom::Data(at)).map_err(Into::into),
                (_, libc::SEEK_HOLE) => seek(&*file, SeekFrom::Hole(at)).map_err(Into::into),
                _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            };
            Box::new(move || match found {
                Ok(at) => reply.offset(at as i64),
                Err(error) => reply.error(errno(&error)),
            })
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 4096, 255, 4096);
    }
}
