//! A second node: disks, a csi-node, and the objects that a kubelet would have made. It has no kubelet, so its pods never run; but their claims are
//! bound there, and it can die.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::{
    cluster::{DRIVER, USER, apply, copies_below, describe, get, kubectl, list, text, tool, until, volume_of},
    load::{claim, claim_object, pod_object},
};

const NODE: &str = "node-2";
/// What it has of its own.
const DIR: &str = "/tmp/lockstep-e2e/node-2";
/// The key of a taint that keeps from it whom it is not made for.
const TAINT: &str = "e2e";

/// Its csi-node.
static PROCESS: Mutex<Option<Child>> = Mutex::new(None);

fn start() -> anyhow::Result<()> {
    let programs = std::env::var_os("PROGRAMS").context("PROGRAMS: run tests/e2e/run")?;
    let dir = Path::new(DIR);
    let mut command = Command::new(Path::new(&programs).join("csi-node"));
    command.args(["--node-name", NODE, "--endpoint", &format!("unix://{DIR}/csi.sock"), "--state-dir", &format!("{DIR}/state")]);
    command.args(["--config", &format!("{DIR}/node.yaml"), "--kubeconfig", &format!("{DIR}/kubeconfig")]);
    let log = File::options().create(true).append(true).open(dir.join("log"))?;
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?;
    *PROCESS.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
    Ok(())
}

fn kill() -> anyhow::Result<()> {
    let mut child = PROCESS.lock().unwrap_or_else(PoisonError::into_inner).take().context("it does not run")?;
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// The kubeconfig of the chart's account of csi-node.
fn kubeconfig() -> anyhow::Result<Value> {
    let mut config: Value = serde_json::from_str(&kubectl(&["config", "view", "--raw", "-o", "json"])?)?;
    let token = kubectl(&["create", "token", "lockstep-node", "-n", DRIVER])?;
    config["users"][0]["user"] = json!({"token": token.trim()});
    config["contexts"][0]["context"]["namespace"] = DRIVER.into();
    Ok(config)
}

/// A pod that only that node can take.
fn pod_on_it(name: &str) -> Value {
    let mut pod = pod_object(name, name, "Filesystem", "true");
    pod["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": NODE});
    pod["spec"]["tolerations"] = json!([{"key": TAINT, "operator": "Exists"}]);
    pod
}

/// Removes a pod of it, and its claim.
fn delete(name: &str) -> anyhow::Result<()> {
    // Nobody is there who would say that it has ended.
    kubectl(&["delete", "pod", "-n", USER, name, "--force", "--grace-period=0"])?;
    crate::load::delete_claim(name)
}

fn until_bound(claim: &str, seconds: u64) -> anyhow::Result<Value> {
    until(&format!("{claim} is bound"), seconds, || {
        let bound = text(&get(&["pvc", "-n", USER, claim])?, "/status/phase") == "Bound";
        if bound { volume_of(claim).map(Some) } else { Ok(None) }
    })
}

/// Its two copies are on this node's disks, and the scheduler knows where it is.
fn ensure_is_there(volume: &Value) -> anyhow::Result<()> {
    ensure!(text(volume, "/spec/node") == NODE, "it is on {}", text(volume, "/spec/node"));
    copies_below(&Path::new(DIR).join("state"), volume)?;
    let affinity = get(&["pv", text(volume, "/metadata/name")])?["spec"]["nodeAffinity"].to_string();
    ensure!(affinity.contains("topology.lockstep.io/node") && affinity.contains(NODE), "its PersistentVolume: {affinity}");
    Ok(())
}

pub fn second() -> anyhow::Result<String> {
    fs::create_dir(DIR)?;
    fs::write(format!("{DIR}/node.yaml"), "disks: [{path: /dev/disk/by-id/lockstep-two-*}]\n")?;
    fs::write(format!("{DIR}/kubeconfig"), kubeconfig()?.to_string())?;
    for number in ["10", "11"] {
        tool("disk", &["add", number, "32G", &format!("lockstep-two-{number}")])?;
    }
    let labels = json!({"kubernetes.io/hostname": NODE, "topology.lockstep.io/node": NODE});
    apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": labels},
        "spec": {"taints": [{"key": TAINT, "effect": "NoSchedule"}]}}))?;
    let room = json!({"cpu": "2", "memory": "4Gi", "pods": "10"});
    let status = json!({"status": {"capacity": room, "allocatable": room, "conditions": [{"type": "Ready", "status": "True", "reason": "E2e",
        "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
    kubectl(&["patch", "node", NODE, "--subresource=status", "--type=merge", "-p", &status.to_string()])?;
    apply(&json!({"apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": {"name": NODE}, "spec": {"drivers": [
        {"name": "csi.lockstep.io", "nodeID": NODE, "topologyKeys": ["topology.lockstep.io/node"]}]}}))?;
    start()?;
    until("its two disks are ready", 60, || {
        let disks = list(&["localdisks", "--field-selector", &format!("spec.node={NODE}")])?;
        Ok((disks.len() == 2 && disks.iter().all(|disk| text(disk, "/status/phase") == "Ready")).then_some(()))
    })?;
    until("the scheduler knows its room", 60, || {
        let rooms = list(&["csistoragecapacities", "-n", DRIVER])?;
        Ok(rooms.iter().any(|room| room["nodeTopology"].to_string().contains(NODE) && !room["capacity"].is_null()).then_some(()))
    })?;
    claim("elsewhere", "64Mi", "Filesystem")?;
    apply(&pod_on_it("elsewhere"))?;
    ensure_is_there(&until_bound("elsewhere", 90)?)?;
    delete("elsewhere")?;
    until("its copies are gone", 60, || {
        let mut copies = 0;
        for disk in fs::read_dir(format!("{DIR}/state/disks"))? {
            copies += fs::read_dir(disk?.path().join("volumes"))?.count();
        }
        Ok((copies == 0).then_some(()))
    })?;
    Ok("both copies were on its disks, and went with the claim".into())
}

/// So many that one of them is for that node first: which is, the provisioner makes of the names.
const CLAIMS: usize = 6;

pub fn dies_before_it_claims() -> anyhow::Result<String> {
    apply(
        &json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "immediate"}, "provisioner": "csi.lockstep.io",
        "volumeBindingMode": "Immediate"}),
    )?;
    let names: Vec<String> = (0..CLAIMS).map(|number| format!("anywhere-{number}")).collect();
    let ours = || -> anyhow::Result<Vec<Value>> {
        let volumes = list(&["mirrorvolumes"])?.into_iter();
        Ok(volumes.filter(|volume| text(volume, "/spec/claim").starts_with(&format!("{USER}/anywhere-"))).collect())
    };
    // It has just said that it lives.
    kill()?;
    for name in &names {
        let mut object = claim_object(name, "64Mi", "Filesystem");
        object["spec"]["storageClassName"] = "immediate".into();
        apply(&object)?;
    }
    let waiting = until("one of them waits for it", 30, || {
        let waiting = ours()?.iter().filter(|volume| text(volume, "/spec/node") == NODE).count();
        Ok((waiting > 0).then_some(waiting))
    })?;
    for name in &names {
        let volume = until_bound(name, 180)?;
        ensure!(text(&volume, "/spec/node") == "node-1", "{name} is on {}", text(&volume, "/spec/node"));
    }
    ensure!(ours()?.len() == CLAIMS, "there is a volume of nobody's");
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    kubectl(&[&["delete", "pvc", "-n", USER, "--wait", "--timeout=120s"], &all[..]].concat())?;
    kubectl(&["delete", "storageclass", "immediate"])?;
    Ok(format!("{waiting} of {CLAIMS} claims were made on it first, and all are bound on the other one"))
}

pub fn is_dead() -> anyhow::Result<String> {
    claim("there", "64Mi", "Filesystem")?;
    apply(&pod_on_it("there"))?;
    let said = until("the claim says why it waits", 120, || {
        let said = describe("there")?;
        Ok(said
            .lines()
            .find(|line| line.contains("ProvisioningFailed") && line.contains("its Lease was not renewed"))
            .map(super::claims::shortened))
    })?;
    start()?;
    ensure_is_there(&until_bound("there", 180)?)?;
    delete("there")?;
    until("no volume is there any more", 60, || {
        Ok(list(&["mirrorvolumes"])?.iter().all(|volume| text(volume, "/spec/node") != NODE).then_some(()))
    })?;
    kill()?;
    kubectl(&["delete", "node,csinode", NODE])?;
    Ok(said)
}
