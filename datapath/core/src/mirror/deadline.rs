//! Deadlines of leg I/O, in running time (mirror rules 25 and 27).
//!
//! Time runs for a deadline only while the loop runs: it is counted tick by tick, and one tick counts for a thirtieth of the deadline at
//! most, however late it came. A process that was stopped for an hour has run for one step. The shell delivers the completions that it has
//! before a tick (`Event::Tick`), so what is judged here is really outstanding.
//!
//! Disks that hang together do not become late in one instant. So a late leg goes OUT at once only if the other has nothing that is older
//! than half a deadline; if it has, that I/O gets half a deadline to end or to be late too. If both are late, nobody goes.

use super::{Mirror, State, ios::Purpose};
use crate::{
    io::Effects,
    units::{Errno, Instant, Slot},
};

/// The running time, and when it is counted next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Watch {
    limit: u64,
    ran: u64,
    counted: Instant,
    /// `None`: nothing was outstanding at the last tick, and nothing was issued since.
    pub next: Option<Instant>,
}

impl Watch {
    pub(super) const fn new(limit_millis: u64) -> Self {
        Self { limit: limit_millis.saturating_mul(1_000_000), ran: 0, counted: Instant(0), next: None }
    }

    const fn step(&self) -> u64 {
        self.limit / 30 + 1
    }

    /// Something is issued.
    pub(super) fn arm(&mut self, now: Instant) {
        if self.next.is_none() {
            self.counted = now;
            self.next = Some(Instant(now.0.saturating_add(self.step())));
        }
    }

    /// The running time, now.
    pub(super) fn at(&self, now: Instant) -> u64 {
        self.ran + now.0.saturating_sub(self.counted.0).min(self.step())
    }

    /// A tick: counts, if it is time.
    fn count(&mut self, now: Instant) -> bool {
        let due = self.next.is_some_and(|at| at <= now);
        if due {
            self.ran = self.at(now);
            self.counted = now;
            self.next = None;
        }
        due
    }
}

impl Mirror {
    /// A tick came: what is late?
    pub(super) fn judge_deadlines(&mut self, out: &mut Effects) {
        if !self.watch.count(self.now) {
            return;
        }
        let ages = Slot::BOTH.map(|slot| self.oldest(slot));
        if ages != [None; 2] {
            self.watch.arm(self.now);
        }
        let limit = self.watch.limit;
        for slot in Slot::BOTH {
            let (mine, theirs) = (ages[slot.index()].unwrap_or(0), ages[slot.other().index()].unwrap_or(0));
            let other_fine = theirs < limit / 2 || (mine >= limit + limit / 2 && theirs < limit);
            // A leg that is not counted any more, or not yet, is no loss.
            let spared = self.legs[slot.index()].takes_writes() && !other_fine;
            if mine >= limit && !spared {
                self.expire(slot, out);
            }
        }
    }

    /// How long ago the oldest I/O that somebody waits for was issued to this leg. On a leg that is failing already that is its superblock
    /// only: everything else waits for its OUT.
    fn oldest(&self, slot: Slot) -> Option<u64> {
        let leg = &self.legs[slot.index()];
        let waited = |purpose| purpose == Purpose::Superblock || (leg.takes_writes() && purpose != Purpose::Late);
        let theirs = self.ios.values().filter(|io| io.leg == Some((slot, leg.id)) && waited(io.purpose));
        theirs.map(|io| self.watch.ran.saturating_sub(io.issued)).max()
    }

    /// A leg did not report in time. What it was asked for ends when it is durably OUT; only the record that may say so must not wait.
    fn expire(&mut self, slot: Slot, out: &mut Effects) {
        // The last IN leg never goes (mirror rule 14): it is waited for.
        let last = self.legs[slot.index()].state == State::In && self.legs[slot.other().index()].state != State::In;
        if last {
            return;
        }
        self.fail_leg(slot, Errno::ETIMEDOUT, out);
        let leg = self.legs[slot.index()].id;
        let late = self.ios.values_mut().find(|io| io.leg == Some((slot, leg)) && io.purpose == Purpose::Superblock);
        if let Some(io) = late {
            io.purpose = Purpose::Late;
            self.superblock_done(slot, Err(Errno::ETIMEDOUT), out);
        }
    }
}
