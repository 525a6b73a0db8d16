//! Who counts: the membership record (mirror rules 8 to 13).
//!
//! ```text
//!            attach            both flushed, record durable
//!   Out ------------> Recovering ------------------------> In
//!    ^                    |  leg fault                      |  leg fault, another leg is In
//!    +--------------------+---------------------------------+
//! ```
//! A record is made by one run of the mirror and names its run in the upper half of its id; within a run, records form one line.
//! So record X of a leg is an ancestor of record Y if Y says that it saw X on that leg, or saw an earlier one of X's run.

use crate::{
    io::Fill,
    status::LegState,
    units::{Epoch, LegId, RecordId, Slot},
};

/// The name of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RecordName {
    /// Its epoch.
    pub epoch: Epoch,
    /// Its id.
    pub id: RecordId,
}

impl RecordName {
    /// Names nothing: no record was ever seen.
    pub const NONE: Self = Self { epoch: Epoch(0), id: RecordId([0; 16]) };

    fn run(self) -> [u8; 8] {
        let mut run = [0; 8];
        run.copy_from_slice(&self.id.0[..8]);
        run
    }
}

/// What a member is, as it stands on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemberState {
    /// Counted.
    In,
    /// Was IN once and missed what the dirty bits say, if its own record is the one that was seen last.
    Out,
    /// Being filled.
    Recovering(Fill),
    /// OUT before it was ever full: nothing in it can be trusted.
    OutUnfilled,
}

impl MemberState {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::In => 0,
            Self::Out => 1,
            Self::Recovering(Fill::DirtyRegions) => 2,
            Self::Recovering(Fill::Everything) => 3,
            Self::OutUnfilled => 4,
        }
    }

    pub(crate) const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::In,
            1 => Self::Out,
            2 => Self::Recovering(Fill::DirtyRegions),
            3 => Self::Recovering(Fill::Everything),
            4 => Self::OutUnfilled,
            _ => return None,
        })
    }

    /// What the member becomes when its leg is lost.
    pub const fn lost(self) -> Self {
        match self {
            Self::In | Self::Out | Self::Recovering(Fill::DirtyRegions) => Self::Out,
            Self::Recovering(Fill::Everything) | Self::OutUnfilled => Self::OutUnfilled,
        }
    }

    /// The state without its history.
    pub const fn public(self) -> LegState {
        match self {
            Self::In => LegState::In,
            Self::Out | Self::OutUnfilled => LegState::Out,
            Self::Recovering(_) => LegState::Recovering,
        }
    }
}

/// One leg in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// The leg.
    pub leg: LegId,
    /// What it counts for.
    pub state: MemberState,
    /// The newest record known to be durable on this leg when this record was made.
    pub seen: RecordName,
}

/// Who counts. The newest durable one decides (mirror rule 9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    /// Its name.
    pub name: RecordName,
    /// The leg that serves reads of regions that may differ (mirror rule 21).
    pub pin: Slot,
    /// The legs, by slot.
    pub members: [Member; 2],
}

impl Record {
    /// The first record of a new volume: both legs read as zeroes, both are IN.
    pub fn first(legs: [LegId; 2], id: RecordId) -> Self {
        let name = RecordName { epoch: Epoch(1), id };
        let member = |leg| Member { leg, state: MemberState::In, seen: name };
        Self { name, pin: Slot::A, members: [member(legs[0]), member(legs[1])] }
    }

    /// Where a leg sits.
    pub fn slot_of(&self, leg: LegId) -> Option<Slot> {
        Slot::BOTH.into_iter().find(|slot| self.members[slot.index()].leg == leg)
    }

    /// Whether this record was made by someone who knew that `slot`'s leg held `theirs`.
    pub fn follows(&self, slot: Slot, theirs: RecordName) -> bool {
        let seen = self.members[slot.index()].seen;
        self.name == theirs
            || seen == theirs
            || (theirs.epoch < self.name.epoch
                && theirs.epoch >= seen.epoch
                && (theirs.run() == seen.run() || theirs.run() == self.name.run()))
    }

    /// How the leg in `slot`, now OUT and holding `theirs`, may come back (mirror rule 24): only a leg whose absence the dirty bits
    /// record gets just the dirty regions.
    pub fn readmission(&self, slot: Slot, theirs: RecordName) -> Fill {
        let member = self.members[slot.index()];
        if member.state == MemberState::Out && self.name != theirs && self.follows(slot, theirs) && member.seen != RecordName::NONE {
            Fill::DirtyRegions
        } else {
            Fill::Everything
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(epoch: u64, run: u8, n: u8) -> RecordName {
        let mut id = [run; 16];
        id[15] = n;
        RecordName { epoch: Epoch(epoch), id: RecordId(id) }
    }

    fn record(epoch: u64, run: u8, b: MemberState, seen: RecordName) -> Record {
        let mut record = Record::first([LegId([1; 16]), LegId([2; 16])], RecordId([0; 16]));
        record.name = name(epoch, run, 0);
        record.members[1] = Member { leg: LegId([2; 16]), state: b, seen };
        record
    }

    const STATES: [MemberState; 5] = [
        MemberState::In,
        MemberState::Out,
        MemberState::Recovering(Fill::DirtyRegions),
        MemberState::Recovering(Fill::Everything),
        MemberState::OutUnfilled,
    ];

    #[test]
    fn a_state_is_on_disk_by_its_number_and_no_other_number_is_one() {
        for (code, state) in (0..).zip(STATES) {
            assert_eq!((state.code(), MemberState::from_code(code)), (code, Some(state)));
        }
        assert!((5..=255).all(|code| MemberState::from_code(code).is_none()));
    }

    #[test]
    fn a_lost_leg_is_out_and_remembers_whether_it_was_ever_full() {
        let lost = STATES.map(MemberState::lost);
        assert_eq!(lost, [MemberState::Out, MemberState::Out, MemberState::Out, MemberState::OutUnfilled, MemberState::OutUnfilled]);
        let public = STATES.map(MemberState::public);
        assert_eq!(public, [LegState::In, LegState::Out, LegState::Recovering, LegState::Recovering, LegState::Out]);
    }

    #[test]
    fn the_first_record_counts_both_legs_each_in_its_slot() {
        let legs = [LegId([1; 16]), LegId([2; 16])];
        let first = Record::first(legs, RecordId([3; 16]));
        assert_eq!((first.name, first.pin), (RecordName { epoch: Epoch(1), id: RecordId([3; 16]) }, Slot::A));
        assert!(first.members.iter().all(|member| member.state == MemberState::In && member.seen == first.name));
        assert_eq!(legs.map(|leg| first.slot_of(leg)), [Some(Slot::A), Some(Slot::B)]);
        assert_eq!(first.slot_of(LegId([3; 16])), None);
    }

    #[test]
    fn a_record_follows_from_what_it_saw_and_from_what_came_later_in_that_run_or_earlier_in_its_own() {
        let record = record(6, 2, MemberState::Out, name(3, 1, 9));
        let follows = |epoch, run, n| record.follows(Slot::B, name(epoch, run, n));
        assert!(follows(6, 2, 0), "itself");
        assert!(follows(3, 1, 9), "what it saw");
        assert!(follows(4, 1, 10) && follows(5, 1, 11), "later in the run that it saw");
        assert!(follows(5, 2, 1) && follows(3, 2, 1), "earlier in its own");
        assert!(!follows(2, 1, 8), "that was overwritten long before");
        assert!(!follows(4, 3, 0), "another run's");
        assert!(!follows(6, 2, 1) && !follows(6, 1, 12), "of its own epoch");
        assert!(!follows(7, 2, 1), "later than itself");
    }

    #[test]
    fn a_leg_that_holds_the_record_that_calls_it_out_or_was_never_seen_is_filled_from_nothing() {
        assert_eq!(record(6, 2, MemberState::Out, name(5, 1, 9)).readmission(Slot::B, name(6, 2, 0)), Fill::Everything);
        assert_eq!(record(6, 2, MemberState::Out, RecordName::NONE).readmission(Slot::B, RecordName::NONE), Fill::Everything);
    }

    #[test]
    fn a_leg_that_went_out_with_the_seen_record_gets_the_dirty_regions() {
        let seen = name(5, 1, 9);
        assert_eq!(record(6, 2, MemberState::Out, seen).readmission(Slot::B, seen), Fill::DirtyRegions);
    }

    #[test]
    fn a_leg_that_went_on_alone_is_filled_from_nothing() {
        let seen = name(5, 1, 9);
        assert_eq!(record(7, 2, MemberState::Out, seen).readmission(Slot::B, name(6, 3, 0)), Fill::Everything);
        assert_eq!(record(7, 2, MemberState::Out, seen).readmission(Slot::B, name(4, 9, 0)), Fill::Everything);
    }

    #[test]
    fn a_leg_that_was_never_full_is_filled_from_nothing() {
        let seen = name(5, 1, 9);
        assert_eq!(record(6, 2, MemberState::OutUnfilled, seen).readmission(Slot::B, seen), Fill::Everything);
        assert_eq!(MemberState::Recovering(Fill::Everything).lost(), MemberState::OutUnfilled);
    }

    #[test]
    fn two_records_of_one_epoch_do_not_follow_from_each_other() {
        let seen = name(5, 1, 9);
        assert!(!record(6, 2, MemberState::Out, seen).follows(Slot::B, name(6, 3, 0)));
    }
}
