//! The cluster that `tests/e2e/up` made, seen from inside: kubectl, helm, the node's disks and processes.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

/// Namespace of the driver, and of what uses it.
pub const DRIVER: &str = "lockstep-system";
/// The namespace of the claims and pods.
pub const USER: &str = "default";

/// Runs a program, and gives what it printed.
pub fn run(program: impl AsRef<Path>, args: &[&str]) -> anyhow::Result<String> {
    run_with(program.as_ref(), args, "")
}

fn run_with(program: &Path, args: &[&str], input: &str) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    let mut child = command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("a pipe")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} {}: {}", program.display(), args.join(" "), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// kubectl, as a user types it.
pub fn kubectl(args: &[&str]) -> anyhow::Result<String> {
    run("kubectl", args)
}

/// Makes objects, or changes them.
pub fn apply(object: &Value) -> anyhow::Result<()> {
    run_with(Path::new("kubectl"), &["apply", "-f", "-"], &object.to_string()).map(drop)
}

/// One object, or all of a kind.
pub fn get(args: &[&str]) -> anyhow::Result<Value> {
    let text = kubectl(&[&["get", "-o", "json"], args].concat())?;
    Ok(serde_json::from_str(&text)?)
}

/// The objects of a kind.
pub fn list(args: &[&str]) -> anyhow::Result<Vec<Value>> {
    Ok(get(args)?["items"].as_array().cloned().unwrap_or_default())
}

/// The rest of a command, from the directory of the tests.
pub fn tool(name: &str, args: &[&str]) -> anyhow::Result<String> {
    run(Path::new(env!("CARGO_MANIFEST_DIR")).join(name), args)
}

/// Waits until there is what is wanted. Errors are asked again, and the last one is told.
pub fn until<T>(what: &str, seconds: u64, mut wanted: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        let last = match wanted() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => String::new(),
            Err(error) => format!(": {error:#}"),
        };
        ensure!(Instant::now() < deadline, "never within {seconds} s: {what}{last}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// A field of an object as text; empty if it is not there.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// A volume, by its claim.
pub fn volume_of(claim: &str) -> anyhow::Result<Value> {
    let claim = get(&["pvc", "-n", USER, claim])?;
    let volume = get(&["pv", text(&claim, "/spec/volumeName")])?;
    get(&["mirrorvolume", text(&volume, "/spec/csi/volumeHandle")])
}

/// The reason of a volume's condition Ready: Healthy, Degraded, ...
pub fn health(volume: &Value) -> &str {
    let conditions = volume["status"]["conditions"].as_array().map_or(&[][..], Vec::as_slice);
    conditions.iter().find(|condition| condition["type"] == "Ready").map_or("", |ready| text(ready, "/reason"))
}

/// Waits for a volume's health.
pub fn until_health(claim: &str, wanted: &str, seconds: u64) -> anyhow::Result<Value> {
    until(&format!("{claim} is {wanted}"), seconds, || {
        let volume = volume_of(claim)?;
        Ok((health(&volume) == wanted).then_some(volume))
    })
}

/// csi-node's state directory.
const STATE: &str = "/var/lib/lockstep";

/// Where a disk is mounted on the node.
pub fn mount_of(disk: &str) -> PathBuf {
    Path::new(STATE).join("disks").join(disk)
}

/// A volume's two copies, as files.
pub fn copies(volume: &Value) -> anyhow::Result<[PathBuf; 2]> {
    copies_below(Path::new(STATE), volume)
}

/// The same on the node with this state directory.
pub fn copies_below(state: &Path, volume: &Value) -> anyhow::Result<[PathBuf; 2]> {
    let uid = text(volume, "/metadata/uid");
    let file = |leg: &str| -> anyhow::Result<PathBuf> {
        let (disk, id) = (text(volume, &format!("/status/legs/{leg}/disk")), text(volume, &format!("/status/legs/{leg}/legId")));
        let file = state.join(format!("disks/{disk}/volumes/{uid}.{id}/data"));
        ensure!(file.exists(), "no {}", file.display());
        Ok(file)
    };
    Ok([file("0")?, file("1")?])
}

/// Waits until nobody uses a claim's volume, and compares its two copies with `cmp`. Their size in MiB.
pub fn compare(claim: &str) -> anyhow::Result<u64> {
    let volume = until("the volume is given back", 60, || {
        let volume = volume_of(claim)?;
        Ok(text(&volume, "/status/device").is_empty().then_some(volume))
    })?;
    let copies = copies(&volume)?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let [a, b] = copies.each_ref().map(|copy| copy.to_str().unwrap_or_default());
    run("cmp", &[a, b]).with_context(|| format!("the copies of {claim} differ"))?;
    Ok(fs::metadata(&copies[0])?.len() >> 20)
}

/// Waits until a pod is in a phase.
pub fn until_pod(name: &str, phase: &str, seconds: u64) -> anyhow::Result<Value> {
    until(&format!("pod {name} is {phase}"), seconds, || {
        let pod = get(&["pod", "-n", USER, name])?;
        let now = text(&pod, "/status/phase");
        ensure!(phase == "Failed" || now != "Failed", "it is Failed: {}", kubectl(&["logs", "-n", USER, name, "--tail=5"])?);
        Ok((now == phase).then_some(pod))
    })
}

/// What `kubectl describe` says of a claim.
pub fn describe(claim: &str) -> anyhow::Result<String> {
    kubectl(&["describe", "pvc", "-n", USER, claim])
}

/// How often an event of this reason was told of a claim.
pub fn events(claim: &str, reason: &str) -> anyhow::Result<u64> {
    let uid = kubectl(&["get", "pvc", "-n", USER, claim, "-o", "jsonpath={.metadata.uid}"])?;
    let selector = format!("regarding.uid={uid},reason={reason}");
    let events = list(&["events.events.k8s.io", "-n", USER, "--field-selector", &selector])?;
    Ok(events.iter().map(|event| event["series"]["count"].as_u64().unwrap_or(1)).sum())
}

/// The name of the running pod of a component.
pub fn pod_of(component: &str) -> anyhow::Result<String> {
    let label = format!("app.kubernetes.io/component={component}");
    let pods = list(&["pods", "-n", DRIVER, "-l", &label])?;
    let ready = |pod: &&Value| {
        pod["metadata"]["deletionTimestamp"].is_null() && pod["status"]["containerStatuses"][0]["ready"] == Value::Bool(true)
    };
    let pod = pods.iter().find(ready).with_context(|| format!("no pod of {component} is ready"))?;
    Ok(text(pod, "/metadata/name").to_owned())
}

/// The processes of the node, with their arguments.
fn processes() -> anyhow::Result<Vec<(u32, String)>> {
    let process = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let command = fs::read(entry.path().join("cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&command).replace('\0', " ")))
    };
    Ok(fs::read_dir("/proc")?.flatten().filter_map(process).collect())
}

/// How csi-node begins in its pod. Its errands have other arguments.
const CSI_NODE_BEGINS: &str = "/usr/local/bin/csi-node --endpoint";

/// The csi-node process that serves now.
pub fn csi_node() -> anyhow::Result<u32> {
    let node = processes()?.into_iter().find(|(_, command)| command.starts_with(CSI_NODE_BEGINS));
    Ok(node.context("no csi-node runs")?.0)
}

/// What each of the driver's processes has of the memory, in MiB.
pub fn memory() -> anyhow::Result<String> {
    // The sidecars are told from each other by an option that only one has.
    let programs = [
        ("csi-node", CSI_NODE_BEGINS, ""),
        ("fuse-holder", "/fuse-holder ", ""),
        ("csi-controller", "/csi-controller ", ""),
        ("csi-provisioner", "/sidecar ", "--enable-capacity"),
        ("csi-resizer", "/sidecar ", "--handle-volume-inuse-error"),
    ];
    let processes = processes()?;
    let mut said = Vec::new();
    for (name, start, option) in programs {
        let of_it = processes.iter().filter(|(_, command)| command.starts_with(start) && command.contains(option));
        let sizes: Vec<String> = of_it.filter_map(|(pid, _)| resident(*pid)).map(|kib| format!("{}", kib.div_ceil(1024))).collect();
        ensure!(!sizes.is_empty(), "no {name} runs");
        said.push(format!("{name} {}", sizes.join(" + ")));
    }
    Ok(format!("memory in MiB: {}", said.join(", ")))
}

/// A process's resident memory, in KiB.
fn resident(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().split(' ').next()?.parse().ok()
}

/// Shuts down the file system of a disk, from below: from now on each I/O to it fails. And it is pulled out: nobody finds it again by its name.
pub fn fail_disk(disk: &str) -> anyhow::Result<()> {
    let at = mount_of(disk);
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut devices = mounts.lines().filter_map(|line| line.split_once(' ')).filter(|(_, rest)| rest.split(' ').next() == at.to_str());
    let (device, _) = devices.next().with_context(|| format!("{disk} is not mounted"))?;
    run("xfs_io", &["-x", "-c", "shutdown", at.to_str().unwrap_or_default()])?;
    for name in fs::read_dir("/dev/disk/by-id")?.flatten() {
        if fs::read_link(name.path())? == Path::new(device) {
            fs::remove_file(name.path())?;
        }
    }
    Ok(())
}
