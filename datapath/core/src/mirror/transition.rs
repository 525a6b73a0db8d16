//! Changes of the membership record, one at a time (mirror rules 9, 10, 23).
//!
//! ```text
//! superblock on the legs that stay -> witness -> (superblock on a leg that is to be filled) -> it counts
//! ```

use super::{Ended, Io, Mirror, Purpose, State, sync};
use crate::{
    format::{Superblock, encode_superblock, encode_witness},
    io::{Effect, Effects, Fill, LegOp, Notice},
    membership::{MemberState, Record},
    units::{Errno, Instant, IoId, Slot},
};

/// A witness write is retried so often, with growing pauses, before those who wait get EIO.
const WITNESS_TRIES: u32 = 6;
const WITNESS_PAUSE_MILLIS: u64 = 20;
const WITNESS_RETRY_MILLIS: u64 = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Assemble,
    Out,
    StartRebuild {
        slot: Slot,
        fill: Fill,
    },
    FinishRebuild {
        slot: Slot,
    },
    /// The last record that was tried does not hold: say again what does.
    Restate,
    /// The leg that reads are pinned to changes, so that writes may be behind on this one.
    Pin {
        slow: Slot,
    },
    Grow {
        blocks: u64,
    },
    Checkpoint {
        block: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Legs,
    Witness,
    NewLeg,
}

/// A change of the record that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Transition {
    kind: Kind,
    record: Record,
    stage: Stage,
    waiting: [bool; 2],
    /// A leg failed: to be begun anew when all have reported.
    broken: bool,
    tries: u32,
    /// When the witness is tried again.
    pub(super) retry_at: Option<Instant>,
}

impl Transition {
    /// Whether it makes this slot's leg IN.
    pub(super) fn finishes(&self, slot: Slot) -> bool {
        self.kind == Kind::FinishRebuild { slot }
    }
}

impl Mirror {
    /// Whether this leg is on its way out and counts until a record says otherwise, and one will.
    pub(super) fn counts_until_out(&self, slot: Slot) -> bool {
        self.legs[slot.index()].state == State::Leaving && self.takes_records()
    }

    /// Whether a record that was tried, and does not hold, may pin another leg than the one that does, until that is said again, and it will be.
    pub(super) fn pins_differ(&self) -> bool {
        self.is_restating() && self.takes_records()
    }

    /// Whether the witness takes what is recorded, as far as is known.
    fn takes_records(&self) -> bool {
        let given_up = self.transition.as_ref().is_some_and(|transition| transition.tries >= WITNESS_TRIES);
        !given_up && self.read_only.is_none()
    }

    /// Whether the last record that was tried may be on the disks, and does not hold.
    pub(super) fn is_restating(&self) -> bool {
        self.restate || self.transition.as_ref().is_some_and(|transition| transition.kind == Kind::Restate)
    }

    /// Begins the most urgent change, if none is under way.
    pub(super) fn pump_transition(&mut self, out: &mut Effects) {
        let repin = self.wants_to_repin();
        if self.transition.is_some() || self.read_only.is_some() {
            return;
        }
        if repin.is_none() {
            self.stop_repinning(out);
        }
        let leaving = self.legs.iter().any(|leg| matches!(leg.state, State::Leaving | State::Dropping));
        let full = self.syncing.as_ref().filter(|syncing| syncing.stage == sync::Stage::Full).and_then(|syncing| syncing.target);
        let kind = if leaving {
            if self.must_land() {
                // The leg that stays has what was answered, before the record gives up the one that has it (mirror rule 32).
                return;
            }
            Kind::Out
        } else if !self.ready {
            Kind::Assemble
        } else if core::mem::take(&mut self.restate) {
            Kind::Restate
        } else if let Some((_, slot, fill)) = self.attach {
            if !self.drained() {
                return;
            }
            Kind::StartRebuild { slot, fill }
        } else if let Some((slot, _)) = full {
            Kind::FinishRebuild { slot }
        } else if let Some(blocks) = self.growing.as_ref().filter(|growing| growing.pages_written).map(|growing| growing.blocks) {
            Kind::Grow { blocks }
        } else if let Some(block) = self.syncing.as_mut().and_then(|syncing| syncing.checkpoint.take()) {
            Kind::Checkpoint { block }
        } else if let Some(slow) = repin {
            if !self.flush_for_repin(out) {
                return;
            }
            Kind::Pin { slow }
        } else {
            return;
        };
        let record = self.record_for(kind);
        self.transition =
            Some(Transition { kind, record, stage: Stage::Legs, waiting: [false; 2], broken: false, tries: 0, retry_at: None });
        for slot in Slot::BOTH {
            if self.legs[slot.index()].takes_writes() {
                self.write_superblock(slot, out);
            }
        }
    }

    fn record_for(&mut self, kind: Kind) -> Record {
        if matches!(kind, Kind::Grow { .. } | Kind::Checkpoint { .. }) {
            return self.record;
        }
        let mut record = Record { name: self.new_record_name(), ..self.record };
        for slot in Slot::BOTH {
            let (leg, member) = (&self.legs[slot.index()], &mut record.members[slot.index()]);
            match leg.state {
                State::In => member.state = MemberState::In,
                State::Leaving | State::Dropping | State::Out => member.state = member.state.lost(),
                State::Recovering(fill) => member.state = MemberState::Recovering(fill),
            }
            if leg.state != State::Out {
                member.seen = leg.seen;
            }
        }
        match kind {
            Kind::StartRebuild { slot, fill, .. } => {
                let member = &mut record.members[slot.index()];
                member.leg = self.legs[slot.index()].id;
                member.state = MemberState::Recovering(fill);
            }
            Kind::FinishRebuild { slot } => {
                record.members[slot.index()].state = MemberState::In;
                record.pin = slot.other();
            }
            Kind::Pin { slow } => record.pin = slow.other(),
            _ => {}
        }
        record
    }

    fn superblock(&mut self, slot: Slot) -> Option<Superblock> {
        let transition = self.transition.as_ref()?;
        let (mut blocks, mut checkpoint) = (self.blocks, self.checkpoint);
        match transition.kind {
            Kind::Grow { blocks: grown } => blocks = grown,
            Kind::Checkpoint { block } => checkpoint = block,
            Kind::StartRebuild { .. } | Kind::FinishRebuild { .. } => checkpoint = 0,
            _ => {}
        }
        self.sequence += 1;
        let (leg, record) = (self.legs[slot.index()].id, transition.record);
        let (sequence, volume, flags, compat) = (self.sequence, self.volume, self.flags, self.compat);
        Some(Superblock { sequence, volume, leg, blocks, checkpoint, flags, compat, record })
    }

    fn write_superblock(&mut self, slot: Slot, out: &mut Effects) {
        let Some(superblock) = self.superblock(slot) else { return };
        if let Some(transition) = &mut self.transition {
            transition.waiting[slot.index()] = true;
        }
        let offset = u64::from(1 - self.legs[slot.index()].superblock_slot) * 4096;
        self.issue(slot, Purpose::Superblock, LegOp::WriteMeta { offset, page: encode_superblock(&superblock) }, out);
    }

    pub(super) fn superblock_done(&mut self, slot: Slot, ended: Ended, out: &mut Effects) {
        let Some(transition) = &mut self.transition else { return };
        transition.waiting[slot.index()] = false;
        match ended {
            Ok(_) => {
                let leg = &mut self.legs[slot.index()];
                leg.superblock_slot = 1 - leg.superblock_slot;
                leg.seen = transition.record.name;
            }
            Err(errno) => {
                transition.broken = true;
                self.fail_leg(slot, errno, out);
                if self.legs[slot.index()].state == State::In {
                    // The survivor cannot record who counts: nothing may be answered on it (case 13).
                    self.transition = None;
                    return self.fail_mirror(errno, out);
                }
            }
        }
        let Some(transition) = &mut self.transition else { return };
        if transition.waiting != [false; 2] {
            return;
        }
        match (transition.broken, transition.stage, transition.kind) {
            (true, ..) => self.abandon(out),
            (false, Stage::Legs, Kind::Grow { .. } | Kind::Checkpoint { .. }) | (false, Stage::NewLeg, _) => self.conclude(out),
            (false, ..) => {
                transition.stage = Stage::Witness;
                self.write_witness(out);
            }
        }
    }

    pub(super) fn write_witness(&mut self, out: &mut Effects) {
        let Some(superblock) = self.superblock(Slot::A) else { return };
        if let Some(transition) = &mut self.transition {
            transition.retry_at = None;
        }
        let io = IoId(self.next_io);
        self.next_io += 1;
        self.ios.insert(io, Io { leg: None, purpose: Purpose::Witness, op: None, reissues: 0, issued: 0 });
        out.push(Effect::WriteWitness { io, offset: u64::from(1 - self.witness_slot) * 4096, page: encode_witness(&superblock) });
    }

    pub(super) fn witness_done(&mut self, ended: Result<(), Errno>, out: &mut Effects) {
        let Some(transition) = &mut self.transition else { return };
        if let Err(error) = ended {
            transition.tries += 1;
            let tries = transition.tries;
            let given_up = tries >= WITNESS_TRIES;
            let pause = if given_up { WITNESS_RETRY_MILLIS } else { WITNESS_PAUSE_MILLIS << tries };
            transition.retry_at = Some(self.now.plus_millis(pause));
            if !given_up {
                return;
            }
            out.push(Effect::Notice(Notice::WitnessFailed { error }));
            return match transition.kind {
                Kind::StartRebuild { .. } => {
                    self.restate = true;
                    self.abandon(out);
                }
                Kind::FinishRebuild { slot } => {
                    // What was reported as failed may have landed all the same: the leg counts until it is durably OUT.
                    self.fail_leg(slot, error, out);
                    self.abandon(out);
                }
                Kind::Pin { .. } => {
                    // Without a witness it is not pinned, and nothing waits for it to be.
                    self.write_mostly.behind = false;
                    self.restate = true;
                    self.abandon(out);
                }
                _ => self.fail_gated(out),
            };
        }
        self.witness_slot = 1 - self.witness_slot;
        if let Kind::StartRebuild { slot, .. } = transition.kind {
            transition.stage = Stage::NewLeg;
            return self.write_superblock(slot, out);
        }
        self.conclude(out);
    }

    /// The change did not come about. What is still wanted is begun anew by the pump.
    fn abandon(&mut self, out: &mut Effects) {
        let Some(transition) = self.transition.take() else { return };
        match transition.kind {
            Kind::StartRebuild { slot, .. } => {
                if transition.stage == Stage::NewLeg {
                    self.record = transition.record;
                    self.legs[slot.index()].state = State::Dropping;
                }
                self.attached(Err(Errno::EIO), out);
                self.resume(out);
            }
            Kind::FinishRebuild { .. } => self.cancel_sync(out),
            Kind::Restate => self.restate = true,
            Kind::Pin { .. } => self.stop_repinning(out),
            Kind::Assemble | Kind::Out | Kind::Grow { .. } | Kind::Checkpoint { .. } => {}
        }
    }

    /// Who asked for a leg is answered, if the mirror did not give up meanwhile.
    fn attached(&mut self, result: Result<(), Errno>, out: &mut Effects) {
        if let Some((tag, ..)) = self.attach.take() {
            Self::answer(tag, result, out);
        }
    }

    /// The change is durable where it must be: it counts.
    fn conclude(&mut self, out: &mut Effects) {
        let Some(transition) = self.transition.take() else { return };
        self.record = transition.record;
        match transition.kind {
            Kind::Assemble | Kind::Restate => {}
            Kind::Pin { .. } => self.stop_repinning(out),
            Kind::Out => self.legs_out(out),
            Kind::StartRebuild { slot, fill } => {
                self.checkpoint = 0;
                self.fresh = fill == Fill::Everything;
                self.legs[slot.index()].state = State::Recovering(fill);
                self.attached(Ok(()), out);
                self.resume(out);
            }
            // It failed meanwhile: the next record takes it OUT.
            Kind::FinishRebuild { slot } if self.legs[slot.index()].state == State::Leaving => {}
            Kind::FinishRebuild { slot } => {
                self.checkpoint = 0;
                self.legs[slot.index()].state = State::In;
                self.legs[slot.index()].repairs = 0;
                self.syncing = None;
                self.bitmap.all_synced();
                out.push(Effect::Notice(Notice::RebuildCompleted { slot }));
                self.resume(out);
            }
            Kind::Grow { blocks } => self.grown(blocks, out),
            Kind::Checkpoint { block } => self.checkpoint = block,
        }
        self.room.look_again();
        // A clean pass that came meanwhile was passed over.
        if self.bitmap.dirty() > 0 {
            self.arm_clean();
        }
        if !self.ready {
            self.ready = true;
            out.push(Effect::Notice(Notice::Assembled));
            for (tag, request) in core::mem::take(&mut self.early) {
                self.submit(tag, request, out);
            }
        }
    }

    /// Legs are durably OUT: nobody waits for them any more.
    fn legs_out(&mut self, out: &mut Effects) {
        for slot in Slot::BOTH {
            let recorded = matches!(self.record.members[slot.index()].state, MemberState::Out | MemberState::OutUnfilled);
            if recorded && matches!(self.legs[slot.index()].state, State::Leaving | State::Dropping) {
                self.legs[slot.index()].state = State::Out;
                out.push(Effect::Notice(Notice::LegOut { slot }));
                self.pages_without(slot, out);
                self.let_go(slot, out);
                self.detached(slot, out);
            }
        }
        if self.in_count() == 1 {
            // With one copy there is nothing to differ from.
            self.bitmap.all_synced();
        }
        self.rejudge_writes(out);
        self.judge_flush(out);
    }
}
