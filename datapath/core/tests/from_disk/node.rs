//! A node with two disks that does at once what its mirror asks, until it is killed. It knows what it acknowledged.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use lockstep_core::{
    Mirror,
    assembly::{Assembled, Assembly, Limits, Refusal, assemble},
    format::{self, REGION_BLOCKS, bitmap_pages},
    io::{Buffer, Effect, Effects, Event, Fill, LegOp, Notice, Outcome, Request},
    membership::RecordName,
    status::LegState,
    units::{BLOCK_SIZE, BlockRange, Epoch, Errno, Instant, IoId, LegId, Slot, Tag, VolumeId},
};

use crate::naive;

/// Three regions and a bit.
pub const BLOCKS: u64 = 3 * REGION_BLOCKS + 5;
pub const VOLUME: VolumeId = VolumeId([9; 16]);
pub const LEGS: [LegId; 2] = [LegId([1; 16]), LegId([2; 16])];
/// Of a `meta`, what this volume uses.
pub const META: usize = meta_len(BLOCKS);

const fn meta_len(blocks: u64) -> usize {
    format::bitmap_offset(bitmap_pages(blocks), 0) as usize
}

/// One copy: its metadata, and the token that was last written to a block.
#[derive(Clone, Debug)]
pub struct Disk {
    pub meta: Vec<u8>,
    pub data: BTreeMap<u64, u64>,
    /// Everything fails.
    pub dead: bool,
}

/// Who is there when a volume is assembled.
#[derive(Clone, Copy, Debug)]
pub struct There {
    pub disks: [bool; 2],
    pub witness: bool,
    pub force: Option<LegId>,
    pub seen_epoch: Option<Epoch>,
}

#[derive(Clone, Debug)]
pub struct Node {
    pub blocks: u64,
    pub disks: [Disk; 2],
    pub witness: Vec<u8>,
    pub witness_fails: bool,
    pub mirror: Option<Mirror>,
    /// By block: what was acknowledged last.
    pub acked: BTreeMap<u64, u64>,
    /// By block: what was submitted since and may be there as well.
    tried: BTreeMap<u64, BTreeSet<u64>>,
    /// Effects that are performed before it is killed.
    pub fuse: u64,
    /// What it was about to do when it was killed is half done, if that was metadata: the power failed.
    pub tears: bool,
    pub notices: Vec<Notice>,
    pub answers: BTreeMap<Tag, Result<(), Errno>>,
    /// The records that came to a disk or to the witness, in order.
    pub made: Vec<RecordName>,
    copies: BTreeMap<u8, BTreeMap<u64, u64>>,
    queue: VecDeque<Effect>,
    writes: BTreeMap<Tag, u64>,
    now: Instant,
    next: u64,
}

impl Node {
    /// A new volume, not yet assembled.
    pub fn new() -> Self {
        Self::sized(BLOCKS)
    }

    /// A new volume of so many blocks, not yet assembled.
    pub fn sized(blocks: u64) -> Self {
        let meta = |leg| format::new_leg(VOLUME, LEGS, leg, blocks)[..meta_len(blocks)].to_vec();
        Self {
            blocks,
            disks: LEGS.map(|leg| Disk { meta: meta(leg), data: BTreeMap::new(), dead: false }),
            witness: format::new_witness(VOLUME, LEGS, blocks),
            witness_fails: false,
            mirror: None,
            acked: BTreeMap::new(),
            tried: BTreeMap::new(),
            fuse: u64::MAX,
            tears: false,
            notices: Vec::new(),
            answers: BTreeMap::new(),
            made: Vec::new(),
            copies: BTreeMap::new(),
            queue: VecDeque::new(),
            writes: BTreeMap::new(),
            now: Instant(0),
            next: 1,
        }
    }

    /// The process is gone, and with it what was not performed.
    pub fn kill(&mut self) {
        self.mirror = None;
        self.queue.clear();
        self.copies.clear();
        self.writes.clear();
        self.fuse = u64::MAX;
        for disk in &mut self.disks {
            disk.dead = false;
        }
    }

    /// Assembles; performs nothing yet.
    pub fn assemble(&mut self, there: There) -> Result<Assembled, Refusal> {
        self.next += 1;
        let present: Vec<usize> = (0..2).filter(|at| there.disks[*at]).collect();
        let metas: Vec<&[u8]> = present.iter().map(|at| self.disks[*at].meta.as_slice()).collect();
        let assembly = Assembly {
            volume: VOLUME,
            metas: &metas,
            witness: there.witness.then_some(self.witness.as_slice()),
            seen_epoch: there.seen_epoch,
            force: there.force,
            seed: u128::from(self.next),
            now: self.now,
            limits: Limits::default(),
        };
        let mut out = Effects::new();
        let assembled = assemble(&assembly, &mut out)?;
        if !there.witness {
            self.witness = vec![0; self.witness.len()];
        }
        for at in 0..2 {
            self.disks[at].dead = !there.disks[at];
        }
        self.mirror = Some(assembled.mirror.clone());
        self.queue.extend(out.drain());
        Ok(assembled)
    }

    pub fn submit(&mut self, request: Request) -> Tag {
        self.next += 1;
        let tag = Tag(self.next);
        self.handle(Event::Submit { tag, request });
        tag
    }

    /// Writes one block; its content is the tag.
    pub fn write(&mut self, block: u64) -> Tag {
        self.writes.insert(Tag(self.next + 1), block);
        self.tried.entry(block).or_default().insert(self.next + 1);
        self.submit(Request::Write { range: BlockRange::new(block, block + 1), fua: false })
    }

    /// Time passes.
    pub fn pass(&mut self, millis: u64) {
        self.now = self.now.plus_millis(millis);
        self.handle(Event::Tick);
    }

    /// Puts a leg that is OUT back, as it can come back. `false`: nothing to put.
    pub fn attach(&mut self, slot: Slot) -> bool {
        let disk = &mut self.disks[slot.index()];
        let Some(mirror) = &self.mirror else { return false };
        let found = mirror.readmission(&disk.meta);
        if disk.dead || mirror.status().legs[slot.index()].state != LegState::Out {
            return false;
        }
        let fill = found.map_or(Fill::Everything, |(_, fill)| fill);
        let mut leg = mirror.status().legs[slot.index()].id;
        if fill == Fill::Everything {
            self.next += 1;
            leg = LegId(u128::from(self.next).to_be_bytes());
            let meta = format::spare_leg(VOLUME, leg, self.blocks)[..meta_len(self.blocks)].to_vec();
            *disk = Disk { meta, data: BTreeMap::new(), dead: false };
        }
        let newest = format::peek(&disk.meta).map_or(0, |summary| summary.newest);
        self.submit(Request::Attach { slot, leg, fill, newest });
        true
    }

    fn handle(&mut self, event: Event) {
        let Some(mirror) = &mut self.mirror else { return };
        let mut out = Effects::new();
        mirror.handle(self.now, event, &mut out);
        mirror.check_invariants();
        self.queue.extend(out.drain());
    }

    /// Performs what was asked, until nothing is left or the node is killed. `false`: it was killed.
    pub fn run(&mut self) -> bool {
        while let Some(effect) = self.queue.pop_front() {
            if self.fuse == 0 {
                if self.tears {
                    self.tear(effect);
                }
                self.kill();
                return false;
            }
            self.fuse -= 1;
            self.perform(effect);
        }
        true
    }

    fn tear(&mut self, effect: Effect) {
        let (file, offset, page) = match effect {
            Effect::WriteWitness { offset, page, .. } => (&mut self.witness, offset, page),
            Effect::Leg { slot, op: LegOp::WriteMeta { offset, page }, .. } if !self.disks[slot.index()].dead => {
                (&mut self.disks[slot.index()].meta, offset, page)
            }
            _ => return,
        };
        file[offset as usize..][..64].copy_from_slice(&page[..64]);
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Leg { slot, io, op } => {
                let outcome = if self.disks[slot.index()].dead { Outcome::Failed(Errno::EIO) } else { self.leg(slot, op) };
                self.handle(Event::Done { io, outcome });
            }
            Effect::WriteWitness { io, offset, page } => self.write_witness(io, offset as usize, page.as_slice()),
            Effect::Complete { tag, result } => {
                if let Some(block) = self.writes.remove(&tag).filter(|_| result.is_ok()) {
                    self.acked.insert(block, tag.0);
                    self.tried.remove(&block);
                }
                self.answers.insert(tag, result);
            }
            Effect::ReleaseCopy { index } => drop(self.copies.remove(&index)),
            Effect::Notice(notice) => self.notices.push(notice),
            // Nobody scrubs here.
            Effect::Release { .. } | Effect::NewBuffer { .. } | Effect::Compare { .. } => {}
        }
    }

    fn write_witness(&mut self, io: IoId, offset: usize, page: &[u8]) {
        let outcome = if self.witness_fails {
            Outcome::Failed(Errno::EIO)
        } else {
            self.witness[offset..offset + 4096].copy_from_slice(page);
            self.made.push(naive::superblock(page).record.name);
            Outcome::Done(0)
        };
        self.handle(Event::Done { io, outcome });
    }

    fn leg(&mut self, slot: Slot, op: LegOp) -> Outcome {
        let disk = &mut self.disks[slot.index()];
        match op {
            LegOp::Read { range, buffer } => {
                if let Buffer::Copy { index, skip } = buffer {
                    let found = disk.data.range(range.start..range.end).map(|(block, token)| (block - range.start + skip, *token));
                    self.copies.entry(index).or_default().extend(found);
                }
                Outcome::Done(range.len() * BLOCK_SIZE)
            }
            LegOp::Write { range, buffer, .. } => {
                for block in range.start..range.end {
                    let token = match buffer {
                        Buffer::Request { tag, .. } => Some(tag.0),
                        Buffer::Copy { index, skip } => {
                            self.copies.get(&index).and_then(|copy| copy.get(&(block - range.start + skip))).copied()
                        }
                    };
                    if let Some(token) = token {
                        disk.data.insert(block, token);
                    } else {
                        disk.data.remove(&block);
                    }
                }
                Outcome::Done(range.byte_len())
            }
            LegOp::Zero { range } => {
                disk.data.retain(|block, _| !(range.start..range.end).contains(block));
                Outcome::Done(0)
            }
            LegOp::Flush => Outcome::Done(0),
            LegOp::NextData { range } => {
                let first = disk.data.range(range.start..range.end).next();
                Outcome::Extent(first.map(|(block, _)| BlockRange::new(*block, block + 1)))
            }
            LegOp::WriteMeta { offset, page } => {
                disk.meta[offset as usize..offset as usize + 4096].copy_from_slice(page.as_slice());
                if offset < 8192 {
                    self.made.push(naive::superblock(page.as_slice()).record.name);
                }
                Outcome::Done(0)
            }
        }
    }

    /// What the mirror says of its legs.
    pub fn states(&self) -> [LegState; 2] {
        self.mirror.as_ref().expect("it is assembled").status().legs.map(|leg| leg.state)
    }

    /// Whether a disk holds everything that was acknowledged, or what was submitted there later, and nothing else.
    pub fn complete(&self, slot: Slot) -> bool {
        let data = &self.disks[slot.index()].data;
        let blocks: BTreeSet<&u64> = self.acked.keys().chain(data.keys()).collect();
        blocks.into_iter().all(|block| {
            let found = data.get(block);
            found == self.acked.get(block) || found.zip(self.tried.get(block)).is_some_and(|(token, tried)| tried.contains(token))
        })
    }

    /// The operator says that this disk holds what counts.
    pub fn believe(&mut self, slot: Slot) {
        self.acked = self.disks[slot.index()].data.clone();
        self.tried.clear();
    }
}
