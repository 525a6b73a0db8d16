//! The steps, in order.

mod claims;
mod driver;
mod failures;
mod nodes;
mod rights;

use crate::cluster;

/// One step.
pub struct Step {
    /// What is shown.
    pub name: &'static str,
    /// Without it nothing else makes sense.
    pub needed: bool,
    /// Does it, and says what was seen.
    pub run: fn() -> anyhow::Result<String>,
}

const fn needed(name: &'static str, run: fn() -> anyhow::Result<String>) -> Step {
    Step { name, needed: true, run }
}

const fn step(name: &'static str, run: fn() -> anyhow::Result<String>) -> Step {
    Step { name, needed: false, run }
}

/// All of them.
pub fn all() -> Vec<Step> {
    vec![
        needed("helm installs the chart, and the node's two disks are claimed", driver::install),
        needed("a claim, and a pod that writes to it", claims::first),
        step("helm test: a volume, and a pod that starts with it", driver::helm_test),
        step("what the driver's processes have of the memory then", cluster::memory),
        step("both copies of it are identical, says cmp", claims::first_compared),
        needed("a database on a claim of its own", failures::database),
        step("a disk fails under the load: no error, and the claim says so", failures::disk_fails),
        step("the pod's status and the CSINode's say so", failures::health_is_read),
        step("a new disk: the copies are made again, and the claim says so", failures::new_disk),
        step("the pod's status says nothing of its volume any more", failures::health_is_well),
        step("the database's pod is replaced: every acknowledged commit is there, and the copies are identical", failures::commits_kept),
        step("a claim grows while it is used", claims::grows),
        step("a raw block device", claims::raw_block),
        step("a class with an unknown parameter: the claim says which", claims::unknown_parameter),
        step("the kubelet is killed under the load and starts again: no error", failures::kubelet_restarts),
        step("csi-node's pod is deleted by force under the load: no error", failures::node_pod_deleted),
        step("the chart is upgraded under the load, csi-node's image and a definition with it: no error", failures::upgraded),
        step("two minutes without the API: a disk fails, csi-node is killed: no error, and one event afterwards", failures::without_api),
        step("every acknowledged commit is there, and the copies are identical", failures::commits_kept),
        step("a disk that is not blank is left alone, and its object says what to do", claims::used_disk),
        step("a claim that is larger than any two disks pends, and says why", claims::too_large),
        step("it is bound when there are disks that are large enough", claims::too_large_no_more),
        step("many claims and pods at once", claims::many),
        step("deleted claims leave no object, no copy and no space", claims::deleted),
        step("a second node: a pod that only it can take gets its volume there", nodes::second),
        step("that node dies before it claims a volume: another one gets it", nodes::dies_before_it_claims),
        step("a claim for the dead node says what it waits for, and is bound when it is back", nodes::is_dead),
        step("nothing of the driver was started again but what a step had ended", driver::restarts),
        step("uninstalling is refused while there are volumes", driver::uninstall_refused),
        step("the driver's accounts were forbidden nothing, and used every right that they have", rights::all),
        step("without volumes it is not, and leaves what it says", driver::uninstall),
    ]
}
