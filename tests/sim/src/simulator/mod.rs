//! A deterministic simulator of everything around one mirror: three disks, a witness, a client, an operator, a clock. It drives the core that
//! the product runs. A seed replays a run exactly; a run that breaks an oracle is shrunk to the lines of its script that it needs.
//!
//! **The fault budget.** What the rules promise to survive, and all that the simulator does. The disks in the mirror's places are D
//! and E.
//! - A crash at any event: of the process (the disks go on with what they were given, wholly or in part), or of the machine (each
//!   disk keeps what it flushed, and of each other block any version; metadata in flight is torn in pieces of 32 bytes).
//! - One disk at a time is unsound: gone, blank after a crash, frozen, failing operations (having done a part of them; what a flush that
//!   fails was to cover, no later one covers until the process is new), unreadable or unwritable in places, full, or lying about flushes (then the next power cut leaves it blank: a disk that lies and stays is survived
//!   by no mirror). D may become unsound only while E is sound and counts, by memory and by the witness (in assembly
//!   too, unless the witness was lost: then not before it is written again). D stays unsound until
//!   the mirror was seen to be quiet with it, or it was started anew.
//! - Host faults and short counts on every disk, fewer than the reissues in a row; more are the leg's.
//! - A moment in which both disks fail what they have in flight, both disks full, an error of the last leg, or blocks of it that cannot be
//!   read: no answer is lost, but requests may end with errors. Otherwise a request that ends with an error breaks an oracle.
//! - No block is made unreadable on one disk that is so on the other one.
//! - When the mirror gave up, because its last leg could not record who counts, what was not answered may change at the next start.
//! - At a start, any disks may be missing, in any order. If none is there that the witness counts, assembly must refuse; if one is, it
//!   must not. What is missing returns later, stale. Beside a slot of the witness that was torn, or has gone bad, it may refuse until all are there.
//! - The witness fails for a while; or is lost in a crash while both legs' disks are there and hold superblocks. Then assembly
//!   must refuse one leg alone, and take both.
//! - In a crash, both slots of bitmap pages go bad, on any disks: what they covered is dirty. When no list of bad blocks is valid, assembly must refuse.
//! - The process stands still, for up to an hour, with I/O outstanding that did not hang before: nobody goes OUT.
//! - The object's copy of the epoch lags, or is lost.
//! - Where the operator asked for write-behind: what one leg alone had answered at a crash, and not flushed before, is lost with that leg, or with blocks of
//!   it that cannot be read; a flush after the crash covers it when the legs are equal.
//!
//! Not simulated: the witness or a disk put back from an old copy; two disks lost at once; memory that changes.

mod boot;
mod budget;
mod coverage;
mod disk;
mod machine;
mod rest;
mod script;
mod shell;

use std::collections::BTreeMap;

use lockstep_core::units::VolumeId;

use crate::broken::caught;

pub use crate::broken::Broken;
pub use coverage::{Coverage, Empty, End, Kind, State, empty};
pub use script::{Action, Crash, Fault, Line, Profile, script};

use machine::Machine;

const VOLUME: VolumeId = VolumeId([9; 16]);
/// After so many seeds no cell of the table is empty for no reason: 20,000 had each 55 times or more.
const ENOUGH: usize = 4000;
/// Runs that finding a minimal script may take.
const SHRINKING: u32 = 1000;
/// How many of the last things that happened are shown.
const TOLD: usize = 10_000;

/// The oracles, and the rules that each watches.
pub const ORACLES: [(&str, &str); 14] = [
    ("reads are linearizable", "mirror rules 4, 7, 21, 29, 31"),
    ("answered on every leg that counts", "mirror rules 5, 8, 16, 32"),
    ("flushed on every leg that counts", "mirror rule 15"),
    ("exclusive", "mirror rules 3, 6"),
    ("touching writes go in parallel", "mirror rule 2"),
    ("legs are identical", "mirror rules 14, 18, 22, 28"),
    ("bits", "mirror rules 17, 18"),
    ("bad blocks", "mirror rule 22"),
    ("no stale leg", "mirror rules 11, 12, 13"),
    ("availability", "mirror rules 6, 9, 11, 14, 26, 27"),
    ("every request ends", "mirror rules 5, 14, 25, 27"),
    ("errors are errors", "mirror rule 2"),
    ("bounds", "mirror rules 17, 27, 32"),
    ("panic", "an invariant of `mirror/mod.rs`, which names its mirror rule there, or nothing may panic: mirror rule 33"),
];

impl Broken {
    /// The mirror rules that say so.
    pub fn rules(&self) -> &'static str {
        ORACLES.iter().find(|(oracle, _)| *oracle == self.oracle).map_or("?", |(_, rules)| rules)
    }
}

/// Besides what the oracles see from outside, the core's own assertions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Oracles only.
    Oracles,
    /// `Mirror::check_invariants` after every event too.
    Invariants,
}

/// One run of these lines: what it reached, or what broke.
pub fn run(seed: u64, lines: &[Line], watch: Watch) -> (Coverage, Option<Broken>) {
    let (coverage, broken, _) = play(seed, lines, watch, false);
    (coverage, broken)
}

fn play(seed: u64, lines: &[Line], watch: Watch, tell: bool) -> (Coverage, Option<Broken>, Vec<String>) {
    let mut machine = Machine::new(seed, Profile::of(seed), watch, tell);
    let ended = caught("panic", || machine.play(lines));
    let broken = ended.map_or_else(Some, |()| machine.broken.take());
    (machine.coverage, broken, machine.told)
}

/// The run of a seed.
pub fn run_seed(seed: u64, watch: Watch) -> (Coverage, Option<Broken>) {
    run(seed, &script(seed, &Profile::of(seed)), watch)
}

/// Why a seed fails: the oracle, the script that is left of it, and what happened.
pub fn explain(seed: u64, watch: Watch) -> Option<String> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let lines = script(seed, &Profile::of(seed));
    let text = run(seed, &lines, watch).1.map(|broken| {
        let lines = script::shrink(lines, SHRINKING, |rest| run(seed, rest, watch).1.is_some_and(|other| other.oracle == broken.oracle));
        let (_, last, told) = play(seed, &lines, watch, true);
        let last = last.unwrap_or(broken);
        let script: Vec<String> = lines.iter().map(|(action, salt)| format!("    ({action:?}, {salt:#x}),")).collect();
        let told = told[told.len().saturating_sub(TOLD)..].join("\n");
        format!(
            "seed {seed}: {} ({}): {}\n{:?}\n-- minimal script, {} lines\n{}\n-- what happened\n{told}\nseed {seed} broke an oracle",
            last.oracle,
            last.rules(),
            last.text,
            Profile::of(seed),
            lines.len(),
            script.join("\n"),
        )
    });
    std::panic::set_hook(hook);
    text
}

/// The seeds that once found something, and what: test, mutant. They hold for one version of the script; these hold for ever.
pub fn regressions() -> impl Iterator<Item = (u64, &'static str)> {
    let lines = include_str!("../../regressions.txt").lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines.map(|line| {
        let (seed, what) = line.split_once(' ').unwrap_or((line, ""));
        (seed.parse().unwrap_or_else(|error| panic!("{line}: {error}")), what.trim())
    })
}

/// What many seeds reached.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// All of it.
    pub coverage: Coverage,
    operations: Vec<u64>,
    crashes: Vec<u64>,
    faults: Vec<u64>,
}

impl Summary {
    /// Adds one seed's.
    pub fn add(&mut self, coverage: &Coverage) {
        let sum = |counts: &BTreeMap<&str, u64>| counts.values().sum();
        self.operations.push(sum(&coverage.operations));
        self.crashes.push(sum(&coverage.crashes));
        self.faults.push(sum(&coverage.faults));
        self.coverage.add(coverage);
    }

    /// Adds another one to it.
    pub fn merge(&mut self, other: Self) {
        self.operations.extend(other.operations);
        self.crashes.extend(other.crashes);
        self.faults.extend(other.faults);
        self.coverage.add(&other.coverage);
    }

    /// How many were added.
    pub fn seeds(&self) -> usize {
        self.operations.len()
    }

    /// What a run must reach and this one did not: kinds, and what a seed is to have at the median.
    pub fn missing(&self) -> Vec<String> {
        let mut missing = self.coverage.missing();
        if self.seeds() >= ENOUGH {
            missing.extend(self.coverage.unreached());
        }
        for (median, (least, what)) in self.medians().iter().zip([(500, "client operations"), (3, "crashes"), (2, "other faults")]) {
            if *median < least {
                missing.push(format!("{least} {what} in a seed, at the median"));
            }
        }
        missing
    }

    /// Medians per seed: client operations, crashes, other faults.
    pub fn medians(&self) -> [u64; 3] {
        [&self.operations, &self.crashes, &self.faults].map(|counts| {
            let mut counts = counts.clone();
            counts.sort_unstable();
            counts.get(counts.len() / 2).copied().unwrap_or(0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_replays_a_run_exactly() {
        for seed in 0..20 {
            let play = || play(seed, &script(seed, &Profile::of(seed)), Watch::Invariants, true);
            let (first, second) = (play(), play());
            assert!(first.2.len() > 1000, "seed {seed} tells nothing");
            assert!(first == second, "seed {seed}");
        }
    }
}
