//! The vocabulary: blocks, ranges, slots, names. Everything here is a newtype, so that a block never
//! meets a byte and a leg never meets a volume.

use core::fmt;

/// Bytes in a block, the unit of the mirror and the logical block size of every volume.
pub const BLOCK_SIZE: u64 = 4096;

/// Monotonic time in nanoseconds. The shell's clock; only differences mean anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

impl Instant {
    /// This instant and `millis` milliseconds.
    pub const fn plus_millis(self, millis: u64) -> Self {
        Self(self.0.saturating_add(millis.saturating_mul(1_000_000)))
    }
}

/// A half-open range of blocks (mirror rule 2): `start` is in it, `end` is not. Touching is not overlapping.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRange {
    /// First block.
    pub start: u64,
    /// The block after the last one.
    pub end: u64,
}

impl BlockRange {
    /// The range `[start, end)`.
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end }
    }

    /// How many blocks are in it; 0 if it is empty or inverted.
    pub const fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there is no block in it.
    pub const fn is_empty(self) -> bool {
        self.end <= self.start
    }

    /// Whether the two share a block.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The part that both share; empty if they do not overlap.
    pub fn intersection(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Byte offset of the first block.
    pub const fn byte_offset(self) -> u64 {
        self.start * BLOCK_SIZE
    }

    /// Length in bytes.
    pub const fn byte_len(self) -> u64 {
        self.len() * BLOCK_SIZE
    }
}

impl fmt::Debug for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.start, self.end)
    }
}

/// Which of the mirror's two places a leg sits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// The first place.
    A,
    /// The second place.
    B,
}

impl Slot {
    /// Both places, in order.
    pub const BOTH: [Slot; 2] = [Slot::A, Slot::B];

    /// The other place.
    pub const fn other(self) -> Self {
        match self {
            Slot::A => Slot::B,
            Slot::B => Slot::A,
        }
    }

    /// 0 or 1.
    pub const fn index(self) -> usize {
        match self {
            Slot::A => 0,
            Slot::B => 1,
        }
    }
}

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                for (i, byte) in self.0.iter().enumerate() {
                    if matches!(i, 4 | 6 | 8 | 10) {
                        f.write_str("-")?;
                    }
                    write!(f, "{byte:02x}")?;
                }
                Ok(())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self, f)
            }
        }
    };
}

id128!(
    /// Names a volume: the UID of its object.
    VolumeId
);
id128!(
    /// Names one copy of a volume, for as long as that copy's content is the same story. A leg that is filled from
    /// nothing gets a new id.
    LegId
);
id128!(
    /// Tells two membership records of one epoch apart.
    RecordId
);

/// Counts membership records of a volume. A later record has a higher epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// Names one client request, from `Event::Submit` to `Effect::Release`. Chosen by the shell, unique while in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// Names one piece of work that the core asked for, from the effect to `Event::Done`. Chosen by the core, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IoId(pub u64);

/// A Linux error number (positive). The few that the core itself gives are constants.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// Interrupted system call.
    pub const EINTR: Self = Self(4);
    /// Input/output error.
    pub const EIO: Self = Self(5);
    /// No such device or address.
    pub const ENXIO: Self = Self(6);
    /// Try again.
    pub const EAGAIN: Self = Self(11);
    /// Out of memory.
    pub const ENOMEM: Self = Self(12);
    /// Device or resource busy.
    pub const EBUSY: Self = Self(16);
    /// No such device.
    pub const ENODEV: Self = Self(19);
    /// Invalid argument: an empty range, or one beyond the end of the volume.
    pub const EINVAL: Self = Self(22);
    /// No space left on device.
    pub const ENOSPC: Self = Self(28);
    /// Read-only: a flush failed on every leg, nothing more is accepted.
    pub const EROFS: Self = Self(30);
    /// The medium lost it.
    pub const ENODATA: Self = Self(61);
    /// The integrity check failed.
    pub const EILSEQ: Self = Self(84);
    /// It did not end in time.
    pub const ETIMEDOUT: Self = Self(110);
    /// The mirror was stopped.
    pub const ESHUTDOWN: Self = Self(108);
    /// The file system is damaged.
    pub const EUCLEAN: Self = Self(117);
    /// Remote I/O error.
    pub const EREMOTEIO: Self = Self(121);
    /// Quota exceeded.
    pub const EDQUOT: Self = Self(122);
    /// Operation canceled.
    pub const ECANCELED: Self = Self(125);
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::EINTR => "EINTR",
            Self::EIO => "EIO",
            Self::ENXIO => "ENXIO",
            Self::EAGAIN => "EAGAIN",
            Self::ENOMEM => "ENOMEM",
            Self::EBUSY => "EBUSY",
            Self::ENODEV => "ENODEV",
            Self::EINVAL => "EINVAL",
            Self::ENOSPC => "ENOSPC",
            Self::EROFS => "EROFS",
            Self::ENODATA => "ENODATA",
            Self::EILSEQ => "EILSEQ",
            Self::ETIMEDOUT => "ETIMEDOUT",
            Self::ESHUTDOWN => "ESHUTDOWN",
            Self::EUCLEAN => "EUCLEAN",
            Self::EREMOTEIO => "EREMOTEIO",
            Self::EDQUOT => "EDQUOT",
            Self::ECANCELED => "ECANCELED",
            Self(n) => return write!(f, "errno {n}"),
        };
        f.write_str(name)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
