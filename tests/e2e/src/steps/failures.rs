//! What goes wrong under a database and under fio, which must not notice.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::{claims::shortened, driver, rights::while_api_starts};
use crate::{
    cluster::{
        DRIVER, USER, compare, copies, csi_node, describe, events, fail_disk, get, health, kubectl, list, pod_of, text, tool, until,
        until_health, volume_of,
    },
    load::{self, CLAIM, Fio, claim, commits_on},
};

/// fio's claim and pod.
const WORK: &str = "work";

pub fn database() -> anyhow::Result<String> {
    load::start_database()?;
    claim(WORK, "512Mi", "Filesystem")?;
    Ok(format!("{} commits so far", load::commits(0)?.last))
}

/// Under fio and the database; what follows them says whether they saw anything.
fn under_load(event: impl FnOnce() -> anyhow::Result<String>) -> anyhow::Result<String> {
    let before = commits_on(0)?;
    let fio = Fio::start(WORK)?;
    let happened = event();
    // Also where that went wrong: the next steps have a load of their own.
    let ended = fio.end();
    let what = happened?;
    ended?;
    let now = commits_on(before.last)?;
    // Whatever is ended or away, nobody waits for it for so long.
    ensure!(now.longest < 30.0, "{what}; but a commit took {:.1} s", now.longest);
    if health(&volume_of(WORK)?) == "Healthy" {
        compare(WORK)?;
    }
    Ok(format!("{what}; {} commits meanwhile, the longest took {:.1} s", now.last - before.last, now.longest))
}

/// Waits until another csi-node than that one serves.
fn until_another(before: u32) -> anyhow::Result<()> {
    until("another csi-node is ready", 90, || {
        let another = csi_node().is_ok_and(|pid| pid != before);
        Ok((another && pod_of("node").is_ok()).then_some(()))
    })?;
    // It says so itself, after it took everything over.
    for claim in [CLAIM, WORK] {
        until(&format!("{claim} is served"), 60, || {
            let volume = volume_of(claim)?;
            Ok((!text(&volume, "/status/device").is_empty() && ["Healthy", "Degraded"].contains(&health(&volume))).then_some(()))
        })?;
    }
    Ok(())
}

pub fn node_pod_deleted() -> anyhow::Result<String> {
    under_load(|| {
        let before = csi_node()?;
        kubectl(&["delete", "pod", "-n", DRIVER, &pod_of("node")?, "--force", "--grace-period=0"])?;
        until_another(before)?;
        Ok("another one serves".into())
    })
}

/// A field that only the later chart's definition has; what is there stays there.
const ADDED: &str = "/spec/added";

pub fn upgraded() -> anyhow::Result<String> {
    under_load(|| {
        let before = csi_node()?;
        let name = text(&volume_of(CLAIM)?, "/metadata/name").to_owned();
        let set = || kubectl(&["patch", "mirrorvolume", &name, "--type=merge", "-p", r#"{"spec":{"added":"kept"}}"#]);
        set()?;
        ensure!(volume_of(CLAIM)?["spec"]["added"].is_null(), "the field was there before");
        driver::upgrade_with_a_new_field("added")?;
        until_another(before)?;
        let image = kubectl(&["get", "pod", "-n", DRIVER, &pod_of("node")?, "-o", "jsonpath={.spec.containers[0].image}"])?;
        ensure!(image.ends_with("-next"), "csi-node's image is {image}");
        set()?;
        ensure!(text(&volume_of(CLAIM)?, ADDED) == "kept", "the field is not in the definition");
        Ok("another one serves, and the field is there".into())
    })
}

pub fn kubelet_restarts() -> anyhow::Result<String> {
    under_load(|| {
        let node = csi_node()?;
        tool("component", &["kubelet", "KILL"])?;
        sleep(Duration::from_secs(2));
        tool("component", &["kubelet"])?;
        until("the node is ready", 60, || {
            // That it was ready is not enough: an exec needs the kubelet.
            Ok(kubectl(&["exec", "-n", USER, load::POD, "--", "true"]).ok())
        })?;
        ensure!(csi_node()? == node, "csi-node was started again");
        Ok("it serves again".into())
    })
}

/// The disk of a volume's second copy.
fn second_disk(volume: &Value) -> anyhow::Result<String> {
    copies(volume)?;
    Ok(text(volume, "/status/legs/1/disk").to_owned())
}

/// The line of a reason that `kubectl describe pvc` shows.
fn told(claim: &str, reason: &str) -> anyhow::Result<String> {
    until(&format!("{claim} has an event {reason}"), 60, || Ok(describe(claim)?.lines().find(|line| line.contains(reason)).map(shortened)))
}

/// What the kubelet asked csi-node for, and wrote into the pod's status: this of a volume's health, or nothing that is wrong.
fn until_pod_health(pod: &str, wanted: Option<&str>) -> anyhow::Result<()> {
    until(&format!("the status of pod {pod} says {}", wanted.unwrap_or("nothing wrong")), 60, || {
        let status = get(&["pod", "-n", USER, pod])?;
        let said = status.pointer("/status/volumeHealth/0/healthConditions/0/status").and_then(Value::as_str);
        Ok((said == wanted).then_some(()))
    })
}

pub fn disk_fails() -> anyhow::Result<String> {
    under_load(|| {
        let disk = second_disk(&volume_of(WORK)?)?;
        fail_disk(&disk)?;
        for claim in [WORK, CLAIM] {
            until_health(claim, "Degraded", 60)?;
            told(claim, "MirrorDegraded")?;
        }
        let failed = get(&["localdisk", &disk])?;
        ensure!(text(&failed, "/status/phase") == "Failed", "the disk is {}", text(&failed, "/status/phase"));
        println!("\n{}", kubectl(&["get", "mv,ld", "-o", "wide"])?);
        told(WORK, "MirrorDegraded")
    })
}

/// What the kubelet makes of csi-node's word of its health.
pub fn health_is_read() -> anyhow::Result<String> {
    until_pod_health(load::POD, Some("Degraded"))?;
    until("the CSINode says that its storage is degraded", 60, || {
        let node = get(&["csinode", "node-1"])?;
        let said = node.pointer("/status/storageHealth/0/healthConditions/0/status").is_some_and(|status| status == "StorageDegraded");
        Ok(said.then_some(()))
    })?;
    Ok(String::new())
}

pub fn health_is_well() -> anyhow::Result<String> {
    until_pod_health(load::POD, None).map(|()| String::new())
}

pub fn new_disk() -> anyhow::Result<String> {
    let disks = list(&["localdisks"])?.len();
    under_load(|| {
        tool("disk", &["add", "2"])?;
        for claim in [WORK, CLAIM] {
            until_health(claim, "Healthy", 120)?;
            for reason in ["RebuildStarted", "RebuildCompleted", "MirrorHealthy"] {
                told(claim, reason)?;
            }
        }
        ensure!(list(&["localdisks"])?.len() == disks + 1, "the new disk has no object");
        println!("\n{}\n{}", kubectl(&["get", "mv,ld"])?, describe(CLAIM)?);
        told(CLAIM, "RebuildCompleted")
    })
}

pub fn commits_kept() -> anyhow::Result<String> {
    Ok(format!("{} commits", load::restart_database()?))
}

fn disk_and_csi_node_fail(disk: &str) -> anyhow::Result<()> {
    sleep(Duration::from_secs(5));
    fail_disk(disk)?;
    sleep(Duration::from_secs(5));
    let node = csi_node()?;
    crate::cluster::run("kill", &["-KILL", &node.to_string()])?;
    until("another csi-node runs", 60, || Ok(csi_node().ok().filter(|pid| *pid != node)))?;
    Ok(())
}

pub fn without_api() -> anyhow::Result<String> {
    until_health(CLAIM, "Healthy", 60)?;
    let volume = volume_of(CLAIM)?;
    let (uid, added, before) = (text(&volume, "/metadata/uid"), text(&volume, ADDED), events(CLAIM, "MirrorDegraded")?);
    let disk = second_disk(&volume)?;
    let what = under_load(|| {
        // The others end by themselves where they elect a leader, and come back with the API. Here they would look for it again up to a minute later.
        let ended = ["kube-apiserver", "kube-controller-manager", "kube-scheduler"].map(|name| tool("component", &[name, "KILL"]));
        let back = Instant::now() + Duration::from_secs(120);
        let happened = disk_and_csi_node_fail(&disk);
        sleep(back.saturating_duration_since(Instant::now()));
        let started = while_api_starts(|| {
            tool("component", &["kube-apiserver"])?;
            until("the API is back", 60, || kubectl(&["get", "--raw", "/readyz"]).map(Some)).map(drop)
        });
        // Also where that went wrong: the next steps need them.
        let others = ["kube-controller-manager", "kube-scheduler"].map(|name| tool("component", &[name]));
        happened?;
        started?;
        ended.into_iter().chain(others).collect::<Result<Vec<_>, _>>()?;
        let degraded = until_health(CLAIM, "Degraded", 90)?;
        ensure!(text(&degraded, "/metadata/uid") == uid, "it is another volume");
        Ok("another one serves, and failed over without the API".into())
    })?;
    told(CLAIM, "MirrorDegraded")?;
    let told = events(CLAIM, "MirrorDegraded")? - before;
    ensure!(told == 1, "the loss was told {told} times");
    tool("disk", &["add", "3"])?;
    let healthy = until_health(CLAIM, "Healthy", 120).context("on another disk")?;
    ensure!(text(&healthy, ADDED) == added, "csi-node or csi-controller threw away a field that they do not know");
    Ok(what)
}
