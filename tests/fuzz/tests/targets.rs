//! The fuzzers' targets on what proptest thinks of, and on what once was found.

use proptest::prelude::*;

/// Bytes of which many are small: counts, codes and flags that mean something.
fn bytes(len: usize) -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => Just(0u8), 2 => 0..6u8, 2 => any::<u8>()];
    (any::<u8>(), prop::collection::vec(byte, 0..len)).prop_map(|(flags, rest)| [&[flags], &rest[..]].concat())
}

/// Four parts as the target cuts them: two bitmap slots, then two lists of a few runs, some of which touch.
fn lists() -> impl Strategy<Value = Vec<u8>> {
    let run = (0..3u64, 0..3u64);
    let list = (prop::collection::vec(run, 0..5), 0..2u8).prop_map(|(runs, extra)| {
        let mut page = vec![0; 32];
        page[4] = runs.len() as u8 + extra / 2;
        page[8] = 1 + extra;
        let mut at = 0;
        for (gap, len) in runs {
            page.extend([at + gap, len].into_iter().flat_map(u64::to_le_bytes));
            at += gap + len;
        }
        page.resize(128, 0);
        page
    });
    [list.clone(), list.clone(), list.clone(), list].prop_map(|lists| [&[0xff], &lists.concat()[..]].concat())
}

/// Mostly one of the words that mean something, as the target shortens them.
fn word() -> impl Strategy<Value = String> {
    prop_oneof![9 => "%[prtafc]", 1 => "\\PC{0,4}", 1 => "[Tt]ransport"]
}

/// A request with a header that fits.
fn request() -> impl Strategy<Value = Vec<u8>> {
    (0..60u32, bytes(200)).prop_map(|(opcode, body)| {
        let len = 40 + body.len() as u32;
        [&len.to_ne_bytes()[..], &opcode.to_ne_bytes(), &[7; 32], &body].concat()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn superblocks_and_witnesses(data in bytes(800)) {
        lockstep_fuzz::superblock(&data);
    }

    #[test]
    fn bitmap_pages_and_lists_of_bad_blocks(data in prop_oneof![lists(), bytes(800)]) {
        lockstep_fuzz::bitmap(&data);
    }

    #[test]
    fn fuse_requests(data in prop_oneof![request(), bytes(200)]) {
        lockstep_fuzz::fuse(&data);
    }

    #[test]
    fn volume_parameters(lines in prop::collection::vec((word(), word()), 0..3)) {
        let text: String = lines.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        lockstep_fuzz::parameters(text.as_bytes());
    }
}
