//! Memory: what the names of buffers mean.

use std::collections::BTreeSet;

use lockstep_core::{COPY_BLOCKS, io::Buffer, status::LegState};

use crate::{World, world::Work};

/// A piece of memory. A name (a tag, a copy's index) means one at a time, and another one later.
pub(crate) type Memory = u64;

/// How many blocks into its memory a buffer begins.
pub(crate) fn skipped(buffer: Buffer) -> u64 {
    let (Buffer::Request { skip, .. } | Buffer::Copy { skip, .. }) = buffer;
    skip
}

impl Work {
    fn memory(&self) -> Vec<Memory> {
        match self {
            Self::Leg(.., data) => vec![data.memory],
            Self::Compare(parts, _) => parts.map(|(memory, _)| memory).to_vec(),
            Self::Witness(..) => Vec::new(),
        }
    }
}

impl World {
    pub(crate) fn allocate(&mut self, content: Vec<u64>) -> Memory {
        if self.memory.len() > 512 {
            let used: BTreeSet<Memory> = self
                .work
                .values()
                .flat_map(Work::memory)
                .chain(self.buffers.values().copied())
                .chain(self.copies.into_iter().flatten())
                .collect();
            self.memory.retain(|memory, _| {
                used.contains(memory) || self.zombies.iter().any(|z| matches!(z, Work::Leg(.., d) if d.memory == *memory))
            });
        }
        self.next_memory += 1;
        self.memory.insert(self.next_memory, content);
        self.next_memory
    }

    /// Its request is released: it is somebody else's now, unless a leg that has failed still has it (mirror rules 5 and 27).
    pub(crate) fn free(&mut self, memory: Memory) {
        let mut late = false;
        for work in self.work.values().filter(|work| work.memory().contains(&memory)) {
            let Work::Leg(slot, op, _) = work else { panic!("{work:?} has memory of a request") };
            assert_eq!(self.mirror.status().legs[slot.index()].state, LegState::Out, "released before {slot:?} has done {op:?}");
            late = true;
        }
        if let Some(content) = self.memory.get_mut(&memory).filter(|_| !late) {
            content.fill(u64::MAX);
        }
    }

    /// The memory that a name means now; a copy's comes to life when it is named.
    pub(crate) fn named(&mut self, buffer: Buffer) -> Memory {
        match buffer {
            Buffer::Request { tag, .. } => self.buffers[&tag],
            Buffer::Copy { index, .. } => {
                let memory = self.copies[index as usize].unwrap_or_else(|| self.allocate(vec![u64::MAX; COPY_BLOCKS as usize]));
                self.copies[index as usize] = Some(memory);
                memory
            }
        }
    }

    /// What a part of a buffer holds.
    pub(crate) fn bytes(&self, memory: Memory, buffer: Buffer, len: u64) -> Vec<u64> {
        let skip = skipped(buffer);
        self.memory[&memory][skip as usize..(skip + len) as usize].to_vec()
    }
}
