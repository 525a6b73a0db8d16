//! Reads and seals pages as the drawing at the head of `format.rs` says, with nothing of the product's code.

use lockstep_core::{
    format::Superblock,
    io::Fill,
    membership::{Member, MemberState, Record, RecordName},
    units::{Epoch, LegId, RecordId, Slot, VolumeId},
};

/// What CRC32C makes of each byte, bit by bit.
const STEPS: [u32; 256] = {
    let mut steps = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut crc, mut bit) = (byte as u32, 0);
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        steps[byte] = crc;
        byte += 1;
    }
    steps
};

/// CRC32C.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| crc >> 8 ^ STEPS[(crc as u8 ^ byte) as usize])
}

/// Gives a page the checksum that its content has; the field is at `at`.
pub fn seal(page: &mut [u8], at: usize) {
    page[at..at + 4].fill(0);
    let crc = crc32c(page);
    page[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Whether the checksum of a page is right; its field is at `at`.
pub fn is_sealed(page: &[u8], at: usize) -> bool {
    let mut again = page.to_vec();
    seal(&mut again, at);
    again == page
}

/// Where the checksum of a superblock or witness page is.
pub const SUPERBLOCK_CRC: usize = 12;
/// Where the checksum of a bitmap page is.
pub const BITMAP_CRC: usize = 0;
/// Where the checksum of a bad-block list is.
pub const BAD_BLOCKS_CRC: usize = 0;

pub fn u32_at(page: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(page[at..at + 4].try_into().expect("four bytes"))
}

pub fn u64_at(page: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"))
}

fn id_at(page: &[u8], at: usize) -> [u8; 16] {
    page[at..at + 16].try_into().expect("sixteen bytes")
}

fn name_at(page: &[u8], at: usize) -> RecordName {
    RecordName { epoch: Epoch(u64_at(page, at)), id: RecordId(id_at(page, at + 8)) }
}

fn member_at(page: &[u8], at: usize) -> Member {
    let state = match page[at + 16] {
        0 => MemberState::In,
        1 => MemberState::Out,
        2 => MemberState::Recovering(Fill::DirtyRegions),
        3 => MemberState::Recovering(Fill::Everything),
        4 => MemberState::OutUnfilled,
        other => panic!("no member state {other}"),
    };
    Member { leg: LegId(id_at(page, at)), state, seen: name_at(page, at + 24) }
}

/// What a valid superblock or witness page says.
pub fn superblock(page: &[u8]) -> Superblock {
    Superblock {
        sequence: u64_at(page, 32),
        volume: VolumeId(id_at(page, 40)),
        leg: LegId(id_at(page, 56)),
        blocks: u64_at(page, 72),
        checkpoint: u64_at(page, 88),
        flags: u64_at(page, 96),
        compat: u32_at(page, 16),
        record: Record {
            name: name_at(page, 104),
            pin: if page[128] == 0 { Slot::A } else { Slot::B },
            members: [member_at(page, 136), member_at(page, 184)],
        },
    }
}
