//! What the shell does for the core: takes its effects, does the work on the disks, reports it.

use lockstep_core::{
    io::{Buffer, Effect, Effects, Event as CoreEvent, LegOp, Notice, Outcome},
    units::{BLOCK_SIZE, BlockRange, Errno, IoId, Slot, Tag},
};

use super::{
    Broken,
    client::Progress,
    disks::{Leg, META, PageId, Pages, Token},
    scenarios::Scenario,
    world::{Left, PROBES, World},
};

/// What the mirror asked for, and has not heard of yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Work {
    pub io: IoId,
    /// `None`: the witness.
    pub slot: Option<Slot>,
    pub op: Op,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Op {
    Read {
        range: BlockRange,
        buffer: Buffer,
        memory: u32,
    },
    Write {
        range: BlockRange,
        data: Vec<Token>,
        fua: bool,
    },
    Zero(BlockRange),
    Flush,
    NextData(BlockRange),
    /// The index into the leg's or the witness's pages, and the page.
    Page(usize, PageId),
}

impl Op {
    fn written(&self) -> Option<BlockRange> {
        match self {
            Self::Write { range, .. } | Self::Zero(range) => Some(*range),
            _ => None,
        }
    }

    /// The client's memory that a read lands in.
    pub(super) fn memory(&self) -> Option<(Tag, u32)> {
        match self {
            Self::Read { buffer: Buffer::Request { tag, .. }, memory, .. } => Some((*tag, *memory)),
            _ => None,
        }
    }
}

/// Memory that a read fills: whose, which piece of memory, what is in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Memory {
    pub tag: Tag,
    pub memory: u32,
    pub content: Vec<Token>,
}

impl World {
    pub(super) fn leg(&mut self, slot: Slot) -> Result<&mut Leg, Broken> {
        self.legs[slot.index()].as_mut().ok_or_else(|| Broken::new("no stale leg", format!("work for {slot:?}, where no leg is")))
    }

    pub(super) fn execute(&mut self, scenario: &Scenario, slot: Slot, op: &Op) -> Result<Outcome, Broken> {
        let base = scenario.base;
        let leg = *self.leg(slot)?;
        Ok(match op {
            Op::Read { range, buffer, memory } => {
                let read = |at: u64| if at < base { 0 } else { leg.read((at - base) as usize) };
                let values: Vec<Token> = (range.start..range.end).map(read).collect();
                match buffer {
                    Buffer::Request { tag, skip } => {
                        let mine = self.memory.iter_mut().find(|mine| mine.tag == *tag && mine.memory == *memory);
                        // Memory that nobody names any more takes what a late read brings.
                        if let Some(mine) = mine {
                            mine.content[*skip as usize..*skip as usize + values.len()].copy_from_slice(&values);
                        }
                    }
                    Buffer::Copy { index, skip } => {
                        let content = &mut self.copies[*index as usize];
                        content.truncate(*skip as usize);
                        content.extend(values);
                    }
                }
                Outcome::Done(range.len() * BLOCK_SIZE)
            }
            Op::Write { range, data, fua } => {
                for (at, token) in (range.start..range.end).zip(data) {
                    self.land(scenario, slot, at, *token, *fua)?;
                }
                Outcome::Done(range.len() * BLOCK_SIZE)
            }
            Op::Zero(range) => {
                for at in range.start.max(base)..range.end {
                    self.land(scenario, slot, at, 0, false)?;
                }
                Outcome::Done(0)
            }
            Op::Flush => {
                self.leg(slot)?.flush_ended(true);
                Outcome::Done(0)
            }
            Op::NextData(range) => Outcome::Extent(leg.next_data(*range, base)),
            Op::Page(at, page) => {
                self.leg(slot)?.meta[*at] = *page;
                Outcome::Done(0)
            }
        })
    }

    fn land(&mut self, scenario: &Scenario, slot: Slot, at: u64, token: Token, fua: bool) -> Result<(), Broken> {
        if at >= scenario.base {
            self.leg(slot)?.write((at - scenario.base) as usize, token, fua);
        } else if token != 0 {
            return Err(Broken::new("nothing is written where nobody wrote", format!("block {at} of {slot:?} gets {token}")));
        }
        Ok(())
    }

    pub(super) fn fail(&mut self, scenario: &Scenario, index: usize, left: Left, errno: Errno, pages: &mut Pages) -> Result<(), Broken> {
        let Work { io, slot, op } = self.work.remove(index);
        let Some(slot) = slot else { return Ok(()) };
        match (&op, left) {
            (Op::Flush, _) => self.leg(slot)?.flush_ended(false),
            (Op::Page(at, page), Left::Torn) => {
                let old = self.leg(slot)?.meta[*at];
                self.leg(slot)?.meta[*at] = pages.torn(*page, old);
            }
            (Op::Write { .. } | Op::Zero(_) | Op::Page(..), Left::New) => {
                self.execute(scenario, slot, &op)?;
            }
            (Op::Write { range, data, .. }, _) => {
                for (at, token) in (range.start..range.end).zip(data).filter(|(at, _)| *at >= scenario.base) {
                    self.leg(slot)?.write_failed((at - scenario.base) as usize, *token);
                }
            }
            (Op::Zero(range), _) => {
                for at in range.start.max(scenario.base)..range.end {
                    self.leg(slot)?.write_failed((at - scenario.base) as usize, 0);
                }
            }
            _ => {}
        }
        self.handle(scenario, CoreEvent::Done { io, outcome: Outcome::Failed(errno) }, pages)
    }

    pub(super) fn perform(&mut self, scenario: &Scenario, mut out: Effects, pages: &mut Pages) -> Result<(), Broken> {
        for effect in out.drain() {
            match effect {
                Effect::Leg { slot, io, op } => self.take(scenario, slot, io, op, pages)?,
                Effect::WriteWitness { io, offset, page } => {
                    if self.work.iter().any(|work| work.slot.is_none()) {
                        return Err(Broken::new("bounds", "two writes of the witness at once"));
                    }
                    self.work.push(Work { io, slot: None, op: Op::Page((offset / 4096) as usize, pages.id(&page)) });
                }
                Effect::Compare { .. } => return Err(Broken::new("bounds", "nobody asked for a scrub")),
                Effect::Complete { tag, result } => self.complete(scenario, tag, result)?,
                Effect::Release { tag } => self.release(scenario, tag)?,
                Effect::NewBuffer { tag } => {
                    self.memories += 1;
                    if let Some(mine) = self.memory.iter_mut().find(|mine| mine.tag == tag) {
                        mine.memory = self.memories;
                        mine.content.fill(Token::MAX);
                    }
                }
                Effect::ReleaseCopy { index } => self.copies[index as usize].clear(),
                Effect::Notice(Notice::LegFailed { slot, .. }) => self.leaving[slot.index()] = true,
                Effect::Notice(Notice::LegOut { slot }) => self.leaving[slot.index()] = false,
                Effect::Notice(Notice::ReadOnly { .. }) => {
                    return Err(Broken::new("one fault stops nobody", "the mirror gives up"));
                }
                Effect::Notice(_) => {}
            }
        }
        Ok(())
    }

    fn release(&mut self, scenario: &Scenario, tag: Tag) -> Result<(), Broken> {
        self.memory.retain(|mine| mine.tag != tag);
        if tag.0 >= PROBES {
            return Ok(());
        }
        let index = tag.0 as usize - 1;
        let progress = std::mem::replace(&mut self.client.progress[index], Progress::Released);
        if progress != Progress::Answered {
            return Err(Broken::new("every request ends", format!("{} is released while it is {progress:?}", scenario.asks[index])));
        }
        Ok(())
    }

    fn complete(&mut self, scenario: &Scenario, tag: Tag, result: Result<(), Errno>) -> Result<(), Broken> {
        let value = self.memory.iter().find(|mine| mine.tag == tag).map(|mine| mine.content.clone());
        if let Err(errno) = result {
            return Err(Broken::new("one fault is nobody's error", format!("{tag:?} gets {errno}")));
        }
        match value {
            Some(content) if tag.0 >= PROBES => self.probed.push((tag, content)),
            None if tag.0 >= PROBES => {}
            value => {
                let value = value.map(|content| content[0]);
                let answered = self.client.answered(scenario, tag.0 as usize - 1, value);
                answered.map_err(|text| Broken::new("reads are linearizable", text))?;
            }
        }
        Ok(())
    }

    fn take(&mut self, scenario: &Scenario, slot: Slot, io: IoId, op: LegOp, pages: &mut Pages) -> Result<(), Broken> {
        self.leg(slot)?;
        let op = match op {
            LegOp::Read { range, buffer } => {
                let mine = |tag| self.memory.iter().find(|mine| mine.tag == tag).map(|mine| mine.memory);
                let memory = match buffer {
                    Buffer::Request { tag, .. } => mine(tag).ok_or_else(|| Broken::new("bounds", format!("{tag:?} has no buffer")))?,
                    Buffer::Copy { .. } => 0,
                };
                Op::Read { range, buffer, memory }
            }
            LegOp::Write { range, buffer, fua } => Op::Write { range, data: self.payload(scenario, buffer, range)?, fua },
            LegOp::Zero { range } => Op::Zero(range),
            LegOp::Flush => {
                if !self.leg(slot)?.flush_issued() {
                    return Err(Broken::new("bounds", format!("two flushes of leg {slot:?} at once")));
                }
                Op::Flush
            }
            LegOp::NextData { range } => Op::NextData(range),
            LegOp::WriteMeta { offset, page } => {
                let at = META.iter().position(|known| *known == offset);
                let at = at.ok_or_else(|| Broken::new("bounds", format!("a write of metadata at {offset}")))?;
                Op::Page(at, pages.id(&page))
            }
        };
        let here = self.work.iter().filter(|work| work.slot == Some(slot)).map(|work| &work.op);
        let clash = |other: &Op| match (&op, other) {
            (Op::Page(at, _), Op::Page(theirs, _)) => at == theirs,
            _ => op.written().zip(other.written()).is_some_and(|(mine, theirs)| mine.overlaps(theirs)),
        };
        if let Some(other) = here.clone().find(|other| clash(other)) {
            return Err(Broken::new("overlapping writes are not on a leg together", format!("{slot:?}: {op:?} beside {other:?}")));
        }
        if let Some(late) = self.work.iter().find(|work| op.memory().is_some() && work.op.memory() == op.memory()) {
            return Err(Broken::new("bounds", format!("{op:?} into memory that {:?} may still land in", late.op)));
        }
        self.work.push(Work { io, slot: Some(slot), op });
        Ok(())
    }

    fn payload(&self, scenario: &Scenario, buffer: Buffer, range: BlockRange) -> Result<Vec<Token>, Broken> {
        let len = range.len() as usize;
        match buffer {
            Buffer::Request { tag, .. } => {
                let index = tag.0 as usize - 1;
                if !matches!(self.client.progress[index], Progress::Submitted | Progress::Answered) {
                    let text = format!("{} is written while it is {:?}", scenario.asks[index], self.client.progress[index]);
                    return Err(Broken::new("nothing is written after the release", text));
                }
                Ok(vec![scenario.asks[index].token(index); len])
            }
            Buffer::Copy { index, skip } => {
                let content = self.copies[index as usize].get(skip as usize..skip as usize + len);
                Ok(content.ok_or_else(|| Broken::new("bounds", "a copy's buffer is written before it was read"))?.to_vec())
            }
        }
    }
}
