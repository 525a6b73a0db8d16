//! Claims: made, used, grown, refused, deleted.

use std::{fs, time::Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::{
    cluster::{USER, apply, compare, get, kubectl, list, memory, mount_of, run, text, tool, until, until_pod},
    load::{claim, claim_object, delete_claim, delete_pod, pod_object},
};

const FS: &str = "Filesystem";
const WRITES: &str = "cp -r /usr/share/doc /data/doc && sync && date +%s >/data/written && sync && sleep infinity";

pub fn first() -> anyhow::Result<String> {
    let start = Instant::now();
    claim("first", "1Gi", FS)?;
    apply(&pod_object("first", "first", FS, WRITES))?;
    until_pod("first", "Running", 120)?;
    let seconds = start.elapsed().as_secs_f32();
    until("it has written", 60, || Ok(kubectl(&["exec", "-n", USER, "first", "--", "test", "-s", "/data/written"]).ok()))?;
    Ok(format!("{seconds:.1} s from the claim to the running pod"))
}

pub fn first_compared() -> anyhow::Result<String> {
    delete_pod("first")?;
    let size = compare("first")?;
    apply(&pod_object("first", "first", FS, "diff -r /usr/share/doc /data/doc && cat /data/written"))?;
    until_pod("first", "Succeeded", 60)?;
    delete_pod("first")?;
    Ok(format!("{size} MiB each, and the next pod finds what was written"))
}

/// XFS, because growing a mounted ext4 takes CAP_SYS_RESOURCE, which not every machine that runs this has.
pub fn grows() -> anyhow::Result<String> {
    apply(
        &json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "xfs"}, "provisioner": "csi.lockstep.io",
        "allowVolumeExpansion": true, "parameters": {"csi.storage.k8s.io/fstype": "xfs"}}),
    )?;
    let mut object = claim_object("grows", "512Mi", FS);
    object["spec"]["storageClassName"] = "xfs".into();
    apply(&object)?;
    apply(&pod_object("grows", "grows", FS, "while :; do date >>/data/dates; sync; sleep 0.2; done"))?;
    until_pod("grows", "Running", 60)?;
    let size = || -> anyhow::Result<u64> {
        let size = kubectl(&["exec", "-n", USER, "grows", "--", "df", "--output=size", "-BM", "/data"])?;
        let size = size.lines().last().context("df")?.trim().trim_end_matches('M');
        Ok(size.parse()?)
    };
    let (before, start) = (size()?, Instant::now());
    kubectl(&["patch", "pvc", "-n", USER, "grows", "-p", r#"{"spec":{"resources":{"requests":{"storage":"1Gi"}}}}"#])?;
    until("the rest is the kubelet's", 60, || {
        let claim = get(&["pvc", "-n", USER, "grows"])?;
        let volume = get(&["pv", text(&claim, "/spec/volumeName")])?;
        Ok((text(&volume, "/spec/capacity/storage") == "1Gi").then_some(()))
    })?;
    // It looks at a pod once a minute, or when something changes.
    kubectl(&["annotate", "pod", "-n", USER, "grows", "look=again"])?;
    let after = until("df says more", 120, || Ok(Some(size()?).filter(|size| *size > before + 400)))?;
    let seconds = start.elapsed().as_secs_f32();
    until("the claim says so", 30, || {
        let claim = get(&["pvc", "-n", USER, "grows"])?;
        Ok((text(&claim, "/status/capacity/storage") == "1Gi").then_some(()))
    })?;
    kubectl(&[
        "exec",
        "-n",
        USER,
        "grows",
        "--",
        "dd",
        "if=/dev/urandom",
        "of=/data/more",
        "bs=1M",
        "count=600",
        "conv=fsync",
        "status=none",
    ])?;
    delete_pod("grows")?;
    compare("grows")?;
    delete_claim("grows")?;
    kubectl(&["delete", "storageclass", "xfs"])?;
    Ok(format!("XFS, df {before} -> {after} MiB in {seconds:.1} s, and 600 MiB written to it"))
}

pub fn raw_block() -> anyhow::Result<String> {
    claim("raw", "256Mi", "Block")?;
    let script = "set -e; head -c 64M /dev/urandom >/tmp/a; dd if=/tmp/a of=/dev/data bs=1M oflag=direct status=none; \
        dd if=/dev/data of=/tmp/b bs=1M count=64 iflag=direct status=none; cmp /tmp/a /tmp/b; blockdev --getsize64 /dev/data";
    apply(&pod_object("raw", "raw", "Block", script))?;
    until_pod("raw", "Succeeded", 90)?;
    let size = kubectl(&["logs", "-n", USER, "raw"])?;
    ensure!(size.trim() == (256 << 20).to_string(), "its size: {size}");
    delete_pod("raw")?;
    compare("raw")?;
    Ok("256 MiB, written and read".into())
}

/// How many claims there are at once; MANY says otherwise.
const MANY: usize = 20;

/// Their names.
fn names() -> anyhow::Result<Vec<String>> {
    let count = match std::env::var("MANY") {
        Ok(count) => count.parse().with_context(|| format!("MANY={count} is not how many"))?,
        Err(_) => MANY,
    };
    Ok((0..count).map(|number| format!("many-{number}")).collect())
}

pub fn many() -> anyhow::Result<String> {
    let names = names()?;
    let start = Instant::now();
    let objects: Vec<Value> = names
        .iter()
        .flat_map(|name| {
            let script = "echo here >/data/file && sync && sleep infinity";
            [claim_object(name, "64Mi", FS), pod_object(name, name, FS, script)]
        })
        .collect();
    apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}))?;
    until("all of them run", 600, || {
        let pods = list(&["pods", "-n", USER, "--field-selector", "status.phase=Running"])?;
        let running = pods.iter().filter(|pod| text(pod, "/metadata/name").starts_with("many-")).count();
        Ok((running == names.len()).then_some(()))
    })?;
    let seconds = start.elapsed().as_secs_f32();
    Ok(format!("all {} run after {seconds:.1} s; {}", names.len(), memory()?))
}

/// Bytes that are given away on the disks that work, and the copies on them: `UID.LEG`.
fn used() -> anyhow::Result<(u64, Vec<String>)> {
    let (mut bytes, mut copies) = (0, Vec::new());
    for disk in list(&["localdisks"])?.iter().filter(|disk| text(disk, "/status/phase") == "Ready") {
        bytes += disk["status"]["allocatedBytes"].as_u64().unwrap_or_default();
        for copy in fs::read_dir(mount_of(text(disk, "/metadata/name")).join("volumes"))? {
            copies.push(copy?.file_name().to_string_lossy().into_owned());
        }
    }
    Ok((bytes, copies))
}

pub fn deleted() -> anyhow::Result<String> {
    let (before, _) = used()?;
    let many = names()?;
    let least = 2 * many.len() as u64 * (64 << 20);
    let names = [many, vec!["raw".into()]].concat();
    let words: Vec<&str> = names.iter().map(String::as_str).collect();
    kubectl(&[&["delete", "pod", "-n", USER, "--ignore-not-found", "--wait", "--timeout=300s"], &words[..]].concat())?;
    kubectl(&[&["delete", "pvc", "-n", USER, "--ignore-not-found", "--wait", "--timeout=300s"], &words[..]].concat())?;
    let kept = until("their volumes are gone", 90, || {
        let volumes = list(&["mirrorvolumes"])?;
        let of_those = |volume: &Value| names.iter().any(|name| text(volume, "/spec/claim") == format!("{USER}/{name}"));
        Ok((!volumes.iter().any(of_those)).then_some(volumes))
    })?;
    let known = |copy: &String| kept.iter().any(|volume| copy.starts_with(&format!("{}.", text(volume, "/metadata/uid"))));
    let after = until("no copy of them is left, and no space", 60, || {
        let (bytes, copies) = used()?;
        Ok((copies.iter().all(known) && before > bytes + least).then_some(bytes))
    })?;
    until("no PersistentVolume is left", 60, || Ok((list(&["pv"])?.len() == kept.len()).then_some(())))?;
    Ok(format!("{} MiB are free again", (before - after) >> 20))
}

pub fn unknown_parameter() -> anyhow::Result<String> {
    apply(
        &json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "wrong"}, "provisioner": "csi.lockstep.io",
        "volumeBindingMode": "Immediate", "parameters": {"replicas": "3"}}),
    )?;
    let mut object = claim_object("wrong", "64Mi", FS);
    object["spec"]["storageClassName"] = "wrong".into();
    apply(&object)?;
    let message = event("wrong", "ProvisioningFailed", "replicas")?;
    delete_claim("wrong")?;
    kubectl(&["delete", "storageclass", "wrong"])?;
    ensure!(list(&["mirrorvolumes"])?.iter().all(|volume| !text(volume, "/spec/claim").ends_with("/wrong")), "there is a volume of it");
    Ok(message)
}

/// Waits until `kubectl describe pvc` has an event with this reason and word; the line.
fn event(claim: &str, reason: &str, word: &str) -> anyhow::Result<String> {
    until(&format!("{claim} has an event {reason} that says {word}"), 60, || {
        let said = crate::cluster::describe(claim)?;
        Ok(said.lines().find(|line| line.contains(reason) && line.contains(word)).map(shortened))
    })
}

/// A line of events, without its columns.
pub fn shortened(line: &str) -> String {
    line.trim().rsplit("  ").next().unwrap_or(line).trim().to_owned()
}

pub fn too_large() -> anyhow::Result<String> {
    claim("large", "7Gi", FS)?;
    apply(&pod_object("large", "large", FS, "echo here >/data/file && sync"))?;
    let said = until("the pod says why it waits", 60, || {
        let said = kubectl(&["describe", "pod", "-n", USER, "large"])?;
        Ok(said.lines().find(|line| line.contains("FailedScheduling") && line.contains("storage")).map(shortened))
    })?;
    ensure!(text(&get(&["pvc", "-n", USER, "large"])?, "/status/phase") == "Pending", "it does not pend");
    Ok(said)
}

pub fn too_large_no_more() -> anyhow::Result<String> {
    let start = Instant::now();
    for number in ["4", "5"] {
        tool("disk", &["add", number, "8G"])?;
    }
    until_pod("large", "Succeeded", 180)?;
    let seconds = start.elapsed().as_secs_f32();
    delete_pod("large")?;
    delete_claim("large")?;
    Ok(format!("its pod ran {seconds:.1} s after two larger disks were plugged in"))
}

pub fn used_disk() -> anyhow::Result<String> {
    tool("disk", &["used", "6", "2G"])?;
    let (name, said) = until("the disk is refused", 60, || {
        let disks = list(&["localdisks"])?;
        let refused = disks.iter().find(|disk| text(disk, "/status/phase") == "Refused");
        Ok(refused.map(|disk| (text(disk, "/metadata/name").to_owned(), text(disk, "/status/message").to_owned())))
    })?;
    ensure!(["xfs", "theirs", "wipefs --all"].iter().all(|word| said.contains(word)), "{said}");
    until("its event says so", 30, || {
        let described = kubectl(&["describe", "localdisk", &name])?;
        Ok(described.lines().any(|line| line.contains("DiskRefused") && line.contains("wipefs")).then_some(()))
    })?;
    let label = run("blkid", &["-o", "value", "-s", "LABEL", "/dev/disk/by-id/lockstep-e2e-6"])?;
    ensure!(label.trim() == "theirs", "its label is {label:?} now");
    tool("disk", &["remove", "6"])?;
    until("its object is gone", 30, || Ok(kubectl(&["get", "localdisk", &name]).is_err().then_some(())))?;
    Ok(said)
}
