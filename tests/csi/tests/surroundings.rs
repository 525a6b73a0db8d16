//! What csi-node needs of what is around it: mounts that reach the host.
#![allow(missing_docs)]

use std::{fs, path::Path};

use lockstep_csi_tests::{
    driver::Driver,
    lab::{Lab, text},
};
use lockstep_native::run;
use tonic::Code;

const MIB: u64 = 1 << 20;

fn namespace(propagation: &str) -> [&str; 4] {
    ["unshare", "--mount", "--propagation", propagation]
}

/// From here on, what is mounted below the directory is mounted below its copies in other namespaces too, if they share it.
fn shared(dir: &Path) {
    run("mount", &["--bind", text(dir), text(dir)]);
    run("mount", &["--make-shared", text(dir)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_mount_namespace_of_its_own_csi_node_insists_on_mounts_that_reach_the_host() {
    let lab = Lab::new(2, 1200);
    shared(&lab.path(""));
    let mut driver = Driver::start(&lab).await;
    driver.use_holder().await;
    let place = driver.place("v", 64 * MIB, Some("ext4")).await;
    driver.terminate_node();
    for alone in ["private", "slave", "shared"] {
        // The last one is shared, but with nobody: what was private on the host has no peers there.
        if alone == "shared" {
            run("mount", &["--make-private", text(&lab.path(""))]);
        }
        driver.start_node_by(&namespace(alone));
        let said = driver.start_node_in_vain();
        assert!(said.contains("mountPropagation: Bidirectional") && said.contains("driver/state/run"), "{alone}: {said}");
    }
    run("mount", &["--make-shared", text(&lab.path(""))]);
    driver.start_node_by(&namespace("unchanged"));
    driver.start_node().await;

    // The state directory reaches the host, and the path that a caller names does not.
    let inner = lab.path("inner");
    fs::create_dir(&inner).unwrap();
    run("mount", &["-t", "tmpfs", "tmpfs", text(&inner)]);
    run("mount", &["--make-private", text(&inner)]);
    // It is in csi-node's namespace too by now, with the host's for its peer: only a new namespace has it private.
    driver.terminate_node();
    driver.start_node().await;
    let refused = driver.client.stage(&place.id, &inner.join("staging"), place.fs_type).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("mountPropagation: Bidirectional"), "{refused}");
    driver.client.stage(&place.id, &place.staging, place.fs_type).await.unwrap();
    let refused = driver.client.publish(&place.id, &place.staging, &inner.join("target"), place.fs_type).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");

    // The host sees it, and it outlives the namespace.
    place.up(&driver.client).await.unwrap();
    let file = place.target.join("f");
    fs::write(&file, "seen").and_then(|()| fs::File::open(&file)?.sync_all()).unwrap();
    driver.kill_node();
    driver.start_node().await;
    assert_eq!(fs::read_to_string(&file).unwrap(), "seen");
    place.down(&driver.client).await.unwrap();
    driver.stop();
}
