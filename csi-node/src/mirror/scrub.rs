//! Scrubs: asked for by an annotation of the volume's object, told by its conditions.
//!
//! ```text
//! annotated --both copies there--> compared --> condition Scrubbed, annotations removed
//!     ^            | a copy is lost, the volume is unstaged
//!     +------------+
//! ```
//! Nothing is ever repaired that was not asked for together with the scrub: `BELIEVE_ANNOTATION` goes with it.

use std::sync::{Arc, PoisonError};

use lockstep_datapath::core::{
    io::Notice,
    status::{self, LegState, ScrubState, Status},
    units::{BLOCK_SIZE, BlockRange, Errno, LegId, Slot},
};
use lockstep_store::Store;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::OpenVolume;
use crate::{legs, news::news, node::Node};

/// The two copies are to be compared; any value. Removed when they were.
pub const SCRUB_ANNOTATION: &str = "lockstep.io/scrub";
/// Where the copies differ, this one is right: a LocalDisk's name, or a leg's id. Removed together with `SCRUB_ANNOTATION`.
pub const BELIEVE_ANNOTATION: &str = "lockstep.io/scrub-repair-from";
/// So many ranges of differing blocks are named in a condition; the log has them all.
const NAMED: usize = 16;

/// What a person wants compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    value: String,
    believed: Option<String>,
}

impl Wish {
    pub(super) fn of(annotations: Option<&std::collections::BTreeMap<String, String>>) -> Option<Self> {
        let annotations = annotations?;
        let value = annotations.get(SCRUB_ANNOTATION)?.clone();
        Some(Self { value, believed: annotations.get(BELIEVE_ANNOTATION).cloned() })
    }
}

type Ended = Result<(), lockstep_datapath::Error>;

/// The scrub of a mirror that is under way.
#[derive(Debug, Default)]
pub(super) struct Scrubs {
    granted: Option<Wish>,
    task: Option<JoinHandle<Ended>>,
    result: Option<Ended>,
    /// What cannot be granted. The object says why before the annotations go, as it has the result of a scrub before they go.
    refused: Option<Wish>,
}

impl Scrubs {
    /// Waits for its end; for ever, if there is none.
    pub(super) async fn ended(&mut self) {
        if let Some(task) = &mut self.task {
            self.result = Some(task.await.unwrap_or(Err(lockstep_datapath::Error::Gone)));
            self.task = None;
        } else if self.result.is_none() {
            std::future::pending().await
        }
    }
}

/// What a scrub found, beside the mirror's own figures.
#[derive(Debug, Default)]
pub(super) struct Found {
    ranges: Vec<BlockRange>,
    /// Why the newest wish was not granted.
    refused: Option<String>,
    believed: Option<String>,
}

impl OpenVolume {
    pub(super) fn scrub_noticed(&self, notice: &Notice) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        match notice {
            Notice::ScrubStarted => found.ranges.clear(),
            Notice::Mismatch { range } if found.ranges.len() <= NAMED => found.ranges.push(*range),
            _ => {}
        }
    }

    /// The slot of a disk or a leg.
    fn slot_of(&self, status: &Status, name: &str) -> Option<Slot> {
        let leg = legs::parse_id(name).map(LegId);
        Slot::BOTH.into_iter().find(|slot| {
            let id = status.legs[slot.index()].id;
            leg == Some(id) || self.disk_of(id).as_deref() == Some(name)
        })
    }

    /// What the condition Scrubbed says; `None`: as before.
    pub(super) fn scrubbed(&self, scrub: &status::Scrub) -> Option<(bool, &'static str, String)> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        said(scrub, &found)
    }
}

fn said(scrub: &status::Scrub, found: &Found) -> Option<(bool, &'static str, String)> {
    if let Some(refused) = &found.refused {
        return Some((false, "ScrubRefused", refused.clone()));
    }
    let mebibytes = (scrub.compared * BLOCK_SIZE).div_ceil(1 << 20);
    let mut ranges = found.ranges.iter().take(NAMED).map(|range| format!("{range:?}")).collect::<Vec<_>>().join(", ");
    if found.ranges.len() > NAMED {
        ranges += " and more, see the log";
    }
    let unreadable = match scrub.unreadable {
        0 => String::new(),
        n => format!("; {n} blocks could not be read in one copy or in both, see the log"),
    };
    let skipped = if scrub.skipped > 0 { "; what a resync is to make equal was not judged" } else { "" };
    let percent = scrub.done * 100 / scrub.total.max(1);
    let differ = scrub.differing();
    Some(match scrub.state {
        ScrubState::Never => return None,
        ScrubState::Running => {
            (false, "ScrubRunning", format!("{percent} % are compared; {} blocks differ so far{unreadable}", scrub.mismatched))
        }
        ScrubState::Ended(Errno::ECANCELED) => (false, "ScrubStopped", format!("it was told to stop after {percent} %")),
        ScrubState::Ended(Errno::ESHUTDOWN) => {
            (false, "ScrubInterrupted", format!("the volume was unstaged after {percent} %: it begins anew when it is staged"))
        }
        ScrubState::Ended(Errno::ENODEV) => {
            (false, "ScrubInterrupted", format!("a copy was lost after {percent} %: it begins anew when both are there again"))
        }
        ScrubState::Ended(errno) => (false, "ScrubInterrupted", format!("it ended after {percent} %: {errno}")),
        ScrubState::Completed if scrub.mismatched == 0 => {
            (true, "ScrubCompleted", format!("{mebibytes} MiB that were ever written are the same in both copies{unreadable}{skipped}"))
        }
        ScrubState::Completed if differ == 0 => (
            true,
            "ScrubRepaired",
            format!(
                "{} blocks of {BLOCK_SIZE} bytes differed and were written anew from {}, as was asked: {ranges}{unreadable}{skipped}",
                scrub.mismatched,
                found.believed.as_deref().unwrap_or("the other copy")
            ),
        ),
        ScrubState::Completed => (
            false,
            "ScrubMismatch",
            format!(
                "{differ} blocks of {BLOCK_SIZE} bytes differ between the copies: {ranges}{unreadable}{skipped}. They are as they were: which copy is right the \
                 mirror cannot know. To put what one has on the other, annotate the volume with {BELIEVE_ANNOTATION}: <disk or leg id of the \
                 right one> and {SCRUB_ANNOTATION}: now"
            ),
        ),
    })
}

impl<S: Store> Node<S> {
    /// Starts the scrub that is wanted, stops the one that is not, and takes the annotations away when it is done. Says whether the
    /// object is to be written again.
    pub(super) async fn mind_scrub(
        self: &Arc<Self>,
        open: &Arc<OpenVolume>,
        status: &Status,
        wish: Option<Wish>,
        scrubs: &mut Scrubs,
    ) -> bool {
        if scrubs.result.is_some() && status.scrub.state == ScrubState::Running {
            // The end is not on the object yet.
            return true;
        }
        if let (Some(result), Some(granted)) = (scrubs.result.take(), &scrubs.granted) {
            self.scrub_ended(open, granted, &result).await;
            scrubs.granted = None;
            return true;
        }
        if scrubs.task.is_some() {
            if wish.is_none()
                && let Err(error) = open.volume.stop_scrub().await
            {
                warn!(%error, "the scrub could not be stopped");
            }
            return false;
        }
        let Some(wish) = wish else { return false };
        if scrubs.refused.take_if(|refused| *refused == wish).is_some() {
            self.forget_scrub(&open.id, &wish).await;
            return false;
        }
        let there = status.legs.iter().all(|leg| leg.state != LegState::Out);
        if !status.ready || status.read_only || status.stopped || !there {
            return false;
        }
        let believed = match &wish.believed {
            None => None,
            Some(name) => match open.slot_of(status, name) {
                Some(slot) => Some(slot),
                None => {
                    let refused = format!(
                        "{BELIEVE_ANNOTATION}: {name:?} is neither the disk nor the id of a copy of this volume (see status.legs): nothing was compared"
                    );
                    warn!(reason = "ScrubRefused", "{refused}");
                    open.found.lock().unwrap_or_else(PoisonError::into_inner).refused = Some(refused);
                    scrubs.refused = Some(wish);
                    return true;
                }
            },
        };
        {
            let mut found = open.found.lock().unwrap_or_else(PoisonError::into_inner);
            (found.refused, found.believed) = (None, wish.believed.clone());
        }
        info!(reason = "ScrubStarted", repair_from = wish.believed, "the copies are being compared");
        let comparing = Arc::clone(open);
        scrubs.granted = Some(wish);
        scrubs.task = Some(tokio::spawn(async move { comparing.volume.scrub(believed).await }));
        false
    }

    async fn scrub_ended(self: &Arc<Self>, open: &OpenVolume, wish: &Wish, result: &Ended) {
        let scrub = open.volume.status().borrow().scrub;
        let message = open.scrubbed(&scrub).map_or(String::new(), |(_, _, message)| message);
        match result {
            Ok(()) if scrub.mismatched > 0 => {
                warn!(reason = "ScrubMismatch", blocks = scrub.mismatched, repaired = scrub.repaired, "{message}");
                self.tell_of_volume(&open.latest(), vec![news(true, "ScrubMismatch", message)]);
            }
            Ok(()) => {
                info!(reason = "ScrubCompleted", "{message}");
                self.tell_of_volume(&open.latest(), vec![news(false, "ScrubCompleted", message)]);
            }
            Err(error) => warn!(reason = "ScrubInterrupted", %error, "{message}"),
        }
        if result.is_ok() {
            self.forget_scrub(&open.id, wish).await;
        }
    }

    /// Takes the annotations away, unless they ask for another scrub by now.
    async fn forget_scrub(&self, id: &str, wish: &Wish) {
        let forgotten = self.change_annotations(id, |annotations| {
            let same = Wish::of(Some(annotations)).as_ref() == Some(wish);
            same && [SCRUB_ANNOTATION, BELIEVE_ANNOTATION].map(|name| annotations.remove(name).is_some()).contains(&true)
        });
        if let Err(error) = forgotten.await {
            warn!(%error, "the annotation {SCRUB_ANNOTATION} could not be taken away: the copies are compared again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrub(state: ScrubState, mismatched: u64, repaired: u64) -> status::Scrub {
        status::Scrub { state, done: 50, total: 200, compared: 512, mismatched, repaired, unreadable: 0, skipped: 0 }
    }

    #[test]
    fn the_condition_names_the_blocks_and_what_to_do_and_is_true_only_if_the_copies_are_the_same_now() {
        let mut found = Found { ranges: vec![BlockRange::new(17, 19)], ..Found::default() };
        let (same, reason, message) = said(&scrub(ScrubState::Completed, 2, 0), &found).unwrap();
        assert!(!same && reason == "ScrubMismatch");
        assert!(message.contains("2 blocks") && message.contains("[17, 19)") && message.contains(BELIEVE_ANNOTATION), "{message}");
        found.believed = Some("sdx".into());
        let (same, reason, message) = said(&scrub(ScrubState::Completed, 2, 2), &found).unwrap();
        assert!(same && reason == "ScrubRepaired" && message.contains("from sdx"), "{message}");
        assert!(!said(&scrub(ScrubState::Completed, 2, 1), &found).unwrap().0, "one is left");
        assert_eq!(said(&scrub(ScrubState::Never, 0, 0), &found), None);
        found.ranges.clear();
        let (same, reason, message) = said(&scrub(ScrubState::Completed, 0, 0), &found).unwrap();
        assert!(same && reason == "ScrubCompleted" && message.contains("2 MiB"), "{message}");
        assert!(said(&scrub(ScrubState::Running, 3, 0), &found).unwrap().2.contains("25 %"));
        found.ranges = (0..40).map(|block| BlockRange::new(2 * block, 2 * block + 1)).collect();
        assert!(said(&scrub(ScrubState::Completed, 40, 0), &found).unwrap().2.contains("and more"));
    }
}
