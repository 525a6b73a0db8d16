//! Assembly, case by case, from legs and witnesses that say exactly this.

use lockstep_core::{
    assembly::{Assembled, Assembly, Limits, Refusal, assemble},
    format::{self, FLAG_FORCED, REGION_BLOCKS, Superblock, bad_blocks_offset, bitmap_offset},
    io::{Effect, Effects, Fill, LegOp},
    membership::{Member, MemberState, Record, RecordName},
    status::LegState::{self, In, Out, Recovering},
    units::{BlockRange, Epoch, Instant, LegId, RecordId, Slot, VolumeId},
};

use crate::naive;

const VOLUME: VolumeId = VolumeId([9; 16]);
const A: LegId = LegId([1; 16]);
const B: LegId = LegId([2; 16]);
const BLOCKS: u64 = 3 * REGION_BLOCKS;

/// The n-th record of a run.
fn name(epoch: u64, run: u8, n: u8) -> RecordName {
    let mut id = [run; 16];
    id[8..].fill(n);
    RecordName { epoch: Epoch(epoch), id: RecordId(id) }
}

/// A record that says this of A and of B: what they are, and what was seen on them.
fn record(name: RecordName, a: (MemberState, RecordName), b: (MemberState, RecordName)) -> Record {
    let member = |leg, (state, seen)| Member { leg, state, seen };
    Record { name, pin: Slot::A, members: [member(A, a), member(B, b)] }
}

fn superblock(leg: LegId, record: Record) -> Superblock {
    Superblock { sequence: 7, volume: VOLUME, leg, blocks: BLOCKS, checkpoint: 0, flags: 0, compat: 0, record }
}

fn put(file: &mut [u8], at: u64, page: &[u8; 4096]) {
    file[at as usize..at as usize + 4096].copy_from_slice(page);
}

/// A leg that says so, with these dirty bits.
fn leg(superblock: &Superblock, dirty: u8) -> Vec<u8> {
    let mut meta = vec![0; 65536 + 8192];
    put(&mut meta, 0, &format::encode_superblock(superblock));
    put(&mut meta, bitmap_offset(0, 0), &format::encode_bitmap(VOLUME, 5, &[dirty]));
    meta
}

fn witness(record: Record) -> Vec<u8> {
    let mut file = vec![0; 8192];
    put(&mut file, 0, &format::encode_witness(&superblock(A, record)));
    file
}

/// With the other slot damaged.
fn torn(record: Record) -> Vec<u8> {
    let mut file = witness(record);
    file[4096..].fill(0xee);
    file
}

fn start(metas: &[&[u8]], witness: Option<&[u8]>, force: Option<LegId>) -> Result<(Assembled, Vec<Effect>), Refusal> {
    let (seen_epoch, seed, now, limits) = (None, 77, Instant(0), Limits::default());
    let mut out = Effects::new();
    let assembled = assemble(&Assembly { volume: VOLUME, metas, witness, seen_epoch, force, seed, now, limits }, &mut out)?;
    Ok((assembled, out.0))
}

fn states(metas: &[&[u8]], witness: Option<&[u8]>) -> Result<[LegState; 2], Refusal> {
    start(metas, witness, None).map(|(assembled, _)| assembled.mirror.status().legs.map(|leg| leg.state))
}

/// The pages that it writes first, by leg and place.
fn written(effects: &[Effect]) -> Vec<(Slot, u64, &[u8])> {
    let page = |effect: &'_ Effect| matches!(effect, Effect::Leg { op: LegOp::WriteMeta { .. }, .. });
    let pages = effects.iter().filter(|effect| page(effect)).map(|effect| match effect {
        Effect::Leg { slot, op: LegOp::WriteMeta { offset, page }, .. } => (*slot, *offset, page.as_slice()),
        _ => unreachable!("only those are left"),
    });
    pages.collect()
}

const OLD: RecordName = RecordName { epoch: Epoch(4), id: RecordId([4; 16]) };

/// Both count.
fn both() -> Record {
    record(OLD, (MemberState::In, OLD), (MemberState::In, OLD))
}

/// A went on without B.
fn a_alone(epoch: u64) -> Record {
    record(name(epoch, 5, 1), (MemberState::In, OLD), (MemberState::Out, OLD))
}

/// B went on without A.
fn b_alone(epoch: u64) -> Record {
    record(name(epoch, 6, 1), (MemberState::Out, OLD), (MemberState::In, OLD))
}

#[test]
fn a_leg_of_another_volume_is_foreign_and_a_witness_of_another_volume_is_none() {
    let [a, b] = [A, B].map(|id| leg(&superblock(id, both()), 0));
    let mut other = Superblock { volume: VolumeId([8; 16]), ..superblock(B, both()) };
    let (assembled, _) = start(&[&leg(&other, 0), &a], Some(&witness(both())), None).expect("A counts");
    assert_eq!((assembled.slots, assembled.foreign), ([Some(1), None], vec![0]));
    other.record = b_alone(9);
    let mut file = vec![0; 8192];
    put(&mut file, 0, &format::encode_witness(&other));
    assert_eq!(states(&[&a, &b], Some(&file)), Ok([In, In]));
    assert_eq!(states(&[&a], Some(&file)), Err(Refusal::NoWitness(A)));
}

#[test]
fn a_leg_or_a_witness_of_a_newer_version_is_refused() {
    let [a, b] = [A, B].map(|id| leg(&superblock(id, both()), 0));
    for newer in [0, 1] {
        let mut files = [b.clone(), witness(both())];
        files[newer][24] = 2;
        naive::seal(&mut files[newer][..4096], naive::SUPERBLOCK_CRC);
        assert_eq!(states(&[&a, &files[0]], Some(&files[1])), Err(Refusal::TooNew));
    }
}

#[test]
fn a_leg_that_was_recorded_out_returns_with_its_dirty_regions_and_one_that_the_record_counts_but_that_is_older_from_nothing() {
    let out = leg(&superblock(B, both()), 0);
    let (assembled, _) = start(&[&leg(&superblock(A, a_alone(5)), 0), &out], Some(&witness(a_alone(5))), None).expect("A counts");
    assert_eq!((assembled.slots, assembled.returning), ([Some(0), None], vec![(1, Slot::B, Fill::DirtyRegions)]));
    let newer = record(name(5, 4, 2), (MemberState::In, OLD), (MemberState::In, OLD));
    let (assembled, _) = start(&[&leg(&superblock(A, newer), 0), &out], Some(&witness(newer)), None).expect("A counts");
    assert_eq!((assembled.slots, assembled.returning), ([Some(0), None], vec![(1, Slot::B, Fill::Everything)]));
}

#[test]
fn a_leg_with_another_record_of_the_witness_s_epoch_does_not_count() {
    let same_epoch = record(name(4, 7, 1), (MemberState::In, OLD), (MemberState::In, OLD));
    let [a, b] = [leg(&superblock(A, both()), 0), leg(&superblock(B, same_epoch), 0)];
    assert_eq!(states(&[&a, &b], Some(&witness(both()))), Ok([In, Out]));
    assert_eq!(states(&[&b], Some(&witness(both()))), Err(Refusal::Stale(B)));
}

#[test]
fn without_a_witness_an_older_leg_that_the_newer_record_counts_counts() {
    let newer = record(name(5, 4, 2), (MemberState::In, OLD), (MemberState::In, OLD));
    let [a, b] = [leg(&superblock(A, newer), 0), leg(&superblock(B, both()), 0)];
    assert_eq!(states(&[&a, &b], None), Ok([In, In]));
    let [a, b] = [leg(&superblock(A, a_alone(5)), 0), leg(&superblock(B, both()), 0)];
    assert_eq!(states(&[&b, &a], None), Ok([In, Out]));
}

#[test]
fn without_a_witness_a_record_that_does_not_know_the_other_legs_is_a_split_brain_whatever_their_epochs() {
    for (epoch, first, second) in [(5, A, B), (6, B, A), (4, A, B)] {
        let [a, b] = [leg(&superblock(A, a_alone(5)), 0), leg(&superblock(B, b_alone(epoch)), 0)];
        let refusal = states(&[&a, &b], None).expect_err("each went on alone");
        assert!(refusal == Refusal::SplitBrain(first, second) || refusal == Refusal::SplitBrain(second, first), "{refusal:?}");
    }
}

#[test]
fn beside_a_damaged_slot_a_leg_alone_counts_only_by_a_newer_record_and_if_the_other_slot_counts_it() {
    let [a, b] = [leg(&superblock(A, a_alone(5)), 0), leg(&superblock(B, both()), 0)];
    assert_eq!(states(&[&a], Some(&torn(both()))), Ok([In, Out]));
    assert_eq!(states(&[&b], Some(&torn(both()))), Err(Refusal::NoWitness(B)));
    assert_eq!(states(&[&a, &b], Some(&torn(both()))), Ok([In, Out]));
    // The other one was recorded OUT long since: whoever may know more is there.
    assert_eq!(states(&[&a], Some(&torn(a_alone(5)))), Ok([In, Out]));
    let filled = record(name(6, 5, 2), (MemberState::In, a_alone(5).name), (MemberState::In, a_alone(5).name));
    assert_eq!(states(&[&leg(&superblock(B, filled), 0)], Some(&torn(a_alone(5)))), Err(Refusal::NoWitness(B)));
}

#[test]
fn beside_a_damaged_slot_the_later_of_two_starts_is_the_one_that_leaves_the_other_out() {
    let start = record(name(5, 5, 1), (MemberState::In, OLD), (MemberState::In, OLD));
    let both_start = |run| record(name(5, run, 1), (MemberState::In, OLD), (MemberState::In, OLD));
    let legs = |a, b| [leg(&superblock(A, a), 0), leg(&superblock(B, b), 0)];
    let decided = |[a, b]: [Vec<u8>; 2]| states(&[&a, &b], Some(&torn(both())));
    assert_eq!(decided(legs(start, b_alone(5))), Ok([Out, In]));
    assert_eq!(decided(legs(a_alone(5), both_start(7))), Ok([In, Out]));
    assert_eq!(decided(legs(both_start(5), both_start(7))), Ok([In, In]));
    assert!(matches!(decided(legs(a_alone(5), b_alone(5))), Err(Refusal::SplitBrain(..))));
    // One that does not count itself leaves nobody out.
    let unfilled = record(RecordName::NONE, (MemberState::OutUnfilled, RecordName::NONE), (MemberState::OutUnfilled, RecordName::NONE));
    let attaching = record(name(5, 5, 1), (MemberState::In, OLD), (MemberState::Recovering(Fill::Everything), OLD));
    assert_eq!(decided(legs(attaching, unfilled)), Ok([In, Recovering]));
}

#[test]
fn a_leg_that_was_never_full_cannot_be_forced_and_one_that_was_is_on_record_as_forced() {
    let unfilled = record(name(5, 5, 1), (MemberState::In, OLD), (MemberState::OutUnfilled, OLD));
    let b = leg(&superblock(B, unfilled), 0);
    let refused = start(&[&b], Some(&witness(unfilled)), Some(B)).map(|_| ());
    assert_eq!(refused, Err(Refusal::Stale(B)));
    let b = leg(&superblock(B, both()), 0);
    assert_eq!(start(&[&b], Some(&witness(a_alone(5))), Some(A)).map(|_| ()), Err(Refusal::Stale(B)), "A is not there");
    let (assembled, effects) = start(&[&b], Some(&witness(a_alone(5))), Some(B)).expect("it was full");
    assert_eq!(assembled.mirror.status().legs.map(|leg| leg.state), [Out, In]);
    let (.., page) = written(&effects).into_iter().find(|(_, offset, _)| *offset < 8192).expect("a record");
    let said = naive::superblock(page);
    assert_eq!((said.flags, said.record.pin), (FLAG_FORCED, Slot::B));
    assert_eq!(said.record.members.map(|member| member.state), [MemberState::OutUnfilled, MemberState::In]);
    // That it was forced before stays on record.
    let b = leg(&Superblock { flags: FLAG_FORCED, ..superblock(B, both()) }, 0);
    let (_, effects) = start(&[&b], Some(&witness(a_alone(5))), Some(B)).expect("it was full");
    let (.., page) = written(&effects).into_iter().find(|(_, offset, _)| *offset < 8192).expect("a record");
    assert_eq!(naive::superblock(page).flags, FLAG_FORCED);
}

#[test]
fn flags_and_compat_bits_of_one_leg_or_of_both_are_kept() {
    for (flags, compat) in [([8, 8], [5, 5]), ([8, 0], [5, 0]), ([0, 16], [0, 4]), ([1, 2], [1, 2])] {
        let at = |n: usize, id| leg(&Superblock { flags: flags[n], compat: compat[n], ..superblock(id, both()) }, 0);
        let (_, effects) = start(&[&at(0, A), &at(1, B)], Some(&witness(both())), None).expect("both count");
        let said: Vec<Superblock> =
            written(&effects).into_iter().filter(|(_, at, _)| *at < 8192).map(|(.., page)| naive::superblock(page)).collect();
        assert_eq!(said.len(), 2);
        assert!(said.iter().all(|said| said.flags == flags[0] | flags[1] && said.compat == compat[0] | compat[1]), "{said:?}");
        assert!(said.iter().all(|said| said.sequence > 7 && said.record.name.epoch == Epoch(5)));
    }
}

#[test]
fn the_dirty_bits_are_those_of_the_legs_that_count_and_no_other() {
    let dirty = |metas: &[&[u8]], record| start(metas, Some(&witness(record)), None).expect("A counts").0.mirror.status().dirty_regions;
    let [a, b] = [leg(&superblock(A, both()), 0b1), leg(&superblock(B, both()), 0b100)];
    assert_eq!(dirty(&[&a, &b], both()), 2);
    let filling = record(name(5, 5, 1), (MemberState::In, OLD), (MemberState::Recovering(Fill::DirtyRegions), OLD));
    let [a, b] = [leg(&superblock(A, filling), 0b1), leg(&superblock(B, filling), 0b110)];
    assert_eq!(dirty(&[&a, &b], filling), 1);
}

fn list(meta: &mut [u8], runs: &[BlockRange]) {
    put(meta, bad_blocks_offset(0), &format::encode_bad_blocks(VOLUME, 3, runs));
}

#[test]
fn the_lists_of_bad_blocks_are_joined_and_written_again_where_a_leg_says_something_else() {
    let (seven, nine) = ([BlockRange::new(7, 8)], [BlockRange::new(9, 11)]);
    for (of_a, of_b, joined) in [(&seven[..], &nine[..], 3), (&seven, &seven, 1), (&seven, &[], 1), (&[], &[], 0)] {
        let [mut a, mut b] = [A, B].map(|id| leg(&superblock(id, both()), 0));
        list(&mut a, of_a);
        list(&mut b, of_b);
        let (assembled, effects) = start(&[&a, &b], Some(&witness(both())), None).expect("both count");
        assert_eq!(assembled.mirror.status().bad_blocks, joined);
        let lists = written(&effects).into_iter().filter(|(_, at, _)| (32768..40960).contains(at)).count();
        assert_eq!(lists > 0, of_a != of_b, "{of_a:?} {of_b:?}");
    }
}

#[test]
fn where_no_list_of_bad_blocks_is_valid_only_force_helps_and_only_of_a_leg_that_is_meant() {
    let [mut a, mut b] = [A, B].map(|id| leg(&superblock(id, both()), 0));
    a[32768..40960].fill(0xee);
    assert_eq!(states(&[&a, &b], Some(&witness(both()))), Ok([In, In]), "B has one");
    b[32768..40960].fill(0xee);
    assert_eq!(states(&[&a, &b], Some(&witness(both()))), Err(Refusal::BadBlocksUnknown(A)));
    let forced = |leg| start(&[&a, &b], Some(&witness(both())), Some(leg)).map(|(_, effects)| effects);
    assert_eq!(forced(LegId([3; 16])), Err(Refusal::BadBlocksUnknown(A)));
    for leg in [A, B] {
        let effects = forced(leg).expect("the operator says so");
        let (.., page) = written(&effects).into_iter().find(|(_, at, _)| *at < 8192).expect("a record");
        assert_eq!(naive::superblock(page).flags, FLAG_FORCED);
    }
}

#[test]
fn what_is_refused_says_which_leg_and_what_to_do() {
    let [a, b] = [A, B].map(|leg| leg.to_string());
    let said = |refusal: Refusal, words: &[&str]| {
        let text = refusal.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    said(Refusal::NoLeg, &["bring"]);
    said(Refusal::Stale(A), &[&a, "bring", "force"]);
    said(Refusal::NoWitness(A), &[&a, "bring", "force"]);
    said(Refusal::SplitBrain(A, B), &[&a, &b, "force"]);
    said(Refusal::BadBlocksUnknown(B), &[&b, "bring", "force"]);
    said(Refusal::TooNew, &["upgrade"]);
    let damaged = format::superblock(&[0; 8192]).expect_err("nothing is there").to_string();
    assert!(damaged.contains("damaged"), "{damaged}");
    assert!(format::MetaError::TooNew.to_string().contains("upgrade"));
}
