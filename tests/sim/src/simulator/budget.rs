//! What may go wrong now, what is excused then, and what the operator does about it.

use std::collections::BTreeMap;

use lockstep_core::{
    format,
    io::{Buffer, Fill, LegOp, Outcome, Request},
    membership::MemberState,
    status::LegState,
    units::{BlockRange, Errno, IoId, Slot, Tag},
};

use super::{
    End, Kind, VOLUME,
    machine::{Asked, Machine, Op},
    script::Fault,
};
use crate::oracles::history::Covered;

impl Machine {
    /// Whether the leg in a slot is sound, and counts by memory and by the witness.
    pub(super) fn carries(&self, slot: Slot) -> bool {
        let Some(disk) = self.place[slot.index()] else { return false };
        let sound = self.disks[disk].trouble.is_sound();
        let failing = |work: &super::machine::Work| {
            work.disk.is_some_and(|(on, _)| on == disk) && matches!(work.ended, Some((Outcome::Failed(_), _)))
        };
        let quiet = !self.work.values().any(failing);
        // A detach that waits for assembly takes the leg OUT yet.
        let leaves = self.asked.values().any(|asked| matches!(asked, Asked::Detach { slot: leaving } if *leaving == slot));
        let counts = !leaves && self.witnessed && self.status.legs[slot.index()].state == LegState::In && self.counted().contains(&slot);
        sound && quiet && counts
    }

    /// Whether the disk in a slot may become unsound: the other one carries the volume.
    fn may_fail(&self, slot: Slot) -> bool {
        self.place[slot.index()].is_some() && self.carries(slot.other())
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        let one = match fault {
            Fault::Gone(slot)
            | Fault::Errors(slot, _)
            | Fault::FlushError(slot)
            | Fault::MetaError(slot)
            | Fault::HostFaults(slot, _)
            | Fault::Unreadable(slot, _)
            | Fault::Unwritable(slot, _)
            | Fault::NoSpace(Some(slot), _)
            | Fault::Lies(slot)
            | Fault::Freeze(slot) => Some(slot),
            Fault::NoSpace(None, _)
            | Fault::BusReset
            | Fault::LastLeg
            | Fault::LastUnreadable(_)
            | Fault::WitnessErrors(_)
            | Fault::Flaky(_) => None,
        };
        let allowed = match (fault, one) {
            (Fault::Unreadable(slot, range), _) => self.may_fail(slot) && !self.is_unreadable(range),
            (_, Some(slot)) => self.may_fail(slot),
            (Fault::NoSpace(None, _), _) => Slot::BOTH.into_iter().all(|slot| self.carries(slot)),
            (Fault::BusReset, _) => {
                let honest = self.disks.iter().all(|disk| !disk.trouble.lies);
                let out = |slot: Slot| self.status.legs[slot.index()].state != LegState::In;
                honest && Slot::BOTH.into_iter().all(|slot| self.carries(slot) || self.carries(slot.other()) && out(slot))
            }
            _ => true,
        };
        if !allowed {
            return;
        }
        let disk = one.and_then(|slot| self.place[slot.index()]);
        if let Some(trouble) = disk.map(|disk| &mut self.disks[disk].trouble) {
            match fault {
                Fault::Gone(_) => trouble.gone = true,
                Fault::Errors(_, n) => trouble.errors = n,
                Fault::FlushError(_) => trouble.flush_errors = 1,
                Fault::MetaError(_) => trouble.meta_errors = 1,
                Fault::HostFaults(_, n) => trouble.host_faults = n,
                Fault::Unreadable(_, range) => trouble.unreadable.extend(range.start..range.end),
                Fault::Unwritable(_, range) => trouble.unwritable.extend(range.start..range.end),
                Fault::NoSpace(_, n) => trouble.no_space = n,
                Fault::Lies(_) => trouble.lies = true,
                Fault::Freeze(_) => trouble.frozen = true,
                _ => {}
            }
        }
        let name = match fault {
            Fault::Gone(_) => "disk gone",
            Fault::Errors(..) => "EIO once or more",
            Fault::FlushError(_) => "flush fails",
            Fault::MetaError(_) => "metadata fails, torn",
            Fault::HostFaults(..) => "host faults in a row",
            Fault::Unreadable(..) => "unreadable blocks",
            Fault::Unwritable(..) => "unwritable blocks",
            Fault::NoSpace(Some(_), _) => "one leg full",
            Fault::Lies(_) => "flushes lie",
            Fault::Freeze(_) => "disk hangs",
            Fault::NoSpace(None, n) => {
                self.place.into_iter().flatten().for_each(|disk| self.disks[disk].trouble.no_space = n);
                "both legs full"
            }
            Fault::BusReset => {
                if !self.bus_reset() {
                    return;
                }
                "bus reset"
            }
            Fault::LastLeg => {
                if !self.last_leg() {
                    return;
                }
                "EIO of the last leg"
            }
            Fault::LastUnreadable(range) => {
                let Some(disk) = self.lone().filter(|disk| self.disks[*disk].trouble.is_sound()) else { return };
                // What a rebuild has copied already, or what was never written, it does not look at: nobody would find that neither can be read.
                if self.is_unreadable(range) {
                    return;
                }
                self.disks[disk].trouble.unreadable.extend(range.start..range.end);
                "unreadable blocks of the last leg"
            }
            Fault::WitnessErrors(n) => {
                self.witness_errors = n;
                "witness fails"
            }
            Fault::Flaky(n) => {
                self.profile.flaky = u64::from(n);
                "host faults and short counts"
            }
        };
        *self.coverage.faults.entry(name).or_default() += 1;
    }

    /// Whether a disk in one of the places has unreadable blocks there.
    fn is_unreadable(&self, range: BlockRange) -> bool {
        self.place.iter().flatten().any(|disk| self.disks[*disk].trouble.unreadable.range(range.start..range.end).next().is_some())
    }

    /// Fails what is in flight and was not done; a part of it is done.
    fn fail_in_flight(&mut self, wanted: impl Fn(usize, Kind) -> bool) -> bool {
        let ios: Vec<IoId> = self
            .work
            .iter()
            .filter(|(_, work)| work.ended.is_none() && work.disk.is_some_and(|(disk, _)| wanted(disk, work.kind)))
            .map(|(io, _)| *io)
            .collect();
        for io in &ios {
            let Some(mut work) = self.work.remove(io) else { continue };
            if let Some((disk, generation)) = work.disk
                && self.disks[disk].generation == generation
            {
                self.fail_in_part(disk, &work);
                self.disks[disk].trouble.suspect = true;
            }
            work.ended = Some((Outcome::Failed(Errno::EIO), End::Error));
            self.work.insert(*io, work);
        }
        self.excused |= !ios.is_empty();
        !ios.is_empty()
    }

    /// Everything, or clients' writes only: those that fail on both legs while a resync goes on.
    fn bus_reset(&mut self) -> bool {
        let everything = self.rng.once_in(2);
        self.fail_in_flight(|_, kind| everything || matches!(kind, Kind::Write | Kind::WriteFua))
    }

    /// Data only: metadata of the last leg is what the mirror gives up on, as after a bus reset.
    fn last_leg(&mut self) -> bool {
        let Some(last) = self.lone() else { return false };
        self.fail_in_flight(|disk, kind| {
            disk == last && matches!(kind, Kind::Write | Kind::WriteFua | Kind::Zero | Kind::Read | Kind::CopyRead)
        })
    }

    /// The disk of the only leg that counts.
    pub(super) fn lone(&self) -> Option<usize> {
        let carrying: Vec<Slot> = Slot::BOTH.into_iter().filter(|slot| self.status.legs[slot.index()].state == LegState::In).collect();
        let [slot] = carrying[..] else { return None };
        self.place[slot.index()]
    }

    /// What is broken works again, with what it holds. A disk that lied stays what it is until it is blank.
    pub(super) fn heal(&mut self) {
        for disk in &mut self.disks {
            let (lies, suspect) = (disk.trouble.lies, disk.trouble.suspect || !disk.trouble.is_sound());
            disk.trouble = super::disk::Trouble { lies, suspect, ..Default::default() };
        }
        self.witness_errors = 0;
    }

    /// Attaches a disk to a slot whose leg is OUT, as the mirror says that it may come back.
    pub(super) fn attach(&mut self) {
        self.make_room();
        let busy = self.asked.values().any(|asked| matches!(asked, Asked::Attach { .. }));
        if !self.status.ready || self.status.read_only || self.stopping || busy {
            return;
        }
        let Some(record) = self.record() else { return };
        let out = |slot: Slot| {
            let state = record.members[slot.index()].state;
            matches!(state, MemberState::Out | MemberState::OutUnfilled) && self.status.legs[slot.index()].state == LegState::Out
        };
        let Some(free) = Slot::BOTH.into_iter().find(|slot| out(*slot)) else { return };
        let used = self.place[free.other().index()];
        let there = |disk: &usize| Some(*disk) != used && !self.disks[*disk].trouble.gone && !self.disks[*disk].trouble.frozen;
        let candidates: Vec<usize> = (0..self.disks.len()).filter(there).collect();
        if candidates.is_empty() {
            return;
        }
        let disk = candidates[self.rng.below(candidates.len() as u64) as usize];
        let before = self.place;
        let known = self.mirror.as_ref().and_then(|mirror| mirror.readmission(self.disks[disk].meta()));
        let (slot, leg, fill) = match (known, self.disks[disk].leg()) {
            (Some((slot, Fill::DirtyRegions)), Some(leg)) => (slot, leg, Fill::DirtyRegions),
            // Nothing that is there may be trusted: an empty leg of a new name.
            (_, leg) => {
                let member = leg.and_then(|leg| record.members.iter().find(|member| member.leg == leg));
                // A member whose place is not free yet has no answer, which is not "never".
                if member.is_some_and(|member| member.state == MemberState::In || known.is_none()) {
                    return;
                }
                let id = self.new_leg_id();
                self.disks[disk].replace(format::spare_leg(VOLUME, id, self.blocks));
                (free, id, Fill::Everything)
            }
        };
        if slot != free {
            return;
        }
        self.disks[disk].trouble.suspect = false;
        self.place[slot.index()] = Some(disk);
        let newest = format::peek(self.disks[disk].meta()).map_or(0, |summary| summary.newest);
        let tag = self.ask("attach", Asked::Attach { slot }, Request::Attach { slot, leg, fill, newest });
        let busy = !self.asked.contains_key(&tag);
        if busy && self.status.legs[slot.index()].state == LegState::Out {
            self.place = before;
        }
    }

    pub(super) fn detach(&mut self, slot: Slot) {
        if self.may_fail(slot) {
            self.ask("detach", Asked::Detach { slot }, Request::Detach(slot));
        }
    }

    /// Whether a superblock or bitmap page is being written.
    pub(super) fn is_metadata(op: &Op) -> bool {
        matches!(op, Op::Leg(LegOp::WriteMeta { .. }) | Op::Witness(..))
    }

    /// Legs are lost while the other one may have something else: older, where reads are pinned to what is lost (mirror rule 21), and without what only
    /// that had answered (rule 32).
    pub(super) fn lose(&mut self, mut lost: impl Iterator<Item = Slot>) {
        if !lost.any(|slot| self.pin.is_none_or(|pin| pin == slot)) {
            return;
        }
        self.tell(|| "  (the exception of rule 21)".into());
        self.lose_blocks(None);
    }

    /// These blocks of the pinned leg (`None`: all).
    pub(super) fn lose_blocks(&mut self, lost: Option<BlockRange>) {
        let is_lost = |(block, _): &&(u64, u64)| lost.is_none_or(|range| (range.start..range.end).contains(block));
        let behind: Covered = self.was_behind.iter().filter(is_lost).copied().collect();
        if !behind.is_empty() {
            *self.coverage.others.entry("lost behind").or_default() += 1;
            self.history.behind_lost(&behind);
        }
        self.history.exception(lost);
    }

    /// Requests that were answered while a leg that counts is not done with them.
    pub(super) fn not_landed(&self) -> BTreeMap<Tag, BlockRange> {
        let mut behind = BTreeMap::new();
        for work in self.work.values() {
            let Op::Leg(LegOp::Write { buffer: Buffer::Request { tag, .. }, .. }) = work.op else { continue };
            let counts = |slot: Slot| {
                let leg = self.place[slot.index()].map(|disk| (disk, self.disks[disk].generation));
                self.status.legs[slot.index()].state == LegState::In && leg.is_some() && leg == work.disk
            };
            let here = Slot::BOTH.into_iter().any(counts);
            if let (true, Some(Ok(())), Some(Asked::Write { range, .. })) = (here, self.answers.get(&tag), self.asked.get(&tag)) {
                behind.insert(tag, *range);
            }
        }
        behind
    }
}
