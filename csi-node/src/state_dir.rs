//! The state directory: what a node keeps off the mirrored disks.
//!
//! ```text
//! lock                 held for life: one csi-node a state directory
//! disks/<fs-uuid>/     where the disks are mounted
//! formatting/<uuid>    a disk's mkfs began
//! witness/<uid>        a volume's witness
//! staged/<uid>.yaml    what is needed to serve a staged volume again
//! assembling/<uid>     how often csi-node ended while it assembled a volume's mirror
//! deleted/<uid>        a volume that was deleted while one of its disks was away
//! run/<uid>            a volume's FUSE file
//! ```

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task,
};

/// What goes wrong with the state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another csi-node has it.
    #[error("{0} is in use by another csi-node: end that one first, or give this one a --state-dir of its own")]
    InUse(PathBuf),
    /// A file cannot be understood. It is never overwritten.
    #[error("{path} cannot be read: {reason}. Repair it, or move it away")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The system failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// How long a csi-node that was killed, and its children, may take to end.
const DYING_GRACE: Duration = Duration::from_secs(2);

/// An open state directory.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    _lock: File,
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> StateError + '_ {
    |source| StateError::Io { path: path.to_owned(), source }
}

impl StateDir {
    /// Opens it, makes it if it is not there, and locks it until the process ends. A lock is waited for for a moment: a child of a csi-node that was
    /// killed has it until it becomes another program. `before_is_dying`: whoever may have it was killed and cannot end; it is passed over then.
    ///
    /// # Errors
    /// `StateError::InUse` if another process has it.
    pub fn open(root: &Path, before_is_dying: bool) -> Result<Self, StateError> {
        for dir in ["disks", "formatting", "witness", "staged", "assembling", "deleted", "run"] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).map_err(io_error(&dir))?;
        }
        // Mount points are compared with what the kernel says, which knows no links.
        let root = root.canonicalize().map_err(io_error(root))?;
        let path = root.join("lock");
        let open = || File::options().create(true).append(true).open(&path).map_err(io_error(&path));
        let lock = |file: File| flock(&file, FlockOperation::NonBlockingLockExclusive).ok().map(|()| file);
        let mut locked = lock(open()?);
        let patience = Instant::now() + DYING_GRACE;
        while locked.is_none() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(20));
            locked = lock(open()?);
        }
        if locked.is_none() && before_is_dying {
            // The dying one keeps the lock of a file that has no name any more.
            fs::remove_file(&path).map_err(io_error(&path))?;
            locked = lock(open()?);
        }
        let lock = locked.ok_or_else(|| StateError::InUse(root.clone()))?;
        Ok(Self { root, _lock: lock })
    }

    /// Where the disk with this file system is mounted.
    pub fn disk_mount(&self, fs_uuid: &str) -> PathBuf {
        self.root.join("disks").join(fs_uuid)
    }

    /// The record of a mkfs that began.
    pub fn formatting(&self, fs_uuid: &str) -> PathBuf {
        self.root.join("formatting").join(fs_uuid)
    }

    /// All of them.
    pub fn formatting_dir(&self) -> PathBuf {
        self.root.join("formatting")
    }

    /// A volume's witness.
    pub fn witness(&self, uid: &str) -> PathBuf {
        self.root.join("witness").join(uid)
    }

    /// A volume's staged record.
    pub fn staged(&self, uid: &str) -> PathBuf {
        self.root.join("staged").join(format!("{uid}.yaml"))
    }

    /// There while its ext4 is given more space.
    pub fn growing(&self, uid: &str) -> PathBuf {
        self.root.join("staged").join(format!("{uid}.growing"))
    }

    /// All of them.
    pub fn staged_dir(&self) -> PathBuf {
        self.root.join("staged")
    }

    /// How often csi-node ended while it assembled a volume's mirror.
    pub fn assembling(&self, uid: &str) -> PathBuf {
        self.root.join("assembling").join(uid)
    }

    /// The record of a volume that was deleted while one of its disks was away.
    pub fn deleted(&self, uid: &str) -> PathBuf {
        self.root.join("deleted").join(uid)
    }

    /// All of them.
    pub fn deleted_dir(&self) -> PathBuf {
        self.root.join("deleted")
    }

    /// Where the volumes' FUSE files are.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }
}

/// Waits for the node's own disk, and whoever else is served by this thread does not: that disk may hang too.
fn waiting<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => task::block_in_place(work),
        _ => work(),
    }
}

/// Writes a record durably: the old one or the new one is there, also after a power cut.
///
/// # Errors
/// `StateError::Io`.
pub fn write_record<T: Serialize>(path: &Path, record: &T) -> Result<(), StateError> {
    let text = serde_saphyr::to_string(record).map_err(|error| io_error(path)(io::Error::other(error)))?;
    let (dir, name) = (path.parent().unwrap_or(Path::new("/")), path.file_name().unwrap_or_default());
    let temporary = dir.join(format!(".{}.new", name.to_string_lossy()));
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(dir)?.sync_all()
    };
    waiting(write).map_err(io_error(path))
}

/// What is in one of its directories.
///
/// # Errors
/// `StateError::Io`.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>, StateError> {
    let list = || Ok(fs::read_dir(dir)?.flatten().map(|entry| entry.path()).collect());
    waiting(list).map_err(io_error(dir))
}

/// Whether a record is there, readable or not.
pub fn has_record(path: &Path) -> bool {
    waiting(|| path.exists())
}

/// Reads one. `None`: it is not there.
///
/// # Errors
/// `StateError::Unreadable`.
pub fn read_record<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let unreadable = |reason: String| StateError::Unreadable { path: path.to_owned(), reason };
    match waiting(|| fs::read_to_string(path)) {
        Ok(text) => serde_saphyr::from_str(&text).map(Some).map_err(|error| unreadable(error.to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(error.to_string())),
    }
}

/// Removes one durably. Not there: nothing done.
///
/// # Errors
/// `StateError::Io`.
pub fn remove_record(path: &Path) -> Result<(), StateError> {
    let remove = || fs::remove_file(path).and_then(|()| File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all());
    match waiting(remove) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn a_state_directory_has_one_csi_node() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::open(dir.path(), false).unwrap();
        assert!(matches!(StateDir::open(dir.path(), false), Err(StateError::InUse(_))));
        // It was killed and hangs: its successor is alone all the same.
        let second = StateDir::open(dir.path(), true).unwrap();
        assert!(matches!(StateDir::open(dir.path(), false), Err(StateError::InUse(_))));
        drop((first, second));
        StateDir::open(dir.path(), false).unwrap();
    }

    #[test]
    fn a_damaged_record_is_named_and_an_absent_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.yaml");
        assert_eq!(read_record::<Vec<u8>>(&path).unwrap(), None);
        write_record(&path, &vec![1, 2]).unwrap();
        assert_eq!(read_record::<Vec<u8>>(&path).unwrap(), Some(vec![1, 2]));
        fs::write(&path, "{").unwrap();
        assert!(read_record::<Vec<u8>>(&path).unwrap_err().to_string().contains("r.yaml"));
        remove_record(&path).unwrap();
        remove_record(&path).unwrap();
    }

    #[test]
    fn while_a_record_is_waited_for_others_are_served() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let (started, has_started) = mpsc::channel();
        let (served, is_served) = mpsc::channel();
        let record = runtime.spawn({
            let path = path.clone();
            async move {
                started.send(()).unwrap();
                read_record::<Vec<u8>>(&path)
            }
        });
        has_started.recv().unwrap();
        runtime.spawn(async move { served.send(()).unwrap() });
        let waited = is_served.recv_timeout(DYING_GRACE * 5);
        // The pipe has a reader until something was written.
        fs::write(path, "[1]").unwrap();
        assert_eq!(runtime.block_on(record).unwrap().unwrap(), Some(vec![1]));
        waited.expect("the other task is served");
    }
}
