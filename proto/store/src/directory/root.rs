//! The directory itself: made when it is opened, and then only looked for.
//!
//! `<root>/.lock` serializes writers and holds an id that was drawn when the directory was made. A directory without it, or with another
//! one, is not the one that was opened: it was moved away, or a file system was mounted or unmounted. Nothing in it may be taken for
//! absent then, and nothing is made in it.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

use super::failed;
use crate::Error;

/// What the name of a file begins with until it is whole. A dot file: nobody takes it for an object.
pub(super) const TEMPORARY: &str = ".writing-";

/// A directory that was opened.
#[derive(Clone, Debug)]
pub(super) struct Root {
    path: PathBuf,
    id: String,
}

impl Root {
    /// Opens it; makes it if it is not there.
    pub(super) fn open(path: PathBuf) -> Result<Self, Error> {
        make_dirs(&path).map_err(|source| failed("creating", &path, source))?;
        let lock_path = path.join(".lock");
        let lock = File::options().create(true).read(true).append(true).open(&lock_path);
        let (mut lock, mut id) = locked(&lock_path, lock)?;
        if id.is_empty() {
            id = uuid::Uuid::new_v4().to_string();
            let kept = lock.write_all(id.as_bytes()).and_then(|()| lock.sync_all()).and_then(|()| sync(&path));
            kept.map_err(|source| failed("writing", &lock_path, source))?;
        }
        sweep(&path);
        Ok(Self { path, id })
    }

    /// The directory of a kind. It need not be there.
    pub(super) fn kind(&self, plural: &str) -> PathBuf {
        self.path.join(plural)
    }

    /// Makes the directory of a kind. The lock must be held: so the root is there.
    pub(super) fn make_kind(&self, plural: &str, _lock: &File) -> Result<(), Error> {
        let dir = self.kind(plural);
        let made = match fs::create_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.and_then(|()| sync(&self.path)),
        };
        made.map_err(|source| failed("creating", &dir, source))
    }

    /// Keeps other writers out, of all processes, until it is dropped.
    ///
    /// # Errors
    /// `Error::Io`, also if the directory is not the one that was opened.
    pub(super) fn lock(&self) -> Result<File, Error> {
        let path = self.path.join(".lock");
        let (lock, id) = locked(&path, File::open(&path))?;
        self.compare(&id).map(|()| lock)
    }

    /// Whether the directory is the one that was opened.
    ///
    /// # Errors
    /// `Error::Io` if it is not.
    pub(super) fn check(&self) -> Result<(), Error> {
        let path = self.path.join(".lock");
        self.compare(&fs::read_to_string(&path).map_err(|source| failed("reading", &path, source))?)
    }

    fn compare(&self, id: &str) -> Result<(), Error> {
        if id == self.id {
            return Ok(());
        }
        let other = io::Error::other("another object directory is here than the one that was opened: put that one back, or restart");
        Err(failed("looking at", &self.path, other))
    }
}

/// Removes what writers left that were killed. The lock must be held: nobody is writing. What cannot be looked at (a lost+found) or
/// removed stays: it does no harm.
fn sweep(root: &Path) {
    let kinds = fs::read_dir(root).into_iter().flatten().flatten().filter(|kind| kind.file_type().is_ok_and(|kind| kind.is_dir()));
    for file in kinds.flat_map(|kind| fs::read_dir(kind.path())).flatten().flatten() {
        if file.file_name().as_encoded_bytes().starts_with(TEMPORARY.as_bytes()) {
            drop(fs::remove_file(file.path()));
        }
    }
}

/// The lock file, locked, and what is in it.
fn locked(path: &Path, opened: io::Result<File>) -> Result<(File, String), Error> {
    let mut lock = opened.map_err(|source| failed("opening", path, source))?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|errno| failed("locking", path, errno.into()))?;
    let mut id = String::new();
    lock.read_to_string(&mut id).map_err(|source| failed("reading", path, source))?;
    Ok((lock, id))
}

/// Makes a directory and those above it, to stay.
fn make_dirs(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_dirs(parent)?;
    match fs::create_dir(path) {
        // Another process was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        made => made?,
    }
    sync(parent)
}

/// Makes durable what was made, renamed or removed in a directory.
pub(super) fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all())
}
