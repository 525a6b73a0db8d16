//! The driver comes and goes.

use std::{path::Path, time::Instant};

use anyhow::{Context, ensure};

use crate::{
    cluster::{DRIVER, USER, get, kubectl, list, run, text, until},
    load,
};

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../charts/lockstep");

fn helm(args: &[&str]) -> anyhow::Result<String> {
    run(std::env::var_os("HELM").context("HELM: run tests/e2e/run")?.to_str().unwrap_or_default(), args)
}

pub fn install() -> anyhow::Result<String> {
    let start = Instant::now();
    let disks = "disks[0].path=/dev/disk/by-id/lockstep-e2e-*";
    helm(&["install", "lockstep", CHART, "--namespace", DRIVER, "--create-namespace", "--set", disks])?;
    for object in ["daemonset/lockstep-node", "daemonset/lockstep-holder", "deployment/lockstep-controller"] {
        let ready = if object.starts_with("daemonset") { "{.status.numberReady}" } else { "{.status.readyReplicas}" };
        until(&format!("{object} is ready"), 120, || {
            let number = kubectl(&["get", "-n", DRIVER, object, "-o", &format!("jsonpath={ready}")])?;
            Ok(number.parse::<u32>().is_ok_and(|number| number > 0).then_some(()))
        })?;
    }
    let disks = until("two disks are ready", 60, || {
        let disks = list(&["localdisks"])?;
        Ok((disks.len() == 2 && disks.iter().all(|disk| text(disk, "/status/phase") == "Ready")).then_some(disks))
    })?;
    until("the kubelet knows the driver", 60, || {
        let node = get(&["csinode", "node-1"])?;
        let drivers = node["spec"]["drivers"].as_array().cloned().unwrap_or_default();
        Ok(drivers.iter().any(|driver| driver["name"] == "csi.lockstep.io").then_some(()))
    })?;
    until("the scheduler knows the node's room", 60, || {
        Ok(list(&["csistoragecapacities", "-n", DRIVER])?.iter().any(|room| !room["capacity"].is_null()).then_some(()))
    })?;
    Ok(format!("{} disks, {:.1} s", disks.len(), start.elapsed().as_secs_f32()))
}

pub fn uninstall_refused() -> anyhow::Result<String> {
    let refused = helm(&["uninstall", "lockstep", "--namespace", DRIVER, "--timeout", "60s"]);
    ensure!(refused.is_err(), "it was not refused");
    let pods = list(&["pods", "-n", DRIVER, "-l", "app.kubernetes.io/component=uninstall"])?;
    let pod = pods.last().context("there is no pod of it")?;
    let said = kubectl(&["logs", "-n", DRIVER, text(pod, "/metadata/name")])?;
    load::commits_on()?;
    Ok(said.lines().last().unwrap_or_default().to_owned())
}

pub fn uninstall() -> anyhow::Result<String> {
    load::delete_database()?;
    kubectl(&["delete", "pod", "-n", USER, "--all", "--wait", "--timeout=90s"])?;
    kubectl(&["delete", "pvc", "-n", USER, "--all", "--wait", "--timeout=90s"])?;
    until("no volume", 60, || Ok(list(&["mirrorvolumes"])?.is_empty().then_some(())))?;
    helm(&["uninstall", "lockstep", "--namespace", DRIVER, "--timeout", "60s"])?;
    until("its pods are gone", 90, || Ok(list(&["pods", "-n", DRIVER])?.is_empty().then_some(())))?;
    ensure!(kubectl(&["get", "storageclass", "lockstep"]).is_err(), "its StorageClass stays");
    kubectl(&["get", "crd", "mirrorvolumes.lockstep.io", "localdisks.lockstep.io"])?;
    let disks = list(&["localdisks"])?;
    ensure!(!disks.is_empty() && Path::new("/var/lib/lockstep/disks").exists(), "the disks' objects or the state directory are gone");
    Ok(format!("the definitions, {} LocalDisks and the state directory", disks.len()))
}
