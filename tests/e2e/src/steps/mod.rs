//! The steps, in order.

mod claims;
mod driver;
mod failures;
mod rights;

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
        step("both copies of it are identical, says cmp", claims::first_compared),
        needed("a database on a claim of its own", failures::database),
        step("a disk fails under the load: no error, and the claim says so", failures::disk_fails),
        step("a new disk: the copies are made again, and the claim says so", failures::new_disk),
        step("the database's pod is replaced: every acknowledged commit is there, and the copies are identical", failures::commits_kept),
        step("a claim grows while it is used", claims::grows),
        step("a raw block device", claims::raw_block),
        step("20 claims and pods at once", claims::many),
        step("deleted claims leave no object, no copy and no space", claims::deleted),
        step("a class with an unknown parameter: the claim says which", claims::unknown_parameter),
        step("a claim that is larger than any two disks pends, and says why", claims::too_large),
        step("the kubelet is killed under the load and starts again: no error", failures::kubelet_restarts),
        step("csi-node's pod is deleted by force under the load: no error", failures::node_pod_deleted),
        step("csi-node's DaemonSet is updated under the load: no error", failures::node_updated),
        step("a minute without the API: a disk fails, csi-node is killed: no error, and one event afterwards", failures::without_api),
        step("every acknowledged commit is there, and the copies are identical", failures::commits_kept),
        step("uninstalling is refused while there are volumes", driver::uninstall_refused),
        step("the driver's accounts were forbidden nothing", rights::all),
        step("without volumes it is not, and leaves what it says", driver::uninstall),
    ]
}
