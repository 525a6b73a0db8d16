//! Work that may wait for a device which this very process serves, done by a process of its own.
//!
//! ```text
//! send --> /proc/self/exe --errand PID NAME JSON --> serve, first of all in main: run --> JSON --> send
//! ```
//! A process that is killed ends when its last thread has ended. One that waits for a device of this process's ends when the device is served, and with
//! a holder that is when the next process serves it; but who starts the next one waits for the end of this one. So such work is done by a child. It has
//! none of this process's descriptors, memory or standard streams, is not in its cgroup, is not killed with it, and goes on when the device is served again.
//!
//! Who comes after finds the work done or under way, or does it himself: so an errand is one step, that may be repeated. One whose process is gone
//! before it began does nothing.

use std::{
    env, fs,
    io::{self, Write},
    os::unix::process::{CommandExt, parent_id},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio, exit, id},
    sync::atomic::{AtomicBool, Ordering},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{device, isolated::isolated};

/// Tells an errand from all that a person would want of the program.
const MARK: &str = "--errand";

/// Whether this program does errands when it is started for one.
static SERVED: AtomicBool = AtomicBool::new(false);

/// One piece of work, as it is sent.
pub trait Errand: Serialize + DeserializeOwned + Send + 'static {
    /// What it is known by.
    const NAME: &'static str;
    /// What comes back.
    type Answer: Serialize + DeserializeOwned + Send + 'static;

    /// Does it.
    fn run(self) -> Self::Answer;
}

/// What a system call said, as it is sent: its error number.
pub type Said<T> = Result<T, i32>;

/// An error's number.
pub fn number(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Does one kind of errand.
#[derive(Clone, Copy, Debug)]
pub struct Handler {
    name: &'static str,
    run: fn(&str) -> serde_json::Result<String>,
}

impl Handler {
    /// For this kind.
    pub const fn of<E: Errand>() -> Self {
        Self { name: E::NAME, run: |asked| serde_json::to_string(&serde_json::from_str::<E>(asked)?.run()) }
    }
}

/// The first thing that `main` does. Started for an errand, of `own` or of the datapath's, the process does it and ends; otherwise errands are sent to
/// processes of their own from now on. In a program that does not call this they are done on a thread.
pub fn serve(own: &[Handler]) {
    let args: Vec<String> = env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let [_, mark, asker, name, asked] = args.as_slice() else { return SERVED.store(true, Ordering::Relaxed) };
    if mark != MARK {
        return SERVED.store(true, Ordering::Relaxed);
    }
    let handler = own.iter().chain(&device::ERRANDS).find(|handler| handler.name == name);
    let answer = match handler {
        _ if *asker != parent_id().to_string() => Err("who asked is gone".to_owned()),
        Some(handler) => (handler.run)(asked).map_err(|error| error.to_string()),
        None => Err(format!("{name}: no such errand")),
    };
    match answer {
        // Nobody is there any more who could read it: it is done all the same.
        Ok(answer) => drop(writeln!(io::stdout(), "{answer}")),
        Err(error) => {
            eprintln!("{error}");
            exit(1);
        }
    }
    exit(0)
}

/// Has it done, and waits for that. Blocks.
///
/// # Errors
/// If the process cannot be started, or ends without an answer.
pub fn send<E: Errand>(errand: E) -> io::Result<E::Answer> {
    if !SERVED.load(Ordering::Relaxed) {
        return Ok(isolated(move || errand.run()));
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg0(E::NAME).args([MARK, &id().to_string(), E::NAME, &serde_json::to_string(&errand)?]);
    let output = output_apart(&mut command)?;
    if !output.status.success() {
        return Err(io::Error::other(format!("{} ({}): {}", E::NAME, output.status, String::from_utf8_lossy(&output.stderr).trim())));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Runs a program to its end, apart from this process: in a process group of its own, and in no cgroup but the topmost. What ends this process's group or
/// container does not end it; and the container ends even while the program waits for a device that this process's successor will serve, which is
/// not started before. Blocks.
///
/// # Errors
/// If it cannot be started.
pub fn output_apart(command: &mut Command) -> io::Result<Output> {
    let command = command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn()?;
    for hierarchy in cgroup_hierarchies(Path::new("/sys/fs/cgroup")) {
        // Nothing that must be: in a container that does not see the host's cgroups it stays where it is.
        drop(fs::write(hierarchy.join("cgroup.procs"), child.id().to_string()));
    }
    child.wait_with_output()
}

/// The topmost cgroup of each hierarchy. Version 2: there is one. Version 1: one for each directory.
fn cgroup_hierarchies(mounted: &Path) -> Vec<PathBuf> {
    if mounted.join("cgroup.procs").exists() {
        return vec![mounted.to_owned()];
    }
    fs::read_dir(mounted).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// As `send`, of an errand that comes back with an error number: that is the error.
///
/// # Errors
/// Those of `send`, and what the system said.
pub fn ask<T>(errand: impl Errand<Answer = Said<T>>) -> io::Result<T> {
    send(errand)?.map_err(io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Open(String);

    impl Errand for Open {
        const NAME: &'static str = "open";
        type Answer = Said<u64>;
        fn run(self) -> Said<u64> {
            std::fs::metadata(&self.0).map(|meta| meta.len()).map_err(|error| number(&error))
        }
    }

    #[test]
    fn a_cgroup_below_the_topmost_is_no_hierarchy() {
        let dir = tempfile::tempdir().unwrap();
        for part in ["memory", "pids"] {
            fs::create_dir(dir.path().join(part)).unwrap();
        }
        let mut first = cgroup_hierarchies(dir.path());
        first.sort();
        assert_eq!(first, ["memory", "pids"].map(|part| dir.path().join(part)));
        fs::write(dir.path().join("cgroup.procs"), "").unwrap();
        assert_eq!(cgroup_hierarchies(dir.path()), [dir.path()]);
        assert!(cgroup_hierarchies(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn an_errand_comes_back_with_what_the_system_said() {
        let run = Handler::of::<Open>().run;
        assert_eq!(run("\"/nonexistent\"").unwrap(), format!("{{\"Err\":{}}}", libc::ENOENT));
        assert!(run("7").is_err());
        assert_eq!(send(Open("/nonexistent".into())).unwrap(), Err(libc::ENOENT));
        assert_eq!(ask(Open("/nonexistent".into())).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert!(send(Open("/".into())).unwrap().is_ok());
    }
}
