//! Images of version 1. Each file in `tests/golden` holds what its pages must say (`=`) and their rows of 16 bytes that are not all zero. They were
//! written by the first version of this code (`two-pages` by a later one), the `=` lines by another reader. They are never made anew: a file that must change is a
//! change of the format.

use std::collections::BTreeMap;

use lockstep_core::{
    assembly::{Assembly, Limits, Refusal, assemble},
    format::{self, META_LEN, PAGE_REGIONS, REGION_BLOCKS, Superblock, WITNESS_LEN, bitmap_offset, bitmap_pages},
    io::{Effect, Effects, LegOp},
    membership::RecordName,
    status::LegState::{self, In, Out, Recovering},
    units::{BlockRange, Instant, LegId, VolumeId},
};

const VOLUME: VolumeId = VolumeId([9; 16]);
const BLOCKS: u64 = 65 * 4096 + 5;
/// A volume that one bitmap page is too small for: 508 GiB, and four regions.
const LARGE: u64 = (PAGE_REGIONS + 3) * REGION_BLOCKS + 5;
const BAD_BLOCKS: [u64; 2] = [0x8000, 0x9000];

struct Image {
    /// By name: a, b, witness.
    files: BTreeMap<String, Vec<u8>>,
    says: Vec<String>,
}

fn image(text: &str) -> Image {
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut says = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(said) = line.strip_prefix("= ") {
            says.push(said.to_owned());
            continue;
        }
        let [name, at, row] = line.split(' ').collect::<Vec<_>>().try_into().expect("name, offset, bytes");
        let len = if name == "witness" { WITNESS_LEN } else { META_LEN };
        let file = files.entry(name.to_owned()).or_insert_with(|| vec![0; len as usize]);
        let at = usize::from_str_radix(at, 16).expect("an offset");
        for (i, byte) in row.as_bytes().chunks(2).enumerate() {
            file[at + i] = u8::from_str_radix(str::from_utf8(byte).expect("text"), 16).expect("a byte");
        }
    }
    Image { files, says }
}

fn hex(bytes: [u8; 16]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn record(name: RecordName) -> String {
    format!("{}/{}", name.epoch.0, hex(name.id.0))
}

/// The file with this page alone, so that it is not compared with another slot.
fn alone(file: &[u8], at: u64) -> Vec<u8> {
    let (at, mut alone) = (at as usize, vec![0xee; file.len()]);
    alone[at..at + 4096].copy_from_slice(&file[at..at + 4096]);
    alone
}

fn describe(Superblock { sequence, volume, leg, blocks, checkpoint, flags, compat, record: said }: Superblock) -> Vec<String> {
    let (volume, leg, name, pin) = (hex(volume.0), hex(leg.0), record(said.name), said.pin);
    let mut lines = vec![format!(
        "sequence {sequence} volume {volume} leg {leg} blocks {blocks} checkpoint {checkpoint} flags {flags} compat {compat} record {name} pin {pin:?}"
    )];
    for (place, member) in ["A", "B"].into_iter().zip(said.members) {
        lines.push(format!("member {place} leg {} {:?} seen {}", hex(member.leg.0), member.state, record(member.seen)));
    }
    lines
}

/// Reads the one valid page of a file: what it says, and the page as it is written again.
type Read<'a> = &'a dyn Fn(&[u8]) -> Option<(Vec<String>, Vec<u8>)>;

/// What a file says; every page that says something is written again, byte by byte.
fn reads(name: &str, file: &[u8], blocks: u64) -> Vec<String> {
    let mut said = Vec::new();
    let mut page = |at: u64, read: Read<'_>| {
        let bytes = &file[at as usize..at as usize + 4096];
        let lines = match read(&alone(file, at)) {
            _ if bytes.iter().all(|byte| *byte == 0) => vec!["blank".to_owned()],
            None => vec!["damaged".to_owned()],
            Some((lines, again)) => {
                assert_eq!(again, bytes, "{name} at {at:#x} is not written as it was read");
                lines
            }
        };
        said.extend(lines.into_iter().map(|line| format!("{name} {at:05x} {line}").trim_end().to_owned()));
    };
    if name == "witness" {
        let read = |file: &[u8]| format::witness(file).ok().map(|(sb, _)| (describe(sb), format::encode_witness(&sb).to_vec()));
        [0, 4096].into_iter().for_each(|at| page(at, &read));
        return said;
    }
    let superblock = |file: &[u8]| format::superblock(file).ok().map(|(sb, _)| (describe(sb), format::encode_superblock(&sb).to_vec()));
    [0, 4096].into_iter().for_each(|at| page(at, &superblock));
    let bad_blocks = |file: &[u8]| {
        let list = format::bad_blocks(file, VOLUME, blocks)?;
        let runs: Vec<String> = list.runs.iter().map(|run: &BlockRange| format!("{run:?}")).collect();
        let again = format::encode_bad_blocks(VOLUME, list.sequence.max(1), &list.runs).to_vec();
        Some((vec![format!("sequence {} bad {}", list.sequence, runs.join(" "))], again))
    };
    BAD_BLOCKS.into_iter().for_each(|at| page(at, &bad_blocks));
    for number in 0..bitmap_pages(blocks) {
        let bitmap = |file: &[u8]| {
            let found = format::bitmap_page(file, VOLUME, number)?;
            let dirty = (0..found.bits.len() * 8).filter(|region| found.bits[region / 8] >> (region % 8) & 1 == 1);
            let dirty: Vec<String> = dirty.map(|region| (number * PAGE_REGIONS + region as u64).to_string()).collect();
            let line = format!("sequence {} dirty {}", found.sequence, dirty.join(" "));
            Some((vec![line], format::encode_bitmap(VOLUME, found.sequence, &found.bits).to_vec()))
        };
        [0, 1].into_iter().for_each(|slot| page(bitmap_offset(number, slot), &bitmap));
    }
    said
}

/// What becomes of the volume when it is assembled: the legs, the dirty regions, the epoch that counted.
type Volume = Result<([LegState; 2], u64, u64), Refusal>;

/// Returns what is written next to any superblock.
fn opens(text: &str, disks: &[&str], expected: &Volume) -> Vec<Superblock> {
    opens_of(BLOCKS, text, disks, expected)
}

/// The same, of a volume of so many blocks.
fn opens_of(blocks: u64, text: &str, disks: &[&str], expected: &Volume) -> Vec<Superblock> {
    let image = image(text);
    let said: Vec<String> = image.files.iter().flat_map(|(name, file)| reads(name, file, blocks)).collect();
    assert_eq!(said, image.says);
    let metas: Vec<&[u8]> = disks.iter().map(|disk| image.files[*disk].as_slice()).collect();
    let assembly = Assembly {
        volume: VOLUME,
        metas: &metas,
        witness: Some(&image.files["witness"]),
        seen_epoch: None,
        force: None,
        seed: 77,
        now: Instant(0),
        limits: Limits::default(),
    };
    let mut out = Effects::new();
    let volume = assemble(&assembly, &mut out).map(|assembled| {
        let status = assembled.mirror.status();
        assert_eq!(status.blocks, blocks);
        (status.legs.map(|leg| leg.state), status.dirty_regions, status.epoch.0)
    });
    assert_eq!(&volume, expected, "{disks:?}");
    let pages = out.0.iter().filter_map(|effect| match effect {
        Effect::Leg { op: LegOp::WriteMeta { offset: 0 | 4096, page }, .. } => Some(page),
        _ => None,
    });
    pages.map(|page| format::superblock(page.as_slice()).expect("it was just written").0).collect()
}

macro_rules! golden {
    ($file:literal) => {
        include_str!(concat!("../golden/", $file, ".hex"))
    };
}

const BOTH: &[&str] = &["a", "b"];

#[test]
fn a_new_volume_opens() {
    opens(golden!("new"), BOTH, &Ok(([In, In], 0, 1)));
    opens(golden!("new"), &["b"], &Ok(([Out, In], 0, 1)));
}

#[test]
fn a_new_volume_is_made_as_ever() {
    let files = image(golden!("new")).files;
    let legs = [LegId([1; 16]), LegId([2; 16])];
    for (name, leg) in ["a", "b"].into_iter().zip(legs) {
        assert!(files[name] == format::new_leg(VOLUME, legs, leg, BLOCKS), "leg {name}");
    }
    assert!(files["witness"] == format::new_witness(VOLUME, legs, BLOCKS));
}

#[test]
fn a_volume_that_was_killed_opens_with_its_dirty_regions() {
    opens(golden!("healthy"), BOTH, &Ok(([In, In], 2, 2)));
    opens(golden!("healthy"), &["a"], &Ok(([In, Out], 2, 2)));
}

#[test]
fn a_degraded_volume_opens_on_the_leg_that_counts_and_not_on_the_other() {
    opens(golden!("degraded"), BOTH, &Ok(([In, Out], 3, 3)));
    opens(golden!("degraded"), &["a"], &Ok(([In, Out], 3, 3)));
    opens(golden!("degraded"), &["b"], &Err(Refusal::Stale(LegId([2; 16]))));
}

#[test]
fn a_volume_whose_new_leg_was_being_filled_goes_on_filling_it() {
    opens(golden!("recovering"), BOTH, &Ok(([In, Recovering], 65, 5)));
    opens(golden!("recovering"), &["b"], &Err(Refusal::Stale(LegId([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]))));
}

#[test]
fn a_volume_that_was_forced_opens_on_what_was_forced() {
    opens(golden!("forced"), BOTH, &Ok(([Out, In], 2, 4)));
    opens(golden!("forced"), &["a"], &Err(Refusal::Stale(LegId([1; 16]))));
}

#[test]
fn a_volume_whose_newest_slot_is_torn_opens_by_the_other_slot_or_by_who_knows_more() {
    opens(golden!("torn-superblock"), BOTH, &Ok(([In, In], 3, 2)));
    opens(golden!("torn-witness"), BOTH, &Ok(([In, Out], 3, 3)));
    opens(golden!("torn-witness"), &["a"], &Ok(([In, Out], 3, 3)));
    opens(golden!("torn-witness"), &["b"], &Err(Refusal::NoWitness(LegId([2; 16]))));
}

#[test]
fn a_volume_with_a_list_of_bad_blocks_opens() {
    opens(golden!("bad-blocks"), BOTH, &Ok(([In, Out], 3, 3)));
}

#[test]
fn a_volume_of_two_bitmap_pages_that_was_killed_opens_with_the_dirty_regions_of_both() {
    opens_of(LARGE, golden!("two-pages"), BOTH, &Ok(([In, In], 5, 2)));
    opens_of(LARGE, golden!("two-pages"), &["a"], &Ok(([In, Out], 4, 2)));
    opens_of(LARGE, golden!("two-pages"), &["b"], &Ok(([Out, In], 4, 2)));
}

#[test]
fn a_volume_with_compat_bits_and_a_flag_of_a_later_version_opens_and_keeps_them() {
    for (disks, states) in [(BOTH, [In, In]), (&["a"], [In, Out])] {
        let written = opens(golden!("compat"), disks, &Ok((states, 2, 2)));
        assert!(!written.is_empty());
        assert!(written.iter().all(|said| (said.compat, said.flags) == (0x8000_0001, 1 << 40)), "{written:?}");
    }
}
