//! What can go wrong with a volume.

use std::{io, path::PathBuf};

use lockstep_core::{assembly::Refusal, format::MetaError, units::Errno};

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The legs that were found do not make a mirror that may be used.
    #[error("the mirror cannot be assembled: {0}")]
    Refused(#[from] Refusal),
    /// The same, and legs that are there were not counted, for nobody can tell what they are. Nothing was changed.
    #[error(
        "the mirror cannot be assembled: {refusal}. A copy that is here is not counted, since it does not say what it is: {}. It may be the best one: before \
         another is forced, see whether the `data` beside can be mounted alone, read-only (README, \"A copy without Lockstep\"), and copied to a new volume",
        listed(legs)
    )]
    Damaged {
        /// Why those that were counted are not enough.
        refusal: Refusal,
        /// What is wrong with each of the others.
        legs: Vec<Error>,
    },
    /// The same, and no other leg is there.
    #[error(
        "the mirror cannot be assembled: no copy of the volume that was found says what it is: {}. If a disk of it is away, bring that back. If not, nothing is \
         lost yet: each `data` beside can be mounted alone, read-only (README, \"A copy without Lockstep\"), and copied to a new volume",
        listed(legs)
    )]
    AllDamaged {
        /// What is wrong with each.
        legs: Vec<Error>,
    },
    /// A leg's metadata cannot be used.
    #[error("{path}: {source}")]
    Meta {
        /// The `meta` file.
        path: PathBuf,
        /// Why.
        source: MetaError,
    },
    /// I/O of an earlier process to a leg is not over, or another process has it.
    #[error("{path} is locked: another process still has I/O on it or has it open")]
    LegBusy {
        /// The `data` file.
        path: PathBuf,
    },
    /// A leg's file is shorter than its volume.
    #[error("{path} has {found} bytes, but the volume has {wanted}: it was truncated")]
    Truncated {
        /// The `data` file.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The volume's size.
        wanted: u64,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The mirror refused a command.
    #[error("the mirror answered {0}")]
    Mirror(Errno),
    /// Who keeps the volumes' connections does not do what it was asked.
    #[error(transparent)]
    Holder(#[from] lockstep_fuse_holder::Error),
    /// The volume is closed, or its datapath thread is gone.
    #[error("the volume is not open any more")]
    Gone,
    /// A datapath thread, of this number in the kernel, does not answer.
    #[error("datapath thread {0} does not answer")]
    Stuck(i32),
    /// What looks at the legs panicked: a bug. Nothing but this volume is touched by it.
    #[error("the mirror's code panicked: see the log")]
    Panicked,
    /// The kernel would never send a flush to this device.
    #[error("{device} shows no volatile write cache, so flushes would be lost: refused")]
    NoFlush {
        /// The block device.
        device: PathBuf,
    },
}

fn listed(errors: &[Error]) -> String {
    errors.iter().map(Error::to_string).collect::<Vec<_>>().join("; ")
}

impl Error {
    /// A refusal, if these legs are there and were not counted.
    pub(crate) fn refused(refusal: Refusal, legs: Vec<Self>) -> Self {
        match refusal {
            // By a newer version, nothing of it is damaged.
            refusal if legs.is_empty() || refusal == Refusal::TooNew => Self::Refused(refusal),
            Refusal::NoLeg => Self::AllDamaged { legs },
            refusal => Self::Damaged { refusal, legs },
        }
    }
}

/// Gives an `io::Error` its context.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Io { what: what(), source: source.into() })
    }
}

#[cfg(test)]
mod tests {
    use lockstep_core::units::LegId;

    use super::*;

    fn damaged() -> Vec<Error> {
        let missing = Error::Io { what: "opening /b/meta".into(), source: io::ErrorKind::NotFound.into() };
        vec![Error::Meta { path: "/a/meta".into(), source: MetaError::Damaged }, missing]
    }

    fn says(error: &Error, named: &[&str], not: &[&str]) {
        let text = error.to_string();
        assert!(named.iter().all(|name| text.contains(name)) && !not.iter().any(|name| text.contains(name)), "{text}");
    }

    #[test]
    fn a_refusal_names_the_copies_that_were_not_counted_and_has_them_looked_at_first() {
        let named = ["/a/meta: neither superblock slot is valid", "opening /b/meta: ", "`data`", "A copy without Lockstep", "a new volume"];
        for refusal in [Refusal::Stale(LegId([1; 16])), Refusal::NoWitness(LegId([1; 16])), Refusal::BadBlocksUnknown(LegId([1; 16]))] {
            let text = refusal.to_string();
            says(&Error::refused(refusal, damaged()), &[&named[..], &[&text, "before another is forced"]].concat(), &[]);
        }
        says(&Error::refused(Refusal::NoLeg, damaged()), &[&named[..], &["no copy of the volume"]].concat(), &["forced"]);
    }

    #[test]
    fn a_refusal_of_sound_legs_says_nothing_of_damage() {
        says(&Error::refused(Refusal::NoLeg, Vec::new()), &["bring one of its disks back"], &["`data`"]);
        says(&Error::refused(Refusal::TooNew, damaged()), &["upgrade"], &["/a/meta"]);
    }

    /// Its slot of that record has gone bad: nobody can tell it from one that missed writes.
    #[test]
    fn a_stale_leg_may_be_a_damaged_one() {
        says(&Error::refused(Refusal::Stale(LegId([1; 16])), Vec::new()), &["missed writes, or its `meta` is damaged"], &["`data`"]);
    }
}
