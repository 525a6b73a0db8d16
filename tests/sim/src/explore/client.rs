//! What the client asks, and what it was told.

use lockstep_core::{
    io::Request,
    units::{BlockRange, Tag},
};

use super::{
    disks::{BLOCKS, TOKENS, Token},
    scenarios::Scenario,
};

/// One request of a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ask {
    /// A write of blocks `start..end`.
    Write {
        /// First block.
        start: u8,
        /// The block after the last one.
        end: u8,
        /// Durable before the answer.
        fua: bool,
    },
    /// The same with zeroes.
    Zero {
        /// First block.
        start: u8,
        /// The block after the last one.
        end: u8,
    },
    /// A read of one block.
    Read {
        /// Which.
        block: u8,
    },
    /// A flush.
    Flush,
}

impl Ask {
    /// What it writes.
    pub fn written(self) -> std::ops::Range<usize> {
        match self {
            Self::Write { start, end, .. } | Self::Zero { start, end } => start as usize..end as usize,
            Self::Read { .. } | Self::Flush => 0..0,
        }
    }

    /// As the mirror hears it; the client's block 0 is the volume's block `base`.
    pub fn request(self, base: u64) -> Request {
        let range = |start: u8, end: u8| BlockRange::new(base + u64::from(start), base + u64::from(end));
        match self {
            Self::Write { start, end, fua } => Request::Write { range: range(start, end), fua },
            Self::Zero { start, end } => Request::Zero(range(start, end)),
            Self::Read { block } => Request::Read(range(block, block + 1)),
            Self::Flush => Request::Flush,
        }
    }

    /// The name of the request with this number.
    pub const fn tag(index: usize) -> Tag {
        Tag(index as u64 + 1)
    }

    /// What the write with this number brings.
    pub fn token(self, index: usize) -> Token {
        if matches!(self, Self::Write { .. }) { index as Token + 1 } else { 0 }
    }
}

impl std::fmt::Display for Ask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Write { start, end, fua } => write!(f, "write{} [{start}, {end})", if *fua { " FUA" } else { "" }),
            Self::Zero { start, end } => write!(f, "zero [{start}, {end})"),
            Self::Read { block } => write!(f, "read {block}"),
            Self::Flush => write!(f, "flush"),
        }
    }
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Progress {
    /// Not submitted.
    Planned,
    /// Submitted, not answered.
    Submitted,
    /// Answered; its buffer is in use.
    Answered,
    /// The mirror has forgotten it.
    Released,
}

/// By block: a version. Versions of a block are numbered by the request that made them, from 1; 0: what was there at first, zeroes. Overlapping
/// writes take effect in the order of their submission (mirror rule 4), which is the order of their numbers.
pub type Versions = [u8; BLOCKS];

/// What the client asked so far, and was told.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// By request.
    pub progress: Vec<Progress>,
    /// By request: for a flush, what it covers; for a read, what it must not be older than.
    mark: Vec<Versions>,
    /// Answered.
    answered: Versions,
    /// Answered, or returned by a read: no later read returns an older one, also after the process was killed.
    pub floor: Versions,
    /// Durable by an answer to a flush or a FUA write: no power cut takes it.
    pub flushed: Versions,
}

impl Client {
    /// A client that asked for nothing yet.
    pub fn new(asks: &[Ask]) -> Self {
        let none = [0; BLOCKS];
        Self { progress: vec![Progress::Planned; asks.len()], mark: vec![none; asks.len()], answered: none, floor: none, flushed: none }
    }

    /// Whether it may be submitted now. Writes are submitted in their order: the other orders are other scenarios.
    pub fn may_submit(&self, asks: &[Ask], index: usize) -> bool {
        let before = |earlier: usize| asks[earlier].written().is_empty() || self.progress[earlier] != Progress::Planned;
        self.progress[index] == Progress::Planned && (asks[index].written().is_empty() || (0..index).all(before))
    }

    /// By request: whether it is still to be submitted.
    pub fn planned(&self) -> Vec<bool> {
        self.progress.iter().map(|progress| *progress == Progress::Planned).collect()
    }

    /// It is submitted.
    pub fn submitted(&mut self, asks: &[Ask], index: usize) {
        self.progress[index] = Progress::Submitted;
        self.mark[index] = match asks[index] {
            Ask::Flush => self.answered,
            Ask::Read { .. } => self.floor,
            Ask::Write { .. } | Ask::Zero { .. } => [0; BLOCKS],
        };
    }

    /// It was answered with success; a read with this value.
    pub fn answered(&mut self, scenario: &Scenario, index: usize, value: Option<Token>) -> Result<(), String> {
        let asks = &scenario.asks;
        if self.progress[index] != Progress::Submitted {
            return Err(format!("{} is answered while it is {:?}", asks[index], self.progress[index]));
        }
        self.progress[index] = Progress::Answered;
        let mark = std::mem::take(&mut self.mark[index]);
        match asks[index] {
            Ask::Flush => self.flushed = std::array::from_fn(|block| self.flushed[block].max(mark[block])),
            Ask::Read { block } => {
                let block = block as usize;
                let value = value.unwrap_or(Token::MAX);
                let version = self
                    .version(scenario, block, value, mark[block])
                    .ok_or_else(|| format!("block {block} reads {value}, but nothing older than version {} may be read", mark[block]))?;
                self.floor[block] = self.floor[block].max(version);
            }
            Ask::Write { fua, .. } => self.wrote(asks[index], index, fua),
            Ask::Zero { .. } => self.wrote(asks[index], index, false),
        }
        Ok(())
    }

    fn wrote(&mut self, ask: Ask, index: usize, fua: bool) {
        for block in ask.written() {
            let version = index as u8 + 1;
            self.answered[block] = self.answered[block].max(version);
            self.floor[block] = self.floor[block].max(version);
            if fua {
                self.flushed[block] = self.flushed[block].max(version);
            }
        }
    }

    /// The oldest version of a block that reads as `value` and is not older than `least`.
    pub fn version(&self, scenario: &Scenario, block: usize, value: Token, least: u8) -> Option<u8> {
        let asks = &scenario.asks;
        if least == 0 && value < TOKENS && scenario.begin.content() & 1 << value != 0 {
            return Some(0);
        }
        (usize::from(least.max(1)) - 1..asks.len())
            .find(|index| {
                let written = asks[*index].written().contains(&block) && self.progress[*index] != Progress::Planned;
                written && asks[*index].token(*index) == value
            })
            .map(|index| index as u8 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explore::Begin;

    #[test]
    fn a_value_that_two_writes_brought_is_the_oldest_that_it_may_be_and_one_that_nobody_brought_is_none() {
        let write = Ask::Write { start: 0, end: 2, fua: false };
        let asks = vec![write, Ask::Zero { start: 0, end: 1 }, write, Ask::Flush];
        let scenario = Scenario { asks, base: 0, ticks: 0, fail: false, again: false, hang: false, returns: false, begin: Begin::New };
        let mut client = Client::new(&scenario.asks);
        for index in [0, 1] {
            assert!(client.may_submit(&scenario.asks, index));
            client.submitted(&scenario.asks, index);
        }
        assert_eq!(client.version(&scenario, 0, 0, 0), Some(0));
        assert_eq!(client.version(&scenario, 0, 0, 1), Some(2));
        assert_eq!(client.version(&scenario, 1, 0, 1), None, "block 1 was not zeroed");
        assert_eq!(client.version(&scenario, 0, 1, 2), None, "an older one");
        assert_eq!(client.version(&scenario, 0, 3, 0), None, "it was not submitted");
    }

    #[test]
    fn a_flush_covers_what_was_answered_before_it() {
        let write = Ask::Write { start: 0, end: 1, fua: false };
        let asks = vec![write, write, Ask::Flush];
        let scenario = Scenario { asks, base: 0, ticks: 0, fail: false, again: false, hang: false, returns: false, begin: Begin::New };
        let mut client = Client::new(&scenario.asks);
        client.submitted(&scenario.asks, 0);
        client.answered(&scenario, 0, None).expect("it was submitted");
        client.submitted(&scenario.asks, 1);
        client.submitted(&scenario.asks, 2);
        client.answered(&scenario, 1, None).expect("it was submitted");
        client.answered(&scenario, 2, None).expect("it was submitted");
        assert_eq!((client.flushed[0], client.floor[0]), (1, 2));
        assert!(client.answered(&scenario, 2, None).is_err(), "twice");
    }
}
