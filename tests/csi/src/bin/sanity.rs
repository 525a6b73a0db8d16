//! csi-sanity against both sockets: on a volume with a file system, then on a bare device. No test is left out by us; every skip is
//! printed with its reason, and the skip of a capability that we claim is a failure.
//!
//! `sanity CSI-SANITY [KUBECONFIG]`: the program that `tests/sanity/build` built; and the Kubernetes API that is to keep the objects instead of a
//! directory. It must know their definitions; volumes and disks that it has are deleted.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use anyhow::{Context, ensure};
use lockstep_csi_tests::{
    driver::Driver,
    lab::{Lab, text},
};
use lockstep_proto::objects::{LocalDisk, MirrorVolume};
use lockstep_store::{Kubernetes, Object, Store};

/// Why csi-sanity skips tests: a word of its reason, and what we say to that. None of them is a capability that we claim.
const UNCLAIMED: [(&str, &str); 8] = [
    ("health", "the health calls are not offered yet"),
    ("modify", "parameters cannot be changed yet"),
    ("cloning", "clones are not offered yet"),
    ("snapshot", "snapshots are not offered yet"),
    ("groupcontroller", "groups of snapshots are not offered"),
    ("controllerpublish", "a local volume is not attached: attachRequired is false"),
    ("controllerunpublish", "a local volume is not attached: attachRequired is false"),
    ("controller publish", "a local volume is not attached: attachRequired is false"),
];

/// What ran and passed when this was written.
const EXPECTED: usize = 49;

/// What the run says, from its JUnit report.
struct Report {
    passed: usize,
    failed: usize,
    skipped: BTreeMap<String, Vec<String>>,
}

/// The value of an attribute of an XML tag.
fn attribute<'a>(tag: &'a str, name: &str) -> Option<&'a str> {
    tag.split_once(&format!(" {name}=\"")).and_then(|(_, rest)| rest.split_once('"')).map(|(value, _)| value)
}

fn read(report: &Path) -> anyhow::Result<Report> {
    let text = fs::read_to_string(report).with_context(|| format!("{}: csi-sanity wrote no report", report.display()))?;
    let mut counted = Report { passed: 0, failed: 0, skipped: BTreeMap::new() };
    for case in text.split("<testcase ").skip(1) {
        let tag = format!(" {}", case.split_once('>').map_or(case, |(tag, _)| tag));
        let name = attribute(&tag, "name").unwrap_or_default();
        // Its own set-up and tear-down are no tests.
        if !name.starts_with("[It]") {
            continue;
        }
        match attribute(&tag, "status").unwrap_or_default() {
            "passed" => counted.passed += 1,
            "skipped" => {
                let reason = case.split_once("<skipped").and_then(|(_, rest)| attribute(rest, "message")).unwrap_or("no reason given");
                counted.skipped.entry(reason.to_owned()).or_default().push(name.to_owned());
            }
            // Switched off by its authors.
            "pending" => counted.skipped.entry("pending".into()).or_default().push(name.to_owned()),
            _ => counted.failed += 1,
        }
    }
    Ok(counted)
}

/// Deletes what an earlier driver left; its disks are gone. The claim of a node that is gone is taken back for it.
async fn clear<K: Object>(store: &Kubernetes) -> anyhow::Result<()> {
    for mut object in store.list::<K>().await?.objects {
        let name = object.meta().name.clone().unwrap_or_default();
        store.delete::<K>(&name, None).await?;
        if object.meta_mut().finalizers.take().is_some() {
            let mut marked: K = store.get(&name).await?.context("it has a finalizer")?;
            marked.meta_mut().finalizers = None;
            store.update(marked).await?;
        }
    }
    Ok(())
}

async fn run(program: &str, kubeconfig: Option<&str>, access: &str) -> anyhow::Result<Report> {
    let lab = Lab::new(2, 2000);
    let Some(kubeconfig) = kubeconfig else { return run_on(program, access, &lab, Driver::start(&lab).await).await };
    let store = Kubernetes::with_kubeconfig(Path::new(kubeconfig)).await?;
    clear::<MirrorVolume>(&store).await?;
    clear::<LocalDisk>(&store).await?;
    let objects = ["--kubeconfig".to_owned(), kubeconfig.to_owned()];
    let driver = Driver::start_with(&lab, store, [objects.clone(), objects]).await;
    run_on(program, access, &lab, driver).await
}

async fn run_on<S: Store>(program: &str, access: &str, lab: &Lab, mut driver: Driver<S>) -> anyhow::Result<Report> {
    let (node, controller) = driver.sockets();
    let report = lab.path("report.xml");
    let flag = |name: &str, path: &Path| format!("--{name}={}", text(path));
    let mut command = Command::new(program);
    command
        .arg(format!("--csi.endpoint=unix://{}", text(&node)))
        .arg(format!("--csi.controllerendpoint=unix://{}", text(&controller)))
        .arg(flag("csi.mountdir", &lab.path("mount")))
        .arg(flag("csi.stagingdir", &lab.path("stage")))
        .args([&format!("--csi.testvolumesize={}", 384 << 20), &format!("--csi.testvolumeexpandsize={}", 512 << 20)])
        .arg(format!("--csi.testvolumeaccesstype={access}"))
        .args(["--ginkgo.no-color", &flag("ginkgo.junit-report", &report)]);
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let summary = said.lines().filter(|line| line.starts_with("Ran ") || line.contains(" Passed | ")).collect::<Vec<_>>().join(" ");
    println!("csi-sanity, {access} volumes: {summary}");
    let counted = read(&report)?;
    if counted.failed > 0 || !output.status.success() {
        println!("{said}\n{}", fs::read_to_string(driver.node_log()).unwrap_or_default());
    }
    ensure!(
        output.status.success() == (counted.failed == 0),
        "csi-sanity ended with {}, but its report has {} failures",
        output.status,
        counted.failed
    );
    driver.stop();
    Ok(counted)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let program = arguments.next().context("usage: sanity CSI-SANITY [KUBECONFIG]")?;
    let kubeconfig = arguments.next();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for access in ["mount", "block"] {
        let report = run(&program, kubeconfig.as_deref(), access).await?;
        ensure!(report.passed >= EXPECTED, "only {} tests ran: csi-sanity or its report is not what it was", report.passed);
        passed += report.passed;
        failed += report.failed;
        for (reason, names) in &report.skipped {
            let said = reason.to_lowercase();
            let known = UNCLAIMED.iter().find(|(word, _)| said.contains(word));
            match known {
                _ if reason == "pending" => println!("  {} switched off by its authors: {}", names.len(), names.join("; ")),
                Some((_, why)) => println!("  {} skipped, {reason}: {why}", names.len()),
                None => {
                    println!("  {} skipped, {reason}: a FAILURE, nothing that we claim may be skipped: {}", names.len(), names.join("; "));
                    failed += names.len();
                    continue;
                }
            }
            skipped += names.len();
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    ensure!(failed == 0, "csi-sanity failed");
    Ok(())
}
