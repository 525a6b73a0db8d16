//! Which scenarios there are, by family and number of writes.
//!
//! The shapes are the ways in which ranges of two blocks overlap or do not. What looks the same in a mirror is left out: where both blocks are in
//! one region, block 0 and block 1 are exchanged at will. Where a region ends between them they are not, but a scenario that
//! writes only one of them is then no other than the same in one region.

use lockstep_core::{assembly::Limits, format::REGION_BLOCKS};

use super::{
    client::Ask,
    disks::{BEFORE, BLOCKS, TokenSet},
};

/// Longer than the two passes that clear a bit, so that only `Event::Hang` meets it.
pub const LIMITS: Limits =
    Limits { leg_deadline_millis: 3_000_000, scrub_blocks_per_second: 0, dirty_regions: 256, behind_writes: 0, behind_blocks: 0 };
/// How a scenario begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// A new volume, assembled.
    New,
    /// After an unclean stop that left the legs different in every block: in the first step of assembly.
    Unclean,
}

impl Begin {
    /// What may be read of a block that was not written.
    pub const fn content(self) -> TokenSet {
        match self {
            Self::New => 1,
            Self::Unclean => 1 | 1 << BEFORE,
        }
    }
}

/// What does not change in a scenario.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The client's requests.
    pub asks: Vec<Ask>,
    /// The volume's block that is the client's block 0.
    pub base: u64,
    /// How often the time comes that the mirror waits for.
    pub ticks: u8,
    /// Whether a leg may fail an operation.
    pub fail: bool,
    /// Whether the host may fail an operation of a leg's for a moment.
    pub again: bool,
    /// Whether a leg may hang.
    pub hang: bool,
    /// Whether a leg that went OUT returns, at any time after that.
    pub returns: bool,
    /// How it begins.
    pub begin: Begin,
}

impl Scenario {
    /// Blocks of the volume.
    pub fn blocks(&self) -> u64 {
        self.base + BLOCKS as u64
    }

    /// An outline in a line.
    pub fn name(&self) -> String {
        let asks: Vec<String> = self.asks.iter().map(ToString::to_string).collect();
        format!("{}, at block {}", asks.join("; "), self.base)
    }
}

/// First block, and the block after the last one.
type Shape = (u8, u8);

const SHAPES: [Shape; 3] = [(0, 1), (0, 2), (1, 2)];
/// Both blocks are in the first region, or the second one begins between them.
const BASES: [u64; 2] = [0, REGION_BLOCKS - 1];

/// What a scenario is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Writes in every overlap, a flush, a fault.
    Writes,
    /// The same for two writes at most, and time for the passes that clear their bits.
    Clears,
    /// Writes, and a client's read.
    Reads,
    /// Writes, a flush, a moment's fault of the host.
    Host,
    /// Zeroes or FUA among the writes, and a flush.
    Kinds,
    /// Writes, a flush, and the leg that went OUT returns and is filled.
    Returns,
    /// Writes and a flush after an unclean stop, through assembly and resync.
    Unclean,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 7] = [Self::Writes, Self::Clears, Self::Reads, Self::Host, Self::Kinds, Self::Returns, Self::Unclean];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Writes => "writes",
            Self::Clears => "clears",
            Self::Reads => "reads",
            Self::Host => "host",
            Self::Kinds => "kinds",
            Self::Returns => "returns",
            Self::Unclean => "unclean",
        }
    }

    /// Its scenarios with up to so many writes: those with fewer are the beginnings of those with more.
    pub fn scenarios(self, writes: usize) -> Vec<Scenario> {
        let plain = |(start, end): &Shape| Ask::Write { start: *start, end: *end, fua: false };
        let asks = |shapes: &[Shape]| -> Vec<Ask> { shapes.iter().map(plain).collect() };
        let scenario = |asks: Vec<Ask>, base| {
            let (ticks, begin) = (0, Begin::New);
            Scenario { asks, base, ticks, fail: true, again: false, hang: true, returns: false, begin }
        };
        match self {
            Self::Writes => each(writes, |shapes, base| {
                let mut asks = asks(shapes);
                asks.push(Ask::Flush);
                vec![scenario(asks, base)]
            }),
            Self::Clears => each(writes.min(2), |shapes, base| {
                let mut asks = asks(shapes);
                asks.push(Ask::Flush);
                vec![Scenario { ticks: 2, ..scenario(asks, base) }]
            }),
            Self::Reads => each(writes, |shapes, base| {
                let read = |block| {
                    let mut asks = asks(shapes);
                    asks.push(Ask::Read { block });
                    scenario(asks, base)
                };
                vec![read(0), read(1)]
            }),
            Self::Host => each(writes, |shapes, base| {
                let mut asks = asks(shapes);
                asks.push(Ask::Flush);
                vec![Scenario { fail: false, hang: false, again: true, ..scenario(asks, base) }]
            }),
            Self::Kinds => each(writes, |shapes, base| {
                let replaced = |at: usize, fua: bool| {
                    let mut asks = asks(shapes);
                    let (start, end) = shapes[at];
                    asks[at] = if fua { Ask::Write { start, end, fua } } else { Ask::Zero { start, end } };
                    asks.push(Ask::Flush);
                    scenario(asks, base)
                };
                (0..shapes.len()).flat_map(|at| [replaced(at, false), replaced(at, true)]).collect()
            }),
            // Copies of the part of a region that was never written go on beside each other in more ways than can be looked at.
            Self::Returns | Self::Unclean => each(writes, |shapes, base| {
                let mut asks = asks(shapes);
                asks.push(Ask::Flush);
                let returns = self == Self::Returns;
                let begin = if returns { Begin::New } else { Begin::Unclean };
                if base == 0 { vec![Scenario { returns, begin, hang: !returns, ..scenario(asks, base) }] } else { Vec::new() }
            }),
        }
    }
}

/// Every row of so many shapes, at both bases, but for what looks the same.
fn each(writes: usize, mut of: impl FnMut(&[Shape], u64) -> Vec<Scenario>) -> Vec<Scenario> {
    let mut all = Vec::new();
    for base in BASES {
        for code in 0..SHAPES.len().pow(writes as u32) {
            let row: Vec<Shape> = (0..writes as u32).map(|at| SHAPES[code / SHAPES.len().pow(at) % SHAPES.len()]).collect();
            let mirrored: Vec<Shape> = row.iter().map(|(start, end)| (2 - end, 2 - start)).collect();
            let touches = |block: u8| row.iter().any(|(start, end)| (*start..*end).contains(&block));
            if if base == 0 { row <= mirrored } else { touches(0) && touches(1) } {
                all.extend(of(&row, base));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(base: u64) -> Vec<Vec<Shape>> {
        let mut rows = Vec::new();
        each(2, |row, at| {
            if at == base {
                rows.push(row.to_vec());
            }
            Vec::new()
        });
        rows
    }

    #[test]
    fn rows_that_differ_in_the_names_of_the_blocks_only_are_there_once() {
        let (one, two) = (rows(BASES[0]), rows(BASES[1]));
        assert!(one.contains(&vec![(0, 1), (1, 2)]) && !one.contains(&vec![(1, 2), (0, 1)]));
        assert!(two.contains(&vec![(0, 1), (1, 2)]) && two.contains(&vec![(1, 2), (0, 1)]));
        assert!(!two.contains(&vec![(0, 1), (0, 1)]), "one region");
        // Nine rows, of which only that of two whole ranges is its own mirror image; without two that touch one region.
        assert_eq!((one.len(), two.len()), (5, 7));
    }
}
