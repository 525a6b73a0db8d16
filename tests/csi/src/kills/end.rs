//! The ends themselves.

use std::{
    fs,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::memory::MemoryGroup;

const MIB: u64 = 1 << 20;
/// Longer than this nobody takes to be killed for want of memory, but where what could be freed is being written to a disk that hangs.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends csi-node a signal.
pub(super) fn signal(node: &Child, signal: Signal) {
    kill_process(Pid::from_child(node), signal).expect("it is ours");
}

/// How a process ends, if it does in this time.
pub(super) fn ends(process: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    while process.try_wait().expect("it was started").is_none() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    process.try_wait().expect("it was started")
}

/// What each thread of a process does in the kernel.
pub(super) fn threads(process: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let of = |task: &Path, file: &str| fs::read_to_string(task.join(file)).unwrap_or_default();
    let said = tasks.map(|task| task.path()).map(|task| {
        let stat = of(&task, "stat");
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('?');
        format!("{} {state}\n{}", of(&task, "comm").trim(), of(&task, "stack"))
    });
    said.collect::<Vec<_>>().join("\n")
}

/// Whether it was killed, although a thread of it may hang in the kernel and keep it from ending.
fn is_dying(node: &mut Child) -> bool {
    if node.try_wait().expect("it was started").is_some() {
        return true;
    }
    let status = fs::read_to_string(format!("/proc/{}/status", node.id())).unwrap_or_default();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let pending = field("SigPnd:").and_then(|bits| u64::from_str_radix(bits, 16).ok()).unwrap_or(0);
    pending & (1 << (Signal::KILL.as_raw() - 1)) != 0 || field("State:").is_none_or(|state| state.starts_with(['Z', 'X']))
}

/// Somebody beside csi-node takes all the memory of the group, and csi-node is the one that the kernel kills for it. Until it is dying; `false`: nobody
/// killed it. Who took the memory is killed and may end only when the next csi-node serves: it may wait for a page of the group's that is being
/// written to a volume.
pub(super) fn exhaust(group: &MemoryGroup, node: &mut Child) -> (Child, bool) {
    const LIMIT: &str = "memory.limit_in_bytes";
    fs::write(format!("/proc/{}/oom_score_adj", node.id()), "1000").expect("it may be raised");
    group.set(LIMIT, group.get("memory.usage_in_bytes") + 4 * MIB);
    let [shell, enter @ ..] = group.enter();
    let mut hog = Command::new(shell);
    hog.args(enter).args(["tail", "/dev/zero"]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut hog = hog.spawn().expect("a shell");
    let deadline = Instant::now() + PATIENCE;
    while !is_dying(node) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    group.set(LIMIT, -1);
    drop(hog.kill());
    (hog, is_dying(node))
}
