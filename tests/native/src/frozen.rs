//! A file system that the kernel holds still (FIFREEZE): writes to it wait, reads do not.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use crate::text;

/// Keeps the file system open, so that it can be thawed after it was unmounted too; and thaws it when its standard input ends, however we do.
const KEEPER: &str = r#"
trap '' INT TERM HUP
exec 3<"$1" || exit 1
fsfreeze --freeze /proc/self/fd/3 || exit 1
echo frozen
read -r _
fsfreeze --unfreeze /proc/self/fd/3
"#;

/// A frozen file system, until it is dropped.
#[derive(Debug)]
pub struct Frozen(Child);

impl Frozen {
    /// Freezes what is mounted there.
    pub fn freeze(mount: &Path) -> Self {
        let mut keeper = Command::new("sh");
        keeper.args(["-c", KEEPER, "sh", text(mount)]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut keeper = keeper.spawn().expect("a shell");
        let said = BufReader::new(keeper.stdout.take().expect("piped")).lines().next();
        assert!(said.is_some_and(|line| line.is_ok_and(|line| line == "frozen")), "{} cannot be frozen", mount.display());
        Self(keeper)
    }

    /// Freezes what is mounted at these places, for so long. It is over when the thread is.
    pub fn freeze_for(mounts: &[PathBuf], time: Duration) -> thread::JoinHandle<()> {
        let frozen: Vec<_> = mounts.iter().map(|mount| Self::freeze(mount)).collect();
        thread::spawn(move || {
            thread::sleep(time);
            drop(frozen);
        })
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        drop(self.0.wait());
    }
}
