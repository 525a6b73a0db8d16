//! Comparing what the legs hold (mirror rule 30): the core sees no bytes.

use lockstep_core::units::BLOCK_SIZE;

/// The blocks in which two pieces of memory differ, as bits: 128 blocks at most.
pub(crate) fn differing(a: &[u8], b: &[u8]) -> u128 {
    let blocks = a.chunks(BLOCK_SIZE as usize).zip(b.chunks(BLOCK_SIZE as usize));
    blocks.enumerate().fold(0, |mask, (i, (a, b))| if a == b { mask } else { mask | 1 << i })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_has_its_bit_and_one_byte_is_enough() {
        let block = BLOCK_SIZE as usize;
        let a = vec![7; 128 * block];
        let mut b = a.clone();
        assert_eq!(differing(&a, &b), 0);
        for at in [0, 3 * block - 1, 3 * block, 128 * block - 1] {
            b[at] = 8;
        }
        assert_eq!(differing(&a, &b), 1 | 1 << 2 | 1 << 3 | 1 << 127);
        assert_eq!(differing(&a[..2 * block], &b[..2 * block]), 1);
    }
}
