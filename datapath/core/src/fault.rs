//! What an error number says about whose fault it is: the one table (mirror rule 6).

use crate::units::Errno;

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The host was short of something for a moment: reissued, with a bound, while the I/O's own deadline goes on. After that it is the leg's.
    Host,
    /// The leg's file system is full: nobody's fault (mirror rule 28).
    NoSpace,
    /// The leg is not to be trusted with this: it goes OUT.
    Leg,
}

/// The table. A number that is not in it is the leg's fault.
const TABLE: [(Errno, Fault); 15] = [
    (Errno::EAGAIN, Fault::Host),
    (Errno::EINTR, Fault::Host),
    (Errno::ENOMEM, Fault::Host),
    (Errno::ECANCELED, Fault::Host),
    (Errno::EBUSY, Fault::Host),
    (Errno::ENOSPC, Fault::NoSpace),
    (Errno::EDQUOT, Fault::NoSpace),
    (Errno::EIO, Fault::Leg),
    (Errno::EREMOTEIO, Fault::Leg),
    (Errno::ENODEV, Fault::Leg),
    (Errno::ENXIO, Fault::Leg),
    (Errno::ETIMEDOUT, Fault::Leg),
    // XFS says these when its metadata is damaged, and after it has shut down.
    (Errno::EUCLEAN, Fault::Leg),
    (Errno::ESHUTDOWN, Fault::Leg),
    (Errno::EROFS, Fault::Leg),
];

/// Whose fault a number is.
pub fn classify(errno: Errno) -> Fault {
    TABLE.iter().find(|(known, _)| *known == errno).map_or(Fault::Leg, |(_, fault)| *fault)
}

/// Whether a read that failed so says that these blocks are lost, and not that the leg, or the way to it, is (mirror rule 22). The block
/// layer says ENODATA for a medium error and EILSEQ for a failed integrity check.
pub fn is_unreadable(errno: Errno) -> bool {
    [Errno::EIO, Errno::EREMOTEIO, Errno::ENODATA, Errno::EILSEQ].contains(&errno)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn numbers(fault: Fault) -> Vec<i32> {
        (-1..4096).filter(|n| classify(Errno(*n)) == fault).collect()
    }

    #[test]
    fn the_hosts_moments_and_a_full_file_system_are_known_by_number_and_everything_else_is_the_legs() {
        // EINTR, EAGAIN, ENOMEM, EBUSY, ECANCELED; ENOSPC, EDQUOT.
        assert_eq!(numbers(Fault::Host), [4, 11, 12, 16, 125]);
        assert_eq!(numbers(Fault::NoSpace), [28, 122]);
        // EIO, ENXIO, ENODEV, EROFS, ESHUTDOWN, ETIMEDOUT, EUCLEAN, EREMOTEIO, and what nobody has heard of.
        for n in [5, 6, 19, 30, 108, 110, 117, 121, 0, 999, -1] {
            assert_eq!(classify(Errno(n)), Fault::Leg, "{n}");
        }
    }

    #[test]
    fn only_what_the_medium_says_makes_blocks_bad() {
        let unreadable: Vec<i32> = (-1..4096).filter(|n| is_unreadable(Errno(*n))).collect();
        assert_eq!(unreadable, [5, 61, 84, 121]);
        assert!(unreadable.iter().all(|n| classify(Errno(*n)) == Fault::Leg));
    }

    #[test]
    fn no_number_is_in_the_table_twice() {
        for (i, (errno, _)) in TABLE.iter().enumerate() {
            assert!(TABLE[i + 1..].iter().all(|(other, _)| other != errno), "{errno}");
        }
    }
}
