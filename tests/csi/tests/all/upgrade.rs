//! csi-node is replaced under load by another build, that one by this one, and so on: LOCKSTEP_OTHER_NODE is that build's csi-node, as in `make soak`; without
//! it the build replaces itself.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use lockstep_csi_tests::{
    driver::{Driver, program, until},
    kills::{self, Plan},
    lab::{Lab, text},
    load::Direct,
};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn csi_node_is_replaced_by_another_build_and_back_and_nobody_notices() {
    let other = std::env::var_os("LOCKSTEP_OTHER_NODE");
    let replacements = if other.is_some() { 20 } else { 4 };
    let other = other.map_or_else(|| program("csi-node"), Into::into);
    let report = kills::run(Plan::upgrades(replacements, other, kills::seed())).await;
    kills::show(&report);
    assert!(report.is_clean(), "somebody noticed");
    assert_eq!(report.ends.len(), replacements);
}

fn metas(copies: &[PathBuf]) -> Vec<Vec<u8>> {
    copies.iter().map(|copy| fs::read(copy.with_file_name("meta")).unwrap()).collect()
}

/// A csi-node that is older than the one before it, which wrote what this one does not know: it touches nothing, and the volume's users wait for the
/// one that does.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_a_later_format_is_refused_before_anything_is_touched() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let place = driver.place("later", 256 << 20, None).await;
    place.up(&driver.client).await.unwrap();
    Direct::open(&place.target).unwrap().write(0).unwrap();
    let uid = driver.volume(&place.id).await.metadata.uid.unwrap();
    let record = driver.node_log().with_file_name("state").join(format!("staged/{uid}.yaml"));
    let copies = driver.copies(&place.id).await;
    driver.kill_node();
    let known = fs::read_to_string(&record).unwrap();
    let later = known.replace("version: 1", "version: 2");
    assert_ne!(known, later);
    fs::write(&record, &later).unwrap();
    let before = metas(&copies);
    let device = place.target.clone();
    let waiting = std::thread::spawn(move || Direct::open(&device).unwrap().write(4096));
    driver.start_node().await;
    let log = || fs::read_to_string(driver.node_log()).unwrap();
    until("said", || async { log().contains("its version is 2, and this csi-node knows 1").then_some(()) }).await;
    let refused = driver.client.unstage(&place.id, &place.staging).await.unwrap_err();
    assert!(refused.message().contains("start the csi-node that wrote it"), "{refused}");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!waiting.is_finished(), "its users were given an answer");
    assert!(fs::read_to_string(&record).unwrap() == later && metas(&copies) == before, "it was touched");
    driver.kill_node();
    fs::write(&record, &known).unwrap();
    driver.start_node().await;
    waiting.join().unwrap().expect("who knows the record serves");
    place.down(&driver.client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
    driver.stop();
}

/// As a later version would leave both slots of a superblock with a feature that must be known: a bit of `incompat`, and the checksum.
fn of_a_later_version(meta: &[u8]) -> Vec<u8> {
    let mut later = meta.to_vec();
    for page in later[..8192].chunks_exact_mut(4096).filter(|page| page.iter().any(|byte| *byte != 0)) {
        page[12..16].fill(0);
        page[24] |= 1;
        let sum = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI).checksum(page);
        page[12..16].copy_from_slice(&sum.to_le_bytes());
    }
    later
}

/// One copy of a later version is enough: what it says of the other one is not known.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_later_format_is_refused_before_anything_is_touched() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    let place = driver.place("later", 64 << 20, Some("ext4")).await;
    place.up(&driver.client).await.unwrap();
    fs::write(place.target.join("f"), "x").unwrap();
    place.down(&driver.client).await.unwrap();
    let uid = driver.volume(&place.id).await.metadata.uid.unwrap();
    let witness = driver.node_log().with_file_name("state").join(format!("witness/{uid}"));
    let copies = driver.copies(&place.id).await;
    let files = || {
        let data: Vec<Vec<u8>> = copies.iter().map(|copy| fs::read(copy).unwrap()).collect();
        (metas(&copies), data, fs::read(&witness).unwrap())
    };
    let known = metas(&copies);
    for later in [&copies[..1], &copies[1..], &copies[..]] {
        for (copy, known) in copies.iter().zip(&known) {
            let meta = if later.contains(copy) { of_a_later_version(known) } else { known.clone() };
            fs::write(copy.with_file_name("meta"), meta).unwrap();
        }
        let before = files();
        let refused = place.up(&driver.client).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        assert!(refused.message().contains("written by a newer version of Lockstep: upgrade csi-node"), "{refused}");
        assert!(files() == before, "it was touched");
    }
    for (copy, known) in copies.iter().zip(&known) {
        fs::write(copy.with_file_name("meta"), known).unwrap();
    }
    place.up(&driver.client).await.unwrap();
    assert_eq!(fs::read_to_string(place.target.join("f")).unwrap(), "x");
    place.down(&driver.client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
    driver.stop();
}

/// Answers whatever it is asked so: two bytes, the version and the status.
fn holder_of_a_later_version(socket: &Path, answer: &str) -> Child {
    let script = r#"use Socket; socket(S, PF_UNIX, 5, 0); bind(S, sockaddr_un($ARGV[0])) or die; listen(S, 5);
        while (accept(C, S)) { recv(C, $_, 256, 0); send(C, pack("H*", $ARGV[1]), 0) }"#;
    Command::new("setpriv").args(["--pdeathsig", "KILL", "perl", "-e", script, text(socket), answer]).spawn().expect("perl")
}

/// The files in a directory and below it, and what is in them; of FUSE files, which nobody serves, only that they are there.
fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            all.extend(contents(&path));
        } else {
            let content = if path.parent().is_some_and(|dir| dir.ends_with("run")) { Vec::new() } else { fs::read(&path).unwrap() };
            all.push((path, content));
        }
    }
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_of_a_later_version_is_refused_at_once_before_anything_is_touched() {
    let lab = Lab::new(2, 1200);
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let place = driver.place("held", 64 << 20, None).await;
    place.up(&driver.client).await.unwrap();
    Direct::open(&place.target).unwrap().write(0).unwrap();
    driver.kill_node();
    let device = place.target.clone();
    let waiting = std::thread::spawn(move || Direct::open(&device).unwrap().write(4096));
    let state = driver.node_log().with_file_name("state");
    let before = contents(&state);
    let socket = driver.node_log().with_file_name("holder.sock");
    let aside = socket.with_extension("aside");
    fs::rename(&socket, &aside).unwrap();
    for answer in ["0200", "0202", "0204", "0263"] {
        let mut later = holder_of_a_later_version(&socket, answer);
        until("its socket", || async { socket.exists().then_some(()) }).await;
        let start = Instant::now();
        let said = driver.start_node_in_vain();
        assert!(said.contains("speaks version 2 of its protocol") && said.contains("upgrade csi-node"), "{answer}: {said}");
        assert!(start.elapsed() < Duration::from_secs(10), "{answer}: it took {:?}", start.elapsed());
        later.kill().and_then(|()| later.wait()).unwrap();
        fs::remove_file(&socket).unwrap();
    }
    assert!(contents(&state) == before, "it was touched");
    assert!(!waiting.is_finished(), "its users were given an answer");
    fs::rename(&aside, &socket).unwrap();
    driver.start_node().await;
    waiting.join().unwrap().expect("with its own holder it serves on");
    place.down(&driver.client).await.unwrap();
    driver.assert_copies_identical(&place.id).await;
    driver.stop();
}
