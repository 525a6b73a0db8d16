//! Whether a process can still do anything.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Result,
    process::{Pid, PidfdFlags, pidfd_open},
};

/// What becomes of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Alive,
    /// It was killed, or is exiting: none of its threads will run code of its own again. One that hangs in the kernel, on a dead disk, keeps it
    /// from ending for as long as it hangs, and with it all that it has open.
    Dying,
    Ended,
}

/// A process that is or was a client.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    pidfd: OwnedFd,
}

impl Process {
    /// Of a peer that is connected, so that its number is still its own.
    pub(crate) fn of(pid: Pid) -> Result<Self> {
        Ok(Self { pid, pidfd: pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// What has become of it.
    pub(crate) fn fate(&self) -> Fate {
        if self.ended() {
            return Fate::Ended;
        }
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        if ending(&stat) { Fate::Dying } else { Fate::Alive }
    }

    fn ended(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(n) if n > 0)
    }
}

/// From a process's `/proc/PID/stat`: a signal ends it, or it exits. A signal: the last field is the code that its parent will get, and is 0 or that of
/// a stop (SIGSTOP and its like) before. An exit, whose code may be 0: its first thread is over, which for a client ends only with the process.
fn ending(stat: &str) -> bool {
    const STOPS: [u32; 4] = [19, 20, 21, 22];
    const PF_EXITING: u32 = 4;
    // The name may have anything in it.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace().collect();
    let number = |field: Option<&&str>| field.and_then(|field| field.parse::<u32>().ok()).unwrap_or(0);
    let signal = number(fields.last()) & 0x7f;
    let over = matches!(fields.first(), Some(&("Z" | "X"))) || number(fields.get(6)) & PF_EXITING != 0;
    over || signal != 0 && !STOPS.contains(&signal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_lives_until_it_is_killed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(Pid::from_child(&child)).unwrap();
        assert_eq!(process.fate(), Fate::Alive);
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while process.fate() == Fate::Alive {
            assert!(std::time::Instant::now() < deadline);
        }
        child.wait().unwrap();
        assert_eq!(process.fate(), Fate::Ended);
    }

    #[test]
    fn a_process_that_is_stopped_or_hangs_is_alive_and_one_that_a_signal_or_its_exit_ends_is_dying() {
        assert!(!ending("7 (a) Z 1) S 1 7 7 0 -1 4194304 0 0"));
        assert!(!ending("7 (a) T 1 7 7 0 -1 1077936192 0 19\n"));
        assert!(!ending("7 (a) D 1 7 7 0 -1 64 0 0"));
        assert!(ending("7 (a) S 1 7 7 0 -1 64 0 9\n") && ending("7 (a) D 1 7 7 0 -1 64 0 134\n"), "a signal");
        assert!(ending("7 (a) Z 1 7 7 0 -1 4194304 0 0") && ending("7 (a) D 1 7 7 0 -1 4194308 0 0"), "an exit");
        assert!(!ending("") && !ending("7 (a"));
    }
}
