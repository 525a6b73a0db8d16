//! When a volume takes up one more request: while the pool has memory for it; and, when a disk that hangs has all of that, up to a share of its own.

use super::{Answer, Pending, Volume};
use crate::buffers::{Class, Pool};

/// What a volume may have under way although the pool is used up.
const SHARE: usize = 16;
/// Of these, more than 32 KiB long: 2.5 MiB in all.
const LARGE_SHARE: usize = 2;

impl Volume {
    /// Whether there is memory for one more request, of each class, for what it turns out to be.
    pub(super) fn may_take_another(&self, pool: &Pool) -> bool {
        let all = [Class::Small, Class::Large];
        all.iter().all(|class| pool.available(*class)) || all.iter().any(|class| pool.starved(*class)) && self.has_less_than_its_share()
    }

    fn has_less_than_its_share(&self) -> bool {
        let (mut requests, mut large) = (0, 0);
        for entry in self.entries.borrow().values() {
            let Pending::Fuse { answer, .. } = &entry.pending else { continue };
            let bytes = match answer {
                Answer::Empty => continue,
                Answer::Written(bytes) => *bytes as usize,
                Answer::Payload(bytes) => *bytes,
            };
            requests += 1;
            large += usize::from(Class::of_payload(bytes) == Class::Large);
        }
        requests < SHARE && large < LARGE_SHARE
    }
}
