//! Events of the objects. kube's recorder makes one series of what repeats within minutes; what goes on repeating is cut off here.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tracing::debug;

use crate::News;

/// So many events of one object may come at once,
const BURST: u32 = 20;
/// and one more each time that this has passed. The numbers of client-go's filter, but a little less patient with us.
const REFILL: Duration = Duration::from_secs(300);
/// What the API takes, in bytes.
const LONGEST_NOTE: usize = 1024;

/// What one object is still allowed.
#[derive(Clone, Copy, Debug)]
struct Allowance {
    left: u32,
    since: Instant,
}

impl Allowance {
    fn take(&mut self, now: Instant) -> bool {
        let refills = u32::try_from(now.saturating_duration_since(self.since).as_secs() / REFILL.as_secs()).unwrap_or(u32::MAX);
        if refills > 0 {
            self.left = self.left.saturating_add(refills).min(BURST);
            self.since = now;
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }

    fn is_full(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= REFILL * (BURST - self.left)
    }
}

/// Who publishes events.
#[derive(Clone)]
pub(super) struct Events {
    recorder: Recorder,
    guard: std::sync::Arc<Mutex<Guard>>,
}

/// By UID.
#[derive(Debug, Default)]
struct Guard(BTreeMap<String, Allowance>);

impl Guard {
    fn allows(&mut self, about: &ObjectReference, now: Instant) -> bool {
        self.0.retain(|_, allowance| !allowance.is_full(now));
        let key = about.uid.clone().or_else(|| about.name.clone()).unwrap_or_default();
        self.0.entry(key).or_insert(Allowance { left: BURST, since: now }).take(now)
    }
}

impl Events {
    /// Events say that they are from `component`, on `instance`.
    pub(super) fn new(client: Client, component: &str, instance: Option<String>) -> Self {
        let reporter = Reporter { controller: component.to_owned(), instance };
        Self { recorder: Recorder::new(client, reporter), guard: Default::default() }
    }

    pub(super) async fn tell(&self, about: &ObjectReference, news: &News) -> kube::Result<()> {
        if !self.guard.lock().unwrap_or_else(PoisonError::into_inner).allows(about, Instant::now()) {
            debug!(reason = news.reason, object = about.name, "too many events of this object: this one is in the log only");
            return Ok(());
        }
        let event = Event {
            type_: if news.warning { EventType::Warning } else { EventType::Normal },
            reason: news.reason.to_owned(),
            note: Some(shortened(&news.message)),
            action: news.reason.to_owned(),
            secondary: news.related.clone(),
        };
        self.recorder.publish(&event, about).await
    }
}

fn shortened(message: &str) -> String {
    const MORE: &str = " ...";
    if message.len() <= LONGEST_NOTE {
        return message.to_owned();
    }
    let end = (0..=LONGEST_NOTE - MORE.len()).rev().find(|end| message.is_char_boundary(*end)).unwrap_or_default();
    format!("{}{MORE}", &message[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(uid: &str) -> ObjectReference {
        ObjectReference { uid: Some(uid.into()), ..ObjectReference::default() }
    }

    #[test]
    fn an_object_has_a_burst_of_events_and_then_one_now_and_then() {
        let (mut guard, start) = (Guard::default(), Instant::now());
        let allowed = (0..10 * BURST).filter(|_| guard.allows(&about("a"), start)).count();
        assert_eq!(allowed, BURST as usize);
        assert!(guard.allows(&about("b"), start), "another object has its own");
        let later = start + REFILL;
        assert!(guard.allows(&about("a"), later) && !guard.allows(&about("a"), later));
        // Day after day it is one in each interval, and not the burst again.
        let day = 24 * 3600 / REFILL.as_secs();
        let allowed = (0..86_400).filter(|second| guard.allows(&about("a"), later + Duration::from_secs(*second))).count() as u64;
        assert!((day - 1..=day + 1).contains(&allowed), "{allowed}");
        // What was quiet for long enough is forgotten, and may say as much as at first.
        let quiet = later + REFILL * (2 * BURST) + Duration::from_secs(86_400);
        assert_eq!((0..10 * BURST).filter(|_| guard.allows(&about("a"), quiet)).count(), BURST as usize);
        assert_eq!(guard.0.len(), 1, "the others are forgotten");
    }

    #[test]
    fn a_long_message_is_cut_to_what_the_api_takes_between_two_characters() {
        assert_eq!(shortened("short"), "short");
        for message in ["x".repeat(2000), "☃".repeat(1000)] {
            let note = shortened(&message);
            assert!(note.len() <= LONGEST_NOTE && note.len() > LONGEST_NOTE - 8 && note.ends_with(" ..."), "{}", note.len());
        }
    }
}
