//! Arbitrary content of the pages.

use lockstep_core::{
    format::{MAX_BLOCKS, Superblock},
    io::Fill,
    membership::{Member, MemberState, Record, RecordName},
    units::{Epoch, LegId, RecordId, Slot, VolumeId},
};
use proptest::prelude::*;

fn name() -> impl Strategy<Value = RecordName> {
    (any::<u64>(), any::<[u8; 16]>()).prop_map(|(epoch, id)| RecordName { epoch: Epoch(epoch), id: RecordId(id) })
}

fn member() -> impl Strategy<Value = Member> {
    let states = [
        MemberState::In,
        MemberState::Out,
        MemberState::Recovering(Fill::DirtyRegions),
        MemberState::Recovering(Fill::Everything),
        MemberState::OutUnfilled,
    ];
    (any::<[u8; 16]>(), prop::sample::select(states.to_vec()), name()).prop_map(|(leg, state, seen)| Member {
        leg: LegId(leg),
        state,
        seen,
    })
}

fn record() -> impl Strategy<Value = Record> {
    (name(), prop::sample::select(Slot::BOTH.to_vec()), [member(), member()]).prop_map(|(name, pin, members)| Record { name, pin, members })
}

/// Whatever a superblock can say.
pub fn superblock() -> impl Strategy<Value = Superblock> {
    let numbers = (any::<u64>(), 1..=MAX_BLOCKS, any::<u64>(), any::<u64>(), any::<u32>());
    (numbers, any::<[u8; 16]>(), any::<[u8; 16]>(), record()).prop_map(
        |((sequence, blocks, checkpoint, flags, compat), volume, leg, record)| Superblock {
            sequence,
            volume: VolumeId(volume),
            leg: LegId(leg),
            blocks,
            checkpoint,
            flags,
            compat,
            record,
        },
    )
}
