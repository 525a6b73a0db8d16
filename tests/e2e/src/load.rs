//! What uses the volumes: a database whose acknowledged commits are on record, and fio.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::cluster::{USER, apply, get, kubectl, until, until_pod};

/// A claim of the default class.
pub fn claim(name: &str, size: &str, mode: &str) -> anyhow::Result<()> {
    apply(&claim_object(name, size, mode))
}

/// The same, not made yet.
pub fn claim_object(name: &str, size: &str, mode: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": USER},
        "spec": {"accessModes": ["ReadWriteOnce"], "volumeMode": mode, "resources": {"requests": {"storage": size}}}})
}

/// A pod that runs a script with the claim's volume: mounted at /data, or as /dev/data.
pub fn pod_object(name: &str, claim: &str, mode: &str, script: &str) -> Value {
    let (field, path) = if mode == "Block" { ("volumeDevices", "devicePath") } else { ("volumeMounts", "mountPath") };
    let at = if mode == "Block" { "/dev/data" } else { "/data" };
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": USER}, "spec": {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "main", "image": "localhost/load:1", "imagePullPolicy": "Never",
            "command": ["bash", "-c", script], field: [{"name": "data", path: at}]}],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]}})
}

/// Removes a pod, and waits until it is gone.
pub fn delete_pod(name: &str) -> anyhow::Result<()> {
    kubectl(&["delete", "pod", "-n", USER, name, "--wait", "--timeout=90s"]).map(drop)
}

/// Removes a claim, and waits until it is gone.
pub fn delete_claim(name: &str) -> anyhow::Result<()> {
    kubectl(&["delete", "pvc", "-n", USER, name, "--wait", "--timeout=90s"]).map(drop)
}

/// fio in a pod of its own: direct I/O of eight jobs whose writes overlap, and two that verify what they wrote.
pub struct Fio(&'static str);

impl Fio {
    /// Starts it on the volume of the claim of that name, again and again until it is told to end, and waits until it writes.
    pub fn start(claim: &'static str) -> anyhow::Result<Self> {
        let script = "until [ -e /tmp/end ]; do \
             fio --verify_state_save=0 --direct=1 --ioengine=libaio --time_based=1 --runtime=8 --output-format=terse \
             --fallocate=none --iodepth=4 --rate_iops=150 \
             --name=own1 --filename=/data/verify --size=32M --rw=randwrite --bsrange=4k-64k --verify=crc32c --verify_fatal=1 --do_verify=1 \
             --name=own2 --filename=/data/verify --offset=64M --size=32M --rw=randwrite --bsrange=4k-64k --verify=crc32c --verify_fatal=1 \
             --do_verify=1 \
             --name=overlap --filename=/data/overlap --numjobs=8 --size=16M --rw=randrw --rwmixread=20 --bsrange=4k-128k || exit; done";
        apply(&pod_object(claim, claim, "Filesystem", script))?;
        until_pod(claim, "Running", 60)?;
        std::thread::sleep(Duration::from_secs(3));
        Ok(Self(claim))
    }

    /// Has it verify what it wrote and end, which is without an error, and removes it.
    pub fn end(self) -> anyhow::Result<()> {
        kubectl(&["exec", "-n", USER, self.0, "--", "touch", "/tmp/end"])?;
        until_pod(self.0, "Succeeded", 180).context("fio")?;
        delete_pod(self.0)
    }
}

const DATABASE: &str = "db";

/// The database's pod.
pub const POD: &str = "db-0";
/// Its claim.
pub const CLAIM: &str = "data-db-0";

/// PostgreSQL as a StatefulSet: its claim is `data-db-0`.
pub fn start_database() -> anyhow::Result<()> {
    let mut claim = claim_object("data", "1Gi", "Filesystem");
    claim["metadata"] = json!({"name": "data"});
    apply(&json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": DATABASE, "namespace": USER}, "spec": {
        "serviceName": DATABASE, "selector": {"matchLabels": {"app": DATABASE}}, "volumeClaimTemplates": [claim],
        "template": {"metadata": {"labels": {"app": DATABASE}}, "spec": {
            "securityContext": {"runAsUser": 999, "runAsGroup": 999, "fsGroup": 999,
                // Its data directory is its own, and stays so when the pod comes again.
                "fsGroupChangePolicy": "OnRootMismatch"},
            "containers": [{"name": "main", "image": "localhost/load:1", "imagePullPolicy": "Never", "command": ["commits"],
                "volumeMounts": [{"name": "data", "mountPath": "/data"}]}]}}}}))?;
    until("the database commits", 90, || Ok((commits(0)?.last > 10).then_some(())))
}

/// What the database's client printed.
#[derive(Clone, Copy)]
pub struct Commits {
    /// The last commit that was acknowledged.
    pub last: u64,
    /// The longest time between two of them, in seconds.
    pub longest: f64,
}

/// The commits that this pod acknowledged; the longest time is that after number `from`.
pub fn commits(from: u64) -> anyhow::Result<Commits> {
    let pod = get(&["pod", "-n", USER, POD])?;
    let restarts = pod.pointer("/status/containerStatuses/0/restartCount").and_then(Value::as_u64).unwrap_or(0);
    let log = kubectl(&["logs", "-n", USER, POD])?;
    let error = log.split_once("FAILED").map_or("it was started again", |(_, error)| error);
    ensure!(restarts == 0 && !log.contains("FAILED"), "the database saw an error: {error}");
    let (mut seen, mut before) = (Commits { last: 0, longest: 0.0 }, f64::INFINITY);
    for (at, number) in log.lines().filter(|line| !line.starts_with("found")).filter_map(|line| line.split_once(' ')) {
        let (at, number): (f64, u64) = (at.parse()?, number.parse()?);
        ensure!(seen.last == 0 || number == seen.last + 1, "{number} after {}", seen.last);
        let longest = if number > from { seen.longest.max(at - before) } else { 0.0 };
        seen = Commits { last: number, longest };
        before = at;
    }
    Ok(seen)
}

/// It commits on, and saw no error. What has been acknowledged so far, and the longest time after number `from`.
pub fn commits_on(from: u64) -> anyhow::Result<Commits> {
    let before = commits(from)?;
    until("the database commits on", 30, || Ok(Some(commits(from)?).filter(|now| now.last > before.last + 5)))
}

/// Ends the pod, and looks whether the next one finds every acknowledged commit. How many.
pub fn restart_database() -> anyhow::Result<u64> {
    kubectl(&["scale", "statefulset", "-n", USER, DATABASE, "--replicas=0"])?;
    // The last lines come when it ends; they are read while the pod is still there.
    let mut acknowledged = 0;
    // Where the API was away the kubelet looks for it again after up to a minute.
    until("the database ends", 120, || {
        match commits(0) {
            Ok(commits) => acknowledged = acknowledged.max(commits.last),
            Err(_) => return Ok(kubectl(&["get", "pod", "-n", USER, POD]).is_err().then_some(())),
        }
        Ok(None)
    })?;
    crate::cluster::compare(CLAIM)?;
    kubectl(&["scale", "statefulset", "-n", USER, DATABASE, "--replicas=1"])?;
    let found = until("the database is back", 90, || {
        let log = kubectl(&["logs", "-n", USER, POD])?;
        Ok(log.lines().find_map(|line| line.strip_prefix("found ")).map(str::to_owned))
    })?;
    let (good, last) = found.split_once(' ').context("what it found")?;
    ensure!(
        good == last && last.parse::<u64>()? >= acknowledged,
        "{acknowledged} commits were acknowledged; there are {good}, to number {last}"
    );
    commits_on(0)?;
    Ok(last.parse()?)
}

/// Removes the database and its claim.
pub fn delete_database() -> anyhow::Result<()> {
    kubectl(&["delete", "statefulset", "-n", USER, DATABASE, "--wait"])?;
    kubectl(&["wait", "-n", USER, "--for=delete", "pod", POD, "--timeout=60s"])?;
    delete_claim(CLAIM)
}
