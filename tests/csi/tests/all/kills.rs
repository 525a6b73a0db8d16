//! csi-node ends in every phase of its life, in every way, under load, and nobody notices. With LOCKSTEP_SOAK in the environment (`make soak`) ten times as
//! often; LOCKSTEP_SEED says what is left to chance.

use lockstep_csi_tests::kills::{self, Plan};

/// Of the soak, for each phase; and each kind in each.
const LEAST: usize = 5;

#[tokio::test(flavor = "multi_thread")]
async fn csi_node_ends_in_every_phase_of_its_life_and_nobody_notices() {
    let soaking = std::env::var_os("LOCKSTEP_SOAK").is_some();
    let plan = if soaking { Plan::kills(200, LEAST, kills::seed()) } else { Plan::kills(20, 0, kills::seed()) };
    let report = kills::run(plan).await;
    kills::show(&report);
    assert!(report.is_clean(), "somebody noticed");
    assert_eq!(report.missing, None, "too few ends of this kind in this phase");
}
