//! The superblock and witness decoder, and the assembly of whatever it lets through.

use lockstep_core::{
    assembly::{Assembly, Limits, assemble},
    format::{self, MAX_BLOCKS, MetaError, REGION_BLOCKS, Superblock},
    io::Effects,
    units::{Instant, LegId},
};

use crate::input::{page, parts, seal};

/// Volumes that are assembled: a bitmap in memory grows with the volume.
const SMALL: u64 = 100 * REGION_BLOCKS;

/// Two slots: made of `data`, as they are or (by the first byte's bits) with a right head and checksum.
pub fn superblock(data: &[u8]) {
    let (flags, [a, b]) = parts(data);
    for (magic, is_witness) in [(b"LOCKSTEP", false), (b"LOCKWITN", true)] {
        let slot = |beginning: &[u8], bits: u8| {
            let mut slot = page(beginning);
            if bits & 1 != 0 {
                slot[..12].copy_from_slice(&[&magic[..], &[1, 0, 0, 0]].concat());
                slot[20..28].fill(0);
            }
            if bits & 2 != 0 {
                slot[80..88].copy_from_slice(&REGION_BLOCKS.to_le_bytes());
                slot[74..80].fill(0);
            }
            if bits & 4 != 0 {
                seal(&mut slot, 12);
            }
            slot
        };
        let file = [slot(a, flags), slot(b, flags >> 3)].concat();
        read(&file, is_witness);
    }
    assembled(data);
}

fn read(file: &[u8], is_witness: bool) {
    let decode = |file: &[u8]| if is_witness { format::witness(file) } else { format::superblock(file) };
    let encode =
        |superblock: &Superblock| if is_witness { format::encode_witness(superblock) } else { format::encode_superblock(superblock) };
    let of_the_other_kind = if is_witness { format::superblock(file) } else { format::witness(file) };
    assert_eq!(of_the_other_kind, Err(MetaError::Damaged));
    for cut in [0, 4095, 4096, 8191] {
        let _ = decode(&file[..cut]);
    }
    let Ok((superblock, slot)) = decode(file) else { return };
    assert!(slot < 2 && superblock.blocks > 0 && superblock.blocks <= MAX_BLOCKS);
    let expected = Superblock { leg: if is_witness { LegId([0; 16]) } else { superblock.leg }, ..superblock };
    let again = encode(&superblock);
    assert_eq!(decode(&[again.as_slice(), &[0; 4096]].concat()), Ok((expected, 0)));
    assert_eq!(encode(&expected), again);
    // With the slot that was not taken in its place, the same is the newest, or its equal.
    let alone = [&[0; 4096], &file[usize::from(slot) * 4096..][..4096]].concat();
    assert_eq!(decode(&alone), Ok((superblock, 1)));
    assert!(!is_witness || !format::witness_is_doubtful(&alone));
    if !is_witness {
        let summary = format::peek(file).expect("it is valid");
        assert_eq!((summary.volume, summary.leg, summary.blocks), (superblock.volume, superblock.leg, superblock.blocks));
    }
}

/// Two legs and a witness that say whatever they like are assembled or refused.
fn assembled(data: &[u8]) {
    let (flags, said) = parts::<3>(data);
    let mut magics = [b"LOCKSTEP", b"LOCKSTEP", b"LOCKWITN"].into_iter();
    let files = said.map(|beginning| {
        let mut slot = page(beginning);
        slot[..12].copy_from_slice(&[&magics.next().expect("three")[..], &[1, 0, 0, 0]].concat());
        slot[20..28].fill(0);
        slot[40..56].fill(9);
        // Nobody counts so far: the upper bytes of the sequence and of the epochs.
        [39, 111, 167, 215].into_iter().for_each(|at| slot[at] = 0);
        let blocks = u64::from_le_bytes(slot[72..80].try_into().expect("eight")) % SMALL + 1;
        slot[72..80].copy_from_slice(&blocks.to_le_bytes());
        slot[80..88].copy_from_slice(&REGION_BLOCKS.to_le_bytes());
        slot[128] %= 2;
        slot[152] %= 5;
        slot[200] %= 5;
        seal(&mut slot, 12);
        let mut file = vec![0; 65536 + 8192];
        file[..4096].copy_from_slice(&slot);
        file
    });
    let [a, b, witness] = &files;
    let (superblock, _) = format::superblock(a).expect("it was made valid");
    let assembly = Assembly {
        volume: superblock.volume,
        metas: &[a.as_slice(), b.as_slice()][..usize::from(flags % 3)],
        witness: (flags & 4 != 0).then_some(&witness[..8192]),
        seen_epoch: None,
        force: (flags & 8 != 0).then_some(superblock.leg),
        seed: 1,
        now: Instant(0),
        limits: Limits::default(),
    };
    let mut out = Effects::new();
    if let Ok(assembled) = assemble(&assembly, &mut out) {
        assembled.mirror.check_invariants();
        assert!(assembled.mirror.status().blocks <= SMALL);
    }
}
