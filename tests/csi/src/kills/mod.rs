//! Ends of csi-node under load, one after the other, in every phase of its life; and the table of what was seen.
//!
//! ```text
//! for each planned end:  bring about its phase --> end csi-node --> start the next one at once --> wait until all is healthy
//! loads, all the time:   fio that verifies, writers that overlap, a writer that fsyncs, PostgreSQL, a probe that times its requests
//! at the end:            cmp of the copies, what each copy alone holds of what was fsynced and committed
//! ```
//! Which phase an end hit is not believed but read: from the log that csi-node left (`log.rs`).

mod end;
mod loads;
mod log;
mod postgres;
mod report;
mod session;

use std::{fmt, os::unix::process::ExitStatusExt, path::PathBuf, process::ExitStatus};

pub use report::{End, Report};
pub use session::run;

/// How csi-node ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// SIGKILL.
    Kill,
    /// SIGTERM, as for an upgrade.
    Term,
    /// SIGABRT, as of a bug.
    Abort,
    /// The kernel's, at the memory limit of its cgroup.
    OutOfMemory,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 4] = [Self::Kill, Self::Term, Self::Abort, Self::OutOfMemory];

    /// Whether this is how it ends.
    fn ended_so(self, status: ExitStatus) -> bool {
        match self {
            Self::Kill | Self::OutOfMemory => status.signal() == Some(libc::SIGKILL),
            Self::Term => status.success(),
            Self::Abort => status.signal() == Some(libc::SIGABRT),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kill => "SIGKILL",
            Self::Term => "SIGTERM",
            Self::Abort => "SIGABRT",
            Self::OutOfMemory => "OOM",
        })
    }
}

/// What csi-node was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Nothing but serving.
    Normal,
    /// It assembles a mirror that is being staged.
    Assembly,
    /// It takes up what its predecessor served.
    Recovery,
    /// A leg failed and is not durably OUT yet.
    OutRecord,
    /// A bitmap page with more dirty regions is on its way.
    BitmapSet,
    /// A bitmap page with fewer dirty regions is on its way.
    BitmapClear,
    /// The legs are being made equal after an unclean stop.
    Resync,
    /// A leg is being filled.
    Rebuild,
    /// A disk hangs.
    Hung,
    /// A volume is being staged and its mirror serves.
    Stage,
    /// A volume is being unstaged.
    Unstage,
    /// A volume is being formatted.
    Mkfs,
}

impl Phase {
    /// All.
    pub const ALL: [Self; 12] = [
        Self::Normal,
        Self::Assembly,
        Self::Recovery,
        Self::OutRecord,
        Self::BitmapSet,
        Self::BitmapClear,
        Self::Resync,
        Self::Rebuild,
        Self::Hung,
        Self::Stage,
        Self::Unstage,
        Self::Mkfs,
    ];
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Normal => "normal",
            Self::Assembly => "assembly",
            Self::Recovery => "recovery",
            Self::OutRecord => "OUT record",
            Self::BitmapSet => "bitmap set",
            Self::BitmapClear => "bitmap clear",
            Self::Resync => "resync",
            Self::Rebuild => "rebuild",
            Self::Hung => "disk hung",
            Self::Stage => "stage",
            Self::Unstage => "unstage",
            Self::Mkfs => "mkfs",
        })
    }
}

/// Which ends, and whose.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many.
    pub ends: usize,
    /// At least so many in each phase, and one of each kind; half as many ends more as were asked for may be spent on that.
    pub least: usize,
    /// In these phases, in turn.
    pub phases: Vec<Phase>,
    /// Of these kinds, in turn.
    pub kinds: Vec<Kind>,
    /// Builds of csi-node: each one that ends is replaced by the next in turn.
    pub builds: Vec<PathBuf>,
    /// Of what is left to chance.
    pub seed: u64,
}

impl Plan {
    /// Every kind in every phase.
    pub fn kills(ends: usize, least: usize, seed: u64) -> Self {
        Self { ends, least, phases: Phase::ALL.to_vec(), kinds: Kind::ALL.to_vec(), builds: vec![crate::driver::program("csi-node")], seed }
    }

    /// Upgrades: this build is replaced by that one, that one by this one, and so on.
    pub fn upgrades(ends: usize, other: PathBuf, seed: u64) -> Self {
        let builds = vec![crate::driver::program("csi-node"), other];
        Self { ends, least: 0, phases: vec![Phase::Normal], kinds: vec![Kind::Term], builds, seed }
    }

    /// The planned phases and kinds, without end; each phase meets each kind.
    fn steps(&self) -> impl Iterator<Item = (Phase, Kind)> + use<> {
        let (phases, kinds) = (self.phases.clone(), self.kinds.clone());
        (0..).map(move |at| (phases[at % phases.len()], kinds[(at + at / phases.len()) % kinds.len()]))
    }
}

/// What is left to chance: LOCKSTEP_SEED, or something fresh.
pub fn seed() -> u64 {
    let given = std::env::var("LOCKSTEP_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()));
    println!("LOCKSTEP_SEED={seed}");
    seed
}

/// Prints the table, for the soak's too, and the errors.
pub fn show(report: &Report) {
    report.errors.iter().for_each(|error| println!("{error}"));
    report.to_string().lines().for_each(|line| println!("figure: {line}"));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_phase_meets_each_kind() {
        let plan = Plan { ends: 48, least: 0, phases: Phase::ALL.to_vec(), kinds: Kind::ALL.to_vec(), builds: Vec::new(), seed: 1 };
        let met: BTreeSet<_> = plan.steps().take(plan.ends).collect();
        assert_eq!(met.len(), 48);
    }
}
