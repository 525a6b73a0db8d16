//! csi-sanity against both sockets: on a volume with a file system, then on a bare device. No test is left out by us; every skip is
//! printed with its reason, and the skip of a capability that we claim is a failure.
//!
//! `sanity CSI-SANITY`: the program that `tests/sanity/build` built.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use anyhow::{Context, ensure};
use lockstep_csi_tests::{
    driver::Driver,
    lab::{Lab, text},
};

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

async fn run(program: &str, access: &str) -> anyhow::Result<Report> {
    let lab = Lab::new(2, 2000);
    let mut driver = Driver::start(&lab).await;
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
    let program = std::env::args().nth(1).context("usage: sanity CSI-SANITY")?;
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for access in ["mount", "block"] {
        let report = run(&program, access).await?;
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
