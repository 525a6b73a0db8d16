//! Crashes, stops, and what is found at the next start.

use std::collections::BTreeSet;

use lockstep_core::{
    assembly::{Assembly, Limits, Refusal, assemble},
    io::{Effects, Request},
    membership::{MemberState, Record},
    status::{LegState, LegStatus, Scrub, Status, Sync},
    units::{Epoch, LegId, Slot},
};

use super::{
    End, State, VOLUME,
    disk::{BITMAP_AT, Disk, LIST_AT},
    machine::{Asked, Machine, Op},
    script::Crash,
};
use crate::world::Rng;

const NOBODY: LegStatus = LegStatus { id: LegId([0; 16]), state: LegState::Out };
/// Before anything was assembled.
pub(super) const NOT_YET: Status = Status {
    blocks: 0,
    epoch: Epoch(0),
    legs: [NOBODY; 2],
    dirty_regions: 0,
    bad_blocks: 0,
    sync: Sync::Idle,
    sync_done: 0,
    sync_total: 0,
    copied_blocks: 0,
    scrub: Scrub::NEVER,
    write_mostly: None,
    write_behind: false,
    behind: 0,
    pending: 0,
    read_only: false,
    ready: false,
    stopped: false,
};

impl Machine {
    /// A clean stop, and a new start with everything there.
    pub(super) fn stop(&mut self) {
        if self.mirror.is_none() {
            return;
        }
        // The object learns the epoch now and then.
        if self.status.ready {
            self.object = Some(self.status.epoch);
        }
        self.disks.iter_mut().for_each(|disk| disk.trouble.frozen = false);
        self.stopping = true;
        let healthy = self.is_healthy();
        let tag = self.ask("stop", Asked::Stop, Request::Stop);
        // One in four is cut off. (By numbers of its own: what the others are does not change with it.)
        let mut own = Rng(self.rng.0 ^ u64::MAX);
        let cut = own.once_in(4).then(|| (own.below(40), own.once_in(2)));
        let mut steps = 0;
        while self.broken.is_none() && self.asked.contains_key(&tag) {
            if let Some((_, power)) = cut.filter(|(at, _)| *at == steps) {
                *self.coverage.others.entry("crashes in a stop").or_default() += 1;
                return self.crash(Crash::plain(power));
            }
            steps += 1;
            if !self.step() && !self.tick() {
                return self.breaks("every request ends", "the stop never ended");
            }
        }
        while self.step() {}
        let waiting = self.asked.len();
        if waiting > 0 && self.broken.is_none() {
            return self.breaks("every request ends", format!("{waiting} requests outlive the stop"));
        }
        let clean = healthy
            && !self.excused
            && self.is_healthy()
            && !self.may_differ
            && self.disks.iter().all(|disk| !disk.trouble.lies && !disk.trouble.gone);
        if self.broken.is_none() {
            self.crash(Crash::plain(true));
            self.clean = clean;
            if clean && self.broken.is_none() && self.status.dirty_regions > 0 {
                self.breaks("bounds", "regions are dirty after a clean stop");
            }
        }
    }

    pub(super) fn crash(&mut self, crash: Crash) {
        let name = match (crash.power, State::of(&self.status)) {
            (true, State::Assembling) => "power cut in assembly",
            (true, State::Resync) => "power cut in resync",
            (true, State::Rebuild | State::FullRebuild) => "power cut in rebuild",
            (true, _) if self.writes_metadata() => "power cut in a metadata write",
            (true, _) => "power cut",
            (false, State::Assembling) => "kill in assembly",
            (false, State::Resync) => "kill in resync",
            (false, State::Rebuild | State::FullRebuild) => "kill in rebuild",
            (false, _) if self.writes_metadata() => "kill in a metadata write",
            (false, _) => "kill",
        };
        *self.coverage.crashes.entry(name).or_default() += 1;
        if self.status.ready {
            self.published = self.blocks;
        }
        if self.status.ready && self.rng.once_in(2) {
            self.object = Some(self.status.epoch);
        }
        let behind = std::mem::take(&mut self.behind);
        let counted: Vec<usize> = self.counted().iter().filter_map(|slot| self.place[slot.index()]).collect();
        let lacks =
            |(block, id): &(u64, u64)| counted.iter().any(|disk| !self.history.is_at_least(*block, self.disks[*disk].read(*block), *id));
        self.was_behind.extend(behind.into_iter().filter(lacks));
        if self.status.read_only {
            // Who counts could not be recorded: the next start may read another leg than was read last.
            self.history.exception(None);
        }
        self.interrupt(crash.power);
        let lying: Vec<usize> = (0..3).filter(|disk| self.disks[*disk].trouble.lies).collect();
        if crash.power {
            for disk in &mut self.disks {
                disk.power_cut(&mut self.rng);
            }
            lying.iter().for_each(|disk| self.disks[*disk].replace(Vec::new()));
            self.history.power_cut();
        } else {
            self.history.killed();
        }
        for disk in &mut self.disks {
            disk.opened();
            let (gone, lies) = (disk.trouble.gone, disk.trouble.lies);
            disk.trouble = super::disk::Trouble { gone, lies, ..Default::default() };
        }
        (self.may_differ, self.excused, self.clean, self.stopping, self.stopped) = (true, false, false, false, false);

        let Some(record) = self.record() else { return self.start(crash, None, &lying) };
        // A disk comes back blank only if the other one has everything.
        if let Some(disk) = crash.blank.and_then(|slot| self.spared(&record, slot, &lying)) {
            self.disks[disk].replace(Vec::new());
            *self.coverage.faults.entry("a disk comes back blank").or_default() += 1;
        }
        for disk in (0..self.disks.len()).filter(|disk| crash.bits_damaged & (1 << disk) != 0) {
            self.disks[disk].damage(BITMAP_AT);
            *self.coverage.faults.entry("a bitmap page goes bad").or_default() += 1;
        }
        if crash.lists_damaged {
            self.refuse_without_lists();
        }
        self.start(crash, Some(record), &lying);
    }

    /// When nobody knows which blocks are bad, nothing is assembled (mirror rule 22).
    fn refuse_without_lists(&mut self) {
        *self.coverage.faults.entry("the lists of bad blocks go bad").or_default() += 1;
        let kept = self.disks.clone();
        self.disks.iter_mut().for_each(|disk| disk.damage(LIST_AT));
        let there = (0..self.disks.len()).filter(|disk| !self.disks[*disk].trouble.gone).collect();
        if self.boot(&there).is_ok() {
            self.breaks("bad blocks", "assembled, and no list of bad blocks is valid");
        }
        self.disks = kept;
    }

    fn writes_metadata(&self) -> bool {
        self.work.values().any(|work| Self::is_metadata(&work.op))
    }

    /// What is under way is done in part, or not at all, and never reported.
    fn interrupt(&mut self, power: bool) {
        let end = if power { End::PowerCut } else { End::Killed };
        for work in std::mem::take(&mut self.work).into_values() {
            *self.coverage.cells.entry((State::of(&self.status), work.kind, end)).or_default() += 1;
            match (&work.op, work.disk) {
                _ if work.ended.is_some() => {}
                (Op::Witness(offset, page), _) => self.witness.tear(&mut self.rng, *offset, page),
                (Op::Leg(_), Some((disk, generation))) => {
                    if !self.disks[disk].trouble.gone && self.disks[disk].generation == generation {
                        self.do_a_part(disk, &work);
                    }
                }
                (Op::Leg(_), None) | (Op::Compare, _) => {}
            }
        }
        self.asked.clear();
        self.answers.clear();
        self.buffers.clear();
        self.copies.clear();
        self.mirror = None;
        self.status = NOT_YET;
    }

    fn disk_of(&self, leg: LegId) -> Option<usize> {
        (0..self.disks.len()).find(|disk| !self.disks[*disk].trouble.gone && self.disks[*disk].leg() == Some(leg))
    }

    /// The disk of a slot, if the volume survives without it: the other one is there, sound, and counted.
    fn spared(&self, record: &Record, slot: Slot, lying: &[usize]) -> Option<usize> {
        let other = record.members[slot.other().index()];
        let disk = self.disk_of(record.members[slot.index()].leg)?;
        // Beside a damaged slot of the witness every leg is asked.
        let carried =
            !self.witness.doubtful && other.state == MemberState::In && self.disk_of(other.leg).is_some_and(|disk| !lying.contains(&disk));
        carried.then_some(disk)
    }

    /// Starts with some disks missing; what must be refused is started again with all of them.
    fn start(&mut self, crash: Crash, record: Option<Record>, lying: &[usize]) {
        let there: BTreeSet<usize> = (0..self.disks.len()).filter(|disk| !self.disks[*disk].trouble.gone).collect();
        let mut first: BTreeSet<usize> = there.iter().copied().filter(|disk| crash.missing & (1 << disk) == 0).collect();
        let counted = |disk: &usize| {
            let Some((record, leg)) = record.zip(self.disks[*disk].leg()) else { return false };
            record.members.iter().any(|member| member.leg == leg && member.state == MemberState::In)
        };
        // A disk that lies does not carry the volume alone.
        if !lying.is_empty() && first.iter().filter(|disk| counted(disk)).all(|disk| lying.contains(disk)) {
            first.clone_from(&there);
        }
        if crash.witness_lost && record.is_some_and(|record| self.may_lose_witness(&record, lying)) {
            *self.coverage.faults.entry("the witness is lost").or_default() += 1;
            self.witness.lose();
        }
        // It may only veto, so a volume starts without it as with it (mirror rule 12). One start in five, by number: seeds replay as they did.
        if self.object.is_some() && self.boots % 5 == 4 {
            *self.coverage.faults.entry("the object's copy is lost").or_default() += 1;
            self.object = None;
        }
        let lost = self.record().is_none();
        // Who must be there: any leg that the witness counts; without a witness, or beside a slot of it that may be the newest, all that can know.
        let unsure = lost || self.witness.doubtful;
        let expected = if unsure { first == there } else { first.iter().any(counted) };
        let sorry = lost && self.both_members(&first) || !lost && unsure;
        match self.boot(&first) {
            Ok(()) if !expected && !sorry => {
                return self.breaks("no stale leg", format!("assembled from disks {first:?}, none of which may say who counts"));
            }
            Ok(()) => {
                let away: Vec<usize> = there.difference(&first).copied().collect();
                away.into_iter().for_each(|disk| self.disks[disk].trouble.gone = true);
                return;
            }
            Err(refusal) if expected => {
                return self.breaks("availability", format!("{first:?} of {there:?} are refused within the budget: {refusal}"));
            }
            Err(refusal) => self.tell(|| format!("  refused, as it must be: {refusal}")),
        }
        *self.coverage.others.entry("starts refused").or_default() += 1;
        // The others come.
        self.disks.iter_mut().for_each(|disk| disk.trouble.gone = false);
        let all = BTreeSet::from([0, 1, 2]);
        match self.boot(&all) {
            Ok(()) => {}
            // Each leg recorded once that it is alone, and the witness could not be written either time: its damaged slot may have said which of the two
            // went on. Neither did here, so either has all that was answered.
            Err(Refusal::SplitBrain(leg, _)) if self.witness.doubtful => {
                *self.coverage.others.entry("starts forced").or_default() += 1;
                if let Err(refusal) = self.boot_by_force(&all, Some(leg)) {
                    self.breaks("availability", format!("refused by force: {refusal}"));
                }
            }
            Err(refusal) => self.breaks("availability", format!("refused with every disk there: {refusal}")),
        }
    }

    /// Both legs are there, the newest record names both, and each holds it or the one that it says was seen there.
    fn may_lose_witness(&self, record: &Record, lying: &[usize]) -> bool {
        let named = record.members.iter().all(|member| self.disk_of(member.leg).is_some());
        let newest = self.disks.iter().filter_map(Disk::record).max_by_key(|r| r.name.epoch);
        let same = newest.is_some_and(|newest| newest.members.map(|member| member.leg) == record.members.map(|member| member.leg));
        let full = newest.iter().flat_map(|newest| &newest.members).all(|member| {
            let name = |disk: usize| Some(self.disks[disk].record()?.name);
            let theirs = self.disk_of(member.leg).and_then(name);
            theirs.is_some_and(|name| name == member.seen || newest.is_some_and(|newest| newest.name == name))
        });
        named && same && full && lying.is_empty()
    }

    /// Whether these disks hold both legs that the newest record among them names.
    fn both_members(&self, disks: &BTreeSet<usize>) -> bool {
        let records = disks.iter().filter_map(|disk| self.disks[*disk].record());
        let Some(newest) = records.max_by_key(|record| record.name.epoch) else { return false };
        newest.members.iter().all(|member| self.disk_of(member.leg).is_some_and(|disk| disks.contains(&disk)))
    }

    /// Assembles from these disks, in any order.
    pub(super) fn boot(&mut self, disks: &BTreeSet<usize>) -> Result<(), Refusal> {
        self.boot_by_force(disks, None)
    }

    fn boot_by_force(&mut self, disks: &BTreeSet<usize>, force: Option<LegId>) -> Result<(), Refusal> {
        let mut order: Vec<usize> = disks.iter().copied().collect();
        for i in (1..order.len()).rev() {
            order.swap(i, self.rng.below(i as u64 + 1) as usize);
        }
        self.boots += 1;
        self.witnessed = self.record().is_some();
        let metas: Vec<&[u8]> = order.iter().map(|disk| self.disks[*disk].meta()).collect();
        let seed = u128::from(self.boots) << 64 | u128::from(self.rng.below(u64::MAX));
        let mut limits = Limits { dirty_regions: self.profile.cap, ..Limits::default() };
        if let Some(behind) = self.profile.behind {
            (limits.behind_writes, limits.behind_blocks) = behind;
        }
        let assembly = Assembly {
            volume: VOLUME,
            metas: &metas,
            witness: self.witness.bytes(),
            seen_epoch: self.object,
            force,
            seed,
            now: self.now,
            limits,
        };
        let mut out = Effects::new();
        let assembled = assemble(&assembly, &mut out)?;
        self.place = assembled.slots.map(|found| found.map(|found| order[found]));
        self.status = assembled.mirror.status();
        self.mirror = Some(assembled.mirror);
        let place = self.place;
        self.tell(|| format!("> assembled from {order:?}, at {place:?}"));
        if self.status.blocks < self.published {
            self.breaks("reads are linearizable", format!("{} blocks were published, {} are left", self.published, self.status.blocks));
        }
        self.blocks = self.status.blocks;
        // The notice of what came to be listed may have died with the process.
        self.lost.extend(self.listed());
        self.pin = self.record().map(|record| record.pin);
        if self.may_differ {
            let legs = self.status.legs;
            self.lose(self.counted().into_iter().filter(|slot| legs[slot.index()].state != LegState::In));
        }
        self.perform(out);
        self.look();
        Ok(())
    }
}
