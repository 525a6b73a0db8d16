//! csi-node ends in every phase of its life, in every way, under load, and nobody notices. With LOCKSTEP_SOAK in the environment (`make soak`) ten times as
//! often; LOCKSTEP_SEED says what is left to chance.

use lockstep_csi_tests::kills::{self, Phase, Plan};

/// Of the soak, for each phase.
const LEAST: usize = 5;

#[tokio::test(flavor = "multi_thread")]
async fn csi_node_ends_in_every_phase_of_its_life_and_nobody_notices() {
    let soaking = std::env::var_os("LOCKSTEP_SOAK").is_some();
    let report = kills::run(Plan::kills(if soaking { 200 } else { 20 }, kills::seed())).await;
    kills::show(&report);
    assert!(report.is_clean(), "somebody noticed");
    for phase in Phase::ALL {
        assert!(!soaking || report.hits(phase) >= LEAST, "{} ends in the phase {phase}", report.hits(phase));
    }
}
