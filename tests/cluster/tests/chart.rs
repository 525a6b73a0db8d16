//! The chart: what the API makes of its objects, what it refuses, and whether it fits the programs.
#![allow(missing_docs)]

use std::{path::PathBuf, process::Command};

use lockstep_cluster_tests::{
    chart::{apply, make_namespace, rendered},
    client,
};
use serde_json::{Value, json};

const DISKS: &str = "disks[0].path=/dev/disk/by-id/nvme-*";

fn of<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name).unwrap_or_else(|| panic!("no {kind} {name}"))
}

fn containers(object: &Value) -> &Vec<Value> {
    object["spec"]["template"]["spec"]["containers"].as_array().expect("containers")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_takes_every_object_of_the_chart_and_knows_every_field() {
    let client = client().await;
    make_namespace(&client).await;
    for settings in [
        vec![],
        vec![DISKS],
        vec![
            DISKS,
            "disks[1].path=/dev/sdx",
            "controller.replicas=1",
            "storageClass.fsType=xfs",
            "storageClass.parameters.writeBehind=rotational",
        ],
        vec!["imagePullSecrets[0].name=secret", "controller.nodeSelector.a=b", "controller.tolerations[0].operator=Exists", "log=debug"],
        vec!["storageClass.create=false", "kubeletDir=/data/kubelet", "node.stateDir=/data/lockstep", "node.nodeSelector.a=b"],
    ] {
        let objects = rendered(&settings).unwrap();
        assert!(objects.len() > 15, "{} objects", objects.len());
        for object in objects {
            let taken = apply(&client, &object, true).await;
            assert!(taken.is_ok(), "{settings:?}: {} {}: {}", object["kind"], object["metadata"]["name"], taken.unwrap_err());
        }
    }
}

#[test]
fn wrong_values_are_refused_with_the_name_of_the_field() {
    for (setting, field) in [
        ("disk[0].path=/dev/sdx", "disk"),
        ("disks[0].path=sdx", "/disks/0/path"),
        ("disks[0].device=/dev/sdx", "device"),
        ("storageClass.fsType=btrfs", "/storageClass/fsType"),
        ("storageClass.parameters.replicas=3", "replicas"),
        ("storageClass.parameters.writeBehind=on", "/storageClass/parameters/writeBehind"),
        ("controller.replicas=0", "/controller/replicas"),
        ("controller.replicas=two", "/controller/replicas"),
        ("node.datapathThreads=65", "/node/datapathThreads"),
        ("images.node.pullPolicy=Sometimes", "/images/node/pullPolicy"),
        ("kubeletDir=var/lib/kubelet", "/kubeletDir"),
        ("nodes.stateDir=/x", "nodes"),
    ] {
        let refused = rendered(&[setting]).expect_err(setting);
        assert!(refused.contains(field), "{setting}: {refused}");
    }
}

#[test]
fn the_programs_know_every_argument_that_the_chart_gives_them() {
    let objects = rendered(&[DISKS]).unwrap();
    for (kind, name, program) in [
        ("Deployment", "lockstep-controller", "csi-controller"),
        ("DaemonSet", "lockstep-node", "csi-node"),
        ("DaemonSet", "lockstep-holder", "fuse-holder"),
        ("Job", "lockstep-uninstall", "csi-controller"),
    ] {
        let container = &containers(of(&objects, kind, name))[0];
        let path = PathBuf::from(std::env::var_os("PROGRAMS").expect("PROGRAMS: run tests/cluster/run")).join(program);
        let help = Command::new(&path).arg("--help").output().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let help = String::from_utf8(help.stdout).unwrap();
        for argument in container["args"].as_array().expect("arguments") {
            let option = argument.as_str().unwrap().split('=').next().unwrap();
            assert!(
                help.contains(&format!("{option} ")) || help.contains(&format!("{option}\n")),
                "{program} does not know {option}:\n{help}"
            );
        }
    }
}

#[test]
fn only_what_serves_the_disks_is_privileged_and_what_must_not_be_replaced_is_not() {
    let objects = rendered(&[DISKS]).unwrap();
    let privileged: Vec<_> = objects
        .iter()
        .filter(|object| object["spec"]["template"]["spec"]["containers"].is_array())
        .flat_map(containers)
        .filter(|container| container["securityContext"]["privileged"] == json!(true))
        .map(|container| container["name"].as_str().unwrap())
        .collect();
    assert_eq!(privileged, ["csi-node"]);
    assert_eq!(of(&objects, "DaemonSet", "lockstep-holder")["spec"]["updateStrategy"]["type"], "OnDelete");
    let surge = &of(&objects, "DaemonSet", "lockstep-node")["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"];
    assert_eq!(surge, &json!(0), "two of a node would fight for it");
    let config = of(&objects, "ConfigMap", "lockstep-node")["data"]["node.yaml"].as_str().unwrap();
    assert_eq!(serde_saphyr::from_str::<Value>(config).unwrap(), json!({"disks": [{"path": "/dev/disk/by-id/nvme-*"}]}));
    let none = rendered(&[]).unwrap();
    let config = of(&none, "ConfigMap", "lockstep-node")["data"]["node.yaml"].as_str().unwrap();
    assert_eq!(serde_saphyr::from_str::<Value>(config).unwrap(), json!({"disks": []}));
    // No object of any account may read secrets or do everything.
    for rule in objects.iter().filter(|object| object["rules"].is_array()).flat_map(|object| object["rules"].as_array().unwrap()) {
        let text = rule.to_string();
        assert!(!text.contains("\"*\"") && !text.contains("secrets"), "{text}");
    }
}
