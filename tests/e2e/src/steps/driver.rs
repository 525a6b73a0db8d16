//! The driver comes and goes.

use std::{fs, path::Path, time::Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

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
    // Only where there is a kubelet: a pod on a node without one never ends.
    let values = r"disks[0].path=/dev/disk/by-id/lockstep-e2e-*,node.nodeSelector.kubernetes\.io/os=linux";
    helm(&["install", "lockstep", CHART, "--namespace", DRIVER, "--create-namespace", "--set", values])?;
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

/// What the chart itself can say of whether it works.
pub fn helm_test() -> anyhow::Result<String> {
    let said = helm(&["test", "lockstep", "--namespace", DRIVER, "--timeout", "120s"])?;
    ensure!(said.contains("Succeeded"), "{said}");
    until("its volume is gone", 60, || {
        let of_it = |volume: &Value| text(volume, "/spec/claim").starts_with(&format!("{DRIVER}/"));
        Ok((!list(&["mirrorvolumes"])?.iter().any(of_it)).then_some(()))
    })?;
    Ok(String::new())
}

/// Upgrades to a chart of a later version: another image of csi-node, and a MirrorVolume has a field more in its spec.
pub fn upgrade_with_a_new_field(field: &str) -> anyhow::Result<()> {
    let later = Path::new("/tmp/lockstep-e2e/chart");
    run("rm", &["-rf", later.to_str().context("a path")?])?;
    run("cp", &["-r", CHART, later.to_str().context("a path")?])?;
    let replace = |file: &str, old: &str, new: &str| -> anyhow::Result<()> {
        let file = later.join(file);
        let text = fs::read_to_string(&file)?;
        ensure!(text.matches(old).count() == 1, "{}: not once {old:?}", file.display());
        Ok(fs::write(&file, text.replace(old, new))?)
    };
    replace("Chart.yaml", "\nversion: ", "\nversion: 1")?;
    let before = "              capacityBytes:\n                description: The size that is wanted";
    replace("templates/crds/mirrorvolumes.yaml", before, &format!("              {field}: {{type: string}}\n{before}"))?;
    let version = version()?;
    let image = format!("docker.io/lockstep/node:{version}");
    run("ctr", &["--namespace", "k8s.io", "images", "tag", "--force", &image, &format!("{image}-next")])?;
    let tag = format!("images.node.tag={version}-next");
    helm(&["upgrade", "lockstep", later.to_str().context("a path")?, "--namespace", DRIVER, "--reuse-values", "--set", &tag])?;
    Ok(())
}

/// The version of the images.
fn version() -> anyhow::Result<String> {
    let chart = fs::read_to_string(Path::new(CHART).join("Chart.yaml"))?;
    let version = chart.lines().find_map(|line| line.strip_prefix("appVersion: ")).context("no appVersion")?;
    Ok(version.trim_matches('"').to_owned())
}

/// A probe that does not hold, or a process that ends by itself, would show here. The sidecars end themselves when they cannot say to the API that they lead.
pub fn restarts() -> anyhow::Result<String> {
    let mut said = Vec::new();
    for pod in list(&["pods", "-n", DRIVER])? {
        for container in pod["status"]["containerStatuses"].as_array().into_iter().flatten() {
            let (name, count) = (text(container, "/name"), container["restartCount"].as_u64().unwrap_or_default());
            // It was killed while the API was away.
            let most = match name {
                "csi-node" => 1,
                "csi-controller" | "fuse-holder" => 0,
                _ => continue,
            };
            ensure!(count <= most, "{name} was started again {count} times: {}", container["lastState"]);
            said.push(format!("{name} {count}"));
        }
    }
    ensure!(said.len() >= 4, "only {}", said.join(", "));
    Ok(said.join(", "))
}

pub fn uninstall_refused() -> anyhow::Result<String> {
    let refused = helm(&["uninstall", "lockstep", "--namespace", DRIVER, "--timeout", "60s"]);
    ensure!(refused.is_err(), "it was not refused");
    let pods = list(&["pods", "-n", DRIVER, "-l", "app.kubernetes.io/component=uninstall"])?;
    let pod = pods.last().context("there is no pod of it")?;
    let said = kubectl(&["logs", "-n", DRIVER, text(pod, "/metadata/name")])?;
    load::commits_on(0)?;
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
