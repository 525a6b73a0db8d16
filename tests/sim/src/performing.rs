//! What a disk makes of the work that it was given: at its end, or when the power fails in the middle of it.

use lockstep_core::{
    format,
    io::{Buffer, LegOp, Outcome},
    units::{BLOCK_SIZE, BlockRange, Errno, IoId, Slot},
};

use crate::{
    Rng, World,
    disk::{FULL_ERRNOS, HOST_ERRNOS},
    memory::{Memory, skipped},
    world::{Data, Work},
};

impl World {
    /// What a read fills, late or not, nobody else uses until it ends (mirror rule 27).
    pub(crate) fn assert_memory_free(&self, op: &LegOp, memory: Memory) {
        let part = |op: &LegOp| match op {
            LegOp::Read { range, buffer } => Some((skipped(*buffer), range.len(), true)),
            LegOp::Write { range, buffer, .. } => Some((skipped(*buffer), range.len(), false)),
            _ => None,
        };
        let Some((skip, len, fills)) = part(op) else { return };
        for work in self.work.values() {
            if let Work::Leg(_, other, data) = work
                && let Some((their_skip, their_len, theirs_fills)) = part(other).filter(|_| data.memory == memory)
            {
                let overlap = skip < their_skip + their_len && their_skip < skip + len;
                assert!(!overlap || !(fills || theirs_fills), "{op:?} uses memory that {other:?} has");
            }
        }
    }

    /// What a compare of two buffers says.
    pub(crate) fn compare(&self, [a, b]: [(Memory, Buffer); 2], blocks: u64) -> Outcome {
        let [a, b] = [a, b].map(|(memory, buffer)| self.bytes(memory, buffer, blocks));
        Outcome::Differ(a.iter().zip(&b).enumerate().fold(0, |mask, (i, (a, b))| mask | u128::from(a != b) << i))
    }

    /// A bit may only land clear when both disks hold the region durably (mirror rule 18).
    fn assert_durable(&self, regions: &[u64]) {
        for region in regions {
            let blocks = region * format::REGION_BLOCKS..(region + 1) * format::REGION_BLOCKS;
            for disk in &self.disks {
                assert!(disk.cache.range(blocks.clone()).next().is_none(), "region {region} is clear on disk, but not flushed");
            }
        }
    }

    /// A host fault or a short count, now and then (mirror rule 6).
    pub(crate) fn perhaps_flaky(&mut self, slot: Slot, op: LegOp, data: &Data) -> Outcome {
        if self.flaky == 0 || !self.rng.once_in(self.flaky) {
            return self.leg_op(slot, op, data);
        }
        match op {
            LegOp::Read { range, .. } | LegOp::Write { range, .. } if range.len() > 1 && self.rng.once_in(2) => {
                let done = self.rng.below(range.len());
                let part = BlockRange::new(range.start, range.start + done);
                let short = match op {
                    LegOp::Read { buffer, .. } => LegOp::Read { range: part, buffer },
                    LegOp::Write { buffer, fua, .. } => LegOp::Write { range: part, buffer, fua },
                    other => other,
                };
                match self.leg_op(slot, short, data) {
                    // Not even whole blocks.
                    Outcome::Done(bytes) => Outcome::Done(bytes + 512 * self.rng.below(8)),
                    failed => failed,
                }
            }
            _ => Outcome::Failed(HOST_ERRNOS[self.rng.below(HOST_ERRNOS.len() as u64) as usize]),
        }
    }

    fn leg_op(&mut self, slot: Slot, op: LegOp, data: &Data) -> Outcome {
        if let LegOp::Write { buffer, range, .. } = &op {
            // The disk takes it from the memory now: nobody may have used that for anything else.
            let now = self.bytes(data.memory, *buffer, range.len());
            assert!(now.iter().zip(&data.blocks).all(|(now, (_, then))| now == then), "{slot:?} {op:?}: its memory has another content");
        }
        let disk = &mut self.disks[slot.index()];
        match op {
            LegOp::Read { range, .. } if disk.bad.range(range.start..range.end).next().is_some() => Outcome::Failed(Errno::EIO),
            LegOp::Write { .. } | LegOp::Zero { .. } if disk.full => Outcome::Failed(FULL_ERRNOS[slot.index()]),
            LegOp::WriteMeta { .. } if disk.meta_fails => Outcome::Failed(Errno::EIO),
            LegOp::Read { range, buffer } => {
                let values: Vec<u64> = (range.start..range.end).map(|block| disk.read(block)).collect();
                let (target, skip) = (self.memory.entry(data.memory).or_default(), skipped(buffer) as usize);
                target[skip..skip + values.len()].copy_from_slice(&values);
                Outcome::Done(range.len() * BLOCK_SIZE)
            }
            LegOp::Write { range, fua, .. } => {
                if fua {
                    // A flush that is under way must not bring back what it found in the cache there.
                    for work in self.work.values_mut() {
                        if let Work::Leg(on, LegOp::Flush, found) = work
                            && *on == slot
                        {
                            found.blocks.retain(|(block, _)| !(range.start..range.end).contains(block));
                        }
                    }
                }
                for &(block, token) in &data.blocks[..range.len() as usize] {
                    disk.write(block, token, fua);
                }
                disk.bad.retain(|block| !(range.start..range.end).contains(block));
                Outcome::Done(range.byte_len())
            }
            LegOp::Zero { range } => {
                disk.cache.extend((range.start..range.end).map(|block| (block, 0)));
                disk.bad.retain(|block| !(range.start..range.end).contains(block));
                Outcome::Done(0)
            }
            LegOp::Flush => {
                disk.flush(&data.blocks);
                Outcome::Done(0)
            }
            LegOp::NextData { range } => Outcome::Extent(disk.next_data(range)),
            LegOp::WriteMeta { offset, page } => {
                let before = disk.dirty_regions();
                disk.meta[offset as usize..offset as usize + 4096].copy_from_slice(page.as_slice());
                let cleared: Vec<u64> = before.difference(&self.disks[slot.index()].dirty_regions()).copied().collect();
                self.assert_durable(&cleared);
                Outcome::Done(0)
            }
        }
    }

    /// If this writes a page of metadata: the worlds that a power cut in the middle of it may leave, one for every part that may have come through.
    pub fn torn(&self, io: IoId) -> Vec<Self> {
        let mut cut = self.clone();
        let Some(work) = cut.work.remove(&io) else { return Vec::new() };
        let (slot, offset, page) = match &work {
            Work::Leg(slot, LegOp::WriteMeta { offset, page }, _) => (Some(*slot), *offset as usize, page.as_slice()),
            Work::Witness(offset, page) => (None, *offset as usize, page.as_slice()),
            _ => return Vec::new(),
        };
        let there = &cut.metadata(slot)[offset..offset + page.len()];
        let changed: Vec<usize> = (0..page.len()).step_by(PIECE).filter(|at| there[*at..][..PIECE] != page[*at..][..PIECE]).collect();
        let part = |part: u32| {
            let mut cut = cut.clone();
            for at in changed.iter().enumerate().filter(|(n, _)| part >> n & 1 == 1).map(|(_, at)| *at) {
                cut.metadata(slot)[offset + at..][..PIECE].copy_from_slice(&page[at..at + PIECE]);
            }
            cut
        };
        assert!(changed.len() < 12, "too many parts");
        (0..1 << changed.len()).map(part).collect()
    }

    /// The metadata of a leg, or the witness.
    fn metadata(&mut self, leg: Option<Slot>) -> &mut [u8] {
        leg.map_or(&mut self.witness, |slot| &mut self.disks[slot.index()].meta)
    }

    pub(crate) fn tear(&mut self, slot: Slot, op: LegOp, data: &[(u64, u64)]) {
        let disk = &mut self.disks[slot.index()];
        match op {
            LegOp::WriteMeta { offset, page } => tear_page(&mut self.rng, &mut disk.meta, offset, page.as_slice()),
            LegOp::Write { range, .. } | LegOp::Zero { range } => {
                for (i, block) in (range.start..range.end).enumerate() {
                    if self.rng.once_in(2) {
                        disk.cache.insert(block, data.get(i).map_or(0, |(_, token)| *token));
                    }
                }
            }
            LegOp::Read { .. } | LegOp::Flush | LegOp::NextData { .. } => {}
        }
    }
}

/// What comes through of a page in one piece: less than a record, so that the whole guarantee is the checksum's.
const PIECE: usize = 32;

/// Any part of the page may have come through.
pub(crate) fn tear_page(rng: &mut Rng, file: &mut [u8], offset: u64, page: &[u8]) {
    for at in (0..page.len()).step_by(PIECE) {
        if rng.once_in(2) {
            file[offset as usize + at..][..PIECE].copy_from_slice(&page[at..at + PIECE]);
        }
    }
}
