//! csi-node and the FUSE holder in containers of their own, mounted as the chart's DaemonSets mount them, and their ends: with its container a csi-node
//! loses its mount namespace, and a container ends only when nothing of its cgroup is left.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lockstep_csi_tests::{
    driver::{Driver, program},
    lab::{Lab, text},
    load,
};
use lockstep_native::succeeds;
use serde_json::{Value, json};

use crate::{surroundings::shared, survival::Unmounting};

const MIB: u64 = 1 << 20;

/// A container of runc's, with the host's processes in sight, in which programs are started. It ends when it is dropped.
struct Pod {
    dir: tempfile::TempDir,
    id: String,
}

fn bind(path: &Path, options: &[&str]) -> Value {
    json!({"type": "bind", "source": path, "destination": path, "options": options})
}

impl Pod {
    /// With these capabilities, and with the lab mounted so.
    fn start(lab: &Lab, name: &str, capabilities: &[&str], propagation: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("lockstep-pod.").tempdir().unwrap();
        let id = format!("lockstep-{}-{name}", std::process::id());
        let mut mounts = vec![json!({"type": "proc", "source": "proc", "destination": "/proc"})];
        let programs = program("csi-node");
        let system = ["/bin", "/etc", "/lib", "/lib64", "/sbin", "/usr"].map(Path::new);
        for path in system.into_iter().chain(programs.parent()).filter(|path| path.exists()) {
            mounts.push(bind(path, &["rbind", "ro"]));
        }
        mounts.extend(["/dev", "/sys"].map(|path| bind(Path::new(path), &["rbind"])));
        mounts.push(bind(&lab.path(""), &["rbind", propagation]));
        let config = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["sleep", "infinity"],
                "env": [format!("PATH={}", std::env::var("PATH").unwrap())],
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            },
            "mounts": mounts,
            "linux": {
                "namespaces": [{"type": "mount"}],
                "rootfsPropagation": "rshared",
                "cgroupsPath": format!("/{id}"),
                "resources": {"devices": [{"allow": true, "access": "rwm"}]},
            },
        });
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let pod = Self { dir, id };
        let [program, rest @ ..] = pod.runc("run");
        let rest: Vec<&str> = rest.iter().map(String::as_str).chain(["--detach", "--bundle", text(pod.dir.path()), &pod.id]).collect();
        // What is started in the background has this program's standard streams: a pipe would not end before it does.
        assert!(succeeds(&program, &rest), "runc does not start {}", pod.id);
        pod
    }

    fn runc(&self, command: &str) -> [String; 4] {
        ["runc", "--root", text(&self.dir.path().join("runc")), command].map(str::to_owned)
    }

    /// What starts a program in it.
    fn starter(&self) -> Vec<String> {
        self.runc("exec").into_iter().chain([self.id.clone()]).collect()
    }

    /// Kills all that is in it, as containerd does, and removes it. `false`: something is left.
    fn end(&self) -> bool {
        let [program, rest @ ..] = self.runc("delete");
        succeeds(&program, &rest.iter().map(String::as_str).chain(["--force", &self.id]).collect::<Vec<_>>())
    }

    fn cgroups(&self) -> Vec<PathBuf> {
        let all = ["", "cpu", "cpuset", "devices", "freezer", "memory", "pids", "systemd", "unified"];
        all.map(|part| Path::new("/sys/fs/cgroup").join(part).join(&self.id)).into_iter().filter(|dir| dir.exists()).collect()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the chart's privileged container has.
const PRIVILEGED: [&str; 8] =
    ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_CHOWN", "CAP_KILL", "CAP_SYS_PTRACE", "CAP_IPC_LOCK"];

/// A lab whose directory the containers share with the host, and the holder in a container of its own.
async fn rig(lab: &Lab) -> (Driver, Pod) {
    shared(&lab.path(""));
    let mut driver = Driver::start(lab).await;
    let holder = Pod::start(lab, "holder", &[], "rprivate");
    driver.start_holder_by(&holder.starter());
    driver.terminate_node();
    (driver, holder)
}

async fn start_node(driver: &mut Driver, lab: &Lab, number: u32) -> Pod {
    let pod = Pod::start(lab, &format!("node{number}"), &PRIVILEGED, "rshared");
    driver.start_node_by(&pod.starter().iter().map(String::as_str).collect::<Vec<_>>());
    driver.start_node().await;
    pod
}

/// Ends the container as containerd does, which tries again what was in vain: how long that took.
fn end(driver: &mut Driver, pod: Pod) -> Duration {
    let begun = Instant::now();
    while !pod.end() {
        assert!(begun.elapsed() < Duration::from_secs(30), "something in {} does not end", pod.id);
    }
    let took = begun.elapsed();
    driver.take_node().wait().unwrap();
    assert_eq!(pod.cgroups(), Vec::<PathBuf>::new());
    took
}

#[tokio::test(flavor = "multi_thread")]
async fn csi_nodes_container_is_replaced_under_load_and_nobody_notices() {
    let lab = Lab::new(2, 1200);
    let (mut driver, holder) = rig(&lab).await;
    let mut pod = start_node(&mut driver, &lab, 0).await;
    let files = driver.place("files", 203 * MIB, Some("xfs")).await;
    let block = driver.place("block", 256 * MIB, None).await;
    for place in [&files, &block] {
        place.up(&driver.client).await.unwrap();
    }
    let loads = [load::on_files(&files.target, 15), load::on_device(&block.target, 15)];
    for number in 1..=3 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let took = end(&mut driver, pod);
        pod = start_node(&mut driver, &lab, number).await;
        let mut device = load::Direct::open(&block.target).unwrap();
        let start = Instant::now();
        device.write(240 * MIB).unwrap();
        println!(
            "figure: the container ended after {took:.1?}; the first write after the start of the next one took {:.1?}",
            start.elapsed()
        );
    }
    for load in loads {
        assert!(load.succeeded(), "the load saw an error, or read what it did not write");
    }
    for place in [&files, &block] {
        place.down(&driver.client).await.unwrap();
        driver.assert_copies_identical(&place.id).await;
    }
    end(&mut driver, pod);
    driver.stop();
    assert!(holder.end(), "the holder's container does not end");
}

/// Whether a child of a csi-node's is still there that unmounts this.
fn unmounts(path: &Path) -> bool {
    let lines = fs::read_dir("/proc").unwrap().flatten().filter_map(|process| fs::read_to_string(process.path().join("cmdline")).ok());
    lines.into_iter().any(|line| line.starts_with("unmount\0") && line.contains(text(path)))
}

/// What csi-node has unmounted by a child writes back through csi-node itself: the child waits until the next one serves the device, and that one is not
/// started before the container has ended.
#[tokio::test(flavor = "multi_thread")]
async fn csi_nodes_container_ends_while_it_unmounts_and_the_next_one_finishes_it() {
    let mut lab = Lab::new(0, 0);
    let disks = Unmounting::disks(&mut lab);
    let (mut driver, holder) = rig(&lab).await;
    let mut pod = start_node(&mut driver, &lab, 0).await;
    let mut unmount = Unmounting::begin(&driver, disks).await;
    let took = end(&mut driver, pod);
    println!("figure: a container whose csi-node unmounted ended after {took:.1?}");
    assert!(unmounts(&unmount.place.staging), "nothing was left to write: this shows nothing");
    pod = start_node(&mut driver, &lab, 1).await;
    drop((&mut unmount.unstaging).await);
    unmount.unstaged(&driver).await;
    unmount.intact(&driver).await;
    end(&mut driver, pod);
    driver.stop();
    assert!(holder.end(), "the holder's container does not end");
}
