//! What the shell does for the core: takes its effects, and does the work on the simulated disks.

use std::collections::BTreeSet;

use lockstep_core::{
    COPY_WINDOW, Mirror,
    format::{self, REGION_BLOCKS, bitmap_pages},
    io::{Buffer, Effect, Effects, LegOp, Notice, Outcome},
    membership::MemberState,
    status::{LegState, ScrubState},
    units::{BlockRange, Errno, IoId, LegId, Slot, Tag},
};

use super::{
    End, Kind, State,
    disk::{BITMAP_AT, LIST_AT},
    machine::{Asked, Machine, Memory, Op, Work},
};
use crate::{
    disk::{FULL_ERRNOS, HOST_ERRNOS},
    oracles::{bounds, history::Covered, legs},
};

/// Host faults in a row that no leg is blamed for: fewer than the mirror's reissues.
const HOST_FAULTS: u8 = 7;

fn kind(op: &LegOp) -> Kind {
    match op {
        LegOp::Read { buffer: Buffer::Request { .. }, .. } => Kind::Read,
        LegOp::Read { .. } => Kind::CopyRead,
        LegOp::Write { buffer: Buffer::Request { .. }, fua: false, .. } => Kind::Write,
        LegOp::Write { buffer: Buffer::Request { .. }, .. } => Kind::WriteFua,
        LegOp::Write { .. } => Kind::CopyWrite,
        LegOp::Zero { .. } => Kind::Zero,
        LegOp::Flush => Kind::Flush,
        LegOp::NextData { .. } => Kind::NextData,
        LegOp::WriteMeta { offset, .. } if *offset < LIST_AT => Kind::Superblock,
        LegOp::WriteMeta { offset, .. } if *offset < BITMAP_AT => Kind::BadBlocks,
        LegOp::WriteMeta { .. } => Kind::Bitmap,
    }
}

/// The regions that a bitmap page calls dirty; the first page is the only one.
fn dirty_in(page: &[u8]) -> BTreeSet<u64> {
    (0..format::PAGE_REGIONS).filter(|region| page[32 + *region as usize / 8] & (1 << (region % 8)) != 0).collect()
}

/// The blocks that an operation writes.
pub(super) fn written(op: &Op) -> Option<BlockRange> {
    match op {
        Op::Leg(LegOp::Write { range, .. } | LegOp::Zero { range }) => Some(*range),
        _ => None,
    }
}

fn brief(op: &LegOp) -> String {
    match op {
        LegOp::WriteMeta { offset, .. } => format!("WriteMeta {offset}"),
        other => format!("{other:?}"),
    }
}

impl Machine {
    pub(super) fn perform(&mut self, mut out: Effects) {
        for effect in out.drain() {
            match effect {
                Effect::Leg { slot, io, op } => self.take(slot, io, op),
                Effect::WriteWitness { io, offset, page } => {
                    self.tell(|| format!("  {io:?} witness {offset}"));
                    if self.work.values().any(|work| matches!(work.op, Op::Witness(..))) {
                        self.breaks("bounds", "two writes of the witness at once");
                    }
                    let op = Op::Witness(offset, page.to_vec());
                    let work = self.begun(None, op, Kind::Witness);
                    self.work.insert(io, work);
                }
                Effect::Compare { io, a, b, blocks } => self.compare_buffers(io, a, b, blocks),
                Effect::Complete { tag, result } => self.complete(tag, result),
                Effect::Release { tag } => {
                    if self.asked.remove(&tag).is_none() || self.answers.remove(&tag).is_none() {
                        self.breaks("every request ends", format!("{tag:?} is released twice, or before it is answered"));
                    }
                    self.buffers.remove(&tag);
                }
                Effect::NewBuffer { tag } => {
                    let Some(blocks) = self.buffers.get(&tag).map(|(_, content)| content.len()) else {
                        return self.breaks("bounds", format!("{tag:?} has no buffer to be replaced"));
                    };
                    let memory = self.allocate(vec![u64::MAX; blocks]);
                    self.buffers.insert(tag, memory);
                }
                // One that nothing named has no memory yet.
                Effect::ReleaseCopy { index } => drop(self.copies.remove(&index)),
                Effect::Notice(notice) => self.notice(&notice),
            }
        }
    }

    fn notice(&mut self, notice: &Notice) {
        self.tell(|| format!("  ! {notice:?}"));
        match notice {
            Notice::WriteFailedOnBoth { .. } => self.may_differ = true,
            Notice::BlocksLost { range } => {
                // What was behind on a leg that then fails is on no leg that counts (mirror rule 32).
                let behind = self.are_behind.values().any(|behind| behind.overlaps(*range));
                if let Some(block) =
                    (range.start..range.end).find(|block| !behind && self.unreadable.get(block).is_none_or(|times| *times < 2))
                {
                    self.breaks("bad blocks", format!("block {block} is given up, and two reads in a row did not fail"));
                }
                self.lost.extend(range.start..range.end);
            }
            // The pinned leg could not be read there, and says what the other does from now on.
            Notice::ReadRepaired { range, .. } if self.may_differ => self.history.exception(Some(*range)),
            Notice::Mismatch { range } => self.breaks("legs are identical", format!("a scrub says that they differ at {range:?}")),
            Notice::ResyncStarted { .. } if std::mem::take(&mut self.clean) => {
                self.breaks("bounds", "a resync after a clean stop");
            }
            _ => {}
        }
        let name = match notice {
            Notice::ResyncCompleted => "resyncs completed",
            Notice::RebuildCompleted { .. } => "rebuilds completed",
            Notice::LegOut { .. } => "legs out",
            Notice::ReadRepaired { .. } => "reads repaired",
            Notice::ScrubEnded { result: Ok(()) } => "scrubs completed",
            Notice::ReadOnly { .. } => "given up",
            Notice::BlocksLost { .. } => "blocks lost",
            Notice::WriteFailedOnBoth { .. } => "writes failed on both",
            _ => return,
        };
        *self.coverage.others.entry(name).or_default() += 1;
    }

    /// The mirror asks a leg for something.
    fn take(&mut self, slot: Slot, io: IoId, op: LegOp) {
        self.tell(|| format!("  {io:?} {slot:?} {}", brief(&op)));
        if self.stopped {
            self.breaks("every request ends", format!("{op:?} after the stop was answered"));
        }
        let Some(disk) = self.place[slot.index()] else {
            return self.breaks("no stale leg", format!("{op:?} on {slot:?}, where no leg was found"));
        };
        let data = match &op {
            LegOp::Write { range, buffer, .. } => match self.buffer(*buffer, range.len()) {
                Some(data) => data,
                None => return self.breaks("bounds", format!("{op:?} names a buffer that is not in use")),
            },
            _ => Vec::new(),
        };
        if let LegOp::Read { buffer: Buffer::Copy { index, .. }, .. } = op
            && index < COPY_WINDOW
            && !self.copies.contains_key(&index)
        {
            let memory = self.allocate(Vec::new());
            self.copies.insert(index, memory);
        }
        let memory = match &op {
            LegOp::Read { buffer, .. } | LegOp::Write { buffer, .. } => match self.named(*buffer) {
                Some((memory, _)) => *memory,
                None => return self.breaks("bounds", format!("{op:?} names a buffer that is not in use")),
            },
            _ => 0,
        };
        let others = self.work.values().filter(|work| work.memory == memory).filter_map(|work| match &work.op {
            Op::Leg(op) => bounds::memory(op),
            _ => None,
        });
        let result = bounds::memory(&op).map_or(Ok(()), |part| bounds::unshared(part, others));
        self.check("bounds", result);
        let here = Some((disk, self.disks[disk].generation));
        let op = Op::Leg(op);
        if let Some(range) = written(&op) {
            let others = self.work.values().filter(|work| work.disk == here).filter_map(|work| written(&work.op));
            let result = bounds::exclusive(range, others);
            self.check("exclusive", result);
        }
        let Op::Leg(leg_op) = &op else { return };
        let kind = kind(leg_op);
        if let (Kind::Bitmap, LegOp::WriteMeta { page, .. }) = (kind, leg_op) {
            let result = self.check_cap(page.as_slice());
            self.check("bounds", result);
        }
        let mark = self.disks[disk].flush_mark();
        self.work.insert(io, Work { data, memory, mark, ..self.begun(here, op, kind) });
        self.check_in_flight(here);
    }

    /// What may be dirty on the disks already, against what a bitmap page says.
    fn check_cap(&self, page: &[u8]) -> Result<(), String> {
        let counts = |slot: Slot| self.status.legs[slot.index()].state == LegState::In && self.counted().contains(&slot);
        if !self.status.ready || !Slot::BOTH.into_iter().all(counts) {
            return Ok(());
        }
        let here = |work: &&Work| self.place.contains(&work.disk.map(|(disk, _)| disk));
        let pages = self.work.values().filter(here).filter_map(|work| match &work.op {
            Op::Leg(LegOp::WriteMeta { page, .. }) if work.kind == Kind::Bitmap => Some(dirty_in(page.as_slice())),
            _ => None,
        });
        let disks = self.place.into_iter().flatten().map(|disk| self.disks[disk].dirty.clone());
        let before = disks.chain(pages).flatten().collect();
        // One request of two regions may exceed a cap of one; a scrub's repair exceeds any by one.
        let scrubs = u64::from(self.status.scrub.state == ScrubState::Running);
        let earlier = self.asked.iter().filter(|(tag, asked)| tag.0 < self.capped_since && matches!(asked, Asked::Write { .. }));
        let uncapped = 2 * earlier.count() as u64;
        bounds::capped(&before, &dirty_in(page), self.profile.cap.max(2) + scrubs + uncapped)
    }

    fn check_in_flight(&mut self, here: Option<(usize, u64)>) {
        let mut count = bounds::InFlight::default();
        for work in self.work.values().filter(|work| work.disk == here) {
            let n = match work.kind {
                Kind::Flush => &mut count.flushes,
                Kind::Superblock => &mut count.superblocks,
                Kind::BadBlocks => &mut count.lists,
                Kind::Bitmap => &mut count.pages,
                _ => &mut count.data,
            };
            *n += 1;
        }
        let pages = bitmap_pages(self.status.blocks.max(1) + 3 * REGION_BLOCKS);
        self.check("bounds", bounds::in_flight(count, self.asked.len() as u64, pages));
    }

    fn named(&self, buffer: Buffer) -> Option<&Memory> {
        match buffer {
            Buffer::Request { tag, .. } => self.buffers.get(&tag),
            Buffer::Copy { index, .. } => self.copies.get(&index),
        }
    }

    /// Something that begins now, and brings and fills nothing.
    fn begun(&self, disk: Option<(usize, u64)>, op: Op, kind: Kind) -> Work {
        // What the mirror is like: what was last looked at may be older.
        let begun_in = self.mirror.as_ref().map_or(State::Assembling, |mirror| State::of(&mirror.status()));
        Work { disk, op, kind, data: Vec::new(), memory: 0, mark: 0, since: self.now, begun_in, ended: None }
    }

    fn buffer(&self, buffer: Buffer, len: u64) -> Option<Vec<u64>> {
        let (Buffer::Request { skip, .. } | Buffer::Copy { skip, .. }) = buffer;
        let (_, data) = self.named(buffer)?;
        Some(data.get(skip as usize..(skip + len) as usize)?.to_vec())
    }

    fn compare_buffers(&mut self, io: IoId, a: Buffer, b: Buffer, blocks: u64) {
        self.tell(|| format!("  {io:?} compare"));
        let (Some(first), Some(second)) = (self.buffer(a, blocks), self.buffer(b, blocks)) else {
            return self.breaks("bounds", "a compare of buffers that are not in use");
        };
        let mask = first.iter().zip(&second).enumerate().fold(0, |mask, (i, (a, b))| mask | u128::from(a != b) << i);
        let ended = Some((Outcome::Differ(mask), End::Done));
        self.work.insert(io, Work { ended, ..self.begun(None, Op::Compare, Kind::Compare) });
    }

    /// Does a piece of work, or fails it; the report comes later.
    pub(super) fn execute(&mut self, io: IoId) {
        let Some(mut work) = self.work.remove(&io) else { return };
        let ended = match (&work.op, work.disk) {
            (Op::Witness(offset, page), _) => self.execute_witness(*offset, page),
            (Op::Leg(op), Some((disk, generation))) => self.execute_leg(disk, generation, op, &work),
            (Op::Leg(_) | Op::Compare, _) => (Outcome::Failed(Errno::ENODEV), End::Gone),
        };
        work.ended = Some(ended);
        self.work.insert(io, work);
    }

    fn execute_witness(&mut self, offset: u64, page: &[u8]) -> (Outcome, End) {
        if self.witness_errors > 0 {
            self.witness_errors -= 1;
            self.excused = true;
            self.witness.tear(&mut self.rng, offset, page);
            return (Outcome::Failed(Errno::EIO), End::Error);
        }
        self.witness.write(offset, page);
        (Outcome::Done(0), End::Done)
    }

    fn execute_leg(&mut self, disk: usize, generation: u64, op: &LegOp, work: &Work) -> (Outcome, End) {
        let error = [Errno::EIO, Errno::EREMOTEIO, Errno::ENODEV][self.rng.below(3) as usize];
        let here = self.disks[disk].generation == generation;
        let trouble = &mut self.disks[disk].trouble;
        let take = |count: &mut u8| std::mem::replace(count, count.saturating_sub(1)) > 0;
        if trouble.gone || !here {
            return (Outcome::Failed(error), End::Gone);
        }
        let range = written(&work.op);
        let once = match work.kind {
            Kind::Flush if take(&mut trouble.flush_errors) => true,
            Kind::Superblock | Kind::BadBlocks | Kind::Bitmap if take(&mut trouble.meta_errors) => true,
            _ => take(&mut trouble.errors),
        };
        if once {
            trouble.suspect = true;
            self.fail_in_part(disk, work);
            return (Outcome::Failed(error), End::Error);
        }
        if take(&mut trouble.host_faults) {
            trouble.suspect = true;
            let errno = HOST_ERRNOS[usize::from(trouble.host_faults) % HOST_ERRNOS.len()];
            return (Outcome::Failed(errno), End::HostFault);
        }
        if range.is_some() && take(&mut trouble.no_space) {
            trouble.suspect = true;
            let errno = FULL_ERRNOS[usize::from(trouble.no_space) % FULL_ERRNOS.len()];
            self.excused = true;
            self.may_differ = true;
            self.do_a_part(disk, work);
            return (Outcome::Failed(errno), End::NoSpace);
        }
        let bad = |range: BlockRange, blocks: &BTreeSet<u64>| blocks.range(range.start..range.end).next().is_some();
        let gone = match op {
            LegOp::Read { range, .. } => bad(*range, &trouble.unreadable),
            LegOp::Write { range, .. } | LegOp::Zero { range } => bad(*range, &trouble.unwritable),
            _ => false,
        };
        if gone {
            trouble.suspect = true;
            self.excused |= self.lone() == Some(disk);
            return (Outcome::Failed(error), End::Gone);
        }
        let place = match op {
            LegOp::WriteMeta { offset, .. } => *offset,
            LegOp::Read { range, .. } | LegOp::Write { range, .. } | LegOp::Zero { range } | LegOp::NextData { range } => range.end,
            LegOp::Flush => 0,
        };
        let key = (disk, work.kind, work.memory, place);
        let before = self.in_a_row.remove(&key).unwrap_or(0);
        if self.profile.flaky > 0 && self.rng.once_in(self.profile.flaky) && before < HOST_FAULTS {
            self.in_a_row.insert(key, before + 1);
            return self.flaky(disk, op, work);
        }
        self.do_all(disk, op, work)
    }

    /// A host fault or a short count (mirror rule 6).
    fn flaky(&mut self, disk: usize, op: &LegOp, work: &Work) -> (Outcome, End) {
        let (range, part) = match op {
            LegOp::Read { range, .. } | LegOp::Write { range, .. } if range.len() > 1 && self.rng.once_in(2) => {
                (*range, BlockRange::new(range.start, range.start + self.rng.below(range.len())))
            }
            _ => return (Outcome::Failed(HOST_ERRNOS[self.rng.below(HOST_ERRNOS.len() as u64) as usize]), End::HostFault),
        };
        // Not even whole blocks.
        let bytes = part.byte_len() + 512 * self.rng.below(8);
        debug_assert!(bytes < range.byte_len());
        let short = match op {
            LegOp::Read { buffer, .. } => LegOp::Read { range: part, buffer: *buffer },
            LegOp::Write { buffer, fua, .. } => LegOp::Write { range: part, buffer: *buffer, fua: *fua },
            other => other.clone(),
        };
        self.do_all(disk, &short, work);
        (Outcome::Done(bytes), End::Short)
    }

    fn do_all(&mut self, disk: usize, op: &LegOp, work: &Work) -> (Outcome, End) {
        let outcome = match op {
            LegOp::Read { range, buffer } => {
                let values: Vec<u64> = (range.start..range.end).map(|block| self.disks[disk].read(block)).collect();
                let (target, skip) = match buffer {
                    Buffer::Request { tag, skip } => (self.buffers.get_mut(tag), *skip as usize),
                    Buffer::Copy { index, skip } => (self.copies.get_mut(index), *skip as usize),
                };
                // Memory that nobody names any more takes what a late read brings.
                let named = target.filter(|(memory, _)| *memory == work.memory);
                if named.is_none() {
                    *self.coverage.others.entry("late reads").or_default() += 1;
                }
                if let Some((_, target)) = named {
                    target.resize(target.len().max(skip + values.len()), u64::MAX);
                    target[skip..skip + values.len()].copy_from_slice(&values);
                }
                Outcome::Done(range.byte_len())
            }
            LegOp::Write { range, fua, .. } => {
                for (i, block) in (range.start..range.end).enumerate() {
                    self.disks[disk].write(block, work.data[i], *fua);
                }
                Outcome::Done(range.byte_len())
            }
            LegOp::Zero { range } => {
                (range.start..range.end).for_each(|block| self.disks[disk].write(block, 0, false));
                Outcome::Done(0)
            }
            LegOp::Flush if self.disks[disk].trouble.lies => return (Outcome::Done(0), End::Lied),
            LegOp::Flush => {
                self.disks[disk].flush(work.mark);
                Outcome::Done(0)
            }
            LegOp::NextData { range } => Outcome::Extent(self.disks[disk].next_data(*range)),
            LegOp::WriteMeta { offset, page } => {
                let before = self.disks[disk].dirty.clone();
                self.disks[disk].write_meta(*offset, page.as_slice());
                let cleared: Vec<u64> = before.difference(&self.disks[disk].dirty).copied().collect();
                if !cleared.is_empty() {
                    self.check_cleared(disk, &cleared);
                }
                Outcome::Done(0)
            }
        };
        (outcome, End::Done)
    }

    /// What fails is done in part, and a flush not at all.
    pub(super) fn fail_in_part(&mut self, disk: usize, work: &Work) {
        match work.op {
            Op::Leg(LegOp::Flush) => self.disks[disk].flush_failed(work.mark),
            _ => self.do_a_part(disk, work),
        }
    }

    /// A write that fails, or never ends: some of it is done.
    pub(super) fn do_a_part(&mut self, disk: usize, work: &Work) {
        match &work.op {
            Op::Leg(LegOp::WriteMeta { offset, page }) => self.disks[disk].tear_meta(&mut self.rng, *offset, page.as_slice()),
            op => {
                let Some(range) = written(op) else { return };
                let keep = self.rng.below(4);
                for (i, block) in (range.start..range.end).enumerate() {
                    if keep == 0 || keep > 1 && self.rng.once_in(2) {
                        self.disks[disk].write(block, work.data.get(i).copied().unwrap_or(0), false);
                    }
                }
            }
        }
    }

    /// A bit landed clear: every leg that counts holds the region durably, and so does one that may come
    /// back with less than everything (mirror rule 18). A clear that was asked for while both counted may land later.
    fn check_cleared(&mut self, disk: usize, regions: &[u64]) {
        let Some(place) = self.place.iter().position(|at| *at == Some(disk)) else { return };
        let counted = self.counted();
        if self.record().is_none() || !counted.iter().any(|slot| slot.index() == place) {
            return;
        }
        let counting = counted.iter().filter_map(|slot| self.place[slot.index()]);
        let others: Vec<usize> = counting.chain(self.absent()).collect();
        for region in regions {
            let range = BlockRange::new(region * REGION_BLOCKS, (region + 1) * REGION_BLOCKS);
            for slot in counted.iter().filter_map(|slot| self.place[slot.index()]) {
                let leg = &self.disks[slot];
                if !leg.trouble.lies && leg.is_cached(range) {
                    return self.breaks("bits", format!("region {region} is clear on disk {disk}, and not flushed on disk {slot}"));
                }
            }
            let blocks: BTreeSet<u64> =
                self.disks.iter().flat_map(|disk| disk.blocks()).filter(|block| (range.start..range.end).contains(block)).collect();
            for other in &others {
                let blocks = blocks.difference(&self.disks[disk].listed).copied().collect();
                self.compare(disk, *other, &blocks);
            }
        }
    }

    /// Disks of legs that are OUT and may come back with what the bits say that they missed.
    fn absent(&self) -> Vec<usize> {
        let Some(record) = self.record() else { return Vec::new() };
        let out = record.members.iter().filter(|member| member.state == MemberState::Out);
        out.filter_map(|member| self.disks.iter().position(|disk| disk.leg() == Some(member.leg))).collect()
    }

    fn complete(&mut self, tag: Tag, result: Result<(), Errno>) {
        self.tell(|| format!("  = {tag:?} {result:?}"));
        if self.answers.insert(tag, result).is_some() {
            return self.breaks("every request ends", format!("{tag:?} is answered twice"));
        }
        let Some(asked) = self.asked.get(&tag).cloned() else {
            return self.breaks("every request ends", format!("{tag:?} is answered and was never asked"));
        };
        if let (Err(errno), Asked::Write { .. } | Asked::Read { .. } | Asked::Flush { .. }) = (result, &asked)
            && !self.excused
            && !self.stopping
            && !self.is_lost(&asked)
        {
            self.breaks("availability", format!("{asked:?} ends with {errno:?} within the budget"));
        }
        match asked {
            Asked::Invalid if !matches!(result, Err(Errno::EINVAL | Errno::EIO | Errno::ESHUTDOWN)) => {
                self.breaks("errors are errors", format!("what no volume has is answered with {result:?}"));
            }
            Asked::Write { range, id, zero, fua } => {
                self.history.answered(id, range, result.is_ok(), fua);
                if result.is_ok() {
                    self.lost.retain(|block| !(range.start..range.end).contains(block));
                    let value = if zero { 0 } else { id };
                    // A write may be behind on a slow leg; never one that is to be durable, nor zeroes (mirror rule 32).
                    let now = self.mirror.as_ref().map_or(self.status, Mirror::status);
                    let slow = [self.status, now].iter().find(|status| status.write_behind).and_then(|status| status.write_mostly);
                    let slow = slow.filter(|_| !fua && !zero).map(Slot::index);
                    if slow.is_some() {
                        self.behind.extend((range.start..range.end).map(|block| (block, id)));
                    }
                    let answered = self.with_counted(|legs| {
                        let legs: Vec<_> = legs.iter().copied().filter(|leg| Some(leg.place) != slow).collect();
                        legs::write_answered(&legs, range.start..range.end, value, fua)
                    });
                    self.check("answered on every leg that counts", answered);
                }
            }
            Asked::Read { range, floor, listed } if result.is_ok() => {
                // A mirror that gave up while it took a block off the list has it for good on every leg, and on every list.
                let gave_up = self.mirror.as_ref().is_some_and(|mirror| mirror.status().read_only);
                if let Some(block) = self.listed().intersection(&listed).next().filter(|_| !gave_up) {
                    self.breaks("bad blocks", format!("block {block} is on the list of every leg that counts, and is read"));
                }
                let values = self.buffers.get(&tag).map(|(_, values)| values.clone()).unwrap_or_default();
                let result = self.history.read(range, &floor, &values);
                self.check("reads are linearizable", result);
            }
            Asked::Flush { covered } if result.is_ok() => {
                // What no copy holds is not missed.
                let listed = self.listed();
                let covered: Covered = covered.into_iter().filter(|(block, _)| !listed.contains(block)).collect();
                let durable = self.with_counted(|legs| {
                    legs::flush_answered(legs, &covered, |block, value, id| self.history.is_at_least(block, value, id))
                });
                self.check("flushed on every leg that counts", durable);
                self.history.flushed(&covered);
            }
            Asked::Grow { blocks } if result.is_ok() => self.blocks = blocks,
            Asked::Stop => self.stopped = true,
            Asked::Attach { slot } if result == Err(Errno::EBUSY) => {
                // It did not come about: nothing was put there.
                self.tell(|| format!("  {slot:?} was busy"));
            }
            _ => {}
        }
    }

    /// What is on the list of every leg that counts.
    pub(super) fn listed(&self) -> BTreeSet<u64> {
        let mut lists = self.counted().into_iter().map(|slot| self.place[slot.index()].map(|disk| &self.disks[disk].listed));
        let Some(Some(first)) = lists.next() else { return BTreeSet::new() };
        let mut all = first.clone();
        lists.for_each(|other| all.retain(|block| other.is_some_and(|other| other.contains(block))));
        all
    }

    fn is_lost(&self, asked: &Asked) -> bool {
        let Asked::Read { range, .. } = asked else { return false };
        let touched = |blocks: &BTreeSet<u64>| blocks.range(range.start..range.end).next().is_some();
        // Who counts may have been unknown when the volume started, and so what was listed.
        touched(&self.lost) || touched(&self.listed())
    }

    fn with_counted(&self, check: impl FnOnce(&[legs::Leg<'_>]) -> Result<(), String>) -> Result<(), String> {
        let counted = self.counted();
        let disks: Vec<_> = counted.iter().filter_map(|slot| Some((slot.index(), &self.disks[self.place[slot.index()]?]))).collect();
        if disks.len() < counted.len() {
            return Err("it is answered, and the durable record counts a leg that is not there".into());
        }
        let holds: Vec<_> = disks.iter().map(|(_, disk)| |block| (disk.read(block), disk.durable(block))).collect();
        let legs: Vec<_> =
            disks.iter().zip(&holds).map(|((place, disk), holds)| legs::Leg { place: *place, holds, lies: disk.trouble.lies }).collect();
        check(&legs)
    }

    /// A leg id that was never used.
    pub(super) fn new_leg_id(&mut self) -> LegId {
        self.next_leg += 1;
        let mut id = [7; 16];
        id[..8].copy_from_slice(&self.next_leg.to_le_bytes());
        LegId(id)
    }
}
