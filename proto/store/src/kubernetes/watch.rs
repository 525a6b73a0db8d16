//! One watch for each kind, of the objects' metadata, shared by all who wait: calls come and go, and a watch begins with a list.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::StreamExt;
use kube::{
    Api,
    api::{ApiResource, DynamicObject},
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use tokio::{sync::watch::Sender, task::AbortHandle};
use tracing::warn;

use crate::told::Told;

/// Who waits looks again after this, told or not.
const RELIST: Duration = Duration::from_secs(30);

/// What is watched, by kind.
#[derive(Clone, Default)]
pub(super) struct Watches(Arc<Mutex<BTreeMap<String, Watch>>>);

struct Watch {
    sender: Sender<()>,
    task: AbortHandle,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watches {
    /// Changes of the kind from now on. The first one who asks starts the watch; it lasts as long as the store. It begins with a list, and the
    /// end of each list is told as a change: so whatever happens after this call is told, also before the watch has begun or while it
    /// is interrupted.
    pub(super) fn changes(
        &self,
        api: Api<PartialObjectMeta<DynamicObject>>,
        resource: ApiResource,
        selector: Option<String>,
    ) -> Told<Self> {
        let mut watches = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let watch = watches.entry(api.resource_url().to_owned()).or_insert_with(|| {
            let sender = Sender::new(());
            let task = tokio::spawn(follow(api, resource.plural, selector, sender.clone())).abort_handle();
            Watch { sender, task }
        });
        Told { relist: RELIST, receiver: watch.sender.subscribe(), _watches: self.clone() }
    }
}

async fn follow(api: Api<PartialObjectMeta<DynamicObject>>, kind: String, selector: Option<String>, sender: Sender<()>) {
    let config = watcher::Config { field_selector: selector, ..watcher::Config::default() };
    let mut events = std::pin::pin!(watcher(api, config).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(_) | Event::Delete(_) | Event::InitDone) => {
                sender.send_replace(());
            }
            Ok(Event::Init | Event::InitApply(_)) => {}
            // Tried again, less and less often.
            Err(error) => warn!(%error, kind, "the objects are not watched"),
        }
    }
}
