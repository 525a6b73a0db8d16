//! What a run reached: operations, faults, crashes, and a table of state x effect x fault.

use std::collections::BTreeMap;

use lockstep_core::{
    io::Fill,
    status::{LegState, Status, Sync},
};

/// What the mirror was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Its first record is not durable yet.
    Assembling,
    /// Both legs count and are equal.
    Healthy,
    /// Both legs count and may differ.
    Resync,
    /// One leg counts.
    Degraded,
    /// One leg gets what it missed.
    Rebuild,
    /// One leg gets everything.
    FullRebuild,
    /// It takes no more writes.
    GivenUp,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Assembling, Self::Healthy, Self::Resync, Self::Degraded, Self::Rebuild, Self::FullRebuild, Self::GivenUp];

    /// From what the mirror says.
    pub fn of(status: &Status) -> Self {
        match status.sync {
            _ if status.read_only => Self::GivenUp,
            _ if !status.ready => Self::Assembling,
            Sync::Rebuild(Fill::Everything) => Self::FullRebuild,
            Sync::Rebuild(Fill::DirtyRegions) => Self::Rebuild,
            Sync::Resync => Self::Resync,
            Sync::Idle if status.legs.iter().all(|leg| leg.state == LegState::In) => Self::Healthy,
            Sync::Idle => Self::Degraded,
        }
    }
}

/// What the mirror asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// For a client.
    Read,
    /// For a client.
    Write,
    /// For a client, to be durable.
    WriteFua,
    /// Zeroes, for a client or where a copy's source has a hole.
    Zero,
    /// From a buffer of its own.
    CopyRead,
    /// From a buffer of its own.
    CopyWrite,
    /// Where is written data?
    NextData,
    /// Of a leg.
    Flush,
    /// Metadata.
    Superblock,
    /// Metadata.
    BadBlocks,
    /// Metadata.
    Bitmap,
    /// Metadata.
    Witness,
    /// Of two buffers of its own, for a scrub.
    Compare,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Read,
        Self::Write,
        Self::WriteFua,
        Self::Zero,
        Self::CopyRead,
        Self::CopyWrite,
        Self::NextData,
        Self::Flush,
        Self::Superblock,
        Self::BadBlocks,
        Self::Bitmap,
        Self::Witness,
        Self::Compare,
    ];
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// Well.
    Done,
    /// EAGAIN and its like.
    HostFault,
    /// A short count.
    Short,
    /// EIO and its like, once.
    Error,
    /// The disk is gone, or bad there.
    Gone,
    /// ENOSPC, EDQUOT.
    NoSpace,
    /// A flush that did nothing.
    Lied,
    /// However it ended, after its leg's deadline; in the state in which it was begun.
    Late,
    /// Never reported: the process was killed.
    Killed,
    /// Never reported: the power was cut.
    PowerCut,
}

impl End {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Done,
        Self::HostFault,
        Self::Short,
        Self::Error,
        Self::Gone,
        Self::NoSpace,
        Self::Lied,
        Self::Late,
        Self::Killed,
        Self::PowerCut,
    ];
}

/// Why a cell of the table is empty; `None`: it is reached sooner or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Empty {
    /// A rule, or the fault budget, forbids it: the run fails if it is reached.
    Forbidden(char, &'static str),
    /// It needs a moment that few runs have.
    Rare(char, &'static str),
}

/// See `Empty`.
pub fn empty(state: State, kind: Kind, end: End) -> Option<Empty> {
    use Empty::{Forbidden, Rare};
    let data = matches!(kind, Kind::Read | Kind::Write | Kind::WriteFua | Kind::CopyRead | Kind::CopyWrite);
    let allocates = matches!(kind, Kind::Write | Kind::WriteFua | Kind::Zero | Kind::CopyWrite);
    let metadata = matches!(kind, Kind::Superblock | Kind::BadBlocks | Kind::Bitmap | Kind::Witness);
    Some(match (state, kind, end) {
        (_, _, End::Short) if !data => Forbidden('c', "only data has a count (rule 6)"),
        (_, _, End::NoSpace) if !allocates => Forbidden('d', "it allocates nothing: metadata is preallocated (rules 10, 28)"),
        (_, _, End::Lied) if kind != Kind::Flush => Forbidden('e', "only a flush can be skipped unseen"),
        (_, Kind::Witness, End::HostFault | End::Gone | End::Late) => {
            Forbidden('f', "the node's disk fails or does not, and no deadline takes it out (rule 10)")
        }
        (_, Kind::Compare, _) if !matches!(end, End::Done | End::Killed | End::PowerCut) => {
            Forbidden('l', "it is done in memory: nothing of it can fail (rule 30)")
        }
        (State::Assembling, _, _) if !metadata => Forbidden('a', "nothing is served before the record is durable (rule 9)"),
        (State::Healthy | State::Resync, Kind::Read | Kind::Write | Kind::Zero | Kind::NextData | Kind::Flush, End::Late)
        | (State::Healthy, Kind::WriteFua | Kind::Superblock | Kind::Bitmap, End::Late)
        | (State::Rebuild | State::FullRebuild, Kind::Write | Kind::Zero, End::Late)
        | (State::FullRebuild, Kind::CopyWrite | Kind::Flush, End::Late) => return None,
        (_, _, End::Late) => Rare(
            'm',
            "rare: one leg hangs, seldom in that very moment; the budget lets the last good one answer in time, and case 36 hangs both (rule 27)",
        ),
        (State::Resync, Kind::Witness, _) => Rare(
            'i',
            "rare: who counts does not change while both count, nor the pin while they may differ; what holds is said again (rules 9, 21)",
        ),
        (State::Rebuild | State::FullRebuild, Kind::NextData, End::Gone) => Rare(
            'j',
            "rare: a scrub's search of a leg that was replaced ends late; the source is the only good copy, and the budget keeps it (rule 22)",
        ),
        (State::GivenUp, _, End::Gone | End::NoSpace | End::Lied) => {
            Rare('k', "rare: the budget lets no more disks fail then; what was asked of a leg that was replaced ends late (rule 15)")
        }
        (State::Resync | State::Degraded | State::Rebuild | State::FullRebuild, Kind::Compare, _)
        | (State::Healthy, Kind::Compare, End::Killed) => {
            Rare('t', "rare: a scrub waits for the end of a resync, and ends when a leg is lost (rule 30)")
        }
        (State::Assembling | State::Resync | State::GivenUp, Kind::BadBlocks, _)
        | (State::Healthy | State::Degraded, Kind::BadBlocks, End::Error | End::Gone | End::Killed | End::PowerCut)
        | (State::Rebuild | State::FullRebuild, Kind::BadBlocks, End::Gone | End::Killed) => {
            Rare('u', "rare: a block is lost only where the last good copy could not be read, and found again by a write (rule 22)")
        }
        (State::GivenUp, Kind::Read, _)
        | (State::GivenUp, Kind::Write | Kind::Zero | Kind::NextData | Kind::Superblock, End::Done | End::Error)
        | (State::GivenUp, Kind::CopyRead | Kind::Witness, End::Done)
        | (State::GivenUp, Kind::Flush | Kind::Bitmap, End::Error) => return None,
        (State::GivenUp, _, _) => Rare('r', "rare: what was under way when it gave up ends (rule 15)"),
        (State::Healthy | State::Rebuild | State::FullRebuild, Kind::Witness, End::Killed | End::PowerCut)
        | (State::Resync | State::Rebuild | State::FullRebuild, Kind::Bitmap | Kind::Superblock, End::Gone)
        | (State::Rebuild, Kind::Superblock, End::Error | End::Killed)
        | (State::Resync, Kind::Superblock, End::Error | End::Killed | End::PowerCut) => {
            Rare('s', "rare: a crash or fault between two steps of a change of who counts, or of the size (rules 9, 23, 31)")
        }
        (State::Healthy, Kind::CopyWrite, End::Killed | End::PowerCut)
        | (State::Degraded, Kind::CopyRead, End::Killed | End::PowerCut)
        | (State::Degraded, Kind::CopyWrite, End::HostFault | End::Short | End::Killed | End::PowerCut) => {
            Rare('v', "rare: a repair or resync that was under way when a leg went out (rules 22, 26)")
        }
        (State::Rebuild | State::FullRebuild, Kind::WriteFua | Kind::CopyWrite, End::NoSpace) => {
            Rare('w', "rare: a leg is full while the other one is filled (rule 28)")
        }
        _ => return None,
    })
}

const OPERATIONS: &[&str] =
    &["read", "write", "write fua", "zero", "flush", "attach", "detach", "grow", "stop", "invalid", "scrub", "stop scrub", "write-mostly"];
const CRASHES: &[&str] = &[
    "power cut in assembly",
    "power cut in resync",
    "power cut in rebuild",
    "power cut in a metadata write",
    "power cut",
    "kill in assembly",
    "kill in resync",
    "kill in rebuild",
    "kill in a metadata write",
    "kill",
];
const FAULTS: &[&str] = &[
    "disk gone",
    "EIO once or more",
    "flush fails",
    "metadata fails, torn",
    "host faults in a row",
    "unreadable blocks",
    "unwritable blocks",
    "one leg full",
    "flushes lie",
    "disk hangs",
    "both legs full",
    "bus reset",
    "EIO of the last leg",
    "unreadable blocks of the last leg",
    "witness fails",
    "host faults and short counts",
    "a disk comes back blank",
    "the witness is lost",
    "the object's copy is lost",
    "a bitmap page goes bad",
    "the lists of bad blocks go bad",
];
const OTHERS: &[&str] = &[
    "resyncs completed",
    "rebuilds completed",
    "legs out",
    "reads repaired",
    "given up",
    "writes failed on both",
    "starts refused",
    "crashes in a stop",
    "blocks lost",
    "late reads",
    "pauses",
    "scrubs completed",
    "hung legs outlasted",
    "answered behind",
    "lost behind",
];

/// Counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// State, effect, end.
    pub cells: BTreeMap<(State, Kind, End), u64>,
    /// Client operations, by name.
    pub operations: BTreeMap<&'static str, u64>,
    /// Faults that were allowed, by name.
    pub faults: BTreeMap<&'static str, u64>,
    /// Crashes, by name.
    pub crashes: BTreeMap<&'static str, u64>,
    /// Other things worth a count.
    pub others: BTreeMap<&'static str, u64>,
    /// Events that the core handled.
    pub events: u64,
}

impl Coverage {
    /// Adds another one to it.
    pub fn add(&mut self, other: &Self) {
        for (cell, n) in &other.cells {
            *self.cells.entry(*cell).or_default() += n;
        }
        let pairs = [
            (&mut self.operations, &other.operations),
            (&mut self.faults, &other.faults),
            (&mut self.crashes, &other.crashes),
            (&mut self.others, &other.others),
        ];
        for (mine, theirs) in pairs {
            for (name, n) in theirs {
                *mine.entry(name).or_default() += n;
            }
        }
        self.events += other.events;
    }

    /// Kinds of effect, ends, states that were never reached.
    pub fn missing(&self) -> Vec<String> {
        let reached = |wanted: &dyn Fn(&(State, Kind, End)) -> bool| self.cells.keys().any(wanted);
        let mut missing = Vec::new();
        missing.extend(State::ALL.iter().filter(|s| !reached(&|c| c.0 == **s)).map(|s| format!("state {s:?}")));
        missing.extend(Kind::ALL.iter().filter(|k| !reached(&|c| c.1 == **k)).map(|k| format!("effect {k:?}")));
        missing.extend(End::ALL.iter().filter(|e| !reached(&|c| c.2 == **e)).map(|e| format!("end {e:?}")));
        for (names, counts) in [(OPERATIONS, &self.operations), (CRASHES, &self.crashes), (FAULTS, &self.faults), (OTHERS, &self.others)] {
            missing.extend(names.iter().filter(|name| !counts.contains_key(**name)).map(|name| (*name).to_owned()));
        }
        missing
    }

    /// Cells that are empty for no reason.
    pub fn unreached(&self) -> Vec<String> {
        let cells = State::ALL
            .iter()
            .flat_map(|state| Kind::ALL.iter().flat_map(move |kind| End::ALL.iter().map(move |end| (*state, *kind, *end))));
        let empty = cells.filter(|cell| !self.cells.contains_key(cell) && empty(cell.0, cell.1, cell.2).is_none());
        empty.map(|(state, kind, end)| format!("{state:?} {kind:?} {end:?}")).collect()
    }

    /// Cells that were reached against the rule that forbids them.
    pub fn forbidden(&self) -> Vec<String> {
        let reached = self.cells.keys().filter_map(|(state, kind, end)| match empty(*state, *kind, *end) {
            Some(Empty::Forbidden(_, why)) => Some(format!("{state:?} {kind:?} {end:?}, though {why}")),
            _ => None,
        });
        reached.collect()
    }

    /// The table: a line for each state and effect, a column for each end. A letter says why a cell is empty.
    pub fn table(&self) -> String {
        let mut text = format!("{:<12}{:<12}", "state", "effect");
        let mut reasons = BTreeMap::new();
        text.extend(End::ALL.iter().map(|end| format!("{:>10}", format!("{end:?}"))));
        for (state, kind) in State::ALL.iter().flat_map(|state| Kind::ALL.iter().map(move |kind| (*state, *kind))) {
            text += &format!("\n{:<12}{:<12}", format!("{state:?}"), format!("{kind:?}"));
            for end in End::ALL {
                let n = self.cells.get(&(state, kind, end)).copied().unwrap_or(0);
                let cell = match empty(state, kind, end) {
                    Some(Empty::Forbidden(letter, why) | Empty::Rare(letter, why)) if n == 0 => {
                        reasons.insert(letter, why);
                        letter.to_string()
                    }
                    _ => n.to_string(),
                };
                text += &format!("{cell:>10}");
            }
        }
        reasons.iter().for_each(|(letter, why)| text += &format!("\n{letter}: {why}"));
        text
    }
}
