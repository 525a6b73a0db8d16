//! From what a fuzzer thinks of to something that gets past a checksum.

const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);

/// Bits first, then the rest in equal parts.
pub(crate) fn parts<const N: usize>(data: &[u8]) -> (u8, [&[u8]; N]) {
    let (flags, rest) = data.split_first().map_or((0, data), |(flags, rest)| (*flags, rest));
    let len = rest.len().div_ceil(N).max(1);
    let mut chunks = rest.chunks(len);
    (flags, std::array::from_fn(|_| chunks.next().unwrap_or_default()))
}

/// A page that begins so.
pub(crate) fn page(beginning: &[u8]) -> [u8; 4096] {
    let mut page = [0; 4096];
    let len = beginning.len().min(4096);
    page[..len].copy_from_slice(&beginning[..len]);
    page
}

/// Makes the checksum at `at` right.
pub(crate) fn seal(page: &mut [u8; 4096], at: usize) {
    page[at..at + 4].fill(0);
    let crc = CRC.checksum(page);
    page[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}
