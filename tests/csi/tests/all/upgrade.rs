//! csi-node is replaced under load by another build, that one by this one, and so on: LOCKSTEP_OTHER_NODE is that build's csi-node, as in `make soak`; without
//! it the build replaces itself.

use lockstep_csi_tests::{
    driver::program,
    kills::{self, Plan},
};

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
