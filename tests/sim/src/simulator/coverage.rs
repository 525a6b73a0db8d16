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
    Bitmap,
    /// Metadata.
    BadBlocks,
    /// Metadata.
    Witness,
    /// Of two buffers of its own, for a scrub.
    Compare,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Read,
        Self::Write,
        Self::WriteFua,
        Self::Zero,
        Self::CopyRead,
        Self::CopyWrite,
        Self::NextData,
        Self::Flush,
        Self::Superblock,
        Self::Bitmap,
        Self::BadBlocks,
        Self::Witness,
    ];
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// Well.
    Done,
    /// EAGAIN, EINTR.
    HostFault,
    /// A short count.
    Short,
    /// EIO and its like, once.
    Error,
    /// The disk is gone, or bad there.
    Gone,
    /// ENOSPC.
    NoSpace,
    /// A flush that did nothing.
    Lied,
    /// Never reported: the process was killed.
    Killed,
    /// Never reported: the power was cut.
    PowerCut,
}

impl End {
    /// All of them.
    pub const ALL: [Self; 9] =
        [Self::Done, Self::HostFault, Self::Short, Self::Error, Self::Gone, Self::NoSpace, Self::Lied, Self::Killed, Self::PowerCut];
}

/// Why a cell of the table stays empty; `None`: it should be reached sooner or later.
pub fn forbidden(state: State, kind: Kind, end: End) -> Option<&'static str> {
    let client = matches!(kind, Kind::Read | Kind::Write | Kind::WriteFua);
    let copies = matches!(kind, Kind::CopyRead | Kind::CopyWrite | Kind::NextData);
    let metadata = matches!(kind, Kind::Superblock | Kind::Bitmap | Kind::BadBlocks | Kind::Witness);
    match (kind, end) {
        _ if state == State::Assembling && (client || copies || matches!(kind, Kind::Flush | Kind::Zero)) => {
            Some("a: nothing is served yet")
        }
        _ if state == State::GivenUp && (kind != Kind::Read || end == End::NoSpace) => Some("b: only what was under way ends (rule 15)"),
        (_, End::Short) if !matches!(kind, Kind::Read | Kind::Write | Kind::WriteFua | Kind::CopyRead | Kind::CopyWrite) => {
            Some("c: only data has a count")
        }
        (_, End::NoSpace) if !matches!(kind, Kind::Write | Kind::WriteFua | Kind::Zero | Kind::CopyWrite) => {
            Some("d: it allocates nothing (rule 28)")
        }
        (_, End::Lied) if kind != Kind::Flush => Some("e: only a flush can be skipped unseen"),
        (Kind::Witness, End::HostFault | End::Gone) => Some("f: the node's disk fails or not"),
        (Kind::NextData, _) if matches!(state, State::Healthy | State::Degraded) => Some("g: only resync and rebuild search"),
        (Kind::CopyRead | Kind::CopyWrite, _) if state == State::Degraded => Some("h: one leg has nothing to copy to"),
        (Kind::Read, End::NoSpace) => Some("d"),
        _ if metadata && end == End::Lied => Some("e"),
        _ => None,
    }
}

/// Counts.
#[derive(Clone, Debug, Default)]
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
        for name in ["read", "write", "write fua", "zero", "flush", "attach", "detach", "grow", "stop"] {
            if !self.operations.contains_key(name) {
                missing.push(format!("operation {name}"));
            }
        }
        missing
    }

    /// The table: a line for each state and effect, a column for each end. A letter says why a cell must be empty.
    pub fn table(&self) -> String {
        let mut text = format!("{:<12}{:<12}", "state", "effect");
        let mut reasons = BTreeMap::new();
        text.extend(End::ALL.iter().map(|end| format!("{:>10}", format!("{end:?}"))));
        for (state, kind) in State::ALL.iter().flat_map(|state| Kind::ALL.iter().map(move |kind| (*state, *kind))) {
            text += &format!("\n{:<12}{:<12}", format!("{state:?}"), format!("{kind:?}"));
            for end in End::ALL {
                let n = self.cells.get(&(state, kind, end)).copied().unwrap_or(0);
                let cell = match forbidden(state, kind, end) {
                    Some(why) if n == 0 => {
                        let letter = why.split(':').next().unwrap_or_default();
                        if why.len() > 1 {
                            reasons.insert(letter, why);
                        }
                        letter.to_owned()
                    }
                    _ => n.to_string(),
                };
                text += &format!("{cell:>10}");
            }
        }
        reasons.values().for_each(|why| text += &format!("\n{why}"));
        text
    }
}
