//! What all parts of the plugin share.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use lockstep_datapath::Datapath;
use lockstep_proto::objects::{MirrorVolume, MirrorVolumeStatus};
use lockstep_store::Store;
use tokio::{sync::Notify, task::JoinSet};

use crate::{disks::Disks, error::Error, mirror::OpenVolume, quarantine::Assemblies, state_dir::StateDir};

/// How long a call waits for what the node itself does to a volume.
const PATIENCE: Duration = Duration::from_secs(10);

/// The node plugin.
#[derive(Debug)]
pub struct Node<S> {
    /// The node's name: the value of the topology key.
    pub name: String,
    /// Where the objects are.
    pub store: S,
    /// What is kept off the mirrored disks.
    pub state: Arc<StateDir>,
    /// The disks.
    pub disks: Arc<Disks>,
    /// The threads that serve volumes.
    pub datapath: Datapath,
    /// Open volumes, by the UID of their object.
    pub(crate) open: Mutex<BTreeMap<String, Arc<OpenVolume>>>,
    /// Mirrors that are being assembled.
    pub(crate) assemblies: Assemblies,
    busy: Mutex<BTreeMap<String, Holder>>,
    freed: Notify,
    scanned: AtomicBool,
}

/// Who is at work on a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// A call: another one is told to come again.
    Call,
    /// The node itself, for its object's sake: a call waits for it.
    Object,
}

/// One operation at a time on a volume.
#[derive(Debug)]
pub struct Guard<S> {
    node: Arc<Node<S>>,
    volume: String,
}

impl<S> Drop for Guard<S> {
    fn drop(&mut self) {
        self.node.busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.volume);
        self.node.freed.notify_waiters();
    }
}

impl<S: Store> Node<S> {
    /// Nothing runs yet.
    pub fn new(name: String, store: S, state: Arc<StateDir>, disks: Arc<Disks>, datapath: Datapath) -> Self {
        Self {
            name,
            store,
            state,
            disks,
            datapath,
            open: Mutex::default(),
            assemblies: Assemblies::default(),
            busy: Mutex::default(),
            freed: Notify::new(),
            scanned: AtomicBool::new(false),
        }
    }

    /// Every disk was looked at once.
    pub fn set_scanned(&self) {
        self.scanned.store(true, Ordering::Release);
    }

    /// Before that, a copy that is not found is not lost.
    pub(crate) fn scanned(&self) -> Result<(), Error> {
        if self.scanned.load(Ordering::Acquire) { Ok(()) } else { Err(Error::Starting) }
    }

    /// Begins an operation on a volume, or says who is at work on it.
    pub(crate) fn begin(self: &Arc<Self>, volume: &str, holder: Holder) -> Result<Guard<S>, Holder> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        match busy.get(volume) {
            Some(other) => Err(*other),
            None => {
                busy.insert(volume.to_owned(), holder);
                Ok(Guard { node: Arc::clone(self), volume: volume.to_owned() })
            }
        }
    }

    async fn begin_call(self: &Arc<Self>, volume: &str) -> Result<Guard<S>, Error> {
        let begin = async {
            loop {
                let freed = self.freed.notified();
                match self.begin(volume, Holder::Call) {
                    Ok(guard) => return Some(guard),
                    Err(Holder::Call) => return None,
                    Err(Holder::Object) => freed.await,
                }
            }
        };
        let begun = tokio::time::timeout(PATIENCE, begin).await.ok().flatten();
        begun.ok_or_else(|| Error::Busy(volume.to_owned()))
    }

    /// Does an operation on a volume to its end, also if the caller goes away.
    ///
    /// # Errors
    /// `Error::Busy` if another call is at work on the volume.
    pub(crate) async fn exclusively<T, F>(self: &Arc<Self>, volume: &str, work: impl FnOnce(Arc<Self>) -> F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let guard = self.begin_call(volume).await?;
        let work = work(Arc::clone(self));
        let task = tokio::spawn(tracing::Instrument::in_current_span(async move {
            let _guard = guard;
            work.await
        }));
        task.await.unwrap_or_else(|_| Err(Error::Panicked(volume.to_owned())))
    }

    /// The volume, if it is this node's; perhaps on its way out.
    pub(crate) async fn volume(&self, id: &str) -> Result<MirrorVolume, Error> {
        if id.is_empty() {
            return Err(Error::InvalidArgument("volume_id is missing".into()));
        }
        let found = match self.store.get::<MirrorVolume>(id).await {
            // What cannot be a name names nothing.
            Err(lockstep_store::Error::Name { .. }) => None,
            found => found?,
        };
        found.filter(|volume| volume.spec.node == self.name).ok_or_else(|| Error::NoVolume(id.to_owned()))
    }

    /// At the end of the process, which is not a crash of what is being assembled: what was answered is durable. The devices of volumes that are
    /// still in use wait for the next one, or end with the process if nobody holds them; the dirty bits tell the next one what may differ.
    pub async fn flush_all(&self) {
        let open: Vec<_> = self.open.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let held = self.datapath.has_holder();
        let flushes = open.into_iter().map(|open| async move {
            let device = open.volume.device().display();
            if held {
                tracing::info!(volume = open.id, %device, "the volume is in use: its device waits for the next csi-node");
            } else {
                tracing::warn!(volume = open.id, %device, "the volume is in use: its device ends with this process");
            }
            match tokio::time::timeout(PATIENCE, open.volume.flush()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(volume = open.id, %error, "it could not be flushed"),
                Err(_) => tracing::warn!(volume = open.id, "it could not be flushed in time"),
            }
        });
        // All at once: on a disk that hangs each takes as long as it may.
        flushes.collect::<JoinSet<()>>().join_all().await;
        self.assemblies.abandon(&self.state);
    }

    /// Its open mirror, if it is staged.
    pub(crate) fn open_volume(&self, uid: &str) -> Option<Arc<OpenVolume>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).get(uid).cloned()
    }

    /// Changes an object's annotations, however often others write it in between. `change` says whether it changed anything: what would change
    /// nothing writes nothing.
    pub(crate) async fn change_annotations(
        &self,
        id: &str,
        change: impl Fn(&mut BTreeMap<String, String>) -> bool + Send,
    ) -> Result<(), Error> {
        loop {
            let mut volume = self.volume(id).await?;
            if !volume.metadata.annotations.as_mut().is_some_and(&change) {
                return Ok(());
            }
            match self.store.update(volume).await {
                Err(lockstep_store::Error::Conflict { .. }) => {}
                updated => {
                    let updated = updated?;
                    if let Some(open) = self.open_volume(&names(&updated).1) {
                        open.set_latest(&updated);
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Changes the status of the very object with this UID, however often others write it in between. What would change nothing writes
    /// nothing.
    pub(crate) async fn patch_status(
        &self,
        id: &str,
        uid: &str,
        change: impl Fn(&mut MirrorVolumeStatus) + Send,
    ) -> Result<MirrorVolume, Error> {
        self.patch_known_status(None, id, uid, change).await
    }

    /// The same, first with the object as it is known: if nothing changes in that, the store is not asked.
    pub(crate) async fn patch_known_status(
        &self,
        mut known: Option<MirrorVolume>,
        id: &str,
        uid: &str,
        change: impl Fn(&mut MirrorVolumeStatus) + Send,
    ) -> Result<MirrorVolume, Error> {
        loop {
            let mut volume = match known.take() {
                Some(known) => known,
                None => self.volume(id).await?,
            };
            if volume.metadata.uid.as_deref() != Some(uid) {
                return Err(Error::NoVolume(id.to_owned()));
            }
            let before = volume.status.clone();
            change(volume.status.get_or_insert_default());
            if volume.status == before {
                return Ok(volume);
            }
            match self.store.update_status(volume).await {
                Err(lockstep_store::Error::Conflict { .. }) => {}
                written => return Ok(written?),
            }
        }
    }
}

/// The name and the UID of a stored object.
pub(crate) fn names(volume: &MirrorVolume) -> (String, String) {
    (volume.metadata.name.clone().unwrap_or_default(), volume.metadata.uid.clone().unwrap_or_default())
}

/// Work that may block.
pub(crate) async fn blocking<T: Send + 'static>(what: &str, work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    let span = tracing::Span::current();
    let result = tokio::task::spawn_blocking(move || span.in_scope(work)).await;
    result.unwrap_or_else(|_| Err(Error::Panicked(what.to_owned())))
}
