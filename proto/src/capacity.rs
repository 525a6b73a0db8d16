//! How much a node can still take, in volumes that need two disks each.

/// Volumes are whole MiB.
pub const ROUNDING: u64 = 1 << 20;
/// The size of a volume whose call names none.
pub const DEFAULT_BYTES: u64 = 1 << 30;
/// The smallest XFS volume.
pub const MIN_XFS_BYTES: u64 = 300 << 20;

/// What a node can still take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// The largest volume that fits: the second largest disk's free space.
    pub maximum_volume_bytes: u64,
    /// What all volumes together can have.
    pub available_bytes: u64,
}

/// From the free bytes of the node's distinct physical disks.
pub fn capacity(free: &[u64]) -> Capacity {
    let mut sorted = free.to_vec();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    let (largest, second) = (sorted.first().copied().unwrap_or(0), sorted.get(1).copied().unwrap_or(0));
    let sum: u128 = free.iter().map(|free| u128::from(*free)).sum();
    let available = (sum / 2).min(sum - u128::from(largest));
    let rounded = |bytes: u64| bytes / ROUNDING * ROUNDING;
    Capacity { maximum_volume_bytes: rounded(second), available_bytes: rounded(u64::try_from(available).unwrap_or(u64::MAX)) }
}

/// Why a range of sizes cannot be met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// The numbers contradict each other.
    #[error("a volume of at least {required} and at most {limit} bytes cannot be: volumes are whole MiB")]
    Range {
        /// At least.
        required: u64,
        /// At most.
        limit: u64,
    },
    /// Less than such a volume needs.
    #[error("a volume of at most {limit} bytes cannot be: with this file system it has at least {} MiB ({minimum} bytes)", minimum >> 20)]
    Small {
        /// At most.
        limit: u64,
        /// What it needs.
        minimum: u64,
    },
    /// Below zero.
    #[error("a size of {0} bytes is below zero")]
    Negative(i64),
}

/// The size of a volume for a CSI capacity range (0: not given), not smaller than `minimum`.
///
/// # Errors
/// If no size is in the range: OUT_OF_RANGE.
pub fn volume_bytes(required: i64, limit: i64, minimum: u64) -> Result<u64, SizeError> {
    let positive = |bytes: i64| u64::try_from(bytes).map_err(|_| SizeError::Negative(bytes));
    let (required, limit) = (positive(required)?, positive(limit)?);
    let range = SizeError::Range { required, limit };
    let at_most = if limit == 0 { u64::MAX } else { limit };
    if at_most < minimum && minimum > ROUNDING {
        return Err(SizeError::Small { limit, minimum });
    }
    // Without a wish the default, or less where the limit says so.
    let wished = if required == 0 { DEFAULT_BYTES.min(at_most / ROUNDING * ROUNDING) } else { required };
    let bytes = wished.max(minimum).checked_next_multiple_of(ROUNDING).ok_or(range)?;
    if bytes > at_most || bytes == 0 { Err(range) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_pair_needs_two_disks() {
        assert_eq!(capacity(&[]), Capacity::default());
        assert_eq!(capacity(&[8 * GIB]), Capacity::default());
        assert_eq!(capacity(&[8 * GIB, 2 * GIB]), Capacity { maximum_volume_bytes: 2 * GIB, available_bytes: 2 * GIB });
        assert_eq!(capacity(&[4 * GIB, 4 * GIB, 4 * GIB]), Capacity { maximum_volume_bytes: 4 * GIB, available_bytes: 6 * GIB });
        assert_eq!(capacity(&[u64::MAX, u64::MAX, u64::MAX]).maximum_volume_bytes, u64::MAX / ROUNDING * ROUNDING);
    }

    #[test]
    fn what_is_said_to_be_available_can_really_be_given_out_in_pairs() {
        // MiB by MiB, always from the two disks with the most room: the naive model.
        for seed in 0..200u64 {
            let disks: Vec<u64> = (0..seed % 5).map(|n| (seed * 7919 + n * n * 31 + n * 104_729) % 40 * ROUNDING).collect();
            let (mut free, mut given) = (disks.clone(), 0);
            loop {
                free.sort_unstable_by(|a, b| b.cmp(a));
                if free.len() < 2 || free[1] == 0 {
                    break;
                }
                free[0] -= ROUNDING;
                free[1] -= ROUNDING;
                given += ROUNDING;
            }
            assert_eq!(capacity(&disks).available_bytes, given, "{disks:?}");
        }
    }

    #[test]
    fn sizes_are_rounded_up_within_their_limit() {
        assert_eq!(volume_bytes(0, 0, 0), Ok(GIB));
        assert_eq!(volume_bytes(1, 0, 0), Ok(ROUNDING));
        assert_eq!(volume_bytes(1, 0, MIN_XFS_BYTES), Ok(MIN_XFS_BYTES));
        assert_eq!(volume_bytes(0, 10 << 20, 0), Ok(10 << 20));
        assert_eq!(volume_bytes(GIB as i64 + 1, 0, 0), Ok(GIB + ROUNDING));
        assert!(volume_bytes(GIB as i64 + 1, GIB as i64 + 2, 0).is_err());
        assert!(volume_bytes(0, 1, 0).is_err());
        assert_eq!(volume_bytes(0, 1, ROUNDING), Err(SizeError::Range { required: 0, limit: 1 }));
        let small = SizeError::Small { limit: 200 << 20, minimum: MIN_XFS_BYTES };
        assert_eq!(volume_bytes(100 << 20, 200 << 20, MIN_XFS_BYTES), Err(small));
        assert_eq!(volume_bytes(0, 200 << 20, MIN_XFS_BYTES), Err(small));
        assert!(small.to_string().contains("at least 300 MiB"), "{small}");
        assert_eq!(volume_bytes(0, MIN_XFS_BYTES as i64, MIN_XFS_BYTES), Ok(MIN_XFS_BYTES));
        assert!(volume_bytes(2, 1, 0).is_err());
        assert_eq!(volume_bytes(-1, 0, 0), Err(SizeError::Negative(-1)));
        assert_eq!(volume_bytes(i64::MAX, 0, 0), Ok(1 << 63));
    }
}
