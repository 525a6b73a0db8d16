//! What an error number says about whose fault it is: the one table (mirror rule 6).

use crate::units::Errno;

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The host was short of something for a moment: reissued, with a bound.
    Host,
    /// The leg's file system is full: nobody's fault (mirror rule 28).
    NoSpace,
    /// The leg is not to be trusted with this: it goes OUT.
    Leg,
}

/// The table.
pub const fn classify(errno: Errno) -> Fault {
    match errno {
        Errno::EAGAIN | Errno::EINTR | Errno::ENOMEM | Errno::ECANCELED | Errno::EBUSY => Fault::Host,
        Errno::ENOSPC => Fault::NoSpace,
        _ => Fault::Leg,
    }
}
